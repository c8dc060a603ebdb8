"""Documents longer than the window: what attention to nearest neighbours recovers of the full context, and its cost.

SmolLM2-135M with a window of 512 tokens, frozen, nothing trained. Per document: the window alone, the window with kNN
attention in all layers but the first two (top 32 of each head), and the full context. The gap is that between window
and full context in mean log-probability; the share of it that is closed is the figure. ``sliding`` moves the window on
by 128 tokens (the default), ``segments`` by the whole window, as the notes behind the goals did.

Records: entries of torch's operator and derivative tables, which repeat as logs do. Code: files of this package's
dependencies. Needle: three codes in a long document, asked for at its end; and the CPU of attention over that document.
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

from gradatim.memory.knn_attention import WINDOW, KnnAttention
from gradatim.nn.base import Base, load_base
from gradatim.nn.session import Session

CODES = (("north", "48213"), ("harbour", "70954"), ("museum", "16387"))
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


def reader(base: Base, chunk: int, *, memory: bool, window: int = WINDOW) -> Timed:
    knn = Timed(base.model, window=window, chunk=chunk)
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


def compare(base: Base, kinds: dict[str, list[list[int]]]) -> dict[str, dict[str, float]]:
    """Per kind the mean log-probability of each arm."""
    longest = max(len(d) for some in kinds.values() for d in some)
    arms = {"full": reader(base, longest, memory=False, window=longest)}
    for name, chunk in (("sliding", 128), ("segments", WINDOW)):
        arms[f"{name}: window"] = reader(base, chunk, memory=False)
        arms[f"{name}: memory"] = reader(base, chunk, memory=True)
    found: dict[str, dict[str, float]] = {}
    for kind, some in kinds.items():
        found[kind] = {name: sum(nats(knn, d) for d in some) / len(some) for name, knn in arms.items()}
    return found


def closed(means: dict[str, float], protocol: str) -> float:
    """% of the gap."""
    window = means[f"{protocol}: window"]
    return 100 * (means[f"{protocol}: memory"] - window) / (means["full"] - window)


def needle(base: Base, tokens: int) -> dict[str, float]:
    """Codes found of three by window and by memory, and the CPU of attention by memory and by full context."""
    encode = base.tokenizer.encode
    filler = encode(FILLER, add_special_tokens=False)
    pieces = [encode(f"The code of the {place} gate is {code}. ", add_special_tokens=False) for place, code in CODES]
    part = (tokens - sum(map(len, pieces))) // (len(CODES) + 1)
    between = (filler * (part // len(filler) + 1))[:part]
    ids = [*itertools.chain.from_iterable([*between, *piece] for piece in pieces), *between]
    arms = {
        "memory": reader(base, 128, memory=True),
        "window": reader(base, 128, memory=False),
        "full": reader(base, tokens, memory=False, window=tokens + 64),
    }
    out: dict[str, float] = {"tokens": len(ids)}
    for name, knn in arms.items():
        # of the window alone only the end can matter
        session = knn.session()
        for _ in knn.read(session, ids[-2 * WINDOW :] if name == "window" else ids):
            pass
        out[f"{name}: attention CPU s"] = knn.cpu_s
        out[f"{name}: found"] = sum(asked(knn, session, base.tokenizer, place) == code for place, code in CODES)
    return out


def asked(knn: KnnAttention, session: Session, tokenizer: Any, place: str) -> str:
    branch = copy.deepcopy(session)
    for _ in knn.read(branch, tokenizer.encode(f"The code of the {place} gate is", add_special_tokens=False)):
        pass
    said: str = tokenizer.decode(knn.generate(branch, 7))
    return said.strip()[:5]


def run(base: Base, tokens: int, count: int, needle_tokens: int) -> tuple[list[harness.Goal], dict[str, Any]]:
    found = compare(base, documents(base, tokens, count))
    goals = []
    for kind, target in (("records", ">= 80"), ("code", ">= 60")):
        for protocol in ("sliding", "segments"):
            share = closed(found[kind], protocol)
            goals.append(harness.Goal(f"{kind}: gap to full context closed, {protocol}, %", share, target))
    far = needle(base, needle_tokens)
    goals.append(harness.Goal(f"codes found of 3 in {needle_tokens} tokens, memory", far["memory: found"], ">= 1"))
    goals.append(harness.Goal("the same, window alone", far["window: found"], "== 0"))
    goals.append(harness.Goal("the same, full context", far["full: found"]))
    ratio = far["memory: attention CPU s"] / far["full: attention CPU s"]
    goals.append(harness.Goal("attention CPU over it, memory to full context", ratio, "<= 0.35"))
    perplexity = {kind: {arm: math.exp(-x) for arm, x in means.items()} for kind, means in found.items()}
    return goals, {"perplexity": perplexity, "tokens": tokens, "documents": count, "needle": far}


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="where the converted model is, or goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = load_base("smollm2", args.data_dir or Path(folder), dtype="bfloat16", device="cpu")
        sizes = (1024, 1, 1100) if args.quick else (2560, 3, 8000)
        goals, details = run(base, *sizes)
    harness.report("bench_memorizing", goals, details, args)


if __name__ == "__main__":
    main()
