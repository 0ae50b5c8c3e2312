"""`save_mode="overlap"`: large tensors are copied under forward and backward; only the step waits.

A copy that somebody wrote to is never published: the checkpoint is dropped, said, and taken anew,
and from then on copies are made before training goes on.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time

import _two_ranks as distributed
import pytest
import torch
from _in_flight import WIDTH, Everything, HeldUp, contents, files_of_sync_save
from _releases import needs_torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._save import late_copy as overlap
from lightning_sbckpt._save.items import TakenState
from lightning_sbckpt._save.late_copy import LateCopy
from lightning_sbckpt._save.request import SaveRequest
from lightning_sbckpt.errors import SaveError

# What is copied later has its place in a file that is put together here.
pytestmark = needs_torch("2.6", "torch.serialization.skip_data")

DROPPED = "tensors were written to between the save and the optimizer's step"


class SlowCopy:
    """Stands for the copying of memory: each copy waits until it may go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.arrived = threading.Event()
        self.copied = 0
        self._copy = overlap._copy_if_there

    def __call__(self, address: int, source: int, size: int) -> bool:
        self.arrived.set()
        assert self.go_on.wait(60)
        whole = self._copy(address, source, size)
        self.copied += size
        return whole


@pytest.fixture
def slow(monkeypatch):
    """A copy that takes until the test lets it end."""
    made = SlowCopy()
    monkeypatch.setattr(overlap, "_copy_if_there", made)
    yield made
    made.go_on.set()


@pytest.fixture
def disk():
    """A disk that holds up saves in the background, no longer than until the end of the test."""
    made = HeldUp()
    yield made
    made.go_on.set()


def warnings_in(caplog):
    """Return what was warned of, but for what only pickle can hold."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and "pickle" not in record.getMessage()
    ]


def large():
    """Return a module of one large parameter and the optimizer that trains it."""
    torch.manual_seed(0)
    module = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    return module, torch.optim.SGD(module.parameters(), lr=0.1)


def backward(module):
    """Do what comes before an optimizer's step."""
    module(torch.ones(1, WIDTH)).square().sum().backward()


class TestHidden:
    """The bits of a save that nothing hurries, and no wait but before the step."""

    def test_the_checkpoint_is_that_of_a_sync_save(self, tmp_path, slow, caplog):
        """Though forward, backward and everything but the optimizer goes on before the copy does."""
        expected = files_of_sync_save(tmp_path / "sync", "change")
        everything = Everything()
        everything.change()
        checkpointer = everything.checkpointer(tmp_path / "overlap", save_mode="overlap")
        assert checkpointer.save_checkpoint(name="a") is None
        assert slow.arrived.wait(20)
        # An accumulation window: several batches with their gradients, statistics of the
        # normalization, metrics, random numbers, numpy and all that is small.
        for _ in range(3):
            everything.forward_and_backward()
            everything.note()
        assert slow.copied == 0
        threading.Timer(0.2, slow.go_on.set).start()
        everything.optimizer.step()
        # The weight, and two moments of it.
        assert slow.copied == 3 * 4 * WIDTH * WIDTH
        everything.scheduler.step()
        checkpointer.wait()
        assert contents(tmp_path / "overlap" / "CKPT+a") == expected
        assert find_damage(tmp_path / "overlap" / "CKPT+a") == []
        assert warnings_in(caplog) == []
        assert checkpointer._saver._mode == "overlap"

    def test_many_steps_save_what_sync_saves(self, tmp_path, caplog):
        """Every step of a short training, at the copy's own pace."""
        sync, overlap = Everything(1), Everything(1)
        one = sync.checkpointer(tmp_path / "sync")
        other = overlap.checkpointer(tmp_path / "overlap", save_mode="overlap")
        with one, other:
            for number in range(6):
                for everything, checkpointer in ((sync, one), (overlap, other)):
                    everything.change()
                    checkpointer.save_checkpoint(name=str(number))
        for number in range(6):
            name = f"CKPT+{number}"
            assert contents(tmp_path / "overlap" / name) == contents(tmp_path / "sync" / name)
        assert warnings_in(caplog) == []
        assert other._saver._mode == "overlap"

    def test_only_the_step_waits_and_only_until_the_copy_is_done(self, tmp_path, slow, disk):
        """Not until it is written."""
        module, optimizer = large()
        checkpointer = Checkpointer(
            tmp_path, {"m": module, "o": optimizer}, save_mode="overlap", storage=disk
        )
        checkpointer.save_checkpoint(name="a")
        backward(module)
        stepping = threading.Thread(target=optimizer.step)
        before = module.weight.detach().clone()
        stepping.start()
        stepping.join(0.3)
        assert stepping.is_alive()
        assert torch.equal(module.weight, before)
        slow.go_on.set()
        stepping.join(20)
        assert not stepping.is_alive()
        assert not torch.equal(module.weight, before)
        assert list(checkpointer.list_checkpoints()) == []
        disk.go_on.set()
        checkpointer.close()
        state = torch.load(tmp_path / "CKPT+a" / "m.ckpt", weights_only=True)
        assert torch.equal(state["weight"], before)

    def test_who_updates_without_an_optimizer_says_so(self, tmp_path, slow):
        """`before_update` waits for the copy."""
        module, _ = large()
        checkpointer = Checkpointer(tmp_path, {"m": module}, save_mode="overlap")
        before = module.weight.detach().clone()
        checkpointer.save_checkpoint(name="a")
        threading.Timer(0.2, slow.go_on.set).start()
        checkpointer.before_update()
        assert slow.copied == 4 * WIDTH * WIDTH
        with torch.no_grad():
            module.weight.zero_()
        checkpointer.close()
        state = torch.load(tmp_path / "CKPT+a" / "m.ckpt", weights_only=True)
        assert torch.equal(state["weight"], before)

    def test_an_optimizer_is_watched_once_and_also_one_that_comes_later(self, tmp_path):
        """However many saves there are."""
        module, optimizer = large()
        checkpointer = Checkpointer(tmp_path, {"o": optimizer}, save_mode="overlap")
        for _ in range(3):
            checkpointer.save_checkpoint()
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        later = torch.optim.SGD(module.parameters(), lr=0.1)
        checkpointer.add_recoverable("later", later)
        checkpointer.save_checkpoint()
        assert len(later._optimizer_step_pre_hooks) == 1
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        checkpointer.close()

    def test_tensors_of_inference_mode_are_saved(self, tmp_path):
        """They have no version counter, and nothing writes to them."""

        class Holder:
            def __init__(self):
                with torch.inference_mode():
                    self.tensor = torch.full((WIDTH, WIDTH), 2.0)

            def state_dict(self):
                return {"t": self.tensor}

            def load_state_dict(self, state):
                self.tensor = state["t"]

        with Checkpointer(tmp_path, {"h": Holder()}, save_mode="overlap") as checkpointer:
            checkpointer.save_checkpoint(name="a")
            assert checkpointer._saver._hidden.late_copy is not None
        found = torch.load(tmp_path / "CKPT+a" / "h.ckpt", weights_only=True)["t"]
        assert bool((found == 2.0).all())


class Held:
    """An object of one large tensor."""

    def __init__(self, state=None):
        self.tensor = torch.ones(WIDTH, WIDTH)
        self.more = state or {}

    def state_dict(self):
        """Return it."""
        return {"t": self.tensor, **self.more}

    def load_state_dict(self, state):
        """Take it over."""
        self.tensor = state["t"]


class TestNotHidden:
    """What can't wait is copied at once."""

    def saved(self, folder, held, slow=None, *, item=None, last=False):
        checkpointer = Checkpointer(folder, save_mode="overlap")
        checkpointer.save(SaveRequest({"h": item or held}, name="a", hide_copy=not last))
        late = checkpointer._saver._hidden and checkpointer._saver._hidden.late_copy
        held.tensor.fill_(5)
        if slow is not None:
            slow.go_on.set()
        checkpointer.close()
        found = torch.load(folder / "CKPT+a" / "h.ckpt", weights_only=True)["t"]
        return late, bool((found == 1).all())

    def test_what_says_that_it_is_volatile(self, tmp_path, caplog):
        """Gradients, above all: backward writes to them."""
        held = Held()
        item = TakenState(held.state_dict(), volatile=True)
        assert self.saved(tmp_path, held, item=item) == (None, True)
        assert warnings_in(caplog) == []

    def test_the_last_save_of_a_run(self, tmp_path, caplog):
        """No step follows that could wait for it; the save after it is hidden again."""
        assert self.saved(tmp_path, Held(), last=True) == (None, True)
        assert warnings_in(caplog) == []
        held = Held()
        checkpointer = Checkpointer(tmp_path / "b", save_mode="overlap")
        for hidden in (False, True):
            checkpointer.save(SaveRequest({"h": held}, hide_copy=hidden))
            in_flight = checkpointer._saver._hidden
            assert (in_flight is not None and in_flight.late_copy is not None) == hidden
        checkpointer.close()

    @pytest.mark.parametrize(
        "more",
        [
            {"s": torch.eye(2).to_sparse()},
            {"odd": object},
            {"n": 2**70},
        ],
        ids=["sparse", "pickled", "a huge number"],
    )
    def test_a_state_that_cannot_be_described(self, tmp_path, caplog, more):
        """Nobody knows all of its tensors, so none may be copied later."""
        assert self.saved(tmp_path, Held(more)) == (None, True)
        assert warnings_in(caplog) == []

    def test_a_state_without_large_tensors(self, tmp_path):
        """They are copied faster than a thread starts."""
        module = torch.nn.Linear(2, 2)
        checkpointer = Checkpointer(tmp_path, {"m": module}, save_mode="overlap")
        checkpointer.save_checkpoint()
        assert checkpointer._saver._hidden.late_copy is None
        checkpointer.close()

    def test_where_no_thread_starts_any_more(self, tmp_path, monkeypatch):
        """So it is while an interpreter exits, from Python 3.12 on."""

        def refuse(thread):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        held = Held()
        checkpointer = Checkpointer(tmp_path, {"h": held}, save_mode="overlap")
        monkeypatch.setattr(threading.Thread, "start", refuse)
        checkpointer.save_checkpoint(name="a")
        checkpointer.before_update()
        checkpointer.close()
        found = torch.load(tmp_path / "CKPT+a" / "h.ckpt", weights_only=True)["t"]
        assert bool((found == 1).all())


class TestWrittenTo:
    """A copy that somebody wrote to."""

    def test_it_is_dropped_and_taken_anew_before_the_step(self, tmp_path, slow, caplog):
        """With the state as it is then; and the saves after it are copied at once."""
        everything = Everything()
        everything.change()
        checkpointer = everything.checkpointer(tmp_path / "run", save_mode="overlap")
        everything.optimizer.zero_grad()
        calls = []
        checkpointer.save_checkpoint({"n": 1}, name="a", on_durable=lambda: calls.append("a"))
        assert slow.arrived.wait(20)
        weight = everything.model[0].weight
        with torch.no_grad():
            weight.add_(1)
        slow.go_on.set()
        weights = weight.detach().clone()
        everything.forward_and_backward()
        everything.optimizer.step()
        (warning,) = warnings_in(caplog)
        assert warning.startswith(str(tmp_path / "run"))
        assert DROPPED in warning
        assert "dropped and saved anew" in warning and "save_mode 'async'" in warning
        checkpointer.wait()
        (saved,) = checkpointer.list_checkpoints()
        assert (saved.path.name, saved.meta["n"], calls) == ("CKPT+a", 1, ["a"])
        assert find_damage(saved.path) == []
        state = torch.load(saved.paramfiles["model"], weights_only=True)
        assert torch.equal(state["0.weight"], weights)
        assert not torch.equal(everything.model[0].weight, weights)
        # From now on like "async": written to at once, and right all the same.
        copied = slow.copied
        now = everything.model[0].weight.detach().clone()
        checkpointer.save_checkpoint(name="b")
        with torch.no_grad():
            everything.model[0].weight.zero_()
        checkpointer.close()
        assert slow.copied == copied
        state = torch.load(tmp_path / "run" / "CKPT+b" / "model.ckpt", weights_only=True)
        assert torch.equal(state["0.weight"], now)
        assert len(warnings_in(caplog)) == 1

    def test_a_write_that_had_not_ended_when_the_copy_did_is_seen(self, tmp_path, disk, caplog):
        """Torch raises the counter after the operation: a copy may end between the two."""
        module, optimizer = large()
        checkpointer = Checkpointer(
            tmp_path, {"m": module, "o": optimizer}, save_mode="overlap", storage=disk
        )
        checkpointer.save_checkpoint(name="a")
        late = checkpointer._saver._hidden.late_copy
        late.wait()
        # The end of an operation that was writing during the copy.
        with torch.no_grad():
            module.weight.add_(1)
        weights = module.weight.detach().clone()
        disk.go_on.set()
        backward(module)
        optimizer.step()
        checkpointer.close()
        assert DROPPED in warnings_in(caplog)[0]
        state = torch.load(tmp_path / "CKPT+a" / "m.ckpt", weights_only=True)
        assert torch.equal(state["weight"], weights)

    def test_it_is_never_published_by_an_interpreter_that_nobody_waits_for(self, tmp_path, disk):
        """The writer looks as well, when everything is written."""
        module, _ = large()
        checkpointer = Checkpointer(tmp_path, {"m": module}, save_mode="overlap", storage=disk)
        checkpointer.save_checkpoint(name="a")
        checkpointer._saver._hidden.late_copy.wait()
        with torch.no_grad():
            module.weight.add_(1)
        disk.go_on.set()
        # As at the exit: only the thread is waited for.
        checkpointer._saver._writer.wait()
        assert [
            path.name for path in tmp_path.iterdir() if path.name not in {".lock", "HISTORY.jsonl"}
        ] == []

    def test_the_step_itself_is_no_such_write(self, tmp_path, disk, caplog):
        """It comes after the copy, and long before everything is written."""
        module, optimizer = large()
        checkpointer = Checkpointer(
            tmp_path, {"m": module, "o": optimizer}, save_mode="overlap", storage=disk
        )
        before = module.weight.detach().clone()
        checkpointer.save_checkpoint(name="a")
        backward(module)
        optimizer.step()
        disk.go_on.set()
        checkpointer.close()
        state = torch.load(tmp_path / "CKPT+a" / "m.ckpt", weights_only=True)
        assert torch.equal(state["weight"], before)
        assert warnings_in(caplog) == []

    def test_waiting_takes_it_anew_too(self, tmp_path, slow, caplog):
        """Whoever waits wants to have one."""
        held = Held()
        checkpointer = Checkpointer(tmp_path, {"h": held}, save_mode="overlap")
        checkpointer.save_checkpoint(name="a")
        held.tensor.fill_(7)
        slow.go_on.set()
        checkpointer.wait()
        found = torch.load(tmp_path / "CKPT+a" / "h.ckpt", weights_only=True)["t"]
        assert bool((found == 7).all())
        assert DROPPED in warnings_in(caplog)[0]

    def test_the_next_save_takes_its_place(self, tmp_path, slow, caplog):
        """The meta of the dropped one may be true no more; that of the next one is."""
        held = Held()
        checkpointer = Checkpointer(tmp_path, {"h": held}, save_mode="overlap")
        checkpointer.save_checkpoint({"value": 1}, name="a")
        held.tensor.fill_(2)
        slow.go_on.set()
        checkpointer.save_checkpoint({"value": 2}, name="b")
        checkpointer.close()
        (saved,) = checkpointer.list_checkpoints()
        assert saved.path.name == "CKPT+b"
        found = torch.load(saved.paramfiles["h"], weights_only=True)["t"]
        assert bool((found == saved.meta["value"]).all())
        (warning,) = warnings_in(caplog)
        assert "dropped and the one being saved now takes its place" in warning

    @pytest.mark.parametrize("policy", ["raise", "warn"])
    def test_if_it_cannot_be_taken_anew_that_is_a_failed_save(self, tmp_path, slow, caplog, policy):
        """With what the policy says."""
        held = Held()
        checkpointer = Checkpointer(
            tmp_path, {"h": held}, save_mode="overlap", on_save_error=policy
        )
        checkpointer.save_checkpoint(name="a")
        held.tensor.fill_(7)
        slow.go_on.set()
        held.state_dict = lambda: 1 / 0
        if policy == "raise":
            with pytest.raises(SaveError, match="the save hook of 'h' failed: ZeroDivisionError"):
                checkpointer.before_update()
        else:
            checkpointer.before_update()
            assert warnings_in(caplog)[-1].endswith(
                "Training goes on, since on_save_error is 'warn'"
            )
        checkpointer.close()
        assert list(checkpointer.list_checkpoints()) == []

    def test_views_and_parts_of_a_tensor_count(self):
        """A write through any view is a write to the tensor."""
        tensor = torch.zeros(2 * WIDTH, WIDTH)
        for write in (
            lambda: tensor[3:5].add_(1),
            lambda: tensor.view(-1)[7].fill_(1),
            lambda: tensor.T.mul_(2),
            lambda: torch._foreach_add_([tensor], 1.0),
        ):
            target = torch.zeros_like(tensor)
            copy = LateCopy([(tensor.untyped_storage(), target.data_ptr())], [tensor])
            copy.wait()
            write()
            assert copy.changed()
        copy = LateCopy([(tensor.untyped_storage(), target.data_ptr())], [tensor])
        copy.wait()
        assert not copy.changed()
        assert torch.equal(tensor, target)

    def test_a_parameter_is_seen_through_its_state_dict(self):
        """A state_dict has other tensors than the module, of the same memory and counter."""
        module, _ = large()
        (tensor,) = module.state_dict().values()
        target = torch.zeros_like(tensor)
        copy = LateCopy([(tensor.untyped_storage(), target.data_ptr())], [tensor])
        copy.wait()
        with torch.no_grad():
            module.weight.add_(1)
        assert copy.changed()

    def test_what_was_decided_stays_decided(self):
        """The step, which comes after, is no reason any more."""
        tensor = torch.zeros(WIDTH, WIDTH)
        copy = LateCopy([], [tensor])
        copy.wait()
        assert not copy.changed()
        tensor.add_(1)
        assert not copy.changed() and not copy.known_changed

    def test_a_write_during_the_copy_is_known_before_anything_is_written(
        self, tmp_path, slow, disk
    ):
        """So the disk is spared."""
        held = Held()
        checkpointer = Checkpointer(tmp_path, {"h": held}, save_mode="overlap", storage=disk)
        disk.go_on.set()
        operations = []
        disk.before = lambda operation, path, target=None: operations.append(operation)
        checkpointer.save_checkpoint(name="a")
        held.tensor.fill_(7)
        slow.go_on.set()
        checkpointer._saver._writer.wait()
        assert "create" not in operations
        held.tensor.fill_(1)
        checkpointer.close()


def test_memory_is_copied_as_it_is():
    """Byte by byte, of any type and shape."""
    for tensor in (torch.randn(1000), torch.arange(999, dtype=torch.int16), torch.eye(50).T):
        target = (ctypes.c_ubyte * tensor.untyped_storage().nbytes())()
        copy = LateCopy([(tensor.untyped_storage(), ctypes.addressof(target))], [tensor])
        copy.wait()
        assert copy.done
        assert bytes(target) == bytes(tensor.untyped_storage())


def test_the_copy_gives_up_the_interpreters_lock(monkeypatch):
    """Else nothing would be hidden: other threads run while memory is copied."""
    source = torch.zeros(50_000_000)
    target = torch.zeros_like(source)
    # In one call, since the lock is given up between two in any case.
    monkeypatch.setattr(overlap, "_BLOCK", source.untyped_storage().nbytes())
    parts = [(source.untyped_storage(), target.data_ptr())] * 4
    # A busy machine may not let this thread run beside any one copy, but it does beside some.
    ticks, deadline = 0, time.monotonic() + 60
    while ticks <= 10 and time.monotonic() < deadline:
        ticks, copy = 0, LateCopy(parts, [source])
        while not copy.done:
            ticks += 1
            time.sleep(0.0005)
    assert ticks > 10


# ---------------------------------------------------------------------- two ranks

both = distributed.both


def written_to_on_rank_zero(folder, rank):
    torch.manual_seed(rank)
    module, optimizer = large()
    slow = SlowCopy()
    overlap._copy_if_there = slow
    folder.mkdir(exist_ok=True)
    checkpointer = Checkpointer(
        folder,
        {"m": module, "o": optimizer},
        save_mode="overlap",
        storage=None if rank == 0 else distributed.WritesNothing(),
    )
    checkpointer.save_checkpoint(name="a")
    if rank == 0:
        with torch.no_grad():
            module.weight.fill_(2)
    slow.go_on.set()
    backward(module)
    optimizer.step()
    checkpointer.save_checkpoint(name="b")
    optimizer.step()
    checkpointer.wait()
    return checkpointer._saver._mode, sorted(distributed.entries(folder))


def test_two_ranks_take_it_anew_together(both, tmp_path):
    """Only rank zero can tell; both fall back, at the same step."""
    assert both(written_to_on_rank_zero) == (("async", ["CKPT+a", "CKPT+b"]),) * 2
    state = torch.load(tmp_path / "run" / "CKPT+a" / "m.ckpt", weights_only=True)
    assert bool((state["weight"] == 2).all())
