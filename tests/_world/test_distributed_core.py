"""Two ranks that save and load together; one that fails, fails both, and none is left waiting."""

from __future__ import annotations

from pathlib import Path

import _two_ranks
import pytest
import torch
import torch.distributed as dist
from _releases import needs_torch
from _two_ranks import PerRank, WritesNothing, entries

from lightning_sbckpt import Checkpointer, register_checkpoint_hooks
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.errors import (
    DamagedCheckpointError,
    MismatchError,
    SaveError,
    SBCheckpointError,
)
from lightning_sbckpt.hooks import mark_as_loader, mark_as_saver

both = _two_ranks.both


@register_checkpoint_hooks(save_on_main_only=False)
class Gathered:
    """An object whose save adds up what every rank has."""

    def __init__(self, number):
        self.number = number

    @mark_as_saver
    def save(self, path):
        total = torch.tensor(self.number)
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            Path(path).write_text(str(total.item()))

    @mark_as_loader
    def load(self, path, end_of_epoch):
        self.number = int(Path(path).read_text())


def checkpointer_of(folder, rank):
    """Return a checkpointer of one model, which differs from rank to rank."""
    torch.manual_seed(rank)
    return Checkpointer(
        folder,
        {"model": torch.nn.Linear(2, 2)},
        storage=None if rank == 0 else WritesNothing(),
    )


def save_and_recover(folder, rank):
    checkpointer = checkpointer_of(folder, rank)
    checkpointer.add_recoverables({"sum": Gathered(rank + 1), "each": PerRank(rank + 10)})
    before = checkpointer.recoverables["model"].weight.tolist()
    saved = checkpointer.save_checkpoint({"loss": 1.0})
    at_once = sorted(entries(folder))
    checkpointer.recoverables["sum"].number = checkpointer.recoverables["each"].number = 0
    recovered = checkpointer.recover_if_possible()
    after = checkpointer.recoverables["model"].weight.tolist()
    numbers = [checkpointer.recoverables[name].number for name in ("sum", "each")]
    return saved is None, at_once, recovered.path.name, before, after, numbers


def test_both_save_one_checkpoint_and_load_the_same(both, tmp_path):
    """Rank zero's model; what is registered so is saved on both; the other rank writes nothing."""
    first, second = both(save_and_recover)
    (name,) = entries(tmp_path / "run")
    assert (first[0], second[0]) == (False, True)
    # The save returns on every rank only when the checkpoint is there.
    assert first[1] == second[1] == [name]
    assert first[2] == second[2] == name
    assert first[3] != second[3]
    assert first[4] == second[4] == first[3]
    assert (first[5], second[5]) == ([3, 10], [3, 11])
    assert find_damage(tmp_path / "run" / name) == []


def keep_only_one(folder, rank):
    checkpointer = checkpointer_of(folder, rank)
    for _ in range(3):
        checkpointer.save_and_keep_only()
        left = len(entries(folder))
        dist.barrier()  # Rank zero must not delete on while the other one counts.
    checkpointer.delete_checkpoints(num_to_keep=0)
    return left, entries(folder)


def test_rank_zero_deletes_and_the_other_waits_for_it(both):
    """After each call both see the same folder."""
    assert both(keep_only_one) == ((1, []), (1, []))


def fail_in_hook(folder, rank, failing):
    checkpointer = checkpointer_of(folder, rank)
    checkpointer.save_checkpoint(name="earlier")

    def fail(obj, path):
        if dist.get_rank() == failing:
            raise RuntimeError(f"rank {failing} has no room")
        Path(path).write_text("written")

    checkpointer.registry = checkpointer.registry.copy()
    checkpointer.registry.save[object] = fail
    checkpointer.registry.save_on_every_rank.add(object)
    checkpointer.add_recoverable("failing", object())
    try:
        checkpointer.save_checkpoint(name="failed")
    except SaveError as error:
        answer = str(error)
    # The group is still in step: the next save works.
    del checkpointer.recoverables["failing"]
    checkpointer.save_checkpoint(name="later")
    dist.barrier()
    return answer, sorted(entries(folder))


def fail_in_hook_of_zero(folder, rank):
    return fail_in_hook(folder, rank, 0)


def fail_in_hook_of_one(folder, rank):
    return fail_in_hook(folder, rank, 1)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_hook_that_fails_on_one_rank_fails_the_save_on_both(both, failing):
    """Each says where and why; nothing is visible of it; and the next save works."""
    answers = both([fail_in_hook_of_zero, fail_in_hook_of_one][failing])
    for rank, (message, names) in enumerate(answers):
        assert f"the save hook of 'failing' failed: RuntimeError: rank {failing} has no room" in (
            message
        )
        assert (f"failed on rank {failing}" in message) == (rank != failing)
        assert names == ["CKPT+earlier", "CKPT+later"]


class Fails:
    """Has no state to save, though it says so."""

    def state_dict(self):
        raise RuntimeError("no state today")

    def load_state_dict(self, state):
        pass


@register_checkpoint_hooks(save_on_main_only=False)
class GatheredLate(Gathered):
    """Its collective comes after a failure of its own rank."""

    @mark_as_saver
    def save(self, path):
        super().save(path)
        if self.number == 1:
            raise RuntimeError("failed after the collective")


def fail_beside_collectives(folder, rank):
    """Save with several kinds of failure on one rank, in names before and after a collective."""
    answers = []
    for case in ("state", "hook", "every rank", "order", "meta"):
        checkpointer = checkpointer_of(folder / case, rank)
        meta = {}
        if case == "state":
            checkpointer.add_recoverable("a", Fails())
        if case == "hook":
            checkpointer.add_recoverable("a", object(), custom_save_hook=fail_at_once)
        if case == "every rank":
            checkpointer.add_recoverable("a", GatheredLate(rank + 1))
        if case == "meta" and rank == 1:
            meta = {"loss": object()}
        names = ["m", "z"][:: -1 if case == "order" and rank else 1]
        checkpointer.add_recoverables({name: Gathered(ord(name)) for name in names})
        try:
            saved = checkpointer.save_checkpoint(meta, name="new")
            answers.append(saved if saved is None else saved.path.name)
        except (SaveError, SBCheckpointError) as error:
            answers.append(str(error))
    return answers


def fail_at_once(obj, path):
    raise RuntimeError("failed at once")


def test_a_failure_leaves_no_rank_in_the_collective_of_a_hook(both, tmp_path):
    """Whatever fails first on one of them, both go through every collective, and then learn of it."""
    zero, one = both(fail_beside_collectives)
    for answers in (zero, one):
        assert "no state today" in answers[0]
        assert "failed at once" in answers[1]
        assert "failed after the collective" in answers[2]
        assert "loss" in answers[4]
    assert (zero[3], one[3]) == ("CKPT+new", None)
    values = tmp_path / "run" / "order" / "CKPT+new"
    assert (values / "m.ckpt").read_text() == str(2 * ord("m"))


class OddError(SBCheckpointError):
    """An exception that can be pickled but not unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def fail_oddly(folder, rank):
    checkpointer = checkpointer_of(folder, rank)

    def fail(obj, path):
        if dist.get_rank() == 1:
            raise OddError("odd", "error")
        Path(path).write_text("written")

    checkpointer.registry = checkpointer.registry.copy()
    checkpointer.registry.save[object] = fail
    checkpointer.registry.save_on_every_rank.add(object)
    checkpointer.add_recoverable("failing", object())
    checkpointer.save_checkpoint()


def test_an_exception_that_cannot_travel_is_told_all_the_same(both):
    """The rank that failed raises it itself, the other one what it said."""
    zero, one = both(fail_oddly)
    assert one == ("OddError", "odd error")
    assert "failed on rank 1: OddError: odd error" in zero[1]


class Full(LocalStorage):
    def write(self, path, data):
        raise OSError(28, "No space left on device")


class Broken(LocalStorage):
    def write_source(self, path, source):
        raise RuntimeError("no error of the disk")


class NoFolder(LocalStorage):
    def make_dir(self, path):
        raise OSError(30, "Read-only file system")


def save_to(storage, folder, rank):
    checkpointer = checkpointer_of(folder, rank)
    if rank == 0:
        checkpointer._saver._state.storage = storage()
    checkpointer.save_checkpoint()


def save_to_full(folder, rank):
    save_to(Full, folder, rank)


def save_to_broken(folder, rank):
    save_to(Broken, folder, rank)


def save_to_no_folder(folder, rank):
    save_to(NoFolder, folder, rank)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (save_to_full, "No space left on device"),
        pytest.param(
            save_to_broken,
            "RuntimeError: no error of the disk",
            marks=needs_torch("2.6", "torch.serialization.skip_data"),
        ),
        (save_to_no_folder, "Read-only file system"),
    ],
)
def test_a_disk_that_fails_on_rank_zero_fails_both(both, tmp_path, task, reason):
    """With the same type of error and the reason."""
    for answer in both(task):
        assert answer[0] == "SaveError"
        assert reason in answer[1]
    assert entries(tmp_path / "run") == []


def recover_damaged(folder, rank):
    checkpointer = checkpointer_of(folder, rank)
    for name in "ab":
        checkpointer.save_checkpoint(name=name)
    names = []
    for name in "ba":
        if rank == 0:
            (folder / f"CKPT+{name}" / "model.ckpt").write_bytes(b"damaged")
        dist.barrier()
        try:
            names.append(checkpointer.recover_if_possible().path.name)
        except DamagedCheckpointError as error:
            names.append(str(error))
        # Rank zero must not damage what the other is still loading.
        dist.barrier()
    return names


def test_both_step_back_together_and_raise_together(both):
    """Rank zero looks; the other rank takes its word, and raises the same type of error."""
    for names in both(recover_damaged):
        assert names[0] == "CKPT+a"
        assert "every checkpoint" in names[1] and "is damaged" in names[1]


def mismatch_on_one(folder, rank):
    checkpointer = checkpointer_of(folder, rank)
    checkpointer.save_checkpoint()
    if rank == 1:
        checkpointer.recoverables["model"] = torch.nn.Linear(3, 3)
    try:
        checkpointer.recover_if_possible()
    except MismatchError:
        return "mismatch"
    return "loaded"


def test_a_rank_that_cannot_load_raises_and_the_other_is_not_left_waiting(both):
    """Loading has no collective after the choice."""
    assert both(mismatch_on_one) == ("loaded", "mismatch")


def retention_fails(folder, rank):
    checkpointer = checkpointer_of(folder, rank)

    def key(ckpt):
        raise ValueError("no such key")

    checkpointer.save_and_keep_only(importance_keys=[key])


def test_retention_that_fails_on_rank_zero_fails_both(both, tmp_path):
    """The saved checkpoint stays."""
    zero, one = both(retention_fails)
    assert "no such key" in zero[1] and "no such key" in one[1]
    assert len(entries(tmp_path / "run")) == 1
