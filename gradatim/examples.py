"""A judged episode -> training examples: pairs, answers to imitate, answers to avoid, answers with a hint.

What is said of a step outranks what is said of its episode: correction > preference > score > outcome. An answer whose
state (exact prompt tokens) also has an answer of the opposite worth becomes a pair. A comment on an answer that was not
a good one, and has no better one beside it, is a hint. Prompts and sampled answers are the captured tokens; only what
nobody sampled, a correction or a hint, is tokenised. Knows nothing of losses or batches.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

from gradatim.opinions import is_confirmed, newest
from gradatim.protocols import Store, Tokenizer
from gradatim.skills import UNNAMED, PromptSkills
from gradatim.types import Case, Credit, Example, Feedback, Reward, Step

PAIRED_AMONG = 64  # examples of one state, the newest, among which an answer of the opposite worth is looked for
_SAME_WEIGHT = 0.5  # a revision that moves a weight by less is not worth training on again


def state_of(prompt_ids: Sequence[int]) -> str:
    """Digest of the exact prompt tokens."""
    return hashlib.sha256(array("i", prompt_ids).tobytes()).hexdigest()[:32]


def is_withdrawn(example: Example) -> bool:
    """The newest revision of a step whose feedback was retracted: nothing is left to learn."""
    return not example.chosen_ids and not example.rejected_ids


class ExampleBuilder:
    """Stateless but for the store, where it looks up other answers to the same state and earlier revisions.

    ``skills`` names the examples of requests that name no skill themselves.
    ``hint_corrections``: examples of corrections carry them as hints too, for a loss that asks for it.
    """

    def __init__(
        self,
        store: Store,
        tokenizer: Tokenizer,
        *,
        retain_every: int = 4,
        skills: PromptSkills | None = None,
        hint_corrections: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._retain_every = retain_every
        self._skills = skills
        self._hint_corrections = hint_corrections
        self._clock = clock

    def build(self, case: Case, reward: Reward, credit: Credit) -> Sequence[Example]:
        """New and changed examples of the episode; unchanged ones are left out, lost ones are withdrawn."""
        advantage = dict(zip(credit.step_ids, credit.advantages, strict=True))
        method = dict(zip(credit.step_ids, credit.methods, strict=True))
        verified = (reward.value or 0.0) > 0.0 and any(
            f.kind == "outcome" and f.value is not None for f in case.feedback
        )
        earlier = self._earlier(case)
        out: list[Example] = []
        for step in reversed(case.episode.steps):  # what led on from a state comes before what only came back to it
            if not step.trainable or step.finish_reason == "aborted":
                continue
            share = (advantage.get(step.id, 0.0), method.get(step.id, ""))
            example = self._example(step, case, share, verified, out)
            previous = earlier.get(step.id)
            if example is None and previous is not None and not is_withdrawn(previous):
                example = replace(self._blank(step, case), origin="withdrawn")
            if example is not None and not _unchanged(previous, example):
                out.append(example)
        return [self._named(example, earlier.get(example.step_id)) for example in reversed(out)]

    def _named(self, example: Example, previous: Example | None) -> Example:
        """A revision keeps the name of the one before."""
        if self._skills is None or example.skill != UNNAMED:
            return example
        return replace(example, skill=previous.skill if previous else self._skills.name(example.prompt_ids))

    def _earlier(self, case: Case) -> dict[str, Example]:
        return {e.step_id: e for _, e in self._store.read(Example, episode_id=case.episode.id)}

    def _example(
        self, step: Step, case: Case, share: tuple[float, str], verified: bool, fresh: Sequence[Example]
    ) -> Example | None:
        advantage, method = share
        blank = replace(self._blank(step, case), verified=verified)
        correction = newest(case.feedback, "correction", step)
        if correction is not None:
            return self._corrected(blank, step, correction)
        preference = newest(case.feedback, "preference", step)
        if preference is not None:
            return self._preferred(blank, step, preference)
        if not step.completion_ids:
            return None
        weighed = replace(blank, weight=min(1.0, abs(advantage)))
        if advantage > 0.0:
            origin = "success" if method == "outcome" else "score"
            good = replace(weighed, chosen_ids=step.completion_ids, origin=origin)
            return self._retain(self._pair(good, fresh, bad=False))
        failed: Example | None = None
        if advantage < 0.0:
            bad = replace(weighed, rejected_ids=step.completion_ids, origin="failure")
            failed = self._retain(self._pair(bad, fresh, bad=True))
        if failed is None or not failed.chosen_ids:
            return self._hinted(blank, step, case) or failed
        return failed

    def _blank(self, step: Step, case: Case) -> Example:
        return Example(
            id=f"{step.id}#{case.position}",
            created_at=self._clock(),
            episode_id=step.episode_id,
            step_id=step.id,
            prompt_ids=step.prompt_ids,
            origin="",
            skill=step.skill,
            state=state_of(step.prompt_ids),
            feedback_ids=tuple(f.id for f in case.feedback if f.step_id in (None, step.id)),
            user=step.user,
            position=case.position,
            logprobs=step.drawn_logprobs or step.logprobs,
        )

    def _corrected(self, blank: Example, step: Step, feedback: Feedback) -> Example:
        """The correction is chosen over the answer; where both say the same, it is simply confirmed."""
        chosen = self._tokenizer.completion_ids(feedback.correction)
        same = is_confirmed(step, feedback)
        rejected = () if same else step.completion_ids
        hint_ids: tuple[int, ...] = ()
        if self._hint_corrections and not same:
            told = f"{feedback.comment}\nA better answer: {feedback.correction}"
            hint_ids = self._tokenizer.hinted_ids(step.prompt_ids, step.messages, told)
        return replace(blank, chosen_ids=chosen, rejected_ids=rejected, origin="correction", hint_ids=hint_ids)

    def _hinted(self, blank: Example, step: Step, case: Case) -> Example | None:
        """The answer with the newest words about it in its prompt."""
        said = [f for f in case.feedback if f.step_id == step.id and f.comment.strip()]
        if not said:
            return None
        last = max(said, key=lambda f: f.created_at)
        hint_ids = self._tokenizer.hinted_ids(step.prompt_ids, step.messages, last.comment)
        if not hint_ids:
            return None
        weight = last.confidence or 1.0
        return replace(blank, rejected_ids=step.completion_ids, hint_ids=hint_ids, origin="hint", weight=weight)

    def _preferred(self, blank: Example, step: Step, feedback: Feedback) -> Example | None:
        loser = self._store.step(id=feedback.rejected_id) if feedback.rejected_id else None
        if loser is None or loser.completion_ids == step.completion_ids:
            return None
        return replace(
            blank,
            chosen_ids=step.completion_ids,
            rejected_ids=loser.completion_ids,
            origin="preference",
            label=(1.0 + (feedback.confidence or 1.0)) / 2.0,
        )

    def _pair(self, example: Example, fresh: Sequence[Example], *, bad: bool) -> Example:
        """Complete a lone answer with the newest answer of the opposite worth to the same state, if there is one;
        ``fresh`` are those of this episode, which are not stored yet."""
        stored = [e for _, e in self._store.newest(Example, state=example.state, limit=PAIRED_AMONG)]
        for other in [*reversed(fresh), *stored]:
            if other.state != example.state or other.step_id == example.step_id:
                continue
            if bad and other.chosen_ids and other.chosen_ids != example.rejected_ids:
                return replace(example, chosen_ids=other.chosen_ids)
            if not bad and other.rejected_ids and other.rejected_ids != example.chosen_ids:
                return replace(example, rejected_ids=other.rejected_ids)
        return example

    def _retain(self, example: Example) -> Example:
        """One in ``retain_every`` states with a verified good answer is kept for the gate. By state, so that it can
        never be trained on through another episode."""
        kept = self._retain_every > 0 and int(example.state[:8], 16) % self._retain_every == 0
        return replace(example, retained=True) if kept and example.verified and example.chosen_ids else example


def _unchanged(previous: Example | None, example: Example) -> bool:
    return (
        previous is not None
        and previous.chosen_ids == example.chosen_ids
        and previous.rejected_ids == example.rejected_ids
        and previous.hint_ids == example.hint_ids
        and abs(previous.label - example.label) < _SAME_WEIGHT / 2
        and abs(previous.weight - example.weight) < _SAME_WEIGHT
    )
