"""Two processes in a gloo group, and what they save."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist
from _processes import context

from lightning_sbckpt import register_checkpoint_hooks
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt.hooks import mark_as_loader, mark_as_saver

# A failure must reach the other rank as a message; waiting for a timeout would take longer.
SECONDS = 60


@register_checkpoint_hooks(save_on_main_only=False)
class PerRank:
    """An object whose save writes one file per rank."""

    def __init__(self, number):
        self.number = number

    @mark_as_saver
    def save(self, path):
        Path(path).mkdir(exist_ok=True)
        (Path(path) / f"rank{dist.get_rank()}").write_text(str(self.number))

    @mark_as_loader
    def load(self, path, end_of_epoch):
        self.number = int((Path(path) / f"rank{dist.get_rank()}").read_text())


class WritesNothing(LocalStorage):
    """A disk that must not be changed."""

    def _refuse(self, *args):
        raise AssertionError("only rank zero may change the disk")

    make_dir = write = flush_file = flush_dir = rename = remove_file = remove_dir = _refuse


def child(task, rank, folder, answers):
    """Run `task(folder, rank)` in a group of two and send back what came of it."""
    dist.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous"
    )
    try:
        answer = task(folder / "run", rank)
    except Exception as error:
        traceback.print_exc()
        answer = (type(error).__name__, str(error))
    answers.put((rank, answer))
    # Not before the other one: what it waits for must not be our end.
    (folder / f"done{rank}").touch()
    deadline = time.monotonic() + SECONDS
    while not (folder / f"done{1 - rank}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def entries(folder):
    """Return what is in a folder, but for the lock of who writes there."""
    return [name for name in os.listdir(folder) if name not in {".lock", "HISTORY.jsonl"}]


@pytest.fixture
def both(tmp_path):
    """A function that runs a task on two ranks and returns their two answers."""
    children = []

    def run(task):
        answers = context.Queue()
        for rank in range(2):
            started = context.Process(target=child, args=(task, rank, tmp_path, answers))
            started.start()
            children.append(started)
        got = dict(answers.get(timeout=2 * SECONDS if i == 0 else SECONDS) for i in range(2))
        return got[0], got[1]

    yield run
    for each in children:
        each.kill()
        each.join()
