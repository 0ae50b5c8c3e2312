"""Processes that save and prune as fast as they can are killed at random instants.

What each of them reported durable, through a pipe that outlives it, is counted against what the
next process finds. The folder for temporary files is on another device than the run, so that a
rename from there could not go unnoticed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from _counts import count
from _processes import context
from _scenario import FURNITURE, SAVE_MODES

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.manifest import find_damage

KEPT = 2


class Number:
    """A stateful object with one number, in tensors of more than a mebibyte and of few bytes."""

    def __init__(self):
        self.number = 0

    def state_dict(self):
        words = torch.full((300_000,), float(self.number))
        return {"number": self.number, "words": words, "few": words[:10].clone()}

    def load_state_dict(self, state):
        assert set(state["words"].tolist()) == set(state["few"].tolist()) == {state["number"]}
        self.number = state["number"]


def checkpointer_of(root, **arguments):
    """Return a checkpointer of two objects."""
    checkpointer = Checkpointer(root, {"number": Number()}, **arguments)
    checkpointer.add_recoverable("text", Number(), read_text, write_text)
    return checkpointer


def write_text(obj, path):
    """Write into a folder."""
    path.mkdir()
    (path / "number.txt").write_text(str(obj.number))


def read_text(obj, path, end_of_epoch):
    """Read from a folder."""
    obj.number = int((path / "number.txt").read_text())


def is_named(number):
    """Return whether a number is saved under the one name that is used again and again."""
    return number % 3 == 0


def save_and_prune(root, mode, first, seed, pipe):
    """Save and prune as fast as it goes, and report what begins and what is durable."""
    chance = random.Random(seed)
    checkpointer = checkpointer_of(root, save_mode=mode)
    for number in range(first, first + 100_000):
        checkpointer.before_update()
        for obj in checkpointer.recoverables.values():
            obj.number = number
        os.write(pipe, b"started %d\n" % number)
        checkpointer.save_and_keep_only(
            {"number": number},
            name="named" if is_named(number) else None,
            num_to_keep=KEPT,
            # Retention leaves the named one alone.
            ckpt_predicate=lambda ckpt: ckpt.path.name != "CKPT+named",
        )
        if mode == "sync" or chance.random() < 0.5:
            checkpointer.wait()
            os.write(pipe, b"durable %d\n" % number)


def kill_in_turn(root, mode, temporary, orders, results):
    """In a child: for each (first number, seed) that comes fork a saver and kill it."""
    os.environ["TMPDIR"] = temporary
    tempfile.tempdir = None
    warm_up()
    while (order := orders.recv()) is not None:
        first, seed = order
        chance = random.Random(seed)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with contextlib.suppress(BaseException):
                save_and_prune(root, mode, first, seed, writer)
            os._exit(1)
        os.close(writer)
        told = b""
        for _ in range(chance.randrange(8)):
            told += os.read(reader, 4096)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        while more := os.read(reader, 4096):
            told += more
        os.close(reader)
        results.send((status, told.decode()))


def warm_up():
    """Import what is imported at the first use; start no thread, since none outlives a fork."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpointer_of(folder).save_checkpoint()
        checkpointer_of(folder).recover_if_possible()


@dataclass
class Tally:
    """What was reported and what was found."""

    kills: int = 0
    durable: list[int] = field(default_factory=list)
    started: int = 0
    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def told(self, lines):
        """Take the report of a killed process."""
        for line in lines.splitlines():
            what, number = line.split()
            if what == "started":
                self.started = int(number)
            else:
                self.durable.append(int(number))

    def look(self, root, mode):
        """Be the next process, and return the numbers of the checkpoints that it finds."""
        checkpointer = checkpointer_of(root, save_mode=mode)
        found = {}
        for name in os.listdir(root):
            if not name.startswith("CKPT"):
                if name not in FURNITURE:
                    self.left.append(f"{name} after kill {self.kills}")
                continue
            problems = find_damage(root / name)
            try:
                checkpointer.load_checkpoint(root / name)
                numbers = {obj.number for obj in checkpointer.recoverables.values()}
                if len(numbers) > 1:
                    problems.append(f"it holds the numbers {numbers}")
                found[name] = numbers.pop()
            except Exception as error:
                problems.append(str(error))
            self.torn += [f"{name} after kill {self.kills}: {problem}" for problem in problems]
        self.compare(found)
        return found

    def compare(self, found):
        """Miss what was reported durable, was not pruned, and is not there."""
        named = found.get("CKPT+named", -1)
        others = {number for name, number in found.items() if name != "CKPT+named"}
        for number in self.durable:
            newer = [other for other in others if other > number]
            # Pruned rightly if there are newer ones enough.
            kept = number in others or len(newer) >= KEPT
            if not (named >= number if is_named(number) else kept):
                self.lost.append(f"{number} after kill {self.kills}: found {found}")
        if max(found.values(), default=0) > self.started:
            self.torn.append(f"after kill {self.kills} there is what nobody saved: {found}")


class TestTheTally:
    """It can find a loss."""

    def test_a_missing_checkpoint_is_counted(self):
        """The newest, the second newest, the named one; and what was pruned is not missed."""
        tally = Tally(durable=[1, 2, 3, 4, 5], started=5)
        tally.compare({"CKPT+a": 4, "CKPT+b": 5, "CKPT+named": 3})
        assert tally.lost == []
        for missing in (4, 5, 3):
            tally = Tally(durable=[1, 2, 3, 4, 5], started=5)
            found = {"CKPT+a": 4, "CKPT+b": 5, "CKPT+named": 3}
            tally.compare({name: number for name, number in found.items() if number != missing})
            assert any(line.startswith(f"{missing} ") for line in tally.lost)

    def test_a_torn_checkpoint_is_counted(self, tmp_path):
        """By its bytes, and by numbers that do not agree."""
        checkpointer_of(tmp_path).save_checkpoint(name="a")
        tally = Tally()
        tally.look(tmp_path, "sync")
        assert tally.torn == []
        (tmp_path / "CKPT+a" / "text.ckpt" / "number.txt").write_text("7")
        tally.look(tmp_path, "sync")
        assert "number.txt" in tally.torn[0]
        shutil.rmtree(tmp_path / "CKPT+a")
        mixed = checkpointer_of(tmp_path)
        mixed.recoverables["text"].number = 8
        mixed.save_checkpoint(name="b")
        tally.torn.clear()
        tally.look(tmp_path, "sync")
        assert "it holds the numbers {0, 8}" in tally.torn[0]


class TestRandomKills:
    """A seeded soak."""

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("mode", SAVE_MODES)
    @pytest.mark.parametrize(
        "kills", [15, pytest.param(120, marks=pytest.mark.slow)], ids=["15", "120"]
    )
    def test_nothing_reported_durable_is_lost_and_nothing_is_torn(self, tmp_path, kills, mode):
        """Each process goes on where the killed one was; 120 in each of three modes are 360."""
        memory = Path("/dev/shm")
        if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no second device for temporary files, /dev/shm for example")
        root = tmp_path / "run"
        tally = Tally()
        orders, orders_end = context.Pipe()
        results, results_end = context.Pipe(duplex=False)
        driver = context.Process(
            target=kill_in_turn, args=(root, mode, str(memory), orders_end, results_end)
        )
        driver.start()
        results_end.close()
        first = 1
        for seed in range(kills):
            orders.send((first, seed))
            status, told = results.recv()
            assert status == -signal.SIGKILL
            tally.kills += 1
            tally.told(told)
            found = tally.look(root, mode)
            first = max([tally.started, *found.values()]) + 1
        orders.send(None)
        driver.join()
        count("processes killed at random", tally.kills)
        count("checkpoints reported durable by them", len(tally.durable))
        count("of those, lost or torn", len(tally.lost) + len(tally.torn))
        print(
            f"{mode}: {tally.kills} kills, {tally.started} saves begun, {len(tally.durable)} "
            f"reported durable, {len(tally.lost)} lost, {len(tally.torn)} torn"
        )
        assert (tally.lost, tally.torn, tally.left) == ([], [], [])
        # Less would mean that the processes were killed before they came to anything.
        assert len(tally.durable) > kills // 2
