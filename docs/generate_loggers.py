"""Kill runs that log, and write the table and the picture of `docs/loggers.md`.

    python docs/generate_loggers.py                 ten random schedules of kills, about ten minutes
    python docs/generate_loggers.py --schedules 2

Each schedule kills the same script up to four times by SIGKILL, with Lightning alone and with
`SBCheckpoint`, and starts it again. What the loggers hold then is compared with an unbroken run.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
PAGE, PICTURE = HERE / "loggers.md", HERE / "loggers.svg"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
sys.path.insert(0, str(HERE.parent / "tests" / "harness"))

NAMES = {
    "csv": "CSVLogger",
    "tensorboard": "TensorBoardLogger",
    "mlflow": "MLFlowLogger",
    "wandb": "WandbLogger, offline",
}


def measure(folder: Path, schedules: int) -> tuple[dict[tuple[str, str], Counter[str]], int]:
    """Return what was lost and double, by logger and script, and how often a process was killed."""
    import _logged

    scripts = {"Lightning alone": _logged.stock, "SBCheckpoint": _logged.fit}
    counts: dict[tuple[str, str], Counter[str]] = {}
    kills = 0
    for kind in _logged.KINDS:
        for name, script in scripts.items():
            place = folder / kind / name
            _logged.lives(place / "whole", [kind], [], script)
            _, whole = _logged.rows(kind, place / "whole")
            count = counts[kind, name] = Counter()
            for seed in range(schedules):
                kills += _logged.lives(place / str(seed), [kind], _logged.schedule(seed), script)
                begun, found = _logged.rows(kind, place / str(seed))
                count["lost"] += (whole - found).total()
                count["double"] += (found - whole).total()
                count["begun"] += begun - 1
                count["rows"] += whole.total()
            print(kind, name, dict(count), file=sys.stderr, flush=True)
    return counts, kills


def draw(folder: Path) -> None:
    """Draw a curve of TensorBoard with three kills in it, of either script."""
    import _logged

    figure, places = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    scripts = {"Lightning alone": _logged.stock, "SBCheckpoint": _logged.fit}
    for place, (name, script) in zip(places, scripts.items(), strict=True):
        root = folder / "picture" / name
        _logged.lives(root, ["tensorboard"], [(24, 0), (33, 0), (29, 0)], script)
        for run, (scalars, _) in _logged.held("tensorboard", root).items():
            points = scalars.get("loss_step", [])
            place.plot(*zip(*points, strict=True) if points else ([], []), marker=".", label=run)
        place.set_title(f"{name}, three kills")
        place.set_xlabel("step")
        place.legend(frameon=False)
    places[0].set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(PICTURE)


def main() -> None:
    """Measure, draw, and rewrite the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=10, help="how many, of each logger")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, kills = measure(Path(folder), arguments.schedules)
        draw(Path(folder))
    lines = [
        "| logger | with | metrics logged | lost | twice | further runs begun |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, name), count in counts.items():
        cells = [
            NAMES[kind],
            name,
            *(str(count[each]) for each in ("rows", "lost", "double", "begun")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    made_by = ", ".join(
        f"{name} {version(name)}" for name in ("lightning", "tensorboard", "mlflow", "wandb")
    )
    lines.append(
        f"\n{arguments.schedules} schedules of kills each, {kills} kills in all, with {made_by} on Python "
        f"{platform.python_version()}. Written by `python docs/generate_loggers.py`."
    )
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
