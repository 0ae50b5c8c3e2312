"""Opening the folder of a run, and refusing at once what can't work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_sbckpt._format.keys import share_with_ranks
from lightning_sbckpt._save.saver import SavePolicy
from lightning_sbckpt.checkpointer import Checkpointer
from lightning_sbckpt.errors import ConfigurationError, FolderInUseError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.typing import Access, World


def open_checkpointer(
    dirpath: Path | str,
    world: World,
    policy: SavePolicy,
    *,
    trust_pickle: bool,
    link_unchanged: bool,
    when_in_use: str,
    local_dir: str | Path | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> Checkpointer:
    """Return the checkpointer of a run, to which the folder belongs from now on.

    Args:
        dirpath: The folder, or its URL.
        world: The ranks.
        policy: How saves go on.
        trust_pickle: See `Checkpointer`.
        link_unchanged: See `Checkpointer`.
        when_in_use: If another process writes there: `"raise"`, or `"read"`.
        local_dir: See `Checkpointer`.
        storage_options: See `Checkpointer`.

    Raises:
        FolderInUseError: Another process writes there.
    """

    def opened(access: Access) -> Checkpointer:
        return Checkpointer(
            dirpath,
            world=world,
            trust_pickle=trust_pickle,
            save_mode=policy.mode,
            on_save_error=policy.on_error,
            when_busy=policy.when_busy,
            link_unchanged=link_unchanged,
            access=access,
            local_dir=local_dir,
            storage_options=storage_options,
        )

    share_with_ranks(world)
    checkpointer = opened("exclusive")
    try:
        # Now, and not at the first save: hours may have gone by until then.
        checkpointer.claim()
    except FolderInUseError as error:
        if when_in_use == "raise":
            raise
        rank_zero_warn(f"SBCheckpoint: nothing of this run will be saved: {error}")
        return opened("read")
    return checkpointer


def refuse_what_cannot_work(trainer: Trainer, folders: Sequence[Path | str]) -> None:
    """Refuse a Trainer with which no checkpoint would come about.

    Args:
        trainer: Is about to fit.
        folders: Of its SBCheckpoint callbacks.

    Raises:
        ConfigurationError: There are several callbacks, or the strategy has a format of its own.
    """
    if len(folders) > 1:
        raise ConfigurationError(
            f"the Trainer has {len(folders)} SBCheckpoint callbacks, on "
            f"{', '.join(map(str, folders))}: one run has one place to resume from. Use one, with "
            "more rules in keep=[...]"
        )
    strategy = trainer.strategy
    if _private.strategies.shards_the_model(strategy):
        return
    if _private.trainer.has_own_checkpoint_format(strategy):
        raise ConfigurationError(
            f"{type(strategy).__name__} writes checkpoints in a format of its own, which "
            "SBCheckpoint can't divide into files. Use ModelParallelStrategy or FSDPStrategy to shard "
            "the model, a strategy that holds the whole model on each rank, or Lightning's "
            "ModelCheckpoint"
        )
