"""The gate that comes with this package for SmolLM2-135M: trained here, and compared on text that it has not seen.

As in ``bench_knn_lm``, but with memories of the sizes that one tenant's has, from one short answer on, in the key space
that a server has. The gate is trained on development files: of each kind with the memory of its own kind and with that
of the other, and general text with either, at every size. Compared on held-out files: ``near``, the gate that needs no
training; ``learned``; ``unseen``, the same trained without the kind it is tested on; ``fixed``, a quarter for the
memory everywhere. All are capped as the server does. ``--write`` puts the gate into the package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

harness.threads()

import texts
import torch
from bench_knn_lm import Domain, Reader, joined, prepare, said, windows
from bench_knn_lm import Sizes as Parts
from torch import Tensor

from gradatim.memory.key_space import EachToken, KeySpace
from gradatim.memory.knn_gate import HURT_NATS, Cases, Gate, near_gate, train_gate
from gradatim.memory.knn_lm import LEAST_LAMBDA, SMALL_STORE, SMALL_STORE_CAP, KnnLm
from gradatim.memory.public_space import public_space
from gradatim.memory.shipped import FILE, write_shipped
from gradatim.memory.token_store import TokenStore
from gradatim.nn.base import load_base

FULL = Parts(store=6144, dev=2048, test=2560, general=1024, retrieved=0)  # about 3 minutes of one core
QUICK = Parts(store=1024, dev=512, test=512, general=512, retrieved=0)
GENERAL = "general text"
Lambdas = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Seen:
    """A text with one memory: the tokens that were looked up, and what all cost the model."""

    cases: Cases
    nats: float  # of all tokens, under the model
    tokens: int
    entries: int

    def perplexity(self, gate: Lambdas | None) -> float:
        nats = self.nats + (0.0 if gate is None else float(self._lost(gate).sum()))
        return float(torch.tensor(nats / self.tokens).exp())

    def hurt(self, gate: Lambdas) -> float:
        """Share of all tokens."""
        return float((self._lost(gate) > HURT_NATS).sum()) / self.tokens

    def _lost(self, gate: Lambdas) -> Tensor:
        """(N,) nats."""
        lambdas = gate(self.cases.features)
        lambdas = lambdas.clamp_max(SMALL_STORE_CAP) if self.entries < SMALL_STORE else lambdas
        return self.cases.model - self.cases.mixed(torch.where(lambdas >= LEAST_LAMBDA, lambdas, 0.0))


Table = Mapping[tuple[str, str, int], Seen]  # by text, memory and size


def stores_of(
    domains: Sequence[Domain], reader: Reader, space: KeySpace[EachToken], most: int
) -> dict[tuple[str, int], TokenStore]:
    """Of each kind: the first 1/384, 1/24, 1/4 and all of its text."""
    out: dict[tuple[str, int], TokenStore] = {}
    for domain in domains:
        read = [reader.states(w) for w in domain.store_windows]
        hidden, tokens = (torch.cat(x) for x in zip(*read, strict=True))
        for size in (most // 384, most // 24, most // 4, most):
            out[domain.name, size] = store = TokenStore(space, reader.base.model.config.vocab_size)
            store.add("text", hidden[:size], tokens[:size])
    return out


def looked_up(
    parts: Mapping[str, list[list[int]]], stores: Mapping[tuple[str, int], TokenStore], reader: Reader
) -> Table:
    looking = KnnLm(near_gate)
    out: dict[tuple[str, str, int], Seen] = {}
    for text, some in parts.items():
        found: dict[tuple[str, int], list[Cases]] = {key: [] for key in stores}
        nats, tokens = 0.0, 0
        for window in some:
            hidden, logprobs, targets = reader.full(window)
            nats -= float(said(logprobs, targets).sum())
            tokens += len(targets)
            for key, store in stores.items():
                found[key].append(looking.cases(hidden, logprobs, targets, store))
        for (memory, size), cases in found.items():
            out[text, memory, size] = Seen(joined(cases), nats, tokens, len(stores[memory, size]))
    return out


def goals_of(table: Table, gates: Mapping[str, Mapping[str, Lambdas]], sizes: Sequence[int]) -> Iterator[harness.Goal]:
    """Changes of perplexity in percent, of the worst or the mean of what they sum up."""
    matched = [key for key in table if key[0] == key[1]]
    wrong = [key for key in table if key[0] != key[1]]

    def change(key: tuple[str, str, int], arm: str) -> float:
        seen = table[key]
        return 100 * (seen.perplexity(gates[arm][key[0]]) / seen.perplexity(None) - 1)

    for arm in ("near", "learned", "unseen", "fixed"):
        for size in sizes:
            for text, memory, n in matched:
                if n == size:
                    yield harness.Goal(f"{arm}: {text}, right memory of {n} tokens, %", change((text, memory, n), arm))
        worst = max(change(key, arm) for key in wrong)
        target = "reported" if arm == "fixed" else "<= 2"
        yield harness.Goal(f"{arm}: wrong memory, worst of {len(wrong)}, %", worst, target)
        hurt = max(100 * seen.hurt(gates[arm][key[0]]) for key, seen in table.items())
        target = "<= 15" if arm == "learned" else "reported"
        yield harness.Goal(f"{arm}: tokens hurt by more than {HURT_NATS} nat, worst of {len(table)}, %", hurt, target)


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="where the converted model is, or goes")
    parser.add_argument("--write", action="store_true", help="put the gate into the package")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = args.data_dir or Path(folder)
        base = load_base("smollm2", data_dir, dtype="float32", device="cpu")
        reader = Reader(base)
        space = public_space(base, reader.layer, Path(folder))
        goals, details, gate = run(reader, space, QUICK if args.quick else FULL)
        if args.write:
            other = load_base("smollm2", data_dir, dtype="bfloat16", device="cpu")
            write_shipped(FILE, (base.sha256, other.sha256), space, gate)
    harness.report("bench_token_gate", goals, details, args)


def run(reader: Reader, space: KeySpace[EachToken], sizes: Parts) -> tuple[list[harness.Goal], dict[str, Any], Gate]:
    domains = [
        Domain("Python documentation", texts.python_documentation()),
        Domain("command examples", texts.command_examples()),
    ]
    for domain in domains:
        prepare(domain, reader, sizes)
    general = windows(texts.take(*texts.named(texts.descriptions()), 2 * sizes.general, reader.encode))
    half = len(general) // 2
    stores = stores_of(domains, reader, space, sizes.store)
    dev = looked_up({d.name: d.dev for d in domains} | {GENERAL: general[:half]}, stores, reader)
    gate = train_gate([seen.cases for seen in dev.values()])
    test = looked_up({d.name: d.test for d in domains} | {GENERAL: general[half:]}, stores, reader)
    unseen = {
        name: train_gate([s.cases for key, s in dev.items() if key[0] != name]) for name in (d.name for d in domains)
    }
    names = [*unseen, GENERAL]
    gates: dict[str, dict[str, Lambdas]] = {
        "near": dict.fromkeys(names, lambda x: torch.from_numpy(near_gate(x.numpy()))),
        "learned": dict.fromkeys(names, gate),
        "unseen": {name: unseen.get(name, gate) for name in names},
        "fixed": dict.fromkeys(names, lambda x: torch.full((len(x),), SMALL_STORE_CAP)),
    }
    lengths = sorted({size for _, size in stores})
    details = {
        "perplexity": {
            f"{text}, memory of {n} tokens of {memory}": {
                "frozen": seen.perplexity(None),
                **{arm: seen.perplexity(of[text]) for arm, of in gates.items()},
                "share_searched": len(seen.cases.model) / seen.tokens,
            }
            for (text, memory, n), seen in test.items()
        },
        "model_cpu_ms_a_token": 1000 * reader.cpu_s / max(1, reader.tokens),
    }
    return list(goals_of(test, gates, lengths)), details, gate


if __name__ == "__main__":
    main()
