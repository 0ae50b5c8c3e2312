"""The objects that need no registration continue exactly where they were."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
import torchmetrics
from _releases import needs_torch
from torch.optim import lr_scheduler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MetricCollection, wrappers
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_sbckpt import Checkpointer, torch_recovery, torch_save
from lightning_sbckpt.errors import DamagedCheckpointError, MismatchError
from lightning_sbckpt.hooks.builtin import metric_state, set_metric_state


def carry_over(tmp_path, source, target):
    """Save one object and load it into another."""
    Checkpointer(tmp_path, {"obj": source}).save_checkpoint()
    assert Checkpointer(tmp_path, {"obj": target}).recover_if_possible() is not None
    return target


class TestModules:
    """Parameters and buffers."""

    def test_parameters_buffers_and_extra_state_come_back(self, tmp_path):
        """Also integer buffers, shared weights and `get_extra_state`."""

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = torch.nn.BatchNorm1d(3)
                self.embedding = torch.nn.Embedding(4, 3)
                self.out = torch.nn.Linear(3, 4, bias=False)
                self.out.weight = self.embedding.weight
                self.seen = []

            def get_extra_state(self):
                return {"seen": self.seen}

            def set_extra_state(self, state):
                self.seen = state["seen"]

        net = Net()
        net.norm(torch.randn(8, 3))
        net.seen.append(5)
        other = carry_over(tmp_path, net, Net())
        for (name, was), (_, now) in zip(net.named_buffers(), other.named_buffers(), strict=True):
            assert torch.equal(was, now), name
        assert other.norm.num_batches_tracked.item() == 1
        assert torch.equal(other.out.weight, net.out.weight)
        assert other.out.weight is other.embedding.weight
        assert other.seen == [5]

    def test_the_version_of_a_layer_is_kept(self, tmp_path):
        """`_metadata` lets torch migrate old layers; without it a BatchNorm is taken for old."""
        file = tmp_path / "norm.ckpt"
        torch_save(torch.nn.BatchNorm1d(2), file)
        assert torch.load(file, weights_only=True)._metadata[""]["version"] == 2

    def test_a_state_that_does_not_fit_names_file_class_and_shapes(self, tmp_path):
        """The words are torch's; the file is added."""
        file = tmp_path / "model.ckpt"
        torch_save(torch.nn.Linear(2, 1), file)
        with pytest.raises(MismatchError, match=r"(?s)model\.ckpt does not fit the Linear.*1, 3"):
            torch_recovery(torch.nn.Linear(3, 1), file, True)

    def test_a_file_that_is_no_torch_file_is_called_damaged(self, tmp_path):
        """With its path."""
        file = tmp_path / "model.ckpt"
        torch_save(torch.nn.Linear(2, 1), file)
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(DamagedCheckpointError, match=r"model\.ckpt can't be read by torch"):
            torch_recovery(torch.nn.Linear(2, 1), file, True)


NEEDS_ARGUMENTS = {"Optimizer", "SparseAdam", "LBFGS"}
OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and name not in NEEDS_ARGUMENTS
}
OPTIMIZERS["SGD with momentum"] = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)
OPTIMIZERS["LBFGS"] = lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3, history_size=2)
OPTIMIZERS["Adam with amsgrad"] = lambda params: torch.optim.Adam(params, amsgrad=True)


class TestOptimizers:
    """Every optimizer of `torch.optim` takes the next steps it would have taken."""

    @pytest.mark.parametrize("name", sorted(OPTIMIZERS))
    def test_the_next_steps_are_the_same_bits(self, tmp_path, name):
        """Three steps, a checkpoint, two more steps on both sides."""

        def make():
            torch.manual_seed(1)
            weight = torch.nn.Parameter(torch.randn(3, 2))
            optimizer = OPTIMIZERS[name]([weight])
            return weight, optimizer

        def step(weight, optimizer, number):
            def loss():
                optimizer.zero_grad()
                value = ((weight * number) ** 2).sum()
                value.backward()
                return value

            optimizer.step(loss)

        weight, optimizer = make()
        for number in range(1, 4):
            step(weight, optimizer, number)
        Checkpointer(tmp_path, {"optimizer": optimizer}).save_checkpoint()
        at_save = weight.detach().clone()
        for number in (4, 5):
            step(weight, optimizer, number)

        resumed, its_optimizer = make()
        Checkpointer(tmp_path, {"optimizer": its_optimizer}).recover_if_possible()
        with torch.no_grad():
            resumed.copy_(at_save)
        for number in (4, 5):
            step(resumed, its_optimizer, number)
        assert torch.equal(resumed, weight)

    @needs_torch("2.5", "torch.optim.Adafactor")
    def test_no_optimizer_is_left_out(self):
        """Those not made above are the base class and the one for sparse gradients."""
        assert len(OPTIMIZERS) >= 13
        assert not {"SGD", "AdamW", "Adafactor", "NAdam", "RAdam", "Rprop"} - set(OPTIMIZERS)

    def test_sparse_adam_too(self, tmp_path):
        """Its gradients are sparse tensors."""

        def make():
            torch.manual_seed(1)
            embedding = torch.nn.Embedding(5, 2, sparse=True)
            return embedding, torch.optim.SparseAdam(embedding.parameters())

        def step(embedding, optimizer):
            optimizer.zero_grad()
            embedding(torch.tensor([1, 3])).pow(2).sum().backward()
            optimizer.step()

        embedding, optimizer = make()
        step(embedding, optimizer)
        other, its_optimizer = make()
        carry_over(tmp_path / "e", embedding, other)
        carry_over(tmp_path / "o", optimizer, its_optimizer)
        step(embedding, optimizer)
        step(other, its_optimizer)
        assert torch.equal(embedding.weight, other.weight)


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def sequential(optimizer):
    return lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
            lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
        ],
        milestones=[4],
    )


SCHEDULERS = {
    "ChainedScheduler": chained,
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.3, 8),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 7),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, 3, 2
    ),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.2, step_size_up=3, mode="triangular2"
    ),
    "CyclicLR with a function": lambda optimizer: lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.2, step_size_up=3, scale_fn=lambda x: 0.5**x, scale_mode="cycle"
    ),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.8),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.7**epoch),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5, 7], 0.5),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(
        optimizer, lambda epoch: 1 / (1 + epoch)
    ),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 9, 2.0),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=1, cooldown=1
    ),
    "SequentialLR": sequential,
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 0.01, anneal_epochs=9),
}

# Before, it holds a function, which is read back only with trust_pickle=True.
tensors_only = needs_torch("2.5", "a state of SWALR without a function")


class TestSchedulers:
    """Every scheduler of `torch.optim.lr_scheduler` goes on with the rates it would have given."""

    @pytest.mark.parametrize("steps", [0, 3, 5])
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=tensors_only if name == "SWALR" else ())
            for name in sorted(SCHEDULERS)
        ],
    )
    def test_the_next_rates_are_the_same(self, tmp_path, name, steps):
        """At the very start, and in the middle; learning rates and momenta."""
        losses = [1.0, 0.9, 0.95, 0.97, 0.96, 0.99, 0.5, 0.6, 0.7, 0.8, 0.9]

        def make():
            weight = torch.nn.Parameter(torch.zeros(1))
            optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
            return optimizer, SCHEDULERS[name](optimizer)

        def advance(optimizer, scheduler, losses):
            rates = []
            for loss in losses:
                optimizer.step()
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([loss] if plateau else []))
                (group,) = optimizer.param_groups
                rates.append((float(group["lr"]), group["momentum"]))
            return rates

        def save_or_load(optimizer, scheduler):
            return Checkpointer(tmp_path, {"optimizer": optimizer, "scheduler": scheduler})

        optimizer, scheduler = make()
        advance(optimizer, scheduler, losses[:steps])
        save_or_load(optimizer, scheduler).save_checkpoint()
        expected = advance(optimizer, scheduler, losses[steps:])
        resumed = make()
        save_or_load(*resumed).recover_if_possible()
        assert advance(*resumed, losses[steps:]) == expected
        assert len(set(expected)) > 1

    def test_no_scheduler_is_left_out(self):
        """Whatever torch has, but the base class, is made above."""
        found = {
            name
            for name, cls in vars(lr_scheduler).items()
            if inspect.isclass(cls)
            and issubclass(cls, lr_scheduler.LRScheduler)
            and name not in ("LRScheduler", "_LRScheduler")
        }
        assert found <= set(SCHEDULERS)

    @tensors_only
    def test_their_files_need_no_trust(self, tmp_path):
        """No scheduler puts what only pickle can hold into its state."""
        for name, make in SCHEDULERS.items():
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
            file = tmp_path / f"{name}.ckpt"
            torch_save(make(optimizer), file)
            torch.load(file, weights_only=True)
        assert not list(tmp_path.glob("*pickled*"))


def test_a_grad_scaler_keeps_scale_and_growth(tmp_path):
    """The scale that training has found, and how long it has held."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for gradient in (1.0, float("inf"), 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    other = carry_over(tmp_path, scaler, torch.amp.GradScaler("cpu"))
    assert other.state_dict() == scaler.state_dict()
    assert (other.get_scale(), other.state_dict()["_growth_tracker"]) == (512.0, 2)


def test_a_generator_draws_on(tmp_path):
    """The same numbers as the one that was saved, from a plain file."""
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    other = carry_over(tmp_path, generator, torch.Generator())
    assert torch.equal(torch.rand(9, generator=other), torch.rand(9, generator=generator))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_dataloader_goes_on_with_the_next_batch(tmp_path, workers):
    """The loader of torchdata, shuffled, in the middle of an epoch."""

    def make():
        generator = torch.Generator().manual_seed(0)
        return StatefulDataLoader(
            list(range(20)), 3, shuffle=True, generator=generator, num_workers=workers
        )

    loader = make()
    batches = iter(loader)
    seen = [next(batches) for _ in range(2)]
    Checkpointer(tmp_path, {"loader": loader}).save_checkpoint()
    rest = [batch.tolist() for batch in batches]
    assert sorted(sum(rest, torch.cat(seen).tolist())) == list(range(20))
    resumed = make()
    Checkpointer(tmp_path, {"loader": resumed}).recover_if_possible()
    assert [batch.tolist() for batch in resumed] == rest


def batch(number):
    """Return predictions and targets of one batch for four classes."""
    generator = torch.Generator().manual_seed(number)
    return (
        torch.randn(10, 4, generator=generator).softmax(-1),
        torch.randint(4, (10,), generator=generator),
    )


def scores(number):
    """Return binary predictions and targets of one batch."""
    generator = torch.Generator().manual_seed(number)
    return torch.rand(10, generator=generator), torch.randint(2, (10,), generator=generator)


def value(number):
    """Return one value per batch."""
    return (torch.tensor([float(number), number % 3]),)


def columns(number):
    """Return predictions and targets of two outputs."""
    generator = torch.Generator().manual_seed(number)
    return torch.rand(10, 2, generator=generator), torch.rand(10, 2, generator=generator)


def tasks(number):
    """Return predictions and targets of two tasks."""
    classes, column = batch(number), columns(number)
    return {"a": classes[0], "b": column[0]}, {"a": classes[1], "b": column[1]}


def groups(**arguments):
    """Return a collection whose metrics share their states in groups."""
    metrics = [
        MulticlassAccuracy(4),
        MulticlassPrecision(4),
        MulticlassRecall(4),
        MulticlassConfusionMatrix(4),
    ]
    return MetricCollection(metrics, **arguments)


# How each is made, and what makes its batches.
METRICS = {
    "tensor states": (lambda: MulticlassAccuracy(4), batch),
    "confusion matrix": (lambda: MulticlassConfusionMatrix(4), batch),
    "mean": (torchmetrics.MeanMetric, value),
    "list state": (torchmetrics.CatMetric, value),
    "lists of predictions": (lambda: BinaryAUROC(thresholds=None), scores),
    "sum of metrics": (lambda: MulticlassAccuracy(4) + MulticlassF1Score(4), batch),
    "min and max": (lambda: wrappers.MinMaxMetric(MulticlassAccuracy(4)), batch),
    "by class": (lambda: wrappers.ClasswiseWrapper(MulticlassAccuracy(4, average=None)), batch),
    "bootstrap": (
        lambda: wrappers.BootStrapper(
            MulticlassAccuracy(4), num_bootstraps=4, raw=True, sampling_strategy="multinomial"
        ),
        batch,
    ),
    "by output": (lambda: wrappers.MultioutputWrapper(torchmetrics.R2Score(), 2), columns),
    "running": (lambda: wrappers.Running(torchmetrics.SumMetric(), window=3), value),
    "by task": (
        lambda: wrappers.MultitaskWrapper(
            {"a": groups(), "b": torchmetrics.MeanSquaredError(num_outputs=2)}
        ),
        tasks,
    ),
    "collection": (groups, batch),
    "collection with a prefix": (lambda: groups(prefix="val/", postfix="!"), batch),
    "collection without groups": (lambda: groups(compute_groups=False), batch),
    "collection of wrappers": (
        lambda: MetricCollection(
            {
                "accuracy": wrappers.MinMaxMetric(MulticlassAccuracy(4)),
                "f1": MulticlassF1Score(4),
            }
        ),
        batch,
    ),
    "collection with given groups": (
        lambda: groups(
            compute_groups=[
                ["MulticlassAccuracy", "MulticlassPrecision", "MulticlassRecall"],
                ["MulticlassConfusionMatrix"],
            ]
        ),
        batch,
    ),
}


def run(metric, make_batch, numbers, *, calls=()):
    """Update by `forward`, reading the value after the batches named in `calls`."""
    for number in numbers:
        torch.manual_seed(number)
        metric(*make_batch(number))
        if number in calls:
            metric.compute()
    return metric.compute()


def same(first, second):
    """Return whether two results, tensors or dictionaries of them, are the same bits."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return torch.equal(torch.as_tensor(first), torch.as_tensor(second))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
class TestMetrics:
    """Metrics in the middle of an epoch: their `state_dict` is empty, their state is not."""

    @pytest.mark.sample(19)
    @pytest.mark.parametrize("cut", [0, 1, 2, 4])
    @pytest.mark.parametrize("kind", METRICS)
    def test_the_value_of_the_epoch_is_that_of_the_uninterrupted_one(self, tmp_path, kind, cut):
        """Saved after none, one (before groups of states form), two or four of six batches."""
        make, make_batch = METRICS[kind]
        whole = make()
        expected = run(whole, make_batch, range(6), calls=range(6))
        metric = make()
        if cut:
            run(metric, make_batch, range(cut), calls=range(cut))
        resumed = carry_over(tmp_path, metric, make())
        actual = run(resumed, make_batch, range(cut, 6), calls=range(6))
        assert same(actual, expected)
        # And the epoch after it starts from nothing, as always.
        for each in (whole, resumed):
            each.reset()
        assert same(run(resumed, make_batch, (7, 8)), run(whole, make_batch, (7, 8)))

    @pytest.mark.parametrize("kind", METRICS)
    def test_what_the_metric_had_gathered_before_loading_is_gone(self, tmp_path, kind):
        """Loading into one in use, its groups formed and its value cached."""
        make, make_batch = METRICS[kind]
        expected = run(make(), make_batch, range(5), calls=range(5))
        metric = make()
        run(metric, make_batch, range(3), calls=range(3))
        used = make()
        run(used, make_batch, (20, 21), calls=(20, 21))
        carry_over(tmp_path, metric, used)
        assert same(used.compute(), metric.compute())
        assert same(run(used, make_batch, (3, 4), calls=(3, 4)), expected)

    def test_updates_are_counted_on(self, tmp_path):
        """`update_count` is what some metrics divide by, and silences the warning of `compute`."""
        metric = torchmetrics.SumMetric()
        for _ in range(3):
            metric.update(1.0)
        resumed = carry_over(tmp_path, metric, torchmetrics.SumMetric())
        assert (resumed.update_count, resumed.update_called) == (3, True)

    def test_saving_leaves_the_metric_and_the_file_apart(self, tmp_path):
        """What is updated after the save does not change what was saved."""
        metric = torchmetrics.CatMetric()
        metric.update(1.0)
        checkpointer = Checkpointer(tmp_path, {"metric": metric})
        checkpointer.save_checkpoint()
        metric.update(2.0)
        checkpointer.recover_if_possible()
        assert metric.compute().tolist() == 1.0

    def test_a_state_put_back_is_copied(self):
        """Two metrics with the state of one do not count for each other."""
        metric, other = torchmetrics.SumMetric(), torchmetrics.SumMetric()
        metric.update(1.0)
        set_metric_state(other, metric_state(metric))
        other.sum_value.add_(5.0)
        assert (metric.sum_value.item(), other.sum_value.item()) == (1.0, 6.0)

    def test_loading_twice_shares_nothing_with_a_collection_in_use(self, tmp_path):
        """Members that share a state in one group go on sharing it, and count once."""
        collection = groups()
        run(collection, batch, range(3))
        checkpointer = Checkpointer(tmp_path, {"metrics": collection})
        checkpointer.save_checkpoint()
        first = run(collection, batch, range(3, 6))
        for _ in range(2):
            checkpointer.recover_if_possible()
            assert same(run(collection, batch, range(3, 6)), first)

    def test_persistent_states_come_back_too(self, tmp_path):
        """A metric whose states are in its `state_dict` as well."""
        metric = torchmetrics.SumMetric()
        metric.persistent(True)
        metric.update(4.0)
        other = torchmetrics.SumMetric()
        other.persistent(True)
        assert carry_over(tmp_path, metric, other).compute() == 4.0

    @pytest.mark.parametrize(
        "other",
        [
            torchmetrics.CatMetric,
            groups,
            lambda: wrappers.MinMaxMetric(torchmetrics.SumMetric()),
        ],
    )
    def test_another_metric_is_refused_by_its_states(self, tmp_path, other):
        """With the states of both."""
        Checkpointer(tmp_path, {"metric": MulticlassAccuracy(4)}).save_checkpoint()
        with pytest.raises(MismatchError, match=r"states \[.*the checkpoint has \["):
            Checkpointer(tmp_path, {"metric": other()}).recover_if_possible()

    def test_its_file_is_plain_and_no_warning_is_given(self, tmp_path, caplog):
        """Every metric above in one checkpoint."""
        metrics = {}
        for number, (make, make_batch) in enumerate(METRICS.values()):
            metrics[f"m{number}"] = make()
            run(metrics[f"m{number}"], make_batch, range(2))
        ckpt = Checkpointer(tmp_path, metrics).save_checkpoint()
        for file in ckpt.paramfiles.values():
            torch.load(file, weights_only=True)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
