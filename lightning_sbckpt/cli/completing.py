"""The command `completion`: what makes a shell complete this command."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]

_NAME = "lightning-sbckpt"
_VARIABLE = "_LIGHTNING_SBCKPT_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands and options.

    Bash: eval "$(lightning-sbckpt completion bash)" in ~/.bashrc. Zsh: the same with zsh in
    ~/.zshrc. Fish: lightning-sbckpt completion fish > ~/.config/fish/completions/lightning-sbckpt.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, _NAME, _VARIABLE).source())
