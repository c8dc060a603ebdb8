"""Many noisy sources -> a calibrated reward: against majority vote, mean of scores and plain Dawid-Skene.

The truth is real: answers to puzzles of reasoning-gym, right or wrong as its own verifiers say. The sources are
simulated on it: a click that flips 40 % of the labels, a lint that flips 25 %, thumbs of 100 users of whom 30 always
lie, two judges that share their errors and like long answers, and a third that flips 20 %; none sees every answer.
Each of the
runs draws another population, audits 600 of 3000 answers, and judges 5000 others. Every method has the same labels:
half to fit to, half held out for its threshold (exact-binomial Learn then Test, risk 10 % or 5 % at 90 %).
"Plain Dawid-Skene" is the EM of 1979 on all votes; ``crowd-kit`` gives the same labels where it is installed.

    pip install reasoning-gym    # Apache-2.0; without it this script says so and stops
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import harness

harness.threads()

import numpy as np
import numpy.typing as npt

from gradatim.config import RewardConfig
from gradatim.reward.aggregate import category
from gradatim.reward.calibrate import GRID, calibrate, is_held_out
from gradatim.reward.evidence import Judged, Opinion
from gradatim.stats import dawid_skene, logistic
from gradatim.stats.dawid_skene import Votes
from gradatim.stats.learn_then_test import choose
from gradatim.stats.logistic import sigmoid
from gradatim.stats.venn_abers import expected_calibration_error
from gradatim.types import EpisodeId

Floats = npt.NDArray[np.float64]
TASKS = ("chain_sum", "basic_arithmetic", "leg_counting", "letter_counting", "spell_backward", "number_sorting")
FITTED, LABELS, FRESH = 3000, 600, 5000
RISKS = (0.10, 0.05)


@dataclass(frozen=True, slots=True)
class Answer:
    """``good``: what the verifier says. ``length``: characters of the answer with its reasoning."""

    good: int
    length: int


def answers(n: int, seed: int) -> list[Answer]:
    """Right answers, and wrong ones made by swapping answers between puzzles of a kind, as the verifiers judge them.
    Wrong ones tend to be longer, as answers of a model that is lost do."""
    try:
        import reasoning_gym  # type: ignore[import-not-found]
    except ImportError:
        sys.exit("bench_reward needs reasoning-gym: pip install reasoning-gym")
    rng = random.Random(seed)
    out: list[Answer] = []
    for task in TASKS:
        data = reasoning_gym.create_dataset(task, size=n // len(TASKS) + 1, seed=seed)
        entries = list(data)
        for i, entry in enumerate(entries):
            said = entry["answer"] if rng.random() < 0.55 else entries[(i + 1) % len(entries)]["answer"]
            good = int(data.score_answer(said, entry) >= 1.0)
            words = len(entry["question"].split()) + rng.randint(5, 60) + (0 if good else rng.randint(0, 25))
            out.append(Answer(good, words))
    rng.shuffle(out)
    return out[:n]


def sources(answer: Answer, z: float, i: int, rng: np.random.Generator) -> list[Opinion]:
    """``z``: how much longer than usual it is, in standard deviations."""
    sign = 2.0 * answer.good - 1.0
    shared = 0.9 * rng.normal() + 0.8 * z

    def flips(rate: float) -> float:
        return -sign if rng.random() < rate else sign

    out: list[Opinion] = []
    if rng.random() < 0.5:
        out.append(Opinion("implicit:click", "implicit", flips(0.4), 1.0))
    user = int(rng.integers(100))
    if rng.random() < 0.4:
        out.append(Opinion(f"human:thumb|u{user}", "human", -sign if user < 30 else flips(0.1), 1.0))
    for name in ("judge:a", "judge:b"):
        out.append(Opinion(name, "judge", float(np.tanh(0.6 * sign + shared + 0.5 * rng.normal())), 1.0))
    if rng.random() < 0.6:
        out.append(Opinion("judge:c", "judge", flips(0.2), 1.0))
    if rng.random() < 0.7:
        out.append(Opinion("critic:lint", "critic", flips(0.25), 1.0))
    return sorted(out, key=lambda o: o.rater)


@dataclass(frozen=True, slots=True)
class Sample:
    """``rows``: the first LABELS of them carry their label. ``fresh`` ones do not."""

    rows: list[Judged]
    fresh: list[Judged]
    truth: npt.NDArray[np.int64]  # of fresh


def draw(pool: Sequence[Answer], seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    chosen = [pool[int(k)] for k in rng.choice(len(pool), FITTED + FRESH, replace=False)]
    lengths = np.log1p(np.array([a.length for a in chosen]))
    z = (lengths - lengths.mean()) / lengths.std()
    rows = [
        Judged(
            EpisodeId(hashlib.sha256(f"{seed}/{i}".encode()).hexdigest()[:16]),
            tuple(sources(a, float(z[i]), i, rng)),
            float(lengths[i]),
            a.good if i < LABELS else None,
        )
        for i, a in enumerate(chosen)
    ]
    return Sample(rows[:FITTED], rows[FITTED:], np.array([a.good for a in chosen[FITTED:]]))


# ------------------------------------------------------------------------------------------------- the methods

Logits = Callable[[Sequence[Judged]], Floats]


def majority(rows: Sequence[Judged]) -> Floats:
    """Log-odds of the share of good votes, with one vote of each kind for a prior."""
    good = np.array([1.0 + sum(o.value > 0 for o in row.opinions) for row in rows])
    bad = np.array([1.0 + sum(o.value <= 0 for o in row.opinions) for row in rows])
    out: Floats = np.log(good / bad)
    return out


def mean_score(rows: Sequence[Judged]) -> Floats:
    mean = np.array([np.mean([o.value for o in row.opinions]) for row in rows])
    out: Floats = np.log((1.0 + 1e-3 + mean) / (1.0 + 1e-3 - mean))
    return out


def as_votes(rows: Sequence[Judged], raters: Mapping[str, int]) -> Votes:
    said = [
        (i, raters[o.rater], category(o.value)) for i, r in enumerate(rows) for o in r.opinions if o.rater in raters
    ]
    item, rater, what = (np.array(x, dtype=np.int64) for x in zip(*said, strict=True))
    return Votes(item, rater, what, np.ones(len(item)))


def plain_dawid_skene(rows: Sequence[Judged]) -> tuple[Logits, Mapping[str, int]]:
    """Each rater by itself, no labels, a flat prior of one vote."""
    raters = {name: j for j, name in enumerate(sorted({o.rater for row in rows for o in row.opinions}))}
    prior = np.tile(np.array([[0.5, 0.2, 0.3], [0.3, 0.2, 0.5]]), (len(raters), 1, 1))
    model, _ = dawid_skene.fit(as_votes(rows, raters), items=len(rows), prior=prior, strength=1.0)

    def logits(of: Sequence[Judged]) -> Floats:
        votes = as_votes(of, raters)
        odds = np.bincount(votes.item, weights=model.evidence(votes), minlength=len(of))
        out: Floats = odds + np.log(model.prior / (1.0 - model.prior))
        return out

    return logits, raters


def selective(logits: Logits, sample: Sample, risk: float) -> tuple[float, float]:
    """(coverage, share of wrong ones among them) of a rival. Its threshold is looked for as ours is: where it expects
    to be, after a logistic fit to the other half of the labels, so that being badly calibrated costs it no coverage."""
    known = [row for row in sample.rows if row.label is not None]
    fitted = [row for row in known if not is_held_out(row.episode_id)]
    held = [row for row in known if is_held_out(row.episode_id)]
    x = np.stack([np.ones(len(fitted)), logits(fitted)], axis=1)
    y = np.array([float(row.label or 0) for row in fitted])
    b = logistic.fit(x, y, centre=np.array([0.0, 1.0]), strength=np.array([0.1, 0.1]))

    def signed(rows: Sequence[Judged]) -> Floats:
        out: Floats = b[0] + b[1] * logits(rows)
        return out

    on_held, on_fresh = signed(held), signed(sample.fresh)
    sure = sigmoid(np.abs(on_held))
    wrong = ((on_held >= 0) != np.array([row.label == 1 for row in held])).astype(float)
    chosen = choose(sure, wrong, 1.0 - sure, grid=GRID, risk=risk, confidence=0.9)
    if chosen.value is None:
        return 0.0, 0.0
    kept = sigmoid(np.abs(on_fresh)) >= chosen.value
    return float(kept.mean()), _share(((on_fresh >= 0) != sample.truth)[kept])


def _share(wrong: npt.NDArray[np.bool_]) -> float:
    return float(wrong.mean()) if len(wrong) else 0.0


def rival(name: str, logits: Logits, sample: Sample) -> dict[str, float]:
    on_fresh = logits(sample.fresh)
    out = {
        f"{name} accuracy": float(((on_fresh >= 0) == sample.truth).mean()),
        f"{name} ece": expected_calibration_error(sigmoid(on_fresh), sample.truth.astype(float)),
    }
    for risk in RISKS:
        out[f"{name} coverage {risk}"], out[f"{name} error {risk}"] = selective(logits, sample, risk)
    return out


def ours(sample: Sample) -> dict[str, float]:
    model = calibrate(sample.rows, RewardConfig())
    good, sure = model.judge(sample.fresh)
    wrong = (good >= 0.5) != sample.truth
    out = {
        "ours accuracy": float(1.0 - wrong.mean()),
        "ours ece": expected_calibration_error(good, sample.truth.astype(float)),
    }
    held = [row for row in sample.rows if row.label is not None and is_held_out(row.episode_id)]
    held_good, held_sure = model.judge(held)
    held_wrong = ((held_good >= 0.5) != np.array([row.label == 1 for row in held])).astype(float)
    for risk in RISKS:
        chosen = choose(held_sure, held_wrong, 1.0 - held_sure, grid=GRID, risk=risk, confidence=0.9)
        kept = sure >= (2.0 if chosen.value is None else chosen.value)
        out[f"ours coverage {risk}"], out[f"ours error {risk}"] = float(kept.mean()), _share(wrong[kept])
    return out


def crowd_kit(sample: Sample, mine: Logits) -> float:
    """Share of answers on which crowd-kit's Dawid-Skene agrees with ours; NaN where it is not installed."""
    try:
        import pandas as pd  # type: ignore[import-untyped]
        from crowdkit.aggregation import DawidSkene  # type: ignore[import-not-found]
    except ImportError:
        return float("nan")
    said = [(i, o.rater, category(o.value)) for i, row in enumerate(sample.rows) for o in row.opinions]
    told = DawidSkene(n_iter=50).fit_predict(pd.DataFrame(said, columns=["task", "worker", "label"]))
    signs = mine(sample.rows) >= 0
    both = [(signs[i], label == 2) for i, label in told.items() if label != 1]
    return float(np.mean([a == b for a, b in both]))


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--runs", type=int, default=200)
    args = parser.parse_args()
    runs = 4 if args.quick else args.runs
    began_s = time.process_time()
    pool = answers(12_000, seed=0)
    table: list[dict[str, float]] = []
    agreement = float("nan")
    for seed in range(runs):
        sample = draw(pool, seed)
        plain, _ = plain_dawid_skene(sample.rows)
        if seed == 0:
            agreement = crowd_kit(sample, plain)
        row = ours(sample)
        for name, logits in (("majority", majority), ("mean", mean_score), ("dawid-skene", plain)):
            row |= rival(name, logits, sample)
        table.append(row)
    mean = {key: float(np.mean([row[key] for row in table])) for key in table[0]}
    kept = {risk: float(np.mean([row[f"ours error {risk}"] <= risk for row in table])) for risk in RISKS}
    ratio = mean["ours coverage 0.1"] / max(mean["dawid-skene coverage 0.1"], 1e-9)
    goals = [
        harness.Goal("expected calibration error", mean["ours ece"], "<= 0.03"),
        harness.Goal("share of runs that kept the risk of 10 %", kept[0.10], ">= 0.9"),
        harness.Goal("share of runs that kept the risk of 5 %", kept[0.05], ">= 0.9"),
        harness.Goal("coverage at 10 %, ratio to plain Dawid-Skene", ratio, ">= 1.5"),
        harness.Goal("coverage at 10 %", mean["ours coverage 0.1"]),
        harness.Goal("coverage at 5 %", mean["ours coverage 0.05"]),
        harness.Goal("accuracy", mean["ours accuracy"]),
        harness.Goal("accuracy of plain Dawid-Skene", mean["dawid-skene accuracy"]),
        harness.Goal("accuracy of a majority", mean["majority accuracy"]),
    ]
    details = {
        "truth": "reasoning-gym verifiers; sources simulated",
        "runs": runs,
        "labels": LABELS,
        "mean": mean,
        "agreement_with_crowd_kit": None if np.isnan(agreement) else agreement,
        "cpu_s": time.process_time() - began_s,
    }
    harness.report("bench_reward", goals, details, args)


if __name__ == "__main__":
    main()
