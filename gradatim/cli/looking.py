"""Commands that only look: status, episodes, explain, config."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gradatim import config as configuration
from gradatim.cli import output
from gradatim.cli.options import AsJson, ConfigFile, DataDir, Limit, Name, config_file, overrides, recorded, settings
from gradatim.cli.remote import routes

Json = Mapping[str, Any]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(epilog="Example: gradatim status --json")(status)
    app.command(epilog="Example: gradatim episodes, or gradatim episodes EPISODE_ID")(episodes)
    app.command(epilog="Example: gradatim explain chatcmpl-8a61")(explain)
    app.command(epilog="Example: gradatim config --config gradatim.toml")(config)


def status(file: ConfigFile = None, data_dir: DataDir = None, name: Name = None, as_json: AsJson = False) -> None:
    """What is live, what the loop does, and what was learned."""
    asked = routes(recorded(file, data_dir, name))
    value = {"url": asked.url, **asked.get("/v1/status")}
    if asked.url is None:
        value.pop("server", None)  # counters of a server that does not run
    output.show(value, as_json, lambda console: _draw_status(console, value))


def _draw_status(console: Console, value: Json) -> None:
    apart = (
        "last_update",
        "refused_recently",
        "records",
        "feedback_to_live_s",
        "loop",
        "server",
        "abstained_because",
        "reward",
        "drift",
        "gamed",
        "proof_awaited",
    )
    top = {k: v for k, v in value.items() if k not in apart}
    if latencies := value["feedback_to_live_s"]:
        top["feedback to live"] = f"{sorted(latencies)[len(latencies) // 2]:.1f} s (median of {len(latencies)})"
    console.print(output.facts(top))
    if reward := value.get("reward"):
        console.print(output.facts({k: v for k, v in reward.items() if k not in ("sources", "families")}, "reward"))
        console.print(_reliabilities(reward.get("sources", ())))
    for section in ("records", "loop", "server"):
        if value.get(section):
            console.print(output.facts(value[section], section))
    if gamed := value.get("gamed"):
        console.print(output.facts({**gamed, "at": output.when(gamed["at"])}, "the reward is gamed"))
    if awaited := value.get("proof_awaited"):
        console.print(output.facts({**awaited, "at": output.when(awaited["at"])}, "learning waits for proof"))
    _draw_drift(console, value.get("drift") or {"told": []})
    if last := value["last_update"]:
        console.print(output.facts({**last, "at": output.when(last["at"])}, "last update"))
    if refused := value["refused_recently"]:
        rows = [(output.when(r["at"]), r["what"], r["by"], r["reason"]) for r in refused[:5]]
        console.print(output.table(("when", "what", "by", "because"), rows, "refused"))


def _draw_drift(console: Console, drift: Json) -> None:
    for name, title in (("lift", "lift of learning"), ("lift_of_live", "lift of the live adapter")):
        if lifts := drift.get(name):
            shown = {k: f"{v['lift']:+.3f} (95 %: {v['low']:+.2f} to {v['high']:+.2f})" for k, v in lifts.items()}
            console.print(output.facts(shown, title))
    if told := drift["told"]:
        rows = [(output.when(r["at"]), r["what"], r["reason"]) for r in told[:5]]
        console.print(output.table(("when", "what", "seen"), rows, "drift"))


def _reliabilities(rows: Sequence[Json]) -> Any:
    """How often each source is right, as far as audited labels and agreement tell."""
    keys = ("source", "opinions", "audited", "right", "independence")
    return output.table(keys, [[row[key] for key in keys] for row in rows], "sources") if rows else ""


def episodes(
    episode_id: Annotated[str | None, typer.Argument(metavar="ID", help="One episode in full.")] = None,
    limit: Limit = 20,
    file: ConfigFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """The newest episodes, or one in full: its steps, feedback, reward and credit."""
    asked = routes(recorded(file, data_dir))
    if episode_id is None:
        rows = asked.get(f"/v1/episodes?limit={min(limit, 200)}")["data"]
        output.show(rows, as_json, lambda console: _draw_episodes(console, rows))
    else:
        found = asked.get(f"/v1/episodes/{episode_id}")
        output.show(found, as_json, lambda console: _draw_episode(console, found))


def _draw_episodes(console: Console, rows: list[Json]) -> None:
    keys = ("id", "last_at", "skill", "steps", "adapter", "feedback", "reward")
    cells = [[output.when(row[k]) if k == "last_at" else row[k] for k in keys] for row in rows]
    console.print(output.table(("episode", "when", "skill", "steps", "adapter", "feedback", "reward"), cells))


def _draw_episode(console: Console, found: Json) -> None:
    credit = found["credit"] or {"step_ids": [], "advantages": [], "methods": [], "reasons": []}
    share = dict(zip(credit["step_ids"], credit["advantages"], strict=True))
    method = dict(zip(credit["step_ids"], credit["methods"], strict=True))
    why = dict(zip(credit["step_ids"], credit["reasons"], strict=False))
    steps = [
        (
            s["id"],
            s["adapter_id"],
            len(s["completion_ids"]),
            s["finish_reason"],
            share.get(s["id"]),
            method.get(s["id"]),
            output.short(why.get(s["id"], "")),
            output.short(s["text"]),
        )
        for s in found["steps"]
    ]
    console.print(
        output.table(("response", "adapter", "tokens", "finish", "credit", "by", "because", "answer"), steps, "steps")
    )
    console.print(_feedback(found["feedback"]))
    console.print(output.facts(_judgement(found["reward"]), "reward"))


def _feedback(rows: list[Json]) -> Any:
    columns = ("id", "kind", "source", "about", "value", "says")
    cells = [
        (f["id"], f["kind"], f["source"], f["step_id"], f["value"], output.short(f["correction"] or f["comment"]))
        for f in rows
        if not f["retracted"]
    ]
    return output.table(columns, cells, "feedback")


def _judgement(reward: Json | None) -> Json:
    return {k: reward[k] for k in ("value", "confidence", "reason")} if reward else {"value": "not judged yet"}


def explain(
    response_id: Annotated[str, typer.Argument(help="The id of a response.")],
    file: ConfigFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """What became of a response: captured, judged, credited, trained on or dropped, and why."""
    found = routes(recorded(file, data_dir)).get(f"/v1/explain/{response_id}")
    output.show(found, as_json, lambda console: _draw_explanation(console, found))


def _draw_explanation(console: Console, found: Json) -> None:
    step = found["step"]
    top = {"summary": found["summary"], "episode": step["episode_id"], "adapter": step["adapter_id"]}
    console.print(output.facts({**top, "answer": output.short(step["text"], 200)}))
    console.print(_feedback(found["feedback"]))
    console.print(output.facts({**_judgement(found["reward"]), "credit": found["credit"]}, "reward"))
    examples = [
        (e["id"], e["origin"], e["weight"], "the gate" if e["retained"] else "training") for e in found["examples"]
    ]
    console.print(output.table(("example", "from", "weight", "for"), examples, "examples"))
    updates = [(u["id"], u["adapter"], u["applied"], u["refused_because"]) for u in found["updates"]]
    console.print(output.table(("update", "adapter", "applied", "refused because"), updates, "updates"))


def config(file: ConfigFile = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """The effective configuration, and where each value came from."""
    chosen = settings(file, overrides(data_dir=data_dir))
    origins = _origins(chosen, config_file(file), data_dir)
    rows = {key: {"value": v, "from": origins[key]} for key, v in configuration.flatten(chosen).items()}
    cells = [(key, _shown(row["value"]), row["from"]) for key, row in rows.items()]
    output.show(rows, as_json, lambda console: console.print(output.table(("key", "value", "from"), cells)))


def _shown(value: Any) -> Any:
    """Of a list of tables, such as critics, what each of them uses."""
    if not isinstance(value, list | tuple):
        return value
    return [item["use"] if isinstance(item, Mapping) else item for item in value]


def _origins(chosen: configuration.Config, file: Path | None, data_dir: Path | None) -> Mapping[str, str]:
    """By key: default, the caution dial, the file, the environment, or an option."""
    values, plain = configuration.flatten(chosen), configuration.flatten(configuration.Config())
    out = {k: "default" if values[k] == plain[k] else f"caution = {chosen.caution}" for k in values}
    variables = {"server.api_key": "GRADATIM_API_KEY", "database": "GRADATIM_DATABASE"}
    out |= {key: variable for key, variable in variables.items() if values[key]}
    if file is not None:
        out |= dict.fromkeys(configuration.flatten(tomllib.loads(file.read_text())), str(file))
    return out | ({"data_dir": "--data-dir"} if data_dir else {})
