"""Real signals, whose handlers raise, at random moments: nothing hangs, nothing is torn, no lock stays."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

import pytest
import torch
from _counts import count
from _processes import context

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.lock import LOCK_NAME
from lightning_sbckpt._layout.manifest import find_damage

MODES = ("sync", "async", "overlap")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
# How long a call may take on a machine with too much to do before it counts as hanging.
SECONDS = 120


class Raised(BaseException):
    """What the handlers raise: no Exception, as KeyboardInterrupt and SystemExit are none."""


class Signals:
    """Sends this process one to four signals, at random moments from now on.

    Args:
        chance: Says when, which, and how many.
    """

    def __init__(self, chance: random.Random) -> None:
        self.came = 0
        self._first = chance.uniform(0, 0.06)
        self._gaps = [chance.uniform(0, 0.01) for _ in range(chance.randrange(4))]
        self._by_timer = chance.random() < 0.5
        self._numbers = [chance.choice(SIGNALS) for _ in range(1 + len(self._gaps))]
        self._thread = threading.Thread(target=self._send, daemon=True)

    def start(self) -> None:
        """Begin."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        if self._by_timer:
            signal.setitimer(signal.ITIMER_REAL, max(self._first, 1e-6), 0.004)
        else:
            self._thread.start()

    def stop(self) -> None:
        """Send no more."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not self._by_timer:
            self._thread.join()

    @property
    def over(self) -> bool:
        """Whether none will come any more; all may have come before training began."""
        return not self._by_timer and not self._thread.is_alive()

    def _send(self) -> None:
        for number, gap in zip(self._numbers, [self._first, *self._gaps], strict=True):
            time.sleep(gap)
            os.kill(os.getpid(), number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Only where the test can catch it: elsewhere there is always a bytecode outside of any `try`.
        while frame is not None and frame.f_code is not train_and_save.__code__:
            frame = frame.f_back
        if frame is not None and self.came < len(self._numbers):
            self.came += 1
            raise Raised


def ends(work) -> str:
    """Do something in a thread; return what is wrong with how it ended."""

    def run():
        try:
            work()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    errors: list[str] = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return "hangs" if thread.is_alive() else "".join(errors)


def make(root, mode):
    """Return a checkpointer, and the model and the optimizer that it saves."""
    model = torch.nn.Linear(400, 400)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Checkpointer(root, {"m": model, "o": optimizer}, save_mode=mode), model, optimizer


def train_and_save(root, mode, made, signals):
    """Train and save until signals come, and leave as a script does."""
    checkpointer, model, optimizer = make(root, mode)
    made.append(checkpointer)
    # What is raised while a raised exception is handled goes further out, and so on.
    try:
        try:
            for number in range(100_000):
                if signals.over:
                    break
                model.weight.grad = torch.ones_like(model.weight)
                optimizer.step()
                checkpointer.save_and_keep_only({"n": number}, min_keys=["n"])
        finally:
            checkpointer.wait()
    finally:
        checkpointer.close()


def live(root, mode, chance):
    """Train and save until signals come; return how many came, and what is wrong afterwards."""
    signals, made = Signals(chance), []
    signals.start()
    try:
        train_and_save(root, mode, made, signals)
    except Raised:
        pass
    except RuntimeError as error:
        # `Condition.wait` of the standard library, in which `Thread.start` waits, says so in the place
        # of an exception that comes while it takes its lock back.
        if str(error) != "release unlocked lock":
            raise
    signals.stop()
    (checkpointer,) = made or [make(root, mode)[0]]
    wrong = []
    for what, work in {
        "wait": lambda: suppress_errors(checkpointer.wait),
        "save": lambda: checkpointer.save_checkpoint({"n": -1}, name="after"),
        "wait again": checkpointer.wait,
        "close": checkpointer.close,
    }.items():
        answer = ends(work)
        if answer:
            wrong.append(f"{what}: {answer}")
        if answer == "hangs":
            break
    if (root / LOCK_NAME).exists():
        wrong.append("the lock stays")
    return signals.came, wrong


def suppress_errors(work):
    """Do something that may tell of a save that a signal has ended."""
    with suppress(Exception):
        work()


def live_often(root, mode, seed, times, results):
    """In a process of its own: one life after the other, each in a folder of its own."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    for number in range(times):
        results.send((number, *live(root / str(number), mode, chance)))


def campaign(folder, mode, seed, times):
    """Have a process live often, and look at what it leaves from another one."""
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=live_often, args=(folder, mode, seed, times, writer))
    process.start()
    writer.close()
    came, found = 0, []
    try:
        for _ in range(times):
            assert reader.poll(6 * SECONDS), f"nothing was heard after {found}"
            number, raised, wrong = reader.recv()
            came += raised
            found += [f"life {number}: {each}" for each in wrong]
            found += [f"life {number}: {each}" for each in look(folder / str(number), mode)]
        process.join(SECONDS)
    finally:
        process.kill()
        process.join()
    # What a save leaves that was ended is swept when its process is gone.
    found += [
        f"life {number}: {each}"
        for number in range(times)
        for each in left_over(folder / str(number), mode)
    ]
    count("signals raised at random moments", came)
    count("of those, after which something hung, tore, was lost or stayed locked", len(found))
    assert found == []
    return came


def look(root, mode):
    """Be the next process: return what is wrong with a folder."""
    checkpointer = make(root, mode)[0]
    wrong = [
        problem for each in checkpointer.list_checkpoints() for problem in find_damage(each.path)
    ]
    found = checkpointer.recover_if_possible()
    if found is None or found.path.name != "CKPT+after":
        wrong.append(f"recovered {found}")
    checkpointer.save_checkpoint()
    checkpointer.close()
    return wrong


def left_over(root, mode):
    """Return what stays of ended saves after a save of the next process."""

    def unfinished():
        return [
            path.name for path in root.iterdir() if path.name.startswith((".staging", ".removed"))
        ]

    if unfinished():
        checkpointer = make(root, mode)[0]
        checkpointer.save_checkpoint()
        checkpointer.close()
    return [f"left over: {name}" for name in unfinished()]


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", MODES)
def test_signals_at_random_moments_leave_nothing_that_hangs(tmp_path, mode):
    """From a timer and from another thread, one and several in a row."""
    assert campaign(tmp_path, mode, 7, 8) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(10))
def test_thousands_of_signals_leave_nothing_that_hangs(tmp_path, mode, seed):
    """The same, as often as it takes to meet every moment."""
    assert campaign(tmp_path, mode, 100 + seed, 80) >= 80
