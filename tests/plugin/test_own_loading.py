"""A module's hooks and its own loading decide what it takes; what it refuses is listed, and undone."""

from __future__ import annotations

import warnings

import pytest
import torch
from _stopped import Net, assert_resumes_exactly, fit, seeded
from torch import nn

from lightning_sbckpt.errors import MismatchError


class LeavesOutFrozen(Net):
    """Leaves frozen weights out of what it saves, and puts them back itself."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k.startswith("net.2")}

    def on_load_checkpoint(self, checkpoint):
        for name, value in self.net[0].state_dict().items():
            checkpoint["state_dict"][f"net.0.{name}"] = value


class RenamesKeys(Net):
    """Saves under names of its own, and migrates them when loading."""

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"old.{key}": value for key, value in state.items()}

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.removeprefix("old."): state[key] for key in state}


class Grows(Net):
    """Gets more points as it trains, and makes room for the saved ones."""

    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):
        return super().forward(x) + self.points.mean()

    def on_train_batch_end(self, *args):
        if self.global_step == 4:
            self.points = nn.Parameter(torch.cat([self.points.data, torch.ones(2, 4)]))
            self.optimizers().param_groups[0]["params"] = list(self.parameters())

    def on_load_checkpoint(self, checkpoint):
        self.points = nn.Parameter(torch.empty_like(checkpoint["state_dict"]["points"]))


class TrainedOnly(Net):
    """Has a state_dict and a load_state_dict of its own: only what is trained."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if key.startswith("net.2")}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict=False)


class Bank(nn.Module):
    """A bank of as many rows as it has seen, which loads whatever number of them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, 4))

    def forward(self, x):
        self.rows = torch.cat([self.rows, x.detach().mean(0, keepdim=True)])
        return x + self.rows.mean()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.rows = torch.empty_like(state_dict[f"{prefix}rows"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class WithBank(Net):
    """Has one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), Bank(), nn.Linear(4, 1))


class Scale(nn.Module):
    """Keeps a history of any length as its extra state, as FP8 layers do."""

    def __init__(self):
        super().__init__()
        self.amax = []

    def forward(self, x):
        self.amax.append(float(x.detach().abs().max()))
        return x / (1 + sum(self.amax[-3:]))

    def get_extra_state(self):
        return torch.tensor(self.amax) if self.amax else None

    def set_extra_state(self, state):
        self.amax = [] if state is None else state.tolist()


class WithScale(Net):
    """Has one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), Scale(), nn.Linear(8, 1))


class Lazy(Net):
    """Learns the shapes of its parameters from the first batch."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))


class Versioned(nn.Linear):
    """Asks for the version of its state, as torch's quantization and normalization do."""

    _version = 3

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 3:
            raise RuntimeError(f"a state of version {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class WithVersions(Net):
    """Has two."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Versioned(4, 8), nn.Tanh(), Versioned(8, 1))


class ByPreHook(Net):
    """Renames keys in a hook that torch calls before it looks at them."""

    def __init__(self):
        super().__init__()
        self._register_load_state_dict_pre_hook(self._rename)

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"v1.{key}": value for key, value in state.items()}

    def _rename(self, state_dict, prefix, *args):
        for key in [key for key in state_dict if key.startswith("v1.")]:
            state_dict[key.removeprefix("v1.")] = state_dict.pop(key)


class Parametrized(Net):
    """Has a weight that is computed from others."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.net[0])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "module",
    [
        LeavesOutFrozen,
        RenamesKeys,
        Grows,
        TrainedOnly,
        WithBank,
        WithScale,
        Lazy,
        WithVersions,
        ByPreHook,
        Parametrized,
    ],
)
def test_a_module_that_loads_itself_resumes_exactly(tmp_path, module):
    """Nothing is compared before its own code has run, in Lightning's order."""
    assert_resumes_exactly(tmp_path, module)


def test_the_versions_of_layers_are_kept_for_submodules_with_files_of_their_own(tmp_path):
    """Each file is the state_dict of its module, versions included."""
    assert_resumes_exactly(tmp_path, WithVersions, split_model=["net.2"])


def test_the_hook_sees_the_names_that_were_saved(tmp_path):
    """key_map comes after on_load_checkpoint: it is for what the hook leaves."""
    seen = []

    class Renamed(Net):
        def __init__(self):
            super().__init__()
            self.body = self.net
            del self.net

        def forward(self, x):
            return self.body(x)

        def on_load_checkpoint(self, checkpoint):
            seen.extend(checkpoint["state_dict"])

    fit(tmp_path, seeded(Net), epochs=1)
    fit(tmp_path, seeded(Renamed), epochs=1, key_map={"net.": "body."})
    assert seen[0] == "net.0.weight"


def test_a_key_map_still_fits_what_was_saved_after_the_renaming(tmp_path):
    """The script keeps its option, and is killed again; also where the old prefix begins the new one."""

    class Nested(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"net": self.net})

        def forward(self, x):
            return self.net["net"](x)

    fit(tmp_path, seeded(Net), epochs=1)
    for epochs in (2, 3):
        run = fit(tmp_path, seeded(Nested), epochs=epochs, key_map={"net.": "net.net."})
        assert run.trainer.current_epoch == epochs


class Wider(Net):
    """Another last layer."""

    def __init__(self):
        super().__init__()
        self.scale = Scale()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def test_a_refused_state_leaves_the_module_as_it_was(tmp_path):
    """Not half of it loaded, as torch leaves it; and torch's own error is the cause."""
    fit(tmp_path, seeded(Net), epochs=1)
    module = Wider()
    before = {key: value.clone() for key, value in module.named_parameters()}
    with pytest.raises(MismatchError, match="Nothing was loaded") as caught:
        fit(tmp_path, module, epochs=2)
    assert "size mismatch for net.2.weight" in str(caught.value.__cause__)
    assert all(torch.equal(before[key], value) for key, value in module.named_parameters())


def test_a_modules_own_words_are_not_replaced(tmp_path):
    """Where names and shapes are the same, it knows better than we why it refuses."""

    class Refuses(Net):
        def on_load_checkpoint(self, checkpoint):
            raise KeyError("the vocabulary is another one")

    fit(tmp_path, seeded(Net), epochs=1)
    with pytest.raises(KeyError, match="vocabulary"):
        fit(tmp_path, seeded(Refuses), epochs=2)


def test_what_strict_loading_false_leaves_alone_is_said(tmp_path):
    """Lightning loads it silently."""

    class Lenient(Net):
        strict_loading = False

        def __init__(self):
            super().__init__()
            self.more = nn.Linear(2, 2).requires_grad_(False)

        def configure_optimizers(self):
            return self.optimizer(self.net.parameters())

    fit(tmp_path, seeded(Net), epochs=1)
    run = fit(tmp_path, seeded(Lenient), epochs=1)
    assert "more.weight, more.bias: only in the module" in "\n".join(
        run.callback.resume_report.skipped
    )
