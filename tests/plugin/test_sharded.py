"""Runs whose model is in pieces: resumed to the bit, by each number of ranks, the best restored."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from _ranks import checkpoints, differences, make, run
from _releases import needs_torch
from _sharded_fits import HeadFirst, InPieces, Renamed, fit, fit_or_tell, local, prepare
from lightning.pytorch.strategies import (
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._sharded.reading import SavedShards
from lightning_sbckpt.consolidation import consolidate
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin.run import refuse_what_cannot_work

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")

# Validated, and so saved, after each batch: within the windows, too.
ACCUMULATING = {"accumulate_grad_batches": 3, "val_check_interval": 0.25}


def ended_well(ended):
    assert ended.codes == [0] * len(ended.codes), "\n".join(ended.outputs)
    return ended


def kept(folder: Path, name: str) -> str:
    return (folder / name).read_text()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kill", "options"),
    [
        ("on_train_batch_end:6", {}),
        pytest.param(
            "on_train_batch_end:6",
            {"trainer": ACCUMULATING},
            marks=pytest.mark.slow,
        ),
        ("on_train_batch_end:10", {"save_mode": "async", "every_n_train_steps": 2}),
        pytest.param(
            "on_train_batch_end:7",
            {
                "strategy_options": {"save_distributed_checkpoint": False},
                "every_n_train_steps": 1,
                "save_mode": "overlap",
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, kill, options):
    """Weights, optimizers, logged values and random states of each rank, to the bit."""
    options = {"num_to_keep": 2, **options}
    ended_well(run(fit, tmp_path / "through", None, options))
    killed = run(fit, tmp_path / "killed", kill, options)
    assert killed.codes == [-signal.SIGKILL] * 2
    ended_well(run(fit, tmp_path / "killed", None, options))
    for rank in range(2):
        report = kept(tmp_path / "killed", f"report{rank}.txt")
        assert "resuming from" in report
        assert ("gradients" in report) == ("trainer" in options)
        assert differences(tmp_path / "through", tmp_path / "killed", rank) == []
    found = checkpoints(tmp_path / "killed")
    assert all(ckpt.paramfiles["model"].name == "model.dcp" for ckpt in found)
    assert all(ckpt.paramfiles["optimizer"].name == "optimizer.dcp" for ckpt in found)
    assert all(find_damage(ckpt.path) == [] for ckpt in found)


def raise_with_a_save_in_flight(folder, rank, save_mode):
    usual, go_on = LocalStorage.before, threading.Event()

    def slow(self, operation, path, target=None):
        if threading.current_thread().name == "sbckpt-writer" and operation == "flush_file":
            assert go_on.wait(60)
        usual(self, operation, path, target)

    LocalStorage.before = slow

    class Fail(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                # Later than what comes of the error, unless the machine is busy.
                threading.Timer(0.5, go_on.set).start()
            if trainer.global_step == 3 and rank == 1:
                busy = callback.checkpointer.is_saving
                (folder / "busy.txt").write_text(str(busy))
                raise ZeroDivisionError("rank one has failed")

    trainer, module, callback, loaders = prepare(
        folder, rank, every_n_train_steps=2, save_mode=save_mode
    )
    trainer.callbacks.insert(0, Fail())
    trainer.fit(module, **loaders)


@pytest.mark.parametrize("save_mode", ["async", pytest.param("overlap", marks=pytest.mark.slow)])
def test_a_rank_that_raises_with_a_save_in_flight_ends_the_job(tmp_path, save_mode):
    """Its pieces are written to their end first; what is visible then is whole."""
    ended = run(raise_with_a_save_in_flight, tmp_path, save_mode)
    assert kept(tmp_path, "busy.txt") == "True"
    assert 0 not in ended.codes
    assert "ZeroDivisionError: rank one has failed" in ended.outputs[1]
    assert ended.seconds < 60
    found = checkpoints(tmp_path)
    assert all(find_damage(ckpt.path) == [] for ckpt in found)
    assert [ckpt.meta["global_step"] for ckpt in found] == [2]


def test_at_the_end_of_a_fit_each_rank_has_its_pieces_of_the_best(tmp_path):
    """And retention has kept the best and the newest, nothing else."""
    ended_well(run(fit, tmp_path, None, {"num_to_keep": 1}))
    found = checkpoints(tmp_path)
    best = min(found, key=lambda ckpt: ckpt.meta["val_loss"])
    assert Path(kept(tmp_path, "best0.txt")) == best.path
    assert len(found) <= 2
    whole = SavedShards(best.paramfiles["model"]).state()
    pieces = [
        torch.load(tmp_path / f"final{rank}.pt", weights_only=True)["after the fit"]
        for rank in range(2)
    ]
    for name, value in whole.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), value), name


def go_on(folder, rank, size, options):
    trainer, module, callback, loaders = prepare(folder, rank, size=size, **options)
    trainer.fit(module, **loaders)
    (folder / f"report{rank}.txt").write_text(str(callback.resume_report))


@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on_and_says_what_is_not_kept(tmp_path, size):
    """The four files that each rank has of its own are named."""
    ended_well(run(fit, tmp_path, None, {"trainer": {"max_epochs": 1}}))
    ended_well(run(go_on, tmp_path, size, {"trainer": {"max_epochs": 2}}, size=size))
    report = kept(tmp_path, "report0.txt")
    assert f"rng (saved by 2 ranks, this run has {size}" in report
    assert checkpoints(tmp_path)[-1].meta["epoch"] == 1


class Plain(InPieces):
    """The same model in one piece."""

    def configure_model(self):
        pass


def go_on_plainly(folder, rank, options=None):
    trainer, module, callback, loaders = make(
        folder / "checkpoints",
        rank,
        size=1,
        module=Plain,
        trainer={"max_epochs": 2, **(options or {})},
    )
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    trainer.callbacks.insert(0, Look())
    trainer.fit(module, **loaders)
    torch.save(seen, folder / "seen.pt")
    (folder / "report0.txt").write_text(str(callback.resume_report))


@pytest.mark.slow
def test_a_plain_trainer_goes_on_from_it_and_a_sharded_one_from_a_plain_one(tmp_path):
    """The model is put together for the first, and divided for the second."""
    ended_well(run(fit, tmp_path, None, {"trainer": {"max_epochs": 1}}))
    saved = SavedShards(checkpoints(tmp_path)[-1].paramfiles["model"]).state()
    ended_well(run(go_on_plainly, tmp_path, size=1))
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert seen.keys() == saved.keys()
    assert all(torch.equal(seen[name], saved[name]) for name in saved)
    newest = checkpoints(tmp_path)[-1]
    assert newest.paramfiles["model"].name == "model.ckpt"
    ended_well(run(go_on, tmp_path, 2, {"trainer": {"max_epochs": 3}}))
    assert newest.path.name in kept(tmp_path, "report1.txt")
    assert checkpoints(tmp_path)[-1].paramfiles["model"].name == "model.dcp"


@pytest.mark.slow
def test_what_was_put_together_within_a_window_of_accumulation_is_gone_on_from(tmp_path):
    """By one process and by two ranks; the gradients are there."""
    run(fit, tmp_path / "run", "on_train_batch_end:6", {"trainer": ACCUMULATING})
    newest = checkpoints(tmp_path / "run")[-1]
    assert newest.paramfiles["gradients"].name == "gradients.dcp"
    for folder, size in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        consolidate(newest, folder / "checkpoints")
        options = {"trainer": ACCUMULATING}
        target, args = (go_on, (2, options)) if size == 2 else (go_on_plainly, (ACCUMULATING,))
        ended_well(run(target, folder, *args, size=size))
        report = kept(folder, "report0.txt")
        assert "CKPT+" in report and "+whole" in report
        restored = next(line for line in report.splitlines() if "restored:" in line)
        assert "gradients" in restored


@pytest.mark.slow
def test_a_model_that_was_renamed_is_refused_with_a_list_and_taken_by_a_key_map(tmp_path):
    """As with a model that is in one piece."""
    ended_well(run(fit, tmp_path, None, {"trainer": {"max_epochs": 1}}))
    ended = run(fit_or_tell, tmp_path, prepare, {"module": Renamed})
    assert 0 not in ended.codes
    for rank in range(2):
        message = kept(tmp_path, f"error{rank}.txt")
        assert "top.weight: only in the module" in message
        assert "head.bias: only in the checkpoint" in message
    by_name = {"module": Renamed, "key_map": {"head.": "top."}}
    ended_well(run(fit_or_tell, tmp_path, prepare, by_name))


@pytest.mark.slow
def test_layers_that_change_places_keep_their_own_moments(tmp_path):
    """By name, as with a model that is in one piece."""
    ended_well(run(fit, tmp_path / "through", None, {}))
    ended_well(run(fit, tmp_path / "run", None, {"trainer": {"max_epochs": 1}}))
    ended_well(run(fit, tmp_path / "run", None, {"module": HeadFirst}))
    for rank in range(2):
        expected, found = (
            torch.load(tmp_path / name / f"final{rank}.pt", weights_only=True)["after the fit"]
            for name in ("through", "run")
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def with_recoverables(folder, rank, epochs):
    counter = nn.Linear(1, 1)
    nn.init.constant_(counter.weight, 7.0 if epochs == 1 else 0.0)
    trainer, module, _, loaders = prepare(
        folder, rank, recoverables={"counter": counter}, trainer={"max_epochs": epochs}
    )
    trainer.fit(module, **loaders)
    (folder / f"counter{rank}.txt").write_text(str(counter.weight.item()))


def test_recoverables_of_the_user_are_restored_too(tmp_path):
    """Lightning restores later with this strategy than with others."""
    for epochs in (1, 2):
        ended_well(run(with_recoverables, tmp_path, epochs))
    assert [kept(tmp_path, f"counter{rank}.txt") for rank in range(2)] == ["7.0", "7.0"]


def validate(folder, rank):
    trainer, module, _, loaders = prepare(folder, rank)
    path = checkpoints(folder)[-1].path
    trainer.validate(module, loaders["val_dataloaders"], ckpt_path=str(path), verbose=False)
    torch.save(local(dict(module.state_dict())), folder / f"validated{rank}.pt")


@pytest.mark.slow
def test_a_checkpoint_is_validated_by_its_path(tmp_path):
    """`trainer.validate(ckpt_path=...)` has each rank read its pieces; a file reads it as a whole."""
    ended_well(run(fit, tmp_path, None, {"trainer": {"max_epochs": 1}}))
    ended_well(run(validate, tmp_path))
    newest = checkpoints(tmp_path)[-1]
    whole = Plain.load_from_checkpoint(newest.path).state_dict()
    pieces = [torch.load(tmp_path / f"validated{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), value), name


def test_a_strategy_whose_format_is_not_known_is_refused_at_setup(tmp_path):
    """The sentence names it and a way out; the two that are known are taken."""

    class OfItsOwn(SingleDeviceStrategy):
        def save_checkpoint(self, checkpoint, filepath, storage_options=None):
            pass

    with pytest.raises(ConfigurationError) as caught:
        refuse_what_cannot_work(SimpleNamespace(strategy=OfItsOwn("cpu")), [tmp_path])
    assert "OfItsOwn writes checkpoints in a format of its own" in str(caught.value)
    assert "Use ModelParallelStrategy or FSDPStrategy to shard the model" in str(caught.value)
    for known in (ModelParallelStrategy(), FSDPStrategy()):
        refuse_what_cannot_work(SimpleNamespace(strategy=known), [tmp_path])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.slow
def test_two_gpus_resume_what_two_gpus_saved(tmp_path):
    """With NCCL: pieces are copied from the GPU, and read back to it."""
    options = {"trainer": {"accelerator": "gpu", "max_epochs": 2}}
    ended_well(run(fit, tmp_path / "through", None, options))
    run(fit, tmp_path / "killed", "on_train_batch_end:6", options)
    ended_well(run(fit, tmp_path / "killed", None, options))
    for rank in range(2):
        assert differences(tmp_path / "through", tmp_path / "killed", rank) == []
    newest = checkpoints(tmp_path / "killed")[-1]
    with Checkpointer(newest.path.parent, {"model": Plain()}) as checkpointer:
        checkpointer.load_checkpoint(newest)
