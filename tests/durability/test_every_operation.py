"""Every operation that touches the disk fails once: by an error, by a kill, by a power cut.

The scenario (`_scenario.py`) starts in a folder with leftovers of dead processes, saves, replaces
names, prunes and deletes. After each failure a new process has to find every checkpoint that was
reported saved, whole; to load the best and the newest; and to clear up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from _counts import count
from _disk_model import Chance, Disk, Everything, NamesOnly, Nothing, ObservedStorage
from _processes import context
from _releases import needs_torch
from _scenario import (
    FURNITURE,
    SAVE_MODES,
    STEPS,
    _save,
    assert_nothing_lost,
    checkpointer_of,
    look,
    numbers_after,
    prepare,
    warm_up,
)

from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt.errors import RemovalError, SaveError

# How often the scenario does what, in every mode: a new operation has to be looked at here.
OPERATIONS = {
    "make_dir": 7,
    "create": 43,
    "write": 43,
    "flush_file": 64,
    "flush_dir": 37,
    "rename": 13,
    "exchange": 2,
    "link": 6,
    "remove_file": 89,
    "remove_dir": 27,
}

ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES)
# What network filesystems say, and a system that is short of something.
OTHERS = (
    errno.ESTALE,
    errno.EROFS,
    errno.EDQUOT,
    errno.ETIMEDOUT,
    errno.ENOTEMPTY,
    errno.EBUSY,
    errno.EMFILE,
    errno.ENOMEM,
)

# Which share of the operations the tests that are not marked slow go through: one of so many.
SHARE = {mode: 2 if mode == "sync" else 5 for mode in SAVE_MODES}


def some_of(count, mode):
    """Return a seeded share of the numbers up to `count`, the last one among them."""
    chosen = random.Random(4).sample(range(1, count), (count - 1) // SHARE[mode])
    return sorted({*chosen, count})


modes = pytest.mark.parametrize("mode", SAVE_MODES)
# The opening of the folder, which sweeps it, and then each step.
parts = pytest.mark.parametrize("part", range(-1, len(STEPS)), ids=lambda part: f"part {part + 1}")


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: what fails is decided here, and not by the disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A function from a save mode to the folders as they are before each part, saved once."""
    made = {}

    def states_of(mode):
        if mode not in made:
            base = tmp_path_factory.mktemp(mode)
            prepare(base / "run", base / "scratch")
            made[mode] = [base / "before opening"]
            shutil.copytree(base / "run", made[mode][0])
            checkpointer = checkpointer_of(base / "run", save_mode=mode)
            for number, step in enumerate(STEPS):
                made[mode].append(base / f"before {number}")
                shutil.copytree(base / "run", made[mode][-1])
                step.run(checkpointer)
            checkpointer.close()
        return made[mode]

    return states_of


class Numbered(LocalStorage):
    """A disk that counts its operations once it is armed, and does something at the n-th."""

    def __init__(self, act=None, at=0, persistent=False):
        self.armed = False
        self.count = 0
        self.kinds = Counter()
        self._act = act
        self._at = at
        self._persistent = persistent
        self._lock = threading.Lock()

    @property
    def fired(self):
        """Whether the n-th operation was reached."""
        return self.count >= self._at > 0

    def before(self, operation, path, target=None):
        if not self.armed:
            return
        with self._lock:
            self.count += 1
            self.kinds[operation] += 1
            due = self.count == self._at or (self._persistent and self.fired)
        if due:
            self._act()


def run_part(root, part, mode, storage):
    """Run one part with an armed disk, after the part before it with a sound one."""
    if part < 0:
        storage.armed = True
        checkpointer_of(root, save_mode=mode, storage=storage)
        return
    checkpointer = checkpointer_of(root, save_mode=mode, storage=storage)
    if part > 0:
        STEPS[part - 1].run(checkpointer)
    storage.armed = True
    try:
        STEPS[part].run(checkpointer)
    finally:
        storage.armed = False
        checkpointer.close()


def copy_before(states, part, mode, root):
    """Make the folder in which `run_part` starts."""
    shutil.copytree(states(mode)[max(part, 0) if part >= 1 else part + 1], root)


def count_part(states, part, mode, folder):
    """Return how many operations a part takes."""
    storage = Numbered()
    copy_before(states, part, mode, folder / "counted")
    run_part(folder / "counted", part, mode, storage)
    return storage.count


class TestTheCount:
    """Which operations there are."""

    @needs_torch("2.6", "torch.serialization.skip_data, by which files are linked,")
    @modes
    def test_the_scenario_does_exactly_the_operations_known_here(self, memory, mode):
        """By kind; and what it saves and removes is what its steps say."""
        prepare(memory / "run", memory / "scratch")
        storage = Numbered()
        storage.armed = True
        checkpointer = checkpointer_of(memory / "run", save_mode=mode, storage=storage)
        for number, step in enumerate(STEPS):
            step.run(checkpointer)
            listed = {ckpt.meta["number"] for ckpt in checkpointer.list_checkpoints()}
            assert listed == numbers_after(STEPS[: number + 1])
        checkpointer.close()
        assert dict(storage.kinds) == OPERATIONS
        count("operations of the scenario", sum(OPERATIONS.values()))

    @modes
    def test_nothing_changes_on_the_disk_that_was_not_announced(self, memory, mode):
        """Every file opened to be written, every rename, removal and new folder.

        Custom hooks' own files are excepted.
        """
        prepare(memory / "run", memory / "scratch")
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=audited_run, args=(memory / "run", mode, writer))
        child.start()
        writer.close()
        seen, unannounced = reader.recv()
        child.join()
        assert child.exitcode == 0
        assert seen["os.rename"] >= OPERATIONS["rename"]
        assert seen["open"] >= OPERATIONS["create"]
        assert unannounced == []


def audited_run(root, mode, results):
    """In a child: run the scenario, and send what the interpreter did that nobody announced."""
    announced = Counter()
    writable = set()
    seen = Counter()
    unannounced = []
    known = set()
    storage = LocalStorage()
    prefix = os.fspath(root) + os.sep
    steps = {
        "os.rename": ("rename", 2),
        "os.link": ("link", 2),
        "os.symlink": ("symlink", 2),
        "os.remove": ("remove_file", 1),
        "os.rmdir": ("remove_dir", 1),
        "os.mkdir": ("make_dir", 1),
        "os.truncate": ("truncate", 1),
    }
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def before(operation, path, target=None):
        look_for_files_of_nobody()
        paths = (path,) if target is None else (path, target)
        announced[(operation, *map(os.fspath, paths))] += 1
        if operation in ("create", "write"):
            writable.add(os.fspath(path))
        if operation in ("create", "link"):
            known.add(os.fspath(target or path))

    def is_ours(path):
        return (
            isinstance(path, str)
            and path.startswith(prefix)
            and "table.ckpt" not in path
            # Nothing is lost with these two, so they are not flushed.
            and not Path(path).name.startswith(tuple(FURNITURE))
        )

    def look_for_files_of_nobody():
        # What libraries write in C++ passes by the interpreter.
        for folder, _, names in os.walk(root):
            for name in names:
                path = f"{folder}{os.sep}{name}"
                if ".staging+" in folder and is_ours(path) and path not in known:
                    unannounced.append(("file", path))
                    known.add(path)

    def whole(path, folder):
        path = os.fspath(path) if isinstance(path, os.PathLike) else path
        if folder < 0 or not isinstance(path, str):
            return path
        return os.fspath(Path(f"/proc/self/fd/{folder}").readlink() / path)

    def audit(event, arguments):
        if event == "open":
            path, _, flags = arguments
            path = os.fspath(path) if isinstance(path, os.PathLike) else path
            if isinstance(path, str) and os.sep not in path and flags & writing:
                # Relative to an open folder, which the event does not tell.
                path = next((each for each in writable if each.endswith(os.sep + path)), path)
                path = f"{prefix}{path}" if not path.startswith(os.sep) else path
            if is_ours(path) and flags & writing:
                seen[event] += 1
                if path not in writable:
                    unannounced.append((event, path))
        elif event in steps:
            operation, count = steps[event]
            paths = tuple(map(whole, arguments[:count], arguments[-count:]))
            if any(map(is_ours, paths)):
                seen[event] += 1
                if announced[(operation, *paths)] <= 0:
                    unannounced.append((event, *paths))
                announced[(operation, *paths)] -= 1

    known.update(os.fspath(path) for path in root.rglob("*"))
    storage.before = before
    sys.addaudithook(audit)
    checkpointer = checkpointer_of(root, save_mode=mode, storage=storage)
    for step in STEPS:
        step.run(checkpointer)
    look_for_files_of_nobody()
    results.send((seen, unannounced))


class TestErrors:
    """The disk answers with an error, once or from then on."""

    @pytest.mark.sample(1)
    @parts
    @modes
    def test_at_any_operation_one_error_costs_at_most_the_checkpoint_being_saved(
        self, memory, states, mode, part
    ):
        """A seeded half of the operations, a fifth in the other modes; the errors take turns."""
        errors = ERRORS + OTHERS
        for at in some_of(count_part(states, part, mode, memory), mode):
            code = errors[at % len(errors)]
            fail_once(memory / f"{at}", states, mode, part, at, code, at % 5 == 0)

    @pytest.mark.slow
    @pytest.mark.parametrize("turn", range(len(OTHERS)))
    @parts
    @modes
    def test_other_errors_at_every_operation(self, memory, states, mode, part, turn):
        """Each of them at a share of the operations, other ones in each mode; all operations have one."""
        shift = SAVE_MODES.index(mode)
        for at in range(1 + turn, count_part(states, part, mode, memory) + 1, len(OTHERS)):
            code = OTHERS[(at + shift + part) % len(OTHERS)]
            fail_once(memory / f"{at}", states, mode, part, at, code, at % 2 == 0)

    @pytest.mark.slow
    @pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
    @pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
    @parts
    @modes
    def test_every_error_at_every_operation(self, memory, states, mode, part, code, persistent):
        """All of them."""
        for at in range(1, count_part(states, part, mode, memory) + 1):
            fail_once(memory / f"{at}", states, mode, part, at, code, persistent)


def fail_with(code):
    """Fail as the system does."""
    raise OSError(code, os.strerror(code))


def fail_once(root, states, mode, part, at, code, persistent):
    """Let one operation of a part fail, and look."""
    storage = Numbered(partial(fail_with, code), at, persistent)
    copy_before(states, part, mode, root)
    error = None
    try:
        run_part(root, part, mode, storage)
    except (SaveError, RemovalError, OSError) as raised:
        error = raised
    assert storage.fired
    count("errors injected, each at one operation")
    not_saved = False
    if isinstance(error, SaveError):
        assert os.strerror(code) in str(error)
        assert str(root) in str(error)
        assert "earlier checkpoints are whole" in str(error)
        not_saved = True
    elif isinstance(error, RemovalError):
        # The save itself did not fail.
        assert os.strerror(code) in str(error)
        assert str(root) in str(error)
    elif error is not None:
        assert error.errno == code
    numbers = look(root, mode)
    assert_nothing_lost(numbers, max(part, 0), part + 1)
    if part >= 0 and STEPS[part].saves and not not_saved:
        assert STEPS[part].saves in numbers
    if part >= 0 and not_saved and not persistent:
        assert numbers == numbers_after(STEPS[:part])
    # A new process goes on.
    with checkpointer_of(root, save_mode=mode) as checkpointer:
        _save(50, "after").run(checkpointer)
    assert look(root, mode) == numbers | {50}
    shutil.rmtree(root)


class TestGoingOn:
    """The process that saw the error does not end."""

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("policy", ["raise", "warn"])
    @modes
    def test_the_next_save_of_the_same_process_works(self, memory, states, mode, policy):
        """After an error at some operation of the saving and pruning step, which `warn` never raises."""
        part = 5
        errors = ERRORS + OTHERS
        expected = (SaveError, OSError) if policy == "raise" else ()
        for at in range(1, count_part(states, part, mode, memory) + 1, 4):
            root = memory / f"{at}"
            copy_before(states, part, mode, root)

            code = errors[at % len(errors)]
            storage = Numbered(partial(fail_with, code), at)
            checkpointer = checkpointer_of(
                root, save_mode=mode, storage=storage, on_save_error=policy
            )
            storage.armed = True
            with contextlib.suppress(*expected):
                STEPS[part].run(checkpointer)
            assert storage.fired
            storage.armed = False
            _save(50, "after").run(checkpointer)
            checkpointer.close()
            listed = {ckpt.meta["number"] for ckpt in checkpointer.list_checkpoints()}
            assert 50 in listed
            assert look(root, mode) == listed


def kill_self():
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_turn(deaths, results):
    """In a child: for each (root, part, mode, at) fork a process that is killed there."""
    warm_up(deaths[0][0].parent / "warm")
    for root, part, mode, at in deaths:
        child = os.fork()
        if child == 0:
            run_part(root, part, mode, Numbered(kill_self, at))
            os._exit(0)
        results.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def kill_at(states, deaths):
    """Let real processes be killed, each at its operation of its part, and look."""
    for root, part, mode, _ in deaths:
        copy_before(states, part, mode, root)
    reader, writer = context.Pipe(duplex=False)
    driver = context.Process(target=die_in_turn, args=(deaths, writer))
    driver.start()
    writer.close()
    for root, part, mode, _ in deaths:
        assert reader.recv() == -signal.SIGKILL
        count("processes killed, each at one operation")
        assert_nothing_lost(look(root, mode), max(part, 0), part + 1)
        shutil.rmtree(root)
    driver.join()


class TestKills:
    """Real processes die by SIGKILL just before an operation."""

    @pytest.mark.sample(1)
    @modes
    def test_some_operations_of_every_part(self, memory, states, mode):
        """A seeded share."""
        chance = random.Random(4)
        deaths = []
        for part in range(-1, len(STEPS)):
            (memory / f"{part}").mkdir()
            count = count_part(states, part, mode, memory / f"{part}")
            sample = chance.sample(range(1, count + 1), 6)
            deaths += [(memory / f"{part}" / f"{at}", part, mode, at) for at in sample]
        kill_at(states, deaths)

    @pytest.mark.slow
    @parts
    @modes
    def test_every_operation(self, memory, states, mode, part):
        """All of them."""
        count = count_part(states, part, mode, memory)
        kill_at(states, [(memory / f"{at}", part, mode, at) for at in range(1, count + 1)])


class Recorded:
    """A run of the scenario on an observed disk."""

    def __init__(self, base, mode, storage, waits):
        self.base = base
        self.mode = mode
        self.start = base / "start"
        prepare(base / "disk" / "run", base / "scratch")
        shutil.copytree(base / "disk", self.start)
        checkpointer = checkpointer_of(base / "disk" / "run", save_mode=mode, storage=storage)
        for number, step in enumerate(STEPS):
            storage.mark(("started", number + 1))
            step.start(checkpointer)
            if waits or number == len(STEPS) - 1:
                checkpointer.wait()
            if waits or number == len(STEPS) - 1 or mode == "sync":
                storage.mark(("confirmed", number + 1))
        checkpointer.close()
        self.events = storage.events
        self._seen = set()
        self._known = {}

    def progress(self, at):
        """Return how many steps were confirmed and how many started before an event."""
        told = dict(event.note for event in self.events[:at] if event.operation == "mark")
        return told.get("confirmed", 0), told.get("started", 0)

    def cut(self, at, choose):
        """Cut the power before an event, and look."""
        after = self.base / "after"
        Disk(self.base / "disk", self.start).after_power_cut(self.events, at, choose, after)
        count("power cuts, each with a choice of what survives")
        confirmed, started = self.progress(at)
        tree = frozenset(
            (path.relative_to(after), path.is_file() and path.read_bytes())
            for path in after.rglob("*")
        )
        # Many cuts leave the same: looked at once.
        if (tree, confirmed, started) not in self._seen:
            self._seen.add((tree, confirmed, started))
            numbers = look(after / "run", self.mode, self._known)
            assert_nothing_lost(numbers, confirmed, started)
            if at % 10 == 0:
                with checkpointer_of(after / "run", save_mode=self.mode) as checkpointer:
                    _save(50, "after").run(checkpointer)
                assert look(after / "run", self.mode) == numbers | {50}
        shutil.rmtree(after)

    def cut_at(self, places, choices):
        """Cut the power before events by their number, with each of some choices."""
        for at in places:
            for choose in choices(at):
                self.cut(at, choose)


def few_choices(at):
    """The extremes, and one seeded choice."""
    return [Nothing(), Everything(), Chance(at)]


def many_choices(at):
    """Those, another extreme, and several more seeded choices."""
    return [*few_choices(at), NamesOnly(), *(Chance(1000 * at + seed) for seed in range(6))]


# Each save waited for, or the next one started as soon as the call returns.
modes_and_waits = pytest.mark.parametrize(
    ("mode", "waits"),
    [(mode, waits) for mode in SAVE_MODES for waits in (True, False) if waits or mode != "sync"],
    ids=lambda value: {True: "waiting", False: "going on"}.get(value, value),
)


class TestPowerCuts:
    """What was not flushed is lost, or not, as it comes."""

    @pytest.mark.sample(1)
    @modes_and_waits
    def test_before_any_operation(self, memory, mode, waits):
        """A seeded half, a fifth in the other modes: nothing, all, and some of it survives."""
        recorded = Recorded(memory, mode, ObservedStorage(), waits)
        assert len(recorded.events) >= sum(OPERATIONS.values())
        recorded.cut_at(some_of(len(recorded.events), mode), few_choices)

    @pytest.mark.slow
    @modes_and_waits
    def test_before_every_operation_in_many_ways(self, memory, mode, waits):
        """Any subset of names, any part of contents."""
        recorded = Recorded(memory, mode, ObservedStorage(), waits)
        recorded.cut_at(range(len(recorded.events) + 1), many_choices)

    @modes
    def test_the_folder_of_all_checkpoints_is_as_durable_as_what_is_in_it(self, memory, mode):
        """A run makes its folder, and folders above it; the first save makes them durable, too."""
        (memory / "disk").mkdir()
        (memory / "start").mkdir()
        storage = ObservedStorage()
        checkpointer = checkpointer_of(
            memory / "disk" / "new" / "run", save_mode=mode, storage=storage
        )
        STEPS[0].run(checkpointer)
        storage.mark("saved")
        checkpointer.close()
        disk = Disk(memory / "disk", memory / "start")
        disk.after_power_cut(storage.events, len(storage.events), Nothing(), memory / "after")
        assert look(memory / "after" / "new" / "run", mode) == {1}


class TestTheModel:
    """The power cut is one that would find a fault."""

    def test_all_that_survives_at_the_end_is_what_the_disk_holds(self, memory):
        """File by file, byte by byte."""
        recorded = Recorded(memory, "sync", ObservedStorage(), True)
        disk = Disk(memory / "disk", recorded.start)
        disk.after_power_cut(recorded.events, len(recorded.events), Everything(), memory / "end")
        trees = [
            {
                path.relative_to(memory / base): path.is_file() and path.read_bytes()
                for path in (memory / base).rglob("*")
                if path.name not in FURNITURE
            }
            for base in ("disk", "end")
        ]
        assert trees[0] == trees[1]
        assert len(trees[0]) > 8

    @pytest.mark.parametrize(
        ("operation", "name"),
        [
            ("flush_file", "model.ckpt"),
            ("flush_file", "mixed+pickled.ckpt"),
            ("flush_file", "c.txt"),
            ("flush_file", "MANIFEST.yaml"),
            ("flush_file", "CKPT.yaml"),
            ("flush_dir", "inner"),
            ("flush_dir", "table.ckpt"),
            ("flush_dir", ".staging"),
            ("flush_dir", "run"),
        ],
    )
    def test_a_flush_that_is_left_out_is_noticed(self, memory, operation, name):
        """Each kind of them."""
        recorded = Recorded(memory, "sync", ObservedStorage(), True)
        before = len(recorded.events)
        recorded.events[:] = [
            event
            for event in recorded.events
            if event.operation != operation or not event.path.name.startswith(name)
        ]
        assert len(recorded.events) < before
        with pytest.raises((AssertionError, ValueError, OSError)):
            for at, event in enumerate(recorded.events):
                if event.operation == "mark":
                    recorded.cut(at + 1, Nothing())

    def test_removing_before_the_new_one_is_durable_is_noticed(self, memory):
        """The order of the operations is what counts."""
        recorded = Recorded(memory, "sync", ObservedStorage(), True)
        events = recorded.events
        published = next(
            index
            for index, event in enumerate(events)
            if event.operation == "rename"
            and event.path.name.startswith(".staging")
            and recorded.progress(index)[1] == 3
        )
        removed = next(
            index
            for index, event in enumerate(events)
            if index > published and event.target and event.target.name.startswith(".removed")
        )
        flush = events[removed + 1]
        assert (flush.operation, flush.path.name) == ("flush_dir", "run")
        # The removal, flushed, then the new name.
        events[published:published] = [events.pop(removed), events.pop(removed)]
        with pytest.raises(AssertionError, match=r"lost|did not come|is none"):
            for at in range(published, published + 4):
                recorded.cut(at, Nothing())
