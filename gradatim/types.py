"""The records that flow through the system, in the order in which they are made.

    Request -> Step -> Feedback -> Reward -> Credit -> Example -> Update -> Adapter -> Verdict -> Move

All are immutable, and the store only ever appends them. Times are Unix seconds (UTC), durations end in
``_s``, log-probabilities are natural logs. Shapes: S steps in an episode, P prompt tokens, T completion tokens.

This module knows no database, no model and no wire format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NewType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gradatim.protocols import Reading, Recollection

EpisodeId = NewType("EpisodeId", str)
StepId = NewType("StepId", str)  # the response id of the wire; further choices of one response are "ID:1", "ID:2"
AdapterId = NewType("AdapterId", str)  # "name@step"; "name@0" is the frozen base
Message = Mapping[str, Any]  # one OpenAI chat message, as received


# --------------------------------------------------------------------------------------- the request path


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw the tokens of one request (OpenAI's names and meanings)."""

    max_tokens: int | None = None  # None: up to the end of the context
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a caller asked for, after the wire format was validated. Exactly one of messages, prompt is set."""

    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None  # of /v1/completions
    sampling: Sampling = field(default_factory=Sampling)
    recollection: Recollection | None = None  # what a memory adds to this request; None: nothing
    reading: Reading | None = None  # what it goes on from, and may outgrow the window with; None: it may not


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One generated token, with its log-probability under the weights that drew it."""

    id: int
    text: str  # this token alone, decoded; may be a replacement character in the middle of a multi-byte one
    logprob: float  # under the model, and its token memory if it has one; before temperature, top_p and penalties
    top: tuple[tuple[int, str, float], ...] = ()  # the most likely ones: (id, text, logprob)
    drawn_logprob: float | None = None  # under what memory made of that distribution; None: memory had no part in it
    model_logprob: float | None = None  # under the model alone, where that is another one than ``logprob``


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """What a memory of tokens makes of the distribution of one next token: the model's own times ``exp(kept)``, but for
    a few tokens, whose log-probabilities grow by ``nats`` besides."""

    tokens: NDArray[np.int64]  # (n,) each once
    nats: NDArray[np.float32]  # (n,)
    kept: float  # the logarithm of the model's part

    def own(self, token: int, logprob: float) -> float:
        """The log-probability under the model alone of a token that has this one in the blend."""
        return logprob - self.kept - float(self.nats[self.tokens == token].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The first event of a generation: the request was accepted, and these are its exact prompt tokens."""

    prompt_ids: tuple[int, ...]  # (P,)
    cached_tokens: int = 0  # how many of them came from the prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one decoding step added to one choice. Texts of one choice, concatenated, are its answer."""

    index: int  # which of the n choices
    text: str = ""  # may be empty: held back for a stop string or an unfinished character
    tokens: tuple[Token, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None  # set on the last delta of a choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Which weights answer, and how likely that choice was (the propensity, for off-policy estimates)."""

    adapter_id: AdapterId
    adapter_sha256: str
    stage: str  # a Stage, or "pinned"
    propensity: float = 1.0
    coin: Mapping[AdapterId, float] = field(default_factory=dict)  # see Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One model call inside an episode: exactly what went in, exactly what came out."""

    id: StepId
    episode_id: EpisodeId
    created_at: float
    adapter_id: AdapterId
    adapter_sha256: str
    stage: str
    propensity: float = 1.0
    messages: tuple[Message, ...] = ()  # as received, and pinned notes; empty for /v1/completions
    prompt_ids: tuple[int, ...]  # (P,) of these messages, without what memory retrieved: that stands in ``memory``
    completion_ids: tuple[int, ...]  # (T,) including the end-of-turn token where one was drawn
    logprobs: tuple[float, ...]  # (T,) under the adapter that sampled them
    text: str
    finish_reason: str  # stop | length | aborted (the client left)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    user: str = ""
    skill: str = "default"  # metadata.skill of the request, where a client gives one
    trainable: bool = True  # false: X-Turn-Type: side
    chain_key: str = ""  # digest of messages + answer: a request that extends them continues the episode
    latency_s: float = 0.0
    coin: Mapping[AdapterId, float] = field(
        default_factory=dict
    )  # the share of each adapter, where one was tossed for it
    drawn_logprobs: tuple[float, ...] = ()  # (T,) under what memory made of the model's distribution; (): as logprobs
    memory: Mapping[str, Any] = field(default_factory=dict)  # what memory did to this answer; empty: it had no part
    scope: str | None = None  # digest of the system part as received; None: of an older record, which did not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One task, from its first request to its last. Not stored: put together from its steps."""

    id: EpisodeId
    steps: tuple[Step, ...]  # (S,) in the order in which they were stored


# -------------------------------------------------------------------------------------------- judgement

OWN_IDS = "critic-"  # ids of feedback that our own critics gave begin so, and no client's may

FeedbackKind = Literal["score", "preference", "correction", "outcome", "comment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """A raw opinion about an episode or a step. Never changed: a revision is a newer record of the same id."""

    id: str
    created_at: float
    kind: FeedbackKind
    source: str  # "human:alice", "critic:unit-tests", "implicit:click", "judge:NAME"
    episode_id: EpisodeId
    step_id: StepId | None = None  # None: the whole episode
    value: float | None = None  # in [-1, 1]; an outcome is -1, 1 or None for unknown
    rejected_id: StepId | None = None  # of a preference; the chosen one is step_id
    correction: str = ""  # the better answer
    comment: str = ""
    confidence: float | None = None  # in (0, 1]
    tags: tuple[str, ...] = ()
    retracted: bool = False

    @property
    def target(self) -> tuple[str, str, str]:
        """What it is about; the same id may never name another target."""
        return (self.episode_id, self.step_id or "", self.rejected_id or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An episode that was opened, or re-opened, by feedback, with the newest revision of all its feedback."""

    position: int  # of the newest feedback in the store
    episode: Episode
    feedback: tuple[Feedback, ...]  # without retracted ones
    touched_at: float  # created_at of the newest feedback


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A belief about how good an episode was. ``value is None`` means abstained: never trained on."""

    episode_id: EpisodeId
    created_at: float
    value: float | None  # in [-1, 1]
    confidence: float  # in [0, 1]: how sure that the sign is right
    reason: str = ""
    feedback_ids: tuple[str, ...] = ()
    position: int = 0  # of the newest feedback it took into account


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """How much of the reward each step earned."""

    episode_id: EpisodeId
    created_at: float
    step_ids: tuple[StepId, ...]  # (S,)
    advantages: tuple[float, ...]  # (S,) in [-1, 1]
    methods: tuple[str, ...]  # (S,) where each came from: "correction", "score", "outcome"
    reasons: tuple[str, ...] = ()  # (S,) why it is so much, in words; () in records older than the field
    position: int = 0


# --------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What the learner trains on: a pair (DPO, arXiv:2305.18290), an answer to imitate, one to avoid, or one that was
    commented on.

    ``chosen_ids`` and ``rejected_ids`` are completions of ``prompt_ids``; one of them may be empty. The id is made
    of step and revision, so that late feedback replaces an example and replay does not count it twice.
    """

    id: str
    created_at: float
    episode_id: EpisodeId
    step_id: StepId
    prompt_ids: tuple[int, ...]  # (P,)
    chosen_ids: tuple[int, ...] = ()  # (T,)
    rejected_ids: tuple[int, ...] = ()  # (T',)
    weight: float = 1.0  # in (0, 1], from credit and confidence
    origin: str  # correction | preference | success | failure | score | hint: what it was made from
    skill: str = "default"
    state: str = ""  # digest of prompt_ids: examples of one state may be paired
    retained: bool = False  # kept for the gate, never trained on
    verified: bool = False  # the episode ended in a success that a trusted source saw
    feedback_ids: tuple[str, ...] = ()
    user: str = ""
    position: int = 0  # revision: the newest feedback it rests on
    label: float = 1.0  # of a pair: how likely the chosen answer is truly the better one
    logprobs: tuple[float, ...] = ()  # (T,) of the step's own answer, chosen or rejected, as the engine drew it
    hint_ids: tuple[int, ...] = ()  # (P',) the prompt with what was said of the answer in it; () where nothing was

    @property
    def kind(self) -> Literal["pair", "imitate", "avoid", "hint"]:
        """Of a hint, ``rejected_ids`` is the answer that was commented on."""
        if self.chosen_ids and self.rejected_ids:
            return "pair"
        if self.hint_ids and not self.chosen_ids:
            return "hint"
        return "imitate" if self.chosen_ids else "avoid"

    @property
    def instructive(self) -> bool:
        """It shows, or somebody said, what would have been better than the answer that was given."""
        return bool(self.chosen_ids or self.hint_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one update did, or why it was refused."""

    id: str
    created_at: float
    applied: bool
    parent_id: AdapterId
    adapter_id: AdapterId | None = None  # what it made
    example_ids: tuple[str, ...] = ()
    replay_ids: tuple[str, ...] = ()
    kinds: Mapping[str, int] = field(default_factory=dict)  # examples by origin
    metrics: Mapping[str, float] = field(default_factory=dict)
    refused_because: str = ""
    duration_s: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)  # id of an example that was not trained on -> why
    scale: float = 1.0  # what share of the trained change the adapter is; below 1 where a gate had it made smaller

    @property
    def is_borne_out(self) -> bool:
        """Most of what it teaches is from episodes that a trusted source saw end well; true where nobody measured."""
        return self.metrics.get("borne_out", 1.0) >= 0.5


class Stage(StrEnum):
    """Where an adapter stands. Only live and canary ones are given to new episodes."""

    CANDIDATE = "candidate"
    SHADOW = "shadow"
    CANARY = "canary"
    LIVE = "live"
    RETIRED = "retired"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled_back"


ON_THE_WAY = (Stage.CANDIDATE, Stage.SHADOW, Stage.CANARY)  # at most one adapter of a name is in these

TRANSITIONS: Mapping[Stage, frozenset[Stage]] = {
    Stage.CANDIDATE: frozenset({Stage.SHADOW, Stage.CANARY, Stage.LIVE, Stage.REJECTED}),
    Stage.SHADOW: frozenset({Stage.CANARY, Stage.LIVE, Stage.REJECTED}),
    Stage.CANARY: frozenset({Stage.LIVE, Stage.REJECTED, Stage.ROLLED_BACK}),
    Stage.LIVE: frozenset({Stage.RETIRED, Stage.ROLLED_BACK}),
    Stage.RETIRED: frozenset({Stage.LIVE}),  # a rollback brings an earlier one back
    Stage.ROLLED_BACK: frozenset({Stage.LIVE}),  # only ever by a person
    Stage.REJECTED: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One immutable version of the LoRA weights (arXiv:2106.09685). Step 0 is the frozen base: no weights."""

    id: AdapterId
    name: str
    step: int
    base_sha256: str
    parent_id: AdapterId | None
    sha256: str  # over the canonical bytes of its weights; of the base for step 0
    path: str  # folder, relative to the data directory; empty for step 0
    created_at: float
    update_id: str = ""


class Decision(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    REPAIR = "repair"  # too much harm: where outcomes bear it out, the same change, made smaller, is judged instead
    WAIT = "wait"  # not enough evidence yet: it stays where it is


APPROVAL = "approval"  # as a verdict's gate: a person made it the anchor


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A gate's answer, with the numbers that led to it."""

    adapter_id: AdapterId
    created_at: float
    gate: str
    decision: Decision
    against: tuple[AdapterId, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


DRIFT = "drift"  # as a verdict's gate: what was seen to change beside the live adapter


def is_new_world(verdict: Verdict) -> bool:
    """Whether what was learned before is to count for less from now on."""
    return verdict.gate == DRIFT and verdict.evidence.get("world") == 1.0 and verdict.evidence.get("adapt") == 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One change of stage: the audit row, written in the transaction that makes the change."""

    adapter_id: AdapterId
    created_at: float
    before: Stage | None  # None: it was registered
    after: Stage
    actor: str  # "loop", "person", "demo", ...
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseScore:
    """How one adapter does on one retained example, teacher-forced."""

    logprob: float  # mean over the chosen tokens, nats
    greedy: bool  # greedy decoding would give exactly the chosen tokens


Record = Step | Feedback | Reward | Credit | Example | Update | Adapter | Verdict | Move
RECORDS: Sequence[type[Record]] = (Step, Feedback, Reward, Credit, Example, Update, Adapter, Verdict, Move)


# --------------------------------------------------------------- memory: kept beside the log, and deleted when asked


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEntry:
    """One judged answer: in this situation, that is what was said of these tokens."""

    id: str  # the step's id and "+" or "-"
    tenant: str  # whose answers it may change
    user: str
    episode_id: EpisodeId
    step_id: StepId  # of the answer that was judged; its prompt is the situation
    created_at: float  # of that answer
    tokens: tuple[int, ...]  # (T,)
    logprobs: tuple[float, ...] = ()  # (T,) the model's own, where it sampled them; () for a correction
    value: float  # in [-1, 1]: for or against, and how surely
    sources: tuple[str, ...] = ()  # of the feedback it rests on
    epoch: int = 0  # the newest one when it was written
    position: int = 0  # of the newest feedback it rests on
    scope: str = ""  # of that answer: the kind of task, as the system part says it


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryKey:
    """Where the situation of a step lies in one key space. Derived: it can be made anew of the step's tokens."""

    step_id: StepId
    space: str
    key: bytes  # (H,) float16, little-endian, then CRC-32 of that


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpace:
    """What a key depends on. Keys of two spaces cannot be compared."""

    id: str  # digest of all but the time and the adapter's name
    base_sha256: str
    tokenizer_sha256: str
    adapter_id: AdapterId
    adapter_sha256: str
    layers: tuple[int, ...]
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """An answer that an entry was for, and what became of it."""

    answer_id: StepId
    entry_id: str
    value: float  # of the answer, by how far from the entry's place: above 0 the entry helped, below it harmed


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEpoch:
    """From here on what was remembered before does not count, until it is undone."""

    id: str
    number: int  # 1, 2, ...
    tenant: str | None  # None: of all tenants
    created_at: float
    actor: str
    reason: str = ""
    undone_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """What was given up to a time may never be remembered again."""

    id: str
    scope: Literal["user", "tenant", "episode", "source", "entry", "all"]
    value: str
    created_at: float
    actor: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """The model's own states over an answer, as one vector. Derived: it can be made anew of the step's tokens."""

    step_id: StepId  # the last step of its episode
    space: str  # what the vector depends on; those of two spaces cannot be compared
    episode_id: EpisodeId
    vector: bytes  # (D,) float16, little-endian
    position: int  # of the feedback for which it was made first


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowPair:
    """How a candidate and the live adapter answered one recorded prompt again; the answers are not kept."""

    adapter_id: AdapterId  # the candidate
    step_id: StepId  # whose prompt it was
    number: int  # in the order in which they are compared
    skill: str
    guards: tuple[float, ...]  # how bad the candidate's answer looks, in [0, 1]; see ``release.comparison``
    live_guards: tuple[float, ...]
    reward: float | None = None  # of the candidate's answer, in [0, 1]; None: the critic did not judge it
    live_reward: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNote:
    """What an operator has every request of a tenant told, until it is unpinned."""

    id: str
    tenant: str
    text: str
    created_at: float
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRetirement:
    """These weights know this answer by themselves: under them, the entry counts no more. Other weights have rows of
    their own, so that an entry is back with the next adapter or a rollback until it was looked at under that one."""

    id: str
    entry_id: str
    position: int  # of the entry: a revised one has to be looked at again
    adapter_sha256: str
    adapter_id: AdapterId
    chance: float  # of the whole answer on its own prompt, without memory
    created_at: float
    undone_at: float | None = None


Kept = (
    MemoryEntry
    | MemoryKey
    | MemorySpace
    | MemoryUse
    | MemoryEpoch
    | Tombstone
    | Sketch
    | ShadowPair
    | MemoryNote
    | MemoryRetirement
)
KEPT: Sequence[type[Kept]] = (
    MemoryEntry,
    MemoryKey,
    MemorySpace,
    MemoryUse,
    MemoryEpoch,
    Tombstone,
    Sketch,
    ShadowPair,
    MemoryNote,
    MemoryRetirement,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a memory put into the prompt of one request."""

    messages: tuple[Message, ...]  # with it
    prompt_ids: tuple[int, ...]  # (P,) without it
    entries: tuple[MemoryEntry, ...]
    told: tuple[Mapping[str, Any], ...]  # of each entry, for the record
