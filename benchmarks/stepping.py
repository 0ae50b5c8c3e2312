"""What the callback costs on a step on which nothing is saved, and what the import costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.disk import scratch
from benchmarks.measure import Section, Settings, Table, UnavailableError
from benchmarks.peer import OURS, quiet, require

WITHOUT = "a Trainer without callbacks"
TORCH = "import torch"
# Public names are imported when they are first asked for: the package alone imports nothing.
PACKAGE = "from lightning_sbckpt import Checkpointer"

_STEPS = 1500
_CALLS = 5_000
_DIRECT = "called directly"
_DIFFERENCE = "difference of two fits"
# The hooks of a callback that Lightning calls at every batch.
_PER_BATCH = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def run_idle(settings: Settings) -> Section:
    """Measure a Trainer's steps with and without the callback."""
    step = Table("A step of a Trainer with a model of one weight", "us", WITHOUT, columns_are="")
    extra = Table("What the callback adds to a step", "us", columns_are="")
    section = Section(
        "idle",
        "Idle cost of the callback",
        "The callback is set to save every million steps. *Called directly*: in the middle of a "
        "fit, what it does after a batch and its own per-batch hooks are called 5,000 times in a "
        f"loop. *Difference of two fits*: {_STEPS:,} steps with it and without it, in turn, where "
        "the quickest quarter of the steps says what one costs in processor time; this counts "
        "everything, the tracked loader too, and is as noisy as a fit is.",
        {"idle": extra, "idle step": step},
    )
    subjects: dict[str, Callable[[], float]] = {}
    with scratch(settings.folder / "idle") as folder:
        subjects[WITHOUT] = lambda: step_microseconds(None, folder)
        for mode in ("sync", "async", "overlap"):
            try:
                step_microseconds(mode, folder, steps=2)
            except UnavailableError as error:
                section.failures[f"{OURS}, {mode}"] = str(error)
                continue
            extra.cells[f"{OURS}, {mode}", _DIRECT] = [
                hooks_microseconds(mode, folder) for _ in range(settings.rounds(5))
            ]
            subjects[f"{OURS}, {mode}"] = lambda mode=mode: step_microseconds(mode, folder)  # type: ignore[misc]
        rounds = settings.interleave(subjects, 11)
    step.add("per step", rounds)
    base = rounds[WITHOUT]
    for name, values in rounds.items():
        if name != WITHOUT:
            differences = [with_it - without for with_it, without in zip(values, base, strict=True)]
            extra.add(_DIFFERENCE, {name: differences})
    print("  idle: done", flush=True)
    return section


def step_microseconds(mode: str | None, folder: Path, *, steps: int = _STEPS) -> float:
    """Return what a step of a fit costs, with the callback in a save mode or without it."""
    clock = _probe_class()()
    _fit([clock, *([] if mode is None else [_callback(mode, folder)])], folder, steps)
    gaps = sorted(b - a for a, b in zip(clock.starts, clock.starts[1:], strict=False))
    return gaps[len(gaps) // 4] / 1e3


def hooks_microseconds(mode: str, folder: Path, *, slower: Callable[[], object] = bool) -> float:
    """Return what the callback's own code costs per step, called in a loop in a fit.

    Args:
        mode: The save mode.
        folder: Where the callback would save.
        slower: Called with every step; to show that a slower callback is seen.
    """
    callback = _callback(mode, folder)
    measured: list[float] = []

    def measure(trainer: Any, module: Any, outputs: object, batch: object, index: int) -> None:
        if index != 3:
            return
        given = {
            "on_train_batch_start": (trainer, module, batch, index),
            "on_train_batch_end": (trainer, module, outputs, batch, index),
            "on_before_backward": (trainer, module, outputs),
            "on_after_backward": (trainer, module),
        }
        optimizer = (trainer, module, trainer.optimizers[0])
        calls = [
            (getattr(callback, name), given.get(name, optimizer))
            for name in _PER_BATCH
            if getattr(type(callback), name) is not getattr(_base_class(), name)
        ]
        # Not a hook of Lightning's: it is called when Lightning is wholly done with a batch.
        session: Any = callback._session  # noqa: SLF001
        calls.append((session._saving.after_batch, (trainer,)))  # noqa: SLF001
        start = time.thread_time_ns()
        for _ in range(_CALLS):
            for call, arguments in calls:
                call(*arguments)
            slower()
        measured.append((time.thread_time_ns() - start) / _CALLS / 1e3)

    probe = _probe_class()()
    probe.on_train_batch_end = measure
    _fit([probe, callback], folder, steps=6)
    return measured[0]


def _fit(callbacks: list[Any], folder: Path, steps: int) -> None:
    require("lightning")
    import lightning as L

    quiet()

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return (self.weight * batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=len(callbacks) > 1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader: Any = torch.utils.data.DataLoader(torch.ones(steps + 1, 1), batch_size=None)
    trainer.fit(Module(), loader)


def _callback(mode: str, folder: Path) -> Any:
    from lightning_sbckpt import SBCheckpoint
    from lightning_sbckpt.errors import ConfigurationError

    try:
        return SBCheckpoint(
            folder / "checkpoints",
            every_n_train_steps=1_000_000,
            every_n_epochs=None,
            save_mode=mode,
            resume=False,
        )
    except ConfigurationError as error:
        raise UnavailableError("not in this release") from error


def _base_class() -> Any:
    import lightning as L

    return L.Callback


def _probe_class() -> Any:
    class Probe(_base_class()):  # type: ignore[misc]
        """Notes how much processor time was spent when each step began."""

        def __init__(self) -> None:
            self.starts: list[int] = []

        def on_train_batch_start(self, *args: object) -> None:
            self.starts.append(time.thread_time_ns())

    return Probe


def run_import(settings: Settings) -> Section:
    """Measure new processes that import and end."""
    table = Table("A new process that imports and ends", "s", TORCH, columns_are="")
    section = Section(
        "import",
        "Import time",
        "Whole processes, from start to end. Lightning is not imported by either.",
        {"import": table},
    )
    subjects = {statement: lambda s=statement: process_seconds(s) for statement in (TORCH, PACKAGE)}  # type: ignore[misc]
    rounds = settings.interleave(subjects, 9)
    table.add("process", rounds)
    print("  import: done", flush=True)
    return section


def process_seconds(statement: str, source: Path | None = None) -> float:
    """Return how long a process takes that only does this, with the package in a folder."""
    folder = source or Path(__file__).parents[1]
    # Installed packages are compiled; what is imported for the first time is, after the warm-up.
    env = {key: each for key, each in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, cwd=folder, env=env)
    return time.perf_counter() - start
