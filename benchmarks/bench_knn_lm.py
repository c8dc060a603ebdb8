"""A token memory on text that the model does not know: perplexity, harm, and what it costs beside retrieval.

SmolLM2-135M reads files that are held out, in windows of 512 tokens. Its memory holds other files of the same kind, of
the other kind (the wrong store), or is off. ``fixed`` mixes with the one lambda that was best on development files, as
the kNN-LM of arXiv:1911.00172 does; ``learned`` with the gate, trained on the development files of both kinds and on
general text, each with the right and with the wrong store; ``unseen`` is trained without the kind it is tested on.
``retrieval`` puts the best 512 tokens of the store (BM25, by the first 128 tokens of a window) into the prompt. A line
counts as written where greedy decoding gives exactly it after the true text before it.

The kinds: Python's language reference as ``help()`` shows it; and the command examples of awscli, which is not
installed with anything (``pip install --no-deps awscli``, Apache-2.0). Where it is not, what one types into Python and
what it prints, from the docstrings of networkx. General text: the descriptions of this package's dependencies.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness

harness.threads()

import numpy as np
import texts
import torch
from torch import Tensor

from gradatim.memory.key_space import EachToken, KeySpace, late_layer, standardised_by
from gradatim.memory.knn_gate import HURT_NATS, Cases, Gate, recalled, train_gate
from gradatim.memory.knn_lm import NEIGHBOURS, KnnLm
from gradatim.memory.token_store import Neighbours, TokenStore
from gradatim.nn.base import Base, load_base
from gradatim.nn.render import Renderer
from gradatim.nn.states import states, states_and_logprobs

WINDOW = 512
QUERY = 128  # tokens of a window that retrieval asks with; scored are the rest
LAMBDAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True, slots=True)
class Sizes:
    """In tokens, but for ``retrieved``: windows."""

    store: int
    dev: int
    test: int
    general: int
    retrieved: int


FULL = Sizes(store=60_000, dev=4096, test=8192, general=2048, retrieved=8)  # about 15 minutes of one core
QUICK = Sizes(store=1536, dev=512, test=1024, general=768, retrieved=1)


class Exhaustive(TokenStore):
    """One that compares all keys, as they were before anything was rounded or left out."""

    def __init__(self, space: KeySpace[EachToken], vocabulary: int) -> None:
        super().__init__(space, vocabulary)
        self._all = np.zeros((0, space.pooling.width), np.float32)
        self._next = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._next)

    def add(self, source: str, hidden: Tensor, tokens: Tensor) -> range:
        before = len(self)
        self._all = np.concatenate([self._all, self._keys(hidden)])
        self._next = np.concatenate([self._next, tokens.numpy()])
        return range(before, len(self))

    def search(self, hidden: Tensor, k: int) -> Neighbours:
        asked = self._keys(hidden)
        distances = np.maximum(2 - 2 * asked @ self._all.T, 0)  # (B, N), of keys of length 1
        rows = np.argpartition(distances, k - 1, 1)[:, :k]
        rows = np.take_along_axis(rows, np.argsort(np.take_along_axis(distances, rows, 1), 1), 1)
        return Neighbours(np.take_along_axis(distances, rows, 1), self._next[rows], rows)


@dataclass(slots=True)
class Domain:
    name: str
    files: texts.Files
    store_windows: list[list[int]] = field(default_factory=list)
    dev: list[list[int]] = field(default_factory=list)
    test: list[list[int]] = field(default_factory=list)
    store: TokenStore | None = None
    exhaustive: TokenStore | None = None

    @property
    def memory(self) -> TokenStore:
        assert self.store is not None
        return self.store

    @property
    def exact(self) -> TokenStore:
        assert self.exhaustive is not None
        return self.exhaustive


def windows(documents: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of one document after the other; each with the token after it, so that every state has a target."""
    ids = list(itertools.chain.from_iterable(documents))
    return [ids[i : i + WINDOW + 1] for i in range(0, len(ids) - 1, WINDOW)]


class Reader:
    """The frozen model, the layer its keys are of, and the CPU it took."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.layer = late_layer(len(base.model.base_model.layers))
        self.cpu_s = 0.0
        self.tokens = 0

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.base.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def states(self, window: Sequence[int]) -> tuple[Tensor, Tensor]:
        return states(self.base.model, window[:-1], self.layer), torch.tensor(window[1:])

    def full(self, window: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """States (T, D), log-probabilities (T, V), targets (T,)."""
        started = time.process_time()
        hidden, logprobs = states_and_logprobs(self.base.model, window[:-1], self.layer)
        self.cpu_s += time.process_time() - started
        self.tokens += len(window) - 1
        return hidden, logprobs, torch.tensor(window[1:])


# ---------------------------------------------------------------------------------------------- set up


def prepare(domain: Domain, reader: Reader, sizes: Sizes) -> None:
    names = iter(texts.shuffled(domain.files))
    for part, count in (("test", sizes.test), ("dev", sizes.dev), ("store_windows", sizes.store)):
        documents = texts.take(domain.files, names, count, reader.encode)
        setattr(domain, part, windows(documents))


def remember(domain: Domain, reader: Reader, space: KeySpace[EachToken]) -> None:
    vocabulary = reader.base.model.config.vocab_size
    domain.store, domain.exhaustive = TokenStore(space, vocabulary), Exhaustive(space, vocabulary)
    for number, window in enumerate(domain.store_windows):
        hidden, tokens = reader.states(window)
        domain.store.add(f"window-{number}", hidden, tokens)
        domain.exhaustive.add(f"window-{number}", hidden, tokens)
    if domain.store.index.full:
        domain.store.index.seal()


def trained(
    domains: Sequence[Domain], general: Sequence[Sequence[int]], reader: Reader
) -> tuple[Gate, dict[str, Gate], dict[str, float]]:
    """The gate of all texts, one per domain trained on the others, and the best fixed lambda of each."""
    looking = KnnLm(Gate().lambdas)
    cases: dict[str, list[Cases]] = {}
    fixed: dict[str, float] = {}
    for name, some in [*((d.name, d.dev) for d in domains), ("general text", general)]:
        found: dict[str, list[Cases]] = {d.name: [] for d in domains}
        own: list[tuple[Tensor, Tensor]] = []
        for window in some:
            hidden, logprobs, targets = reader.full(window)
            for other in domains:
                found[other.name].append(looking.cases(hidden, logprobs, targets, other.memory))
                if other.name == name:
                    own.append((said(logprobs, targets), remembered(other.memory, hidden, targets)))
        cases[name] = [joined(c) for c in found.values()]
        if own:
            model, memory = (torch.cat(x) for x in zip(*own, strict=True))
            fixed[name] = max(LAMBDAS, key=lambda x, m=model, k=memory: float(mixture(m, k, x).mean()))  # type: ignore[misc]
    gates = {d.name: train_gate([c for name, of in cases.items() if name != d.name for c in of]) for d in domains}
    return train_gate([c for of in cases.values() for c in of]), gates, fixed


def joined(cases: Sequence[Cases]) -> Cases:
    return Cases(*(torch.cat([getattr(c, name) for c in cases]) for name in ("features", "model", "memory")))


def said(logprobs: Tensor, targets: Tensor) -> Tensor:
    return logprobs.gather(1, targets[:, None])[:, 0]


def remembered(store: TokenStore, hidden: Tensor, targets: Tensor) -> Tensor:
    """(T,) log-probability under the neighbours alone."""
    found = recalled(store.search(hidden, NEIGHBOURS))
    return torch.from_numpy((found.weights * (found.tokens == targets.numpy()[:, None])).sum(1)).log()


def mixture(model: Tensor, memory: Tensor, share: float) -> Tensor:
    return torch.logaddexp(model + math.log1p(-share), memory + math.log(share))


# ------------------------------------------------------------------------------------------------ arms


@dataclass(slots=True)
class Arm:
    """Per token: its log-probability, and whether it was the likeliest."""

    nats: list[Tensor] = field(default_factory=list)
    hits: list[Tensor] = field(default_factory=list)
    lambdas: list[Tensor] = field(default_factory=list)
    searched: list[Tensor] = field(default_factory=list)
    cpu_s: float = 0.0

    def add(self, logprobs: Tensor, targets: Tensor) -> None:
        self.nats.append(said(logprobs, targets))
        self.hits.append(logprobs.argmax(1) == targets)

    @property
    def all(self) -> Tensor:
        return torch.cat(self.nats)

    @property
    def perplexity(self) -> float:
        return float(torch.exp(-self.all.mean()))


def mix(arm: Arm, knn: KnnLm, store: TokenStore, hidden: Tensor, logprobs: Tensor, targets: Tensor) -> None:
    """In steps of 8 rows, as a server decodes."""
    started = time.process_time()
    rows = torch.split(logprobs, 8)
    steps = [knn.mix(h, x, [store] * len(h)) for h, x in zip(torch.split(hidden, 8), rows, strict=True)]
    mixed = [step.on(x) for step, x in zip(steps, rows, strict=True)]
    arm.cpu_s += time.process_time() - started
    arm.add(torch.cat(mixed), targets)
    arm.lambdas += [torch.from_numpy(s.lambdas) for s in steps]
    arm.searched += [torch.from_numpy(s.searched) for s in steps]


def measure(
    tests: Sequence[Sequence[int]],
    right: TokenStore,
    wrong: TokenStore,
    exact: TokenStore | None,
    knns: dict[str, KnnLm],
    share: float,
    reader: Reader,
) -> dict[str, Arm]:
    arms = {
        name: Arm() for name in ("frozen", "fixed", "fixed, wrong store", "learned", "learned, wrong store", "unseen")
    }
    for window in tests:
        hidden, logprobs, targets = reader.full(window)
        arms["frozen"].add(logprobs, targets)
        own = said(logprobs, targets)
        for name, store in (("fixed", right), ("fixed, wrong store", wrong)):
            arms[name].nats.append(mixture(own, remembered(store, hidden, targets), share))
        mix(arms["learned"], knns["all"], right, hidden, logprobs, targets)
        mix(arms["learned, wrong store"], knns["all"], wrong, hidden, logprobs, targets)
        mix(arms["unseen"], knns["unseen"], right, hidden, logprobs, targets)
        if exact is not None:
            mix(arms.setdefault("exact", Arm()), knns["all"], exact, hidden, logprobs, targets)
    return arms


def lines_written(arm: Arm, tests: Sequence[Sequence[int]], breaks: frozenset[int]) -> float:
    """Share of whole lines of which every token was the likeliest."""
    right = total = 0
    for window, hits in zip(tests, arm.hits, strict=True):
        ends = [i for i, token in enumerate(window[1:]) if token in breaks]
        for start, end in itertools.pairwise(ends):
            if end - start > 2:  # not an empty line
                total += 1
                right += bool(hits[start + 1 : end + 1].all())
    return right / max(total, 1)


# ------------------------------------------------------------------------------------------- retrieval


class Bm25:
    """Okapi BM25 over token ids, k1 = 1.2, b = 0.75."""

    def __init__(self, chunks: Sequence[Sequence[int]]) -> None:
        self._counts = [Counter(c) for c in chunks]
        self._lengths = np.array([len(c) for c in chunks])
        seen = Counter(t for c in self._counts for t in c)
        self._idf = {t: math.log(1 + (len(chunks) - n + 0.5) / (n + 0.5)) for t, n in seen.items()}

    def best(self, query: Sequence[int]) -> int:
        norm = 1.2 * (0.25 + 0.75 * self._lengths / self._lengths.mean())
        scores = np.zeros(len(self._counts))
        for token in set(query):
            tf = np.array([c[token] for c in self._counts])
            scores += self._idf.get(token, 0.0) * tf * 2.2 / (tf + norm)
        return int(scores.argmax())


def retrieval(domain: Domain, knn: KnnLm, reader: Reader, count: int) -> dict[str, Arm]:
    """Arms on the same tokens, the last 384 of whole windows; cpu_s is all that each took."""
    arms = {name: Arm() for name in ("frozen", "memory", "retrieval", "both")}
    index = Bm25(domain.store_windows)
    for window in [w for w in domain.test if len(w) == WINDOW + 1][:count]:
        started = time.process_time()
        hidden, logprobs, targets = (x[QUERY:] for x in reader.full(window))
        arms["frozen"].add(logprobs, targets)
        alone = time.process_time() - started
        arms["frozen"].cpu_s += alone
        mix(arms["memory"], knn, domain.memory, hidden, logprobs, targets)
        arms["memory"].cpu_s += alone
        started = time.process_time()
        chunk = domain.store_windows[index.best(window[:QUERY])]
        hidden, logprobs, targets = (x[len(chunk) + QUERY :] for x in reader.full([*chunk, *window]))
        arms["retrieval"].add(logprobs, targets)
        alone = time.process_time() - started
        arms["retrieval"].cpu_s += alone
        mix(arms["both"], knn, domain.memory, hidden, logprobs, targets)
        arms["both"].cpu_s += alone
    return arms


# --------------------------------------------------------------------------------------------- report


def recall_of(domain: Domain, reader: Reader) -> float:
    """At 16, on two windows."""
    overlaps = []
    for window in domain.test[:2]:
        hidden, _, _ = reader.full(window)
        for asked in torch.split(hidden, 8):
            found, exact = (store.search(asked, NEIGHBOURS).rows.tolist() for store in (domain.memory, domain.exact))
            overlaps += [len({*a[:16]} & {*b[:16]}) / 16 for a, b in zip(found, exact, strict=True)]
    return float(np.mean(overlaps))


def goals_of(name: str, target: str, arms: dict[str, Arm], beside: dict[str, Arm]) -> Iterator[harness.Goal]:
    base = arms["frozen"].perplexity
    learned = arms["learned"]
    yield harness.Goal(f"{name}: perplexity below frozen, learned, %", 100 * (1 - learned.perplexity / base), target)
    yield harness.Goal(f"{name}: the same, fixed lambda", 100 * (1 - arms["fixed"].perplexity / base))
    yield harness.Goal(
        f"{name}: the same, gate of other kinds of text only", 100 * (1 - arms["unseen"].perplexity / base)
    )
    for arm, bound in (("learned, wrong store", "<= 2"), ("fixed, wrong store", "reported")):
        yield harness.Goal(f"{name}: perplexity above frozen, {arm}, %", 100 * (arms[arm].perplexity / base - 1), bound)
    for arm, bound in (("learned", "<= 15"), ("fixed", "reported")):
        hurt = (arms["frozen"].all - arms[arm].all > HURT_NATS).float().mean()
        yield harness.Goal(f"{name}: tokens hurt by more than 0.1 nat, {arm}, %", 100 * float(hurt), bound)
    extra = {arm: beside[arm].cpu_s - beside["frozen"].cpu_s for arm in ("memory", "retrieval")}
    yield harness.Goal(f"{name}: CPU added, memory to retrieval", extra["memory"] / extra["retrieval"], "<= 0.333")
    ratio = beside["memory"].perplexity / beside["retrieval"].perplexity
    yield harness.Goal(f"{name}: perplexity, memory to retrieval", ratio, "<= 1")
    yield harness.Goal(
        f"{name}: perplexity, both to retrieval", beside["both"].perplexity / beside["retrieval"].perplexity
    )


def details_of(arms: dict[str, Arm], beside: dict[str, Arm], domain: Domain, breaks: frozenset[int]) -> dict[str, Any]:
    learned = arms["learned"]
    return {
        "entries": len(domain.memory),
        "test_tokens": len(learned.all),
        "perplexity": {name: arm.perplexity for name, arm in arms.items()},
        "retrieval_perplexity": {name: arm.perplexity for name, arm in beside.items()},
        "retrieval_tokens": len(beside["frozen"].all),
        "retrieval_cpu_ms_a_token": {n: 1000 * a.cpu_s / len(a.all) for n, a in beside.items()},
        "memory_cpu_ms_a_token": 1000 * learned.cpu_s / len(learned.all),
        "share_searched": float(torch.cat(learned.searched).float().mean()),
        "mean_lambda": {n: float(torch.cat(a.lambdas).mean()) for n, a in arms.items() if a.lambdas},
        "lines_written": {n: lines_written(a, domain.test, breaks) for n, a in arms.items() if a.hits},
    }


def line_breaks(base: Base) -> frozenset[int]:
    return frozenset(i for i in range(len(base.tokenizer)) if base.tokenizer.decode([i]).endswith("\n"))


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="where the converted model is, or goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = load_base("smollm2", args.data_dir or Path(folder), dtype="bfloat16", device="cpu")
        goals, details = run(Reader(base), QUICK if args.quick else FULL)
    harness.report("bench_knn_lm", goals, details, args)


def run(reader: Reader, sizes: Sizes) -> tuple[list[harness.Goal], dict[str, Any]]:
    base = reader.base
    commands = texts.cloud_commands()
    domains = [
        Domain("Python documentation", texts.python_documentation()),
        Domain("command examples", commands) if commands else Domain("docstrings", texts.command_examples()),
    ]
    general = windows(texts.take(*texts.named(texts.descriptions()), 2 * sizes.general, reader.encode))
    half = len(general) // 2
    calibration = torch.cat([reader.states(w)[0] for w in general[:half]])
    space = KeySpace(
        base.sha256, Renderer(base).digest(), (reader.layer,), standardised_by(calibration.float().numpy())
    )
    for domain in domains:
        prepare(domain, reader, sizes)
        remember(domain, reader, space)
    gate, unseen, fixed = trained(domains, general[:half], reader)
    breaks = line_breaks(base)
    goals: list[harness.Goal] = []
    details: dict[str, Any] = {"fixed_lambda": fixed}
    for domain, other, target in zip(
        domains, reversed(domains), (">= 20", ">= 48" if commands else "reported"), strict=True
    ):
        knns = {"all": KnnLm(gate.lambdas), "unseen": KnnLm(unseen[domain.name].lambdas)}
        arms = measure(domain.test, domain.memory, other.memory, domain.exact, knns, fixed[domain.name], reader)
        beside = retrieval(domain, knns["all"], reader, sizes.retrieved)
        goals += goals_of(domain.name, target, arms, beside)
        above = 100 * (arms["learned"].perplexity / arms["exact"].perplexity - 1)
        goals.append(harness.Goal(f"{domain.name}: perplexity over that of exact search, %", above, "<= 0.5"))
        goals.append(harness.Goal(f"{domain.name}: recall at 16", recall_of(domain, reader)))
        lines = {n: lines_written(arms[n], domain.test, breaks) for n in ("frozen", "learned")}
        goals += [harness.Goal(f"{domain.name}: lines written exactly, {n}, %", 100 * x) for n, x in lines.items()]
        details[domain.name] = details_of(arms, beside, domain, breaks)
    for domain in domains:
        gates = {"all": KnnLm(gate.lambdas), "unseen": KnnLm(gate.lambdas)}
        arms = measure(general[half:], domain.memory, domain.memory, None, gates, 0.25, reader)
        above = 100 * (arms["learned"].perplexity / arms["frozen"].perplexity - 1)
        goals.append(harness.Goal(f"general text: perplexity above frozen, memory of {domain.name}, %", above, "<= 2"))
    goals.append(harness.Goal("CPU of the model, ms a token (prefill)", 1000 * reader.cpu_s / reader.tokens))
    return goals, details


if __name__ == "__main__":
    main()
