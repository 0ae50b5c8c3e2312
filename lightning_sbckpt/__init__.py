"""SpeechBrain's checkpointing for PyTorch and Lightning, exact and crash-safe.

The core (`Checkpointer` and what is beside it) needs torch alone. `SBCheckpoint`, the Lightning
callback, and `assert_resume_exact` are imported when first asked for. Lightning is not imported here:
its Trainers and modules take checkpoint folders as soon as a script has imported both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from lightning_sbckpt.plugin.packages import when_loaded
from lightning_sbckpt.transfer import Pretrainer

if TYPE_CHECKING:
    from lightning_sbckpt.plugin.callback import SBCheckpoint
    from lightning_sbckpt.plugin.preemption import Preempted, Preemption
    from lightning_sbckpt.plugin.selftest import assert_resume_exact

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
    "SBCheckpoint",
    "SBCheckpointError",
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


def __getattr__(name: str) -> object:
    if name == "SBCheckpoint":
        from lightning_sbckpt.plugin.callback import SBCheckpoint

        return SBCheckpoint
    if name in ("Preempted", "Preemption"):
        from lightning_sbckpt.plugin import preemption

        return getattr(preemption, name)
    if name == "assert_resume_exact":
        from lightning_sbckpt.plugin.selftest import assert_resume_exact

        return assert_resume_exact
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _join(package: str) -> None:
    from lightning_sbckpt.plugin.callback import join

    join(package)


when_loaded(_join)
