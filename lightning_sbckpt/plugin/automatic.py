"""The callback that an administrator adds to every Trainer, by LIGHTNING_SBCKPT_DIR."""

from __future__ import annotations

from itertools import count
from string import Formatter

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.callback import SBCheckpoint
from lightning_sbckpt.plugin.packages import Checkpoint, LightningModule, Trainer

_trainers = count(1)
# What there is whatever the script.
_NAMES = {"hash", "default_root_dir", None}


def automatic(root: str) -> list[SBCheckpoint]:
    """Return the callback for a new Trainer; none if the folder can't be meant, which is said.

    Args:
        root: Where the folders of the Trainers are; may hold `{hash}` and `{default_root_dir}`.

    Example:
        >>> automatic("/scratch/me/{hash}")[0].dirpath.name
        'trainer-1'
    """
    try:
        unknown = {name for _, name, _, _ in Formatter().parse(root)} - _NAMES
        if unknown:
            raise ValueError(f"{', '.join(map(str, unknown))} is neither hash nor default_root_dir")  # noqa: TRY301
        return [Automatic(f"{root}/trainer-{next(_trainers)}")]
    except ValueError as error:
        rank_zero_warn(
            f"LIGHTNING_SBCKPT_DIR={root!r} can't be a folder, so nothing is saved: {error}"
        )
        return []


class Automatic(SBCheckpoint):
    """Saves and resumes runs whose scripts say nothing of it, and gives way to those that do.

    Each Trainer of a process has a folder of its own, by its number: the same script makes them in the
    same order. Another experiment than that of the folder begins anew. It does nothing beside the user's
    own `SBCheckpoint`, where checkpointing is off, and where it can't work, which it says.
    """

    def __init__(self, dirpath: str) -> None:
        super().__init__(
            dirpath, train_time_interval="10 min", restore_best=False, on_change="restart"
        )

    def gives_way(self, trainer: Trainer) -> bool:
        """Return whether the user has a callback of ours, or wants no checkpoints."""
        others = [
            each
            for each in _private.trainer.callbacks_of(trainer)
            if isinstance(each, Checkpoint) and each is not self
        ]
        return not others or any(isinstance(each, SBCheckpoint) for each in others)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in a fit unless it gives way, or can't work."""
        if stage == "fit" and self.gives_way(trainer):
            return
        try:
            super().setup(trainer, pl_module, stage)
        except ConfigurationError as error:
            rank_zero_warn(f"LIGHTNING_SBCKPT_DIR is set, but this run is not saved: {error}")
