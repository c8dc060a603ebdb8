"""Commands about what is remembered: looking, epochs, forgetting, consolidating, pinned notes.

With a server they act on the next token; without one on the store, for the next start.
"""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from gradatim.cli import output
from gradatim.cli.options import AsJson, ConfigFile, DataDir, Name, recorded
from gradatim.cli.remote import routes

Tenant = Annotated[str | None, typer.Option(help="Whose memory (the `user` of the requests); left out: all of them.")]
Reason = Annotated[str, typer.Option(help="Kept with the change.")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    group = typer.Typer(no_args_is_help=True, help="What judged answers taught at once, before any weights moved.")
    group.command(epilog="Example: gradatim memory stats --json")(stats)
    group.command(epilog="Example: gradatim memory show --tenant alice")(show)
    group.command(epilog="Example: gradatim memory check")(check)
    group.command(epilog="Example: gradatim memory epoch --reason 'the page was redesigned'")(epoch)
    group.command("undo-epoch", epilog="Example: gradatim memory undo-epoch")(undo_epoch)
    group.command(epilog="Example: gradatim memory forget user alice")(forget)
    group.command(epilog="Example: gradatim memory compact")(compact)
    group.command(epilog="Example: gradatim memory consolidate")(consolidate)
    group.command(epilog="Example: gradatim memory pin --tenant alice 'Alice works in the Berlin office.'")(pin)
    group.command(epilog="Example: gradatim memory unpin n-0123456789ab")(unpin)
    group.command(epilog="Example: gradatim memory pins --tenant alice")(pins)
    app.add_typer(group, name="memory")


def stats(file: ConfigFile = None, data_dir: DataDir = None, name: Name = None, as_json: AsJson = False) -> None:
    """How much is remembered, how often it had a part in an answer, and what became of those."""
    found = routes(recorded(file, data_dir, name)).get("/v1/memory")
    output.show(found, as_json, lambda console: console.print(output.facts(found)))


def show(
    tenant: Tenant = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """The newest entries: which answer they were made of, for or against it, and what they did since."""
    asked = {"limit": str(limit)} | ({} if tenant is None else {"tenant": tenant})
    rows = routes(recorded(file, data_dir, name)).get(f"/v1/memory/entries?{urlencode(asked)}")["data"]
    columns = ("entry", "tenant", "when", "value", "counts", "helped", "harmed", "said by")
    cells = [
        (
            row["id"],
            row["tenant"],
            output.when(row["created_at"]),
            f"{row['value']:+.2f}",
            "yes" if row["active"] else "no: an earlier epoch",
            row["helped"],
            row["harmed"],
            ", ".join(row["sources"]),
        )
        for row in rows
    ]
    output.show(rows, as_json, lambda console: console.print(output.table(columns, cells)))


def check(file: ConfigFile = None, data_dir: DataDir = None, name: Name = None, as_json: AsJson = False) -> None:
    """Compare what answers are made with to what is stored. Exit code 1 where they differ."""
    found = routes(recorded(file, data_dir, name)).get("/v1/memory/check")
    output.show(found, as_json, lambda console: console.print(output.facts(found)))
    if not found["ok"]:
        raise typer.Exit(1)


def epoch(
    tenant: Tenant = None,
    reason: Reason = "begun by hand",
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Begin anew: what was remembered before counts no more, until it is undone. For when the world has changed."""
    _change("epoch", {"tenant": tenant, "reason": reason}, "epoch {number} has begun", file, data_dir, name, as_json)


def undo_epoch(
    tenant: Tenant = None,
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Take back the newest epoch; what was remembered since it began stays."""
    _change("undo-epoch", {"tenant": tenant}, "epoch {number} is undone", file, data_dir, name, as_json)


def forget(
    scope: Annotated[str, typer.Argument(help="user, tenant, episode, session, source, entry or all.")],
    value: Annotated[str, typer.Argument(help="Which one; nothing for all.")] = "",
    reason: Reason = "forgotten by hand",
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Delete what is remembered of somebody or something, for good and by the next token."""
    body = {"scope": scope, "value": value, "reason": reason}
    _change("forget", body, "{entries} entries and {sessions} sessions are forgotten", file, data_dir, name, as_json)


def compact(file: ConfigFile = None, data_dir: DataDir = None, name: Name = None, as_json: AsJson = False) -> None:
    """Delete keys of weights that no longer answer, and what is left of entries that are gone."""
    said = "{spaces} key spaces, {keys} stray keys and what was left of {orphans} entries are deleted"
    _change("compact", {}, said, file, data_dir, name, as_json)


def consolidate(
    undo: Annotated[
        bool, typer.Option("--undo", help="Let all count again that the live adapter made needless.")
    ] = False,
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Retire what the live adapter knows without memory. A server that runs follows within seconds."""
    from gradatim.app.offline import consolidation

    told = consolidation(recorded(file, data_dir, name), undo=undo)
    if undo:
        output.show(told, as_json, lambda console: console.print(f"{told['undone']} entries count again"))
        return
    columns = ("entry", "tenant", "helped", "harmed", "chance without memory", "paraphrases", "retired")
    keys = ("id", "tenant", "helped", "harmed", "chance", "paraphrases", "retired")
    cells = [tuple(f"{row[k]:.3f}" if k == "chance" else row[k] for k in keys) for row in told["entries"]]
    output.show(told, as_json, lambda console: console.print(output.table(columns, cells)))


def pin(
    text: Annotated[str, typer.Argument(help="What every request of the tenant is told, in its system part.")],
    tenant: Annotated[str, typer.Option(help="Whose requests (their `user`); left out: those without one.")] = "",
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Pin a note to a tenant: plain state, told from the next request on. Pinned versions answer without it."""
    _change("notes", {"tenant": tenant, "text": text}, "{id} is pinned", file, data_dir, name, as_json)


def unpin(
    note: Annotated[str, typer.Argument(help="Its id, as `gradatim memory pins` shows it.")],
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Delete a note; from the next request on it is told no more."""
    gone = routes(recorded(file, data_dir, name)).delete(f"/v1/memory/notes/{quote(note, safe='')}")
    output.show(gone, as_json, lambda console: console.print(f"{gone['id']} is unpinned"))


def pins(
    tenant: Tenant = None,
    file: ConfigFile = None,
    data_dir: DataDir = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """The notes that are pinned."""
    asked = "" if tenant is None else f"?{urlencode({'tenant': tenant})}"
    rows = routes(recorded(file, data_dir, name)).get(f"/v1/memory/notes{asked}")["data"]
    cells = [(row["id"], row["tenant"], output.when(row["created_at"]), row["text"]) for row in rows]
    output.show(rows, as_json, lambda console: console.print(output.table(("note", "tenant", "when", "text"), cells)))


def _change(
    what: str,
    body: dict[str, Any],
    said: str,
    file: ConfigFile,
    data_dir: DataDir,
    name: Name,
    as_json: bool,
) -> None:
    done = routes(recorded(file, data_dir, name)).post(f"/v1/memory/{what}", body)
    output.show(done, as_json, lambda console: console.print(said.format(**done)))
