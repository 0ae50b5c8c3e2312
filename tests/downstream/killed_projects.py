"""Make the environment of each project, kill and resume its training there, and print what became of it.

    python tests/downstream/killed_projects.py                   all projects, one after the other
    python tests/downstream/killed_projects.py darts gluonts     these two
    python tests/downstream/killed_projects.py --keep darts      leave its environment for the next time

It ends with 1 unless each ends as it would have without the kills. An environment takes 1 GB, or 6
with torchvision, and is removed when its project is done. The network is used by pip alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning-sbckpt"
NAMES = tuple(sorted(path.stem for path in (HERE / "projects").glob("*.py")))
USES = ("best", "test", "predict", "load")


def main() -> None:
    """Run the projects that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where environments are made")
    parser.add_argument("--keep", action="store_true", help="remove no environment")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.names or NAMES:
        row = measure(name, arguments.cache, keep=arguments.keep)
        print(f"{name}: {json.dumps(row)}", flush=True)
        if not is_good(row):
            failed.append(name)
    print(f"{len(arguments.names or NAMES) - len(failed)} passed, {len(failed)} failed", flush=True)
    sys.exit(bool(failed))


def measure(name: str, cache: Path = CACHE, *, keep: bool = False) -> dict[str, Any]:
    """Return what became of a project's killed runs, or `{"error": ...}`."""
    environment = cache / name
    try:
        python = _environment(environment, declared(name))
        process = subprocess.run(
            [python, str(HERE / "killed_runs.py"), name],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=1800,
        )
        row: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError) as error:
        return {"error": str(error)}
    finally:
        if not keep:
            shutil.rmtree(environment, ignore_errors=True)
    return row


def is_good(row: dict[str, Any]) -> bool:
    """Return whether every resume was exact, and everything else worked that the project allows."""
    return (
        "error" not in row
        and not row["differences"]
        and all(row["resumed"][1:])
        and all(row[use] in ("yes", "–") for use in USES)
    )


def declared(name: str) -> dict[str, Any]:
    """Return the constants of a project's file, without importing what it imports."""
    tree = ast.parse((HERE / "projects" / f"{name}.py").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"PREVENTS": {}, "NOTES": (), "TORCH": "torch==2.13.0"}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constant = node.targets[0].id
            if constant in (*found, "PINS"):
                found[constant] = ast.literal_eval(node.value)
    return found


def _environment(folder: Path, project: dict[str, Any]) -> str:
    """Make a virtual environment, or bring it up to date; return its Python."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # Nothing that comes after it may bring another torch.
    (folder / "constraints.txt").write_text(f"{project['TORCH']}\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    install += ["--constraint", str(folder / "constraints.txt")]
    for wanted in ([project["TORCH"]], [*project["PINS"], str(HERE.parents[1])]):
        subprocess.run([*install, *wanted], check=True, stdout=sys.stderr, timeout=1800)
    return python


if __name__ == "__main__":
    main()
