"""Documents longer than the window: what attention to nearest blocks recovers of the full context, and its cost.

SmolLM2-135M with a window of 512 tokens, frozen, nothing trained, read by the parts of the embedded engine that serve
it (its forward pass, its row cache, its attention beyond the window). Per document: the window alone, the window with
what lies beyond it, and the full context in one piece. The gap is that between window and full context in mean
log-probability; the share of it that is closed is the figure.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness

harness.threads()

import texts
import torch
from torch import Tensor

from gradatim.engine.attention import RowCache, Segment
from gradatim.engine.beyond import Beyond, Far
from gradatim.engine.runner import Runner
from gradatim.nn.base import Base, load_base

WINDOW = 512
ALL = 1 << 20  # tokens beyond the window that may be kept
CODES = (("north", "48213"), ("harbour", "70954"), ("museum", "16387"))
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(slots=True)
class Row:
    """What was read, in the first slot of its reader's cache."""

    far: Far
    length: int = 0  # tokens in the slot
    last: Tensor | None = None  # (H,) the state that predicts the next token


class Reader:
    """One row of the engine: a window, and what it lets go where there is ``memory``."""

    def __init__(self, base: Base, *, window: int = WINDOW, memory: bool = True) -> None:
        self._runner = Runner(base, 1, 1)
        bias = 0.0 if memory else -math.inf
        self._beyond = Beyond(self._runner.model, window=window, max_tokens=ALL, max_bytes=1 << 40, bias=bias)
        self._states = torch.empty(0)
        self._runner.model.base_model.norm.register_forward_hook(self._keep)
        self.cpu_s = 0.0  # of attention, projections apart
        cache, attend = self._runner.cache, self._runner.cache.attend

        def timed(*args: Any) -> Tensor:
            started_s = time.process_time()
            out = attend(*args)
            self.cpu_s += time.process_time() - started_s
            return out

        cache.attend = timed  # type: ignore[method-assign, assignment]

    @property
    def cache(self) -> RowCache:
        return self._runner.cache

    def open(self) -> Row:
        self.cache.release()
        return Row(self._beyond.open(None))

    def read(self, row: Row, ids: Sequence[int]) -> Iterator[Tensor]:
        """Per chunk the states (n, H) that predict what follows each token; chunks as the engine cuts them."""
        at = 0
        while at < len(ids):
            if row.length >= self._beyond.window:
                row.length = self._beyond.slide(row.far, self.cache, 0, row.length)
            room = self._beyond.window - row.length
            count = min(len(ids) - at, min(room, self._beyond.chunk) if self._beyond.reaches(row.far) else room)
            segment = Segment(0, row.length, ids[at : at + count], offset=row.far.base + row.far.gone)
            self.cache.reserve(row.length + count, [row.length])
            self._runner.forward([replace(segment, far=self._beyond.turn(segment, row.far))], 0)
            row.length, row.last, at = row.length + count, self._states[-1], at + count
            yield self._states

    def _keep(self, module: object, inputs: object, states: Tensor) -> None:
        self._states = states[0]

    @torch.inference_mode()
    def logprobs(self, states: Tensor) -> Tensor:
        """(n, V) of states (n, H)."""
        logits: Tensor = self._runner.model.get_output_embeddings()(states)
        return logits.float().log_softmax(-1)

    def score(self, row: Row, ids: Sequence[int]) -> Tensor:
        """Log-probability of each token but the first after those before it: (T - 1,)."""
        out: list[Tensor] = []
        for states in self.read(row, ids):
            done = sum(map(len, out))
            targets = torch.tensor(ids[done + 1 : done + 1 + len(states)])
            out.append(self.logprobs(states[: len(targets)]).gather(1, targets[:, None])[:, 0])
        return torch.cat(out)

    def branch(self, row: Row) -> tuple[Row, Tensor]:
        """For going on from the same place more than once: the row, and what is in its slot."""
        return Row(copy.deepcopy(row.far), row.length, row.last), self.cache.read(0, 0, row.length)

    def resume(self, row: Row, window: Tensor) -> None:
        self.cache.write(0, 0, window)
        self.cache.scrub([row.length])

    def answer(self, row: Row, count: int) -> list[int]:
        """The likeliest tokens."""
        out: list[int] = []
        for _ in range(count):
            assert row.last is not None
            out.append(int(self.logprobs(row.last[None])[0].argmax()))
            for _states in self.read(row, out[-1:]):
                pass
        return out


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


def nats(reader: Reader, ids: Sequence[int]) -> float:
    """Mean log-probability of what lies beyond the first window."""
    return float(reader.score(reader.open(), ids)[WINDOW - 1 :].mean())


Nats = dict[str, list[float]]  # by arm: mean log-probability of each document


def compare(base: Base, kinds: dict[str, list[list[int]]]) -> dict[str, Nats]:
    """Per kind of document."""
    longest = max(len(d) for some in kinds.values() for d in some)
    arms = {
        "full": Reader(base, window=longest, memory=False),
        "window": Reader(base, memory=False),
        "memory": Reader(base),
    }
    found: dict[str, Nats] = {kind: {name: [] for name in arms} for kind in kinds}
    for i, (kind, name) in itertools.product(range(len(kinds["code"])), itertools.product(kinds, arms)):
        found[kind][name].append(nats(arms[name], kinds[kind][i]))
        print(f"{kind} {i}, {name}: {found[kind][name][-1]:.4f}; {time.process_time():.0f} s", flush=True)
    return found


def closed(means: Nats) -> tuple[float, list[float]]:
    """% of the gap: over all documents, and of each."""
    arms = zip(means["window"], means["memory"], means["full"], strict=True)
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
        reader = Reader(base, window=tokens + 64 if name == "full" else WINDOW, memory=name == "memory")
        # of the window alone only the end can matter
        row = reader.open()
        for _ in reader.read(row, ids[-2 * WINDOW :] if name == "window" else ids):
            pass
        out[f"{name}: attention CPU s"] = reader.cpu_s
        said = asked(reader, row, base.tokenizer)
        out[f"{name}: found"] = sum(said[place] == code for place, code in CODES)
        print(f"{tokens} tokens, {name}: {said}; {reader.cpu_s:.1f} s of {time.process_time():.0f}", flush=True)
    return out


def asked(reader: Reader, row: Row, tokenizer: Any) -> dict[str, str]:
    """What it says of each place."""
    out = {}
    at, window = reader.branch(row)
    for place, _ in CODES:
        branch, _ = reader.branch(at)
        reader.resume(branch, window)
        for _states in reader.read(
            branch, tokenizer.encode(f"The code of the {place} gate is", add_special_tokens=False)
        ):
            pass
        out[place] = tokenizer.decode(reader.answer(branch, 7)).strip()[:5]
    return out


def run(base: Base, tokens: int, count: int, needles: Sequence[int]) -> tuple[list[harness.Goal], dict[str, Any]]:
    found = compare(base, documents(base, tokens, count))
    goals, shares = [], {}
    for kind, target in (("records", ">= 80"), ("code", ">= 60")):
        share, shares[kind] = closed(found[kind])
        goals.append(harness.Goal(f"{kind}: gap to full context closed, %", share, target))
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
    parser.add_argument("--long", action="store_true", help="also look for codes in 16k and 32k tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = load_base("smollm2", args.data_dir or Path(folder), dtype="bfloat16", device="cpu")
        tokens, count, first = (1024, 1, 1100) if args.quick else (2048, 3, 8000)
        needles = (first, 16_000, 32_000) if args.long else (first,)
        goals, details = run(base, tokens, count, needles)
    harness.report("bench_memorizing", goals, details, args)


if __name__ == "__main__":
    main()
