"""Prompts of one task share a skill where clients name none; tasks do not share one."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from gradatim.config import RewardConfig
from gradatim.credit import OutcomeCredit
from gradatim.demo.agent import messages
from gradatim.demo.browser_free import browser_free_env
from gradatim.demo.tasks import TASKS
from gradatim.examples import ExampleBuilder
from gradatim.reward import WeightedReward
from gradatim.skills import PromptSkills, last_message
from gradatim.testing.fakes import FakeStore
from gradatim.types import Case, Episode, EpisodeId, Example, Message, StepId

from . import records

END = 2


def prompt(observation: str) -> tuple[int, ...]:
    """The demo agent's messages in a chat template of the usual kind; a token is a word or a sign."""
    ids: list[int] = []
    for message in [*messages(observation), {"role": "assistant", "content": ""}]:
        words = re.findall(r"\w+|[^\w ]", f"<{message['role']}>\n{message.get('content')}")
        ids += [*(3 + int.from_bytes(hashlib.sha256(w.encode()).digest()[:3], "big") for w in words), END]
    return tuple(ids[:-1])


def demo_prompts(episodes: int, seed: int) -> list[tuple[str, tuple[int, ...]]]:
    """(task, prompt) of every step of the scripted expert on all five tasks, in mixed order."""
    out = []
    for task in TASKS:
        env = browser_free_env(task)
        for k in range(episodes):
            observation, done = env.reset(k), False
            while not done:
                out.append((task, prompt(observation)))
                result = env.step(env.expert_action())
                observation, done = result.observation, result.done
    random.Random(seed).shuffle(out)
    return out


def purity(pairs: Sequence[tuple[str, str]]) -> float:
    """The share of prompts whose task is the commonest of their cluster."""
    clusters: dict[str, Counter[str]] = defaultdict(Counter)
    for task, name in pairs:
        clusters[name][task] += 1
    return sum(max(found.values()) for found in clusters.values()) / len(pairs)


def stored(store: FakeStore, skills: PromptSkills, prompts: Sequence[tuple[int, ...]]) -> list[str]:
    names = []
    for prompt_ids in prompts:
        names.append(skills.name(prompt_ids))
        store.append(records.example(f"x{store.append()}", prompt_ids=prompt_ids, skill=names[-1]))
    return names


def test_the_demos_tasks_are_told_apart_without_being_named() -> None:
    """The two login pages have the same sentence and differ by the word on a button, until a dialog opens."""
    for seed in range(3):
        store = FakeStore()
        found = demo_prompts(episodes=12, seed=seed)
        names = stored(store, PromptSkills(store, END), [p for _, p in found])
        pages = [(task.removesuffix("-popup"), name) for (task, _), name in zip(found, names, strict=True)]
        assert purity(pages) >= 0.99
        assert purity([(task, name) for (task, _), name in zip(found, names, strict=True)]) >= 0.75
        assert 4 <= len(set(names)) <= 12


def test_a_restart_gives_the_same_names() -> None:
    store = FakeStore()
    found = [p for _, p in demo_prompts(episodes=6, seed=0)]
    skills = PromptSkills(store, END)
    half = len(found) // 2
    stored(store, skills, found[:half])
    restarted = PromptSkills(store, END)
    assert [restarted.name(p) for p in found[:half]] == [skills.name(p) for p in found[:half]]
    assert [restarted.name(p) for p in found[half:]] == [skills.name(p) for p in found[half:]]


def test_the_number_of_names_is_bounded() -> None:
    skills = PromptSkills(FakeStore(), END, most=4)
    rng = random.Random(0)
    assert len({skills.name([rng.randrange(10**6) for _ in range(50)]) for _ in range(100)}) == 4


def test_only_the_last_message_counts() -> None:
    start, end = [90, 91], [END, 90, 92]
    assert last_message([*start, 5, 6, END, 90, 93, 7, 8, 9, *end], END) == [90, 93, 7, 8, 9]
    assert last_message([7, 8, 9, *end], END) == [7, 8, 9]
    assert last_message([5, END, *range(100, 140)], END) == list(range(100, 140))  # no end of turn after a question
    assert last_message([5, 6], END) == [5, 6]
    assert last_message([], END) == []
    skills = PromptSkills(FakeStore(), END)
    system = list(range(1000, 1600))
    assert skills.name([*system, END, *range(30, 60), *end]) != skills.name([*system, END, *range(60, 90), *end])
    assert skills.name([*system, END, *range(30, 60), *end]) == skills.name([*range(30, 60), *end])


class Words:
    def completion_ids(self, text: str) -> tuple[int, ...]:
        return (*(3 + len(word) for word in text.split()), END)

    def hinted_ids(self, prompt_ids: Sequence[int], messages: Sequence[Message], hint: str) -> tuple[int, ...]:
        return ()


def test_examples_of_unnamed_skills_are_named_and_keep_their_name() -> None:
    store = FakeStore()
    builder = ExampleBuilder(store, Words(), skills=PromptSkills(store, END))
    reward_model, credit = WeightedReward(RewardConfig()), OutcomeCredit(RewardConfig())

    def judged(position: int, *steps: tuple[str, tuple[int, ...], str], value: float = 1.0) -> Sequence[Example]:
        taken = [
            records.step(i, prompt_ids=ids, skill=skill, completion_ids=(position, k))
            for k, (i, ids, skill) in enumerate(steps)
        ]
        opinion = records.feedback("outcome", value=value, source="critic:tests")
        case = Case(
            position=position,
            episode=Episode(id=EpisodeId("e"), steps=tuple(replace(s, episode_id=EpisodeId("e")) for s in taken)),
            feedback=(opinion,),
            touched_at=1.0,
        )
        reward = reward_model.score(case)
        examples = builder.build(case, reward, credit.assign(case, reward))
        store.append(*examples)
        return examples

    one, other = tuple(range(20, 60)), tuple(range(60, 99))
    made = judged(1, ("a", one, "default"), ("b", other, "default"), ("c", one, "named"))
    assert [e.skill for e in made] == ["auto:1", "auto:2", "named"]
    assert PromptSkills(store, END).name(other) == "auto:2"
    revised = judged(2, ("a", one, "default"), ("b", other, "default"), value=-1.0)
    assert {e.step_id: e.skill for e in revised} == {StepId("a"): "auto:1", StepId("b"): "auto:2"}
