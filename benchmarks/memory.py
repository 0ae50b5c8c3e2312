"""How much more memory a process needs while it saves and loads.

Each subject runs in a process of its own, so that what one leaves behind is not another's. It says
when it begins and ends; meanwhile this process reads how much memory it and its children have that
is no page cache (anonymous and shared), every few milliseconds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.disk import scratch
from benchmarks.measure import Section, Settings, Table, described, size_label
from benchmarks.peer import OURS, Peer, quiet
from benchmarks.peers import ASYNC, LOADING, SYNC
from benchmarks.states import State

_ALL: dict[str, Callable[[], Peer]] = {**LOADING, **SYNC, **ASYNC}
_FOR_QUICK = (f"{OURS}, sync", f"{OURS}, async", "torch.save + fsync")


def run(settings: Settings) -> Section:
    """Measure."""
    save = Table("While two checkpoints are saved, one after the other", "bytes")
    load = Table("While the newest is loaded into the live model and optimizer", "bytes")
    section = Section(
        "memory",
        "Extra memory",
        "The most memory that the process and its children had at any moment, beyond what they had "
        "just before, without the page cache. One subject per process; a tiny save and load before "
        "has imported what they import.",
        {"memory save": save, "memory load": load},
    )
    # Copies grow with the state, so one size is enough for the peers.
    peers_at = min(100, settings.main_size)
    sizes = [peers_at, *(size for size in settings.sizes if size != peers_at)]
    for size in sizes[:1] if settings.quick else sizes:
        for name in _FOR_QUICK if settings.quick else _ALL:
            is_ours = name.startswith(OURS)
            if name in section.failures or not (is_ours or size == peers_at):
                continue
            with scratch(settings.folder / "memory") as folder:
                try:
                    figures = peak_of(name, size, folder)
                except Exception as error:
                    section.failures[name] = described(error)
                    continue
            if "unavailable" in figures:
                section.failures[name] = str(figures["unavailable"])
                continue
            if name in SYNC or name in ASYNC:
                save.cells[name, size_label(size)] = [float(figures["save"])]
            if name in LOADING:
                load.cells[name, size_label(size)] = [float(figures["load"])]
        print(f"  memory: {size_label(size)} done", flush=True)
    for table in section.tables.values():
        # In the order of the sizes, whichever was first.
        order = [size_label(size) for size in settings.sizes]
        table.cells = dict(sorted(table.cells.items(), key=lambda cell: order.index(cell[0][1])))
    return section


def peak_of(name: str, size: float, folder: Path) -> dict[str, object]:
    """Return the bytes beyond the start that saving and loading took at most."""
    command = [sys.executable, "-m", "benchmarks.memory", name, str(size), str(folder)]
    figures: dict[str, object] = {}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            if "begins" not in said:
                figures |= said
                continue
            base = _memory(child.pid)
            child.stdin.write("go\n")
            child.stdin.flush()
            figures[said["begins"]] = _peak_until_it_sleeps(child, Path(said["done"])) - base
            child.stdin.write("go\n")
            child.stdin.flush()
    if child.returncode:
        raise RuntimeError(f"the measured process ended with status {child.returncode}")
    return figures


def _peak_until_it_sleeps(child: subprocess.Popen[str], done: Path) -> int:
    peak = 0
    while not done.exists() and child.poll() is None:
        with suppress(OSError):
            peak = max(peak, _memory(child.pid))
        time.sleep(0.002)
    return peak


def _memory(pid: int) -> int:
    """Return the anonymous and shared memory of a process and its children, in bytes."""
    total = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += int(line.split()[1]) * 1024
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with suppress(OSError):
                    total += _memory(int(child))
    return total


# ---------------------------------------------------------------------- in the other process


def _child(name: str, size: float, folder: Path) -> None:
    from benchmarks.measure import UnavailableError

    quiet()
    tiny = State(0.1)
    try:
        _save_and_load(_ALL[name](), tiny, folder / "tiny")
    except UnavailableError as error:
        print(json.dumps({"unavailable": str(error)}), flush=True)
        return
    state = State(size)
    peer = _ALL[name]()
    peer.open(state, folder / "real")
    with _watched("save", folder):
        for _ in range(2):
            state.change()
            peer.save()
            peer.wait()
    with _watched("load", folder):
        peer.load(state)
        state.touch()
    peer.close()


def _save_and_load(peer: Peer, state: State, folder: Path) -> None:
    peer.open(state, folder)
    peer.save()
    peer.wait()
    peer.load(state)
    peer.close()


class _watched:  # noqa: N801 - reads as a statement
    """Tells the parent that something begins, and when it is over."""

    def __init__(self, what: str, folder: Path) -> None:
        self.what = what
        self.done = folder / f"{what}-is-done"

    def __enter__(self) -> None:
        gc.collect()
        # What an earlier step has freed but the allocator keeps would hide a new copy.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        print(json.dumps({"begins": self.what, "done": str(self.done)}), flush=True)
        sys.stdin.readline()

    def __exit__(self, *exception: object) -> None:
        self.done.touch()
        sys.stdin.readline()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("size", type=float)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    _child(given.name, given.size, given.folder)
