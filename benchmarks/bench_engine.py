"""Tokens per second of the embedded engine against ``transformers.generate``, at concurrency 1 and 8.

The same prompts, fp32, one thread, greedy, a fixed number of new tokens, both sides alternating in one run. The peer
gets its best case: all prompts at once, as one static batch. CPU seconds of the process are compared, because wall
time on a shared machine says more about its other users; both are printed.

    python benchmarks/bench_engine.py [--quick] [--rounds N] [--json]
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import harness

harness.threads()

import torch

from gradatim.config import EngineConfig
from gradatim.engine.transformers import TransformersEngine
from gradatim.nn.base import Base, load_base
from gradatim.nn.render import Renderer
from gradatim.types import AdapterId, Delta, Request, Sampling

TOPICS = ("the sea", "trains", "bread", "the moon", "a garden", "mathematics", "rain", "old maps")


def prompts(renderer: Renderer, n: int) -> list[tuple[int, ...]]:
    texts = [f"Write a long and detailed story about {TOPICS[i % len(TOPICS)]}, in plain words." for i in range(n)]
    return [renderer.prompt_ids([{"role": "user", "content": text}]) for text in texts]


def run_engine(engine: TransformersEngine, ids: Sequence[tuple[int, ...]], tokens: int, eos: frozenset[int]) -> int:
    sampling = Sampling(max_tokens=tokens, temperature=0, logit_bias={i: -1e9 for i in eos})

    async def one(prompt: tuple[int, ...]) -> int:
        events = engine.generate(Request(prompt=prompt, sampling=sampling), AdapterId("base@0"))
        return sum([len(e.tokens) async for e in events if isinstance(e, Delta)])

    async def all_of_them() -> int:
        return sum(await asyncio.gather(*[one(p) for p in ids]))

    return asyncio.run(all_of_them())


@torch.inference_mode()
def run_generate(base: Base, ids: Sequence[tuple[int, ...]], tokens: int) -> int:
    longest = max(map(len, ids))
    pad = base.tokenizer.pad_token_id
    batch = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in ids])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in ids])
    out = base.model.generate(
        batch, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=pad
    )
    return int((out.shape[1] - longest) * len(ids))


def timed(run: Callable[[], int]) -> tuple[float, float]:
    """Tokens per CPU second and per wall second."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    tokens = run()
    return tokens / (time.process_time() - cpu_s), tokens / (time.perf_counter() - wall_s)


def measure(base: Base, folder: Path, rounds: int, tokens: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
    renderer = Renderer(base)
    config = EngineConfig(threads=1, prefix_cache_tokens=0)
    engine = TransformersEngine(base, renderer, config, folder)
    results: dict[str, dict[str, list[tuple[float, float]]]] = {}
    try:
        for concurrency in (1, 8):
            ids = prompts(renderer, concurrency)
            sides: Mapping[str, Callable[[], int]] = {
                "gradatim": lambda ids=ids: run_engine(engine, ids, tokens, base.eos_ids),  # type: ignore[misc]
                "transformers.generate": lambda ids=ids: run_generate(base, ids, tokens),  # type: ignore[misc]
            }
            results[str(concurrency)] = {name: [] for name in sides}
            for turn in range(rounds + 1):
                for name, run in sides.items():
                    figures = timed(run)
                    if turn:  # the first one warms up
                        results[str(concurrency)][name].append(figures)
    finally:
        engine.close()
    return results


def goals(results: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> list[harness.Goal]:
    out = []
    for concurrency, sides in results.items():
        ours, theirs = (statistics.median(cpu for cpu, _ in runs) for runs in sides.values())
        goal = f"tokens per CPU second against transformers.generate, concurrency {concurrency}"
        out.append(harness.Goal(goal, ours / theirs, ">= 1"))
    return out


def table(results: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    lines = [f"{'concurrency':>11}  {'side':<22} {'tok/CPU-s':>10} {'tok/s wall':>10}   (medians)"]
    for concurrency, sides in results.items():
        for name, runs in sides.items():
            cpu, wall = (statistics.median(column) for column in zip(*runs, strict=True))
            lines.append(f"{concurrency:>11}  {name:<22} {cpu:>10.1f} {wall:>10.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each side")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data-dir", type=Path, default=None, help="where the converted model is kept")
    args = parser.parse_args()
    rounds, tokens = (1, 16) if args.quick else (args.rounds, 64)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        folder = args.data_dir or Path(tmp)
        base = load_base(args.model, folder, dtype="float32", device="cpu")
        results = measure(base, folder, rounds, tokens)
    print(table(results))
    harness.report("bench_engine", goals(results), results, args)


if __name__ == "__main__":
    main()
