"""Credit over 60 steps where step 3 decides what is seen at step 53: how much of it falls on the guilty step, and what
that is worth to a learner.

A synthetic chain with known truth: at step 3 one of four keys is taken, of which one is right; the door shows at step
53; 5 % of the ends are noise. All else is halls and idle words. (1) After n logged episodes, the share of credit on
step 3 of new ones, where answers repeat word by word ("table") and where no two read alike ("free text"). (2) A softmax
policy over that chain, whose steps besides also have one answer that spoils the episode, learns from batches of 10 by
policy gradient with steps of a fixed length (as a limit on the change would have them), with the credit of each
method: how many episodes until a new one succeeds with 80 %. Each method has the best of three step lengths, and
looks back on the last 200 episodes of the policy itself. Synthetic data, no language model.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence

import harness

harness.threads()

import numpy as np
import numpy.typing as npt

from gradatim.credit import decompose
from gradatim.credit.anchors import contrast
from gradatim.credit.history import Lived, lived
from gradatim.types import AdapterId, Episode, EpisodeId, Step, StepId

Floats = npt.NDArray[np.float64]
STEPS, SLIP, SEEN, NOISE = 60, 2, 52, 0.05
IDLE = ("go on", "look round", "wait", "break the lamp")
KEYS = ("take the red key", "take the blue key", "take the green key", "take the black key")
WINDOW = 200


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


Assign = Callable[[Lived, Sequence[Lived]], list[float]]


def uniform(this: Lived, past: Sequence[Lived]) -> list[float]:
    """The reward less the mean of earlier ones, 1/S to each step."""
    mean = sum(e.value for e in past) / len(past) if past else 0.0
    return [(this.value - mean) / STEPS] * STEPS


def outcome_rule(this: Lived, past: Sequence[Lived]) -> list[float]:
    """What gradatim does where no method has an answer: a success in full, a failure divided."""
    return [this.value if this.value > 0 else this.value / STEPS] * STEPS


def anchor(this: Lived, past: Sequence[Lived]) -> list[float]:
    return contrast(this, this.observations, [(e, e.observations) for e in past]) or uniform(this, past)


class Decomposition:
    """Refitted as ``HorizonCredit`` does."""

    def __init__(self) -> None:
        self._scorer: decompose.PrefixScorer | None = None
        self._calls = 0

    def __call__(self, this: Lived, past: Sequence[Lived]) -> list[float]:
        if self._calls % 20 == 0:
            self._scorer = decompose.fit(past)
        self._calls += 1
        if self._scorer is None or self._scorer.fit < 0.2:
            return uniform(this, past)
        return self._scorer.credit(this)


METHODS: Mapping[str, Callable[[], Assign]] = {
    "uniform": lambda: uniform,
    "outcome rule": lambda: outcome_rule,
    "anchor": lambda: anchor,
    "decomposition": Decomposition,
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
            for k, (a, c) in enumerate(zip(actions, assign(this, past[-WINDOW:]), strict=True)):
                gradient[k] -= c * p[k]
                gradient[k, a] += c
            batch.append(this)
        past += batch
        norm = float(np.linalg.norm(gradient))
        logits += length * gradient / norm if norm else 0.0
        if success(probabilities(logits)) >= target:
            break
    return len(past)


def learned(make: Callable[[], Assign], seeds: int) -> tuple[float, float]:
    """(median episodes, its step length), of the best one."""
    runs = {length: [episodes_to(make(), seed, length) for seed in range(seeds)] for length in (0.3, 1.0, 3.0)}
    return min((float(np.median(n)), length) for length, n in runs.items())


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    seeds = 1 if args.quick else args.seeds
    began_s = time.process_time()
    shares: dict[str, float] = {}
    for n in (200,) if args.quick else (25, 50, 100, 200):
        for seed_kind, wordy in (("table", False), ("free text", True)):
            for name in ("anchor", "decomposition"):
                values = [share(METHODS[name](), seed, n, wordy=wordy) for seed in range(seeds)]
                shares[f"{name}, {seed_kind}, {n}"] = float(np.mean(values))
    took: dict[str, tuple[float, float]] = {}
    if not args.quick:
        took = {name: learned(make, seeds) for name, make in METHODS.items()}
    goals = [
        harness.Goal("share on the guilty step, anchor, answers that repeat", shares["anchor, table, 200"], ">= 0.8"),
        harness.Goal("share, decomposition, free text", shares["decomposition, free text, 200"], ">= 0.8"),
        harness.Goal("share, decomposition, answers that repeat", shares["decomposition, table, 200"]),
        harness.Goal("share, uniform", 1.0 / STEPS),
    ]
    for name in ("anchor", "decomposition") if took else ():
        ratio = took[name][0] / took["uniform"][0]
        goals.append(harness.Goal(f"episodes to 80 % success, {name} / uniform", ratio, "<= 0.5"))
    details = {"shares": shares, "episodes": {k: {"median": m, "step": s} for k, (m, s) in took.items()}}
    harness.report("bench_credit", goals, {**details, "cpu_s": time.process_time() - began_s}, args)


if __name__ == "__main__":
    main()
