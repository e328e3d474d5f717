"""`corral`: the command line.

Owns the list of commands and how errors reach a person: one line, exit code 1. The commands are in
`cluster/commands/`.
"""

import sys

import click

from actors.errors import CorralError
from cluster.commands.models import make_model
from cluster.commands.plan import plan
from cluster.commands.serve import serve, status, stop
from cluster.commands.talk import ask, chat


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="corral-serve", prog_name="corral")
def corral() -> None:
    """Serves Llama-4-scale mixture-of-experts models on Ray."""


for command in (make_model, plan, serve, stop, status, chat, ask):
    corral.add_command(command)


def main() -> None:
    """Entry point of the `corral` script."""
    try:
        corral()
    except CorralError as e:
        click.echo(f"Error: {e}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
