"""Two processes in one folder: the second is told who the first one is."""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from _in_flight import HeldUp
from _processes import context

from lightning_sbckpt import Checkpointer, EpochCounter
from lightning_sbckpt._layout import lock as lock_module
from lightning_sbckpt._layout import owner
from lightning_sbckpt._layout.lock import LOCK_NAME, FolderLock
from lightning_sbckpt.errors import FolderInUseError, SaveError


def hold(folder, pipe, fork=False, shared=False, lockf=None):
    """In a child: take the folder, say so, and stay; with `fork`, leave a child of its own, too."""
    if lockf is not None:
        lock_module.fcntl.lockf = lockf
    lock = FolderLock(folder, shared=shared)
    try:
        lock.acquire()
    except FolderInUseError as error:
        pipe.send(str(error))
        return
    worker = 0
    if fork:
        worker = os.fork()
        if worker == 0:
            time.sleep(600)
    pipe.send(("held", os.getpid(), worker))
    if pipe.recv() == "release":
        lock.release()
        pipe.send("released")
        pipe.recv()


def check_that_a_forked_child_is_kept_out(folder):
    """Take the folder, and let a forked child try."""
    lock = FolderLock(folder)
    lock.acquire()
    before = (folder / LOCK_NAME).stat().st_ino
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock.release()
            lock_module._leave()
            FolderLock(folder).acquire()
            os.write(write, b"held")
        except FolderInUseError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        assert f"is in use by process {os.getpid()} (" in stream.read().decode()
    assert (folder / LOCK_NAME).stat().st_ino == before
    lock.release()


def no_locks(descriptor, operation, *rest):
    """As on a filesystem that has none."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@contextmanager
def no_garbage_collector():
    """Inside, what is in a cycle stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def start():
    """A function that starts a child which takes the folder; all are ended at the end."""
    children = []

    def start_child(folder, **options):
        ours, theirs = context.Pipe()
        child = context.Process(target=hold, args=(folder, theirs), kwargs=options)
        child.start()
        theirs.close()
        # With the pipe, whose end the child would take for its own.
        children.append((child, ours))
        assert ours.poll(60)
        return child, ours, ours.recv()

    yield start_child
    for child, _ in children:
        child.kill()
        child.join()


@pytest.fixture
def record():
    """A function that writes a lock file of this process, with changes, held by nobody."""

    def write(folder, **changes):
        fields = {**owner.describe_me(), **changes}
        (folder / LOCK_NAME).write_text(yaml.safe_dump(fields))

    return write


@pytest.fixture(autouse=True)
def nothing_held():
    """No test leaves a folder taken; others may have left some."""
    before = set(lock_module._claims)
    yield
    assert set(lock_module._claims) <= before


class TestTwoProcesses:
    """Real ones, on a filesystem with locks."""

    def test_the_second_is_told_who_has_the_folder_since_when_and_what_to_do(self, tmp_path, start):
        """And the first goes on, none the wiser."""
        _, _, (_, pid, _) = start(tmp_path)
        with pytest.raises(FolderInUseError) as caught:
            FolderLock(tmp_path).acquire()
        message = str(caught.value)
        assert f"{tmp_path} is in use by process {pid} (" in message
        assert f"on host {socket.gethostname()}, which began to write there at 20" in message
        assert "another dirpath, stop the other job, or open the folder for reading" in message
        assert "access='read'" in message
        assert isinstance(caught.value, SaveError)

    def test_it_works_the_other_way_round_too(self, tmp_path, start):
        """A child is refused while this process holds it, and not when it has let go."""
        lock = FolderLock(tmp_path)
        lock.acquire()
        _, _, answer = start(tmp_path)
        assert f"is in use by process {os.getpid()} (" in answer
        lock.release()
        _, _, answer = start(tmp_path)
        assert answer[0] == "held"

    @pytest.mark.parametrize("fork", [False, True], ids=["alone", "a forked worker lives on"])
    def test_one_killed_makes_room_at_once(self, tmp_path, start, caplog, fork):
        """The kernel lets go for it; what it forked never had the lock."""
        caplog.set_level(logging.INFO)
        child, _, (_, pid, worker) = start(tmp_path, fork=fork)
        child.kill()
        child.join()
        try:
            lock = FolderLock(tmp_path)
            lock.acquire()
            assert yaml.safe_load((tmp_path / LOCK_NAME).read_bytes())["pid"] == os.getpid()
            (line,) = [r.getMessage() for r in caplog.records]
            assert re.search(rf"took over .* from process {pid} .*, which has ended", line)
            if fork:
                os.kill(worker, 0)
            lock.release()
        finally:
            if fork:
                os.kill(worker, signal.SIGKILL)

    @pytest.mark.long
    def test_one_that_ends_in_good_order_leaves_no_file(self, tmp_path, start, caplog):
        """Neither by `release` nor at the end of the process."""
        caplog.set_level(logging.INFO)
        _, pipe, _ = start(tmp_path)
        pipe.send("release")
        assert pipe.recv() == "released"
        assert os.listdir(tmp_path) == []
        script = (
            "import sys; from pathlib import Path; from lightning_sbckpt._layout.lock import FolderLock;"
            "lock = FolderLock(Path(sys.argv[1])); lock.acquire();"
            "assert Path(sys.argv[1], '.lock').exists()"
        )
        done = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script, str(tmp_path)])
        assert done == 0
        assert os.listdir(tmp_path) == []
        assert caplog.records == []

    def test_a_forked_child_may_not_write_where_its_parent_does(self, tmp_path):
        """It has no part in the lock; its end and its release take nothing from the parent."""
        check_that_a_forked_child_is_kept_out(tmp_path)

    def test_shared_ones_let_each_other_in_and_nobody_who_wants_it_alone(
        self, tmp_path, start, caplog
    ):
        """Nor may one of them turn it into one that is not, while the others are there."""
        caplog.set_level(logging.INFO)
        child, _, _ = start(tmp_path, shared=True)
        ours = FolderLock(tmp_path, shared=True)
        ours.acquire()
        for _ in range(2):
            with pytest.raises(FolderInUseError, match="is in use by another process"):
                FolderLock(tmp_path).acquire()
        ours.acquire()
        ours.release()
        assert (tmp_path / LOCK_NAME).exists()
        assert caplog.records == []  # Nobody took anything over.
        child.kill()
        child.join()
        alone = FolderLock(tmp_path)
        alone.acquire()
        _, _, answer = start(tmp_path, shared=True)
        assert f"is in use by process {os.getpid()} (" in answer
        alone.release()


class TestOneProcess:
    """Locks of one process share what it holds."""

    def test_the_last_one_released_gives_it_up(self, tmp_path, start):
        """Each counts once, however often it is acquired or released."""
        first, second = FolderLock(tmp_path), FolderLock(tmp_path)
        for lock in (first, first, second):
            lock.acquire()
        for _ in range(2):
            first.release()
        _, _, answer = start(tmp_path)
        assert "is in use" in answer
        second.release()
        _, _, answer = start(tmp_path)
        assert answer[0] == "held"

    def test_one_that_nobody_has_any_more_gives_it_up(self, tmp_path, start):
        """But not what another one of this process still holds."""
        forgotten, kept = FolderLock(tmp_path), FolderLock(tmp_path)
        for lock in (forgotten, kept):
            lock.acquire()
        del forgotten, lock
        gc.collect()
        _, _, answer = start(tmp_path)
        assert "is in use" in answer
        kept.release()
        assert not (tmp_path / LOCK_NAME).exists()

    def test_one_that_is_forgotten_while_another_takes_the_folder_does_not_lose_it(
        self, tmp_path, start, monkeypatch
    ):
        """The garbage collector may come at any moment."""
        locks = [FolderLock(tmp_path)]
        locks[0].acquire()
        taking = lock_module._Claim.take

        def take(claim, **options):
            taking(claim, **options)
            locks.clear()
            gc.collect()

        monkeypatch.setattr(lock_module._Claim, "take", take)
        kept = FolderLock(tmp_path)
        kept.acquire()
        assert locks == []
        _, _, answer = start(tmp_path)
        assert "is in use" in answer
        kept.release()
        assert not (tmp_path / LOCK_NAME).exists()

    def test_many_checkpointers_one_after_the_other_keep_no_file_open(self, tmp_path):
        """A search over a thousand settings opens a thousand folders, and closes none by name."""
        with no_garbage_collector():
            for number in range(20):
                Checkpointer(tmp_path / str(number), {"epochs": EpochCounter(3)}).save_checkpoint()
            assert list(tmp_path.glob(f"*/{LOCK_NAME}")) == []
            fds = os.listdir("/proc/self/fd")
        opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in fds]
        assert not [path for path in opened if path.startswith(str(tmp_path))]

    @pytest.mark.parametrize("mode", ["async", "overlap"])
    def test_the_memory_for_copies_goes_with_the_checkpointer(self, tmp_path, mode):
        """It is as large as the state: nobody wants it to wait for the garbage collector."""
        with no_garbage_collector():
            model = torch.nn.Linear(300, 300)
            checkpointer = Checkpointer(tmp_path, {"model": model}, save_mode=mode)
            checkpointer.save_checkpoint()
            checkpointer.wait()
            arena = weakref.ref(checkpointer._saver._state.arena)
            assert arena().capacity
            del checkpointer
            assert arena() is None

    def test_a_save_in_flight_keeps_the_folder(self, tmp_path):
        """Also if nobody has its `Checkpointer` any more."""
        disk = HeldUp()
        checkpointer = Checkpointer(
            tmp_path, {"epochs": EpochCounter(3)}, save_mode="async", storage=disk
        )
        checkpointer.save_checkpoint(name="a")
        assert disk.arrived.wait(20)
        gone = weakref.ref(checkpointer)
        del checkpointer
        gc.collect()
        assert gone() is None
        assert (tmp_path / LOCK_NAME).exists()
        disk.go_on.set()
        end = time.monotonic() + 20
        while (tmp_path / LOCK_NAME).exists() and time.monotonic() < end:
            gc.collect()
            time.sleep(0.02)
        assert not (tmp_path / LOCK_NAME).exists()
        assert (tmp_path / "CKPT+a" / "CKPT.yaml").exists()

    def test_what_one_has_alone_another_cannot_make_shared(self, tmp_path, start):
        """Both are of this process, so nobody is kept out, and no stranger let in."""
        alone, shared = FolderLock(tmp_path), FolderLock(tmp_path, shared=True)
        for lock in (alone, shared):
            lock.acquire()
        _, _, answer = start(tmp_path, shared=True)
        assert "is in use" in answer
        for lock in (alone, shared):
            lock.release()

    def test_an_owner_that_ends_between_opening_and_locking_is_noticed(
        self, tmp_path, start, monkeypatch
    ):
        """It takes its file along, and a lock on that would keep nobody out."""
        real = lock_module.fcntl.lockf

        def lockf(descriptor, operation):
            monkeypatch.setattr(lock_module.fcntl, "lockf", real)
            (tmp_path / LOCK_NAME).unlink()
            real(descriptor, operation)

        monkeypatch.setattr(lock_module.fcntl, "lockf", lockf)
        lock = FolderLock(tmp_path)
        lock.acquire()
        _, _, answer = start(tmp_path)
        assert "is in use" in answer
        lock.release()

    def test_a_folder_is_one_by_whatever_path(self, tmp_path):
        """Links, dots, and a folder that was moved meanwhile."""
        run = tmp_path / "run"
        before = len(lock_module._claims)
        first = FolderLock(run)
        first.acquire()
        (tmp_path / "link").symlink_to(run)
        locks = [FolderLock(tmp_path / "link"), FolderLock(run / ".." / "run")]
        run.rename(tmp_path / "moved")
        locks.append(FolderLock(tmp_path / "moved"))
        locks[0]._root = locks[1]._root = tmp_path / "moved" / ".." / "moved"
        for lock in locks:
            lock.acquire()
        assert len(lock_module._claims) == before + 1
        for lock in (first, *locks):
            lock.release()
        assert os.listdir(tmp_path / "moved") == []

    def test_a_copy_of_the_folder_does_not_lose_it_for_longer_than_till_the_next_save(
        self, tmp_path, start
    ):
        """Closing any descriptor of the file drops a POSIX lock; each save takes it again."""
        run = tmp_path / "run"
        lock = FolderLock(run)
        lock.acquire()
        shutil.copytree(run, tmp_path / "copy")
        lock.acquire()
        _, _, answer = start(run)
        assert "is in use" in answer
        # The copy is another folder, and its lock file nobody's.
        copy = FolderLock(tmp_path / "copy")
        copy.acquire()
        copy.release()
        lock.release()

    def test_who_lost_the_folder_meanwhile_is_told_at_the_next_save(self, tmp_path, start):
        """Rather than both going on."""
        run = tmp_path / "run"
        lock = FolderLock(run)
        lock.acquire()
        (run / LOCK_NAME).read_bytes()
        _, _, (_, pid, _) = start(run)
        with pytest.raises(FolderInUseError, match=f"is in use by process {pid} "):
            lock.acquire()
        assert yaml.safe_load((run / LOCK_NAME).read_bytes())["pid"] == pid
        lock.release()
        assert (run / LOCK_NAME).exists()

    @pytest.mark.parametrize("what", ["the folder", "the lock file"])
    def test_what_is_deleted_is_made_and_taken_again(self, tmp_path, start, what):
        """As after `rm -r run` while training."""
        run = tmp_path / "runs" / "run"
        lock = FolderLock(run)
        lock.acquire()
        shutil.rmtree(run.parent) if what == "the folder" else (run / LOCK_NAME).unlink()
        lock.acquire()
        _, _, answer = start(run)
        assert f"is in use by process {os.getpid()} (" in answer
        lock.release()
        assert os.listdir(run) == []

    def test_threads_may_take_it_together(self, tmp_path):
        """The writer in the background and the training loop, say."""
        failures = []

        def work():
            lock = FolderLock(tmp_path)
            try:
                for _ in range(50):
                    lock.acquire()
                    lock.acquire()
                    lock.release()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert os.listdir(tmp_path) == []


class TestWhatStandsInTheFile:
    """Where the kernel holds locks, nothing in the file can keep anybody out, or harm."""

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x00\xff" * 5000,
            b"- a list",
            b"pid: !!python/object/apply:os.abort []",
            b"pid: [1, {2: 3}]\nhost: |\n  two\n  lines\n",
            b"a: &a [x]\nb: [*a, *a]\npid: yes",
        ],
    )
    def test_garbage_is_written_over(self, tmp_path, content, caplog):
        """With one line at most."""
        caplog.set_level(logging.INFO)
        (tmp_path / LOCK_NAME).write_bytes(content)
        lock = FolderLock(tmp_path)
        lock.acquire()
        assert yaml.safe_load((tmp_path / LOCK_NAME).read_bytes())["pid"] == os.getpid()
        assert len(caplog.records) == bool(content)
        assert all("\n" not in r.getMessage() for r in caplog.records)
        lock.release()

    def test_a_record_about_to_be_written_is_waited_for(self, tmp_path, monkeypatch):
        """The owner has the lock a moment before it has said who it is."""
        file = tmp_path / LOCK_NAME
        file.touch()
        pauses = []

        def sleep(seconds):
            pauses.append(seconds)
            if len(pauses) == 3:
                file.write_text("pid: 5\nhost: here\n")

        monkeypatch.setattr(owner.time, "sleep", sleep)
        with file.open("rb") as stream:
            assert owner.read_record(stream.fileno())["pid"] == 5
        assert len(pauses) == 3

    def test_it_says_who_and_holds_no_arguments(self, tmp_path, monkeypatch):
        """Those may hold what is secret."""
        monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--api-key", "secret"])
        lock = FolderLock(tmp_path)
        lock.acquire()
        text = (tmp_path / LOCK_NAME).read_text()
        assert "secret" not in text and "/home" not in text
        assert {"pid", "host", "since"} <= set(yaml.safe_load(text))
        assert yaml.safe_load(text)["program"] == "train.py"
        lock.acquire()
        lock.release()

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            ("link", os.strerror(errno.ELOOP)),
            ("pipe", "it is no regular file"),
            ("folder", os.strerror(errno.EISDIR)),
        ],
    )
    def test_what_is_no_file_is_refused_and_not_touched(self, tmp_path, kind, reason):
        """A link could lead anywhere, and a pipe be waited on for ever."""
        outside, run = tmp_path / "outside", tmp_path / "run"
        run.mkdir()
        outside.write_text("mine")
        make = {
            "link": lambda path: path.symlink_to(outside),
            "pipe": os.mkfifo,
            "folder": os.mkdir,
        }
        make[kind](run / LOCK_NAME)
        with pytest.raises(SaveError, match=rf"can't be locked for saving: {reason} .*\.lock\)"):
            FolderLock(run).acquire()
        assert outside.read_text() == "mine"

    @pytest.mark.parametrize("shared", [False, True])
    def test_another_name_of_the_file_is_left_as_it_is(self, tmp_path, shared):
        """A copy of the folder made of hard links (`cp -al`), or somebody who means it."""
        (tmp_path / "thesis.txt").write_text("years of work\n")
        root = tmp_path / "run"
        root.mkdir()
        (root / LOCK_NAME).hardlink_to(tmp_path / "thesis.txt")
        lock = FolderLock(root, shared=shared)
        lock.acquire()
        lock.release()
        assert (tmp_path / "thesis.txt").read_text() == "years of work\n"

    def test_copying_the_folder_by_hard_links_does_not_take_the_lock_away(self, tmp_path, start):
        """Neither from who has it, nor does it keep the copy from being used later."""
        root, copy = tmp_path / "run", tmp_path / "copy"
        lock = FolderLock(root)
        lock.acquire()
        copy.mkdir()
        (copy / LOCK_NAME).hardlink_to(root / LOCK_NAME)
        lock.acquire()
        assert "is in use by process" in start(root)[2]
        lock.release()
        in_copy = FolderLock(copy)
        in_copy.acquire()
        assert (copy / LOCK_NAME).stat().st_nlink == 1
        in_copy.release()

    def test_a_read_only_folder_is_said_to_be_one(self, tmp_path, monkeypatch):
        """With the way to read it all the same."""
        real = os.open

        def read_only(path, flags, *rest, **more):
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", read_only)
        with pytest.raises(SaveError, match=r"Read-only file system.*access='read'") as caught:
            FolderLock(tmp_path).acquire()
        assert not isinstance(caught.value, FolderInUseError)


class TestNoLocks:
    """On a filesystem without locks the record decides."""

    @pytest.fixture(autouse=True)
    def no_locks_here(self, monkeypatch):
        """As if the filesystem had none."""
        monkeypatch.setattr(lock_module.fcntl, "lockf", no_locks)

    def taken(self, folder):
        """Take the folder, make sure of it, and return the lock."""
        lock = FolderLock(folder)
        lock.acquire()
        lock.acquire()
        assert yaml.safe_load((folder / LOCK_NAME).read_bytes())["pid"] == os.getpid()
        return lock

    def test_a_living_one_keeps_others_out_and_leaves_no_file(self, tmp_path, start, caplog):
        """Both ways, with the same message."""
        child, pipe, (_, pid, _) = start(tmp_path, lockf=no_locks)
        with pytest.raises(FolderInUseError, match=f"is in use by process {pid} "):
            FolderLock(tmp_path).acquire()
        pipe.send("release")
        assert pipe.recv() == "released"
        assert os.listdir(tmp_path) == []
        lock = self.taken(tmp_path)
        _, _, answer = start(tmp_path, lockf=no_locks)
        assert f"is in use by process {os.getpid()} " in answer
        lock.release()
        assert os.listdir(tmp_path) == [] and caplog.records == []
        child.kill()

    def test_a_forked_child_may_not_write_where_its_parent_does(self, tmp_path):
        """Nor remove its parent's record."""
        check_that_a_forked_child_is_kept_out(tmp_path)

    def test_a_dead_one_is_replaced_with_one_line(self, tmp_path, start, caplog):
        """Its pid belongs to nobody."""
        caplog.set_level(logging.INFO)
        child, _, (_, pid, _) = start(tmp_path, lockf=no_locks)
        child.kill()
        child.join()
        self.taken(tmp_path).release()
        (line,) = [r.getMessage() for r in caplog.records]
        assert f"took over {tmp_path} from process {pid} " in line

    def test_a_pid_that_is_used_again_is_a_dead_one(self, tmp_path, record, caplog):
        """Told by when the process began."""
        caplog.set_level(logging.INFO)
        init = {"pid": 1, "process-start": owner._process_start(1)}
        record(tmp_path, **init)
        with pytest.raises(FolderInUseError, match="is in use by process 1 "):
            FolderLock(tmp_path).acquire()
        record(tmp_path, **{**init, "process-start": 12345678})
        self.taken(tmp_path).release()
        assert [r.levelno for r in caplog.records] == [logging.INFO]

    @pytest.mark.parametrize(
        "change", [{"host": "elsewhere"}, {"machine": "another start of it"}, {"pid": "many"}]
    )
    def test_of_one_elsewhere_nobody_can_tell_so_it_goes_on_with_a_warning(
        self, tmp_path, record, caplog, change
    ):
        """That names it and says what to do."""
        record(tmp_path, **{"pid": 77, **change})
        self.taken(tmp_path).release()
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert f"process {change.get('pid', 77)} (" in warning
        assert f"on host {change.get('host', socket.gethostname())}" in warning
        assert "make sure that it has ended, or use another dirpath" in warning

    @pytest.mark.parametrize("content", [b"", b"\xff\x00garbage", b"- 1", b"x" * 100_000])
    def test_garbage_keeps_nobody_out(self, tmp_path, content):
        """Somebody's, but nobody can say whose."""
        (tmp_path / LOCK_NAME).write_bytes(content)
        self.taken(tmp_path).release()
        assert os.listdir(tmp_path) == []

    def test_who_is_replaced_is_told_at_the_next_save_and_removes_nothing(self, tmp_path, record):
        """If somebody took the record for a dead one's."""
        lock = self.taken(tmp_path)
        record(tmp_path, pid=1, **{"process-start": owner._process_start(1)})
        with pytest.raises(FolderInUseError, match="process 1 "):
            lock.acquire()
        lock.release()
        assert yaml.safe_load((tmp_path / LOCK_NAME).read_bytes())["pid"] == 1
        (tmp_path / LOCK_NAME).unlink()
        lock = self.taken(tmp_path)
        record(tmp_path, pid=1)
        lock.release()
        assert yaml.safe_load((tmp_path / LOCK_NAME).read_bytes())["pid"] == 1

    def test_shared_ones_need_no_record(self, tmp_path):
        """There is nothing to keep out."""
        lock = FolderLock(tmp_path, shared=True)
        lock.acquire()
        lock.acquire()
        assert os.listdir(tmp_path) == []
        lock.release()


@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR])
def test_any_other_error_of_the_disk_is_one(tmp_path, monkeypatch, code):
    """It isn't taken for a folder in use, nor for a filesystem without locks."""

    def fail(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock_module.fcntl, "lockf", fail)
    with pytest.raises(SaveError, match=re.escape(os.strerror(code))) as caught:
        FolderLock(tmp_path).acquire()
    assert not isinstance(caught.value, FolderInUseError)


def test_lock_whose_release_a_signal_interrupts_is_taken_again(tmp_path, monkeypatch):
    """Right after its file was closed, before that is noted."""

    class Interrupted(lock_module.FileIO):
        def close(self):
            first = not self.closed
            super().close()
            if first:
                raise KeyboardInterrupt

    lock = FolderLock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(lock_module, "FileIO", Interrupted)
        lock.acquire()
        with pytest.raises(KeyboardInterrupt):
            lock.release()
    lock.release()
    lock.acquire()
    assert (tmp_path / LOCK_NAME).exists()
    lock.release()
    assert not (tmp_path / LOCK_NAME).exists()


def test_making_sure_of_it_costs_microseconds(tmp_path):
    """Since every save does."""
    lock = FolderLock(Path(tmp_path))
    lock.acquire()
    started = time.perf_counter()
    for _ in range(200):
        lock.acquire()
    assert (time.perf_counter() - started) / 200 < 0.005
    lock.release()
