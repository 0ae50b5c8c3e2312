"""What tests of saves in the background by several ranks share."""

from __future__ import annotations

import os
import threading

from _sharded_ranks import whole

from lightning_sbckpt._io.storage import LocalStorage


def visible(folder):
    """Return the names of the checkpoints in a folder."""
    return sorted(name for name in os.listdir(folder) if name.startswith("CKPT"))


def staged(folder):
    """Return what is left of checkpoints on their way."""
    return [name for name in os.listdir(folder) if name.startswith(".staging")]


def states_of(model, optimizer):
    """Return the states as a whole; every rank calls this."""
    return whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


class BusyOn(LocalStorage):
    """Does something in the background before one operation on one kind of file."""

    def __init__(self, operation, ending, act):
        self.operation, self.ending, self.act = operation, ending, act

    def before(self, operation, path, target=None):
        """Do it if this is the one."""
        in_background = threading.current_thread().name == "sbckpt-writer"
        if in_background and operation == self.operation and path.name.endswith(self.ending):
            self.act()


def full():
    """Fail as a disk without room does."""
    raise OSError(28, "No space left on device")
