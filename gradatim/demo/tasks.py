"""The five tasks of the demo: what a page is, how it is shown, what may be done on it and what is right.

A `Page` is a snapshot of numbered elements. Everything a task needs beyond its pages is here and is the same for
the real browser and for the browser-free pages: the text of an observation, the grammar of an action, the
random-valid floor and the scripted expert, who reads the answer out of the task sentence. Nothing here knows how a
page comes about, and nothing here knows a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

TASKS = ("login-user", "enter-password", "enter-text", "click-button", "login-user-popup")

MAX_STEPS = {"login-user": 5, "enter-password": 5, "enter-text": 4, "click-button": 3, "login-user-popup": 8}
"""An episode that is not over after this many actions has failed; the expert needs 3, 3, 2, 1 and at most 5."""

DIALOG = "Dialog:"

_ACTION = re.compile(r"(click)\s+(\d+)|(type)\s+(\d+)\s+(\S.*)", re.IGNORECASE)
_QUOTED = re.compile(r'"([^"]+)"')
_DISMISS = {"cancel", "close", "dismiss", "no"}


@dataclass(frozen=True, slots=True)
class Element:
    """One thing on a page that can be acted on."""

    kind: Literal["field", "button"]
    label: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """What can be seen at one moment. Elements are numbered from 1; those a dialog disables are left out."""

    sentence: str
    elements: tuple[Element, ...]
    dialog: str = ""


@dataclass(frozen=True, slots=True)
class Action:
    """A parsed action; ``text`` is empty for a click."""

    verb: Literal["click", "type"]
    number: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.number} {self.text}".rstrip()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an action led to. ``success`` is None until the episode is over."""

    observation: str
    done: bool
    success: bool | None
    valid: bool


class Env(Protocol):
    """One page that is operated by text."""

    @property
    def task(self) -> str: ...
    def reset(self, seed: int) -> str: ...
    def step(self, action_text: str) -> StepResult: ...
    def valid_actions(self) -> list[str]: ...
    def expert_action(self) -> str: ...
    def right_actions(self) -> list[str]: ...
    def close(self) -> None: ...


def parse(action_text: str) -> Action | None:
    """Reads ``click N`` or ``type N TEXT``; None when the text is neither."""
    match = _ACTION.fullmatch(action_text.strip())
    if match is None:
        return None
    if match[1]:
        return Action("click", int(match[2]))
    text = match[5].strip()
    if len(text) > 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return Action("type", int(match[4]), text)


def normalise(action_text: str) -> str:
    """The canonical spelling of an action, for comparison; text that is no action is only stripped."""
    action = parse(action_text)
    return str(action) if action else action_text.strip()


def target(page: Page, action: Action) -> Element | None:
    """The element that an action is about, or None when the action is not possible on this page."""
    if not 1 <= action.number <= len(page.elements):
        return None
    element = page.elements[action.number - 1]
    return None if action.verb == "type" and element.kind == "button" else element


def render(page: Page, history: Sequence[str]) -> str:
    """The observation: the task, the page with its elements numbered, and what was done so far."""
    lines = [f"Task: {page.sentence}", "Page:"]
    if page.dialog:
        lines.append(f"{DIALOG} {page.dialog}")
    for number, element in enumerate(page.elements, 1):
        value = f" = {element.value}" if element.value else ""
        lines.append(f"{number} {element.kind} {element.label}".rstrip() + value)
    lines.append(f"Done so far: {'; '.join(history) if history else 'nothing'}")
    lines.append("Next action?")
    return "\n".join(lines)


def valid_actions(page: Page) -> list[str]:
    """Every click on a button, and every quoted word of the task typed into every field."""
    words = list(dict.fromkeys(_QUOTED.findall(page.sentence)))
    actions = []
    for number, element in enumerate(page.elements, 1):
        if element.kind == "button":
            actions.append(f"click {number}")
        else:
            actions.extend(f"type {number} {word}" for word in words)
    return actions


def right_actions(page: Page) -> list[str]:
    """All actions that bring the task on, the one an expert takes first. Order of filling in does not matter."""
    if page.dialog:
        return [
            f"click {n}" for n, e in enumerate(page.elements, 1) if e.kind == "button" and e.label.lower() in _DISMISS
        ]
    words = _QUOTED.findall(page.sentence)
    if page.sentence.startswith("Click"):
        return [f"click {n}" for n, e in enumerate(page.elements, 1) if e.kind == "button" and e.label == words[0]]
    fields = [(n, e) for n, e in enumerate(page.elements, 1) if e.kind == "field"]
    wanted = words if len(words) == len(fields) else words[:1] * len(fields)
    missing = [f"type {n} {word}" for (n, e), word in zip(fields, wanted, strict=True) if e.value != word]
    buttons = [f"click {n}" for n, e in enumerate(page.elements, 1) if e.kind == "button"]
    return missing or buttons


@dataclass(frozen=True, slots=True)
class Effect:
    """What a page source reports after an action: the page now, whether anything happened, and the verdict."""

    page: Page
    acted: bool
    success: bool | None = None


class PageSource(Protocol):
    """Where pages come from: a browser, or code that plays one. It judges success and nothing else."""

    def load(self, task: str, seed: int) -> Page: ...
    def perform(self, action: Action) -> Effect: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class PageEnv:
    """An `Env` over any `PageSource`: keeps the history, refuses what is impossible, counts the steps."""

    task: str
    source: PageSource
    max_steps: int | None = None
    page: Page = field(init=False, default=Page("", ()))
    _history: list[str] = field(init=False, default_factory=list)
    _steps: int = field(init=False, default=0)
    _success: bool | None = field(init=False, default=None)

    def reset(self, seed: int) -> str:
        self.page = self.source.load(self.task, seed)
        self._history, self._steps, self._success = [], 0, None
        return render(self.page, self._history)

    def step(self, action_text: str) -> StepResult:
        if self._success is not None:
            raise RuntimeError("the episode is over: call reset before the next step")
        action = parse(action_text)
        element = target(self.page, action) if action else None
        self._steps += 1
        if action and element:
            effect = self.source.perform(action)
            self.page, self._success = effect.page, effect.success
            if effect.acted:
                self._history.append(str(action) if action.verb == "type" else f"click {element.label}".rstrip())
        if self._success is None and self._steps >= (self.max_steps or MAX_STEPS[self.task]):
            self._success = False
        return StepResult(
            observation=render(self.page, self._history),
            done=self._success is not None,
            success=self._success,
            valid=element is not None,
        )

    def valid_actions(self) -> list[str]:
        return valid_actions(self.page)

    def right_actions(self) -> list[str]:
        return right_actions(self.page)

    def expert_action(self) -> str:
        return self.right_actions()[0]

    def close(self) -> None:
        self.source.close()


@dataclass(frozen=True, slots=True)
class Splits:
    """Seeds of one task, disjoint by rendered first observation, and how many distinct ones were met."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    seeds_tried: int
    distinct_prompts: int


def split(env: Env, *, held_out: int, train: int, first_seed: int = 0, max_seeds: int = 4000) -> Splits:
    """Draws seeds one by one and keeps a seed only if its first observation was never seen before.

    Held-out and training seeds alternate, so both come from the same distribution; no prompt is in both.
    """
    seen: set[str] = set()
    chosen: tuple[list[int], list[int]] = ([], [])
    sizes = (held_out, train)
    turn = 0
    tried = 0
    for seed in _seeds(first_seed, max_seeds):
        if all(len(seeds) >= size for seeds, size in zip(chosen, sizes, strict=True)):
            break
        tried += 1
        observation = env.reset(seed)
        if observation in seen:
            continue
        seen.add(observation)
        if len(chosen[turn]) >= sizes[turn]:
            turn = 1 - turn
        chosen[turn].append(seed)
        turn = 1 - turn
    if len(chosen[0]) < held_out or len(chosen[1]) < train:
        raise ValueError(
            f"{env.task}: {len(seen)} distinct first pages in {tried} seeds, {held_out + train} are needed"
        )
    return Splits(tuple(chosen[1]), tuple(chosen[0]), tried, len(seen))


def _seeds(first: int, count: int) -> Iterator[int]:
    yield from range(first, first + count)


EnvFactory = Callable[[str], Env]
