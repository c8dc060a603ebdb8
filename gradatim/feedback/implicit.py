"""What the course of an episode says by itself: weak signs, each of one step, read off by rules in English.

    reask       the user says the same again
    correcting  the user's next words begin as a correction does
    thanks      the user's next words are thanks
    tool_error  the tool that the answer called reports an error
    recovery    the first answer after tool errors that no longer leads to one
    edited      the client goes on from another wording of the answer than was given
    retry       the very same request was sent once more
    abandoned   the answer never arrived: the client left while it was made

All are right more often than not, and no more; each has a small weight, and all of an episode together are no reward by
themselves. Where credit goes by any score of a step, they would still outweigh the episode's outcome for that step, so
they are off unless the configuration names them.
Knows nothing of tokens. What a client alone can see (a click, an edit kept, a task completed) it sends as feedback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import pairwise

from gradatim.feedback.critics import opinion, question, text_of
from gradatim.types import Episode, Feedback, Message, Step

CONFIDENCE = 0.2  # of each,
MOST_CONFIDENCE = 0.8  # and of all of one episode together: they never weigh as much as one opinion that is sure
_SAME = 0.85  # share of equal characters from which on the user says the same again
_CORRECTING = re.compile(
    r"\s*(?:no\b[,.! ]|nope\b|wrong\b|not (?:that|what)|that(?:'s| is)(?: not|n't) |incorrect\b"
    r"|i (?:said|meant|asked)\b|you (?:forgot|missed|misunderstood)|try again\b"
    r"|that (?:didn't|did not|doesn't|does not) work)",
    re.IGNORECASE,
)
_THANKS = re.compile(
    r"\s*(?:(?:great|perfect|ok(?:ay)?|good|nice)[,.! ]+)?(?:thanks|thank you|thx|perfect|exactly"
    r"|that(?:'s| is) (?:it|right)|(?:it|that) (?:works|worked)|great|well done)\b",
    re.IGNORECASE,
)
_BUT = re.compile(r"\b(?:but|however|except|still|though)\b", re.IGNORECASE)
_TOOL_ERROR = re.compile(
    r"^\s*(?:error\b|exception\b|traceback \(most recent call last\)|fatal\b|failed\b|\{\s*\"error\"\s*:\s*[^n\s])|"
    r"\b(?:exit(?:ed)? (?:code|status)|returncode)[: =]+[1-9]",
    re.IGNORECASE,
)

Signals = Iterator[tuple[Step, float]]


def implicit(episode: Episode, names: Sequence[str]) -> list[Feedback]:
    """The named signals of an episode, each about one step, with the source ``implicit:NAME``."""
    found = [(name, step, value) for name in names for step, value in SIGNALS[name](episode)]
    confidence = min(CONFIDENCE, MOST_CONFIDENCE / max(1, len(found)))
    return [opinion(step, value, confidence=confidence, source=f"implicit:{name}") for name, step, value in found]


def _turns(episode: Episode) -> Iterator[tuple[Step, Sequence[Message]]]:
    """Each answer with what came after it: the messages that the next request has beyond this one and its answer."""
    return ((step, after.messages[len(step.messages) + 1 :]) for step, after in _continued(episode))


def _continued(episode: Episode) -> Iterator[tuple[Step, Step]]:
    """Each answer whose next request goes on from it: the same messages, an answer, and more."""
    for step, after in pairwise(s for s in episode.steps if s.trainable):
        known = len(step.messages)
        if known and len(after.messages) > known + 1 and tuple(after.messages[:known]) == tuple(step.messages):
            yield step, after


def _said(messages: Sequence[Message]) -> str:
    return next((text_of(m) for m in messages if m.get("role") == "user"), "")


def reask(episode: Episode) -> Signals:
    for step, after in _turns(episode):
        before, again = question(step).lower().split(), _said(after).lower().split()
        if len(again) >= 3 and SequenceMatcher(None, before, again, autojunk=False).ratio() >= _SAME:
            yield step, -0.5


def correcting(episode: Episode) -> Signals:
    return ((step, -0.5) for step, after in _turns(episode) if _CORRECTING.match(_said(after)))


def thanks(episode: Episode) -> Signals:
    for step, after in _turns(episode):
        said = _said(after)
        if _THANKS.match(said) and not _BUT.search(said):
            yield step, 0.5


def _tools(messages: Sequence[Message]) -> list[bool]:
    """For each tool's answer, whether it is an error."""
    return [bool(_TOOL_ERROR.search(text_of(m)[:2000])) for m in messages if m.get("role") == "tool"]


def tool_error(episode: Episode) -> Signals:
    return ((step, -0.3) for step, after in _turns(episode) if any(_tools(after)))


def recovery(episode: Episode) -> Signals:
    failing = False
    for step, after in _turns(episode):
        results = _tools(after)
        if failing and results and not any(results):
            yield step, 0.3
        failing = any(results) if results else failing


def edited(episode: Episode) -> Signals:
    """Most of it is kept; a client that only cuts an answer short, or strips it, has not edited it."""
    for step, after in _continued(episode):
        kept = text_of(after.messages[len(step.messages)]).split()
        given = step.text.split()
        whole = "".join(given).find("".join(kept)) >= 0
        if not whole and SequenceMatcher(None, given, kept, autojunk=False).ratio() >= 0.5:
            yield step, -0.3


def retry(episode: Episode) -> Signals:
    """Choices of one request (ID, ID:1, ...) are no retries of each other."""
    steps = [s for s in episode.steps if s.trainable and s.messages]
    for step, after in pairwise(steps):
        if step.messages == after.messages and step.id.partition(":")[0] != after.id.partition(":")[0]:
            yield step, -0.3


def abandoned(episode: Episode) -> Signals:
    return ((step, -0.3) for step in episode.steps if step.trainable and step.finish_reason == "aborted")


SIGNALS: Mapping[str, Callable[[Episode], Signals]] = {
    f.__name__: f for f in (reask, correcting, thanks, tool_error, recovery, edited, retry, abandoned)
}
