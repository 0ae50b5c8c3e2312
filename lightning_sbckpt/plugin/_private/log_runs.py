"""The runs that Lightning's loggers write: noted with a checkpoint, joined and cut when it is resumed.

A logger keeps which run it writes in private attributes: `_version` of the loggers of CSV and TensorBoard,
`_run_id` of MLflow's, `_wandb_init` of W&B's; and what it writes with in `_experiment`, which is None until
somebody asks for it. (The same in 2.4.0, 2.5.6 and 2.6.6.)
"""

from __future__ import annotations

import csv
import io
import math
import struct
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from lightning_sbckpt._io.open_regular import NotRegularError, open_to_read, read_regular
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt.plugin._private.trainer import Undo, wrap
from lightning_sbckpt.plugin.packages import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
    fabric_of,
)

Noted = Mapping[str, Any]
"""What a checkpoint says of a logger: its kind, its name, its run, and how far that was."""

_MARK = ".lightning_sbckpt"
"""The file in a logger's folder that holds the id of its run."""
_EVIDENCE = 32
"""So many bytes before the place at which a file is cut are compared with what was noted of them."""


class LogRun(ABC):
    """The run of one logger.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = cast("Any", logger)
        self._undo: list[Undo] = []

    def watch(self) -> None:  # noqa: B027 - most lose nothing
        """Begin to keep what the logger itself may lose, before anything is logged."""

    @abstractmethod
    def note(self) -> dict[str, Any]:
        """Write out what was logged; return which run it is, and how far it is."""

    @abstractmethod
    def join(self, noted: Noted) -> str:
        """Have the logger write a run that was noted; return why it can't, or nothing.

        Nothing is opened that changes a file.
        """

    @abstractmethod
    def leave(self) -> None:
        """Have the logger write the run that it would have written."""

    @abstractmethod
    def cut(self, noted: Noted) -> str:
        """Take back what was logged later than was noted; return what prevents it, or nothing."""

    def tell(self, name: str, numbers: dict[str, float], step: int) -> None:
        """Log what is known of a checkpoint."""
        self._logger.log_metrics({**numbers, "checkpoint/name": name}, step)

    def undo(self) -> None:
        """Leave the logger as it was, at the end of a fit."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        """Return which run it is."""
        return f"{type(self._logger).__name__} in {self._logger.log_dir}"


def kind_of(logger: Logger) -> type[LogRun] | None:
    """Return the kind of run that a logger writes, or None if it can't be joined."""
    kinds: list[tuple[type, type[LogRun]]] = [
        (CSVLogger, _CSV),
        (TensorBoardLogger, _TensorBoard),
        (MLFlowLogger, _MLflow),
        (WandbLogger, _Wandb),
    ]
    return next((run for kind, run in kinds if isinstance(logger, kind)), None)


# ---------------------------------------------------------------------- folders with a version


class _Version:
    """The folder of a logger that gives each run a version."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._before = logger._version

    @property
    def noted(self) -> dict[str, Any]:
        return {
            "name": self._logger.name,
            "version": self._logger.version,
            "mark": self._mark or self._make_mark(),
        }

    @property
    def _mark(self) -> str:
        """What stands in the folder, so that no other run's is taken for it that has its number."""
        with suppress(OSError, NotRegularError):
            return read_regular(self.folder / _MARK, 64).decode(errors="replace")
        return ""

    def _make_mark(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _MARK).write_text(mark := uuid.uuid4().hex)
        return mark

    @property
    def folder(self) -> Path:
        return Path(self._logger.log_dir)

    def join(self, noted: Noted) -> str:
        logger, version = self._logger, noted.get("version")
        if noted.get("name") != logger.name:
            return f"it is called {logger.name!r} now"
        if type(version) is not int and not (
            isinstance(version, str) and version not in ("", ".", "..") and "/" not in version
        ):
            return f"{version!r:.80} is no version"
        given = logger._version
        if given != version:
            if isinstance(given, str):
                return f"it is given version={given!r}"
            if logger._experiment is not None:
                return (
                    f"it was opened in {logger.log_dir} before the Trainer was made; give it "
                    f"version={version!r}, or ask it for nothing before"
                )
            # A number whose folder isn't there yet is the next one, which somebody has asked for.
            if given is not None and self.folder.exists():
                return f"it is given version={given!r}"
        logger._version = version
        if self._mark and self._mark == noted.get("mark"):
            return ""
        folder = self.folder
        logger._version = given
        return f"{folder} is gone, or another run's"

    def leave(self) -> None:
        self._logger._experiment = None
        self._logger._version = self._before


def _replace(path: Path, data: bytes) -> None:
    if data:
        LocalStorage().replace(path, data)
    else:
        path.unlink()


def _end_of(path: Path, size: int) -> str:
    with open_to_read(path) as file:
        file.seek(max(0, size - _EVIDENCE))
        return file.read(min(size, _EVIDENCE)).hex()


class _CSV(LogRun):
    """`metrics.csv`, which `_ExperimentWriter` writes anew with all rows when a column comes to it.

    `_check_log_dir_exists` would delete it when it is opened again; `metrics_keys` are its columns.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        self._version = _Version(self._logger)
        self._counted: tuple[int, int, tuple[str, ...]] = 0, 0, ()

    @property
    def _path(self) -> Path:
        return self._version.folder / "metrics.csv"

    def note(self) -> dict[str, Any]:
        self._logger.save()
        columns, size = tuple(self._logger.experiment.metrics_keys), 0
        if self._path.exists():
            size = self._path.stat().st_size
        rows = self._rows(columns, size)
        end = _end_of(self._path, size) if size else ""
        return {
            **self._version.noted,
            "columns": [*columns],
            "rows": rows,
            "size": size,
            "end": end,
        }

    def _rows(self, columns: tuple[str, ...], size: int) -> int:
        """Count the rows; of those that were counted before only how many they are is used."""
        rows, start, same = self._counted
        if columns != same or start > size:
            rows, start = -1, 0  # The header is no row.
        if size:
            with self._path.open(newline="", encoding="utf-8") as file:
                file.seek(start)
                rows += sum(1 for _ in csv.reader(file))
        rows = max(rows, 0)
        self._counted = rows, size, columns
        return rows

    def join(self, noted: Noted) -> str:
        if why := self._version.join(noted):
            return why
        logger = self._logger
        if logger._experiment is None:
            # What opens it next finds it open, and so nothing is deleted.
            writer = self._writer_class.__new__(self._writer_class)
            writer._check_log_dir_exists = lambda: None
            writer.__init__(log_dir=logger.log_dir)
            del writer._check_log_dir_exists
            with suppress(OSError, ValueError), self._path.open(newline="") as file:
                writer.metrics_keys = next(csv.reader(file), [])
            logger._experiment = writer
        return ""

    @property
    def _writer_class(self) -> Any:
        module = next(
            kind.__module__ for kind in type(self._logger).__mro__ if kind.__name__ == "CSVLogger"
        )
        return import_module(module).ExperimentWriter

    def leave(self) -> None:
        self._version.leave()

    def cut(self, noted: Noted) -> str:
        if not self._path.exists():
            return "" if not noted["rows"] else f"{self._path} is gone"
        columns = [str(each) for each in noted["columns"]]
        with self._path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            places = [header.index(each) for each in columns if each in header]
            text = io.StringIO(newline="")
            writer = csv.writer(text)
            if columns:
                writer.writerow(columns)
            for _, row in zip(range(noted["rows"]), reader, strict=False):
                writer.writerow([row[place] for place in places])
        data = text.getvalue().encode()
        if len(data) != noted["size"] or not data.endswith(bytes.fromhex(noted["end"])):
            return f"{self._path} does not begin with what had been logged"
        if self._path.stat().st_size != len(data):
            _replace(self._path, data)
        experiment = self._logger.experiment
        experiment.metrics, experiment.metrics_keys = [], columns
        return ""


class _TensorBoard(LogRun):
    """Files of events, one of each start, which TensorBoard reads one after the other.

    They are cut where they ended at the save. A TensorBoard that is running has read more by then: the
    event that `purge_step` writes has it forget all later steps.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        self._version = _Version(self._logger)
        self._there: set[str] = set()

    def note(self) -> dict[str, Any]:
        self._logger.experiment.flush()
        files = {}
        for name in sorted(self._files()):
            path = self._version.folder / name
            size = path.stat().st_size
            files[name] = {"size": size, "end": _end_of(path, size)}
        return {**self._version.noted, "files": files}

    def _files(self) -> set[str]:
        folder = self._version.folder
        found = folder.rglob("events.out.tfevents.*") if folder.is_dir() else ()
        return {str(path.relative_to(folder)) for path in found if path.is_file()}

    def join(self, noted: Noted) -> str:
        why = self._version.join(noted)
        if not why and self._logger._experiment is None:
            self._there = self._files()
        return why

    def leave(self) -> None:
        if self._logger._experiment is not None:
            self._logger._experiment.close()
            for name in self._files() - self._there:
                (self._version.folder / name).unlink()
        self._version.leave()

    def cut(self, noted: Noted) -> str:
        folder, logger = self._version.folder, self._logger
        writer = logger.experiment
        writer.flush()
        files, kept = noted["files"], {}
        for name, at in files.items():
            path = folder / name
            data = path.read_bytes() if name in self._files() else b""
            if len(data) < at["size"] or not data[: at["size"]].endswith(bytes.fromhex(at["end"])):
                return f"{path} does not begin with what had been logged"
            kept[path] = data[: at["size"]], len(data)
        last = max((_last_step(data) for data, _ in kept.values()), default=-1)
        own = {name for name in self._files() if name not in self._there}
        opened_before = bool(own & files.keys())
        if opened_before:
            writer.close()  # It is in the middle of one of them, and begins another.
        for path, (data, size) in kept.items():
            if size > len(data):
                _replace(path, data)
        for name in self._there - files.keys():
            (folder / name).unlink(missing_ok=True)
        _forget_later_steps(writer, last + 1)
        if noted.get("has_hyperparameters", True):
            self._undo = [
                wrap(logger, "log_hyperparams", _without_metrics),
                wrap(logger, "log_graph", lambda *_, **__: None),
            ]
        return ""

    def tell(self, name: str, numbers: dict[str, float], step: int) -> None:
        self._logger.log_metrics(numbers, step)
        self._logger.experiment.add_text("checkpoint/name", name, step)


def _forget_later_steps(writer: Any, step: int) -> None:
    """Write the event that `SummaryWriter(purge_step=)` begins with."""
    with suppress(ImportError):  # tensorboardX has protocols of its own.
        protocol: Any = import_module("tensorboard.compat.proto.event_pb2")
        log = protocol.SessionLog(status=protocol.SessionLog.START)
        writer._get_file_writer().add_event(protocol.Event(step=step, session_log=log))


def _without_metrics(
    original: Callable[..., Any], params: Any, metrics: Any = None, *a: Any, **k: Any
) -> Any:
    return original(params, {} if metrics is None else metrics, *a, **k)


def _last_step(events: bytes) -> int:
    """Return the highest step in a file of events: records of a length, its checksum, data, and theirs."""
    place, last = 0, -1
    while place < len(events):
        (length,) = struct.unpack_from("<Q", events, place)
        last = max(last, _step(events[place + 12 : place + 12 + min(length, 24)]))
        place += 16 + length
    return last


def _step(event: bytes) -> int:
    """Return the step of an event: its second field, after a double; 0 if it isn't there."""
    if event[:1] != b"\x09" or event[9:10] != b"\x10":
        return 0
    step = 0
    for number, byte in enumerate(event[10:20]):
        step |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            break
    return step if step < 1 << 63 else -1


# ---------------------------------------------------------------------- runs with an id


class _MLflow(LogRun):
    """A run of MLflow, from which nothing can be taken back.

    So what is in it already is not logged again. (`_initialized` says whether it was opened.)
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        self._before = self._logger._run_id
        self._logged: Counter[tuple[str, int, float]] = Counter()

    def note(self) -> dict[str, Any]:
        return {"name": self._logger._experiment_name, "run": self._logger.run_id}

    def join(self, noted: Noted) -> str:
        logger, run = self._logger, noted.get("run")
        if noted.get("name") != logger._experiment_name:
            return f"its experiment is called {logger._experiment_name!r} now"
        if not isinstance(run, str):
            return f"{run!r:.80} is no id of a run"
        if logger._run_id == run:
            return ""
        if logger._run_id is not None:
            return (
                f"it writes the run {logger._run_id}; give it run_id={run!r} to go on in that one"
            )
        try:
            found = logger._mlflow_client.get_run(run)
        except Exception as error:  # Of the store, which may be any.
            return f"MLflow has no run {run!r:.80} ({type(error).__name__})"
        if found.info.lifecycle_stage == "deleted":
            return f"the run {run} was deleted"
        logger._run_id = run
        return ""

    def leave(self) -> None:
        self._logger._run_id = self._before
        self._logger._initialized = False

    def cut(self, noted: Noted) -> str:
        logger = self._logger
        client, run = logger.experiment, logger.run_id
        data = client.get_run(run).data
        for key in data.metrics:
            for each in client.get_metric_history(run, key):
                self._logged[key, each.step, _comparable(each.value)] += 1
        client.update_run(run, status="RUNNING")
        params = dict(data.params)
        self._undo = [
            wrap(logger, "log_metrics", self._log_new),
            wrap(logger, "log_hyperparams", partial(self._log_params, params)),
        ]
        return ""

    def tell(self, name: str, numbers: dict[str, float], step: int) -> None:
        self._logger.log_metrics(numbers, step)
        self._logger.experiment.set_tag(self._logger.run_id, "checkpoint/name", name)

    def _log_new(self, original: Callable[..., Any], metrics: Any, step: Any = None) -> None:
        new = {}
        for name, value in metrics.items():
            prefixed = f"{self._logger._prefix}-{name}" if self._logger._prefix else name
            there = prefixed, int(step or 0), _comparable(value)
            if self._logged[there] > 0:
                self._logged[there] -= 1
            else:
                new[name] = value
        if new:
            original(new, step)

    def _log_params(
        self, there: Mapping[str, str], original: Callable[..., Any], given: Any
    ) -> None:
        """Log the hyperparameters that are new: MLflow refuses to change one."""
        tools = fabric_of(self._logger, "utilities.logger")
        params = tools._flatten_dict(tools._convert_params(given))
        original({name: value for name, value in params.items() if name not in there})

    def __str__(self) -> str:
        return f"MLFlowLogger in the run {self._logger._run_id}"


def _comparable(value: Any) -> Any:
    number = float(value)
    return "nan" if math.isnan(number) else number


class _Wandb(LogRun):
    """A run of W&B: rows, each with a number of its own, `_step`.

    Without a server each start has a file of its own, in which W&B writes a block when that is full: what
    is in none when a process is killed is lost. So rows are kept until they are in a file, and are noted.
    Files are cut at the first row that was logged later. From a server nothing is taken back: rows that
    it has already are not logged again.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        self._before = self._logger._id
        self._rows: dict[int, dict[str, Any]] = {}
        self._next = 0
        self._skipped = 0
        self._numbers_next = False
        self._read = _HEADER

    def note(self) -> dict[str, Any]:
        if self._is_offline:
            files = [
                path for path in self._files() if path.parent.name in self._logger.experiment.dir
            ]
            for path in files:
                found, self._read = _rows_in(path, self._read)
                for row, _ in found:
                    self._rows.pop(row, None)
        rows = [[row, data] for row, data in sorted(self._rows.items())]
        run = self._logger.version
        return {"name": self._logger._project, "run": run, "row": self._next, "rows": rows}

    @property
    def _is_offline(self) -> bool:
        return bool(self._logger.experiment.offline)

    def watch(self) -> None:
        experiment = self._logger.experiment
        self._next = int(experiment.step)
        self._undo = [wrap(experiment, "log", self._log)]

    def _log(
        self,
        original: Callable[..., Any],
        data: Any,
        step: Any = None,
        commit: Any = None,
        **more: Any,
    ) -> None:
        ends = step is None if commit is None else commit
        row = self._next if step is None else int(step)
        if self._skipped > 0 and step is None:
            self._skipped -= ends
            return
        self._next = row + bool(ends)
        if self._numbers_next:
            self._numbers_next, step, commit = False, row, ends
        if self._is_offline:
            numbers = {name: each for name, each in data.items() if isinstance(each, (int, float))}
            self._rows.setdefault(row, {}).update(numbers)
        original(data, step=step, commit=commit, **more)

    def _files(self) -> list[Path]:
        """Return the files of all starts of this run."""
        run = self._logger.version
        return sorted(
            Path(self._logger.save_dir or ".").glob(f"wandb/offline-run-*-{run}/run-{run}.wandb")
        )

    def join(self, noted: Noted) -> str:
        logger, run = self._logger, noted.get("run")
        if noted.get("name") != logger._project:
            return f"its project is called {logger._project!r} now"
        if not isinstance(run, str) or not run.isalnum() or type(noted.get("row")) is not int:
            return f"{run!r:.80} is no id of a run"
        if logger.version == run:
            return ""
        if logger.version is not None:
            return f"it writes the run {logger.version}; give it id={run!r} to go on in that one"
        logger._wandb_init["id"] = logger._id = run
        return ""

    def leave(self) -> None:
        logger = self._logger
        if logger._experiment is not None:
            logger._experiment.finish()
            logger._experiment = None
        logger._wandb_init["id"] = logger._id = self._before

    def cut(self, noted: Noted) -> str:
        experiment, row = self._logger.experiment, noted["row"]
        if not self._is_offline:
            self._skipped = max(0, self._next - row)
            return "" if self._next >= row else f"{row - self._next} rows never reached the server"
        there: set[int] = set()
        for path in self._files():
            found, _ = _rows_in(path)
            later = [place for number, place in found if number >= row]
            if later:
                _replace(path, path.read_bytes()[: min(later)])
            there.update(number for number, _ in found)
        for number, data in noted["rows"]:
            if number not in there:
                experiment.log(data, step=number, commit=True)
        self._numbers_next = self._next < row
        self._next = max(self._next, row)
        return ""

    def __str__(self) -> str:
        return f"WandbLogger in the run {self._logger.version}"


_BLOCK, _HEADER = 1 << 15, 7


def _rows_in(path: Path, begin: int = _HEADER) -> tuple[list[tuple[int, int]], int]:
    """Return the numbers of the rows in a file of W&B's with where the record of each begins, and its end.

    It is a log of LevelDB's form after seven bytes: blocks of records, which may go over several.

    Args:
        path: The file.
        begin: Where a record begins, or what was returned as the end before.
    """
    protocol: Any = import_module("wandb.proto.wandb_internal_pb2")
    data, place, begun, end, whole = path.read_bytes(), begin, begin, begin, b""
    rows = []
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + _HEADER : place + _HEADER + length]
        if not kind or len(part) < length:
            break
        if kind in (1, 2):  # All of a record, or the first part of one.
            begun, whole = place, b""
        whole += part
        place += _HEADER + length
        if kind in (1, 4):
            end = place
            record = protocol.Record.FromString(whole)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows += [
                    (int(item.value_json), begun)
                    for item in items
                    if "".join([*item.nested_key, item.key]) == "_step"
                ]
    return rows, end
