"""What token memory costs each generated token: CPU with it on against off, by its size, alone and in batches.

SmolLM2-135M in the served engine. The memory holds states of random text-like keys: what they say does not matter here,
how many there are does. Arms take turns on the same prompts, greedy and of one length, with the share of lookups that
real answers have (``memory.sure`` as it is by default). CPU is that of the whole process, of one thread, with the
reading of the short prompts, which nothing caches.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import harness

harness.threads()

import numpy as np
import torch

from gradatim.app import compose
from gradatim.app.memory import build_memory
from gradatim.config import Config, EngineConfig, MemoryConfig
from gradatim.memory.key_space import KeySpace, Turn
from gradatim.memory.tokens import TokenMemory
from gradatim.nn.base import Base
from gradatim.store import SqlStore
from gradatim.types import AdapterId, Delta, EpisodeId, MemoryEntry, Request, Sampling, StepId

SIZES = (0, 10_000, 100_000)
PROMPTS = (
    "List the steps to bake bread.",
    "What is a mutex?",
    "Write a short poem about rain.",
    "Explain how a bill becomes a law.",
    "Name five rivers in Europe and a fact about each.",
    "How do I undo the last git commit?",
    "Describe your favourite season.",
    "What should I pack for a week in the mountains?",
)
AGENT = AdapterId("agent@0")


def fill(tokens: TokenMemory, space: KeySpace[Turn], entries: int) -> None:
    """Clusters of like states, as of texts that resemble each other; in the space of standardised states."""
    generator = torch.Generator().manual_seed(0)
    pooling, vocabulary = tokens.space.pooling, tokens.vocabulary
    width = pooling.width
    mean, scale = (torch.from_numpy(x) for x in (pooling.mean, pooling.scale))
    centres = torch.randn(512, width, generator=generator)
    for start in range(0, entries, 10_000):
        count = min(10_000, entries - start)
        near = centres[torch.randint(512, (count,), generator=generator)]
        keys = near + 0.5 * torch.randn(count, width, generator=generator)
        said = MemoryEntry(
            id=f"text-{start}+",
            tenant="",
            user="",
            episode_id=EpisodeId("text"),
            step_id=StepId(f"text-{start}"),
            created_at=0.0,
            tokens=tuple(torch.randint(vocabulary, (count,), generator=generator).tolist()),
            value=1.0,
        )
        tokens.add(said, space, keys * scale + mean)
    tokens.maintain()


class Side:
    """An engine, with or without a memory that holds as much for each user."""

    def __init__(self, base: Base, store: SqlStore, config: Config, size: int | None) -> None:
        self.engine = compose.build_engine(config, base)
        self.kept = build_memory(config, store, base, self.engine)
        self.size = size
        if size:
            assert self.kept.tokens is not None and self.kept.on is not None
            fill(self.kept.tokens, self.kept.on.expect(AGENT, base.sha256), size)

    async def answer(self, prompts: tuple[str, ...], tokens: int) -> float:
        """CPU milliseconds a token."""
        started = time.process_time()
        drawn = sum(await asyncio.gather(*(self._one(p, tokens) for p in prompts)))
        return 1000 * (time.process_time() - started) / drawn

    async def _one(self, prompt: str, tokens: int) -> int:
        memory = self.kept.on
        recollection = None if memory is None else memory.recollect("", AGENT, self.engine._base.sha256)
        request = Request(
            messages=({"role": "user", "content": prompt},),
            sampling=Sampling(max_tokens=tokens, temperature=0.0),
            recollection=recollection,
        )
        events = [e async for e in self.engine.generate(request, AGENT) if isinstance(e, Delta)]
        return sum(len(e.tokens) for e in events)


async def measure(sides: dict[str, Side], rounds: int, tokens: int) -> dict[tuple[str, int], list[float]]:
    out: dict[tuple[str, int], list[float]] = defaultdict(list)
    for n in range(rounds):
        for batch in (1, 8):
            order = list(sides.items())
            for name, side in order[n % len(order) :] + order[: n % len(order)]:
                prompts = PROMPTS if batch == 8 else (PROMPTS[n % len(PROMPTS)],)
                out[name, batch].append(await side.answer(prompts, tokens if batch == 8 else 2 * tokens))
    return out


def run(data_dir: Path, folder: Path, quick: bool) -> tuple[list[harness.Goal], dict[str, Any]]:
    sizes = SIZES[:2] if quick else SIZES
    engine = EngineConfig(dtype="float32", device="cpu", threads=1, max_batch=8, prefix_cache_tokens=0)
    base = compose.build_base(Config(model="smollm2", data_dir=data_dir, engine=engine))
    details: dict[str, Any] = {}
    with compose.build_store(Config(data_dir=folder)) as store:
        sides: dict[str, Side] = {}
        for name, size in (("off", None), *((f"{n} entries", n) for n in sizes)):
            memory = MemoryConfig(tokens=size is not None)
            sides[name] = Side(base, store, Config(data_dir=folder, engine=engine, memory=memory), size)
        try:
            found = asyncio.run(measure(sides, 2 if quick else 8, 24 if quick else 48))
            details["stats"] = {name: dict(s.kept.kept.stats()) for name, s in sides.items() if s.size}
        finally:
            for side in sides.values():
                with closing(side.engine):
                    pass
    goals: list[harness.Goal] = []
    for (name, batch), values in found.items():
        details[f"{name}, batch {batch}"] = values
        if name != "off":
            ratios = np.array(values) / np.array(found["off", batch])
            target = "<= 2" if name.startswith("100000") else "reported"
            goals.append(
                harness.Goal(f"{name}, batch {batch}: CPU added, %", 100 * (float(np.median(ratios)) - 1), target)
            )
    goals += [harness.Goal(f"off, batch {b}: CPU, ms a token", float(np.median(found["off", b]))) for b in (1, 8)]
    return goals, details


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="where the converted model is, or goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        goals, details = run(args.data_dir or Path(folder), Path(folder), args.quick)
    harness.report("bench_knn_overhead", goals, details, args)


if __name__ == "__main__":
    main()
