"""Runs by FSDPStrategy: resumed to the bit, by each number of ranks, the best restored."""

from __future__ import annotations

import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from _fsdp1_fits import (
    Frozen,
    LooksAtTheGraph,
    Normalized,
    Renamed,
    Tied,
    Wrapped,
    WrapsItself,
    fit,
    prepare,
)
from _ranks import checkpoints, differences, make, run
from _sharded_fits import fit_or_tell
from lightning.pytorch.strategies import FSDPStrategy

from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._sharded.reading import SavedShards
from lightning_sbckpt.consolidation import consolidate

# Validated, and so saved, after each batch: within the windows, too.
ACCUMULATING = {"accumulate_grad_batches": 3, "val_check_interval": 0.25, "max_epochs": 2}


def ended_well(ended):
    assert ended.codes == [0] * len(ended.codes), "\n".join(ended.outputs)
    return ended


def kept(folder: Path, name: str) -> str:
    return (folder / name).read_text()


def by_strategy(**options):
    return {"strategy_options": options, "trainer": ACCUMULATING}


def resumes_exactly(folder, options, kill="on_train_batch_end:6", size=2):
    options = {"num_to_keep": 2, "size": size, **options}
    ended_well(run(fit, folder / "through", None, options, size=size))
    killed = run(fit, folder / "killed", kill, options, size=size)
    assert killed.codes == [-signal.SIGKILL] * size, "\n".join(killed.outputs)
    ended_well(run(fit, folder / "killed", None, options, size=size))
    for rank in range(size):
        report = kept(folder / "killed", f"report{rank}.txt")
        assert "resuming from" in report
        restored = next(line for line in report.splitlines() if "restored:" in line)
        accumulates = "accumulate_grad_batches" in options.get("trainer", {})
        assert ("gradients" in restored) == accumulates
        assert "skipped:  nothing" in report
        assert differences(folder / "through", folder / "killed", rank) == []
    found = checkpoints(folder / "killed")
    assert all(ckpt.paramfiles["model"].name == "model.dcp" for ckpt in found)
    assert all(ckpt.paramfiles["optimizer"].name == "optimizer.dcp" for ckpt in found)
    assert all(find_damage(ckpt.path) == [] for ckpt in found)


@pytest.mark.long
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    """Within a window of accumulation, in which each rank has gradients of its own."""
    resumes_exactly(tmp_path, {"trainer": ACCUMULATING})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "options"),
    [
        pytest.param(6, {}, id="sync"),
        pytest.param(10, {"save_mode": "async", "every_n_train_steps": 2}, id="async"),
        pytest.param(7, {"save_mode": "overlap", "every_n_train_steps": 1}, id="overlap"),
        pytest.param(6, {"strategy_options": {"state_dict_type": "sharded"}}, id="sharded-dicts"),
        pytest.param(6, {"strategy_options": {"use_orig_params": False}}, id="flat"),
        pytest.param(6, by_strategy(use_orig_params=False), id="flat-accumulating"),
        pytest.param(6, by_strategy(sharding_strategy="SHARD_GRAD_OP"), id="shard-grad-op"),
        pytest.param(
            6,
            {**by_strategy(sharding_strategy="SHARD_GRAD_OP"), "module": LooksAtTheGraph},
            id="forward-without-backward",
        ),
        pytest.param(6, by_strategy(sharding_strategy="NO_SHARD"), id="no-shard"),
        pytest.param(
            6, by_strategy(sharding_strategy="HYBRID_SHARD", device_mesh=(1, 2)), id="hybrid-shard"
        ),
        pytest.param(
            6, {"trainer": {**ACCUMULATING, "precision": "bf16-mixed"}}, id="mixed-precision"
        ),
        pytest.param(
            6,
            {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
            id="clipped",
        ),
        pytest.param(
            6, by_strategy(activation_checkpointing_policy={torch.nn.Linear}), id="recomputed"
        ),
        pytest.param(6, {"module": Frozen, "trainer": ACCUMULATING}, id="frozen"),
        pytest.param(6, {"module": WrapsItself, "trainer": ACCUMULATING}, id="wraps-itself"),
        pytest.param(6, {"module": Tied, "trainer": ACCUMULATING}, id="tied"),
    ],
)
def test_every_way_to_use_the_strategy_resumes_exactly(tmp_path, kill, options):
    """Whatever it divides, keeps whole, computes twice or leaves out."""
    resumes_exactly(tmp_path, options, f"on_train_batch_end:{kill}")


@pytest.mark.slow
def test_two_groups_of_two_ranks_resume_exactly(tmp_path):
    """The ranks of the second group have the same pieces as those of the first."""
    options = by_strategy(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2))
    # Four ranks have half as many batches in an epoch.
    options["trainer"] = {**options["trainer"], "max_epochs": 4}
    resumes_exactly(tmp_path, options, size=4)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["FULL_SHARD", "NO_SHARD"])
def test_three_ranks_with_statistics_of_their_own_resume_exactly(tmp_path, sharding):
    """Sums are in the order of the ranks, and each has its own buffers again."""
    options = {**by_strategy(sharding_strategy=sharding), "module": Normalized}
    options["trainer"] = {**options["trainer"], "max_epochs": 3}
    resumes_exactly(tmp_path, options, "on_train_batch_end:5", size=3)


def fit_one_epoch(folder, **options):
    ended_well(run(fit, folder, None, {"trainer": {"max_epochs": 1}, **options}))


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
def test_at_the_end_of_a_fit_each_rank_has_its_pieces_of_the_best(tmp_path, flat):
    """And retention has kept the best and the newest, nothing else."""
    options = {"num_to_keep": 1, "strategy_options": {"use_orig_params": not flat}}
    ended_well(run(fit_and_gather, tmp_path, options))
    found = checkpoints(tmp_path)
    best = min(found, key=lambda ckpt: ckpt.meta["val_loss"])
    assert Path(kept(tmp_path, "best.txt")) == best.path
    assert len(found) <= 2
    saved = SavedShards(best.paramfiles["model"]).state()
    held = torch.load(tmp_path / "held.pt", weights_only=True)
    assert held.keys() == saved.keys()
    assert all(torch.equal(held[name], saved[name]) for name in saved)


def fit_and_gather(folder, rank, options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    trainer, module, callback, loaders = prepare(folder, rank, **options)
    trainer.fit(module, **loaders)
    with FullyShardedDataParallel.summon_full_params(trainer.strategy.model):
        state = {name: value.clone() for name, value in module.named_parameters()}
    if rank == 0:
        plain = {name.replace("_fsdp_wrapped_module.", ""): each for name, each in state.items()}
        torch.save(plain, folder / "held.pt")
        (folder / "best.txt").write_text(callback.best_model_path)


def go_on(folder, rank, size, options):
    trainer, module, callback, loaders = prepare(folder, rank, size=size, **options)
    trainer.fit(module, **loaders)
    (folder / f"report{rank}.txt").write_text(str(callback.resume_report))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("original", [True, False])
def test_another_number_of_ranks_goes_on_and_says_what_is_not_kept(tmp_path, size, original):
    """The four files that each rank has of its own are named."""
    chosen = {"strategy_options": {"use_orig_params": original}}
    fit_one_epoch(tmp_path, **chosen)
    options = {"trainer": {"max_epochs": 2}, **chosen}
    ended_well(run(go_on, tmp_path, size, options, size=size))
    report = kept(tmp_path, "report0.txt")
    assert f"rng (saved by 2 ranks, this run has {size}" in report
    assert checkpoints(tmp_path)[-1].meta["epoch"] == 1


def go_on_plainly(folder, rank, epochs=2, seen="seen.pt"):
    trainer, module, callback, loaders = make(
        folder / "checkpoints", rank, size=1, module=Wrapped, trainer={"max_epochs": epochs}
    )
    found = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            found["model"] = {k: v.clone() for k, v in pl_module.state_dict().items()}
            state = trainer.optimizers[0].state_dict()["state"]
            names = [name for name, _ in pl_module.named_parameters()]
            found["moments"] = {names[n]: each["exp_avg"].clone() for n, each in state.items()}

    trainer.callbacks.insert(0, Look())
    trainer.fit(module, **loaders)
    torch.save(found, folder / seen)
    (folder / "report0.txt").write_text(str(callback.resume_report))


@pytest.mark.slow
@pytest.mark.parametrize("original", [True, False])
def test_a_plain_trainer_goes_on_from_it_and_the_strategy_from_a_plain_one(tmp_path, original):
    """Each weight and each moment of the optimizer is that of the parameter of its name."""
    chosen = {"strategy_options": {"use_orig_params": original}}
    fit_one_epoch(tmp_path, **chosen)
    newest = checkpoints(tmp_path)[-1]
    saved = SavedShards(newest.paramfiles["model"]).state()
    moments = SavedShards(newest.paramfiles["optimizer"]).state()["state"]
    ended_well(run(go_on_plainly, tmp_path, size=1))
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert all(torch.equal(seen["model"][name], saved[name]) for name in saved)
    assert all(torch.equal(seen["moments"][n], moments[n]["exp_avg"]) for n in moments)

    # There and back again: what two ranks have taken over, they save as it was.
    plain = checkpoints(tmp_path)[-1]
    assert plain.paramfiles["model"].name == "model.ckpt"
    model = torch.load(plain.paramfiles["model"], weights_only=True)
    states = torch.load(plain.paramfiles["optimizer"], weights_only=True)["state"]
    options = {"trainer": {"max_epochs": 3}, **chosen}
    ended_well(run(take_over, tmp_path, options))
    again = torch.load(tmp_path / "taken0.pt", weights_only=True)
    assert all(torch.equal(again["model"][name], model[name]) for name in model)
    assert len(again["moments"]) == len(states)
    for number, name in enumerate(model):
        assert torch.equal(again["moments"][name], states[number]["exp_avg"])


def take_over(folder, rank, options):
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        FullyShardedDataParallel,
        StateDictType,
    )

    # On a CPU, torch would give one state for another if it were to take them there.
    configs = FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False)
    kind = StateDictType.FULL_STATE_DICT
    trainer, module, _, loaders = prepare(folder, rank, **options)

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            model = trainer.strategy.model
            with FullyShardedDataParallel.state_dict_type(model, kind, *configs):
                (optimizer,) = trainer.optimizers
                found = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
                moments = {name: each["exp_avg"].clone() for name, each in found.items()}
                taken = {"model": model.state_dict(), "moments": moments}
            torch.save(taken, folder / f"taken{rank}.pt")

    trainer.callbacks.insert(0, Look())
    trainer.fit(module, **loaders)


@pytest.mark.slow
def test_what_was_put_together_is_gone_on_from_within_a_window_of_accumulation(tmp_path):
    """By as many ranks, which have their own gradients again; one rank is told that it has none."""
    run(fit, tmp_path / "run", "on_train_batch_end:6", {"trainer": ACCUMULATING})
    newest = checkpoints(tmp_path / "run")[-1]
    assert newest.paramfiles["gradients"].name == "gradients.dcp"
    for folder, size in ((tmp_path / "two", 2), (tmp_path / "one", 1)):
        consolidate(newest, folder / "checkpoints")
        ended_well(run(go_on, folder, size, {"trainer": ACCUMULATING}, size=size))
        report = kept(folder, "report0.txt")
        assert "+whole" in report
        restored = next(line for line in report.splitlines() if "restored:" in line)
        assert ("gradients" in restored) == (size == 2)
        assert ("gradients (saved by 2 ranks, this run has 1" in report) == (size == 1)


@pytest.mark.slow
def test_a_model_that_was_renamed_is_refused_with_a_list_and_taken_by_a_key_map(tmp_path):
    """As with a model that is in one piece."""
    fit_one_epoch(tmp_path)
    options = {"module": Renamed}
    assert 0 not in run(fit_or_tell, tmp_path, prepare, options).codes
    for rank in range(2):
        message = kept(tmp_path, f"error{rank}.txt")
        assert "top.weight: only in the module" in message
        assert "head.bias: only in the checkpoint" in message
    ended_well(run(fit_or_tell, tmp_path, prepare, {**options, "key_map": {"head.": "top."}}))


def validate(folder, rank):
    trainer, module, _, loaders = prepare(folder, rank)
    path = checkpoints(folder)[-1].path
    found = trainer.validate(module, loaders["val_dataloaders"], ckpt_path=str(path), verbose=False)
    (folder / f"validated{rank}.txt").write_text(str(found[0]["val_loss"]))


@pytest.mark.slow
def test_a_checkpoint_is_validated_by_its_path(tmp_path):
    """`trainer.validate(ckpt_path=...)` has each rank read its pieces; a file reads it as a whole."""
    fit_one_epoch(tmp_path)
    ended_well(run(validate, tmp_path))
    newest = checkpoints(tmp_path)[-1]
    saved = SavedShards(newest.paramfiles["model"]).state()
    whole = Wrapped.load_from_checkpoint(newest.path).state_dict()
    assert all(torch.equal(whole[name], saved[name]) for name in saved)


@pytest.mark.slow
def test_units_that_are_divided_and_units_that_are_not_are_refused_before_training(tmp_path):
    """FSDP has no state of them in pieces; the sentence names another way."""
    ended = run(fit_or_tell, tmp_path, prepare, {"module": HalfDivided})
    assert 0 not in ended.codes
    message = kept(tmp_path, "error0.txt")
    assert "different sharding strategies (FULL_SHARD, NO_SHARD)" in message
    assert "Use one sharding strategy for all of them, or ModelParallelStrategy" in message
    assert not list((tmp_path / "checkpoints").glob("CKPT+*"))


class HalfDivided(Wrapped):
    """A model that divides one part and not the other."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import ShardingStrategy
        from torch.distributed.fsdp.wrap import wrap

        if isinstance(self.body, torch.nn.Sequential):
            self.body = wrap(self.body)
            self.head = wrap(self.head, sharding_strategy=ShardingStrategy.NO_SHARD)

    def on_train_batch_start(self, *_args: object) -> None:
        raise AssertionError("training has begun")


def fit_on_gpus(folder, rank, kill):
    options = {"trainer": {"accelerator": "gpu", "strategy": FSDPStrategy(), "max_epochs": 2}}
    fit(folder, rank, kill, options)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.slow
def test_two_gpus_resume_what_two_gpus_saved(tmp_path):
    """With NCCL, and the strategy as users write it."""
    ended_well(run(fit_on_gpus, tmp_path / "through", None))
    run(fit_on_gpus, tmp_path / "killed", "on_train_batch_end:6")
    ended_well(run(fit_on_gpus, tmp_path / "killed", None))
    for rank in range(2):
        assert differences(tmp_path / "through", tmp_path / "killed", rank) == []
