"""Small objects to save and load, for the tests of SpeechBrain's behaviours and faults."""

from __future__ import annotations

from pathlib import Path


class Plain:
    """An object with a number, for which no hook is registered."""

    def __init__(self, number=0):
        self.number = number
        self.end_of_epoch = None


def write_number(obj, path):
    """Save the number as text."""
    Path(path).write_text(str(obj.number))


def read_number(obj, path, end_of_epoch):
    """Load the number, and remember `end_of_epoch`."""
    obj.number = int(Path(path).read_text())
    obj.end_of_epoch = end_of_epoch


def make_counter_class(api, **register):
    """Return a new class with a number, whose own methods are registered as hooks."""

    class Counter(Plain):
        @api.mark_as_saver
        def save(self, path):
            write_number(self, path)

        @api.mark_as_loader
        def load(self, path, end_of_epoch):
            read_number(self, path, end_of_epoch)

    return api.register_checkpoint_hooks(Counter, **register)


def save_losses(checkpointer, losses):
    """Save one checkpoint per loss and return them in this order."""
    return [checkpointer.save_checkpoint(meta={"loss": loss}) for loss in losses]
