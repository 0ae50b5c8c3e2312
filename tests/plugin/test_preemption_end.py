"""A preempted run ends by its exit code however many signals follow the first."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from _ranks import checkpoints, make, reason, run, to_myself
from _runs import At

from lightning_sbckpt import Preempted

SCRIPT = textwrap.dedent(
    """
    import atexit, os, signal, sys, threading

    def again(where):
        for name in ("SIGTERM", "SIGUSR1", "SIGTERM"):
            os.kill(os.getpid(), signal.Signals[name])
        print(where, flush=True)

    class Late:
        def __init__(self):
            # Its globals may be gone by then.
            self.kill, self.arguments = os.kill, (os.getpid(), signal.SIGTERM)

        def __del__(self):
            self.kill(*self.arguments)

    # The first to be registered is the last to be called.
    atexit.register(again, "in atexit")

    from pathlib import Path
    from _ranks import make
    from lightning.pytorch import Callback

    class Signals(Callback):
        def on_train_batch_start(self, trainer, module, batch, number):
            if number == 1:
                again("in a batch")

        def on_exception(self, trainer, module, exception):
            again("in on_exception")

    def join():
        threading.main_thread().join()
        again("in the shutdown of threads")

    late = Late()
    threading.Thread(target=join).start()
    trainer, module, _, loaders = make(
        Path(sys.argv[1]) / "checkpoints", size=1, preemption=True, callbacks=[Signals()]
    )
    try:
        trainer.fit(module, **loaders)
    finally:
        again("after the fit")
    """
)


@pytest.mark.long
def test_signals_after_the_first_leave_the_exit_code_alone(tmp_path):
    """As the fit ends, after the fit, while threads and the interpreter shut down: 75, and no lock."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 75, ended.stderr
    for where in ("on_exception", "after the fit", "the shutdown of threads", "in atexit"):
        assert where in ended.stdout
    assert reason(checkpoints(tmp_path)[-1]) == "preempted by SIGTERM"
    assert not (tmp_path / "checkpoints" / ".lock").exists()


def fit_signalled_to_the_end(folder, rank):
    """Fit; another signal comes when the function of this process has ended."""

    def again():
        threading.main_thread().join()
        to_myself("SIGTERM")

    threading.Thread(target=again).start()
    preempted(folder)


def test_signals_after_the_first_leave_the_exit_code_of_a_started_process_alone(tmp_path):
    """It catches the exception itself and ends in its own way."""
    ended = run(fit_signalled_to_the_end, tmp_path, size=1)
    assert ended.codes == [75], ended.outputs


@pytest.fixture
def handlers():
    """What is there before a test, and after it."""
    gc.collect()  # What an earlier test has held gives its handlers back now, not in the middle of this one.
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield lambda: {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != before[n]}
    for number, handler in before.items():
        signal.signal(number, handler)


def preempted(folder):
    """Fit until a signal comes."""
    trainer, module, _, loaders = make(
        folder / "checkpoints",
        size=1,
        preemption=True,
        callbacks=[At("on_train_batch_start", 2, lambda: to_myself("SIGTERM"))],
    )
    trainer.fit(module, **loaders)


def test_a_process_that_goes_on_gets_its_handlers_back(tmp_path, handlers):
    """While the exception is held signals are ignored, but Ctrl+C; when it is dropped, no more."""
    try:
        preempted(tmp_path)
    except Preempted:
        assert set(handlers()) == {signal.SIGTERM, signal.SIGUSR1}
        to_myself("SIGTERM")
        to_myself("SIGUSR1")
    gc.collect()
    assert handlers() == {}


def test_the_next_fit_of_a_process_knows_the_handlers_of_before(tmp_path, handlers):
    """Whoever keeps the exception of one fit and begins another."""
    kept = []
    for number in range(2):
        try:
            preempted(tmp_path / str(number))
        except Preempted as end:
            kept.append(end)
    kept.clear()
    gc.collect()
    assert handlers() == {}


def test_an_interactive_session_gets_its_handlers_back_at_once(tmp_path, handlers, monkeypatch):
    """It keeps the last exception, and no scheduler starts it again."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(Preempted) as kept:
        preempted(tmp_path)
    assert handlers() == {}
    assert kept.value.code == 75
