"""Permuted digits: elastic weight consolidation against plain SGD and joint training, as in Kirkpatrick 2017, fig. 2A.

Ten tasks are ten fixed permutations of the 64 pixels of scikit-learn's digits (1797 real images of 8 x 8), learned
one after the other by one small network without being told which task an image is of. After each task the accuracy is
the mean over all tasks so far, on images that no task was trained on. ``sgd`` goes on with the new task's images alone;
``ewc`` too, with the penalty of ``gradatim.nn.ewc``; ``joint`` trains on the images of all tasks so far, which is the
upper bound that a learner without the old images cannot have. All three take the same steps a task and image.

lambda, the learning rate and the passes were chosen for ``ewc`` on permutations and networks that are not among those
reported; ``--choose`` prints what lambda does there. It writes docs/digits.png on a full run.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

harness.threads()

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from gradatim.nn.ewc import Consolidation, diagonal_fisher

ARMS = ("joint", "ewc", "sgd")
COLOURS = {"joint": "#444444", "ewc": "#1b6ca8", "sgd": "#b03a2e"}
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "digits.png"
HIDDEN = 256
BATCH = 32
LR = 0.5
EPOCHS = 20
FISHER_IMAGES = 400
STRENGTH = 30.0  # lambda


def draw(logits: Tensor) -> Tensor:
    """log p of a label that the network draws for one image."""
    logprobs = logits.log_softmax(-1)
    label = torch.multinomial(logprobs.exp(), 1)
    return logprobs[label[0]]


class Stream:
    """The tasks of one seed: (images (n, 64), labels (n,)) to train on and to be tested on."""

    def __init__(self, tasks: int, seed: int) -> None:
        images, labels = load_digits(return_X_y=True)
        images = (images / 16.0).astype(np.float32)
        split = train_test_split(images, labels, test_size=1 / 3, random_state=seed, stratify=labels)
        train, test, self.train_labels, self.test_labels = (torch.from_numpy(part) for part in split)
        orders = [torch.from_numpy(np.random.default_rng(1000 * seed + t).permutation(64)) for t in range(tasks)]
        self.train = [train[:, order] for order in orders]
        self.test = [test[:, order] for order in orders]

    def accuracy(self, model: nn.Module, task: int) -> float:
        with torch.no_grad():
            return float((model(self.test[task]).argmax(1) == self.test_labels).float().mean())


def learn(arm: str, stream: Stream, seed: int, strength: float, epochs: int) -> list[float]:
    """Mean accuracy over the tasks so far, after each task."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    past = Consolidation(model.parameters())
    curve = []
    for task, images in enumerate(stream.train):
        seen = stream.train[: task + 1] if arm == "joint" else [images]
        x, y = torch.cat(seen), stream.train_labels.repeat(len(seen))
        for _ in range(epochs):
            for part in torch.split(torch.randperm(len(x)), BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if arm == "ewc":
                    past.step(strength, LR)
        if arm == "ewc":
            some = images[torch.randperm(len(images))[:FISHER_IMAGES]]
            past.remember(diagonal_fisher(model, some, draw))
        accuracies = [stream.accuracy(model, t) for t in range(task + 1)]
        curve.append(sum(accuracies) / len(accuracies) if all(map(math.isfinite, accuracies)) else 0.0)
    return curve


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds, and Student's 95 % interval of it."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def picture(curves: dict[str, list[list[float]]], path: Path) -> None:
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes: Any = figure.add_subplot()
    for arm in ARMS:
        summary = [interval([c[t] for c in curves[arm]]) for t in range(len(curves[arm][0]))]
        tasks = range(1, len(summary) + 1)
        axes.plot(tasks, [m for m, _, _ in summary], color=COLOURS[arm], marker="o", ms=3, label=arm)
        axes.fill_between(
            tasks, [lo for _, lo, _ in summary], [hi for _, _, hi in summary], color=COLOURS[arm], alpha=0.2
        )
    axes.set(xlabel="tasks learned", ylabel="mean accuracy on tasks so far", ylim=(0, 1))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def choose(tasks: int, epochs: int) -> None:
    """Accuracy after all tasks by lambda, on two seeds that are not reported."""
    for strength in (10.0, 30.0, 100.0):
        ends = [learn("ewc", Stream(tasks, seed), seed, strength, epochs)[-1] for seed in (900, 901)]
        print(f"lambda {strength:g}: {sum(ends) / 2:.3f}")


def parsed() -> argparse.Namespace:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choose", action="store_true", help="print the accuracy for several lambda, and end")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    tasks, seeds, epochs = (3, 2, 5) if args.quick else (10, args.seeds, EPOCHS)
    if args.choose:
        return choose(tasks, epochs)
    curves: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    started_s = time.process_time()
    for seed in range(seeds):
        stream = Stream(tasks, seed)
        for arm in ARMS:
            curves[arm].append(learn(arm, stream, seed, STRENGTH, epochs))
    ends = {arm: interval([c[-1] for c in curves[arm]]) for arm in ARMS}
    if not args.quick:
        picture(curves, PICTURE)
    gain = interval([e[-1] - s[-1] for e, s in zip(curves["ewc"], curves["sgd"], strict=True)])
    lost = {arm: ends["joint"][0] - ends[arm][0] for arm in ("ewc", "sgd")}
    goals = [
        *(harness.Goal(f"accuracy after {tasks} tasks, {arm}", ends[arm][0]) for arm in ARMS),
        harness.Goal("EWC over SGD, paired by seed, lower end of the 95 % interval", gain[1], ">= 0"),
        harness.Goal("share of SGD's loss to joint training that EWC avoids", 1.0 - lost["ewc"] / lost["sgd"]),
    ]
    details = {
        "seeds": seeds,
        "lambda": STRENGTH,
        "cpu_s": time.process_time() - started_s,
        "intervals_95": {arm: ends[arm][1:] for arm in ARMS},
        "curves": {arm: np.mean(curves[arm], axis=0).round(4).tolist() for arm in ARMS},
    }
    harness.report("bench_digits", goals, details, args)


if __name__ == "__main__":
    main()
