"""SpeechBrain's checkpointing for PyTorch and Lightning, exact and crash-safe.

The core (`Checkpointer` and what is beside it) needs torch alone; `SBCheckpoint` is the callback for
Lightning. Each is imported when it is first asked for, and Lightning never: its Trainers and modules
take checkpoint folders as soon as a script has imported both.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lightning_sbckpt.plugin.packages import when_loaded

if TYPE_CHECKING:
    from lightning_sbckpt._format.load import trusting_pickle
    from lightning_sbckpt.averaging import average_checkpoints, average_state_dicts
    from lightning_sbckpt.checkpointer import Checkpointer
    from lightning_sbckpt.epoch import EpochCounter, EpochCounterWithStopper
    from lightning_sbckpt.errors import SBCheckpointError
    from lightning_sbckpt.hooks import (
        DEFAULT_LOAD_HOOKS,
        DEFAULT_SAVE_HOOKS,
        DEFAULT_TRANSFER_HOOKS,
        get_default_hook,
        mark_as_loader,
        mark_as_saver,
        mark_as_transfer,
        register_checkpoint_hooks,
    )
    from lightning_sbckpt.hooks.builtin import torch_parameter_transfer, torch_recovery, torch_save
    from lightning_sbckpt.meta import Checkpoint, ckpt_recency
    from lightning_sbckpt.plugin.callback import SBCheckpoint
    from lightning_sbckpt.plugin.policies import ResumePolicy, SavePolicy, Store
    from lightning_sbckpt.plugin.preemption import Preempted, Preemption
    from lightning_sbckpt.plugin.selftest import assert_resume_exact
    from lightning_sbckpt.transfer import Pretrainer

__all__ = [
    "DEFAULT_LOAD_HOOKS",
    "DEFAULT_SAVE_HOOKS",
    "DEFAULT_TRANSFER_HOOKS",
    "Checkpoint",
    "Checkpointer",
    "EpochCounter",
    "EpochCounterWithStopper",
    "Preempted",
    "Preemption",
    "Pretrainer",
    "ResumePolicy",
    "SBCheckpoint",
    "SBCheckpointError",
    "SavePolicy",
    "Store",
    "assert_resume_exact",
    "average_checkpoints",
    "average_state_dicts",
    "ckpt_recency",
    "get_default_hook",
    "mark_as_loader",
    "mark_as_saver",
    "mark_as_transfer",
    "register_checkpoint_hooks",
    "torch_parameter_transfer",
    "torch_recovery",
    "torch_save",
    "trusting_pickle",
]

__version__ = "0.1.0"


# Where each name is from: a name is imported when it is first asked for, so that the command, which
# needs few of them, starts at once.
_HOMES = {
    "_format.load": ("trusting_pickle",),
    "averaging": ("average_checkpoints", "average_state_dicts"),
    "checkpointer": ("Checkpointer",),
    "epoch": ("EpochCounter", "EpochCounterWithStopper"),
    "errors": ("SBCheckpointError",),
    "hooks": (
        "DEFAULT_LOAD_HOOKS",
        "DEFAULT_SAVE_HOOKS",
        "DEFAULT_TRANSFER_HOOKS",
        "get_default_hook",
        "mark_as_loader",
        "mark_as_saver",
        "mark_as_transfer",
        "register_checkpoint_hooks",
    ),
    "hooks.builtin": ("torch_parameter_transfer", "torch_recovery", "torch_save"),
    "meta": ("Checkpoint", "ckpt_recency"),
    "plugin.callback": ("SBCheckpoint",),
    "plugin.policies": ("ResumePolicy", "SavePolicy", "Store"),
    "plugin.preemption": ("Preempted", "Preemption"),
    "plugin.selftest": ("assert_resume_exact",),
    "transfer": ("Pretrainer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    # Its modules, as in `lightning_sbckpt.hooks`, without an import of their own.
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _join(package: str) -> None:
    from lightning_sbckpt.plugin.callback import join

    join(package)


when_loaded(_join)
