"""The model's own states as one more source of the reward: how much more is judged at the same risk.

Answers to templated tickets ("which team?") and to small sums, right or wrong by construction, as a simulated agent
logged them (it is right in 60 %). SmolLM2 reads each of the 600 once. In each run 300 of them are audited, and the
sources are drawn anew: a click that flips 40 % of the labels, on half of the answers, a lint that flips 25 %, on 70 %,
and a reviewer that flips 10 %, on 60 %. (Without the reviewer neither side could promise 10 %, and both abstained on
everything.) Both sides have the same labels; "without" is the same model without that source. Judged are the 300 other
answers. A second run on the same folder makes no sketch again.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import harness

harness.threads()

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from gradatim.config import RewardConfig
from gradatim.learner.encoder import StateEncoder
from gradatim.nn.base import load_base
from gradatim.nn.render import Renderer
from gradatim.reward import Hidden, hidden
from gradatim.reward.calibrate import calibrate
from gradatim.reward.evidence import Judged, Opinion
from gradatim.store import SqlShelf, open_store
from gradatim.types import AdapterId, Case, Episode, EpisodeId, Step, StepId

Floats = npt.NDArray[np.float64]
TEAMS = {
    "billing": ("I was charged twice for {}", "the invoice for {} is wrong", "I want my money back for {}"),
    "shipping": ("my parcel with {} never came", "the courier lost {}", "when will {} be delivered"),
    "technical": ("{} does not turn on any more", "the app crashes when I open {}", "{} shows an error message"),
    "account": ("I forgot my password for {}", "please change my address at {}", "delete my profile for {}"),
}
THINGS = (
    "the blue lamp",
    "my phone",
    "the coffee machine",
    "a red chair",
    "the headphones",
    "the web shop",
    "my watch",
)
LABELS, FRESH = 300, 300
RISK = 0.1
SOURCES = (  # (rater, family, share of labels that it flips, share of answers that it sees)
    ("critic:lint", "critic", 0.25, 0.7),
    ("implicit:click", "implicit", 0.4, 0.5),
    ("judge:reviewer", "judge", 0.1, 0.6),
)


@dataclass(frozen=True, slots=True)
class Answer:
    question: str
    text: str
    good: int
    task: str


def answers(n: int, seed: int) -> list[Answer]:
    """Half of them tickets, half sums."""
    rng = random.Random(seed)
    out = []
    for i in range(n):
        good = int(rng.random() < 0.6)
        if i % 2:
            team = rng.choice(list(TEAMS))
            said = team if good else rng.choice([t for t in TEAMS if t != team])
            ticket = rng.choice(TEAMS[team]).format(rng.choice(THINGS))
            question = f"Which team, {', '.join(TEAMS)}, gets this ticket: {ticket} (number {rng.randint(100, 999)})"
            out.append(Answer(question, f"The {said} team.", good, "tickets"))
        else:
            a, b = rng.randint(2, 40), rng.randint(2, 40)
            value = a + b if good else a + b + rng.choice([-10, -3, -2, -1, 1, 2, 3, 10])
            out.append(Answer(f"What is {a} plus {b}?", f"{a} + {b} = {value}.", good, "sums"))
    return out


def step_of(i: int, answer: Answer, renderer: Renderer) -> Step:
    return Step(
        id=StepId(f"s{i}"),
        episode_id=EpisodeId(f"e{i}"),
        created_at=0.0,
        adapter_id=AdapterId("agent@0"),
        adapter_sha256="",
        stage="live",
        prompt_ids=renderer.prompt_ids([{"role": "user", "content": answer.question}]),
        completion_ids=renderer.completion_ids(answer.text),
        logprobs=(),
        text=answer.text,
        finish_reason="stop",
    )


def rows_of(pool: Sequence[Answer], seed: int) -> tuple[list[Judged], npt.NDArray[np.int64]]:
    """(rows, which of them are audited): sources of one run."""
    rng = np.random.default_rng(seed)
    audited = np.zeros(len(pool), dtype=np.int64)
    audited[rng.permutation(len(pool))[:LABELS]] = 1
    rows = []
    for i, answer in enumerate(pool):
        sign = 2.0 * answer.good - 1.0
        said = []
        for rater, family, rate, seen in SOURCES:
            if rng.random() < seen:
                said.append(Opinion(rater, family, -sign if rng.random() < rate else sign, 1.0))
        rows.append(Judged(EpisodeId(f"e{i}"), tuple(said), 2.0, answer.good if audited[i] else None))
    return rows, audited


def judged(rows: Sequence[Judged], audited: npt.NDArray[np.int64], truth: Floats) -> dict[str, float]:
    """What a calibrated model on these rows makes of those that are not audited."""
    model = calibrate(rows, RewardConfig(risk=RISK))
    fresh = [i for i in range(len(rows)) if not audited[i]]
    good, sure = model.judge([rows[i] for i in fresh])
    kept = sure >= (2.0 if model.threshold.value is None else model.threshold.value)
    wrong = (good >= 0.5) != (truth[fresh] >= 0.5)
    return {
        "auc": float(roc_auc_score(truth[fresh], good)),
        "coverage": float(kept.mean()),
        "error": float(wrong[kept].mean()) if kept.any() else 0.0,
    }


def one_run(pool: Sequence[Answer], source: Hidden, seed: int) -> dict[str, float]:
    rows, audited = rows_of(pool, seed)
    truth = np.array([float(a.good) for a in pool])
    source.fit(rows, upto=0)
    heard = source.heard(rows)
    out = {f"without {k}": v for k, v in judged(rows, audited, truth).items()}
    out |= {f"with {k}": v for k, v in judged(heard, audited, truth).items()}
    for task in ("tickets", "sums"):
        said = {
            i: o.value
            for i, row in enumerate(heard)
            for o in row.opinions
            if o.rater == hidden.SOURCE and not audited[i] and pool[i].task == task
        }
        among = sum(not audited[i] and pool[i].task == task for i in range(len(pool)))
        out[f"speaks {task}"] = len(said) / among
        both = len({pool[i].good for i in said}) == 2
        out[f"auc {task}"] = float(roc_auc_score(truth[list(said)], list(said.values()))) if both else 0.5
    return out


def sketched(pool: Sequence[Answer], data_dir: Path) -> Hidden:
    """The source; sketches of an earlier run are not made again."""
    base = load_base("smollm2", data_dir, dtype="float32", device="cpu")
    torch.set_num_threads(1)
    renderer = Renderer(base)
    store = open_store(data_dir / "sketches.db")
    source = Hidden(SqlShelf(store.engines), StateEncoder(base))
    for i, answer in enumerate(pool):
        step = step_of(i, answer, renderer)
        episode = Episode(id=step.episode_id, steps=(step,))
        source.note(Case(position=0, episode=episode, feedback=(), touched_at=0.0))
    return source


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, help="keeps the converted model between runs")
    args = parser.parse_args()
    pool = answers(LABELS + FRESH, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        data_dir: Path = args.data_dir or Path(scratch)
        data_dir.mkdir(parents=True, exist_ok=True)
        source = sketched(pool, data_dir)
        table = [one_run(pool, source, seed) for seed in range(1 if args.quick else args.seeds)]
    mean = {key: float(np.mean([row[key] for row in table])) for key in table[0]}
    kept = float(np.mean([row["with error"] <= RISK for row in table]))
    goals = [
        harness.Goal("coverage at 10 % with it", mean["with coverage"]),
        harness.Goal("coverage at 10 % without it", mean["without coverage"]),
        harness.Goal("AUC of P(good) with it", mean["with auc"]),
        harness.Goal("AUC of P(good) without it", mean["without auc"]),
        harness.Goal("AUC of its own votes, tickets", mean["auc tickets"]),
        harness.Goal("AUC of its own votes, sums", mean["auc sums"]),
        harness.Goal("largest share of wrong rewards with it", max(row["with error"] for row in table)),
        harness.Goal("share of runs that kept the risk", kept, ">= 0.9"),
    ]
    details = {"truth": "by construction; sources and agent simulated", "labels": LABELS, "runs": table}
    harness.report("bench_hidden_reward", goals, details, args)


if __name__ == "__main__":
    main()
