"""Commands about the chain of decisions: verify, export, sign. They read the store, with or without a server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from gradatim.cli import output
from gradatim.cli.options import AsJson, ConfigFile, DataDir, recorded
from gradatim.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add these commands."""
    group = typer.Typer(no_args_is_help=True, help="The chain of hashes over every decision: verify it, export it.")
    group.command(epilog="Example: gradatim audit verify --head 9f86d081...")(verify)
    group.command(epilog="Example: gradatim audit export > decisions.jsonl")(export)
    group.command(epilog="Example: gradatim audit keygen ~/audit.pem")(keygen)
    group.command(epilog="Example: gradatim audit sign ~/audit.pem > head.json")(sign)
    app.add_typer(group, name="audit")


def verify(
    head: Annotated[str, typer.Option(help="One that was exported before, and must be in the chain.")] = "",
    signed: Annotated[Path | None, typer.Option(help="A head that was signed; its signature is checked first.")] = None,
    public: Annotated[Path | None, typer.Option(help="The public key it was signed for.")] = None,
    file: ConfigFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Recompute the chain and compare it with the records. Exit code 1: it was changed; 3: nothing is chained."""
    from gradatim.app import offline, signing

    if (signed is None) != (public is None) or (signed and head):
        raise ConfigError("give --signed together with --public, and without --head")
    if signed and public:
        head = str(signing.verified(signed, public)["head"])
    found = offline.audit(recorded(file, data_dir), head)
    output.show(found, as_json, lambda console: console.print(output.facts(found)))
    raise typer.Exit(1 if found["problems"] else 0 if found["decisions"] else 3)


def export(file: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Every decision as a line of JSON with its hash, oldest first; the last hash is the head to keep elsewhere."""
    from gradatim.app import offline

    for line in offline.decisions(recorded(file, data_dir)):
        typer.echo(line)


def keygen(key: Annotated[Path, typer.Argument(help="Where the private key goes; the public one is KEY.pub.")]) -> None:
    """Make a key to sign heads with. Keep it where the server cannot read it."""
    from gradatim.app import signing

    output.note(f"the public key is {signing.make_key(key)}")


def sign(
    key: Annotated[Path, typer.Argument(help="A private key of `gradatim audit keygen`.")],
    file: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """The end of the chain as it is now, signed, as a line of JSON to keep elsewhere. A chain that was tampered with or
    is empty is not signed."""
    from gradatim.app import offline, signing

    config = recorded(file, data_dir)
    found = offline.audit(config, "")
    if found["problems"] or not found["decisions"]:
        raise ConfigError(found["problems"][0] if found["problems"] else "nothing is chained yet")
    facts = {"name": config.name, "at": int(time.time()), "decisions": found["decisions"], "head": found["head"]}
    typer.echo(json.dumps(signing.signed(facts, key)))
