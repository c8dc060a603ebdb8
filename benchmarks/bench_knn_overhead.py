"""What token memory costs, by its size: CPU of each generated token, room, and how long changes take.

SmolLM2-135M answers eight prompts in the served engine, alone and in batches of eight, with 10^4, 10^5 and 10^6 tokens
remembered. Their keys are states of real text (Python's reference) and mixtures of two of them with some noise: where
they are many, most are made up. The CPU that memory takes is timed where the engine calls it, between the steps of the
model that evict it from the caches, and compared with the rest of the same run; one engine with a memory against one
without, the rest of what it costs, is told beside it, and is within what this machine's timings vary by.

Room is what the process grew by, and what the memory counts itself. Changes are timed on the largest: from the call to
a search that shows it. ``stall`` is how long a search waits, at most, while another thread seals, compacts and writes.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

harness.threads()

import numpy as np
import texts
import torch
from torch import Tensor

from gradatim.app import compose
from gradatim.app.memory import build_memory
from gradatim.config import Config, EngineConfig, MemoryConfig
from gradatim.engine import scheduler
from gradatim.engine.mixing import mixed_in
from gradatim.memory.key_space import KeySpace, Turn, late_layer
from gradatim.memory.knn_lm import NEIGHBOURS
from gradatim.memory.token_store import TokenStore
from gradatim.memory.tokens import TokenMemory
from gradatim.nn.base import Base
from gradatim.nn.states import states as states_of
from gradatim.store import SqlStore
from gradatim.types import AdapterId, Delta, EpisodeId, MemoryEntry, Request, Sampling, StepId

SIZES = (10_000, 100_000, 1_000_000)
TARGETS = {100_000: "<= 2", 1_000_000: "<= 3"}
REAL, WINDOW = 12_288, 512  # tokens that are read
ANSWER = 50  # tokens of a remembered one
SEALED_EVERY = 250_000
PROMPTS = (
    "List the steps to bake bread.",
    "What is a mutex?",
    "Write a short poem about rain.",
    "Explain how a bill becomes a law.",
    "Name five rivers in Europe and a fact about each.",
    "How do I undo the last git commit?",
    "Describe your favourite season.",
    "What does the with statement of Python do?",
)
AGENT = AdapterId("agent@0")


# ------------------------------------------------------------------------------------------ what is remembered


@dataclass(frozen=True)
class Text:
    """States (N, D) and the tokens (N,) after them."""

    hidden: Tensor
    tokens: Tensor


def read(base: Base, count: int) -> Text:
    layer, files = late_layer(len(base.model.base_model.layers)), texts.python_documentation()
    encode = lambda text: list(base.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    ids = list(itertools.chain.from_iterable(texts.take(files, iter(texts.shuffled(files)), count, encode)))
    parts = [ids[i : i + WINDOW + 1] for i in range(0, len(ids) - 1, WINDOW)]
    hidden = torch.cat([states_of(base.model, p[:-1], layer).float().cpu() for p in parts])
    return Text(hidden, torch.cat([torch.tensor(p[1:]) for p in parts]))


def like(text: Text, count: int, seed: int) -> Text:
    """As many more: mixtures of two, and the token of the nearer."""
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(len(text.tokens), (count,), generator=draw) for _ in range(2))
    share = 0.5 + 0.5 * torch.rand(count, 1, generator=draw)
    noise = 0.2 * text.hidden.std(0) * torch.randn(count, text.hidden.shape[1], generator=draw)
    return Text(share * text.hidden[a] + (1 - share) * text.hidden[b] + noise, text.tokens[a])


def lots(text: Text, entries: int) -> Any:
    """Of all of a text, then of more like it, so many in all."""
    for seed, start in enumerate(range(0, entries, 10_000)):
        count = min(10_000, entries - start)
        lot = Text(text.hidden[:count], text.tokens[:count]) if seed == 0 else like(text, count, seed)
        for at in range(0, count, ANSWER):
            yield Text(lot.hidden[at : at + ANSWER], lot.tokens[at : at + ANSWER])


def fill(tokens: TokenMemory, space: KeySpace[Turn], text: Text, entries: int) -> None:
    rows = 0
    for number, answer in enumerate(lots(text, entries)):
        tokens.add(entry(number, answer), space, answer.hidden)
        rows += len(answer.tokens)
        if rows % SEALED_EVERY == 0:
            tokens.maintain()
    tokens.maintain()


def entry(number: int, answer: Text) -> MemoryEntry:
    return MemoryEntry(
        id=f"text-{number}+",
        tenant="",
        user="",
        episode_id=EpisodeId("text"),
        step_id=StepId(f"text-{number}"),
        created_at=0.0,
        tokens=tuple(answer.tokens.tolist()),
        value=1.0,
    )


def resident_bytes() -> int:
    """Of this process, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * 4096


# ------------------------------------------------------------------------------------------------- each token


@dataclass
class Spent:
    """By the engine that answers, in all that it does for a memory between the model's logits and the draw."""

    memory_s: float = 0.0

    def timed(self, mixed_in: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return mixed_in(*arguments)
            finally:
                self.memory_s += time.perf_counter() - started

        return measured


SPENT = Spent()
scheduler.mixed_in = SPENT.timed(mixed_in)  # type: ignore[attr-defined]


class Side:
    """An engine, with or without a memory of that size."""

    def __init__(self, base: Base, store: SqlStore, config: Config, size: int | None, text: Text) -> None:
        self.engine = compose.build_engine(config, base)
        self.kept = build_memory(config, store, base, self.engine)
        self.grown_bytes = self.filling_s = 0.0
        if size:
            tokens, memory = self.kept.tokens, self.kept.on
            assert tokens is not None and memory is not None
            before, started = resident_bytes(), time.process_time()
            fill(tokens, memory.expect(AGENT, base.sha256), text, size)
            self.grown_bytes, self.filling_s = resident_bytes() - before, time.process_time() - started

    @property
    def store(self) -> TokenStore:
        assert self.kept.tokens is not None
        (held,) = self.kept.tokens._held.values()
        return held.store

    async def answer(self, prompts: tuple[str, ...], tokens: int) -> tuple[float, float]:
        """CPU milliseconds a token, and the share of it that memory takes of the rest."""
        started, SPENT.memory_s = time.process_time(), 0.0
        drawn = sum(await asyncio.gather(*(self._one(p, tokens) for p in prompts)))
        taken = time.process_time() - started
        return 1000 * taken / drawn, SPENT.memory_s / (taken - SPENT.memory_s)

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


Found = dict[tuple[str, int], list[tuple[float, float]]]


async def measure(sides: dict[str, Side], rounds: int, tokens: int) -> Found:
    out: Found = defaultdict(list)
    for n in range(rounds):
        for batch in (1, 8):
            order = list(sides.items())
            for name, side in order[n % len(order) :] + order[: n % len(order)]:
                prompts = PROMPTS if batch == 8 else (PROMPTS[n % len(PROMPTS)],)
                out[name, batch].append(await side.answer(prompts, tokens if batch == 8 else 2 * tokens))
    return out


# ---------------------------------------------------------------------------------------------------- changes


def recall_of(store: TokenStore, text: Text, queries: Tensor, entries: int) -> float:
    """At 16, against all keys in float64, as they were before they were rounded. Asked with more like them."""
    asked = store.space.pooling.keys(queries).astype(np.float64)  # (B, D)
    best: list[list[tuple[float, int]]] = [[] for _ in asked]
    row = 0
    for answer in lots(text, entries):
        keys = store.space.pooling.keys(answer.hidden).astype(np.float64)
        distances = np.square(keys).sum(1) - 2 * asked @ keys.T  # (B, n), less |q|^2
        for k, each in enumerate(distances):
            best[k] = sorted([*best[k], *zip(each.tolist(), range(row, row + len(keys)), strict=True)])[:16]
        row += len(keys)
    found = store.search(queries, NEIGHBOURS).rows[:, :16].tolist()
    return float(np.mean([len({r for _, r in b} & set(f)) / 16 for b, f in zip(best, found, strict=True)]))


def changes(store: TokenStore, text: Text, folder: Path) -> list[harness.Goal]:
    """Adding, forgetting, writing, reading and building, on the largest."""
    new = like(text, 40 * ANSWER, seed=10**6)
    lot = [Text(new.hidden[i : i + ANSWER], new.tokens[i : i + ANSWER]) for i in range(0, len(new.tokens), ANSWER)]
    added_s, forgotten_s = [], []
    for number, answer in enumerate(lot):
        started = time.perf_counter()
        rows = store.add(f"new-{number}", answer.hidden, answer.tokens)
        assert store.search(answer.hidden[:1], 1).rows[0, 0] in rows
        added_s.append(time.perf_counter() - started)
    store.index.seal()
    for number, answer in enumerate(lot):
        before = store.search(answer.hidden, NEIGHBOURS).rows
        started = time.perf_counter()
        store.forget(f"new-{number}")
        found = store.search(answer.hidden[:1], 1).rows[0, 0]
        forgotten_s.append(time.perf_counter() - started)
        assert found not in before[:, 0]
    stall_s = stalls(store, new.hidden[:1], folder)
    started = time.perf_counter()
    again = TokenStore.load(folder, store.space, store.vocabulary)
    loaded_s = time.perf_counter() - started
    asked = new.hidden[:64]
    assert np.array_equal(again.search(asked, NEIGHBOURS).rows, store.search(asked, NEIGHBOURS).rows)
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    return [
        harness.Goal("add to found, ms, median of 40 answers", 1000 * float(np.median(added_s)), "<= 5"),
        harness.Goal("forget to not found, sealed, ms, median", 1000 * float(np.median(forgotten_s)), "<= 10"),
        harness.Goal("longest wait of a search while it is sealed, compacted and written, ms", 1000 * stall_s, "<= 50"),
        harness.Goal("read from disk, s", loaded_s, "<= 2"),
        harness.Goal("on disk, MB", on_disk / 1e6, "<= 300"),
    ]


def stalls(store: TokenStore, asked: Tensor, folder: Path) -> float:
    """Seconds, at most, of one search after the other beside a thread that maintains."""

    def maintain() -> None:
        store.index.seal()
        store.compacted()
        store.save(folder)

    for _ in range(3):
        store.search(asked, NEIGHBOURS)
    worker = threading.Thread(target=maintain)
    worker.start()
    longest = 0.0
    while worker.is_alive():
        started = time.perf_counter()
        store.search(asked, NEIGHBOURS)
        longest = max(longest, time.perf_counter() - started)
    worker.join()
    return longest


# ----------------------------------------------------------------------------------------------------- report


def run(data_dir: Path, folder: Path, quick: bool) -> tuple[list[harness.Goal], dict[str, Any]]:
    sizes = SIZES[:1] if quick else SIZES
    engine = EngineConfig(dtype="float32", device="cpu", threads=1, max_batch=8, prefix_cache_tokens=0)
    base = compose.build_base(Config(model="smollm2", data_dir=data_dir, engine=engine))
    details: dict[str, Any] = {}
    goals: list[harness.Goal] = []
    with compose.build_store(Config(data_dir=folder)) as store:
        sides: dict[str, Side] = {}
        text = read(base, 2048 if quick else REAL)
        for name, size in (("off", None), *((f"{n} entries", n) for n in sizes)):
            memory = MemoryConfig(tokens=size is not None, max_tokens=2 * max(sizes))
            side = Side(base, store, Config(data_dir=folder, engine=engine, memory=memory), size, text)
            if size:
                print(f"{name}: {side.grown_bytes / 1e6:.0f} MB more, {side.filling_s:.0f} s of CPU", flush=True)
            sides[name] = side
        try:
            found = asyncio.run(measure(sides, 2 if quick else 6, 24 if quick else 48))
            goals += costs(found, details)
            goals += room(sides, sizes, details)
            largest = sides[f"{sizes[-1]} entries"].store
            asked = like(text, 50, seed=10**7).hidden
            goals.append(harness.Goal(f"{sizes[-1]} entries: recall at 16", recall_of(largest, text, asked, sizes[-1])))
            goals += changes(largest, text, folder / "written")
            details["stats"] = {name: dict(s.kept.kept.stats()) for name, s in sides.items() if s.grown_bytes}
        finally:
            for side in sides.values():
                with closing(side.engine):
                    pass
    return goals, details


def costs(found: Found, details: dict[str, Any]) -> list[harness.Goal]:
    goals = []
    for (name, batch), values in found.items():
        ms, shares = (np.array(x) for x in zip(*values, strict=True))
        details[f"{name}, batch {batch}"] = values
        if name == "off":
            goals.append(harness.Goal(f"off, batch {batch}: CPU, ms a token", float(np.median(ms))))
            continue
        target = TARGETS.get(int(name.split()[0]), "reported")
        goals.append(
            harness.Goal(f"{name}, batch {batch}: CPU of memory, % of the rest", 100 * float(shares.mean()), target)
        )
        off = np.array([value for value, _ in found["off", batch]])
        whole = 100 * (float(np.median(ms / off)) - 1)
        goals.append(harness.Goal(f"{name}, batch {batch}: CPU of an engine with it over one without, %", whole))
    return goals


def room(sides: dict[str, Side], sizes: Sequence[int], details: dict[str, Any]) -> list[harness.Goal]:
    goals = []
    for size in sizes:
        side = sides[f"{size} entries"]
        counted = side.kept.kept.stats()["token_bytes"]
        details[f"{size} entries: filling, CPU s"] = side.filling_s
        target = "<= 300" if size == 10**6 else "reported"
        goals.append(harness.Goal(f"{size} entries: memory, MB", counted / 1e6, target))
        goals.append(harness.Goal(f"{size} entries: what the process grew by, MB", side.grown_bytes / 1e6))
    return goals


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
