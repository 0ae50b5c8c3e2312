"""What a command imports before it does anything: this is waited for at every call and every TAB."""

from __future__ import annotations

import subprocess
import sys

# Commands that only look, and what a shell asks for at TAB, all in one process that has no torch: an
# import of it raises.
LOOK = """
import contextlib, importlib, os, pkgutil, sys

sys.modules["torch"] = None
from lightning_sbckpt import cli

def call(*words):
    cli.main(list(words), standalone_mode=False)

def complete(line):
    os.environ.update(_LIGHTNING_SBCKPT_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD="2")
    with contextlib.suppress(SystemExit):
        cli.main(prog_name="lightning-sbckpt")
    del os.environ["_LIGHTNING_SBCKPT_COMPLETE"]

call("--version")
assert "rich" not in sys.modules, "needed for no word"
for name in cli._COMMANDS:
    complete(f"lightning-sbckpt {name} --")
run = sys.argv[1]
call("ls", run, "--where", "val_loss < 1", "--sort", "val_loss")
call("ls", run, "--removed")
call("ls", run, "--json", "--keep", "Pareto('val_loss')")
call("best", run)
call("watch", run, "--once")
call("prune", run)
for module in pkgutil.iter_modules(cli.__path__):
    if not module.name.startswith("_"):
        importlib.import_module(f"lightning_sbckpt.cli.{module.name}")
print([name for name in sys.modules if name.startswith(("matplotlib", "lightning.", "numpy"))])
"""


def test_what_only_looks_imports_no_torch(run):
    """Neither the help nor TAB nor a listing waits the second that the import of torch takes."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "plain,--top" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
