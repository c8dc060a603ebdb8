"""One more source: what the served model's own states say of an answer, learned from audited labels.

An ensemble of small logistic heads on the states' main directions. Each head is fitted to a bag of the labels that are
not held out, drawn by a digest of the episode's id (Poisson(1), as in online bagging, Oza and Russell 2001), and votes
only on episodes that are not in its bag, labelled or not: nobody's label has a part in the vote on his episode, and a
vote does not change when the label comes. Where the heads disagree, or there are few labels, it says nothing. How far
it is believed is learned as of any other source. Knows no model: a vector comes from an ``Encoder``.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gradatim.protocols import Encoder, Shelf
from gradatim.reward.calibrate import is_held_out
from gradatim.reward.evidence import Judged, Opinion
from gradatim.stats import logistic
from gradatim.types import Case, EpisodeId, Sketch, Step, StepId

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]
Halves = npt.NDArray[np.float16]

SOURCE, FAMILY = "model:hidden", "model"
HEADS = 24  # of which a third or so vote on an episode
WINDOW = 1000  # labels, the newest, that heads are fitted to
FEWEST = 40  # of them, and
FEWEST_OF_A_KIND = 10  # good ones, and bad ones; with fewer it says nothing
DIRECTIONS = 32  # of the states that heads look at
_MIXED = 256  # random directions, of which those are the main ones: bounds the cost for wide models
_RIDGE = 4.0
_AGREED = 1.0  # standard deviations of the heads by which their mean must differ from a toss
_LARGEST = 65504.0  # of float16
_PAGE = 200


def bag(episode_id: EpisodeId) -> npt.NDArray[np.int64]:
    """(HEADS,) how often each head sees an episode: Poisson(1), always the same."""
    digest = hashlib.sha256(f"heads {episode_id}".encode("utf-8", "surrogatepass")).digest()
    seed = int.from_bytes(digest[:8], "little")
    return np.random.default_rng(seed).poisson(1.0, HEADS).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Heads:
    """``directions`` (D, K) are of standardised states; ``coefficients`` (HEADS, 1 + K)."""

    mean: Floats
    spread: Floats
    directions: Floats
    coefficients: Floats

    def say(self, vectors: Floats, seen: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """((N,) P(good), (N,) how many standard deviations the heads' mean log-odds are from 0) of (N, D) states,
        by the heads that have not ``seen`` (N, HEADS) them. (0.5, 0) where fewer than two are left."""
        z = (self._project(vectors) @ self.coefficients.T).astype(np.float64)  # (N, HEADS)
        votes = seen == 0
        n = votes.sum(axis=1)
        mean = np.where(votes, z, 0.0).sum(axis=1) / np.maximum(n, 1)
        variance = (np.where(votes, z - mean[:, None], 0.0) ** 2).sum(axis=1) / np.maximum(n - 1, 1)
        moderated = mean / np.sqrt(1.0 + np.pi * variance / 8.0)  # MacKay 1992, The evidence framework, eq. 29
        enough = n >= 2
        agreed = np.abs(mean) / np.sqrt(np.maximum(variance, 1e-12))
        return np.where(enough, logistic.sigmoid(moderated), 0.5), np.where(enough, agreed, 0.0)

    def _project(self, vectors: Floats) -> Floats:
        x: Floats = np.clip((vectors - self.mean) / self.spread, -8.0, 8.0) @ self.directions
        out: Floats = np.concatenate([np.ones((len(x), 1)), x], axis=1)
        return out


def fit(vectors: Floats, labels: Floats, seen: npt.NDArray[np.int64], others: Floats) -> Heads:
    """From (N, D) states with (N,) labels in {0, 1} and their bags (N, HEADS); ``others`` (M, D) have no label and
    help to find the directions."""
    everything = np.concatenate([vectors, others])
    mean, spread = everything.mean(axis=0), everything.std(axis=0)
    spread = np.where(spread > 1e-6, spread, 1.0)
    wide = np.clip((everything - mean) / spread, -8.0, 8.0)
    mixed = _mixing(wide.shape[1])
    wide = wide @ mixed  # (N + M, R)
    values, main = np.linalg.eigh(wide.T @ wide / len(wide))  # rising
    k = min(DIRECTIONS, len(vectors) // 4, wide.shape[1])
    main, scale = main[:, ::-1][:, :k], np.sqrt(np.maximum(values[::-1][:k], 1e-9))
    plain = Heads(mean, spread, mixed @ (main / scale), np.zeros((HEADS, 1 + k)))
    x = plain._project(vectors)
    centre, strength = np.zeros(1 + k), np.full(1 + k, _RIDGE)
    strength[0] = 0.1
    fitted = [
        logistic.fit(np.repeat(x, times, axis=0), np.repeat(labels, times), centre=centre, strength=strength)
        for times in seen.T
    ]
    return replace(plain, coefficients=np.stack(fitted))


def _mixing(d: int) -> Floats:
    """(D, R) of orthogonal columns in expectation; none where the states are narrow enough."""
    mixed: Floats = np.random.default_rng(0).normal(size=(d, _MIXED)) / np.sqrt(_MIXED)
    return mixed if d > _MIXED else np.eye(d)


class Hidden:
    """Sketches of judged episodes, and the heads fitted to them. ``encoder`` None: who only reads makes no sketches."""

    def __init__(self, shelf: Shelf, encoder: Encoder | None) -> None:
        self._shelf, self._encoder = shelf, encoder
        self._sketches: dict[EpisodeId, list[tuple[int, Halves]]] = {}  # rising positions
        self._made: set[StepId] = set()  # of which a sketch was made, or refused
        self._steps: dict[EpisodeId, set[StepId]] = {}  # of which one was made
        self._heads: Heads | None = None
        self._is_read = False
        self.refused = 0  # vectors that were none, in this life of the process

    def note(self, case: Case) -> None:
        """Make the sketch of an episode's last answer, where there is none: one pass of the model."""
        step = next((s for s in reversed(case.episode.steps) if s.completion_ids), None)
        if step is None:
            return
        self._read()
        if self._encoder is None:
            return self._look_up(step)
        if step.id in self._made:
            return
        self._made.add(step.id)
        if (vector := self._encoded(step)) is None:
            return
        sketch = Sketch(
            step_id=step.id,
            space=self._encoder.space,
            episode_id=step.episode_id,
            vector=vector.astype("<f2").tobytes(),
            position=case.position,
        )
        self._shelf.change(put=[sketch])
        self._take(sketch)

    def _look_up(self, step: Step) -> None:
        """For a reader: what the process that judges made meanwhile."""
        if step.id not in self._made:
            for sketch in self._shelf.load(Sketch, step_id=step.id):
                self._take(sketch)

    def _encoded(self, step: Step) -> npt.NDArray[np.float32] | None:
        vector = self._encoder.encode(step) if self._encoder else None
        if vector is None:
            return None
        if not np.isfinite(vector).all() or np.abs(vector).max() > _LARGEST:
            self.refused += 1
            log.warning("the states over answer %s are no vector of numbers: it has no sketch", step.id)
            return None
        return vector

    def _read(self, anew: bool = False) -> None:
        """What is on the shelf: of the encoder's space, or, for a reader, of the newest one."""
        if self._is_read and not anew:
            return
        found = self._shelf.load(Sketch)
        newest = max(found, key=lambda s: s.position, default=None)
        space = self._encoder.space if self._encoder else newest.space if newest else ""
        self._sketches.clear()
        self._made.clear()
        self._steps.clear()
        for sketch in sorted(found, key=lambda s: (s.position, s.step_id)):
            if sketch.space == space:
                self._take(sketch)
        self._is_read = True

    def _take(self, sketch: Sketch) -> None:
        self._made.add(sketch.step_id)
        self._steps.setdefault(sketch.episode_id, set()).add(sketch.step_id)
        vector = np.frombuffer(sketch.vector, dtype="<f2")
        self._sketches.setdefault(sketch.episode_id, []).append((sketch.position, vector))

    def fit(self, rows: Sequence[Judged], upto: int) -> None:
        """To the newest labels of ``rows``, newest first, and to sketches made up to a position: always the same."""
        self._read(anew=self._encoder is None)
        labelled = [(r, v) for r in rows if _is_taught(r) and (v := self._vector(r.episode_id, upto)) is not None]
        labelled = labelled[:WINDOW]
        good = sum(r.label or 0 for r, _ in labelled)
        self._heads = None
        if len(labelled) < FEWEST or min(good, len(labelled) - good) < FEWEST_OF_A_KIND:
            return
        untaught = (self._vector(r.episode_id, upto) for r in rows if not _is_taught(r))
        others = [v for v in untaught if v is not None][:WINDOW]
        vectors = np.stack([v for _, v in labelled]).astype(np.float64)
        labels = np.array([float(r.label or 0) for r, _ in labelled])
        seen = np.stack([bag(r.episode_id) for r, _ in labelled])
        self._heads = fit(vectors, labels, seen, np.array(others, dtype=np.float64).reshape(-1, vectors.shape[1]))

    def prune(self, rows: Sequence[Judged], upto: int) -> None:
        """Give up sketches made up to a position of episodes that are not among the rows any more. Should one of those
        be judged again, its sketch is made again."""
        if self._encoder is None:
            return
        self._read()
        known = {row.episode_id for row in rows}
        gone = [i for i, made in self._sketches.items() if i not in known and made[-1][0] <= upto]
        for start in range(0, len(gone), _PAGE):
            page = gone[start : start + _PAGE]
            self._shelf.change(drop=[(Sketch, {"episode_id": i}) for i in page])
        for episode_id in gone:
            del self._sketches[episode_id]
            self._made -= self._steps.pop(episode_id, set())

    def _vector(self, episode_id: EpisodeId, upto: int | None = None) -> Halves | None:
        made = [v for at, v in self._sketches.get(episode_id, ()) if upto is None or at <= upto]
        return made[-1] if made else None

    def heard(self, rows: Sequence[Judged], upto: int | None = None) -> list[Judged]:
        """The same rows with its opinion among the others', where it has one. ``upto``: as in ``fit``."""
        out = list(rows)
        if self._heads is None:
            return out
        found = [(i, v) for i, r in enumerate(rows) if (v := self._vector(r.episode_id, upto)) is not None]
        if not found:
            return out
        vectors = np.stack([v for _, v in found]).astype(np.float64)
        seen = np.stack([bag(rows[i].episode_id) for i, _ in found])
        good, agreed = self._heads.say(vectors, seen)
        for (i, _), p, sure in zip(found, good.tolist(), agreed.tolist(), strict=True):
            if sure >= _AGREED:
                said = Opinion(SOURCE, FAMILY, 2.0 * p - 1.0, 1.0)
                out[i] = replace(rows[i], opinions=tuple(sorted((*rows[i].opinions, said), key=lambda o: o.rater)))
        return out

    @property
    def speaks(self) -> bool:
        return self._heads is not None


def _is_taught(row: Judged) -> bool:
    """Held-out labels teach it nothing: the risk is measured on them."""
    return row.label is not None and not is_held_out(row.episode_id)
