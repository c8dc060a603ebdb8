"""The command line. Exit codes: 0 ok, 1 failed, 2 usage, 3 inconclusive (nothing to decide on).

``main`` is the entry point. Commands import what they need when they run, so that ``--help`` needs neither torch nor
a database; errors of ours are shown as one sentence, with the way out, never as a traceback.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from gradatim import __version__
from gradatim.cli import adapters, audit, doctor, evaluating, looking, memory, opinions, running, showing
from gradatim.cli.output import note
from gradatim.errors import GradatimError


class _Commands(TyperGroup):
    """Turns our errors into a sentence on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GradatimError as e:
            note(f"gradatim: {e}")
            raise typer.Exit(1) from e


app = typer.Typer(
    name="gradatim",
    cls=_Commands,
    help="Serve an open-weights model that learns from feedback, in small, checked, reversible steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Serve an open-weights model that learns from feedback, in small, checked, reversible steps."""


running.register(app)
showing.register(app)
looking.register(app)
opinions.register(app)
adapters.register(app)
memory.register(app)
audit.register(app)
evaluating.register(app)
doctor.register(app)


def main() -> None:
    """The ``gradatim`` command."""
    app()
