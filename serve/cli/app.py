"""The `mm` command. Each command has a file of its own; this one only puts them together.

Importing this module imports neither torch nor ray: every command imports what it needs when it runs, so that help is
instant.
"""

from __future__ import annotations

import sys

import click

from mm import __version__
from mm.errors import MmError
from serve.cli.bench import bench
from serve.cli.caption import caption
from serve.cli.chat import chat
from serve.cli.check import check
from serve.cli.compare import compare
from serve.cli.completion import completion
from serve.cli.demo import demo
from serve.cli.doctor import doctor
from serve.cli.embed import embed
from serve.cli.evaluate import evaluate
from serve.cli.plan import plan
from serve.cli.plugins import plugins
from serve.cli.pull import pull
from serve.cli.run_batch import run_batch
from serve.cli.serve import serve
from serve.cli.tune import tune

COMMANDS = (
    serve,
    chat,
    caption,
    run_batch,
    compare,
    embed,
    evaluate,
    tune,
    plan,
    bench,
    demo,
    plugins,
    check,
    pull,
    doctor,
    completion,
)


class _InOrder(click.Group):
    """Lists the commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_InOrder, name="mm", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.version_option(__version__, message="mm %(version)s", help="Print the version and exit.")
def app() -> None:
    """Serve multimodal models and cut what visual tokens cost."""


for command in COMMANDS:
    app.add_command(command)


def main() -> None:
    """Entry point of the `mm` command: an error of ours becomes one line and exit code 1."""
    try:
        app()
    except MmError as error:
        sys.stderr.write(f"mm: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
