"""`mm completion`: a script that lets a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

HINTS = {
    "bash": 'add to ~/.bashrc: eval "$(mm completion bash)"',
    "zsh": 'add to ~/.zshrc: eval "$(mm completion zsh)"',
    "fish": "write to ~/.config/fish/completions/mm.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(tuple(HINTS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL."""
    made = get_completion_class(shell)
    assert made is not None
    assert context.parent is not None
    click.echo(f"# {HINTS[shell]}")
    click.echo(made(context.parent.command, {}, "mm", "_MM_COMPLETE").source())
