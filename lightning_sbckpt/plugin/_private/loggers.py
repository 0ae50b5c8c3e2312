"""Loggers that upload checkpoints, `log_model=...`: they look for files alone, so folders are handed over here.

`_scan_checkpoints` of Lightning's loggers passes over what `Path.is_file()` denies. Whether a logger
uploads is known to its `_log_model`: True is for when training ends, "all" for after every save.
(The same in 2.4.0, 2.5.6 and 2.6.6.)
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from lightning_sbckpt.plugin.packages import Logger, MLFlowLogger, Trainer, WandbLogger

_KNOWN = (MLFlowLogger, WandbLogger)
_KEPT = "_checkpoint_callback"
"""The callback whose files a logger uploads when training ends: MLflow's, LitLogger's, W&B's before 2.5."""


def tell(logger: Logger, callback: object) -> None:
    """Tell a logger of a save; the callback whose files it will upload stays the one that it was."""
    kept = {name: value for name, value in vars(logger).items() if name == _KEPT}
    cast("Any", logger).after_save_checkpoint(callback)
    vars(logger).update(kept)


class Artifacts:
    """Hands checkpoint folders to loggers that upload checkpoints.

    Args:
        trainer: Has the loggers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loggers = [
            logger for logger in trainer.loggers if getattr(logger, "_log_model", None)
        ]
        self._uploaded: set[str] = set()

    def warnings(self) -> list[str]:
        """Return which loggers won't upload, a sentence each."""
        return [
            f"{type(logger).__name__}(log_model=...) uploads files, and checkpoints are folders here: it "
            "will upload none. Upload callback.best_model_path when the fit has ended"
            for logger in self._loggers
            if not isinstance(logger, _KNOWN)
        ]

    def upload(self, folders: Collection[str], best: str, *, ends: bool) -> None:
        """Upload the folders that are there and have not been; rank zero alone does.

        Args:
            folders: The checkpoints that are worth it.
            best: The best of them.
            ends: Whether training has ended.
        """
        waiting = [
            logger
            for logger in self._loggers
            if isinstance(logger, _KNOWN) and (ends or cast("Any", logger)._log_model == "all")
        ]
        for folder in folders if waiting else ():
            if folder in self._uploaded or not Path(folder).is_dir():
                continue
            aliases = ["latest", "best"] if folder == best else ["latest"]
            for logger in waiting:
                _upload(logger, Path(folder), aliases)
            self._uploaded.add(folder)


def _upload(logger: Logger, folder: Path, aliases: list[str]) -> None:
    experiment = cast("Any", logger).experiment
    if isinstance(logger, MLFlowLogger):
        experiment.log_artifact(logger.run_id, str(folder))
        return
    wandb = import_module("wandb")
    name = cast("Any", logger)._checkpoint_name or f"model-{experiment.id}"
    artifact = wandb.Artifact(name=name, type="model", metadata={"original_name": folder.name})
    artifact.add_dir(str(folder))
    experiment.log_artifact(artifact, aliases=aliases)
