"""A judged episode -> what to remember of it: for each answer, its tokens and what was said of them.

Only tokens that the model drew or that somebody gave as the better answer are remembered. An abstention and an unknown
outcome leave what was said of single steps, a step that may not be trained on leaves nothing. What is said of a step
outranks what is said of its episode, as in learning. Knows nothing of keys and storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gradatim.opinions import is_confirmed, newest
from gradatim.protocols import Tokenizer
from gradatim.scopes import scope_of
from gradatim.types import Case, Credit, Feedback, MemoryEntry, Reward, Step, StepId

LEAST_VALUE = 0.02  # a judgement that says less is not worth a row


def entries_of(
    case: Case,
    reward: Reward,
    credit: Credit,
    *,
    tenant: Callable[[Step], str],
    tokenizer: Tokenizer,
    answer: Callable[[StepId], Step | None],
) -> list[MemoryEntry]:
    """``tenant`` says whose memory a step belongs to, ``answer`` finds the one that a preference spoke against."""
    shares = dict(zip(credit.step_ids, credit.advantages, strict=True))
    out: list[MemoryEntry] = []
    for step in case.episode.steps:
        if not step.trainable or step.finish_reason == "aborted":
            continue
        about = [f for f in case.feedback if f.step_id in (None, step.id)]
        sources = tuple(sorted({f.source for f in about}))
        for tokens, logprobs, value in _said(
            step, about, shares.get(step.id, 0.0) * reward.confidence, tokenizer, answer
        ):
            if not tokens or abs(value) < LEAST_VALUE:
                continue
            out.append(
                MemoryEntry(
                    id=f"{step.id}{'+' if value > 0.0 else '-'}",
                    tenant=tenant(step),
                    user=step.user,
                    episode_id=step.episode_id,
                    step_id=step.id,
                    created_at=step.created_at,
                    tokens=tokens,
                    logprobs=logprobs,
                    value=max(-1.0, min(1.0, value)),
                    sources=sources,
                    position=case.position,
                    scope=scope_of(step.messages) if step.scope is None else step.scope,
                )
            )
    return out


Said = tuple[tuple[int, ...], tuple[float, ...], float]


def _said(
    step: Step,
    about: Sequence[Feedback],
    share: float,
    tokenizer: Tokenizer,
    answer: Callable[[StepId], Step | None],
) -> Iterator[Said]:
    """(tokens, the model's own log-probabilities of them, value)."""
    own: Said = (step.completion_ids, step.logprobs, 1.0)
    correction = newest(about, "correction", step)
    if correction is not None:
        sure = correction.confidence or 1.0
        yield tokenizer.completion_ids(correction.correction), (), sure
        if not is_confirmed(step, correction):
            yield *own[:2], -sure
        return
    preference = newest(about, "preference", step)
    if preference is not None:
        sure = preference.confidence or 1.0
        yield *own[:2], sure
        loser = answer(preference.rejected_id) if preference.rejected_id else None
        if loser is not None and loser.completion_ids != step.completion_ids:
            yield loser.completion_ids, loser.logprobs, -sure
        return
    yield *own[:2], share
