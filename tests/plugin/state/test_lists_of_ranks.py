"""Checkpoints of several ranks as they were written before ranks were put together go on exactly."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import _ranks
import pytest
import torch
from _foreign import forget_manifest
from _ranks import checkpoints, differences, run, traced_fit
from torch import nn

from lightning_sbckpt.plugin.state.per_rank import state_of_rank

WRITTEN_BEFORE = Path(__file__).with_name("lists_of_ranks")
"""A checkpoint of `little_fit`, saved after three batches by the code that wrote lists."""

EVERY_STEP = {"every_n_train_steps": 1, "num_to_keep": 99}
OF_RANKS = ("rng", "loaders", "metrics")


class Little(_ranks.Model):
    """So small that a checkpoint of it can be kept beside this file."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(_ranks.FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))


def little_fit(folder: Path, rank: int, options: dict) -> None:
    traced_fit(folder, rank, None, {"module": Little, **EVERY_STEP, **options})


def as_lists(checkpoint) -> None:
    """Give a checkpoint's files the form that they had."""
    for name in OF_RANKS:
        part = torch.load(checkpoint.paramfiles[name], weights_only=True)
        lists = {"ranks": [state_of_rank(part, rank) for rank in range(part["ranks"])]}
        torch.save(lists, checkpoint.paramfiles[name])
    forget_manifest(checkpoint.path)


@pytest.mark.long
def test_two_ranks_go_on_to_the_same_bits_from_files_with_lists(tmp_path):
    """Random states, places in the data and logged values of each rank, batch by batch."""
    through, killed = tmp_path / "through", tmp_path / "killed"
    assert run(traced_fit, through, None, {}).codes == [0, 0]
    kill = "on_train_batch_start:7"
    assert -signal.SIGKILL in run(traced_fit, killed, kill, EVERY_STEP).codes
    as_lists(checkpoints(killed)[-1])
    assert run(traced_fit, killed, None, EVERY_STEP).codes == [0, 0]
    for rank in range(2):
        assert differences(through, killed, rank) == []
        told = (killed / f"report{rank}.txt").read_text()
        assert f"resuming from {checkpoints(killed)[5].path}" in told
        assert "skipped:  nothing" in told


def test_a_checkpoint_that_was_written_by_the_release_before_is_gone_on_from(tmp_path):
    """Its own bytes, verified by its own manifest: each rank takes what it had."""
    (written,) = WRITTEN_BEFORE.iterdir()
    for name in OF_RANKS:
        part = torch.load(written / f"{name}.ckpt", weights_only=True)
        assert isinstance(part["ranks"], list) and len(part["ranks"]) == 2
    shutil.copytree(written, tmp_path / "checkpoints" / written.name)
    ended = run(little_fit, tmp_path, {"trainer": {"max_epochs": 1}})
    assert ended.codes == [0, 0], ended.outputs
    for rank in range(2):
        told = (tmp_path / f"report{rank}.txt").read_text()
        assert f"{written.name}, saved" in told and "at global step 3" in told
        assert "skipped:  nothing" in told
        assert all(f"; {name}" in told.split("skipped:")[0] for name in OF_RANKS)
    steps = [ckpt.meta["global_step"] for ckpt in checkpoints(tmp_path)]
    assert steps == [3, 4]
