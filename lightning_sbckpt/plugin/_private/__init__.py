"""Every private name of Lightning that this package touches, and nothing else.

Each with its reason and the versions in which it was seen.
"""

from lightning_sbckpt.plugin._private import (
    buffers,
    callbacks,
    compiled,
    ddp,
    finders,
    loading,
    logged,
    loggers,
    loops,
    spawn,
    strategies,
    trainer,
)

__all__ = [
    "buffers",
    "callbacks",
    "compiled",
    "ddp",
    "finders",
    "loading",
    "logged",
    "loggers",
    "loops",
    "spawn",
    "strategies",
    "trainer",
]
