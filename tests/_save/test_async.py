"""`save_mode="async"`: training goes on at once, and the checkpoint is that of the moment of the save.

What goes wrong in the background surfaces at the next save, at `wait`, at `close` or at the end of
`with`, and never in place of the run's own exception.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import _two_ranks as distributed
import pytest
import torch
from _in_flight import Everything, HeldUp, contents, files_of_sync_save
from _releases import needs_torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._layout.publish import read_checkpoint
from lightning_sbckpt._save.arena import Arena
from lightning_sbckpt.errors import SaveError, SBCheckpointError

FULL = (28, "No space left on device")


@pytest.fixture
def disk():
    """A disk that holds up saves in the background, no longer than until the end of the test."""
    made = HeldUp()
    yield made
    made.go_on.set()


def small(folder, **options):
    """Return a checkpointer of one small module."""
    options = {"save_mode": "async", **options}
    return Checkpointer(folder, {"model": torch.nn.Linear(2, 2)}, **options)


def names(folder):
    """Return the names of all there is in a folder, but for the lock."""
    return sorted(
        path.name for path in folder.iterdir() if path.name not in {".lock", "HISTORY.jsonl"}
    )


def until(condition):
    """Return whether something comes true soon."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


class TestState:
    """What is in the checkpoint is what there was when `save_checkpoint` was called."""

    def test_it_is_that_of_the_moment_whatever_changes_in_place_afterwards(self, tmp_path, disk):
        """Parameters, moments, schedulers, metrics, numpy, containers, generators, hooks' files."""
        expected = files_of_sync_save(tmp_path / "sync", "change")
        everything = Everything()
        everything.change()
        checkpointer = everything.checkpointer(tmp_path / "async", save_mode="async", storage=disk)
        assert checkpointer.save_checkpoint(name="first") is None
        assert disk.arrived.wait(20)
        for _ in range(3):
            everything.change()
        assert list(checkpointer.list_checkpoints()) == []
        disk.go_on.set()
        checkpointer.wait()
        (saved,) = checkpointer.list_checkpoints()
        assert contents(saved.path) == expected
        assert find_damage(saved.path) == []

    def test_one_save_after_the_other_has_the_state_of_its_own_moment(self, tmp_path):
        """Though all use the same memory for their copies."""
        everything = Everything()
        with everything.checkpointer(tmp_path / "async", save_mode="async") as checkpointer:
            for number in range(4):
                checkpointer.save_checkpoint(name=str(number))
                everything.change()
        for number in range(4):
            expected = files_of_sync_save(tmp_path / str(number), *["change"] * number)
            assert contents(tmp_path / "async" / f"CKPT+{number}") == expected

    def test_a_state_that_changes_its_form_is_saved_right(self, tmp_path):
        """Also where it becomes larger than the memory for the copy, and smaller again."""
        tensors = {"t": torch.zeros(10)}

        class Growing:
            def state_dict(self):
                return tensors

            def load_state_dict(self, state):
                tensors.update(state)

        sizes = (10, 100_000, 50, 300_000, 0, 7)
        with Checkpointer(tmp_path, {"g": Growing()}, save_mode="async") as checkpointer:
            for number, size in enumerate(sizes):
                tensors["t"] = torch.full((size,), float(number))
                checkpointer.save_checkpoint(name=str(number))
                tensors["t"].fill_(-1)
        for number, size in enumerate(sizes):
            found = torch.load(tmp_path / f"CKPT+{number}" / "g.ckpt", weights_only=True)["t"]
            assert torch.equal(found, torch.full((size,), float(number)))

    def test_recovering_waits_for_what_is_being_saved(self, tmp_path, disk):
        """Else the newest would be missed."""
        checkpointer = small(tmp_path, storage=disk)
        checkpointer.save_checkpoint(name="a")
        assert disk.arrived.wait(20)
        threading.Timer(0.2, disk.go_on.set).start()
        assert checkpointer.recover_if_possible().path.name == "CKPT+a"

    def test_then_is_called_when_the_checkpoint_is_durable_and_may_use_the_checkpointer(
        self, tmp_path
    ):
        """What follows a save may look, delete and even wait, in the background as elsewhere."""
        seen = []
        checkpointer = small(tmp_path)

        def then():
            checkpointer.wait()
            seen.append([ckpt.path.name for ckpt in checkpointer.list_checkpoints()])
            checkpointer.delete_checkpoints(num_to_keep=1)

        for name in "ab":
            checkpointer.save_checkpoint(name=name, on_durable=then)
        checkpointer.wait()
        assert seen == [["CKPT+a"], ["CKPT+a", "CKPT+b"]]
        assert names(tmp_path) == ["CKPT+b"]


class TestMemory:
    """One copy of the state, kept from save to save."""

    def test_the_memory_is_taken_once(self, tmp_path):
        """Fresh memory would make each copy six times slower."""
        everything = Everything()
        capacities, owners = set(), set()
        with everything.checkpointer(tmp_path, save_mode="async") as checkpointer:
            everything.change()
            for _ in range(4):
                checkpointer.save_checkpoint()
                everything.change()
                arena = checkpointer._saver._state.arena
                capacities.add(arena.capacity)
                owners.add(id(arena._owner))
            (folder, *_) = checkpointer.list_checkpoints()
            size = sum(path.stat().st_size for path in folder.path.glob("*.ckpt"))
        assert len(capacities) == len(owners) == 1
        assert size <= capacities.pop() <= size + 4096 * 10

    @pytest.mark.parametrize("mode", [pytest.param("async", marks=pytest.mark.slow), "overlap"])
    def test_a_process_grows_by_one_state_and_no_more(self, tmp_path, mode):
        """However many saves there are: measured by the kernel."""
        code = """
import resource, sys, torch
from lightning_sbckpt import Checkpointer
torch.set_num_threads(1)
model = torch.nn.ParameterList([torch.ones(2_000_000) for _ in range(6)])
checkpointer = Checkpointer(sys.argv[1], {"model": model}, save_mode=sys.argv[2],
                            link_unchanged=False)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
with Checkpointer(sys.argv[1] + "/warm", {"m": torch.nn.Linear(1, 1)}, save_mode="async") as warm:
    warm.save_checkpoint()
before = peak()
for number in range(4):
    checkpointer.save_and_keep_only({"n": number})
    checkpointer.before_update()
    with torch.no_grad():
        for parameter in model:
            parameter.add_(1)
    if number == 0:
        checkpointer.wait()
        first = peak()
checkpointer.close()
print(first - before, peak() - first)
"""
        state = 48.0
        command = [sys.executable, "-c", code, str(tmp_path), mode]
        run = subprocess.run(command, timeout=120, capture_output=True, check=True, text=True)
        first, more = map(float, run.stdout.split())
        assert first < 1.25 * state
        assert more < 0.25 * state

    def test_pinned_memory_is_laid_out_like_any_other(self, tmp_path, monkeypatch):
        """The layout knows nothing of where the memory is from; on a GPU that is pinned memory."""
        everything = Everything()
        everything.change()
        asked = []
        monkeypatch.setattr(
            "lightning_sbckpt._save.arena.pin",
            lambda memory, devices: asked.append(len(memory)),
        )
        monkeypatch.setattr(
            "lightning_sbckpt._format.image.Image.devices",
            property(lambda image: {torch.device("cuda", 0)}),
        )
        with everything.checkpointer(tmp_path / "pinned", save_mode="async") as checkpointer:
            for name in "ab":
                checkpointer.save_checkpoint(name=name)
        assert len(asked) == 1
        expected = files_of_sync_save(tmp_path / "sync", "change")
        assert contents(tmp_path / "pinned" / "CKPT+a") == expected
        assert contents(tmp_path / "pinned" / "CKPT+b") == expected

    def test_memory_is_taken_anew_when_it_has_to_be_of_the_other_kind(self, monkeypatch):
        """A model may move to a GPU between two saves."""
        kinds = []
        monkeypatch.setattr(
            "lightning_sbckpt._save.arena.pin",
            lambda memory, devices: kinds.append("pinned" if devices else "plain"),
        )
        arena = Arena()

        class Bytes:
            def __init__(self, content):
                self.content, self.size = content, len(content)

            def fill(self, start, out):
                out[:] = self.content[start : start + len(out)]

        gpu = {torch.device("cuda", 0)}
        for devices in ((), (), gpu, gpu, ()):
            for content in (b"abcdef", b"xyz"):
                frozen, left = arena.take({"f": Bytes(content)}, devices=devices)
                # Nothing is left behind it of what was there before.
                assert bytes(frozen["f"].memory) == content.ljust(4096, b"\0")
                assert left == []
        assert kinds == ["plain", "pinned", "plain"]


class TestOneInFlight:
    """There is one copy of the state, so there is one save in flight."""

    def test_the_next_save_waits_for_the_one_in_flight(self, tmp_path, disk):
        """And then both are there, each whole."""
        checkpointer = small(tmp_path, storage=disk)
        checkpointer.save_checkpoint(name="a")
        assert disk.arrived.wait(20)
        second = threading.Thread(target=lambda: checkpointer.save_checkpoint(name="b"))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert [name[:9] for name in names(tmp_path)] == [".staging+"]
        disk.go_on.set()
        second.join(20)
        checkpointer.wait()
        assert names(tmp_path) == ["CKPT+a", "CKPT+b"]

    def test_by_choice_it_is_skipped_counted_and_said(self, tmp_path, disk, caplog):
        """And the one after it is saved as ever."""
        checkpointer = small(tmp_path, storage=disk, when_busy="skip")
        checkpointer.save_checkpoint(name="a")
        assert disk.arrived.wait(20)
        for name in "bc":
            assert checkpointer.save_checkpoint(name=name) is None
        assert [record.getMessage() for record in caplog.records] == [
            f"skipped a save to {tmp_path}: the one before it is still being written "
            f"({number} skipped so far)"
            for number in (1, 2)
        ]
        disk.go_on.set()
        checkpointer.wait()
        checkpointer.save_checkpoint(name="d")
        checkpointer.close()
        assert names(tmp_path) == ["CKPT+a", "CKPT+d"]
        assert caplog.text.count("skipped a save") == 2


SURFACES = {
    "the next save": lambda checkpointer: checkpointer.save_checkpoint(name="b"),
    "wait": lambda checkpointer: checkpointer.wait(),
    "close": lambda checkpointer: checkpointer.close(),
    "recovering": lambda checkpointer: checkpointer.recover_if_possible(),
    "deleting": lambda checkpointer: checkpointer.delete_checkpoints(),
    "the end of with": lambda checkpointer: checkpointer.__exit__(None, None, None),
}


class TestErrors:
    """A save that failed in the background is news at once and an exception soon."""

    @pytest.mark.parametrize("where", SURFACES)
    def test_what_failed_in_the_background_surfaces(self, tmp_path, disk, caplog, where):
        """With the disk's own error; once; and the save after it works."""
        checkpointer = small(tmp_path, storage=disk)
        disk.go_on.set()
        disk.failure = FULL
        checkpointer.save_checkpoint(name="a")
        assert until(lambda: not checkpointer.is_saving)
        # At once, with the traceback.
        (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert record.getMessage() == "saving in the background failed"
        assert record.exc_info[1].__cause__.args == FULL
        assert "in commit" in caplog.text
        disk.failure = None
        with pytest.raises(
            SaveError,
            match=r"No space left on device \(it needs [1-9][\d,]* bytes, and .* are free\)",
        ):
            SURFACES[where](checkpointer)
        assert names(tmp_path) == []
        checkpointer.save_checkpoint(name="c")
        checkpointer.close()
        assert names(tmp_path) == ["CKPT+c"]

    def test_leaving_with_raises_it(self, tmp_path, disk):
        """Nobody may believe that all is saved."""
        disk.go_on.set()
        disk.failure = FULL
        with (
            pytest.raises(SaveError, match="No space left on device"),
            small(tmp_path, storage=disk) as checkpointer,
        ):
            checkpointer.save_checkpoint()

    def test_the_runs_own_exception_is_not_replaced(self, tmp_path, disk, caplog):
        """What ended the block is raised; what the disk said is in the log."""
        disk.go_on.set()
        disk.failure = FULL
        with (
            pytest.raises(ZeroDivisionError, match="the run's own"),
            small(tmp_path, storage=disk) as checkpointer,
        ):
            checkpointer.save_checkpoint()
            raise ZeroDivisionError("the run's own")
        assert "No space left on device" in caplog.text

    def test_by_choice_training_goes_on_without_it(self, tmp_path, disk, caplog):
        """It is said, counted, and the next save works."""
        checkpointer = small(tmp_path, storage=disk, on_save_error="warn")
        disk.go_on.set()
        disk.failure = FULL
        checkpointer.save_checkpoint(name="a")
        assert until(lambda: not checkpointer.is_saving)
        disk.failure = None
        checkpointer.save_checkpoint(name="b")
        checkpointer.close()
        assert names(tmp_path) == ["CKPT+b"]
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert warning.getMessage().endswith("Training goes on, since on_save_error is 'warn'")
        assert "No space left on device" in warning.getMessage()

    @pytest.mark.parametrize("policy", ["raise", "warn"])
    def test_a_hook_that_fails_fails_the_save_at_once(self, tmp_path, policy):
        """In every mode, since hooks run while training stands still."""
        checkpointer = small(tmp_path, on_save_error=policy)

        def fail(obj, path):
            raise RuntimeError("no room")

        checkpointer.add_recoverable("failing", object(), custom_save_hook=fail)
        if policy == "raise":
            with pytest.raises(SaveError, match="the save hook of 'failing' failed"):
                checkpointer.save_checkpoint(name="a")
        else:
            assert checkpointer.save_checkpoint(name="a") is None
        assert names(tmp_path) == []
        del checkpointer.recoverables["failing"]
        checkpointer.save_checkpoint(name="b")
        checkpointer.close()
        assert names(tmp_path) == ["CKPT+b"]

    def test_nothing_is_deleted_after_a_save_that_failed(self, tmp_path, disk):
        """Nor before the new one is durable."""
        disk.go_on.set()
        checkpointer = small(tmp_path, storage=disk)
        checkpointer.save_and_keep_only({"loss": 1.0}, name="old")
        checkpointer.wait()
        disk.failure = FULL
        checkpointer.save_and_keep_only({"loss": 0.5}, name="new")
        with pytest.raises(SaveError):
            checkpointer.wait()
        assert names(tmp_path) == ["CKPT+old"]
        disk.failure = None
        disk.go_on.clear()
        disk.arrived.clear()
        checkpointer.save_and_keep_only({"loss": 0.5}, name="new")
        assert disk.arrived.wait(20)
        assert "CKPT+old" in names(tmp_path)
        disk.go_on.set()
        checkpointer.wait()
        assert names(tmp_path) == ["CKPT+new"]

    @pytest.mark.parametrize(
        "where",
        [
            "in a hook",
            pytest.param("in the copy", marks=needs_torch("2.6", "torch.serialization.skip_data")),
        ],
    )
    @pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
    def test_an_interrupt_in_the_middle_leaves_nothing(self, tmp_path, monkeypatch, mode, where):
        """Ctrl-C is raised as it is; the next save works."""
        checkpointer = Everything().checkpointer(tmp_path, save_mode=mode)

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if where == "in a hook":
                checkpointer.custom_save_hooks["noted"] = interrupt
            elif mode == "sync":
                patch.setattr("lightning_sbckpt._io.storage.write_source", interrupt)
            else:
                patch.setattr("lightning_sbckpt._format.image.ctypes.memmove", interrupt)
            # Whoever holds the exception holds what was under way, too.
            with pytest.raises(KeyboardInterrupt) as interrupted:
                checkpointer.save_checkpoint()
        assert names(tmp_path) == []
        del interrupted
        checkpointer.custom_save_hooks["noted"] = lambda noted, path: path.write_text("0") and None
        checkpointer.save_checkpoint(name="next")
        checkpointer.close()
        assert names(tmp_path) == ["CKPT+next"]


@pytest.fixture
def one_thread():
    """Compute in one: those that torch has besides are not forked, and a child waits in vain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestProcesses:
    """Exit and fork."""

    @pytest.mark.parametrize(
        ("mode", "end"),
        [
            pytest.param("async", "raise ValueError('the run failed')", marks=pytest.mark.slow),
            ("overlap", ""),
        ],
    )
    def test_an_interpreter_that_exits_at_once_has_saved(self, tmp_path, end, mode):
        """Nobody called `wait`; retention was done, too."""
        code = (
            "import sys, torch\n"
            "from lightning_sbckpt import Checkpointer\n"
            "model = torch.nn.Linear(2000, 2000)\n"
            "torch.nn.init.constant_(model.weight, 3.0)\n"
            f"checkpointer = Checkpointer(sys.argv[1], {{'model': model}}, save_mode={mode!r})\n"
            "checkpointer.save_checkpoint(name='a')\n"
            "checkpointer.save_and_keep_only(name='b')\n"
            f"{end}\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        ended = subprocess.run(command, timeout=120, capture_output=True, check=False, text=True)
        assert ended.returncode == (1 if end else 0), ended.stderr
        assert ("the run failed" in ended.stderr) == bool(end)
        # And no lock either.
        assert sorted(path.name for path in tmp_path.iterdir()) == ["CKPT+b", "HISTORY.jsonl"]
        saved = read_checkpoint(tmp_path / "CKPT+b")
        assert find_damage(saved.path) == []
        state = torch.load(saved.paramfiles["model"], weights_only=True)
        assert bool((state["weight"] == 3.0).all())

    @pytest.mark.sample(1)
    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.parametrize("mode", ["async", "overlap"])
    def test_a_fork_while_a_save_is_in_flight_harms_neither(self, tmp_path, disk, mode):
        """The child ends in good order, saves elsewhere if it likes, and touches nothing here."""
        expected = files_of_sync_save(tmp_path / "sync", "change")
        everything = Everything()
        everything.change()
        checkpointer = everything.checkpointer(tmp_path / "run", save_mode=mode, storage=disk)
        checkpointer.save_checkpoint(name="a")
        assert disk.arrived.wait(20)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(20)
                checkpointer.before_update()
                checkpointer.wait()
                everything.change()
                with everything.checkpointer(tmp_path / "child", save_mode=mode) as other:
                    other.save_checkpoint(name="c")
                del checkpointer, other
                gc.collect()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        everything.change()
        disk.go_on.set()
        checkpointer.close()
        assert names(tmp_path / "run") == ["CKPT+a"]
        assert contents(tmp_path / "run" / "CKPT+a") == expected
        twice = files_of_sync_save(tmp_path / "twice", "change", "change")
        assert contents(tmp_path / "child" / "CKPT+c") == twice

    def test_the_workers_of_a_loader_start_and_end_while_a_save_is_in_flight(self, tmp_path, disk):
        """They are forked from a process that has the thread and the memory of the copy."""
        expected = files_of_sync_save(tmp_path / "sync", "change")
        everything = Everything()
        everything.change()
        checkpointer = everything.checkpointer(tmp_path / "run", save_mode="async", storage=disk)
        checkpointer.save_checkpoint(name="a")
        assert disk.arrived.wait(20)
        loader = torch.utils.data.DataLoader(
            torch.arange(8), num_workers=2, multiprocessing_context="fork", timeout=30
        )
        assert torch.cat(list(loader)).tolist() == list(range(8))
        disk.go_on.set()
        checkpointer.wait()
        assert contents(tmp_path / "run" / "CKPT+a") == expected


LARGE = 3_000_000


class TestRemoval:
    """Removing takes as long as writing, so it is done beside the training."""

    class Recorded(LocalStorage):
        """A disk that knows which thread removes what, and can hold it up or fail."""

        def __init__(self):
            self.removed_by = {}
            self.go_on = threading.Event()
            self.go_on.set()
            self.failure = None

        def before(self, operation, path, target=None):
            if operation == "remove_file":
                thread = threading.current_thread().name
                self.removed_by[path.name] = thread
                if thread == "sbckpt-remover":
                    assert self.go_on.wait(60)
                    if self.failure is not None:
                        raise self.failure

    @pytest.fixture
    def disk(self):
        """Such a disk; what it holds up goes on at the end of the test."""
        made = self.Recorded()
        yield made
        made.go_on.set()

    def saved(self, folder, disk, mode="sync", size=LARGE):
        """Return a checkpointer with two checkpoints."""
        made = Checkpointer(
            folder,
            {"model": torch.nn.ParameterList([torch.zeros(size)])},
            storage=disk,
            save_mode=mode,
            link_unchanged=False,
        )
        for name in "ab":
            made.save_checkpoint(name=name)
        made.wait()
        return made

    @pytest.mark.parametrize("mode", ["sync", "async"])
    def test_a_large_checkpoint_is_none_at_once_and_its_files_go_elsewhere(
        self, tmp_path, disk, mode
    ):
        """The call returns while they are there; `wait` returns when they aren't."""
        checkpointer = self.saved(tmp_path, disk, mode)
        disk.go_on.clear()
        checkpointer.delete_checkpoints()
        assert [ckpt.path.name for ckpt in checkpointer.list_checkpoints()] == ["CKPT+b"]
        hidden, kept = names(tmp_path)
        assert hidden.startswith(".removed+") and hidden.endswith("+CKPT+a") and kept == "CKPT+b"
        waiting = threading.Thread(target=checkpointer.wait)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        disk.go_on.set()
        waiting.join(20)
        assert names(tmp_path) == ["CKPT+b"]
        assert disk.removed_by["model.ckpt"] == "sbckpt-remover"

    def test_a_large_one_that_is_replaced_goes_elsewhere_too(self, tmp_path, disk):
        """The save returns when the new one is durable, whatever the old one's files take."""
        checkpointer = self.saved(tmp_path, disk)
        disk.go_on.clear()
        saved = checkpointer.save_checkpoint(name="a")
        assert find_damage(saved.path) == []
        hidden = [name for name in names(tmp_path) if name.startswith(".removed+")]
        assert len(hidden) == 1
        disk.go_on.set()
        checkpointer.wait()
        assert names(tmp_path) == ["CKPT+a", "CKPT+b"]
        assert disk.removed_by["model.ckpt"] == "sbckpt-remover"

    def test_a_small_one_goes_at_once(self, tmp_path, disk):
        """A thread would cost more."""
        checkpointer = self.saved(tmp_path, disk, size=10)
        checkpointer.delete_checkpoints()
        assert disk.removed_by["model.ckpt"] == threading.current_thread().name
        assert names(tmp_path) == ["CKPT+b"]

    def test_what_a_hook_wrote_into_a_folder_counts(self, tmp_path, disk):
        """A large file in a folder of a checkpoint is as slow to remove as any."""
        checkpointer = Checkpointer(tmp_path, storage=disk)

        def write(obj, path):
            path.mkdir()
            (path / "large").write_bytes(bytes(9_000_000))

        checkpointer.add_recoverable("folder", object(), custom_save_hook=write)
        checkpointer.save_checkpoint(name="a")
        checkpointer.delete_checkpoints(num_to_keep=0)
        checkpointer.wait()
        assert disk.removed_by["large"] == "sbckpt-remover"
        assert names(tmp_path) == []

    def test_an_error_in_it_is_only_said(self, tmp_path, disk, caplog):
        """It is no checkpoint any more, and the next start clears it."""
        checkpointer = self.saved(tmp_path, disk)
        disk.failure = OSError(5, "Input/output error")
        checkpointer.delete_checkpoints()
        checkpointer.wait()
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "could not be removed and is cleared at the next start" in warning.getMessage()
        assert "Input/output error" in warning.getMessage()
        assert str(tmp_path) in warning.getMessage()
        hidden, kept = names(tmp_path)
        assert hidden.startswith(".removed+") and kept == "CKPT+b"
        checkpointer.close()
        Checkpointer(tmp_path)
        assert names(tmp_path) == ["CKPT+b"]


# ---------------------------------------------------------------------- two ranks

both = distributed.both


def of_rank(folder, rank, storage=None):
    """Return a checkpointer of one model, which differs from rank to rank."""
    torch.manual_seed(rank)
    folder.mkdir(exist_ok=True)
    return Checkpointer(
        folder,
        {"model": torch.nn.Linear(2, 2), "each": distributed.PerRank(rank + 10)},
        save_mode="async",
        storage=storage if rank == 0 else distributed.WritesNothing(),
    )


def save_beside_training(folder, rank):
    checkpointer = of_rank(folder, rank)
    model, each = checkpointer.recoverables["model"], checkpointer.recoverables["each"]
    before = model.weight.tolist()
    saved = checkpointer.save_checkpoint(name="a")
    with torch.no_grad():
        model.weight.add_(1)
    each.number = 0
    checkpointer.wait()
    there = distributed.entries(folder)
    checkpointer.recover_if_possible()
    return saved, there, before, model.weight.tolist(), each.number


def test_two_ranks_save_beside_training(both, tmp_path):
    """After `wait` the checkpoint is there for both, with the state of the moment of the save."""
    zero, one = both(save_beside_training)
    assert zero[:2] == one[:2] == (None, ["CKPT+a"])
    assert zero[2] != one[2]
    assert zero[3] == one[3] == zero[2]
    assert (zero[4], one[4]) == (10, 11)
    assert find_damage(tmp_path / "run" / "CKPT+a") == []


class FailsOnce(LocalStorage):
    """A disk that fails in the background once."""

    failed = False

    def before(self, operation, path, target=None):
        if threading.current_thread().name == "sbckpt-writer" and not self.failed:
            self.failed = True
            raise OSError(*FULL)


def fail_in_the_background(folder, rank):
    checkpointer = of_rank(folder, rank, FailsOnce())
    answers = [str(checkpointer.save_checkpoint(name="a"))]
    for name in "bc":
        try:
            checkpointer.save_checkpoint(name=name)
        except SaveError as error:
            answers.append(str(error))
    checkpointer.wait()
    return answers, sorted(distributed.entries(folder))


def test_a_failure_in_the_background_of_rank_zero_is_raised_on_both(both):
    """At the same call, so that they stay in step; the save after it works."""
    zero, one = both(fail_in_the_background)
    for first, second in (zero[0], one[0]):
        assert first == "None"
        assert "No space left on device" in second
    assert "failed on rank 0" in one[0][1]
    assert zero[1] == one[1] == ["CKPT+c"]


def wait_for_a_failure(folder, rank):
    checkpointer = of_rank(folder, rank, FailsOnce())
    checkpointer.save_checkpoint(name="a")
    try:
        checkpointer.wait()
    except SaveError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_waiting_raises_it_on_both(both):
    """With the disk's own words."""
    for answer in both(wait_for_a_failure):
        assert "No space left on device" in answer


def fail_in_a_hook_of_one(folder, rank):
    checkpointer = of_rank(folder, rank)
    checkpointer.save_checkpoint(name="a")
    checkpointer.registry = checkpointer.registry.copy()

    def fail(obj, path):
        if rank == 1:
            raise RuntimeError("rank 1 has no room")
        distributed.PerRank.save(obj, path)

    checkpointer.registry.save[distributed.PerRank] = fail
    try:
        checkpointer.save_checkpoint(name="b")
    except SBCheckpointError as error:
        answer = str(error)
    del checkpointer.recoverables["each"]
    checkpointer.save_checkpoint(name="c")
    checkpointer.wait()
    return answer, sorted(distributed.entries(folder))


@pytest.mark.slow
def test_a_hook_that_fails_on_rank_one_fails_the_save_on_both(both):
    """While training stands still; nothing of it is left, and what is in flight is not harmed."""
    for answer, there in both(fail_in_a_hook_of_one):
        assert "rank 1 has no room" in answer
        assert there == ["CKPT+a", "CKPT+c"]
