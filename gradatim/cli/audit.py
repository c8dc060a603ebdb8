"""Commands about the chain of decisions: verify, export. They read the store, with or without a server."""

from __future__ import annotations

from typing import Annotated

import typer

from gradatim.cli import output
from gradatim.cli.options import AsJson, ConfigFile, DataDir, recorded


def register(app: typer.Typer) -> None:
    """Add these commands."""
    group = typer.Typer(no_args_is_help=True, help="The chain of hashes over every decision: verify it, export it.")
    group.command(epilog="Example: gradatim audit verify --head 9f86d081...")(verify)
    group.command(epilog="Example: gradatim audit export > decisions.jsonl")(export)
    app.add_typer(group, name="audit")


def verify(
    head: Annotated[str, typer.Option(help="One that was exported before, and must be in the chain.")] = "",
    file: ConfigFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Recompute the chain and compare it with the records. Exit code 1: it was changed; 3: nothing is chained."""
    from gradatim.app import offline

    found = offline.audit(recorded(file, data_dir), head)
    output.show(found, as_json, lambda console: console.print(output.facts(found)))
    raise typer.Exit(1 if found["problems"] else 0 if found["decisions"] else 3)


def export(file: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Every decision as a line of JSON with its hash, oldest first; the last hash is the head to keep elsewhere."""
    from gradatim.app import offline

    for line in offline.decisions(recorded(file, data_dir)):
        typer.echo(line)
