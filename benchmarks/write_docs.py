"""Write docs/benchmarks.md, and the README's session and figures, from what the last full run of each benchmark left in
benchmarks/results/."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft")
ARMS = ("off", "on")


def cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def header() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        "# Benchmarks\n\nWritten by `benchmarks/write_docs.py` from the last full runs; not by hand.\n\n"
        f"Machine: {os.cpu_count()} cores, {cpu()}, no GPU. Python {platform.python_version()}, {packages}.\n"
    )


def number(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.3g}"


def table(result: Mapping[str, Any]) -> str:
    date = time.strftime("%Y-%m-%d", time.gmtime(result["at"]))
    scale = result["details"].get("scale", 1.0)
    part = "" if scale == 1.0 else f" --scale {scale}"
    lines = [f"## {result['name']}", "", f"`python benchmarks/{result['name']}.py{part}` · {date}", ""]
    lines += ["| what | value | 95 % interval | target | met |", "|---|---|---|---|---|"]
    for goal in result["goals"]:
        detail = result["details"].get(goal["goal"])
        interval = detail.get("interval_95") if isinstance(detail, dict) else None
        between = f"{number(interval[0])} to {number(interval[1])}" if interval and not math.isnan(interval[0]) else ""
        met = {True: "yes", False: "**no**", None: ""}[goal["met"]]
        lines.append(f"| {goal['goal']} | {number(goal['value'])} | {between} | {goal['target']} | {met} |")
    return "\n".join(lines) + "\n"


def seeds(result: Mapping[str, Any]) -> str:
    """Every seed's figure beside its target."""
    count = len(next(iter(result["details"].values()))["seeds"])
    lines = ["| | " + " | ".join(f"seed {n}" for n in range(count)) + " | target |", "|---" * (count + 2) + "|"]
    for goal in result["goals"]:
        values = " | ".join(f"{value:.2f}" for value in result["details"][goal["goal"]]["seeds"])
        target = goal["target"] + ("" if goal["met"] is not False else ": **not met**")
        lines.append(f"| {goal['goal']} | {values} | {target} |")
    return "\n".join(lines)


def beside_learning(result: Mapping[str, Any]) -> str:
    """What 20 updates beside streaming clients cost those, as one point of a list."""
    found = {g["goal"]: g["value"] for g in result["goals"]}
    return (
        "- While 4 clients stream without a pause and 20 updates are trained, gated and put live: "
        f"{found['responses other than 2xx']:.0f} failed responses, {found['broken streams']:.0f} broken streams, p99 "
        f"time per token {found['p99 time per token while learning, ratio to idle']:.1f} times that of the same load "
        "without learning."
    )


def forgetting(result: Mapping[str, Any]) -> str:
    """What earlier skills keep at the default learning rate and at three times of it, as one point of a list."""
    found = {g["goal"]: g["value"] for g in result["goals"]}
    least = [
        found[f"lr {lr}: least share of an earlier skill kept, {arm}"]
        for lr, arm in (("0.00025", "default"), ("0.00075", "default"), ("0.00075", "gated"))
    ]
    changes = [-found[f"lr 0.00025: backward transfer loss, {arm}"] for arm in ("default", "naive")]
    return (
        f"- Taught four skills in turn ({result['details']['seeds']} seeds, the learner alone), each earlier one keeps "
        f"at least {least[0]:.2f} of its chance of a right answer; their mean change is {changes[0]:+.2f}, with naive "
        f"fine-tuning {changes[1]:+.2f}. At three times the default learning rate the least is {least[1]:.2f}, and "
        f"{least[2]:.2f} with the gate between."
    )


def training_step(result: Mapping[str, Any]) -> str:
    """One DPO step against TRL's, as one point of a list."""
    found = {g["goal"]: g["value"] for g in result["goals"]}
    ratio = found["bfloat16, 4 pairs: reference in the step, TRL / ours"]
    agents = found["bfloat16: 4 pairs behind a 1024-token system prompt, TRL / ours"]
    memory = found["bfloat16: peak memory above the weights, ours / TRL"]
    return (
        f"- A DPO step on the same batch of 4 pairs costs TRL's trainer {ratio:.1f} times our CPU time, {agents:.1f} "
        f"times where the pairs share a long system prompt; ours takes {memory:.2f} of its memory above the weights "
        "(bfloat16; in float32 loss and gradients are the same)."
    )


_ATTACKS = {
    "flip": "wrong corrections",
    "hypnosis": "one answer pressed on the model",
    "length": "long-winded answers",
    "flattery": "flattering answers",
    "backdoor": "a trigger word",
}


def hostile(result: Mapping[str, Any]) -> str:
    """What feedback from hostile users came to, as one point of a list."""
    found: dict[str, float] = {g["goal"]: g["value"] for g in result["goals"]}

    def kept(kind: str, arm: str) -> float:
        return found[f"20.0% {kind}, {arm}: chance of a right answer to known tasks, less the anchor's"]

    worst = min(_ATTACKS, key=lambda kind: kept(kind, "off"))
    counts = {arm: sum(c.startswith(worst) and c.endswith(arm) for c in result["details"]["cells"]) for arm in ARMS}
    trigger = found["20.0% backdoor, on: success of the attack, less before"]
    return (
        f"- With a fifth of the feedback from hostile users, in {found['of so many runs']:.0f} runs of {len(_ATTACKS)} "
        f"attacks, {found['20 % hostile: runs with an adapter below the anchor live']:.0f} adapters went live that "
        "were more than 5 points worse than the anchor on what it knew. The attack that did most harm without the "
        f"defences was {_ATTACKS[worst]}: {kept(worst, 'off'):+.2f} (seeds: {counts['off']}), with them "
        f"{kept(worst, 'on'):+.2f} (seeds: {counts['on']}). What they do not stop is a backdoor: users who agree on a "
        "wrong answer to pages with a word of theirs, and claim success, taught it to "
        f"{trigger:.2f} more of such pages."
    )


def remembered(result: Mapping[str, Any]) -> str:
    """How often a corrected mistake is made again before any weights moved, as one point of a list."""
    found = {g["goal"]: g["value"] for g in result["goals"]}
    same = "repeated a second after the correction, same wording, memory"
    other = "paraphrase, memory"
    encoder = f" ({found[f'by an encoder: {other}']:.2f} with a sentence encoder)"
    return (
        f"- With memory on, a corrected mistake is made again a second later in {found[same]:.2f} of the cases in the "
        f"same words, where earlier answers in the prompt leave {found['same, retrieval']:.2f}; asked in other words, "
        f"in {found[other]:.2f}{encoder if f'by an encoder: {other}' in found else ''} against "
        f"{found['paraphrase, retrieval']:.2f}. Answers under other instructions stay as they were."
    )


def consolidated(result: Mapping[str, Any]) -> str:
    """What the weights know of it after days of such traffic, as one point of a list."""
    found = {g["goal"]: g["value"] for g in result["goals"]}
    nights = result["details"]["weights alone, by day"]
    alone = "same wording, weights alone, "
    at_first, in_the_end = found[f"{alone}after the first night"], found[f"{alone}in the end"]
    return (
        f"- What memory supplies, the weights learn: after {len(nights[0])} days of such traffic ({len(nights)} seeds) "
        f"they repeat {in_the_end:.2f} of those mistakes without memory ({at_first:.2f} after the first update, 1 "
        f"frozen), and {found['answers retired in the last night']:.0f} remembered answers are retired. With memory "
        f"{found['same wording, with memory, in the end']:.2f} are repeated, in other words "
        f"{found['paraphrase, with memory, in the end']:.2f}."
    )


def between(page: str, name: str, content: str) -> str:
    """The page with that content between its two markers."""
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not end:
        raise SystemExit(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
    return f"{before}<!-- {name} -->\n{content}\n{end}{after}"


def last(name: str) -> Mapping[str, Any]:
    """The last full run of a benchmark."""
    result: Mapping[str, Any] = json.loads((harness.RESULTS / f"{name}.json").read_text())
    return result


def main() -> None:
    sections = [header()]
    for path in sorted(harness.RESULTS.glob("bench_*.json")):
        sections.append(table(last(path.stem)))
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(sections))
    readme = ROOT / "README.md"
    page = between(readme.read_text(), "session", f"```text\n{(harness.RESULTS / 'demo_session.txt').read_text()}```")
    page = between(page, "seeds", seeds(last("bench_demo")))
    page = between(page, "forgetting", forgetting(last("bench_forgetting")))
    page = between(page, "hostile", hostile(last("bench_poison")))
    memory = (remembered(last("bench_repeat_mistakes")), consolidated(last("bench_consolidation")))
    page = between(page, "memory", "\n".join(memory))
    page = between(page, "step", training_step(last("bench_dpo_step")))
    readme.write_text(between(page, "beside", beside_learning(last("bench_updates"))))


if __name__ == "__main__":
    main()
