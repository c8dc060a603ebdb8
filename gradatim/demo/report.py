"""Makes ``report.html`` (one file, pictures inline) and ``curve.png`` of a ``results.json``.

All rates come with Wilson 95 % intervals. It reads the file and nothing else, so a report can be made again later.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradatim.demo.tasks import TASKS

Run = dict[str, Any]
Rows = list[dict[str, Any]]

_COLOURS = dict(zip(TASKS, ("#1b6ca8", "#8e44ad", "#2e8b57", "#c97b12", "#b03a2e"), strict=True))
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } pre { background: #f5f5f5; padding: .7rem; white-space: pre-wrap; }
.ok { color: #1a7a3c; } .bad { color: #b03a2e; }
"""


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a rate (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def write_report(results_path: Path, out: Path) -> Path:
    """Writes report.html and curve.png beside each other and returns the report's path."""
    run: Run = json.loads(results_path.read_text(encoding="utf-8"))
    figure = _success_figure(run)
    figure.savefig(out / "curve.png", dpi=150)
    path = out / "report.html"
    path.write_text(page(run), encoding="utf-8")
    return path


def page(run: Run) -> str:
    """The whole report as HTML."""
    sections: Sequence[tuple[str, Callable[[Run], str]]] = (
        ("Held-out success", _summary),
        ("Success over time", lambda r: _svg(_success_figure(r))),
        ("Retention", _retention),
        ("Corrections still needed per episode", lambda r: _svg(_corrections_figure(r))),
        ("Updates, and what each was made of", _updates),
        ("From feedback to live", _latency),
        ("Harmful batch", _harmful),
        ("Rollback, and the frozen model", _rollback),
        ("Requests", _requests),
        ("How it was measured", _method),
    )
    body = "\n".join(f"<h2>{title}</h2>\n{section(run)}" for title, section in sections)
    state = "" if run["complete"] else '<p class="bad">This run broke off before its end.</p>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>gradatim demo</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>gradatim demo: {_esc(run['config']['name'])} run of "
        f"{_esc(run['model'])} on {_esc(run['pages'])}</h1>{state}\n{body}\n</body></html>\n"
    )


def _esc(value: object) -> str:
    return html.escape(str(value))


def _table(header: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{_esc(cell)}</th>" for cell in header)
    lines = ("<tr>" + "".join(f"<td>{_esc(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _of(run: Run, agent: str, task: str) -> Rows:
    return [e for e in run["evaluations"] if e["agent"] == agent and e["task"] == task]


def _rate(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None or not evaluation["n"]:
        return ""
    low, high = wilson(evaluation["successes"], evaluation["n"])
    successes, n = evaluation["successes"], evaluation["n"]
    return f"{successes}/{n} = {successes / n:.2f} [{low:.2f}, {high:.2f}]"


def _last(rows: Rows) -> dict[str, Any] | None:
    return rows[-1] if rows else None


def _summary(run: Run) -> str:
    rows = []
    for task in TASKS:
        tested = [e for e in _of(run, "live", task) if e["phase"] not in ("stream", "redesign")]
        last = _last(tested or _of(run, "live", task))
        floor = run["random_floor"].get(task)
        dialogs = f"{last['dialog_successes']}/{last['dialogs']}" if last and last["dialogs"] else ""
        rows.append(
            (
                task,
                "" if floor is None else f"{floor:.2f}",
                _rate(_last(_of(run, "frozen", task))),
                _rate(_last(_of(run, "retrieval", task))),
                _rate(last),
                last["model"] if last else "",
                dialogs,
            )
        )
    return _table(
        ("task", "random valid", "frozen", "retrieval, same feedback", "live", "adapter", "with dialog"), rows
    )


def _axes(figure: Figure, ylabel: str, xlabel: str) -> Axes:
    axes = figure.subplots()
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _success_figure(run: Run) -> Figure:
    """Held-out success of the live adapter per task; the frozen control is dashed in the same colour."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = _axes(figure, "held-out success (greedy)", "seconds since the start")
    for task in TASKS:
        rows = [e for e in _of(run, "live", task) if e["n"]]
        if not rows:
            continue
        x = [e["at_s"] for e in rows]
        y = [e["successes"] / e["n"] for e in rows]
        bounds = [wilson(e["successes"], e["n"]) for e in rows]
        axes.plot(x, y, "o-", color=_COLOURS[task], label=task, markersize=4)
        axes.fill_between(x, [b[0] for b in bounds], [b[1] for b in bounds], color=_COLOURS[task], alpha=0.10, lw=0)
        frozen = _last([e for e in _of(run, "frozen", task) if e["n"]])
        if frozen:
            axes.axhline(frozen["successes"] / frozen["n"], color=_COLOURS[task], ls="--", lw=1, alpha=0.7)
    for number, phase in enumerate(run["phases"]):  # names on two lines, since short phases stand close together
        axes.axvline(phase["start_s"], color="#ccc", lw=0.8, zorder=0)
        axes.text(phase["start_s"], 1.05 + 0.05 * (number % 2), f" {phase['name']}", fontsize=7, color="#777")
    axes.set_ylim(-0.04, 1.15)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="live (dashed: frozen)")
    return figure


def _corrections_figure(run: Run) -> Figure:
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = _axes(figure, "corrections", "corrected episode, in order")
    episodes = [e for e in run["episodes"] if e["phase"] in ("stream", "redesign") and "login" in e["task"]]
    for task in ("login-user", "login-user-popup"):
        points = [(i, e["corrections"]) for i, e in enumerate(episodes, 1) if e["task"] == task]
        axes.bar([p[0] for p in points], [p[1] for p in points], color=_COLOURS[task], label=task, width=0.8)
    if episodes:
        axes.legend(fontsize=8, frameon=False)
    return figure


def _retention(run: Run) -> str:
    rows = []
    for task in ("enter-text", "login-user"):
        live = [e for e in _of(run, "live", task) if e["n"]]
        tests = [e for e in live if e["phase"] not in ("stream", "redesign")]
        if not tests:
            continue
        best = max(e["successes"] / e["n"] for e in live if e["n"] == tests[-1]["n"])
        now = tests[-1]["successes"] / tests[-1]["n"]
        rows.append((task, *(_rate(e) for e in (tests[0], tests[-1])), f"{now / best:.2f}" if best else ""))
    return _table(("task", "after the stream", "after the redesign", "last / best, same prompts"), rows)


def _updates(run: Run) -> str:
    rows = []
    for adapter in run["adapters"]:
        kinds = ", ".join(f"{n} {kind}" for kind, n in adapter["made_of"].items())
        verdicts = "; ".join(
            f"{v.get('gate', '')}: {v.get('decision', '')} {v.get('reason', '')}".strip() for v in adapter["verdicts"]
        )
        numbers = ", ".join(f"{k} {v:.3g}" for k, v in adapter["metrics"].items() if isinstance(v, int | float))
        fate = adapter["refused_because"] or verdicts
        rows.append((adapter["id"], adapter["parent"] or "", adapter["stage"], kinds, numbers, fate))
    counts = f"<p>{run['updates_applied']} updates applied, {run['updates_refused']} refused.</p>"
    return counts + _table(("adapter", "parent", "stage", "made of", "measured", "gates"), rows)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _latency(run: Run) -> str:
    seconds = run["feedback_to_live_s"]
    if not seconds:
        return "<p>No feedback had become part of a live adapter.</p>"
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = _axes(figure, "share of feedback", "seconds from feedback to live")
    ordered = sorted(seconds)
    axes.step([0.0, *ordered], [i / len(ordered) for i in range(len(ordered) + 1)], where="post", color="#1b6ca8")
    p50, p95 = percentile(seconds, 0.5), percentile(seconds, 0.95)
    return f"<p>p50 {p50:.1f} s, p95 {p95:.1f} s over {len(seconds)} pieces of feedback.</p>" + _svg(figure)


def _mark(good: bool, text: str) -> str:
    return f'<p class="{"ok" if good else "bad"}">{_esc(text)}</p>'


def _harmful(run: Run) -> str:
    harmful = run["harmful"]
    if harmful is None:
        return "<p>Not reached.</p>"
    fate = "stopped" if harmful["stopped"] else "not stopped" if harmful["judged"] else "no verdict in time"
    made = _table(
        ("adapter made of it", "stage", "because"),
        (
            (a["id"], a["stage"], a["refused_because"] or "; ".join(str(v.get("reason", "")) for v in a["verdicts"]))
            for a in harmful["adapters"]
        ),
    )
    text = (
        f"{harmful['corrections']} inverted corrections: {fate}. Live before {harmful['live_before']}, after "
        f"{harmful['live_after']}; {harmful['updates_refused']} updates refused."
    )
    return _mark(harmful["stopped"], text) + made


def _rollback(run: Run) -> str:
    parts = []
    rollback, identity = run["rollback"], run["identity"]
    if rollback is not None:
        text = rollback["skipped"] or (
            f"{rollback['before']} to {rollback['target']}: the next request was answered by "
            f"{rollback['answered_by']}, {rollback['seconds']:.2f} s after the call."
        )
        parts.append(_mark(rollback["acted"], text))
    if identity is not None:
        same = "the same as" if identity["identical"] else "NOT the same as"
        text = f"{run['model']}@0 answers {identity['prompts']} prompts greedily {same} before it all."
        parts.append(_mark(identity["identical"], text))
    return "".join(parts) or "<p>Not reached.</p>"


def _requests(run: Run) -> str:
    failures, latencies = run["failures"], run["latencies_s"]
    times = ""
    if latencies:
        times = f" p50 {percentile(latencies, 0.5):.2f} s, p99 {percentile(latencies, 0.99):.2f} s a request."
    text = f"{len(failures)} of {run['requests']} requests failed.{times}"
    return _mark(not failures, text) + "".join(f"<pre>{_esc(f)}</pre>" for f in failures[:10])


def _method(run: Run) -> str:
    config, prompt = run["config"], run["prompt"]
    splits = _table(
        ("task", "training prompts", "held-out prompts", "seeds tried", "distinct first pages"),
        ((s["task"], s["train"], s["held_out"], s["seeds_tried"], s["distinct_prompts"]) for s in run["splits"]),
    )
    examples = "\n\n".join(f"user:\n{page}\nassistant: {action}" for page, action in prompt["examples"])
    return (
        "<p>Held-out and training prompts are disjoint by the text of the rendered first page. Held-out tests are "
        "greedy and pinned to one adapter, and are marked so that nothing of them is learned; the stream is sampled "
        f"at temperature {config['temperature']}. Intervals are Wilson 95 %. Points of the curve use the first "
        f"{config['curve']} held-out prompts, tests all {config['held_out']}. One run, one seed.</p>"
        f"{splits}<p>The prompt, the same for every task and agent (retrieval replaces the examples); at most "
        f"{prompt['max_tokens']} tokens, stop at a line break:</p><pre>system: {_esc(prompt['system'])}\n\n"
        f"{_esc(examples)}</pre>"
    )
