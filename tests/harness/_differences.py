"""What the tests of differences between checkpoints have in common."""

from __future__ import annotations

import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.difference import diff


class State:
    """A recoverable with any state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def saver(folder):
    """Return a function that saves states, by name, and returns the checkpoint."""
    numbers = iter(range(100))

    def save(meta=None, **states):
        checkpointer = Checkpointer(folder, {name: State(s) for name, s in states.items()})
        return checkpointer.save_checkpoint(meta, name=str(next(numbers)))

    return save


def comparer(save):
    """Return a function that saves two states as models and returns what differs in that file."""

    def compare(before, after, **options):
        (file,) = diff(save(model=before), save(model=after), **options).files
        return file

    return compare


def one_change(file):
    (change,) = file.changed
    return change


def numbers(dtype, *values):
    return torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype))
