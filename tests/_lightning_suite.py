"""Lightning's own tests, with an `SBCheckpoint` added to every Trainer.

Its wheel has no tests, so a checkout of the release that is installed is needed:

    git clone --depth 1 --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning
    python tests/_lightning_suite.py pytorch-lightning                  # all that run on a CPU
    python tests/_lightning_suite.py pytorch-lightning loops trainer    # these folders or files

Every test runs without the callback and with it, and what differs is printed. A test that replaces
`torch.save` or the clock by a mock, or that compares the list of callbacks, must differ.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("callbacks", "checkpointing", "core", "loops", "models", "trainer", "tuner")
# They start processes, in which no callback is added, or need what is seldom installed.
LEFT_OUT = "not spawn and not ddp_fork and not onnx and not legacy and not sync_dist"


def pytest_configure():
    """Add the callback to every Trainer: when it is made, as `enable_checkpointing=False` is right."""
    if os.environ["SUITE_WITH"] != "ours":
        return
    from lightning.pytorch import Trainer

    from lightning_sbckpt import SBCheckpoint

    init = Trainer.__init__

    @functools.wraps(init)
    def new_init(self, *args, **options):
        init(self, *args, **options)
        if not options.get("barebones"):
            folder = tempfile.mkdtemp(dir=os.environ["SUITE_FOLDER"])
            self.callbacks.append(SBCheckpoint(folder))

    Trainer.__init__ = new_init


def pytest_runtest_logreport(report):
    """Write down how a test ended, at once: a run that is cut short says what it has."""
    if report.when == "call" or report.outcome != "passed":
        with Path(os.environ["SUITE_FOLDER"], os.environ["SUITE_WITH"]).open("a") as log:
            log.write(json.dumps([report.nodeid, report.outcome]) + "\n")


def outcomes(checkout, folder, names, who):
    """Run the tests without the callback or with it; return the outcome of each."""
    tests = checkout / "tests"
    paths = [str(ROOT), str(ROOT / "tests"), str(tests)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "SUITE_WITH": who,
        "SUITE_FOLDER": str(folder),
    }
    options = [
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "_lightning_suite",
        "-o",
        "addopts=",
    ]
    options += ["--continue-on-collection-errors", "--timeout", "60", "-k", LEFT_OUT]
    chosen = [f"tests_pytorch/{name}" for name in names]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, *chosen], cwd=tests, env=env, check=False
    )
    found = {}
    for line in (folder / who).read_text().splitlines():
        name, outcome = json.loads(line)
        if found.get(name) != "failed":
            found[name] = outcome
    return found


def main():
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("names", nargs="*", default=FOLDERS, help="of folders or files")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = (
            outcomes(chosen.checkout.resolve(), Path(folder), chosen.names, who)
            for who in ("theirs", "ours")
        )
    differ = [name for name, outcome in theirs.items() if ours.get(name, outcome) != outcome]
    print(f"compared: {len(theirs.keys() & ours.keys())} tests, {len(differ)} differ")
    for name in differ:
        print(f"{name}: {theirs[name]} without the callback, {ours[name]} with it")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
