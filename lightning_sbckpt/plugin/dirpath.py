"""The folder of a run: as it was given, or by the hyperparameters of the run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from lightning_sbckpt._remote.urls import is_url, normal_url
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.identity import hyperparameters_of
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.plugin.rendering import digest_of, rendered

ROOT = "default_root_dir"
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
            f"dirpath is {dirpath!r:.80}, expected a path or a URL, such as 'runs/digits'"
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


def versioned(trainer: Trainer, dirpath: Path | str) -> list[str]:
    """Return, in a sentence, whether a folder lies in one that a logger makes anew at each start."""
    inside = [
        log_dir
        for logger in trainer.loggers
        if (log_dir := getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None))
        and re.fullmatch(r"version_\d+", Path(log_dir).name)
        and Path(log_dir).absolute() in (Path(dirpath), *Path(dirpath).parents)
    ]
    return [
        f"{dirpath} lies in {log_dir}, and unless the logger is given its version there will be another "
        "at the next start, which won't find the checkpoints of this one. Use a folder that is the same "
        "from start to start, such as 'runs/name'"
        for log_dir in inside[:1]
    ]


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
