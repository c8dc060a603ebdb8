"""The seams. Each part is known to the others by one of these, and by nothing else.

To bring your own, write a class with these methods (no base class is needed), check it with
``gradatim.testing.check_<seam>``, and build it in your own composition root.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gradatim.types import (
    Adapter,
    AdapterId,
    Blend,
    Case,
    CaseScore,
    Credit,
    Delta,
    Episode,
    EpisodeId,
    Example,
    Feedback,
    Kept,
    Message,
    Move,
    Record,
    Request,
    Reward,
    Route,
    Shown,
    Stage,
    Started,
    Step,
    StepId,
    Update,
    Verdict,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from gradatim.nn.session import Session

R = TypeVar("R", bound=Record)
K = TypeVar("K", bound=Kept)


class Engine(Protocol):
    """Turns a request into tokens under a named adapter. Holds the base model and any number of adapters."""

    def generate(self, request: Request, adapter_id: AdapterId) -> AsyncIterator[Started | Delta]:
        """``Started`` first, then deltas; every choice ends with one that has a finish reason.

        Closing the iterator early aborts the generation. Raises PromptTooLongError, InvalidRequestError,
        OverloadedError or UnknownAdapterError before the first event.
        """

    async def load(self, adapter: Adapter) -> None:
        """Make it ready to answer, without a pause for others. Loading it twice does nothing. AdapterError."""

    async def unload(self, adapter_id: AdapterId) -> None:
        """Give its memory back as soon as the last generation on it has ended."""

    def loaded(self) -> frozenset[AdapterId]: ...


class Recollection(Protocol):
    """What a memory adds to one request. The engine's thread calls it; it neither blocks nor waits for anybody, and
    whatever it raises costs the request nothing but its memory."""

    def situate(self, key: NDArray[np.float32]) -> None:
        """The prompt has been read: ``key`` (H,) is the mean state of the model over the task's turn, H = hidden size
        times the layers that the engine was told to look at."""

    def lean(
        self, drawn: Sequence[int], path_logprob: float, logprobs: Callable[[Sequence[int]], Sequence[float]]
    ) -> Mapping[int, float]:
        """What to add to the log-probabilities of some next tokens of one choice, in nats; of all others nothing.

        ``drawn``: its tokens so far; ``path_logprob``: their log-probability under the model alone; ``logprobs`` gives
        those of next tokens, under the model alone.
        """

    def trace(self, tokens: Sequence[int]) -> Mapping[str, Any]:
        """What it did to an answer of these tokens, for the record; empty where it had no part in it."""


class TokenMixer(Protocol):
    """A memory of single tokens, which is part of the distribution that is drawn from. The engine's thread asks it
    before every draw, once for all rows that have a recollection."""

    def mix(self, recollections: Sequence[Recollection], states: Tensor, logits: Tensor) -> Mapping[int, Blend]:
        """What it makes of those of the rows that it changes; all others keep their bits.

        ``states`` (M, H): what went into the layer that the engine was told to look at, where the next tokens are
        predicted; ``logits`` (M, V) are the model's own, and are not written to.
        """


class Reading(Protocol):
    """What one request goes on from: a session, or nothing. With it, prompt and answer may be longer than the engine's
    window. The engine's thread calls it, and no call takes longer than its bookkeeping."""

    before: Session | None  # as other requests left it, and never changed; None: nothing was read before
    wanted: bool  # what is read now is to be kept for a later request
    forgotten: bool  # since it was opened; the request must end

    def keep(self, session: Session) -> None:
        """The first choice is complete, and the session stands here. It may share memory with ``before``."""

    def tell(self, kept: int, attended: int, share: float) -> None:
        """How many tokens beyond the window there were at the end, how many tokens were drawn while there were any,
        and which share of the attention they took."""

    def fail(self) -> None:
        """It could not be kept, and is what it was before."""


class Sessions(Protocol):
    """What conversations have read, so that a request can go on from it. Methods may block for a file at most."""

    def open(
        self,
        user: str,
        session_id: str,
        adapter_sha256: str,
        *,
        episode_id: EpisodeId,
        scope: str = "",
        must_exist: bool = False,
    ) -> OpenReading:
        """For one request; "" as the id: of a session that nobody can go on from. ``scope`` is that of its
        system part, and counts where it begins a session. SessionError where another request has it,
        UnknownSessionError where it must exist and does not."""


class OpenReading(Reading, Protocol):
    """As its owner sees it."""

    @property
    def scope(self) -> str:
        """That of the request that began the session."""

    def trace(self) -> Mapping[str, Any]:
        """What it came to, for the record; empty where the engine did without it."""

    def close(self) -> None:
        """The request has ended; what it keeps from now on is ignored. May be called twice."""


class Memory(Protocol):
    """What was said of answers, and changes the next ones. Never blocks a request for longer than a search."""

    def recollect(self, user: str, adapter_id: AdapterId, adapter_sha256: str, scope: str = "") -> Recollection:
        """For one request of a user that these weights answer; ``scope`` is that of its system part."""

    def answered(self, recollection: Recollection, step_ids: Sequence[StepId], *, steered: bool) -> None:
        """The request was answered and recorded as these steps; it may be judged from now on."""


class Prompter(Protocol):
    """What a memory puts into the prompt of a request. Whatever it raises costs the request nothing but that."""

    def noted(self, messages: Sequence[Message], user: str) -> Sequence[Message]:
        """The messages with what is pinned for this user; the same ones where nothing is."""

    async def place(self, request: Request, recollection: Recollection) -> None:
        """Tell the request's own recollection where it is asked, where that is known before the prompt is read."""

    async def show(
        self, messages: Sequence[Message], recollection: Recollection, adapter_id: AdapterId
    ) -> Shown | None:
        """Earlier answers, where there are any to be shown; ``recollection`` is the request's own. It may take as
        long as reading the prompt."""


class Store(Protocol):
    """An append-only log of records with one global position, named cursors, and each adapter's stage."""

    def submit(self, *records: Record, cursors: Mapping[str, int] | None = None) -> Future[int]:
        """Write all records and cursors in one transaction; the future gives the last position once it is durable.

        Many callers share one fsync. A Feedback whose id stands for another target fails with ConflictError; one
        that equals the newest revision of its id is not written again. An Adapter is registered as a candidate
        (step 0 as live), with its Move.
        """

    def append(self, *records: Record, cursors: Mapping[str, int] | None = None) -> int:
        """``submit`` and wait."""

    def read(self, kind: type[R], *, after: int = 0, limit: int = 1000, **where: str) -> Sequence[tuple[int, R]]:
        """Records of a kind past a position, oldest first; ``where`` compares indexed columns (id, episode_id, ...)."""

    def newest(self, kind: type[R], *, before: int = 0, limit: int = 1, **where: str) -> Sequence[tuple[int, R]]:
        """The last records of a kind, newest first; where ``before`` is given, of those at lower positions."""

    def episode(self, episode_id: EpisodeId) -> Episode | None: ...

    def step(self, *, id: StepId | None = None, chain_key: str | None = None) -> Step | None:
        """The step of that response id, or the newest one with that chain key."""

    def cases(self, *, after: int = 0, limit: int = 100) -> Sequence[Case]:
        """Episodes with new feedback past a position, in the order of their newest feedback."""

    def cursor(self, name: str) -> int:
        """0 where it was never set."""

    def stages(self, name: str, *among: Stage) -> Mapping[AdapterId, Stage]:
        """Of every adapter of that name, in the order of their steps; or of those that are in one of these stages,
        which costs no more than there are of them."""

    def move(self, *moves: Move, verdicts: Sequence[Verdict] = (), cursors: Mapping[str, int] | None = None) -> None:
        """Change stages, with what justified it, all or nothing. TransitionError when the table or the rule of one
        live adapter per name forbids it, or when ``before`` is no longer the stage."""


class Shelf(Protocol):
    """Where a memory is kept: rows that may be replaced and deleted, beside the log. Safe to use from any thread."""

    def load(self, kind: type[K], **where: str) -> Sequence[K]:
        """All of a kind, or those whose columns are equal; in the order of their ids. StoreError."""

    def change(
        self,
        *,
        put: Sequence[Kept] = (),
        drop: Sequence[tuple[type[Kept], Mapping[str, str]]] = (),
        cursors: Mapping[str, int] | None = None,
    ) -> None:
        """Delete, then write (what has the same id is replaced), and set cursors: all or nothing, and durable when it
        returns. StoreError."""


class Router(Protocol):
    """Chooses the weights for a request: live, canary or holdback by a coin per episode; or the one that was named."""

    async def route(self, model: str, episode_id: EpisodeId) -> Route:
        """The adapter is loaded when this returns. UnknownAdapterError where the model or version does not exist."""


class Critic(Protocol):
    """Judges an episode by program: unit tests, a schema, another model. Not a value function."""

    def __call__(self, episode: Episode) -> Feedback | None: ...


class RewardModel(Protocol):
    """Weighs all the feedback on an episode into one reward, or abstains."""

    def score(self, case: Case) -> Reward: ...


class Encoder(Protocol):
    """What the served model's own states say of an episode."""

    @property
    def space(self) -> str:
        """What the vectors depend on; those of two spaces cannot be compared."""

    def encode(self, step: Step) -> NDArray[np.float32] | None:
        """(D,) of an answer, at the cost of a pass over it and what came before; None where there is none. It may hold
        numbers that are not finite, which the caller refuses."""


class LogRatios(Protocol):
    """What the live adapter has learned, as how much likelier it makes the answers of an episode."""

    def version(self) -> str:
        """What they depend on beside the episode: the live adapter's digest."""

    def of(self, episode: Episode | None) -> Sequence[float] | None:
        """(S,) of each step, log pi(answer | prompt) - log pi_ref(answer | prompt), in nats, of the live adapter
        against the frozen base, at the cost of two passes. None where the adapter may have been trained on the
        episode, where there is no adapter, and where a step cannot be read."""


class CreditAssigner(Protocol):
    """Shares an episode's reward out over its steps."""

    def assign(self, case: Case, reward: Reward) -> Credit: ...


class ExampleBuilder(Protocol):
    """Makes training examples of a judged episode."""

    def build(self, case: Case, reward: Reward, credit: Credit) -> Sequence[Example]: ...


class Tokenizer(Protocol):
    """What examples need to know of tokens: how a corrected answer would have been generated, and how a prompt reads
    with a hint in it."""

    def completion_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of an answer, with the end-of-turn token."""

    def hinted_ids(self, prompt_ids: Sequence[int], messages: Sequence[Message], hint: str) -> tuple[int, ...]:
        """The prompt of these messages, of which ``prompt_ids`` are the captured tokens, with the hint where its reader
        would look for it. Empty where there is no place for one."""


class Replay(Protocol):
    """Old examples that went into live adapters, to be trained on again."""

    def draw(self, n: int, *, exclude: frozenset[str] = frozenset()) -> Sequence[Example]: ...


class Learner(Protocol):
    """Makes a new adapter out of its parent and some examples. Keeps no state that the parent's files do not hold,
    so that a rollback, a restart and a refusal need nothing undone."""

    def update(
        self,
        examples: Sequence[Example],
        replay: Sequence[Example],
        parent: Adapter,
        step: int,
        traffic: Sequence[Step] = (),
        good: Set[StepId] = frozenset(),
    ) -> tuple[Update, Adapter | None]:
        """``traffic`` are answers to users that it is not trained on; ``good`` those of them that were found good. A
        refused update comes back with its reason and no adapter. LearnerError where it broke."""

    def shrink(self, update: Update, adapter: Adapter, parent: Adapter, step: int) -> tuple[Update, Adapter]:
        """Half of the change that ``update`` made of ``parent``, as another child of it. The record's ``scale`` says
        what share of the trained change it is. LearnerError."""


class Scorer(Protocol):
    """How well an adapter gives the chosen answers of examples, teacher-forced."""

    def score(self, adapter: Adapter, examples: Sequence[Example]) -> Sequence[CaseScore]: ...


class Gate(Protocol):
    """Decides whether a candidate may move on. What is not positively decided does not move."""

    name: str

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict: ...
