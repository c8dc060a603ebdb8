"""Commands about adapters: list, show, rollback, promote, approve, reject.

With a server a change holds from the next request on; without one it is written to the store for the next start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from gradatim.cli import output
from gradatim.cli.options import AsJson, ConfigFile, DataDir, Name, recorded
from gradatim.cli.remote import routes
from gradatim.errors import StoreError

Reason = Annotated[str, typer.Option(help="Kept with the change.")]
One = Annotated[str, typer.Argument(help="NAME@STEP.", metavar="ID")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    group = typer.Typer(invoke_without_command=True)
    group.callback(epilog="Example: gradatim adapters")(default)
    group.command("list", epilog="Example: gradatim adapters list --json")(listing)
    group.command(epilog="Example: gradatim adapters show agent@3")(show)
    group.command(epilog="Example: gradatim adapters rollback --reason 'answers too long'")(rollback)
    group.command(epilog="Example: gradatim adapters promote agent@3")(promote)
    group.command(epilog="Example: gradatim adapters approve agent@3 --reason 'reviewed'")(approve)
    group.command(epilog="Example: gradatim adapters reject agent@4")(reject)
    app.add_typer(group, name="adapters")


def default(
    context: typer.Context,
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Every version of the weights: list them, look at one, roll back, promote, approve, reject."""
    if context.invoked_subcommand is None:
        listing(file=file, data_dir=data_dir, name=name, as_json=as_json)


def listing(file: ConfigFile = None, data_dir: DataDir = None, name: Name = None, as_json: AsJson = False) -> None:
    """Every version, its stage, and what it was made from."""
    rows = routes(recorded(file, data_dir, name)).get("/v1/adapters")["data"]
    columns = ("adapter", "stage", "when", "parent", "made from", "sha256")
    cells = [
        (
            row["id"],
            row["stage"],
            output.when(row["created_at"]),
            row["parent"],
            row["update"]["kinds"] if row["update"] else "the frozen base",
            row["sha256"][:12],
        )
        for row in rows
    ]
    output.show(rows, as_json, lambda console: console.print(output.table(columns, cells)))


def show(
    adapter_id: One, file: ConfigFile = None, data_dir: DataDir = None, name: Name = None, as_json: AsJson = False
) -> None:
    """One version: its update, the gates' verdicts with their numbers, and every change of its stage."""
    found = routes(recorded(file, data_dir, name)).get(f"/v1/adapters/{adapter_id}")
    output.show(found, as_json, lambda console: _draw(console, found))


def _draw(console: Console, found: Mapping[str, Any]) -> None:
    plain = {k: v for k, v in found.items() if k not in ("update", "verdicts", "moves")}
    console.print(output.facts({**plain, "created_at": output.when(found["created_at"])}))
    if found["update"]:
        console.print(output.facts({**found["update"], "at": output.when(found["update"]["at"])}, "update"))
    verdicts = [(v["gate"], v["decision"], v["reason"], v["evidence"]) for v in found["verdicts"]]
    console.print(output.table(("gate", "decision", "because", "evidence"), verdicts, "verdicts"))
    moves = [(output.when(m["at"]), m["before"], m["after"], m["actor"], m["reason"]) for m in found["moves"]]
    console.print(output.table(("when", "from", "to", "by", "because"), moves, "moves"))


def rollback(
    adapter_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="An earlier one to go back to; left out: the last.")
    ] = None,
    reason: Reason = "rolled back by hand",
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Undo: take the live adapter off users. An earlier one answers the next request; no evidence is needed."""
    asked = routes(recorded(file, data_dir, name))
    taken = adapter_id or asked.get("/v1/adapters")["live"]
    if taken is None:
        raise StoreError("nothing is live yet: start `gradatim serve` on this data directory once")
    done = asked.post(f"/v1/adapters/{taken}/rollback", {"reason": reason})
    output.show(done, as_json, lambda console: console.print(f"rolled back: {done['live']} is live"))


def promote(
    adapter_id: One,
    reason: Reason = "promoted by hand",
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Put a version live on your word: an earlier one, or a candidate past the gates that are left."""
    done = routes(recorded(file, data_dir, name)).post(f"/v1/adapters/{adapter_id}/promote", {"reason": reason})
    output.show(done, as_json, lambda console: console.print(f"{done['live']} is live"))


def approve(
    adapter_id: One,
    reason: Reason = "approved by hand",
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Make a version that is or was live the anchor: what comes after it may lose only so much against it."""
    done = routes(recorded(file, data_dir, name)).post(f"/v1/adapters/{adapter_id}/approve", {"reason": reason})
    output.show(done, as_json, lambda console: console.print(f"{done['anchor']} is the anchor"))


def reject(
    adapter_id: One,
    reason: Reason = "rejected by hand",
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Take a version that is on its way up (candidate, shadow, canary) off it, so that the next one may be made."""
    done = routes(recorded(file, data_dir, name)).post(f"/v1/adapters/{adapter_id}/reject", {"reason": reason})
    output.show(done, as_json, lambda console: console.print(f"{done['rejected']} is rejected"))
