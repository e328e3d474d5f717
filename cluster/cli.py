"""`corral`: the command line.

Owns the list of commands and how errors reach a person: one line, exit code 1. The commands are in
`cluster/commands/`, and each is imported when it is called: most need neither torch nor Ray.
"""

import importlib
import sys

import click

from actors.errors import CorralError

_MODULES = {
    "serve": "serve",
    "stop": "serve",
    "status": "status",
    "ask": "talk",
    "chat": "talk",
    "plan": "plan",
    "make-model": "models",
}


class _Commands(click.Group):
    """Finds a command in its module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"cluster.commands.{_MODULES[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="corral-serve", prog_name="corral")
def corral() -> None:
    """Serves Llama-4-scale mixture-of-experts models on Ray."""


def main() -> None:
    """Entry point of the `corral` script."""
    try:
        corral()
    except CorralError as e:
        click.echo(f"Error: {e}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
