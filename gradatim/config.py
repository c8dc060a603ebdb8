"""Configuration: one TOML file, one frozen tree of dataclasses, one dial first.

``caution`` (low, normal, high) sets every threshold that trades speed of learning for safety; any of them can
still be set by hand. This module knows nothing of what the values do.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from gradatim.errors import ConfigError

_STRICT = ConfigDict(extra="forbid")
Caution = Literal["low", "normal", "high"]
_Share = Annotated[float, Field(ge=0.0, le=0.5)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    __pydantic_config__ = _STRICT
    host: str = "127.0.0.1"  # anything but loopback needs an API key
    port: int = 8080
    api_key: str = ""  # GRADATIM_API_KEY overrides; empty: no authentication
    max_body_bytes: int = 8 * 2**20
    max_queue: int = 256  # requests waiting or running before 429


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    __pydantic_config__ = _STRICT
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"  # auto: float32 on the CPU, bfloat16 on a GPU
    device: Literal["cpu", "cuda", "auto"] = "auto"
    threads: int = 0  # 0: cores - 1, at least 1
    max_batch: int = 16  # sequences decoded together
    max_context_tokens: int = 0  # 0: the model's own
    prefix_cache_tokens: int = 8192  # 0: no prefix cache; smollm2 in float32 takes 46 KB a token
    adapter_slots: int = 8  # adapters in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    __pydantic_config__ = _STRICT
    # how much an opinion weighs, by the part of its source before the colon
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"human": 1.0, "critic": 1.0, "judge": 0.5, "implicit": 0.25}
    )
    abstain_band: float = 0.2  # a mean opinion closer to 0 than this is no opinion
    min_weight: float = 0.25  # less evidence than this abstains
    model: Literal["auto", "weighted", "calibrated"] = "auto"  # auto: calibrated once there are min_labels
    audited: tuple[str, ...] = ("human:audit*",)  # sources whose outcomes are taken for the truth; name no other
    held_out: tuple[str, ...] = ()  # sources kept for judging, never part of the reward: is it gamed?
    gamed: Literal["hold", "observe"] = "hold"  # while it is, nothing moves up; observe: it is told only
    min_labels: int = 100  # audited episodes, of both kinds, that other sources judged too
    risk: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1  # share of the calibrated model's rewards that may be wrong,
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9  # and how sure of that it must be
    source_cap: int = 200  # opinions of one rater, the newest, that reliabilities are learned from
    hidden: bool = False  # the model's own states over an answer are one more source; a pass over each judged answer
    silence_s: Annotated[float, Field(ge=0.0)] = 0.0  # one that nobody spoke of for so long is judged by it; 0: never


CreditMethod = Literal["fork", "anchor", "decomposition", "gae", "implicit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditConfig:
    """How the reward of a long episode is shared out over its steps, beside what was said of single ones."""

    __pydantic_config__ = _STRICT
    order: tuple[CreditMethod, ...] = ("fork", "anchor", "decomposition")  # then the outcome
    long_steps: int = 10  # an episode of fewer steps keeps the outcome rule
    least_fit: float = 0.2  # share of the variance of held-out rewards that a scorer of prefixes must explain
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95  # of gae: what a step shares in the next one's credit
    window: int = 500  # long episodes, the newest, that are looked back on


_OverAnswer = Literal["dpo", "robust_dpo", "ipo", "kto", "apo_zero", "sft"]
_Sampled = Literal["policy_gradient", "dr_grpo"]
_Unpaired = Literal["sft", "kto", "apo_zero", _Sampled]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """What each kind of feedback is trained with; the types are the list of what there is."""

    __pydantic_config__ = _STRICT
    correction: _OverAnswer | Literal["self_distillation"] = "dpo"
    preference: _OverAnswer = "dpo"
    pair: _OverAnswer | _Sampled = "dpo"  # a good and a bad answer to one and the same prompt
    success: _Unpaired = "sft"  # an answer that an outcome speaks for
    score: _Unpaired = "sft"  # one that a score speaks for
    failure: Literal["avoid", "kto", "apo_zero", _Sampled] = "avoid"  # outcome or score against it
    hint: Literal["self_distillation"] = "self_distillation"  # an answer that was commented on


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    __pydantic_config__ = _STRICT
    rank: int = 16
    alpha: int = 32
    lr: float = 2.5e-4
    beta: float = 0.1  # of DPO: how far a preference may pull away from the live adapter
    nll: float = 1.0  # weight of the chosen answer's own likelihood beside the preference; small models need it whole
    avoid: float = 0.05  # weight of a bad answer for which no good one is known; more makes known answers flip
    hint: float = 0.05  # weight of an answer that was commented on; a weak model mostly learns from it what not to say
    label_noise: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1  # share of wrong labels that robust_dpo assumes
    losses: LossConfig = field(default_factory=LossConfig)
    kl_replay_limit: float = 1.0  # nats a token from live on a batch's replayed answers: a step past it is taken back
    kl_fresh_limit: float = 0.3  # nats a token from live on the newest answers: a change past it is shortened
    kl_base_limit: float = 8.0  # the same to the frozen model, on those nobody found good: its life's budget
    length_limit: float = 1.5  # times as long as the parent's: an update that makes fresh answers longer is cut; 0: off
    habit_limit: float = 0.3  # rise of the chance that fresh answers repeat, refuse, flatter, or agree wrongly; 0: off
    ewc: float = 0.0  # share of the gradient that pulls back to the live adapter's weights (EWC) when an update ends
    agem: bool = False  # take out of new examples' gradient what opposes that of the replayed ones (A-GEM)
    gate_cosine: float = 0.0  # a new example that pulls against verified replayed ones by more is left out; 0: off
    epochs: int = 2  # passes over the new examples in one update
    batch: int = 16  # examples in one gradient step, replay included
    replay_share: float = 0.5
    min_examples: int = 12  # an update waits for this many new examples with a good answer,
    max_wait_s: float = 20.0  # or, once there is something to replay, until the oldest has waited this long
    max_examples: int = 24  # new examples in one update
    user_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of them that one named user may give; more are dropped
    max_length: int = 2048  # tokens of prompt + answer; a longer prompt loses its left end
    retain_every: int = 4  # one in this many verified examples is kept for the gate and never trained on
    threads: int = 1
    seed: int = 0

    @property
    def new_a_step(self) -> int:
        """New examples in one gradient step, whether or not there is something to replay beside them."""
        return max(1, self.batch - round(self.batch * self.replay_share))

    def replayed(self, new: int) -> int:
        """Old examples that all steps of an update with so many new ones have room for, each of them once."""
        steps = self.epochs * -(-new // self.new_a_step)
        return steps * (self.batch - self.new_a_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    __pydantic_config__ = _STRICT
    max_cases: int = 96  # retained examples replayed, newest first within each skill
    margin: float = 0.05  # share of a skill's retained answers that may be lost
    anchor_margin: float = 0.05  # the same against the anchor, over all updates since it was set
    unproven: Annotated[int, Field(ge=0)] = 3  # updates in a row without proof of being better than the anchor; 0: any
    alpha: float = 0.05  # level of the sign test on lost against won answers, per skill
    suite: str = ""  # your own cases: a JSONL file or a folder; empty: none. The loop then holds an engine of its own
    max_delta_norm: float = 0.2  # largest ||delta W|| / ||W|| of any layer
    min_users: Annotated[int, Field(ge=0)] = 0  # named users behind an update, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficConfig:
    __pydantic_config__ = _STRICT
    refresh_s: float = 0.05  # how often the server looks for a changed stage


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseConfig:
    """From a candidate that passed the offline gates to one that every user gets, and what is watched afterwards."""

    __pydantic_config__ = _STRICT
    blind: bool = False  # answers do not say which adapter gave them, but for pinned ones; explain does
    canary: bool = False  # a candidate answers a share of the traffic before it goes live, and is watched after
    ramp: tuple[_Share, ...] = (0.01, 0.05, 0.10, 0.50)  # shares of new episodes, in the order of their use
    ramp_episodes: int = 20  # of the canary, seen without an alarm, before the next share
    ramp_s: float = 3600.0  # and this long
    holdback: _Share | None = None  # of new episodes that stay on the last good adapter; none: 0.05 with canary, else 0
    base_share: _Share = 0.0  # of new episodes that stay on the frozen base for good: they show what learning is worth
    window_s: float = 86_400.0  # feedback on an episode counts until this long after its first answer
    trusted: tuple[str, ...] = ("critic",)  # families of sources that are programs; the others are people or judges
    user_cap: int = 5  # rated episodes of one user that count in one trial; 0: all. Unnamed users are not capped
    margin: float = 0.03  # of a mean reward in [0, 1] that may be lost; 0: a candidate must be better
    alpha: float = 0.025  # chance of promoting one that loses the margin
    alpha_worse: float = 0.10  # chance of taking back one that is not worse
    alpha_guard: float = 0.01  # the same by errors, empty and broken answers, length and latency, all together
    alpha_ratio: float = 0.001  # chance of a false alarm of each test of the coin
    min_episodes: int = 200  # rated episodes of the canary before it may be promoted on their evidence
    min_users: int = 30  # of them, or as many as there were before
    min_s: float = 86_400.0
    horizon_s: float = 7 * 86_400.0  # an undecided canary ends after this,
    horizon_episodes: int = 20_000  # or after so many episodes
    decidable: int = 8000  # rated episodes to be expected within the horizon; with fewer, the offline pairs decide
    guard_episodes: int = 30  # of a canary that only guards, past their feedback window, without an alarm
    min_pairs: int = 20  # offline pairs that may carry the decision
    alarm: float = 1e5  # rewards of a sound live adapter between two false alarms of the watch, at least
    tolerance: float = 0.02  # fall of the mean reward below its past that the watch lets pass
    confirm_episodes: int = 4000  # rated ones, at even shares with the last good adapter, to confirm or clear an alarm
    alpha_confirm: float = 0.05  # chance of rolling back one that is not worse, after an alarm
    cool_down_s: float = 3600.0  # after the watch rolled back, nothing is learned and nothing moves up

    @property
    def holdback_share(self) -> float:
        return (0.05 if self.canary else 0.0) if self.holdback is None else self.holdback


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftConfig:
    """What is watched for a change of the world, beside the live adapter; it changes no adapter."""

    __pydantic_config__ = _STRICT
    react: Literal["off", "observe", "adapt"] = "observe"  # adapt: replay, rewards and memory turn to what is new
    alarm: Annotated[float, Field(gt=0)] = 1e5  # episodes between two false alarms, of all that is watched together
    tolerance: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.01  # change of a mean in [0, 1] that is let pass
    season_s: Annotated[float, Field(ge=0.0)] = 86_400.0  # the day, whose course is learned for two of it; 0: none
    skills: Annotated[int, Field(ge=0, le=256)] = 16  # that are watched each for itself, the first ones
    confirm_episodes: Annotated[int, Field(ge=1)] = 4000  # rated ones after a fall; with no answer by then: unknown
    haste: Annotated[float, Field(ge=1.0)] = 2.0  # times the learning rate, where it adapts,
    haste_updates: Annotated[int, Field(ge=0)] = 5  # for so many updates after the world changed


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    __pydantic_config__ = _STRICT
    poll_s: float = 0.25
    settle_s: float = 2.0  # an episode without a final outcome is judged this long after its newest feedback


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticConfig:
    """One critic: a program that judges finished episodes."""

    __pydantic_config__ = _STRICT
    use: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]  # package.module:name
    name: Annotated[str, Field(pattern=r"^[\w.-]{0,64}$")] = ""  # of its source, critic:NAME; empty: that of ``use``
    version: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")] = "1"  # a new one judges anew what it judges from now on
    options: Mapping[str, Any] | None = None  # given, also empty: ``use`` makes the critic out of them
    skills: tuple[str, ...] = ()  # whose episodes it judges; empty: all
    timeout_s: Annotated[float, Field(gt=0)] = 60.0

    @property
    def called(self) -> str:
        return self.name or self.use.partition(":")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowConfig:
    """Recent prompts that a candidate and the live adapter answer again before the candidate may go on."""

    __pydantic_config__ = _STRICT
    prompts: Annotated[int, Field(ge=0)] = 0  # the most for one candidate; 0: no such stage
    least: Annotated[int, Field(ge=1)] = 100  # prompts without which nothing is decided for it
    critic: CriticConfig | None = None  # judges the answers; one that gives feedback to learn from may not
    tools: str = ""  # a JSON file of tools, as in OpenAI's requests, that calls in answers are held to
    margin: Annotated[float, Field(ge=0.0, le=0.5)] = 0.03  # of the critic's mean reward that may be lost
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.025  # chance of passing one that loses the margin
    alpha_worse: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05  # chance of rejecting one that is not worse
    undecided: Literal["reject", "pairs"] = "reject"  # pairs: those of the replay gate, where there are min_pairs
    at_once: Annotated[int, Field(ge=1)] = 8  # prompts between two looks at what else there is to do
    max_tokens: Annotated[int, Field(ge=1)] = 256  # of an answer
    skills: Annotated[int, Field(ge=1)] = 16  # that are looked at each for itself
    horizon_s: Annotated[float, Field(gt=0)] = 86_400.0  # an undecided shadow ends after this


Signal = Literal["reask", "correcting", "thanks", "tool_error", "recovery", "edited", "retry", "abandoned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticsConfig:
    __pydantic_config__ = _STRICT
    run: tuple[CriticConfig, ...] = ()
    implicit: tuple[Signal, ...] = ()  # signals of an episode's course; each is recorded as feedback
    quiet_s: Annotated[float, Field(ge=0)] = 60.0  # without an outcome, an episode is finished this long after a step


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    __pydantic_config__ = _STRICT
    decisions: bool = False  # answers that were judged change the next ones in the same situation
    tokens: bool = False  # tokens of answers that were judged good become likelier where the text stands alike
    retrieval: bool = False  # answers that were judged good are shown in the prompt where a request is much alike
    consolidate: bool = False  # after a promotion, what the weights know by themselves is retired
    attention: bool = False  # prompts and sessions may be longer than the window: attention to the nearest keys beyond
    tenants: Literal["user", "one"] = "user"  # who shares a memory: requests of one `user` field, or all requests
    scopes: Literal["system", "one"] = "system"  # what is kept apart: answers under other system prompts, or nothing
    label_noise: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.005  # share of sure judgements that are wrong
    encoder: str = ""  # path or hub id of a sentence-transformers model that tells situations apart; empty: the model
    width: Annotated[float, Field(gt=0.0)] = 0.2  # of the kernel: 1 - cosine at which a judgement counts 1/e
    odds: Annotated[float, Field(gt=0.0)] = 0.3  # that a remembered action is the one wanted, before any evidence
    max_entries: Annotated[int, Field(ge=1)] = 10_000  # of each tenant; the least useful go first
    harm: Annotated[int, Field(ge=1)] = 3  # an entry that harmed this many answers more than it helped is dropped
    max_tokens: Annotated[int, Field(ge=1)] = 100_000  # of each tenant; the oldest answers go first
    neighbours: Annotated[int, Field(ge=1, le=1024)] = 32  # remembered tokens that have a say in the next one
    temperature: Annotated[float, Field(gt=0.0)] = 0.095  # of their squared distances, which are 0 to 4
    retrieved: Annotated[int, Field(ge=1, le=32)] = 4  # answers that are shown at most,
    retrieval_tokens: Annotated[int, Field(ge=1)] = 512  # in so many tokens,
    retrieval_cosine: Annotated[float, Field(gt=-1.0, le=1.0)] = 0.4  # of requests that are at least so near
    half_life_s: Annotated[float, Field(gt=0.0)] = 30 * 86_400.0  # age at which an answer has half the claim to it
    sure: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9  # tokens are not looked up where the model gives one this
    attention_tokens: Annotated[int, Field(ge=1)] = 16_384  # of a session, beyond the window; the oldest go first
    attention_sessions: Annotated[int, Field(ge=1)] = 16  # of each tenant; the least recently used go first
    attention_bytes: Annotated[int, Field(ge=1)] = 2 * 2**30  # of all sessions; as much again for requests that run

    @property
    def same(self) -> float:
        """The cosine from which on two situations are one: an encoder puts one thing in two wordings well below 1, and
        other things farther still."""
        return 0.7 if self.encoder else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that can be set. ``gradatim config`` prints it with where each value came from."""

    __pydantic_config__ = _STRICT
    name: str = "agent"  # the model name clients ask for
    model: str = "smollm2"  # or a path or hub id of any transformers causal LM
    data_dir: Path = Path("gradatim-data")
    database: str = (
        ""  # postgresql://..., one server a database; GRADATIM_DATABASE overrides; empty: SQLite in data_dir
    )
    caution: Caution = "normal"
    mode: Literal["observe", "propose", "auto"] = "auto"  # observe: serve and record; propose: a person promotes
    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    release: ReleaseConfig = field(default_factory=ReleaseConfig)
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    critics: CriticsConfig = field(default_factory=CriticsConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    @property
    def learn(self) -> bool:
        return self.mode != "observe"


_DIAL: Mapping[Caution, Mapping[str, Mapping[str, Any]]] = {
    "low": {
        "gate": {"margin": 0.10, "alpha": 0.02},
        "learner": {"lr": 4e-4, "kl_replay_limit": 2.0, "kl_fresh_limit": 1.0},
    },
    "normal": {},
    "high": {
        "gate": {"margin": 0.02, "alpha": 0.10},
        "learner": {"lr": 1e-4, "kl_replay_limit": 0.5, "kl_fresh_limit": 0.2},
        "reward": {"abstain_band": 0.4, "risk": 0.05},
    },
}


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merge(out[key], value) if both else value
    return out


def _environment(env: Mapping[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if env.get("GRADATIM_API_KEY"):
        out["server"] = {"api_key": env["GRADATIM_API_KEY"]}
    if env.get("GRADATIM_DATABASE"):
        out["database"] = env["GRADATIM_DATABASE"]
    return out


def load(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None
) -> Config:
    """The effective configuration: defaults < caution dial < file < environment < overrides. ConfigError."""
    try:
        file = tomllib.loads(path.read_text()) if path else {}
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path} is not valid TOML: {e}") from e
    given = _merge(_merge(file, _environment(os.environ if env is None else env)), overrides or {})
    caution = given.get("caution", "normal")
    if caution not in _DIAL:
        raise ConfigError(f"caution: {caution!r} is not one of {', '.join(_DIAL)}")
    try:
        return TypeAdapter(Config).validate_python(_merge(_DIAL[caution], given))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "the top level"
        raise ConfigError(f"{path or 'configuration'}: {where}: {first['msg']}{_known(first)}") from e


def _known(error: Mapping[str, Any]) -> str:
    """What there is, for a setting that there is not."""
    if error["type"] != "unexpected_keyword_argument":
        return ""
    at: Any = Config()
    for part in error["loc"][:-1]:
        at = getattr(at, str(part), None)
    if at is None:  # one of a list, which is empty by default
        return ""
    return f"; there are {', '.join(asdict(at))}"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"learner.lr": 4e-4, ...}``, secrets masked, for printing."""
    out: dict[str, Any] = {}
    for key, value in (asdict(config) if is_dataclass(config) and not isinstance(config, type) else config).items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and key != "weights":
            out |= flatten(value, name + ".")
        elif key == "database":
            out[name] = re.sub(r"//[^/]*@", "//***@", value)
        else:
            out[name] = "***" if key == "api_key" and value else value
    return out
