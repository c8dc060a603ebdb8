"""The agent, written as any user's would be: the plain `openai` client, one call per action, a fixed prompt.

The prompt is short instructions and a few one-step examples of other pages, the same for every task, so that a
server may cache it. It is published here, with the temperature at each use, because frozen rates move by a factor of
two or three with the prompt. The agent knows nothing of adapters or learning; it keeps the ids that feedback needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import httpx
import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from gradatim.demo.operator import Operator
from gradatim.demo.tasks import DIALOG, Env, StepResult
from gradatim.demo.wire import SESSION_HEADER, SIDE, TURN_HEADER, FeedbackSink, Served, Traffic, served

MAX_TOKENS = 16
STOP = "\n"
REASKS = 4  # times it asks for an answer that did not fail on this very page

SYSTEM = "You operate a web page. Answer with one action: click N, or type N TEXT."

EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        'Task: Search for "blue lamp" and press Go.\nPage:\n1 field Search\n2 button Go\nDone so far: nothing\n'
        "Next action?",
        "type 1 blue lamp",
    ),
    (
        'Task: Search for "Rome" and press Go.\nPage:\n1 field Search = Rome\n2 button Go\nDone so far: type 1 Rome\n'
        "Next action?",
        "click 2",
    ),
    (
        'Task: Press the "More" button.\nPage:\n1 field\n2 button More\n3 button Less\nDone so far: nothing\n'
        "Next action?",
        "click 2",
    ),
    (
        'Task: Write "Maria" in the box and press Send.\nPage:\n1 field\n2 button Send\nDone so far: nothing\n'
        "Next action?",
        "type 1 Maria",
    ),
    (
        'Task: Write "Tom" in the box and press Send.\nPage:\n1 field = Tom\n2 button Send\nDone so far: type 1 Tom\n'
        "Next action?",
        "click 2",
    ),
)


def messages(observation: str, examples: Sequence[tuple[str, str]] = EXAMPLES) -> list[ChatCompletionMessageParam]:
    """The prompt for one action: instructions, examples as earlier turns, and the page as it is now."""
    prompt: list[ChatCompletionMessageParam] = [{"role": "system", "content": SYSTEM}]
    for page, action in examples:
        prompt.append({"role": "user", "content": page})
        prompt.append({"role": "assistant", "content": action})
    prompt.append({"role": "user", "content": observation})
    return prompt


PromptBuilder = Callable[[str], list[ChatCompletionMessageParam]]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One call: what was shown, what came back, what was carried out."""

    observation: str
    answer: str
    executed: str
    valid: bool
    response_id: str
    adapter: str
    latency_s: float

    @property
    def corrected(self) -> bool:
        return self.executed != self.answer


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """One attempt at a task. ``success`` is None when a request failed, which says nothing about the agent."""

    task: str
    seed: int
    success: bool | None
    steps: tuple[StepRecord, ...]
    episode_id: str
    failed_request: str = ""

    @property
    def corrections(self) -> int:
        return sum(step.corrected for step in self.steps)

    @property
    def last_move(self) -> set[tuple[str, str]]:
        """What it saw and answered last, if anything."""
        return {(step.observation, step.answer) for step in self.steps[-1:]}

    @property
    def met_dialog(self) -> bool:
        return any(DIALOG in step.observation for step in self.steps)


@dataclass(frozen=True, slots=True)
class Caller:
    """Asks a model for one action. ``side`` marks calls that must not be learned from, such as an evaluation."""

    client: openai.OpenAI
    model: str
    temperature: float
    prompt: PromptBuilder = messages
    side: bool = False
    traffic: Traffic | None = None

    def ask(self, observation: str, *, session_id: str, task: str) -> tuple[str, Served, float]:
        """The answer's text, who gave it, and how long it took; raises openai.APIError."""
        headers = {SESSION_HEADER: session_id} | ({TURN_HEADER: SIDE} if self.side else {})
        started = time.monotonic()
        try:
            response = self.client.chat.completions.create(
                model=self.model,
                messages=self.prompt(observation),
                temperature=self.temperature,
                max_tokens=MAX_TOKENS,
                stop=STOP,
                extra_headers=headers,
                extra_body={"metadata": {"skill": task}},
            )
        except openai.APIError as error:
            if self.traffic:
                self.traffic.failed(f"chat.completions {self.model}: {type(error).__name__} {error}")
            raise
        latency_s = time.monotonic() - started
        if self.traffic:
            self.traffic.succeeded(latency_s)
        return _text(response), served(response), latency_s


def run_episode(
    client: openai.OpenAI,
    env: Env,
    seed: int,
    *,
    model: str,
    temperature: float,
    session_id: str,
    feedback: FeedbackSink | None = None,
    operator: Operator | None = None,
    prompt: PromptBuilder = messages,
    side: bool = False,
    outcome: bool = True,
    traffic: Traffic | None = None,
    failed: Set[tuple[str, str]] = frozenset(),
) -> EpisodeRecord:
    """Works one page until it is done, sending feedback on the way.

    Greedily, an unchanged page would get the same answer until the steps run out, so the attempt ends there as failed.
    The agent asks again rather than repeat what did not change the page, or what ``failed``: (observation, answer) of
    earlier attempts that ended there.
    """
    caller = Caller(client, model, temperature, prompt, side, traffic)
    observation = env.reset(seed)
    steps: list[StepRecord] = []
    tried = set(failed)
    episode_id = ""
    success: bool | None = None
    while success is None:
        try:
            answer, who, latency_s = _ask_anew(caller, observation, session_id, env.task, tried)
            episode_id = who.episode_id or episode_id
            executed = _reviewed(env, answer, who.response_id, operator, feedback)
        except (openai.APIError, httpx.HTTPError) as error:
            return EpisodeRecord(env.task, seed, None, tuple(steps), episode_id, failed_request=str(error))
        result = env.step(executed)
        steps.append(StepRecord(observation, answer, executed, result.valid, who.response_id, who.adapter, latency_s))
        success = _verdict(result, observation, stuck_is_final=temperature == 0 and operator is None)
        if result.observation == observation:
            tried.add((observation, answer))
        observation = result.observation
    if feedback and outcome and episode_id:
        try:
            feedback.outcome(episode_id, success)
        except httpx.HTTPError as error:
            return EpisodeRecord(env.task, seed, success, tuple(steps), episode_id, failed_request=str(error))
    return EpisodeRecord(env.task, seed, success, tuple(steps), episode_id)


def _ask_anew(
    caller: Caller, observation: str, session_id: str, task: str, tried: Set[tuple[str, str]]
) -> tuple[str, Served, float]:
    for _ in range(REASKS):
        answer, who, latency_s = caller.ask(observation, session_id=session_id, task=task)
        if (observation, answer) not in tried:
            break
    return answer, who, latency_s


def _verdict(result: StepResult, before: str, *, stuck_is_final: bool) -> bool | None:
    if result.done:
        return bool(result.success)
    return False if stuck_is_final and result.observation == before else None


def _reviewed(env: Env, answer: str, response_id: str, operator: Operator | None, feedback: FeedbackSink | None) -> str:
    better = operator.review(env, answer) if operator else None
    if better is None:
        return answer
    if feedback:
        feedback.correction(response_id, better)
    return better


def _text(response: ChatCompletion) -> str:
    content = response.choices[0].message.content if response.choices else None
    return (content or "").strip().split(STOP)[0]
