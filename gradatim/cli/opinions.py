"""Commands about feedback: the newest, and sending one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gradatim.cli import output
from gradatim.cli.options import AsJson, ConfigFile, DataDir, Limit, recorded
from gradatim.cli.remote import routes


def register(app: typer.Typer) -> None:
    """Add these commands."""
    group = typer.Typer(invoke_without_command=True)
    group.callback(epilog="Example: gradatim feedback")(default)
    group.command("list", epilog="Example: gradatim feedback list --limit 50")(listing)
    group.command("send", epilog="Example: gradatim feedback send chatcmpl-8a61 --correction 'click 3'")(send)
    group.command("queue", epilog="Example: gradatim feedback queue --limit 10")(audits)
    app.add_typer(group, name="feedback")


def default(context: typer.Context, file: ConfigFile = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the newest feedback, or send some."""
    if context.invoked_subcommand is None:
        listing(file=file, data_dir=data_dir, as_json=as_json)


def listing(limit: Limit = 20, file: ConfigFile = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """The newest feedback, every revision of it."""
    from gradatim.app.offline import newest_feedback

    rows = newest_feedback(recorded(file, data_dir), limit)
    columns = ("id", "when", "kind", "source", "about", "value", "says")
    cells = [
        (
            row["id"],
            output.when(row["at"]),
            "retracted" if row["retracted"] else row["kind"],
            row["source"],
            row["response"] or row["episode"],
            row["value"],
            output.short(row["correction"] or row["comment"]),
        )
        for row in rows
    ]
    output.show(rows, as_json, lambda console: console.print(output.table(columns, cells)))


def audits(limit: Limit = 20, file: ConfigFile = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """The episodes whose audited outcome would help most."""
    from gradatim.app.offline import audit_queue

    config = recorded(file, data_dir)
    rows = audit_queue(config, limit)
    columns = ("response", "episode", "P(good)", "why", "answer")
    cells = [(r["response"], r["episode"], round(r["good"], 2), r["why"], output.short(r["answer"])) for r in rows]
    output.show(rows, as_json, lambda console: console.print(output.table(columns, cells)))
    if rows and not as_json:
        source = next(iter(config.reward.audited), "human:audit*").replace("*", "-you")
        output.note(f"gradatim feedback send RESPONSE --outcome true --source {source}")


def send(
    response_id: Annotated[str, typer.Argument(help="The id of the response it is about.")],
    score: Annotated[float | None, typer.Option(min=-1, max=1, help="How good it was, -1 to 1.")] = None,
    correction: Annotated[str | None, typer.Option(help="The better answer.")] = None,
    outcome: Annotated[str | None, typer.Option(help="Of the whole task: true, false or unknown.")] = None,
    comment: Annotated[str | None, typer.Option(help="What was wrong with it, in words: a hint to learn from.")] = None,
    over: Annotated[str | None, typer.Option(help="The id of a worse answer to the same prompt.")] = None,
    source: Annotated[str, typer.Option(help="Who says so, KIND:NAME.")] = "human:cli",
    file: ConfigFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Send one opinion on a response. It is durable when this returns."""
    said = {"score": score, "correction": correction, "outcome": outcome, "comment": comment, "over": over}
    given = {kind: value for kind, value in said.items() if value is not None}
    if len(given) != 1:
        raise typer.BadParameter("give exactly one of --" + ", --".join(said))
    body = _body(response_id, *given.popitem())
    answer = routes(recorded(file, data_dir)).post("/v1/feedback", {**body, "source": source})
    output.show(answer, as_json, lambda console: console.print(f"recorded as {answer['id']}"))


def _body(response_id: str, kind: str, value: Any) -> Mapping[str, Any]:
    if kind == "over":
        return {"kind": "preference", "chosen_id": response_id, "rejected_id": value}
    field = kind if kind in ("correction", "comment") else "value"
    return {"kind": kind, "response_id": response_id, field: _outcome(value) if kind == "outcome" else value}


def _outcome(text: str) -> bool | None:
    try:
        return {"true": True, "false": False, "unknown": None}[text.lower()]
    except KeyError:
        raise typer.BadParameter("--outcome is one of true, false, unknown") from None
