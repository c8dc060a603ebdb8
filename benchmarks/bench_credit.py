"""Credit over 60 steps where step 3 decides what is seen at step 53: how much of it falls on the guilty step, and what
that is worth to a learner.

A synthetic chain with known truth: at step 3 one of four keys is taken, of which one is right; the door shows at step
53; 5 % of the ends are noise. All else is halls and idle words. (1) After n logged episodes, the share of credit on
step 3 of new ones, where answers repeat word by word ("table") and where no two read alike ("free text"). (2) A softmax
policy over that chain, whose steps besides also have one answer that spoils the episode, learns from batches of 10 by
policy gradient with steps of a fixed length (as a limit on the change would have them), with the credit of each
method: how many episodes until a new one succeeds with 80 %. Each method has the best of four step lengths, and looks
back on the last 200 episodes of the policy itself, those of the batch included. With the longest steps two batches are
enough for any method, since here it costs nothing to move all other steps at random; what a method is worth where
steps must be small is shown at a length of 1. Synthetic data, no language model.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence

import harness

harness.threads()

import numpy as np
import numpy.typing as npt

from gradatim.config import CreditConfig, CreditMethod
from gradatim.credit.answer import Blend
from gradatim.credit.history import Lived, lived
from gradatim.credit.methods import Methods
from gradatim.types import AdapterId, Credit, Episode, EpisodeId, Step, StepId

Floats = npt.NDArray[np.float64]
STEPS, SLIP, SEEN, NOISE = 60, 2, 52, 0.05
IDLE = ("go on", "look round", "wait", "break the lamp")
KEYS = ("take the red key", "take the blue key", "take the green key", "take the black key")
WINDOW = 200
LENGTHS = (0.3, 1.0, 3.0, 10.0)  # of a step of the policy


def a_step(k: int, name: str, seen: str, said: str) -> Step:
    return Step(
        id=StepId(f"{name}-{k}"),
        episode_id=EpisodeId(name),
        created_at=0.0,
        adapter_id=AdapterId("agent@0"),
        adapter_sha256="",
        stage="live",
        messages=({"role": "user", "content": seen},),
        prompt_ids=(k,),
        completion_ids=(k,),
        logprobs=(0.0,),
        text=said,
        finish_reason="stop",
    )


def play(name: str, actions: Sequence[int], rng: random.Random, *, wordy: bool, fragile: bool) -> Lived:
    """``actions`` (STEPS,) of four each. ``fragile``: a broken lamp spoils the episode."""
    right = actions[SLIP] == 0
    spoiled = fragile and any(a == 3 for k, a in enumerate(actions) if k != SLIP)
    steps = []
    for k, a in enumerate(actions):
        seen, said = f"hall {k}", IDLE[a]
        if k == SLIP:
            seen, said = "four keys lie here", KEYS[a]
        if k == SEEN:
            seen = "the door opens" if right else "the door stays locked"
        if wordy:
            seen, said = f"{seen} lamp {rng.randint(1, 3)}", f"{said} {rng.randint(0, 10**9)}"
        steps.append(a_step(k, name, seen, said))
    good = (right and not spoiled) != (rng.random() < NOISE)
    return lived(Episode(id=EpisodeId(name), steps=tuple(steps)), 1.0 if good else -1.0)


Assign = Callable[[Lived, Sequence[Lived]], Sequence[float]]


def uniform(this: Lived, past: Sequence[Lived]) -> Sequence[float]:
    """The reward less the mean of earlier ones, 1/S to each step."""
    seen = past[-WINDOW:]
    mean = sum(e.value for e in seen) / len(seen) if seen else 0.0
    return [(this.value - mean) / STEPS] * STEPS


def outcome_rule(this: Lived, past: Sequence[Lived]) -> Sequence[float]:
    """What gradatim does where no method has an answer: a success in full, a failure divided."""
    return [this.value if this.value > 0 else this.value / STEPS] * STEPS


class Shipped:
    """The methods of ``order``, as ``HorizonCredit`` asks them; ``otherwise`` for what they leave."""

    def __init__(self, order: tuple[CreditMethod, ...], otherwise: Assign) -> None:
        self._order, self._otherwise = order, otherwise
        self._methods = Methods(CreditConfig())

    def __call__(self, this: Lived, past: Sequence[Lived]) -> Sequence[float]:
        ids = tuple(StepId(str(k)) for k in range(STEPS))
        plain = Credit(
            episode_id=EpisodeId("this"),
            created_at=0.0,
            step_ids=ids,
            advantages=tuple(self._otherwise(this, past)),
            methods=("outcome",) * STEPS,
        )
        blend = Blend(plain)
        for method in self._order:
            answer = self._methods.answer(method, this, past[-WINDOW:], len(past))
            if answer is not None:
                blend.add(answer)
        return blend.result().advantages


METHODS: Mapping[str, Callable[[], Assign]] = {
    "uniform": lambda: uniform,
    "outcome rule": lambda: outcome_rule,
    "anchor": lambda: Shipped(("anchor",), uniform),
    "decomposition": lambda: Shipped(("decomposition",), uniform),
    "gae": lambda: Shipped(("gae",), uniform),
    "default order": lambda: Shipped(("anchor", "decomposition"), outcome_rule),
}


def share(assign: Assign, seed: int, n: int, *, wordy: bool) -> float:
    """Mean share of |credit| on the guilty step of 10 new episodes, after n."""
    rng = random.Random(seed)

    def new(i: int) -> Lived:
        actions = [rng.randrange(3) for _ in range(STEPS)]
        actions[SLIP] = rng.choice([0, 0, 1, 2, 3])
        return play(f"e{i}", actions, rng, wordy=wordy, fragile=False)

    past = [new(i) for i in range(n)]
    credits = [np.abs(assign(new(n + i), past)) for i in range(10)]
    return float(np.mean([c[SLIP] / max(c.sum(), 1e-12) for c in credits]))


# ---------------------------------------------------------------------------------------------------- learning


def probabilities(logits: Floats) -> Floats:
    """(STEPS, 4)."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    out: Floats = e / e.sum(axis=1, keepdims=True)
    return out


def success(p: Floats) -> float:
    """Exactly: the right key, and nothing broken."""
    others = np.delete(p[:, 3], SLIP)
    return float(p[SLIP, 0] * np.prod(1.0 - others))


def episodes_to(assign: Assign, seed: int, length: float, *, target: float = 0.8, most: int = 1000) -> int:
    """Until success reaches the target; ``most`` where it does not."""
    rng, draws = random.Random(seed), np.random.default_rng(seed)
    logits = np.zeros((STEPS, 4))
    logits[:, 3] = -6.0  # it knows not to break things
    logits[SLIP, 3] = 0.0
    past: list[Lived] = []
    while len(past) < most:
        p = probabilities(logits)
        gradient = np.zeros_like(logits)
        batch: list[Lived] = []
        for _ in range(10):
            actions = [int(draws.choice(4, p=row)) for row in p]
            this = play(f"e{len(past) + len(batch)}", actions, rng, wordy=False, fragile=True)
            for k, (a, c) in enumerate(zip(actions, assign(this, [*past, *batch]), strict=True)):
                gradient[k] -= c * p[k]
                gradient[k, a] += c
            batch.append(this)
        past += batch
        norm = float(np.linalg.norm(gradient))
        logits += length * gradient / norm if norm else 0.0
        if success(probabilities(logits)) >= target:
            break
    return len(past)


def learned(make: Callable[[], Assign], seeds: int) -> dict[float, float]:
    """By step length, the mean of the episodes that it took: medians are whole batches."""
    return {length: float(np.mean([episodes_to(make(), seed, length) for seed in range(seeds)])) for length in LENGTHS}


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    args = parser.parse_args()
    seeds = 1 if args.quick else args.seeds
    began_s = time.process_time()
    shares: dict[str, float] = {}
    for n in (200,) if args.quick else (25, 50, 100, 200):
        for seed_kind, wordy in (("table", False), ("free text", True)):
            for name in ("anchor", "decomposition", "gae"):
                values = [share(METHODS[name](), seed, n, wordy=wordy) for seed in range(seeds)]
                shares[f"{name}, {seed_kind}, {n}"] = float(np.mean(values))
    took: dict[str, dict[float, float]] = {}
    if not args.quick:
        took = {name: learned(make, seeds) for name, make in METHODS.items()}
    goals = [
        harness.Goal("share on the guilty step, anchor, answers that repeat", shares["anchor, table, 200"], ">= 0.8"),
        harness.Goal("share, decomposition, free text", shares["decomposition, free text, 200"], ">= 0.8"),
        harness.Goal("share, decomposition, answers that repeat", shares["decomposition, table, 200"]),
        harness.Goal("share, gae, free text", shares["gae, free text, 200"]),
        harness.Goal("share, uniform", 1.0 / STEPS),
    ]
    for name in ("default order", "anchor", "decomposition") if took else ():
        best = min(took[name].values()) / min(took["uniform"].values())
        target = "reported" if name == "default order" else "<= 0.5"
        goals.append(harness.Goal(f"episodes to 80 % success, {name} / uniform, best lengths", best, target))
        short = took[name][1.0] / took["uniform"][1.0]
        goals.append(harness.Goal(f"episodes to 80 % success, {name} / uniform, steps of length 1", short))
    details = {"shares": shares, "episodes": took}
    harness.report("bench_credit", goals, {**details, "cpu_s": time.process_time() - began_s}, args)


if __name__ == "__main__":
    main()
