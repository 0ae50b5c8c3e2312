"""The folder of a run: as it was given, or by the hyperparameters of the run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Formatter
from typing import Any

from lightning_sbckpt._remote.urls import is_url, normal_url
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.identity import hyperparameters_of
from lightning_sbckpt.plugin.packages import SaveConfigCallback, Trainer
from lightning_sbckpt.plugin.rendering import digest_of, rendered

ROOT = "default_root_dir"
_LONGEST = 100
DEFAULT = f"{{{ROOT}}}/checkpoints"


def folder(dirpath: str | os.PathLike[str] | None) -> Path | str:
    """Return the folder as an absolute path, or its URL: the working directory may change.

    A `{name}` in it stays until `place_of` is called.

    Raises:
        ConfigurationError: It is no path.

    Example:
        >>> folder("runs/digits").is_absolute()
        True
    """
    if dirpath is None:
        return DEFAULT
    if not isinstance(dirpath, (str, os.PathLike)):
        raise ConfigurationError(
            f"dirpath is {dirpath!r:.80}, expected a path or a URL, such as 'runs/digits', or a Store(...)"
        )
    text = os.fspath(dirpath)
    if is_url(text):
        return normal_url(text)
    if text.startswith(f"{{{ROOT}}}"):
        return text
    # Links stay as they are: the user may move them with what they point to.
    if _is_template(text):
        here = str(Path.cwd()).replace("{", "{{").replace("}", "}}")
        return Path(here) / os.path.expanduser(text)  # noqa: PTH111 - as in `absolute`
    return absolute(text)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return a path from the root, with `~` for the home folder of the user."""
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 - Path's raises without a home


def place_of(dirpath: Path | str, trainer: Trainer) -> Path | str:
    """Return the folder of a run, with each `{name}` replaced by the value of that hyperparameter.

    Those of the module come before those of the datamodule. `{hash}` is one of them all, and
    `{default_root_dir}` the Trainer's. A `{{` stands for a brace.

    Args:
        dirpath: What `folder` returned.
        trainer: Has the module and the datamodule.

    Raises:
        ConfigurationError: There is no such hyperparameter.
    """
    template = str(dirpath)
    if not _is_template(template):
        return folder(dirpath)
    module, datamodule = trainer.lightning_module, _private.trainer.datamodule_of(trainer)
    known = {**hyperparameters_of(datamodule), **hyperparameters_of(module)}
    whole = digest_of(sorted((name, rendered(value)) for name, value in known.items()))
    try:
        text = _Named().vformat(
            template, (), {ROOT: _Verbatim(trainer.default_root_dir), "hash": whole, **known}
        )
    except (LookupError, AttributeError, ValueError, TypeError) as error:
        names = ", ".join(map(str, known)) or "none: call self.save_hyperparameters() in the module"
        raise ConfigurationError(
            f"dirpath={template!r} can't be filled in ({error!r}): between braces stands the name of a "
            f"hyperparameter, and there are {names}; or hash, for one of them all, or {ROOT}. A brace "
            "that is meant as such is written twice"
        ) from error
    return normal_url(text) if is_url(text) else absolute(text)


def named(template: str, meta: Mapping[str, object]) -> str:
    """Return a name of a checkpoint by its meta, whatever that holds: a save never fails of it.

    Example:
        >>> named("{epoch:03d}-{val/acc:.2f}-{bleu:.1f}", {"epoch": 7, "val/acc": 0.5})
        '007-0.50-none'
    """
    return _ByMeta().vformat(template, (), meta)[:_LONGEST]


def next_start(trainer: Trainer, dirpath: Path | str) -> list[str]:
    """Return what keeps the same command from going on with a run, a sentence each.

    Args:
        trainer: Has the loggers and callbacks.
        dirpath: Where the checkpoints of the run are.
    """
    place = Path(dirpath)
    made_anew = {
        f"{folder}, and unless the logger is given its version": Path(folder).absolute()
        for logger in trainer.loggers
        if (folder := getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None))
        and _is_version(folder)
    }
    if folder := _timed_folder_of_hydra():
        made_anew[f"{folder}, which Hydra names by the time, and unless hydra.run.dir is set"] = (
            folder
        )
    moving = [
        f"{dirpath} lies in {which} there will be another at the next start, which won't find the "
        "checkpoints of this one. Use a folder that is the same from start to start, such as 'runs/name'"
        for which, folder in made_anew.items()
        if folder in (place, *place.parents)
    ]
    refusing = [
        f"the next start of this command will find {callback.config_filename} in {folder} and refuse to "
        'run: write LightningCLI(..., save_config_kwargs={"overwrite": True})'
        for callback in _private.trainer.callbacks_of(trainer)
        if isinstance(callback, SaveConfigCallback)
        and not callback.overwrite
        and getattr(callback, "save_to_log_dir", True)
        and (folder := trainer.log_dir) is not None
        and not _is_version(folder)
    ]
    return moving + refusing


def _is_version(folder: str | os.PathLike[str]) -> bool:
    return re.fullmatch(r"version_\d+", Path(folder).name) is not None


def _timed_folder_of_hydra() -> Path | None:
    """Return the folder of this job, if Hydra runs it and its name has the time in it."""
    module = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return None
    from omegaconf import OmegaConf

    config = module.HydraConfig.get()
    if OmegaConf.is_missing(config.runtime, "output_dir"):
        return None
    several = getattr(config.get("mode"), "name", None) == "MULTIRUN"
    # As it is written: `outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}`.
    written = OmegaConf.to_yaml(config.sweep if several else config.run)
    return Path(config.runtime.output_dir) if "${now:" in written else None


def _is_template(text: str) -> bool:
    return "{" in text or "}" in text


class _Verbatim(str):
    """What is a path already."""

    __slots__ = ()


class _Named(Formatter):
    """Fills in values as parts of a name: none makes another folder, or leaves the one it is in."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if isinstance(key, int):
            raise LookupError("{} has no name")
        return kwargs[key]

    def format_field(self, value: Any, format_spec: str) -> str:
        text = format(value, format_spec)
        if isinstance(value, _Verbatim):
            return text
        return re.sub(r"[^\w.+=@,-]+", "_", text).strip("._") or "_"


class _ByMeta(_Named):
    """Fills in keys of a meta, which may have dots in them, and be missing."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs.get(field_name), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        with suppress(ValueError, TypeError):
            return super().format_field("none" if value is None else value, format_spec)
        return super().format_field("none" if value is None else str(value), "")

    def vformat(self, format_string: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        text = super().vformat(format_string, args, kwargs)
        return re.sub(r"[^\w.+=@,-]+", "_", text, flags=re.ASCII)
