"""The whole story of the demo, once per seed: what was learned, kept, transferred and stopped, with intervals.

Each seed draws other pages, for the stream and for the held-out sets, and trains with another seed. The frozen model,
the random-valid floor and the retrieval agent, which gets the same feedback, are measured in the same runs.
Held-out tests are greedy on prompts that the stream never showed. ``--results DIR`` keeps every run's results.json
and report.html, and takes up finished ones instead of running them again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from scipy import stats

Run = Mapping[str, Any]
SESSION = "session.txt"  # what the demo said on the terminal
WIDE = os.environ | {"COLUMNS": "100", "TERM": "dumb"}


def tell(seed: int, out: Path, quick: bool) -> Run:
    """One whole story, as a user would have it told."""
    shutil.rmtree(out, ignore_errors=True)  # of a run that did not come to its end
    command = [sys.executable, "-m", "gradatim", "demo", "--seed", str(seed), "--out", str(out)]
    told = subprocess.run(
        [*command, "--quick"] if quick else command, check=True, stdout=subprocess.PIPE, text=True, env=WIDE
    )
    (out / SESSION).write_text(told.stdout)
    return read(out)


def session(text: str) -> str:
    """A run's own words, up to the end of its table; without where the files went."""
    lines = [line.rstrip() for line in text.splitlines()]
    end = next((n for n, line in enumerate(lines) if line.startswith("└")), len(lines) - 1)
    return "\n".join(line for line in lines[: end + 1] if not line.strip().startswith("report:"))


def keep(run: Path) -> None:
    """What the README shows of a run: its session and its curve."""
    told = session((run / SESSION).read_text())
    (harness.RESULTS / "demo_session.txt").write_text(told + "\n")
    shutil.copyfile(run / "curve.png", harness.RESULTS.parent.parent / "docs" / "curve.png")


def read(out: Path) -> Run:
    run: Run = json.loads((out / "results.json").read_text())
    return run


def rate(run: Run, task: str, agent: str, phases: Sequence[str], full: bool = True) -> float:
    """Held-out success of an agent in the last of these phases that tested it."""
    size = run["config"]["held_out"] if full else 1
    found = [
        e
        for e in run["evaluations"]
        if e["task"] == task and e["agent"] == agent and e["phase"] in phases and e["n"] >= size
    ]
    return found[-1]["successes"] / found[-1]["n"] if found else math.nan


def best(run: Run, task: str) -> float:
    """The most that any adapter, the frozen one included, reached on the whole held-out set without help."""
    tests = [e for e in run["evaluations"] if e["task"] == task and e["n"] >= run["config"]["held_out"]]
    found = [e["successes"] / e["n"] for e in tests if e["agent"] != "retrieval"]
    return max(found, default=math.nan)


def corrections(run: Run, task: str, phase: str) -> list[int]:
    return [e["corrections"] for e in run["episodes"] if e["task"] == task and e["phase"] == phase]


def fall(run: Run) -> float:
    """Corrections an episode in the last round of the stream, as a share of those in the first."""
    counts, size = corrections(run, "login-user", "stream"), run["config"]["corrected"]
    return sum(counts[-size:]) / max(1, sum(counts[:size]))


def stopped(run: Run) -> float:
    harmful = run["harmful"]
    return float(bool(harmful) and harmful["judged"] and harmful["live_before"] == harmful["live_after"])


LATER = ("test", "after redesign")
MEASURES: Sequence[tuple[str, str, Callable[[Run], float]]] = (
    ("login-user held-out, frozen", "reported", lambda r: rate(r, "login-user", "frozen", ("baselines",))),
    ("login-user held-out, retrieval", "reported", lambda r: rate(r, "login-user", "retrieval", ("test",), False)),
    ("login-user held-out, learned", ">= 0.75", lambda r: rate(r, "login-user", "live", ("test",))),
    ("corrections an episode, last round / first", "<= 0.1", fall),
    (
        "enter-password held-out (never trained), frozen",
        "reported",
        lambda r: rate(r, "enter-password", "frozen", ("baselines",)),
    ),
    (
        "enter-password held-out (never trained), learned",
        "reported",
        lambda r: rate(r, "enter-password", "live", ("test",)),
    ),
    ("enter-text held-out, frozen", "reported", lambda r: rate(r, "enter-text", "frozen", ("baselines",))),
    (
        "enter-text held-out at the end / its best",
        ">= 0.95",
        lambda r: rate(r, "enter-text", "live", LATER) / best(r, "enter-text"),
    ),
    ("click-button held-out, frozen", "reported", lambda r: rate(r, "click-button", "frozen", ("baselines",))),
    (
        "click-button (outcome only), learned - frozen",
        ">= 0.25",
        lambda r: rate(r, "click-button", "live", LATER) - rate(r, "click-button", "frozen", ("baselines",)),
    ),
    ("login-user-popup held-out, frozen", "reported", lambda r: rate(r, "login-user-popup", "frozen", ("baselines",))),
    (
        "login-user-popup held-out, learned",
        ">= 0.7",
        lambda r: rate(r, "login-user-popup", "live", ("after redesign",)),
    ),
    (
        "login-user kept through the redesign",
        ">= 0.95",
        lambda r: rate(r, "login-user", "live", ("after redesign",)) / rate(r, "login-user", "live", ("test",)),
    ),
    ("harmful batch stopped", "== 1", stopped),
    ("failed requests", "== 0", lambda r: float(len(r["failures"]))),
    ("updates applied", "reported", lambda r: float(r["updates_applied"])),
    ("feedback to live, p50 s", "reported", lambda r: harness.percentile(r["feedback_to_live_s"], 50)),
    ("feedback to live, p95 s", "reported", lambda r: harness.percentile(r["feedback_to_live_s"], 95)),
)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over seeds (Student's t)."""
    if len(values) < 2:
        return math.nan, math.nan
    mean, sem = float(sum(values) / len(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * sem
    return mean - half, mean + half


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="keep the runs here, and take up the finished ones")
    args: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.results or Path(scratch)
        runs = []
        for seed in range(1 if args.quick else args.seeds):
            out = folder / f"seed-{seed}"
            finished = (out / "results.json").exists() and read(out)["complete"]
            runs.append(read(out) if finished else tell(seed, out, args.quick))
    goals, details = [], {}
    for name, target, measure in MEASURES:
        values = [measure(run) for run in runs]
        low, high = interval(values)
        details[name] = {"seeds": values, "interval_95": [low, high]}
        goals.append(harness.Goal(name, sum(values) / len(values), target))
    harness.report("bench_demo", goals, details, args)
    if args.results and not args.quick:
        keep(folder / "seed-0")
    if not args.json:
        for name, detail in details.items():
            print(name, [round(v, 3) for v in detail["seeds"]], [round(v, 3) for v in detail["interval_95"]])


if __name__ == "__main__":
    main()
