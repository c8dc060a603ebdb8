"""Whether it is learning, from what, and why not when it is not. Facts in, findings out: it looks at nothing itself.

A finding is ``good``, ``info`` (nothing to do), ``wait`` (nothing is wrong, something must come first) or ``bad``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gradatim.config import Config

Level = Literal["good", "info", "wait", "bad"]
_LOW_DISK_BYTES = 1 * 2**30
_NO_DISK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    about: str
    level: Level
    detail: str
    way_out: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was seen. ``learning`` is ``report.learning``; ``loop`` is the server's word on its loop process."""

    config: Config
    has_store: bool
    free_bytes: int
    server_pid: int | None
    server_url: str | None
    answers: bool
    trouble: str = ""  # why the server would not answer or record a request now, in its own words
    loop: Mapping[str, Any] | None
    learning: Mapping[str, Any] | None
    chromium: bool


def findings(facts: Facts) -> list[Finding]:
    """Everything worth saying, in the order of the flow."""
    return [
        *_directory(facts),
        *_server(facts),
        *_loop(facts),
        *(_learning(facts, facts.learning) if facts.learning else ()),
        *_demo(facts),
    ]


def summary(facts: Facts, found: list[Finding]) -> str:
    """One sentence: it is learning, or the first reason why not."""
    obstacle = next((f for f in found if f.level == "bad"), None) or next((f for f in found if f.level == "wait"), None)
    live = facts.learning["live"] if facts.learning else None
    learned = live is not None and not live.endswith("@0")
    if obstacle is None:
        return f"It is learning: {live} is live." if learned else "Everything is in place; nothing was learned yet."
    if learned and obstacle.level == "wait":
        return f"It is learning: {live} is live. Now: {obstacle.detail}"
    return f"It is not learning: {obstacle.detail}"


def _directory(facts: Facts) -> Iterator[Finding]:
    where = facts.config.data_dir
    if not facts.has_store:
        yield Finding("data", "wait", f"{where} holds no records yet", "gradatim serve")
    if facts.free_bytes < _NO_DISK_BYTES:
        yield Finding("disk", "bad", f"the disk of {where} is full", "free some space: writes are refused until then")
    elif facts.free_bytes < _LOW_DISK_BYTES:
        yield Finding(
            "disk", "info", f"{facts.free_bytes / 2**20:.0f} MiB are free on the disk of {where}", "free some space"
        )
    else:
        yield Finding("disk", "good", f"{facts.free_bytes / 2**30:.0f} GiB free")


def _server(facts: Facts) -> Iterator[Finding]:
    if facts.server_pid is None:
        yield Finding("server", "wait", "no server runs on this data directory", "gradatim serve")
    elif facts.server_url is None:
        yield Finding("server", "wait", f"the server (pid {facts.server_pid}) is starting", "wait a few seconds")
    elif facts.answers and facts.trouble:
        yield Finding("server", "bad", f"{facts.server_url} is not ready: {facts.trouble}", "see the server's log")
    elif not facts.answers:
        yield Finding(
            "server", "bad", f"{facts.server_url} does not answer", f"kill {facts.server_pid} and start it again"
        )
    else:
        yield Finding("server", "good", f"{facts.server_url}/v1 answers (pid {facts.server_pid})")


def _loop(facts: Facts) -> Iterator[Finding]:
    if not facts.config.learn:
        yield Finding("loop", "wait", "learning is switched off (mode = observe)", "serve without --mode observe")
        return
    loop = facts.loop
    if loop is None:
        return
    log = facts.config.data_dir / "loop.log"
    if loop["state"] == "off":
        yield Finding("loop", "wait", "the server was started with --mode observe", "serve without it")
    elif loop["state"] == "waiting":
        yield Finding(
            "loop",
            "bad",
            f"the loop process died with {loop.get('last_exit')} and is started again ({loop['restarts']} restarts)",
            f"see {log}",
        )
    elif loop.get("does") == "failing":
        yield Finding("loop", "bad", f"its turns fail: {loop.get('error', '')}", f"see {log}")
    else:
        again = f", restarted {loop['restarts']} times" if loop["restarts"] else ""
        yield Finding("loop", "good", f"{loop.get('does', 'running')} (pid {loop.get('pid')}{again})")


def _learning(facts: Facts, learning: Mapping[str, Any]) -> Iterator[Finding]:
    yield _feedback(learning)
    if learning["records"]["feedback"]:
        yield _judged(learning)
        yield from _reward(learning.get("reward"))
        yield _examples(facts.config, learning)
        yield from _updates(learning)
        yield from _gamed(learning.get("gamed"), facts.config)
        yield from _awaited(learning.get("proof_awaited"), learning["live"])
        yield from _drift(learning.get("drift"), learning["live"])


def _feedback(learning: Mapping[str, Any]) -> Finding:
    if learning["records"]["feedback"] == 0:
        return Finding("feedback", "wait", "no feedback has come yet", "gradatim feedback send RESPONSE_ID --score 1")
    return Finding("feedback", "good", f"{learning['records']['feedback']} records")


def _judged(learning: Mapping[str, Any]) -> Finding:
    judged, abstained = learning["judged_recently"], learning["abstained_recently"]
    if judged == 0:
        return Finding(
            "rewards", "wait", f"{learning['unjudged']} episodes wait to be judged", "they settle in seconds"
        )
    reasons = "; ".join(f"{n} times {reason}" for reason, n in learning["abstained_because"].items())
    if judged == abstained:
        return Finding(
            "rewards",
            "wait",
            f"the last {judged} judgements all abstained: {reasons}",
            "send clearer feedback, or weigh its source higher ([reward] in gradatim.toml)",
        )
    detail = f"{judged - abstained} of the last {judged} episodes were judged"
    return Finding("rewards", "good", detail + (f"; the others: {reasons}" if abstained else ""))


def _reward(reward: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Which rule judges, and whether it has the labels that it takes."""
    if reward is None:
        return
    labels, wanted = reward["audited_labels"], reward["labels_wanted"]
    more = "gradatim feedback queue names the episodes to audit"
    if reward["rule"] == "weighted":
        if labels:
            detail = f"the weighted rule judges: {labels} audited labels of the {wanted} that calibration takes"
            yield Finding("calibration", "info", detail, more)
        else:
            detail = "the weighted rule judges: no outcome came from a source that reward.audited names"
            yield Finding("calibration", "info", detail, "name the sources that see the truth; " + more)
        return
    yield from _realised(reward)
    stated = f"{100 * reward['risk']:.0f} % at {100 * reward['confidence']:.0f} % confidence"
    if reward.get("acts_from") is None:
        held = reward.get("held_out_labels", 0)
        detail = (
            f"it abstains on all that is not audited: {held} held-out labels show no way to keep a risk of {stated}"
        )
        yield Finding("calibration", "wait", detail, more)
        return
    detail = f"a risk of {stated}, on {labels} audited labels; {100 * reward['coverage']:.0f} % of open episodes judged"
    yield Finding("calibration", "good", detail)


def _realised(reward: Mapping[str, Any]) -> Iterator[Finding]:
    """Where the newest audited labels say otherwise than the stated risk."""
    wrong, risk = reward.get("window_selective_risk"), reward["risk"]
    judged = round((reward.get("window_coverage") or 0.0) * reward.get("window_labels", 0))
    if wrong is None or wrong <= risk or judged < 20:
        return
    detail = f"{100 * wrong:.0f} % of the newest {judged} rewards that were audited later had the wrong sign"
    yield Finding("realised risk", "info", f"{detail}; {100 * risk:.0f} % is the stated risk", "audit more episodes")


def _examples(config: Config, learning: Mapping[str, Any]) -> Finding:
    waiting, wanted = learning["waiting_examples"], config.learner.min_examples
    if waiting == 0:
        return Finding("examples", "info", "none wait: all that was judged has been learned from")
    if waiting < wanted:
        detail = f"{waiting} examples wait for an update, which wants {wanted} with a good answer"
        return Finding("examples", "wait", detail, "gradatim learn --once does it now, where no server runs")
    return Finding("examples", "good", f"{waiting} wait for the next update")


def _updates(learning: Mapping[str, Any]) -> Iterator[Finding]:
    last = learning["last_update"]
    refused = learning["refused_recently"]
    if last is None:
        return
    ago_s = max(0.0, time.time() - last["at"])
    made = f"{learning['applied_recently']} of the last {learning['updates_recently']} updates made an adapter"
    yield Finding(
        "updates", "good" if learning["applied_recently"] else "bad", f"{made}; the last one {ago_s:.0f} s ago"
    )
    if refused:
        newest = refused[0]
        level: Level = "bad" if newest["at"] >= last["at"] and len(refused) >= 3 else "info"
        yield Finding(
            "gate",
            level,
            f"{len(refused)} refused; last {newest['what']} by {newest['by']}: {newest['reason']}",
            f"gradatim adapters show {newest['what']}" if "gate" in newest["by"] else "",
        )
    if learning["live"]:
        yield Finding("live", "good", f"{learning['live']}, one of {learning['adapters']} versions")


def _gamed(gamed: Mapping[str, Any] | None, config: Config) -> Iterator[Finding]:
    """Whether the reward is still one of what it stands for."""
    if gamed is not None:
        way_out = f"look at its newest episodes; gradatim adapters rollback, or approve {gamed['adapter']}"
        yield Finding("reward against judges", "bad", gamed["reason"], way_out)
    elif len(config.critics.run) > 1 and not config.reward.held_out:
        detail = "no critic is kept for judging: whether the reward is gamed cannot be seen"
        yield Finding("reward against judges", "info", detail, "name one in reward.held_out")


def _awaited(proof: Mapping[str, Any] | None, live: str | None) -> Iterator[Finding]:
    """Whether updates are held back until it is proven that learning is worth it."""
    if proof is not None:
        way_out = f"gradatim adapters approve {live}, if it does well; or set release.base_share"
        yield Finding("proof", "wait", f"{proof['adapter']} was held back: {proof['reason']}", way_out)


def _drift(drift: Mapping[str, Any] | None, live: str | None) -> Iterator[Finding]:
    """The newest thing seen to change, and the newest word on why rewards fell."""
    told = drift["told"] if drift else []
    ways_out = {
        "world": 'drift.react = "adapt" turns to what is new; gradatim memory epoch sets old memory aside',
        "adapter": "gradatim adapters rollback, where the watch has not done so",
        "unknown": "release.holdback or release.base_share has another adapter answer beside it",
    }
    causes = [row for row in told if row["what"] in ways_out]
    for row in causes[:1]:
        way_out = "" if row.get("adapt") else ways_out[row["what"]]
        at_fault = row["what"] == "adapter" and row["live"] == live
        yield Finding("drift", "bad" if at_fault else "info", row["reason"], way_out)
    for row in [row for row in told if row["what"] == "changed"][:1]:
        yield Finding("drift", "info", row["reason"])


def _demo(facts: Facts) -> Iterator[Finding]:
    if not facts.chromium:
        yield Finding(
            "demo",
            "info",
            "Chromium is missing, which only the demo needs",
            "sudo sh scripts/install_system.sh, or gradatim demo --browser-free",
        )
