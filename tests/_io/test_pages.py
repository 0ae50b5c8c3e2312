"""Memory to write from: in huge pages, and of one process alone."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from _processes import context

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.memory import HUGE_PAGE, huge_pages
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._save.arena import allocate

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def address_of(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def kilobytes_in_huge_pages(address):
    """Return how much of the mapping at an address lies in huge pages, as the kernel tells."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("size", [0, 1, 4096, HUGE_PAGE + 1, 5 * HUGE_PAGE])
def test_memory_begins_with_a_huge_page_and_is_empty(size):
    memory = huge_pages(size)
    assert len(memory) == size
    assert bytes(memory) == bytes(size)
    if size:
        assert address_of(memory) % HUGE_PAGE == 0


@pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="this system has no huge pages"
)
@pytest.mark.parametrize("make", [huge_pages, lambda size: allocate(size)[0]])
def test_memory_is_in_huge_pages(make):
    """What sync saves are written from, and what copies of a state lie in."""
    memory = make(4 * HUGE_PAGE)
    memory[:] = b"x" * len(memory)
    assert kilobytes_in_huge_pages(address_of(memory)) >= 4 * HUGE_PAGE // 1024


@pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="this system has no huge pages"
)
def test_memory_stays_in_huge_pages_beside_forked_processes():
    """A loader's workers, say, which live as long as an epoch; they find nothing there."""
    driver = context.Process(target=fork_and_write)
    driver.start()
    driver.join(60)
    assert driver.exitcode == 0


def fork_and_write():
    memory = huge_pages(4 * HUGE_PAGE)
    memory[:] = b"x" * len(memory)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        os._exit(bytes(memory) != bytes(len(memory)))
    memory[:] = b"y" * len(memory)
    assert kilobytes_in_huge_pages(address_of(memory)) >= 4 * HUGE_PAGE // 1024
    os.write(writing, b".")
    assert os.waitpid(child, 0)[1] == 0


def save_again_and_again(root, number, mode):
    state = {"model": torch.nn.Linear(1500, 1500)}
    with torch.no_grad(), Checkpointer(root, state, save_mode=mode) as checkpointer:
        for turn in range(6):
            for parameter in state["model"].parameters():
                parameter.fill_(100 * number + turn)
            checkpointer.save_checkpoint({"turn": turn})
            checkpointer.wait()


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_forked_processes_that_save_at_once_write_their_own_bytes(tmp_path, mode):
    """The parent has saved before, so that each has its memory for blocks from it."""
    driver = context.Process(target=fork_and_save, args=(tmp_path, mode))
    driver.start()
    driver.join(120)
    assert driver.exitcode == 0
    for number in range(3):
        found = Checkpointer(tmp_path / f"{number}", access="read").list_checkpoints()
        assert len(found) == 6
        for ckpt in found:
            assert find_damage(ckpt.path) == []
            weights = torch.load(ckpt.paramfiles["model"], weights_only=True)["weight"]
            assert weights.unique().tolist() == [100 * number + ckpt.meta["turn"]]


def fork_and_save(root, mode):
    torch.set_num_threads(1)
    save_again_and_again(root / "before", 9, "sync")
    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            save_again_and_again(root / f"{number}", number, mode)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
