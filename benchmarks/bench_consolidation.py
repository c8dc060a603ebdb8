"""From memory into the weights: corrected mistakes over days of further traffic, over the served routes.

The tickets, the servers and the corrections are those of ``bench_repeat_mistakes`` (SmolLM2-135M, a convention that no
model can know, synthetic). After the corrections come days: each ticket is asked again with memory, and gets a thumb
where the answer is right, or its correction once more; then the loop learns, its gates decide, and what the weights
know by themselves is retired. Each day the live adapter is asked without memory (pinned), so that it shows what the
weights know: mistakes made again / those that were made at first. In the end all is asked of both, paraphrases
included, which were never corrected. Frozen, all of these are wrong. Seeds run side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import harness

harness.threads()

import numpy as np
import torch
from bench_repeat_mistakes import SETTLE_S, Served, Shares, World, learn, repeated, said, served, stream, world
from convention import Ticket

from gradatim.config import MemoryConfig
from gradatim.nn.base import Base, load_base


async def a_day(at: Served, of: World) -> None:
    """Every ticket once, and what its user says of the answer."""
    for ticket in of.corrected:
        answer = await at.ask(ticket.text)
        right = of.right(ticket)
        opinion = (
            {"kind": "score", "value": 1} if said(answer) == right else {"kind": "correction", "correction": right}
        )
        body = {"response_id": answer["id"], "source": "human:b", **opinion}
        (await at.http.post("/v1/feedback", json=body)).raise_for_status()
    await asyncio.sleep(SETTLE_S)


async def a_night(at: Served, learning: Base) -> tuple[str, int]:
    """The live adapter after it, and how many answers memory was relieved of."""
    live, told = await asyncio.to_thread(learn, at, learning)
    await at.traffic.refresh()
    await at.tended()
    at.memory.kept.reread_retired()
    return live, int(told["retired"])


async def told_of(at: Served, of: World, wrong: Sequence[Ticket], live: str) -> Shares:
    asked = (("same", wrong), ("paraphrase", of.paraphrases))
    arms = (("weights alone", live), ("with memory", "agent"))
    return {f"{arm}, {what}": await repeated(at, some, of, model) for arm, model in arms for what, some in asked}


async def live_through(base: Base, learning: Base, data: Path, of: World, days: int) -> tuple[Shares, list[float]]:
    """All figures of one seed, and the mistakes of the weights alone by day."""
    async with served(base, data, MemoryConfig(decisions=True, consolidate=True)) as at:
        wrong, again = await stream(at, of)
        out = {"a second after the correction": again, "first day, paraphrase": await repeated(at, of.paraphrases, of)}
        course: list[float] = []
        for day in range(days):
            if day:
                await a_day(at, of)
            live, retired = await a_night(at, learning)
            course.append(await repeated(at, wrong, of, live))
            remembered = len(at.memory.kept.show(limit=10_000))
            print(f"{data.name}, day {day + 1}: {live}, {course[-1]:.2f} alone, {retired} retired", flush=True)
        figures = {"retired in the last night": retired, "remembered": remembered, "updates": int(live.split("@")[1])}
        return out | await told_of(at, of, wrong, live) | figures, course


def one_seed(seed: int, each: int, days: int, models: Path) -> tuple[Shares, list[float]]:
    torch.set_num_threads(1)
    base, learning = (load_base("smollm2", models, dtype="bfloat16", device="cpu") for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(live_through(base, learning, Path(folder) / f"seed-{seed}", world(seed, each), days))


def goals_of(mean: Shares, course: Sequence[float]) -> list[harness.Goal]:
    goal = harness.Goal
    return [
        goal("repeated a second after the correction, same wording", mean["a second after the correction"], "<= 0.05"),
        goal("same wording, weights alone, after the first night", course[0]),
        goal("same wording, weights alone, in the end", mean["weights alone, same"], "<= 0.05"),
        goal("same wording, with memory, in the end", mean["with memory, same"], "<= 0.05"),
        goal("paraphrase, with memory, before any update", mean["first day, paraphrase"], "<= 0.25"),
        goal("paraphrase, weights alone, in the end", mean["weights alone, paraphrase"]),
        goal("paraphrase, with memory, in the end", mean["with memory, paraphrase"], "<= 0.15"),
        goal("answers retired in the last night", mean["retired in the last night"], ">= 1"),
        goal("answers remembered, with those that were wrong", mean["remembered"]),
        goal("updates that went live", mean["updates"]),
    ]


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--data-dir", type=Path, help="where a converted model lies, to be used again")
    args: argparse.Namespace = parser.parse_args()
    seeds, each, days = (1, 1, 2) if args.quick else (args.seeds, 3, args.days)
    with tempfile.TemporaryDirectory() as folder:
        models = args.data_dir or Path(folder)
        load_base("smollm2", models, dtype="bfloat16", device="cpu")  # converted once
        with ProcessPoolExecutor(seeds, multiprocessing.get_context("spawn")) as pool:
            runs = list(pool.map(one_seed, range(seeds), [each] * seeds, [days] * seeds, [models] * seeds))
    mean = {key: float(np.mean([shares[key] for shares, _ in runs])) for key in runs[0][0]}
    course = np.mean([by_day for _, by_day in runs], 0).tolist()
    details = {"seeds": [shares for shares, _ in runs], "weights alone, by day": [by_day for _, by_day in runs]}
    harness.report("bench_consolidation", goals_of(mean, course), details | {"model": "smollm2 bfloat16"}, args)


if __name__ == "__main__":
    main()
