"""The logs of a run: a fit that goes on from a checkpoint goes on in them, from where they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_sbckpt._format.yaml import dump_yaml, parse_yaml
from lightning_sbckpt._io.open_regular import NotRegularError, read_regular
from lightning_sbckpt._io.records import bring_file
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.history import read_history
from lightning_sbckpt._remote.urls import is_url
from lightning_sbckpt.errors import MetaError, SBCheckpointError
from lightning_sbckpt.folder import CheckpointFolder
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.log_runs import LogRun, kind_of
from lightning_sbckpt.plugin.packages import Logger, Trainer
from lightning_sbckpt.plugin.state.parts import is_resumable

LOGGERS_YAML = "loggers.yaml"
_BEGUN = f".{LOGGERS_YAML}"
"""The same of a run that has no checkpoint yet, in its folder; removed when it has one."""
_MOST_BYTES = 1 << 20

_joined: WeakKeyDictionary[Logger, LogRun] = WeakKeyDictionary()
"""The loggers of this process that write a run which an earlier process has begun, or a fit before."""
_trained: WeakKeyDictionary[Logger, int] = WeakKeyDictionary()
"""How many steps had been trained when a fit of this process left a logger."""


def join_logs(trainer: Trainer, folder: CheckpointFolder, given: object = None) -> None:
    """Have a Trainer's loggers write the run whose newest checkpoint is in a folder.

    Nothing is said of what prevents it, nor raised: the fit says it.

    Args:
        trainer: Its loggers have not been asked for anything yet, if that can be.
        folder: The folder.
        given: The checkpoint that the fit is to go on from, if it is known.
    """
    newest = _newest(folder)
    if given is not None and (newest is None or folder.folder_of(str(given)) != newest.path):
        leave_logs(trainer)
        return
    noted_in = folder.checkpoints_dir / _BEGUN if newest is None else newest.path / LOGGERS_YAML
    for logger, noted in _pairs(trainer, _read(noted_in, folder)):
        if noted is None:
            continue
        # Whatever a logger of somebody's own lacks, or its service answers, the fit says it.
        with suppress(Exception):
            run = _joined.get(logger) or _run_of(logger)
            if run is not None and not run.join(noted):
                _joined[logger] = run


def leave_logs(trainer: Trainer) -> None:
    """Have a Trainer's loggers that were joined write the run that they would have written."""
    for logger in trainer.loggers:
        if logger in _joined and logger not in _trained:
            _joined.pop(logger).leave()


def follow_logs(package: str, folder_of: Callable[[Trainer], CheckpointFolder | None]) -> None:
    """Have every Trainer's loggers write the run that its fit will go on from.

    A script may ask a logger for its folder, or log hyperparameters, before it fits, so they are joined
    when a Trainer is made; where the folder isn't known by then, or in a store, when it fits.

    Args:
        package: Whose Trainers.
        folder_of: Returns the folder of a Trainer's checkpoints; None if nothing resumes from it.
    """

    def made(trainer: Trainer) -> None:
        with suppress(SBCheckpointError, OSError):
            folder = folder_of(trainer)
            if folder is not None and folder.url is None:
                join_logs(trainer, folder)

    def runs(trainer: Trainer, given: object, method: str) -> object:
        folder = folder_of(trainer) if method == "fit" else None
        if folder is None:
            leave_logs(trainer)
        else:
            with suppress(SBCheckpointError, OSError):  # The fit meets it, too, and says it.
                join_logs(trainer, folder, given)
        return given

    _private.trainer.when_loggers_are_given(package, made)
    _private.trainer.let_words_be_paths(package, runs)


class Logs:
    """The loggers of one fit.

    Args:
        trainer: Has them.
        log_saves: Whether they are told of each save.
    """

    def __init__(self, trainer: Trainer, *, log_saves: bool) -> None:
        self._trainer = trainer
        self._log_saves = log_saves
        self._logged_until = time.time()
        self._runs: list[LogRun] = []
        self._folder: CheckpointFolder | None = None
        self._begun: Path | None = None
        self._waits = trainer.is_global_zero

    def begin(
        self, checkpoint: Checkpoint | None, folder: CheckpointFolder, *, explicit: bool
    ) -> list[str]:
        """Take back what was logged after a checkpoint, now that the fit goes on from it.

        Args:
            checkpoint: The checkpoint; None if the run begins anew.
            folder: The folder of the run.
            explicit: Whether the user named the checkpoint.

        Returns:
            Which logs go on, a line each.
        """
        trainer = self._trainer
        self._folder = folder
        self._begun = folder.checkpoints_dir / _BEGUN
        if not trainer.is_global_zero:
            return []
        with folder.as_known():
            newest = _newest(folder)
        if folder.access == "read":
            known = []  # Another process writes this run, and its log.
        elif checkpoint is None:
            # A run that was killed before its first checkpoint begins anew in its own log.
            known = [] if newest else _read(self._begun, folder)
        elif explicit and (newest is None or newest.path != checkpoint.path):
            known = []
            if trainer.loggers:
                rank_zero_info(
                    "SBCheckpoint: this fit goes on from an older checkpoint, so what was logged after it "
                    "stays, and the loggers begin a run of their own"
                )
        else:
            known = _read(checkpoint.path / LOGGERS_YAML, folder)
        if not known:
            leave_logs(trainer)
        lines = []
        step = None if checkpoint is None else checkpoint.meta.get("global_step")
        for logger, noted in _pairs(trainer, known):
            try:
                why = self._take_up(logger, noted, step)
            except Exception as error:  # Of a logger of somebody's own, or of its service.
                why = f"{type(error).__name__}: {error}"
                _joined.pop(logger, None)
            if why:
                rank_zero_warn(
                    f"SBCheckpoint: {type(logger).__name__} does not go on in the log of the run: {why}"
                )
            elif noted and logger in _joined:
                lines.append(f"the log goes on: {_joined[logger]}")
        if checkpoint is None and self._runs and folder.access != "read":
            LocalStorage().replace(self._begun, self._text(has_hyperparameters=False).encode())
        return lines

    def _take_up(self, logger: Logger, noted: Mapping[str, Any] | None, step: object) -> str:
        """Have a logger go on where it was at a step; return what prevents it, or nothing."""
        run = _joined.get(logger) or _run_of(logger)
        if run is None:
            return ""
        why = "" if noted is None else run.join(noted)
        run.watch()
        _joined[logger] = run
        self._runs.append(run)
        if noted is None or why or (logger in _trained and _trained[logger] == step):
            return why
        return run.cut(noted)

    def _text(self, **more: bool) -> str:
        noted = []
        for logger in self._trainer.loggers:
            try:
                if logger in _joined:
                    noted.append({"kind": type(logger).__name__, **_joined[logger].note(), **more})
            except Exception as error:  # As above; a checkpoint is worth more than its log.
                _joined.pop(logger)
                rank_zero_warn(
                    f"SBCheckpoint: where {type(logger).__name__} is can't be noted, so a restart won't go on "
                    f"in its log ({type(error).__name__}: {error})"
                )
        assert self._folder is not None  # Nothing is noted before the fit has begun.
        return dump_yaml({"folder": _name_of(self._folder), "loggers": noted})

    def extra_files(self) -> dict[str, str]:
        """Return which run each logger writes and how far it is, as a file of a checkpoint."""
        return {LOGGERS_YAML: self._text()} if self._runs else {}

    def saved(self) -> None:
        """Note that there is a checkpoint, which says it itself, and log it if that is wanted."""
        if self._begun is None or not self._trainer.is_global_zero:
            return
        if self._waits and self._folder is not None and self._folder.access != "read":
            LocalStorage().remove_file(self._begun)
            self._waits = False
        if not self._log_saves:
            return
        for entry in read_history(self._begun.parent):
            if entry["event"] != "saved" or entry["time"] <= self._logged_until:
                continue
            self._logged_until = entry["time"]
            numbers = {f"checkpoint/{name}": float(entry[name]) for name in ("seconds", "bytes")}
            step = entry["meta"].get("global_step")
            for logger in self._trainer.loggers:
                if logger in _joined and isinstance(step, int):
                    _joined[logger].tell(entry["name"], numbers, step)

    def end(self) -> None:
        """Leave the loggers as they were, in the run that they write."""
        if self._begun is None:
            leave_logs(self._trainer)
            return
        for logger in self._trainer.loggers:
            _trained[logger] = self._trainer.global_step
        while self._runs:
            self._runs.pop().undo()


def unknown_loggers(trainer: Trainer) -> list[str]:
    """Return which loggers a resumed run can't go on in, a sentence each."""
    return [
        f"{type(logger).__name__} is a logger whose log can't be joined: after a restart it holds what it "
        "logs then, and twice what was trained twice"
        for logger in trainer.loggers
        if kind_of(logger) is None and type(logger).__name__ != "DummyLogger"
    ]


def _run_of(logger: Logger) -> LogRun | None:
    kind = kind_of(logger)
    return None if kind is None else kind(logger)


def _newest(folder: CheckpointFolder) -> Checkpoint | None:
    found = [each for each in folder.list_checkpoints() if is_resumable(each)]
    return max(found, key=ckpt_recency, default=None)


def _name_of(folder: CheckpointFolder) -> str:
    return folder.url or str(folder.checkpoints_dir)


def _is_copied(noted_in: object, folder: CheckpointFolder) -> bool:
    """Return whether what was noted is of another folder, which is still there and has the log."""
    if folder.url is not None or is_url(noted_in):
        return noted_in != folder.url
    try:
        return not Path(str(noted_in)).samefile(folder.checkpoints_dir)
    except (OSError, ValueError):
        return False  # The folder was moved.


def _read(path: Path, folder: CheckpointFolder) -> list[Mapping[str, Any]]:
    """Return what was noted of the loggers, unless in the folder that this one is a copy of."""
    try:
        bring_file(path)
        told = parse_yaml(read_regular(path, _MOST_BYTES), path)
    except (OSError, NotRegularError, MetaError):
        return []  # An earlier release, or SpeechBrain, has saved it.
    if _is_copied(told.get("folder"), folder):
        return []
    loggers = told.get("loggers")
    return [each for each in loggers if isinstance(each, dict)] if isinstance(loggers, list) else []


def _pairs(
    trainer: Trainer, noted: Sequence[Mapping[str, Any]]
) -> list[tuple[Logger, Mapping[str, Any] | None]]:
    """Return each logger with what was noted of it: the first of a kind with the first, and so on."""
    left = list(noted)
    pairs: list[tuple[Logger, Mapping[str, Any] | None]] = []
    for logger in trainer.loggers:
        kind = type(logger).__name__
        found = next((each for each in left if each.get("kind") == kind), None)
        if found is not None:
            left.remove(found)
        pairs.append((logger, found))
    return pairs
