"""Optimizers resume exactly whatever their state looks like, and it goes by the names of parameters."""

from __future__ import annotations

import inspect

import pytest
import torch
from _stopped import Net, assert_resumes_exactly, fit
from torch import nn

from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.plugin.state.training_state import Description


class Matrices(Net):
    """Has weights and no biases, for optimizers that take nothing else."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net = nn.Sequential(
            nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False)
        )


class Sparse(Net):
    """Has sparse gradients."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net = nn.Embedding(10, 1, sparse=True)

    def forward(self, x):
        return self.net((x[:, 0].abs() * 3).long())


RATES = {"Adadelta": 1.0, "LBFGS": 0.5}
MODULES = {"Muon": Matrices, "SparseAdam": Sparse}
CLASSES = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name != "Optimizer"
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CLASSES)
def test_every_optimizer_of_torch_resumes_exactly(tmp_path, name):
    """Factored, flat or as large as the parameters: its state is its own affair."""

    def make_module():
        return MODULES.get(name, Net)(lambda params: CLASSES[name](params, RATES.get(name, 0.01)))

    assert_resumes_exactly(tmp_path, make_module)


class Factored(torch.optim.Optimizer):
    """Has a load_state_dict of its own, and a state in a form of its own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.05})
        self.sums = [torch.zeros(1) for _ in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            self.sums[number] += parameter.grad.square().mean()
            rate = self.param_groups[0]["lr"] / (1 + self.sums[number])
            parameter.sub_(rate * parameter.grad)
        return loss

    def state_dict(self):
        return {"sums": [each.clone() for each in self.sums], "lr": self.param_groups[0]["lr"]}

    def load_state_dict(self, state_dict):
        self.sums = [each.clone() for each in state_dict["sums"]]
        self.param_groups[0]["lr"] = state_dict["lr"]


def test_an_optimizer_with_a_state_of_its_own_form_resumes_exactly(tmp_path):
    """Neither groups nor numbers are asked for."""
    assert_resumes_exactly(tmp_path, lambda: Net(Factored))


class Layers(Net):
    """Two layers of one shape, made in an order of one's choice, with the same first weights."""

    def __init__(self, order="ab", optimizer=None):
        super().__init__(optimizer or (lambda params: torch.optim.Adam(params, 0.05)))
        del self.net
        for name in order:
            torch.manual_seed(ord(name))
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x):
        return self.b(self.a(x).tanh()).sum(1, keepdim=True)


def weights(run):
    return run.module.state_dict()


def train(dirpath, module, epochs, **options):
    """Fit with random numbers that don't depend on the module."""
    torch.manual_seed(7)
    return fit(dirpath, module, epochs=epochs, **options)


def assert_same_weights(run, other):
    expected, found = weights(other), weights(run)
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def by_kind(optimizer_order):
    """Return an optimizer of two groups, weights and biases, which are named."""

    def make(module):
        groups = {
            "weights": {"params": [], "lr": 0.05, "weight_decay": 0.1},
            "biases": {"params": [], "lr": 0.02, "weight_decay": 0.0},
        }
        for name, parameter in module.named_parameters():
            groups["weights" if name.endswith("weight") else "biases"]["params"].append(parameter)
        return torch.optim.AdamW([groups[name] for name in optimizer_order])

    return make


class Grouped(Layers):
    """Has groups, and a scheduler with a list for each of them."""

    def __init__(self, order="ab", groups=("weights", "biases")):
        super().__init__(order)
        self.groups = groups

    def configure_optimizers(self):
        optimizer = by_kind(self.groups)(self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Tied(Layers):
    """Has one parameter under two names."""

    def __init__(self, order="ab"):
        super().__init__(order)
        self.b.weight = self.a.weight


class Swapped(Layers):
    """Looks compiled, without the compiler."""

    def __init__(self, order="ab"):
        super().__init__(order)
        self.a = torch._dynamo.OptimizedModule(self.a, torch._dynamo.disable)


class Named(Layers):
    """Gives its optimizer the names, as newer releases of torch take them."""

    def configure_optimizers(self):
        try:
            return torch.optim.Adam(self.named_parameters(), 0.05)
        except TypeError:
            pytest.skip("this release of torch takes no names")


class TwoOptimizers(Layers):
    """Has two, which train by hand."""

    def __init__(self, order="ab"):
        super().__init__(order)
        self.automatic_optimization = False
        self.c = nn.Linear(1, 1)

    def forward(self, x):
        return self.c(super().forward(x))

    def training_step(self, batch, index):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        layers = [p for name, p in self.named_parameters() if not name.startswith("c")]
        return [torch.optim.SGD(self.c.parameters(), 0.01, 0.9), torch.optim.Adam(layers, 0.05)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda: Layers("ab"), lambda: Layers("ba")),
        (lambda: Grouped("ab"), lambda: Grouped("ba")),
        (lambda: Grouped("ab"), lambda: Grouped("ab", ("biases", "weights"))),
        (lambda: Tied("ab"), lambda: Tied("ba")),
        (lambda: Named("ab"), lambda: Named("ba")),
        (lambda: TwoOptimizers("ab"), lambda: TwoOptimizers("ba")),
    ],
    ids=["layers", "layers in groups", "groups", "tied", "named in groups", "two optimizers"],
)
def test_layers_that_change_places_keep_their_own_moments(tmp_path, before, after):
    """The saved state goes by name; so do the rates of groups, in the scheduler too."""
    whole = train(tmp_path / "whole", before(), 4)
    train(tmp_path / "run", before(), 2)
    resumed = train(tmp_path / "run", after(), 4)
    assert_same_weights(resumed, whole)


def test_a_layer_that_is_compiled_from_now_on_keeps_its_moments(tmp_path):
    """With its place changed at the same time."""
    whole = train(tmp_path / "whole", Layers(), 4)
    train(tmp_path / "run", Layers(), 2)
    resumed = train(tmp_path / "run", Swapped(), 4)
    expected = weights(whole)
    found = {name.replace("_orig_mod.", ""): value for name, value in weights(resumed).items()}
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class Renamed(Layers):
    """Calls its first layer z, and so has it last."""

    def __init__(self):
        super().__init__("ab")
        self.z = self.a
        del self.a

    def forward(self, x):
        return self.b(self.z(x).tanh()).sum(1, keepdim=True)


def test_a_key_map_is_for_the_optimizer_too(tmp_path):
    """The parameter that was renamed has another place as well."""
    whole = train(tmp_path / "whole", Layers(), 4)
    train(tmp_path / "run", Layers(), 2)
    resumed = train(tmp_path / "run", Renamed(), 4, key_map={"a.": "z."})
    assert torch.equal(resumed.module.z.weight, whole.module.a.weight)
    assert torch.equal(resumed.module.b.weight, whole.module.b.weight)


def test_parameters_that_a_hook_renames_keep_their_moments_by_their_places(tmp_path):
    """As with Lightning alone; it is said."""

    class Migrated(Layers):
        def __init__(self):
            super().__init__("ab")
            first, second = self.a, self.b
            del self.a, self.b
            self.first, self.second = first, second

        def forward(self, x):
            return self.second(self.first(x).tanh()).sum(1, keepdim=True)

        def on_load_checkpoint(self, checkpoint):
            old = checkpoint["state_dict"]
            checkpoint["state_dict"] = {
                f"{'first' if key[0] == 'a' else 'second'}{key[1:]}": old[key] for key in old
            }

    whole = train(tmp_path / "whole", Layers(), 4)
    train(tmp_path / "run", Layers(), 2)
    resumed = train(tmp_path / "run", Migrated(), 4)
    assert torch.equal(resumed.module.second.weight, whole.module.b.weight)
    skipped = "\n".join(resumed.callback.resume_report.skipped)
    assert "optimizer: first.weight has the state of a.weight, by its place" in skipped


class WithMore(Layers):
    """Has one more layer, before the others."""

    def __init__(self):
        super().__init__("cab")

    def forward(self, x):
        return super().forward(self.c(x))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (Layers, WithMore, "optimizer: c.weight: only in this run"),
        (WithMore, Layers, "optimizer: c.weight: only in the checkpoint"),
    ],
    ids=["added", "removed"],
)
def test_a_layer_that_was_added_or_removed_is_named_and_bridged_by_partial(
    tmp_path, before, after, message
):
    """The model is refused first; with partial=True the others keep their own moments."""
    train(tmp_path, before(), 1)
    with pytest.raises(MismatchError, match=r"c\.weight: only in the"):
        train(tmp_path, after(), 2)

    class Lenient(after):
        strict_loading = False

    with pytest.raises(MismatchError, match=message) as caught:
        train(tmp_path, Lenient(), 2, on_change="warn")
    assert "partial=True" in str(caught.value) and caught.value.__cause__ is not None

    saved = {}

    class Looks(after):
        def on_train_start(self):
            state = self.optimizers().optimizer.state
            steps = {name: state.get(p, {}).get("step") for name, p in self.named_parameters()}
            saved.update({name: step and int(step) for name, step in steps.items()})

    run = train(tmp_path, Looks(), 2, partial=True)
    assert saved["a.weight"] == 4
    assert saved.get("c.weight") is None
    assert any("optimizer: " in line and "c.weight" in line for line in _skipped(run))


def _skipped(run):
    return run.callback.resume_report.skipped


def test_a_wider_layer_begins_its_moments_anew_with_partial(tmp_path):
    """Its weights were not loaded, so the moments of the old ones are nothing to it."""

    class Wider(Layers):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(4, 6)

    train(tmp_path, Layers(), 1)
    run = train(tmp_path, Wider(), 2, partial=True)
    assert run.trainer.global_step == 8
    assert "optimizer: b.weight begins anew" in _skipped(run)


def test_a_layer_that_the_module_widens_itself_is_refused_by_its_moments(tmp_path):
    """Otherwise the first step would fail, by a message of tensor sizes."""

    class Widens(Layers):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(4, 6)

        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            for key in ("b.weight", "b.bias"):
                state[key] = torch.cat([state[key], state[key][:2]])

    train(tmp_path, Layers(), 1)
    expected = r"exp_avg of b.weight is \(4, 4\) in the checkpoint, the parameter \(6, 4\)"
    with pytest.raises(MismatchError, match=expected):
        train(tmp_path, Widens(), 2)
    assert train(tmp_path, Widens(), 2, skip=["optimizer"]).trainer.global_step == 8


def test_other_parameters_of_the_same_number_begin_anew(tmp_path):
    """By position they would get the moments of others, silently."""

    def only(name):
        class Only(Layers):
            def configure_optimizers(self):
                return torch.optim.Adam(getattr(self, name).parameters(), 0.05)

        return Only()

    train(tmp_path, only("a"), 1)
    run = train(tmp_path, only("b"), 2)
    assert "optimizer: b.weight begins anew" in _skipped(run)
    assert "optimizer: the state of a.weight is not used" in _skipped(run)


def test_a_state_that_has_no_places_for_parameters_says_so(tmp_path):
    """LBFGS keeps all of them in one row."""

    def lbfgs(params):
        return torch.optim.LBFGS(params, 0.1)

    train(tmp_path, Layers("ab", lbfgs), 1)
    run = train(tmp_path, Layers("ba", lbfgs), 2)
    assert any("the state of LBFGS can't be told apart by parameter" in x for x in _skipped(run))


def test_a_checkpoint_without_names_goes_by_position(tmp_path):
    """As those of earlier releases."""
    before = Description.of

    def without_names(trainer, rates):
        found = before(trainer, rates)
        return Description(found.classes, (), ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Description, "of", without_names)
        whole = train(tmp_path / "whole", Layers(), 4)
        train(tmp_path / "run", Layers(), 2)
    resumed = train(tmp_path / "run", Layers(), 4)
    assert_same_weights(resumed, whole)


class MyAdam(torch.optim.AdamW):
    """A subclass."""


@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.optim.AdamW, MyAdam), (MyAdam, torch.optim.AdamW)],
    ids=["to a subclass", "from one"],
)
def test_an_optimizer_under_another_name_takes_the_state_it_can_take(tmp_path, before, after):
    """A class of somebody else's that has the same options is asked, as Lightning asks it."""
    whole = train(tmp_path / "whole", Layers("ab", lambda p: before(p, 0.05)), 4)
    train(tmp_path / "run", Layers("ab", lambda p: before(p, 0.05)), 2)
    resumed = train(tmp_path / "run", Layers("ab", lambda p: after(p, 0.05)), 4)
    assert_same_weights(resumed, whole)


def test_every_misfit_of_optimizers_and_schedulers_is_listed_at_once(tmp_path):
    """Two optimizers and a scheduler, each by its name."""

    class Other(TwoOptimizers):
        def configure_optimizers(self):
            adam, sgd = super().configure_optimizers()[::-1]
            return [torch.optim.RMSprop(self.c.parameters(), 0.01), sgd, adam][:2]

    train(tmp_path, TwoOptimizers(), 1)
    with pytest.raises(MismatchError) as caught:
        train(tmp_path, Other(), 2)
    assert "optimizer: SGD in the checkpoint, RMSprop in this run" in str(caught.value)
    assert "optimizer_1: Adam in the checkpoint, SGD in this run" in str(caught.value)


def test_a_scheduler_that_is_new_begins_and_is_named(tmp_path):
    """Lightning resumes it, silently."""
    train(tmp_path, Layers("ab", lambda p: torch.optim.AdamW(p, 0.05)), 1)
    run = train(tmp_path, Grouped("ab"), 2, partial=True)
    assert "lr_scheduler: begins anew (0 in the checkpoint, 1 in this run)" in _skipped(run)


class Other(Layers):
    """A net with SGD, or none of the saved states."""

    def __init__(self):
        super().__init__("ab", lambda params: torch.optim.SGD(params, 0.05))


def test_a_hook_that_takes_the_states_out_has_its_way(tmp_path):
    """The usual way to go on with another optimizer; it begins anew, and the report says so."""

    class Drops(Other):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["optimizer_states"] = []
            checkpoint["lr_schedulers"] = []

    train(tmp_path, Layers(), 1)
    run = train(tmp_path, Drops(), 2)
    assert run.trainer.global_step == 8
    assert "optimizer: begins anew (0 in the checkpoint, 1 in this run)" in _skipped(run)


def test_a_hook_that_puts_the_state_in_another_order_has_its_way(tmp_path):
    """It is not put in order twice."""

    class Reorders(Layers):
        def __init__(self):
            super().__init__("ba")

        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["optimizer_states"][0]["state"]
            checkpoint["optimizer_states"][0]["state"] = {i: state[(i + 2) % 4] for i in range(4)}

    whole = train(tmp_path / "whole", Layers(), 4)
    train(tmp_path / "run", Layers(), 2)
    assert_same_weights(train(tmp_path / "run", Reorders(), 4), whole)


def test_an_optimizer_that_is_new_beside_the_saved_one_begins_anew(tmp_path):
    """As with Lightning alone; the first one gets its own state."""

    class One(TwoOptimizers):
        def configure_optimizers(self):
            return super().configure_optimizers()[:1]

        def optimizers(self):
            return [super().optimizers()]

    train(tmp_path, One(), 1)
    run = train(tmp_path, TwoOptimizers(), 2)
    assert "optimizer_1: begins anew (1 in the checkpoint, 2 in this run)" in _skipped(run)


class NoRate(torch.optim.SGD):
    """Computes its rate itself, as Adafactor of transformers does, and has None in its groups."""

    def __init__(self, params, rate=0.05):
        super().__init__(params, rate, momentum=0.9)
        self.rate = rate
        for group in self.param_groups:
            group["lr"] = None

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.rate
        try:
            return super().step(closure)
        finally:
            for group in self.param_groups:
                group["lr"] = None


@pytest.mark.parametrize("keep_lr", [False, True])
def test_an_optimizer_without_a_learning_rate_resumes_exactly(tmp_path, keep_lr):
    """There is nothing to keep, and nothing to fail at."""
    assert_resumes_exactly(tmp_path, lambda: Net(NoRate), keep_lr=keep_lr)
