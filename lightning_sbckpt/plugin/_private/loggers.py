"""Loggers that upload checkpoints, `log_model=...`: they look for files alone, so folders are handed over here.

`_scan_checkpoints` of Lightning's loggers passes over what `Path.is_file()` denies. Whether a logger
uploads is known to its `_log_model`: True is for when training ends, "all" for after every save.
(The same in 2.4.0, 2.5.6 and 2.6.6.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_sbckpt._io.background import Background
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
        self._trainer = trainer
        self._uploaded: set[str] = set()
        self._background = Background("upload")

    def warnings(self) -> list[str]:
        """Return which loggers won't upload, a sentence each."""
        return [
            f"{type(logger).__name__}(log_model=...) uploads files, and checkpoints are folders here: it "
            "will upload none. Upload callback.best_model_path when the fit has ended"
            for logger in self._loggers
            if not isinstance(logger, _KNOWN)
        ]

    def upload(
        self,
        folders: Mapping[str, float | None],
        best: str,
        last: str,
        busy: set[Path],
        *,
        ends: bool,
    ) -> None:
        """Upload the folders that are there and have not been, in the background; rank zero alone does.

        Args:
            folders: The checkpoints that are worth it, with the values that they are judged by.
            best: The best of them.
            last: The newest of them.
            busy: What is being uploaded, which must stay meanwhile.
            ends: Whether training has ended; then all is uploaded on return.
        """
        waiting = [
            logger
            for logger in self._loggers
            if isinstance(logger, _KNOWN) and (ends or cast("Any", logger)._log_model == "all")
        ]
        for folder, score in folders.items() if waiting else ():
            path = Path(folder)
            if folder in self._uploaded or not path.is_dir():
                continue
            self._uploaded.add(folder)
            aliases = ["latest", "best"] if folder == best else ["latest"]
            metadata = {"original_name": path.name, "score": score, "aliases": aliases}
            busy.add(path)
            self._background.submit(partial(self._upload, waiting, path, metadata, busy))
        if ends:
            self._background.wait()
            self._refer({"checkpoint/best": best, "checkpoint/last": last})

    @staticmethod
    def _upload(
        loggers: Sequence[Logger], folder: Path, metadata: dict[str, Any], busy: set[Path]
    ) -> None:
        try:
            for logger in loggers:
                _upload(logger, folder, metadata)
        except Exception as error:  # Of a service; the checkpoint itself is whole.
            rank_zero_warn(
                f"SBCheckpoint: {folder} was not uploaded ({type(error).__name__}: {error})"
            )
        finally:
            busy.discard(folder)

    def _refer(self, places: Mapping[str, str]) -> None:
        """Tell services where the checkpoints are that were not uploaded."""
        for logger in self._trainer.loggers:
            service: Any = logger
            if not isinstance(logger, _KNOWN) or service._log_model:
                continue
            with suppress(Exception):  # Of a service, and for convenience only.
                if isinstance(logger, MLFlowLogger):
                    for name, place in places.items():
                        service.experiment.set_tag(service.run_id, name, place)
                else:
                    service.experiment.summary.update(places)


def _upload(logger: Logger, folder: Path, metadata: dict[str, Any]) -> None:
    experiment = cast("Any", logger).experiment
    if isinstance(logger, MLFlowLogger):
        experiment.log_artifact(logger.run_id, str(folder))
        experiment.log_dict(logger.run_id, metadata, f"{folder.name}/metadata.yaml")
        return
    wandb = import_module("wandb")
    name = cast("Any", logger)._checkpoint_name or f"model-{experiment.id}"
    artifact = wandb.Artifact(name=name, type="model", metadata=metadata)
    artifact.add_dir(str(folder))
    experiment.log_artifact(artifact, aliases=metadata["aliases"])
