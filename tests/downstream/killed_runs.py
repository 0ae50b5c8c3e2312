"""Kill a project's training three times, start it again each time, and compare it with one that went through.

    python tests/downstream/killed_runs.py NAME     prints the results as JSON, in its last line

It runs in the environment that `run.py` makes for the project. Nothing here reaches the network.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_sbckpt import Checkpointer, SBCheckpoint
from lightning_sbckpt.plugin.comparison import Outcome, clone, differences, fingerprint, weights
from lightning_sbckpt.plugin.selftest import KillPoint, record

HERE = Path(__file__).resolve().parent

KILLS = ("on_train_batch_end:5", "on_validation_batch_start:2", "on_train_batch_start:4")
"""Within the first epoch, within a validation, and within an epoch again."""

TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 4,
    "logger": False,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""What every project's Trainer is given, by the project's own way."""

USES = ("test", "predict", "load")
"""What is done with the best checkpoint after the fit."""


def main() -> None:
    """Do all lives of one project, or be one of them."""
    name, *life = sys.argv[1:]
    sys.path[:1] = [str(HERE)]
    sys.addaudithook(_refuse_network)
    with tempfile.TemporaryDirectory(prefix="downstream-") as folder:
        os.chdir(life[0] if life else folder)  # For what projects leave where they are.
        project = importlib.import_module(f"projects.{name}")
        if life:
            live(project, Path(life[0]), None)
        else:
            print(json.dumps(measure(name, project, Path(folder))))


def measure(name: str, project: Any, root: Path) -> dict[str, Any]:
    """Return what became of the killed run, beside the one that was not."""
    through, killed = root / "through", root / "killed"
    _fork(project, through, None, 0)
    for kill in KILLS:
        _fork(project, killed, kill, -signal.SIGKILL)
    # The last time in a new interpreter, so that nothing can have been handed over in memory.
    command = [sys.executable, str(HERE / "killed_runs.py"), name, str(killed)]
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=600)
    expected, found = outcome(through), outcome(killed)
    resumed = [json.loads(trace.open().readline())["resumed"] for trace in _traces(killed)]
    uses = {use: _verdict(use, project, expected, found) for use in ("best", *USES)}
    return {
        "versions": {name: version(name) for name in [*_pinned(project), "torch"]},
        "Lightning": f"{project.LIGHTNING} {version(project.LIGHTNING.partition('.')[0])}",
        "resumed": resumed,
        "differences": differences(_training_of(expected), _training_of(found)),
        **uses,
    }


def live(project: Any, folder: Path, kill: str | None) -> None:
    """Train once, until the end or the kill, and use what came out."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - It is the state that the projects draw from.
    torch.manual_seed(7)
    base = importlib.import_module(project.LIGHTNING).Callback
    # Some projects pickle their callbacks, so the class is found by its name.
    made = globals()["Watch"] = type("Watch", (_Watch, base), {"__module__": __name__})
    watch = made(folder, len(_traces(folder)), kill)
    checkpoint = SBCheckpoint(folder / "run", **{"every_n_train_steps": 3, **project.CHECKPOINT})
    uses = project.train({**TRAINER, "callbacks": [watch, checkpoint]}, folder)
    final = {
        "at the end of training": watch.recorder.state,
        "after the fit": clone(weights(watch.module)),
        "best": _same_weights(watch.module, _best(project, folder)),
    }
    for use in USES:
        if use in uses:
            final[use] = _tried(uses[use], _best(project, folder), use)
    torch.save(final, folder / "final.pt")


class _Watch:
    """Have a fit write down what there is to compare, whoever makes its Trainer.

    What it has found is kept by the class, since some projects train with a copy of their callbacks.
    """

    recorder = module = None

    def __init__(self, folder: Path, number: int, kill: str | None) -> None:
        super().__init__()
        self.folder, self.number, self.kill = folder, number, kill

    def setup(self, trainer, pl_module, stage):
        if stage == "fit" and self.recorder is None:
            type(self).module = pl_module
            type(self).recorder = record(
                trainer,
                self.folder / f"trace-{self.number}.jsonl",
                self.folder / "run",
                KillPoint.parse(self.kill) if self.kill else None,
                self.folder / "killed",
            )


def outcome(folder: Path) -> Outcome:
    """Return what the last life of a run left behind."""
    trace = [json.loads(line) for line in _traces(folder)[-1].read_text().splitlines()]
    return Outcome(trace, torch.load(folder / "final.pt", weights_only=True))


def _training_of(outcome: Outcome) -> Outcome:
    kept = ("at the end of training", "after the fit")
    return Outcome(outcome.trace, {name: outcome.final[name] for name in kept})


def _verdict(use: str, project: Any, expected: Outcome, found: Outcome) -> str:
    if use in getattr(project, "PREVENTS", ()):
        return "–"
    one, other = expected.final[use], found.final[use]
    for told in (one, other):
        if isinstance(told, str) and told != "yes":
            return told
    return "yes" if fingerprint(one) == fingerprint(other) else "differs"


def _tried(use: Any, best: Path, name: str) -> Any:
    try:
        result = use(best)
        if name == "load":
            return _same_weights(result, best)
        return clone(result)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def _same_weights(loaded: Any, best: Path) -> str:
    """Say whether all weights that were loaded are those of a checkpoint."""
    state = loaded if isinstance(loaded, dict) else loaded.state_dict()
    saved = torch.load(best / "model.ckpt", weights_only=True)
    other = [name for name in state if name not in saved or not state[name].equal(saved[name])]
    return "yes" if state and not other else f"other weights: {', '.join(other)}"


def _best(project: Any, folder: Path) -> Path:
    keys = {name: project.CHECKPOINT.get(name) for name in ("min_key", "max_key")}
    return Checkpointer(folder / "run").find_checkpoint(**keys).path


def _traces(folder: Path) -> list[Path]:
    return sorted(folder.glob("trace-*.jsonl"))


def _fork(project: Any, folder: Path, kill: str | None, expected: int) -> None:
    """Live in a process that has everything loaded, and dies as it has to."""
    process = multiprocessing.get_context("fork").Process(target=live, args=(project, folder, kill))
    process.start()
    process.join(600)
    process.kill()
    process.join()
    if process.exitcode != expected:
        raise RuntimeError(f"{kill or 'the run'}: exit code {process.exitcode}, not {expected}")


def _pinned(project: Any) -> list[str]:
    return re.findall(r"([\w-]+)\S*==", " ".join(project.PINS))


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", "127.0.0.1"):
        raise OSError(f"the network is not to be used: {arguments[0]}")


if __name__ == "__main__":
    main()
