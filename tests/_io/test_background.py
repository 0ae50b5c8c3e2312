"""The thread in the background: nothing handed over is lost, nothing that went wrong is hidden."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from lightning_sbckpt._io import background as writer
from lightning_sbckpt._io.background import Background

NAME = "sbckpt-under-test"


@pytest.fixture
def go_on():
    """What jobs wait for that are to last."""
    return threading.Event()


@pytest.fixture
def background(go_on):
    """A background with nothing to do; what is left at the end is done."""
    made = Background(NAME)
    yield made
    go_on.set()
    # The next test looks for threads of this name, too.
    assert until_none_runs()


def threads() -> list[threading.Thread]:
    """Return the threads of the background."""
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def until_none_runs() -> bool:
    """Return whether its threads end, as they do a moment after the last job."""
    deadline = time.monotonic() + 60
    while threads() and time.monotonic() < deadline:
        time.sleep(0.001)
    return not threads()


def raiser(error: BaseException):
    """Return a job that fails."""

    def job() -> None:
        raise error

    return job


def exit_status_of_fork(act) -> int:
    """Return with what status a forked child that does something ends; it gets ten seconds."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.alarm(10)
            status = act()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class TestJobs:
    """All of them, one after the other."""

    def test_jobs_are_done_in_the_order_in_which_they_come(self, background):
        """By one thread at a time, which is none of the caller's."""
        done = []
        for number in range(50):
            background.submit(lambda number=number: done.append((number, threading.get_ident())))
        background.wait()
        assert [number for number, _ in done] == list(range(50))
        assert threading.get_ident() not in {thread for _, thread in done}

    def test_jobs_of_several_threads_are_all_done_once(self, background):
        """Also when the thread is about to end just as one comes."""
        done = []

        def hand_over(first: int) -> None:
            for number in range(first, first + 200):
                background.submit(lambda number=number: done.append(number))

        callers = [threading.Thread(target=hand_over, args=(first,)) for first in (0, 200, 400)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        background.wait()
        assert sorted(done) == list(range(600))

    def test_a_job_may_hand_over_another(self, background, go_on):
        """It comes after those that are waiting, and `wait` waits for it, too."""
        done = []

        def first() -> None:
            background.submit(lambda: done.append("from the first"))
            done.append("first")

        background.submit(go_on.wait)
        background.submit(first)
        background.submit(lambda: done.append("second"))
        go_on.set()
        background.wait()
        assert done == ["first", "second", "from the first"]

    def test_a_job_that_waits_does_not_wait_for_itself(self, background):
        """Else what follows a save could never ask whether all is saved."""
        done = []

        def job() -> None:
            background.wait()
            done.append("waited")

        background.submit(job)
        background.wait()
        assert done == ["waited"]

    def test_it_is_busy_until_the_last_job_is_done(self, background, go_on):
        """And not before the first."""
        assert not background.busy
        background.submit(go_on.wait)
        assert background.busy
        go_on.set()
        background.wait()
        assert not background.busy

    def test_a_job_that_is_done_is_let_go_of(self, background):
        """It may hold a whole state."""

        class State:
            pass

        for _ in range(50):
            state = State()
            gone = weakref.ref(state)
            background.submit(lambda state=state: None)
            del state
            background.wait()
            # By now, not when the thread has ended.
            assert gone() is None


class TestErrors:
    """Kept until somebody asks."""

    def test_the_first_error_is_raised_by_the_next_wait_and_no_other(self, background):
        """The very exception, with the traceback from where it was raised; the other jobs are done."""
        first = KeyError("first")
        done = []
        background.submit(raiser(first))
        background.submit(raiser(ValueError("second")))
        background.submit(lambda: done.append("after"))
        with pytest.raises(KeyError) as raised:
            background.wait()
        assert raised.value is first
        assert "job" in [entry.name for entry in raised.traceback]
        assert done == ["after"]
        background.wait()

    def test_an_error_after_a_wait_is_an_error_again(self, background):
        """Nothing is left of the one before."""
        for word in ("one", "two"):
            background.submit(raiser(ValueError(word)))
            with pytest.raises(ValueError, match=word):
                background.wait()

    def test_what_is_no_exception_of_the_usual_kind_does_not_end_it(self, background):
        """The next job is done all the same."""
        done = []
        background.submit(raiser(SystemExit(3)))
        background.submit(lambda: done.append("after"))
        with pytest.raises(SystemExit):
            background.wait()
        assert done == ["after"]


class TestThread:
    """There is one only while there is something to do."""

    def test_the_thread_ends_when_there_is_nothing_to_do(self, background, go_on):
        """And the next job has another one."""
        assert not threads()
        for _ in range(3):
            go_on.clear()
            background.submit(go_on.wait)
            assert len(threads()) == 1
            go_on.set()
            background.wait()
            assert until_none_runs()

    def test_the_thread_is_no_daemon(self, background, go_on):
        """The interpreter would kill a daemon in the middle of a job."""
        background.submit(go_on.wait)
        (thread,) = threads()
        assert not thread.daemon
        go_on.set()

    def test_where_no_thread_starts_any_more_the_caller_does_the_job(self, background, monkeypatch):
        """So it is while an interpreter exits, from Python 3.12 on."""

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        done = []
        background.submit(lambda: done.append(threading.get_ident()))
        assert done == [threading.get_ident()]
        assert not background.busy
        background.submit(raiser(ValueError("kept")))
        with pytest.raises(ValueError, match="kept"):
            background.wait()

    @pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "raise ValueError"])
    def test_an_interpreter_that_exits_does_what_was_handed_over(self, tmp_path, end):
        """Whatever it ends by, and also what a job hands over while it exits."""
        code = (
            "import importlib.util, sys, time\n"
            "from pathlib import Path\n"
            # Without the package, whose import would take longer than all else here.
            f"spec = importlib.util.spec_from_file_location('writer', {writer.__file__!r})\n"
            "writer = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(writer)\n"
            "Background = writer.Background\n"
            f"folder = Path({str(tmp_path)!r})\n"
            "background, other = Background('a'), Background('b')\n"
            "def job():\n"
            "    time.sleep(0.3)\n"
            "    other.submit((folder / 'second').touch)\n"
            "    (folder / 'first').touch()\n"
            "background.submit(job)\n"
            f"{end}\n"
        )
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, timeout=120, capture_output=True, check=False)
        assert ended.returncode == {"pass": 0, "sys.exit(3)": 3, "raise ValueError": 1}[end]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


class TestFork:
    """What is in the background stays with the process that put it there."""

    def test_a_forked_child_has_nothing_to_do_and_may_begin_its_own(
        self, background, go_on, tmp_path
    ):
        """It does not wait for a thread that it hasn't got; the parent goes on meanwhile."""
        background.submit(go_on.wait)
        background.submit((tmp_path / "parent").touch)

        def child() -> int:
            background.wait()
            background.submit((tmp_path / "child").touch)
            background.wait()
            return 0 if not background.busy else 1

        assert exit_status_of_fork(child) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"child"}
        go_on.set()
        background.wait()
        assert {path.name for path in tmp_path.iterdir()} == {"child", "parent"}

    def test_an_error_of_the_parent_is_none_of_the_child(self, background):
        """It is raised once, where it was made."""
        background.submit(raiser(ValueError("the parent's")))
        assert until_none_runs()

        def child() -> int:
            background.wait()
            return 0

        assert exit_status_of_fork(child) == 0
        with pytest.raises(ValueError, match="the parent's"):
            background.wait()

    def test_a_fork_in_the_middle_of_handing_over_leaves_a_child_that_works(
        self, background, tmp_path
    ):
        """Though a lock was taken then by a thread that the child hasn't got."""
        with background._deciding:
            status = exit_status_of_fork(
                lambda: (background.submit((tmp_path / "child").touch), background.wait(), 0)[-1]
            )
        assert status == 0
        assert (tmp_path / "child").exists()

    def test_a_forked_child_cleans_up_after_no_job_of_the_parent(self, background, go_on, tmp_path):
        """Letting go of a save would remove the folder that the parent is about to write into."""

        class Staging:
            folder = tmp_path / "staging"

            def __del__(self) -> None:
                if self.folder.exists():
                    self.folder.rmdir()

        Staging.folder.mkdir()
        background.submit(go_on.wait)
        staging = Staging()
        background.submit(lambda staging=staging: staging)
        del staging

        def child() -> int:
            background.wait()
            gc.collect()
            return 0

        assert exit_status_of_fork(child) == 0
        assert Path(Staging.folder).exists()
        go_on.set()
        background.wait()
        assert until_none_runs()
        assert not Path(Staging.folder).exists()
