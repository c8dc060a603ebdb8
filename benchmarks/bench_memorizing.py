"""Documents longer than the window: what attention to nearest neighbours recovers of the full context, and its cost.

SmolLM2-135M with a window of 512 tokens, frozen, nothing trained. Per document: the window alone, the window with kNN
attention in all layers but the first two (top 32 of each head), and the full context. The gap is that between window
and full context in mean log-probability; the share of it that is closed is the figure. ``sliding`` moves the window on
by 128 tokens, as the server does; with ``--segments`` also by the whole window, as the notes behind the goals did.

Records: entries of torch's operator and derivative tables, which repeat as logs do. Code: files of this package's
dependencies. Needle: three codes in a long document, asked for at its end; and the CPU of attention over that document.
``--long`` asks for them in 16k and 32k tokens too, by memory alone: the model knows no more than 8k.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

harness.threads()

import texts
import torch
from torch import Tensor

from gradatim.memory.knn_attention import MEMORY_TOKENS, WINDOW, KnnAttention
from gradatim.nn.base import Base, load_base
from gradatim.nn.session import Session

CODES = (("north", "48213"), ("harbour", "70954"), ("museum", "16387"))
CHUNKS = {"sliding": 128, "segments": WINDOW}
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


class Timed(KnnAttention):
    """Adds up the CPU that attention takes, projections apart."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.cpu_s = 0.0

    def _attend(self, *args: Any) -> Tensor:
        started = time.process_time()
        out = super()._attend(*args)
        self.cpu_s += time.process_time() - started
        return out


def reader(base: Base, chunk: int, *, memory: bool, window: int = WINDOW, memory_tokens: int = MEMORY_TOKENS) -> Timed:
    knn = Timed(base.model, window=window, chunk=chunk, memory_tokens=memory_tokens)
    if not memory:
        knn.heads = knn.plain_heads(-math.inf)
    return knn


def documents(base: Base, tokens: int, count: int) -> dict[str, list[list[int]]]:
    """``count`` of each kind, of that many tokens each."""

    def cut(text: str, start: float) -> list[int]:
        ids: list[int] = base.tokenizer.encode(text[int(start * len(text)) :][: 12 * tokens], add_special_tokens=False)
        return ids[:tokens]

    tables = texts.operator_tables()
    records = [cut(tables[name], start) for name, start in zip(sorted(tables) * 2, (0.3, 0.6, 0.7, 0.2), strict=True)]
    modules = {**texts.modules("starlette"), **texts.modules("alembic")}
    code = (cut(modules[name], 0.0) for name in texts.shuffled(modules))
    whole = itertools.islice((ids for ids in code if len(ids) == tokens), count)
    return {"records": records[:count], "code": list(whole)}


def nats(knn: KnnAttention, ids: Sequence[int]) -> float:
    """Mean log-probability of what lies beyond the first window."""
    return float(knn.score(knn.session(), ids)[WINDOW - 1 :].mean())


Nats = dict[str, list[float]]  # by arm: mean log-probability of each document


def compare(base: Base, kinds: dict[str, list[list[int]]], protocols: Sequence[str]) -> dict[str, Nats]:
    """Per kind of document."""
    longest = max(len(d) for some in kinds.values() for d in some)
    arms = {"full": reader(base, longest, memory=False, window=longest)}
    for name in protocols:
        arms[f"{name}: window"] = reader(base, CHUNKS[name], memory=False)
        arms[f"{name}: memory"] = reader(base, CHUNKS[name], memory=True)
    found: dict[str, Nats] = {kind: {name: [] for name in arms} for kind in kinds}
    for i, (kind, name) in itertools.product(range(len(kinds["code"])), itertools.product(kinds, arms)):
        found[kind][name].append(nats(arms[name], kinds[kind][i]))
        print(f"{kind} {i}, {name}: {found[kind][name][-1]:.4f}; {time.process_time():.0f} s", flush=True)
    return found


def closed(means: Nats, protocol: str) -> tuple[float, list[float]]:
    """% of the gap: over all documents, and of each."""
    arms = zip(means[f"{protocol}: window"], means[f"{protocol}: memory"], means["full"], strict=True)
    gains = [(memory - window, full - window) for window, memory, full in arms]
    whole = 100 * sum(gain for gain, _ in gains) / sum(gap for _, gap in gains)
    return whole, [100 * gain / gap for gain, gap in gains]


def needle(base: Base, tokens: int, names: Sequence[str] = ("memory", "window", "full")) -> dict[str, float]:
    """Codes found of three, and the CPU of attention, of each arm."""
    encode = base.tokenizer.encode
    filler = encode(FILLER, add_special_tokens=False)
    pieces = [encode(f"The code of the {place} gate is {code}. ", add_special_tokens=False) for place, code in CODES]
    part = (tokens - sum(map(len, pieces))) // (len(CODES) + 1)
    between = (filler * (part // len(filler) + 1))[:part]
    ids = [*itertools.chain.from_iterable([*between, *piece] for piece in pieces), *between]
    out: dict[str, float] = {"tokens": len(ids)}
    for name in names:
        window, chunk = (tokens + 64, tokens) if name == "full" else (WINDOW, 128)
        knn = reader(base, chunk, memory=name == "memory", window=window, memory_tokens=tokens)
        # of the window alone only the end can matter
        session = knn.session()
        for _ in knn.read(session, ids[-2 * WINDOW :] if name == "window" else ids):
            pass
        out[f"{name}: attention CPU s"] = knn.cpu_s
        out[f"{name}: found"] = sum(asked(knn, session, base.tokenizer, place) == code for place, code in CODES)
        print(f"{tokens} tokens, {name}: {out[f'{name}: found']:.0f} of 3; {time.process_time():.0f} s", flush=True)
    return out


def asked(knn: KnnAttention, session: Session, tokenizer: Any, place: str) -> str:
    branch = copy.deepcopy(session)
    for _ in knn.read(branch, tokenizer.encode(f"The code of the {place} gate is", add_special_tokens=False)):
        pass
    said: str = tokenizer.decode(knn.generate(branch, 7))
    return said.strip()[:5]


def run(
    base: Base, tokens: int, count: int, needles: Sequence[int], protocols: Sequence[str]
) -> tuple[list[harness.Goal], dict[str, Any]]:
    found = compare(base, documents(base, tokens, count), protocols)
    goals, shares = [], {}
    for kind, target in (("records", ">= 80"), ("code", ">= 60")):
        for protocol in protocols:
            share, shares[f"{kind}, {protocol}"] = closed(found[kind], protocol)
            goals.append(harness.Goal(f"{kind}: gap to full context closed, {protocol}, %", share, target))
    far = needle(base, needles[0])
    goals.append(harness.Goal(f"codes found of 3 in {needles[0]} tokens, memory", far["memory: found"], ">= 1"))
    goals.append(harness.Goal("the same, window alone", far["window: found"], "== 0"))
    goals.append(harness.Goal("the same, full context", far["full: found"]))
    ratio = far["memory: attention CPU s"] / far["full: attention CPU s"]
    goals.append(harness.Goal("attention CPU over it, memory to full context", ratio, "<= 0.35"))
    farther = [needle(base, length, ("memory",)) for length in needles[1:]]
    for length, one in zip(needles[1:], farther, strict=True):
        goals.append(harness.Goal(f"codes found of 3 in {length} tokens, memory", one["memory: found"], ">= 1"))
    perplexity = {
        kind: {arm: math.exp(-sum(x) / len(x)) for arm, x in of_kind.items()} for kind, of_kind in found.items()
    }
    details = {"perplexity": perplexity, "closed of each": shares, "tokens": tokens, "documents": count}
    return goals, {**details, "needle": [far, *farther]}


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="where the converted model is, or goes")
    parser.add_argument("--segments", action="store_true", help="also move the window on as a whole")
    parser.add_argument("--long", action="store_true", help="also look for codes in 16k and 32k tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = load_base("smollm2", args.data_dir or Path(folder), dtype="bfloat16", device="cpu")
        tokens, count, first = (1024, 1, 1100) if args.quick else (2048, 3, 8000)
        needles = (first, 16_000, 32_000) if args.long else (first,)
        goals, details = run(base, tokens, count, needles, list(CHUNKS) if args.segments else ["sliding"])
    harness.report("bench_memorizing", goals, details, args)


if __name__ == "__main__":
    main()
