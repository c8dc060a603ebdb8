"""Flipped labels among new examples: what the gradient gate catches, what it refuses wrongly, and what it is good for.

SmolLM2-135M in bfloat16 is taught two of the demo's tasks on its browser-free pages (synthetic pages, a real model).
Then one update gets corrections of these two tasks and of a third that it was never taught; of a share of them the
right and the wrong action are swapped. It is made twice from the same parent: with the gate and without. Trusted are
the replayed corrections. Length and flattery hacks are not in it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness

harness.threads()

import numpy as np
import torch
from bench_forgetting import Bench, bench, correction, score

from gradatim.config import LearnerConfig
from gradatim.learner.learner import LoraLearner
from gradatim.learner.scorer import TorchScorer
from gradatim.testing.records import an_adapter
from gradatim.types import Adapter, Example

KNOWN = ("enter-text", "login-user")
UNKNOWN = "enter-password"
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)
NEW = 24  # corrections in the update that is judged, of three skills
PAST = 16  # of each known skill
COSINE = 0.2


def flipped(example: Example) -> Example:
    return replace(
        example,
        id=f"flip-{example.id}",
        chosen_ids=example.rejected_ids,
        rejected_ids=example.chosen_ids,
        verified=False,
    )


def taught(subject: Bench, folder: Path, seed: int) -> tuple[Adapter, list[Example]]:
    """An adapter that knows the two skills, and the corrections it was taught."""
    rng, sha = random.Random(seed), subject.base.sha256
    adapter = an_adapter(0, base_sha256=sha, sha256=sha)
    learner = LoraLearner(subject.base, LearnerConfig(seed=seed, gate_cosine=0.0), folder, "agent")
    past: list[Example] = []
    for step, skill in enumerate(KNOWN, 1):
        new = [correction(p, skill, i, rng) for i, p in enumerate(subject.train[skill][:PAST])]
        update, made = learner.update(new, past, adapter, step)
        assert made is not None, update.refused_because
        adapter, past = made, past + new
    return adapter, past


def mixture(subject: Bench, share: float, seed: int) -> list[Example]:
    """New corrections of three skills, of which that share is swapped, evenly over skills."""
    rng = random.Random(f"{seed}/mixture")
    each = NEW // 3
    out: list[Example] = []
    for skill in (*KNOWN, UNKNOWN):
        new = subject.train[skill][PAST : PAST + each]
        out += [correction(p, skill, PAST + i, rng) for i, p in enumerate(new)]
    rng.shuffle(out)
    bad = {e.id for e in out[: round(share * len(out))]}
    return [flipped(e) if e.id in bad else replace(e, verified=False) for e in out]


def cell(subject: Bench, share: float, seed: int, folder: Path, known: tuple[Adapter, list[Example]]) -> dict[str, Any]:
    """One mixture, with the gate and without."""
    parent, past = known
    new = mixture(subject, share, seed)
    result: dict[str, Any] = {"flipped": sum(e.id.startswith("flip-") for e in new)}
    for k, name in enumerate(("gated", "open")):
        config = LearnerConfig(seed=seed, gate_cosine=COSINE if name == "gated" else 0.0)
        learner, scorer = LoraLearner(subject.base, config, folder, "agent"), TorchScorer(subject.base, config, folder)
        update, made = learner.update(new, past, parent, 3 + k + 2 * round(100 * share))
        left_in = set(update.example_ids)
        out = [e for e in new if e.id not in left_in]
        result[name] = {
            "caught": sum(e.id.startswith("flip-") for e in out),
            "wrong_known": sum(not e.id.startswith("flip-") and e.skill != UNKNOWN for e in out),
            "wrong_unknown": sum(not e.id.startswith("flip-") and e.skill == UNKNOWN for e in out),
            "scores": {s: score(scorer, made or parent, subject.held_out[s]) for s in (*KNOWN, UNKNOWN)},
            "metrics": dict(update.metrics),
        }
    result["honest_unknown"] = sum(e.skill == UNKNOWN and not e.id.startswith("flip-") for e in new)
    result["honest_known"] = len(new) - result["flipped"] - result["honest_unknown"]
    return result


def goals_of(cells: Mapping[tuple[float, int], Mapping[str, Any]]) -> list[harness.Goal]:
    def share(part: str, whole: str, of: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(c["gated"][part] for c in of) / max(1, sum(c[whole] for c in of)))

    every = list(cells.values())
    goals = [
        harness.Goal("flipped labels caught", share("caught", "flipped", every), ">= 0.8"),
        harness.Goal("honest ones refused, known skills", share("wrong_known", "honest_known", every), "<= 0.05"),
        harness.Goal("honest ones refused, a new skill", share("wrong_unknown", "honest_unknown", every), "<= 0.05"),
    ]
    for level in sorted({s for s, _ in cells}):
        of = [c for (s, _), c in cells.items() if s == level]
        for name in ("gated", "open"):
            mean = float(np.mean([np.mean(list(c[name]["scores"].values())) for c in of]))
            goals.append(harness.Goal(f"{level:.0%} flipped: held-out score, {name}", mean))
    return goals


def parsed() -> argparse.Namespace:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="where finished cells are kept (default: a temporary folder)")
    parser.add_argument("--data-dir", type=Path, help="holds the converted model (default: a temporary folder)")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    seeds, shares, held_out = (1, (0.4,), 6) if args.quick else (args.seeds, SHARES, 24)
    cells: dict[tuple[float, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        results: Path = args.results or Path(scratch) / "results"
        results.mkdir(parents=True, exist_ok=True)
        subject = bench(args.data_dir or Path(scratch), held_out)
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                known: tuple[Adapter, list[Example]] | None = None
                for share in shares:
                    kept_in = results / f"{share:g}-{seed}.json"
                    if not kept_in.exists():
                        known = known or taught(subject, Path(folder), seed)
                        kept_in.write_text(json.dumps(cell(subject, share, seed, Path(folder), known)))
                    cells[share, seed] = json.loads(kept_in.read_text())
    details = {"seeds": seeds, "cells": {f"{s:g} {k}": c for (s, k), c in cells.items()}}
    harness.report("bench_gating", goals_of(cells), details, args)


if __name__ == "__main__":
    main()
