"""No moment loses anything: what happens between any two steps, in this process or another."""

from __future__ import annotations

import errno
import gc
import json
import linecache
import random
import resource
import sys
import threading
import weakref

import _two_ranks as distributed
import pytest
import torch
from _counts import count
from _releases import needs_torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io import threads
from lightning_sbckpt._io.background import Background
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout import publish
from lightning_sbckpt._layout.annotations import pin
from lightning_sbckpt._layout.lock import LOCK_NAME
from lightning_sbckpt._load import load
from lightning_sbckpt._save import late_copy
from lightning_sbckpt.errors import MetaError, SaveError
from lightning_sbckpt.meta import ckpt_recency

PACKAGE = "lightning_sbckpt"
both = distributed.both


def ends(work, seconds=30):
    """Do something in a thread of its own; return whether it ended, with an error or not."""

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    errors = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


class Interrupt:
    """Raises KeyboardInterrupt at a line of the package, as a signal handler may."""

    def __init__(self, at):
        self.left = at

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, _):
        if not frame.f_globals.get("__name__", "").startswith(PACKAGE):
            return None
        last = 0

        def line(frame, event, _):
            nonlocal last
            if event == "line" and frame.f_code.co_name != "__del__":
                back, last = frame.f_lineno < last, frame.f_lineno
                text = linecache.getline(frame.f_code.co_filename, last).lstrip()
                # Where a block of `with` is left, no signal is looked for until `__exit__` has run,
                # and where `try` stands, nothing runs at all (nor does an enclosing `with` guard it).
                self.left -= not ((back and text.startswith("with ")) or text.startswith("try:"))
                if self.left == 0:
                    self.left = -1
                    raise KeyboardInterrupt
            return line

        return line


class TestInterrupts:
    """An exception at any line of the main thread, as Ctrl+C brings it."""

    @staticmethod
    def life(root, mode, model, optimizer):
        checkpointer = Checkpointer(root, {"m": model, "o": optimizer}, save_mode=mode)
        yield checkpointer
        for number in range(3):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
            checkpointer.save_and_keep_only({"n": number}, min_keys=["n"])
        checkpointer.wait()
        checkpointer.close()

    @classmethod
    def interrupted(cls, root, mode, at):
        """Live until a line, and then as one does who catches the exception; return if it came."""
        model = torch.nn.Linear(400, 400)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        life = cls.life(root, mode, model, optimizer)
        checkpointer = next(life)
        interrupt = Interrupt(at)
        try:
            with interrupt:
                for _ in life:
                    pass
        except KeyboardInterrupt as error:
            caught = error  # Its traceback keeps every frame alive, as in Lightning.
            del error
        assert ends(checkpointer.wait), f"wait hangs after an interrupt at line {at} ({mode})"
        assert ends(lambda: checkpointer.save_checkpoint({"n": 9}, name="after"))
        assert ends(checkpointer.wait)
        names = {ckpt.path.name for ckpt in checkpointer.list_checkpoints()}
        assert "CKPT+after" in names, (mode, at)
        assert ends(checkpointer.close)
        assert not (root / LOCK_NAME).exists(), (mode, at)
        left = {path.name for path in root.iterdir() if not path.name.startswith("CKPT+")}
        for ckpt in Checkpointer(root, access="read").list_checkpoints():
            torch.load(ckpt.paramfiles["m"], weights_only=True)
        caught = None  # noqa: F841
        return interrupt.left <= 0, left

    @classmethod
    def campaign(cls, tmp_path, mode, seed, times):
        rng = random.Random(seed)
        came = 0
        for number in range(times):
            happened, _ = cls.interrupted(tmp_path / str(number), mode, rng.randrange(1, 2200))
            came += happened
        count("exceptions raised at random lines", came)
        count("of those, after which something hung, tore or stayed locked", 0)
        return came

    @pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
    def test_interrupt_at_random_lines_leaves_nothing_that_hangs(self, tmp_path, mode):
        """Everything returns or raises afterwards, the next save is whole, and no lock stays."""
        assert self.campaign(tmp_path, mode, 1, 12) >= 6

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
    @pytest.mark.parametrize("seed", range(10))
    def test_interrupt_at_thousands_of_lines_leaves_nothing_that_hangs(self, tmp_path, mode, seed):
        """The same, as often as it takes to meet every line."""
        assert self.campaign(tmp_path, mode, 100 + seed, 120) >= 60

    @pytest.mark.parametrize("begun", [False, True])
    def test_interrupt_while_the_thread_is_started_loses_no_job(self, monkeypatch, begun):
        """Whoever waits does what the thread was to do, whether it was started or not."""
        start = threading.Thread.start

        def interrupted(thread):
            if begun:
                start(thread)
            raise KeyboardInterrupt

        background, done = Background("sbckpt-test"), []
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.submit(lambda: done.append(1))
        monkeypatch.setattr(threading.Thread, "start", start)
        assert ends(background.wait)
        assert done == [1]
        background.submit(lambda: done.append(2))
        assert ends(background.wait)
        assert done == [1, 2] and not background.busy

    def test_lock_collected_while_another_thread_logs_does_not_deadlock(self, tmp_path):
        """What holds the guard of the locks never waits for the log."""
        import logging

        handler = logging.getLogger("lightning_sbckpt")
        checkpointers = [Checkpointer(tmp_path / str(i)) for i in range(40)]
        for checkpointer in checkpointers:
            checkpointer.claim()

        def drop():
            while checkpointers:
                checkpointers.pop()
                gc.collect(0)

        def claim():
            for i in range(40):
                Checkpointer(tmp_path / f"other{i}").claim()
                handler.debug("claimed")

        one = threading.Thread(target=drop, daemon=True)
        one.start()
        assert ends(claim)
        one.join(30)
        assert not one.is_alive()


class TestOverlap:
    """A copy that goes on while training does."""

    pytestmark = needs_torch("2.6", "torch.serialization.skip_data")

    @pytest.mark.parametrize("back", [False, True], ids=["freed", "freed and made anew"])
    def test_storage_resized_under_the_copy_is_seen(self, tmp_path, monkeypatch, back):
        """As offloading parameters does: the checkpoint is dropped and made anew."""
        model = torch.nn.Linear(3000, 1500)
        with torch.no_grad():
            model.weight.fill_(1)
        checkpointer = Checkpointer(tmp_path, {"m": model}, save_mode="overlap")
        copy, arrived, go_on = late_copy._copy_if_there, threading.Event(), threading.Event()

        def slow(*arguments):
            arrived.set()
            assert go_on.wait(60)
            return copy(*arguments)

        monkeypatch.setattr(late_copy, "_copy_if_there", slow)
        checkpointer.save_checkpoint(name="a")
        assert arrived.wait(60)
        storage = model.weight.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        if back:
            storage.resize_(size)
            with torch.no_grad():
                model.weight.fill_(2)
        go_on.set()
        if not back:
            checkpointer._saver._hidden.late_copy.wait()
            storage.resize_(size)
            with torch.no_grad():
                model.weight.fill_(2)
        checkpointer.before_update()
        checkpointer.close()
        (saved,) = checkpointer.list_checkpoints()
        assert (torch.load(saved.paramfiles["m"], weights_only=True)["weight"] == 2).all()

    def test_storage_that_was_away_during_the_copy_is_seen_though_no_tensor_was_written_to(
        self, tmp_path, monkeypatch
    ):
        """Its bytes come back as they were, but not into the copy."""
        model = torch.nn.Linear(3000, 1500)
        storage = model.weight.untyped_storage()
        before, saved = model.weight.detach().clone(), storage.clone()
        checkpointer = Checkpointer(tmp_path, {"m": model}, save_mode="overlap")
        copy, arrived, go_on = late_copy._copy_if_there, threading.Event(), threading.Event()

        def slow(*arguments):
            arrived.set()
            assert go_on.wait(60)
            return copy(*arguments)

        monkeypatch.setattr(late_copy, "_copy_if_there", slow)
        checkpointer.save_checkpoint(name="a")
        assert arrived.wait(60)
        storage.resize_(0)
        go_on.set()
        checkpointer._saver._hidden.late_copy.wait()
        storage.resize_(saved.nbytes())
        storage.copy_(saved)
        checkpointer.before_update()
        checkpointer.close()
        (found,) = checkpointer.list_checkpoints()
        state = torch.load(found.paramfiles["m"], weights_only=True)
        assert torch.equal(state["weight"], before)

    def test_memory_that_is_not_mapped_is_an_error_and_not_a_crash(self):
        """The kernel says so, where it can copy for us."""
        if late_copy._read_memory is None:
            pytest.skip("this system has no process_vm_readv")
        target = torch.zeros(4096, dtype=torch.uint8)
        assert not late_copy._copy_if_there(target.data_ptr(), 4096, 4096)
        source = torch.ones(4096, dtype=torch.uint8)
        assert late_copy._copy_if_there(target.data_ptr(), source.data_ptr(), 4096)
        assert (target == 1).all()

    def test_checkpointer_is_freed_while_its_optimizer_lives(self, tmp_path):
        """With its memory, its lock, and what the optimizer calls at each step."""
        model = torch.nn.Linear(400, 400)
        optimizer = torch.optim.Adam(model.parameters())
        model.weight.grad = torch.ones_like(model.weight)
        refs = []
        for closed in (True, False):
            checkpointer = Checkpointer(tmp_path, {"m": model, "o": optimizer}, save_mode="overlap")
            checkpointer.save_checkpoint()
            optimizer.step()
            checkpointer.wait()
            if closed:
                checkpointer.close()
                assert not optimizer._optimizer_step_pre_hooks
            refs.append(weakref.ref(checkpointer))
            del checkpointer
        gc.collect()
        assert [ref() for ref in refs] == [None, None]
        assert not optimizer._optimizer_step_pre_hooks
        assert not (tmp_path / LOCK_NAME).exists()
        optimizer.step()


class TestRetention:
    """What stays, when some of it can't be recovered from, or is pinned meanwhile."""

    @pytest.fixture
    def saved(self, tmp_path, scale):
        checkpointer = Checkpointer(tmp_path, {"m": scale(1.0)})
        for number in range(6):
            checkpointer.save_checkpoint({"loss": [3, 0, 5, 4, 2, 6][number]}, name=str(number))
        return checkpointer

    @staticmethod
    def cut_off(tmp_path, name):
        path = tmp_path / f"CKPT+{name}" / "m.ckpt"
        path.write_bytes(path.read_bytes()[:100])

    def test_damaged_checkpoints_stand_for_nothing_that_is_kept(self, tmp_path, saved):
        """The best and the newest are those that can be recovered from."""
        self.cut_off(tmp_path, "1")
        self.cut_off(tmp_path, "5")
        decisions = saved.delete_checkpoints(num_to_keep=1, min_keys=["loss"])
        kept = {each.checkpoint.path.name for each in decisions if each.keep}
        assert kept == {"CKPT+1", "CKPT+4", "CKPT+5"}
        assert "damaged, and left to you: m.ckpt has 100 bytes" in str(decisions[0])
        assert saved.recover_if_possible(min_key="loss").path.name == "CKPT+4"

    def test_damage_that_recovery_has_seen_counts(self, tmp_path, saved):
        """Other bytes of the same length are found by reading, which retention does not do."""
        path = tmp_path / "CKPT+5" / "m.ckpt"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert saved.recover_if_possible().path.name == "CKPT+4"
        saved.delete_checkpoints(num_to_keep=1)
        assert {ckpt.path.name for ckpt in saved.list_checkpoints()} == {"CKPT+4", "CKPT+5"}

    @pytest.mark.sample(10)
    @pytest.mark.parametrize("seed", range(20))
    def test_one_whole_checkpoint_always_stays(self, tmp_path, saved, seed):
        """Whatever is damaged, and whatever the rules."""
        rng = random.Random(seed)
        for name in rng.sample("012345", rng.randrange(1, 6)):
            self.cut_off(tmp_path, name)
        keys = rng.choice([[], ["loss"], ["nothing"]])
        saved.delete_checkpoints(num_to_keep=rng.randrange(1, 3), min_keys=keys)
        assert saved.recover_if_possible() is not None

    def test_checkpoint_pinned_while_retention_is_at_work_stays(self, tmp_path, saved, monkeypatch):
        """A pin that has returned holds, whatever was decided before."""
        remove = saved._remover.remove

        def slow(folder):
            if folder.name == "CKPT+4":
                # As another process does.
                pin(tmp_path / "CKPT+0", "in the paper", storage=LocalStorage())
            remove(folder)

        monkeypatch.setattr(saved._remover, "remove", slow)
        decisions = saved.delete_checkpoints(num_to_keep=1)
        assert "keep   CKPT+0: pinned meanwhile: in the paper" in map(str, decisions)
        names = {ckpt.path.name for ckpt in saved.list_checkpoints()}
        assert names == {"CKPT+0", "CKPT+5"}
        removed = [
            json.loads(line)["name"]
            for line in (tmp_path / "HISTORY.jsonl").read_text().splitlines()
            if '"removed"' in line
        ]
        assert "CKPT+0" not in removed


class TestTimes:
    """An order that no meta can poison."""

    @pytest.mark.parametrize(
        "unixtime", [1.8e12, 2.5e11, 1.4e11, 253402300799.0, 1e300, 10**30, -1e12]
    )
    def test_strange_time_in_the_folder_makes_no_later_save_vanish(self, tmp_path, scale, unixtime):
        """In milliseconds, of the year 6325, of the last day there is: later saves are newer."""
        model = scale(0.0)
        checkpointer = Checkpointer(tmp_path, {"m": model})
        strange = checkpointer.save_checkpoint(name="strange")
        meta = strange.path / "CKPT.yaml"
        meta.write_text(f"unixtime: {unixtime!r}\nend-of-epoch: true\n")
        (strange.path / "MANIFEST.yaml").unlink()
        checkpointer = Checkpointer(tmp_path, {"m": model})
        for value in (1.0, 2.0, 3.0):
            model.value = value
            checkpointer.save_and_keep_only()
            found = checkpointer.find_checkpoint()
            assert torch.load(found.paramfiles["m"], weights_only=True)["param"] == value
        times = [ckpt_recency(ckpt) for ckpt in checkpointer.list_checkpoints()]
        assert len(set(times)) == len(times)

    @pytest.mark.parametrize("unixtime", [1.8e12, 1e300, 10**30])
    def test_time_that_none_can_follow_is_refused(self, tmp_path, scale, unixtime):
        """Before anything is written."""
        checkpointer = Checkpointer(tmp_path, {"m": scale(0.0)})
        with pytest.raises(MetaError, match="before the year 10000"):
            checkpointer.save_checkpoint({"unixtime": unixtime})
        assert checkpointer.list_checkpoints() == []


class TestReaders:
    """Who reads beside a run that saves and prunes."""

    def test_reader_never_gets_an_older_one_as_the_newest(self, tmp_path, scale, monkeypatch):
        """If the newest went while it was looked at, a newer one was there before."""
        model = scale(1.0)
        writer = Checkpointer(tmp_path, {"m": model})
        writer.save_and_keep_only({"loss": 0.0}, name="best", min_keys=["loss"])
        writer.save_and_keep_only({"loss": 1.0}, name="second", min_keys=["loss"])
        reader = Checkpointer(tmp_path, {"m": scale(0.0)}, access="read")
        look, moved = load.find_damage, []

        def meanwhile(folder, *arguments, **options):
            if folder.name == "CKPT+second" and not moved:
                moved.append(True)
                writer.save_and_keep_only({"loss": 2.0}, name="third", min_keys=["loss"])
            return look(folder, *arguments, **options)

        monkeypatch.setattr(load, "find_damage", meanwhile)
        assert reader.recover_if_possible().path.name == "CKPT+third"

    def test_reader_comes_to_an_end_where_checkpoints_go_faster_than_it_reads(
        self, tmp_path, scale, monkeypatch
    ):
        """After some looks it takes the best that stays."""
        writer = Checkpointer(tmp_path, {"m": scale(1.0)})
        writer.save_and_keep_only({"loss": 0.0}, name="best", min_keys=["loss"])
        writer.save_and_keep_only({"loss": 1.0}, min_keys=["loss"])
        reader = Checkpointer(tmp_path, {"m": scale(0.0)}, access="read")
        look = load.find_damage

        def meanwhile(folder, *arguments, **options):
            if folder.name != "CKPT+best":
                writer.save_and_keep_only({"loss": 2.0}, min_keys=["loss"])
            return look(folder, *arguments, **options)

        monkeypatch.setattr(load, "find_damage", meanwhile)
        assert reader.recover_if_possible().path.name == "CKPT+best"


class TestThreads:
    """Where the system starts no more threads."""

    @pytest.mark.parametrize("allowed", [0, 1])
    def test_recovery_works_without_threads(self, tmp_path, monkeypatch, allowed):
        """As saves do: in a container that limits processes, say."""
        model = torch.nn.Linear(1500, 1500)
        checkpointer = Checkpointer(tmp_path, {"m": model})
        checkpointer.save_checkpoint()
        before = model.weight.detach().clone()
        torch.nn.init.zeros_(model.weight)
        start, left = threading.Thread.start, [allowed]

        def limited(thread):
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
            start(thread)

        monkeypatch.setattr(threads, "useful_threads", lambda: 4)
        monkeypatch.setattr(threading.Thread, "start", limited)
        assert checkpointer.recover_if_possible() is not None
        assert torch.equal(model.weight, before)

    def test_work_is_done_once_whatever_fails(self, monkeypatch):
        """Each item by one thread, and the first failure is raised."""
        monkeypatch.setattr(threads, "useful_threads", lambda: 4)
        seen = []
        threads.run_all(seen.append, range(100), most=4)
        assert sorted(seen) == list(range(100))
        with pytest.raises(ZeroDivisionError):
            threads.run_all(lambda n: 1 / (n - 5), range(10), most=4)


class TestSaveErrors:
    """What a save that can't be made does, by the policy."""

    @pytest.fixture
    def broken(self, monkeypatch):
        """A function that makes the folder fail to be listed, as on a network filesystem."""

        def break_it(number):
            def refuse(*_):
                raise OSError(number, "Stale file handle")

            monkeypatch.setattr(publish, "folder_names", refuse)
            monkeypatch.setattr("lightning_sbckpt._catalog.catalog.folder_names", refuse)

        return break_it

    @pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
    @pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTDIR, errno.EACCES])
    def test_folder_that_cannot_be_listed_is_a_failed_save(
        self, tmp_path, scale, broken, caplog, mode, number
    ):
        """An error of ours with the default, a line in the log and no more with `warn`."""
        raising = Checkpointer(tmp_path / "a", {"m": scale(1.0)}, save_mode=mode)
        warning = Checkpointer(
            tmp_path / "b", {"m": scale(1.0)}, save_mode=mode, on_save_error="warn"
        )
        broken(number)
        with pytest.raises(SaveError, match="can't be listed: Stale file handle"):
            raising.save_checkpoint()
        assert warning.save_checkpoint() is None
        warning.wait()
        assert "Training goes on, since on_save_error is 'warn'" in caplog.text

    def test_meta_and_hooks_that_fail_are_said_and_training_goes_on(self, tmp_path, caplog):
        """With `warn`; arguments that are wrong raise all the same."""
        checkpointer = Checkpointer(tmp_path, {"m": torch.nn.Linear(1, 1)}, on_save_error="warn")
        assert checkpointer.save_checkpoint({"loss": object()}) is None
        assert "Training goes on" in caplog.text
        checkpointer.recoverables["n"] = object()
        assert checkpointer.save_checkpoint() is None
        del checkpointer.recoverables["n"]
        with pytest.raises(ValueError, match="name"):
            checkpointer.save_checkpoint(name="../a")

    def test_lock_that_cannot_be_taken_is_said_with_warn(self, tmp_path, scale, caplog):
        """The folder may be read-only for a while."""
        checkpointer = Checkpointer(tmp_path, {"m": scale(1.0)}, on_save_error="warn")
        (tmp_path / LOCK_NAME).mkdir()
        assert checkpointer.save_checkpoint() is None
        assert "can't be locked for saving" in caplog.text
        (tmp_path / LOCK_NAME).rmdir()
        assert checkpointer.save_checkpoint() is not None

    def test_memory_that_is_missing_fails_the_save_alone(self, tmp_path):
        """In the copy of an async save; the next one works."""
        model = torch.nn.Linear(2000, 2000)
        checkpointer = Checkpointer(tmp_path, {"m": model}, save_mode="async")
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, hard))
        try:
            with pytest.raises((SaveError, MemoryError)):
                checkpointer.save_checkpoint()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        checkpointer.save_checkpoint()
        checkpointer.close()
        assert len(checkpointer.list_checkpoints()) == 1


def wrong_on_one_rank(folder, rank, mode, wrong):
    """Save with an argument that is wrong on one rank, and then as it should be."""
    model = torch.nn.Linear(2, 2)
    storage = None if rank == 0 else distributed.WritesNothing()
    checkpointer = Checkpointer(folder, {"m": model}, save_mode=mode, storage=storage)
    failed = []
    for bad in (True, False):
        meta = {"loss": object()} if bad and rank == wrong else {"loss": 1.0}
        try:
            checkpointer.save_checkpoint(meta, name="bad" if bad else "good")
            checkpointer.wait()
        except Exception as error:
            failed.append((type(error).__name__, "YAML" in str(error)))
    return failed, sorted(ckpt.path.name for ckpt in checkpointer.list_checkpoints())


@pytest.mark.sample(2)
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("wrong", [0, 1])
def test_argument_wrong_on_one_rank_reaches_all_and_leaves_them_in_step(both, mode, wrong):
    """All ranks raise the same error, and save together the next time."""
    from functools import partial

    answers = both(partial(wrong_on_one_rank, mode=mode, wrong=wrong))
    assert answers == ((([("MetaError", True)]), ["CKPT+good"]),) * 2
