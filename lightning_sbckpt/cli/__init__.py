"""The command `lightning-sbckpt`: look at the checkpoints of a folder, and look after them."""

from __future__ import annotations

import importlib
import os

import click
from click.shell_completion import CompletionItem

from lightning_sbckpt.cli._bars import bars_of_command
from lightning_sbckpt.cli._common import EXIT_CODES, Failure, code_of, log_to_terminal, message_of
from lightning_sbckpt.errors import SBCheckpointError

__all__ = ["main"]

# From a command to the module of this package it is in, and what the list of commands says of it.
_COMMANDS = {
    "ls": ("listing", "List the checkpoints of a folder: metrics, age, size, what stays and why."),
    "show": ("showing", "Show one checkpoint: meta, lineage, files, the tensors in them."),
    "best": ("choosing", "Print the path of the best checkpoint, for scripts."),
    "diff": ("making", "Compare two checkpoints."),
    "watch": ("watching", "Follow a run: what it saves and removes, as it happens."),
    "plot": ("drawing", "Draw a metric over the steps, with every checkpoint."),
    "report": ("drawing", "Write one page of HTML about a run."),
    "verify": ("checking", "Read every byte and compare it with what was written."),
    "prune": ("keeping", "Remove the checkpoints that no rule keeps; a dry run unless told."),
    "pin": ("keeping", "Keep a checkpoint whatever the rules say."),
    "unpin": ("keeping", "Undo pin."),
    "annotate": ("keeping", "Add metrics, a note or tags to a checkpoint."),
    "average": ("making", "Average checkpoints into a new one."),
    "export": ("making", "Write a checkpoint as a file of another format."),
    "consolidate": ("consolidating", "Put together what many ranks wrote in pieces."),
    "selftest": ("checking", "Prove that your own run resumes exactly."),
    "completion": ("completing", "Print what makes a shell complete this command."),
}


class _Commands(click.Group):
    """A group that imports a command when it is called, and not to be listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, those that only look first."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a name, or None if there is none."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{_COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return what a shell may complete a word with: this is waited for at every tab."""
        names = [
            CompletionItem(name, help=about)
            for name, (_, about) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def invoke(self, ctx: click.Context) -> object:
        """Call a command; what it raises becomes one line and an exit code."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # Whoever read the output has seen enough; click knows what to do.
        except (SBCheckpointError, OSError) as error:
            # For whoever wants to know where it comes from.
            if os.environ.get("LIGHTNING_SBCKPT_TRACEBACK"):
                raise
            raise Failure(message_of(error), code_of(error)) from error


@click.group(cls=_Commands, epilog=EXIT_CODES)
@click.version_option(package_name="lightning-sbckpt")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Look at the checkpoints of a folder, and look after them.

    PATH is a folder of checkpoints everywhere, or the URL of one such as s3://bucket/run; CKPT is
    one of them: its path, or the folder and the word best or newest, as in run/best.
    """
    ctx.with_resource(log_to_terminal())
    ctx.obj = ctx.with_resource(bars_of_command())
