"""What was seen to change, in plain words. Knows what the measures mean, and decides nothing."""

from __future__ import annotations

import time

from gradatim.release.cause import Comparison
from gradatim.release.series import Shift
from gradatim.release.sketch import length_of
from gradatim.release.units import CLASSES

ANSWERS, PROMPTS, ABSTENTIONS = "answers", "prompts", "abstentions"
TAKEN_BACK = "an earlier adapter came back before it could be told why rewards fell"
_BESIDE = "set release.holdback or release.base_share to have some answer beside it"


def rewards_of(name: str) -> str:
    return f"rewards by {name}"


def source_of(family: str) -> int | None:
    """The index among ``CLASSES``; None where it is no family of rewards."""
    return next((i for i, name in enumerate(CLASSES) if rewards_of(name) == family), None)


def subject(family: str, skill: str, since: float) -> str:
    return f"{_named(family, skill)} fell on {_when(since)}: "


def changed(shift: Shift) -> str:
    when = f"on or after {_when(shift.since)}"
    if shift.family == PROMPTS:
        return f"{_named('prompts', shift.skill)} are of another kind {when}"
    direction = "rose" if shift.rose else "fell"
    if shift.family == ANSWERS:
        lengths = f"from about {length_of(shift.before)} to {length_of(shift.after)} tokens"
        return f"{_named('the length of answers', shift.skill)} {direction} {lengths} {when}"
    name = _named("the share of abstentions" if shift.family == ABSTENTIONS else shift.family, shift.skill)
    return f"{name} {direction} from about {shift.before:.2f} to {shift.after:.2f} {when}"


def fell(shift: Shift) -> str:
    return f"{changed(shift)}; whether it is the live adapter or the world is being looked into"


def cause(found: Comparison) -> str:
    """Of a fall of rewards."""
    beside = "; ".join(
        f"{a} from {was:.2f} to {now.value:.2f} ({now.n} rated)" for a, (was, now) in found.controls.items()
    )
    lost = f"the live adapter's from {found.before.value:.2f} to {found.after.value:.2f}"
    if found.is_the_world:
        return f"the world changed, not the adapter: {lost}, and so did others' beside it: {beside}"
    if found.is_the_adapter:
        return f"the live adapter is at fault: {lost}, and others' beside it held: {beside}"
    if not found.controls:
        return f"it cannot be told whether it is the world or the live adapter: nobody answered beside it; {_BESIDE}"
    return f"it could not be told whether it is the world or the live adapter: {lost}; beside it {beside}"


def _named(what: str, skill: str) -> str:
    return f"{what} of the skill {skill}" if skill else what


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
