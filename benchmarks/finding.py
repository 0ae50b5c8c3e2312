"""How long it takes to find the best of many checkpoints.

The folders are the same for all. What has to happen in a new process is measured in a forked one
that has imported everything and looked at nothing, so that imports are not in the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.disk import scratch
from benchmarks.measure import Section, Settings, Table, described, interleave, timed
from benchmarks.peer import OURS, quiet
from benchmarks.peers_trainers import speechbrain_checkpoints

SPEECHBRAIN = "SpeechBrain"
NO_INDEX = f"{OURS}, no index"
NEW_PROCESS = f"{OURS}, new process"
TWICE = f"{OURS}, asked a second time"
AGAIN = f"{OURS}, asked again and again"
FLOOR = "two lstat for each checkpoint"

_COUNTS = (100, 1_000, 3_000, 10_000)
_QUICK_COUNTS = (100, 1_000)


def run(settings: Settings) -> Section:
    """Measure, in another process, since this one has threads and can't be forked."""
    table = Table("`find_checkpoint(min_key=...)`", "s", SPEECHBRAIN, columns_are="count")
    section = Section(
        "find",
        "Finding the best checkpoint",
        "Every checkpoint has a small meta and no more. SpeechBrain reads every meta at every "
        "call. *No index*: whatever this package keeps beside the checkpoints is removed before; "
        "*new process*: it is there, from an earlier process; *asked a second time*: in the same "
        "process, which looks at every folder; *asked again and again*: the fifth call in a process "
        "and those after it, when the kernel says that nothing has changed. "
        f"*{FLOOR}*: of its folder and of its meta, and nothing else, which is the least by which an "
        "index can be compared with what is there.",
        {"find": table},
    )
    counts = _QUICK_COUNTS if settings.quick else _COUNTS
    for count in counts:
        with scratch(settings.folder / "find") as folder:
            make_checkpoints(folder, count)
            try:
                said = _ask_child(folder, settings, settings.seconds / len(counts))
            except Exception as error:
                section.failures[f"{count:,} checkpoints"] = described(error)
                continue
        section.failures |= said["failures"]
        table.add(f"{count:,}", said["rounds"])
        print(f"  find: {count:,} checkpoints done", flush=True)
    return section


def make_checkpoints(folder: Path, count: int) -> None:
    """Make folders as SpeechBrain and this package make them, with a meta and nothing else."""
    for number in range(count):
        made = folder / f"CKPT+2026-01-01+00-00-00+{number:05d}"
        made.mkdir()
        loss = 1.0 + (number * 7919 % count) / count
        text = f"# yamllint disable\nend-of-epoch: true\nloss: {loss}\nunixtime: {1e9 + number}\n"
        (made / "CKPT.yaml").write_text(text)


def forget_index(folder: Path) -> None:
    """Remove what is in the folder besides checkpoints."""
    for path in folder.iterdir():
        if not path.name.startswith("CKPT") and path.is_file():
            path.unlink()


def _ask_child(folder: Path, settings: Settings, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.finding", str(folder), str(seconds)]
    answer = subprocess.run(
        [*command, str(settings.rounds(5))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------------- in the other process


def _child(folder: Path, seconds: float, rounds: int) -> None:
    from lightning_sbckpt import Checkpointer

    quiet()
    failures: dict[str, str] = {}
    watching = Checkpointer(folder)

    def find() -> object:
        return Checkpointer(folder).find_checkpoint(min_key="loss")

    def without_index() -> float:
        forget_index(folder)
        return in_new_process(find)

    def find_twice() -> float:
        asked = Checkpointer(folder)
        asked.find_checkpoint(min_key="loss")
        return timed(lambda: asked.find_checkpoint(min_key="loss"))

    def find_again() -> float:
        # The others removed and wrote the index meanwhile.
        for _ in range(4):
            watching.find_checkpoint(min_key="loss")
        return timed(lambda: watching.find_checkpoint(min_key="loss"))

    # Each leaves the index behind that the next one needs.
    without_index()
    # Written in the last moments, the metas could still change unseen: times tick slowly.
    time.sleep(0.2)
    found = watching.find_checkpoint(min_key="loss")
    subjects: dict[str, Callable[[], float]] = {
        NO_INDEX: without_index,
        NEW_PROCESS: lambda: in_new_process(find),
        TWICE: find_twice,
        AGAIN: find_again,
        FLOOR: lambda: timed(lambda: look_at_all(folder)),
    }
    try:
        original = speechbrain_checkpoints().Checkpointer
    except Exception as error:
        failures[SPEECHBRAIN] = described(error)
    else:
        theirs = original(folder)
        subjects[SPEECHBRAIN] = lambda: timed(lambda: theirs.find_checkpoint(min_key="loss"))
        if theirs.find_checkpoint(min_key="loss").path != found.path:
            raise AssertionError("the two find different checkpoints")
    measured = interleave(
        subjects, rounds=rounds, seconds=seconds, at_least=1, warmup=0, failures=failures
    )
    in_order = {name: measured[name] for name in (SPEECHBRAIN, *subjects)}
    print(json.dumps({"rounds": in_order, "failures": failures}))


def look_at_all(folder: Path) -> None:
    """Ask the filesystem of each checkpoint whether it is the one that was read."""
    start = f"{folder}{os.sep}"
    for name in os.listdir(folder):
        if name.startswith("CKPT"):
            os.lstat(start + name)
            os.lstat(f"{start}{name}{os.sep}CKPT.yaml")


def in_new_process(act: Callable[[], object]) -> float:
    """Return how many seconds a call takes in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        start = time.perf_counter()
        act()
        os.write(writing, str(time.perf_counter() - start).encode())
        # Nothing of the parent's is to be cleaned up twice.
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    if not said:
        raise RuntimeError("the forked process failed")
    return float(said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("rounds", type=int)
    given = parser.parse_args()
    _child(given.folder, given.seconds, given.rounds)
