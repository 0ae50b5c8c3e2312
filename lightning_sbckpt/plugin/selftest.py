"""The proof that a run resumes exactly: run it through, kill it, resume it, compare every bit.

`assert_resume_exact` does this to a user's own model and data, in processes that really die.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from lightning_sbckpt._layout.publish import folder_names
from lightning_sbckpt.errors import ConfigurationError, SBCheckpointError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.callback import SBCheckpoint
from lightning_sbckpt.plugin.comparison import (
    BY_UP_TO,
    Outcome,
    clone,
    differences,
    fingerprint,
    weights,
)
from lightning_sbckpt.plugin.packages import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    loaded,
    package_of,
    some_package,
)
from lightning_sbckpt.rng import capture_rng

__all__ = ["KillPoint", "SelftestReport", "assert_resume_exact", "run_selftest"]


class NotTestedError(SBCheckpointError, RuntimeError):
    """There is no factory to be called; the message is all there is to say."""


Factory = Callable[[Path], Sequence[Any]]
"""`factory(dirpath)` returns a Trainer with an `SBCheckpoint(dirpath)`, a module, and its data."""

_FINAL = "final.pt"
_KILLED = "killed"

_CALLS = "calls.json"
# Where a run is killed by default: within an epoch, while it validates, and between two epochs.
_HOOKS = ("on_train_batch_end", "on_validation_batch_start", "on_train_epoch_end")


@dataclass(frozen=True)
class KillPoint:
    """Where a process kills itself: at the `count`-th call of a callback hook.

    Example:
        >>> KillPoint.parse("on_train_batch_end:4")
        KillPoint(hook='on_train_batch_end', count=4)
    """

    hook: str
    count: int = 1

    @classmethod
    def parse(cls, text: str | KillPoint) -> KillPoint:
        """Read `hook:count`.

        Raises:
            ConfigurationError: There is no such hook, or the count is no number from 1.
        """
        if isinstance(text, KillPoint):
            return text
        hook, _, count = text.partition(":")
        if (
            not hasattr(some_package().Callback, hook)
            or not (count or "1").isdigit()
            or count == "0"
        ):
            raise ConfigurationError(
                f"{text!r} is no kill point: expected a hook of lightning.pytorch.Callback and the "
                "number of the call, such as 'on_train_batch_end:4'"
            )
        return cls(hook, int(count or "1"))

    def __str__(self) -> str:
        """Return `hook:count`."""
        return f"{self.hook}:{self.count}"


@dataclass(frozen=True)
class Row:
    """One killed and resumed run: where it was killed, from where it went on, what differed."""

    kills: str
    resumed: str | None
    differences: tuple[str, ...]


@dataclass
class SelftestReport:
    """What agreed between a run that went through and those that were killed.

    Attributes:
        rows: One for each killed run.
    """

    rows: list[Row] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether runs were killed, and every one ended with the same bits."""
        return bool(self.rows) and not any(row.differences for row in self.rows)

    def __str__(self) -> str:
        """Return a table, a line for each killed run."""
        width = max([len(row.kills) for row in self.rows] + [6])
        lines = [f"{'killed at':<{width}}  result"]
        for row in self.rows:
            first = row.differences[0] if row.differences else "every bit agrees"
            more = f" (and {len(row.differences) - 1} more)" if len(row.differences) > 1 else ""
            # The first to differ says when; the first tensor to differ says which, and how far.
            far = next((line for line in row.differences[1:] if BY_UP_TO in line), None)
            more += f", ends with {far}" if far else ""
            verdict = "DIFFERS" if row.differences else "exact" if row.resumed else "anew"
            resumed = row.resumed or "began anew: no checkpoint was saved before"
            lines.append(f"{row.kills:<{width}}  {verdict:<7}  {first}{more}; {resumed}")
        return "\n".join(lines)


def assert_resume_exact(
    make_trainer_and_data: Factory,
    kill_points: Iterable[str | KillPoint | Sequence[str | KillPoint]] | None = None,
    *,
    ranks: int = 1,
    timeout: float = 600.0,
) -> SelftestReport:
    """Fail unless a run killed at each of the points ends with the bits of one that was not.

    The runs are processes of their own, killed by SIGKILL. Compared are: weights, buffers,
    optimizer and scheduler states at the end, the weights held after the fit, the random states
    and weights after each batch, and every logged value, from the resume on.

    Args:
        make_trainer_and_data: Called in each process with a folder; returns the Trainer, which has
            an `SBCheckpoint` on that folder, the module, and the data (a datamodule, a loader, or
            a dictionary of arguments for `fit`). A function of a module that can be imported.
            With several ranks each of them calls it.
        kill_points: Where to kill; several in a sequence are several deaths of one run.
            With several ranks the first that comes there dies, and all others with it. By default
            within an epoch, in a validation and at the end of an epoch, as far as the run has these
            between its first checkpoint and its last batch.
        ranks: How many processes a run has: the Trainer's devices times its nodes.
        timeout: Seconds that one run may take.

    Returns:
        The report.

    Raises:
        AssertionError: Something differed; the message is the report.
        RuntimeError: A process failed otherwise than by its kill, or nothing was tested: no batch
            was trained, or no killed run had a checkpoint to go on from.
    """
    report = run_selftest(make_trainer_and_data, kill_points, ranks=ranks, timeout=timeout)
    if not report.exact:
        raise AssertionError(f"the run does not resume exactly:\n{report}")
    return report


def run_selftest(
    make_trainer_and_data: Factory,
    kill_points: Iterable[str | KillPoint | Sequence[str | KillPoint]] | None = None,
    *,
    ranks: int = 1,
    timeout: float = 600.0,
) -> SelftestReport:
    """Do what `assert_resume_exact` does, and return the report whatever it says."""
    rounds = [
        [KillPoint.parse(point) for point in (each if isinstance(each, (list, tuple)) else (each,))]
        for each in kill_points or ()
    ]
    if kill_points is not None and not (rounds and all(rounds)):
        raise ConfigurationError("there is no kill point, so nothing would be tested: name one")
    report = SelftestReport()
    root = Path(tempfile.mkdtemp(prefix="sbckpt-selftest-"))
    try:
        reference = _run(make_trainer_and_data, root / "through", None, ranks, timeout)
        if not all(any("batch" in line for line in each.trace) for each in reference):
            raise RuntimeError(
                "the run trains no batch, so there is nothing to compare: look at the limits of its "
                "Trainer and at the length of its data"
            )
        if kill_points is None:
            calls = json.loads((root / "through" / "rank-0" / _CALLS).read_text())
            rounds = [[point] for point in _after_first_save([_Call(*each) for each in calls])]
        for number, kills in enumerate(rounds):
            folder = root / f"killed-{number}"
            for kill in kills:
                _run(make_trainer_and_data, folder, kill, ranks, timeout)
            resumed = _run(make_trainer_and_data, folder, None, ranks, timeout)
            named = ", ".join(map(str, kills))
            if not all(each.trace for each in resumed):
                raise RuntimeError(
                    f"the run was complete when it was killed at {named}, and trained nothing when it "
                    "was started again: choose an earlier kill point"
                )
            origin = resumed[0].trace[0].get("resumed")
            report.rows.append(Row(named, origin, tuple(_differences_by_rank(reference, resumed))))
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if report.exact and not any(row.resumed for row in report.rows):
        raise RuntimeError(
            "no killed run had a checkpoint to go on from, so no resume was tested: choose later kill "
            f"points, or save more often\n{report}"
        )
    return report


class _Call(NamedTuple):
    """A call of a hook, after how many batches, and whether there was a checkpoint by then."""

    hook: str
    number: int
    batches: int
    epoch: int
    saved: bool


def _after_first_save(calls: Sequence[_Call]) -> list[KillPoint]:
    """Return points at which there is a checkpoint to go on from, and something left to train.

    Raises:
        RuntimeError: There is none.

    Example:
        >>> calls = [_Call("on_train_batch_end", n, n, (n - 1) // 4, n > 4) for n in range(1, 13)]
        >>> [str(point) for point in _after_first_save(calls)]
        ['on_train_batch_end:6']
    """
    last = max(call.batches for call in calls)
    found = []
    for hook in _HOOKS:
        usable = [call for call in calls if call.hook == hook and call.saved]
        usable = [call for call in usable if call.batches < last]
        # As early as may be; within an epoch, not at its last batch.
        of_epoch = [call for call in usable if call.epoch == usable[0].epoch]
        middle = (len(of_epoch) - 1) // 2 if hook == _HOOKS[0] else 0
        found += [KillPoint(hook, call.number) for call in of_epoch[middle : middle + 1]]
    if not found:
        raise RuntimeError(
            "the run has no checkpoint before its last batch, so there is nothing to go on from: save "
            "more often, or let it train longer"
        )
    return found


def _differences_by_rank(reference: Sequence[Outcome], resumed: Sequence[Outcome]) -> list[str]:
    found = [differences(one, other) for one, other in zip(reference, resumed, strict=True)]
    if len(found) == 1:
        return found[0]
    return [f"rank {rank}: {line}" for rank, lines in enumerate(found) for line in lines]


def _run(
    factory: Factory, folder: Path, kill: KillPoint | None, ranks: int, timeout: float
) -> list[Outcome]:
    """Run all ranks to their end; return what each ended with, or nothing if they were killed."""
    # A server forks each process before it has started any thread: quick, and nothing inherited.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(package.__name__ for package in loaded())])
    folders = [folder / f"rank-{rank}" for rank in range(ranks)]
    for each in folders:
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir(parents=True)
    method = multiprocessing.get_start_method()
    environments = _environments(ranks)
    processes = [
        context.Process(
            target=_child, args=(factory, folder / "checkpoints", each, kill, method, environment)
        )
        for each, environment in zip(folders, environments, strict=True)
    ]
    with _all_ended(processes):
        for process in processes:
            process.start()
        first = _await(processes, folders, timeout)
    if first is None:
        raise RuntimeError(f"the run in {folder} was still going after {timeout:g} s and was ended")
    code = processes[first].exitcode
    if kill and any((each / _KILLED).exists() for each in folders):
        return []
    if kill or code != 0 or not all((each / _FINAL).exists() for each in folders):
        told = folders[first] / "error.txt"
        reason = f"its process ended by exit code {code} before the fit was over"
        if told.exists():
            reason = told.read_text()
        elif kill and (folders[first] / _FINAL).exists():
            reason = f"it ended before {kill} came: choose a kill point that the run reaches"
        raise RuntimeError(f"the run to be compared failed: {reason}")
    return [
        Outcome(
            [json.loads(line) for line in (each / "trace.jsonl").read_text().splitlines()],
            torch.load(each / _FINAL, weights_only=True),
        )
        for each in folders
    ]


def _await(processes: Sequence[BaseProcess], folders: Sequence[Path], timeout: float) -> int | None:
    """Return the number of the first process that ended badly, or of any if none did.

    A rank that has lost another one may wait for it for ever, so all end with the first.

    Returns:
        None if there was no time left.
    """
    deadline = time.monotonic() + timeout
    waiting = [process.sentinel for process in processes]
    while waiting:
        ended = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ended:
            return None
        waiting = [sentinel for sentinel in waiting if sentinel not in ended]
        codes = [process.exitcode for process in processes]
        if -signal.SIGKILL in codes:
            return codes.index(-signal.SIGKILL)
        bad = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if bad:
            # Others may have ended since, of what they had lost.
            return min(bad, key=lambda rank: _time_of_error(folders[rank]))
    return 0


@contextmanager
def _all_ended(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """End the processes when the block ends, and what they have started."""
    try:
        yield
    finally:
        for process in processes:
            if process.pid is not None:
                # Each leads a group, unless it has not come so far.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()


def _end_with_parent() -> None:
    """Lead a group of processes, and end all of it when the process that tests has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    os.setpgid(0, 0)

    def end() -> None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end, name="sbckpt-selftest-end", daemon=True).start()


def _time_of_error(folder: Path) -> float:
    error = folder / "error.txt"
    return error.stat().st_mtime if error.exists() else float("inf")


def _environments(ranks: int) -> list[dict[str, str]]:
    """Return what makes each rank believe that a launcher has started it."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
        }
        for rank in range(ranks)
    ]


def _child(
    factory: Factory,
    checkpoints: Path,
    folder: Path,
    kill: KillPoint | None,
    start_method: str,
    environment: Mapping[str, str],
) -> None:
    _end_with_parent()
    os.environ.update(environment)
    # Else workers of loaders would start as this process did, which takes seconds for each.
    multiprocessing.set_start_method(start_method, force=True)
    # What the runs print would drown the table; it is shown if one fails.
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        trainer, module, *data = factory(checkpoints)
        _check_ranks(trainer, int(environment.get("WORLD_SIZE", "1")))
        recorder = record(trainer, folder / "trace.jsonl", checkpoints, kill, folder / _KILLED)
        trainer.fit(module, **_fit_arguments(data))
        torch.save(
            {"at the end of training": recorder.state, "after the fit": clone(weights(module))},
            folder / _FINAL,
        )
        (folder / _CALLS).write_text(json.dumps(recorder.calls))
    except NotTestedError as error:
        (folder / "error.txt").write_text(str(error))
        raise SystemExit(1) from error
    except BaseException:
        import traceback

        (folder / "error.txt").write_text(traceback.format_exc())
        raise


def _check_ranks(trainer: Trainer, ranks: int) -> None:
    wanted = trainer.num_devices * trainer.num_nodes
    if wanted != ranks:
        raise ConfigurationError(
            f"the Trainer under test wants {wanted} processes (devices times nodes), and there "
            f"{'is' if ranks == 1 else 'are'} {ranks}: pass ranks={wanted}, or --ranks {wanted}"
        )


def _fit_arguments(data: Sequence[Any]) -> dict[str, Any]:
    if not data or data[0] is None:
        return {}
    if isinstance(data[0], Mapping):
        return dict(data[0])
    if isinstance(data[0], LightningDataModule):
        return {"datamodule": data[0]}
    return {"train_dataloaders": data[0]} | ({"val_dataloaders": data[1]} if data[1:] else {})


def record(
    trainer: Any, trace: Path, checkpoints: Path, kill: KillPoint | None, note: Path
) -> _Recorder:
    """Have a fit write down what there is to compare, and kill its process where it is told to.

    Args:
        trainer: About to fit.
        trace: The file to write to.
        checkpoints: Where its `SBCheckpoint` has to save.
        kill: Where it kills itself.
        note: The file that says that it did.

    Returns:
        The callback that does so.
    """
    callback, logger = package_of(trainer).Callback, package_of(trainer, "loggers").Logger
    recorder = type("_Recorder", (_Recorder, callback), {})(trace, checkpoints)
    # First, so that a kill comes before anything that the hook would make durable.
    trainer.callbacks.insert(0, recorder)
    if kill is not None:
        trainer.callbacks.insert(0, _killer(callback, kill, note))
    trace_logger = type("_TraceLogger", (_TraceLogger, logger), {})(recorder)
    trainer.loggers = [*trainer.loggers, trace_logger]
    return cast("_Recorder", recorder)


def _killer(base: type, kill: KillPoint, note: Path) -> Callback:
    calls = 0

    def hook(*_args: Any, **_kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == kill.count:
            # The kernel kills by the same signal when memory runs out.
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return cast("Callback", type("_Killer", (base,), {kill.hook: hook})())


class _Recorder:
    """Writes down what there is to compare, line by line."""

    def __init__(self, path: Path, checkpoints: Path) -> None:
        self._stream = path.open("a")
        self._checkpoints = checkpoints
        self.state: dict[str, Any] = {}
        self.calls: list[_Call] = []
        self._counts: Counter[str] = Counter()
        self._saved = False

    def _note_call(self, hook: str, trainer: Trainer) -> None:
        self._counts[hook] += 1
        self._saved = self._saved or bool(folder_names(self._checkpoints))
        batches, epoch = _private.trainer.batches_seen(trainer), trainer.current_epoch
        self.calls.append(_Call(hook, self._counts[hook], batches, epoch, self._saved))

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Note that a run may be killed here."""
        self._note_call("on_validation_batch_start", trainer)

    def on_train_epoch_end(self, trainer: Trainer, _: LightningModule) -> None:
        """Note that a run may be killed here."""
        self._note_call("on_train_epoch_end", trainer)

    def write(self, record: Mapping[str, object]) -> None:
        """Write one line."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write from where the run goes on."""
        callback = next(
            (c for c in _private.trainer.callbacks_of(trainer) if isinstance(c, SBCheckpoint)), None
        )
        if callback is None:
            raise ConfigurationError(
                "the Trainer under test has no SBCheckpoint on the folder that the factory was given"
            )
        used, given = Path(str(callback.dirpath)).resolve(), self._checkpoints.resolve()
        if used != given and given not in used.parents:
            raise ConfigurationError(
                f"the SBCheckpoint of the Trainer under test saves to {callback.dirpath}, which may "
                f"hold checkpoints of other runs, not to the folder that the factory was given, {given}"
            )
        self._checkpoints = used
        report = callback.resume_report
        self.write({"resumed": report and report.headline().replace(str(callback.dirpath), "")})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the fingerprints of the batch, the weights and the random states."""
        self._note_call("on_train_batch_end", trainer)
        self.write(
            {
                "batch": _private.trainer.batches_seen(trainer),
                "epoch": trainer.current_epoch,
                "batch_idx": batch_idx,
                "data": fingerprint(batch),
                "weights": fingerprint(weights(pl_module)),
                "random states": fingerprint(capture_rng()),
            }
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the state that training ends with."""
        self.state = {
            "weights": clone(weights(pl_module)),
            "optimizers": [clone(optimizer.state_dict()) for optimizer in trainer.optimizers],
            "schedulers": [
                clone(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs
            ],
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "global step and epoch": [trainer.global_step, trainer.current_epoch],
        }


class _TraceLogger:
    """Writes every logged value down, exactly."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    @property
    def name(self) -> str:
        return "trace"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {name: float(value).hex() for name, value in sorted(metrics.items())}
        self._recorder.write({"logged": values, "step": step})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass
