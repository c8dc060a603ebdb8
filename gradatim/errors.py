"""Every error this package raises on purpose.

GradatimError
  ConfigError (ValueError)          the configuration cannot be used as written
  InUseError (RuntimeError)         another server holds this data directory, or the port is taken
  EngineError (RuntimeError)        generation failed
    PromptTooLongError (ValueError) the prompt leaves no room in the context window
    OverloadedError                 the queue is full; try again later
    UnknownAdapterError (KeyError)  that adapter is not loaded or does not exist
    ModelError                      the base model cannot be loaded
  SessionError (RuntimeError)       a session cannot be gone on from now
    UnknownSessionError             there is none of that name
  StoreError (RuntimeError)         a record could not be read or written
    TransitionError                 an adapter may not move between those two stages
    ConflictError                   this id was already used for another target
    RecordError                     a record holds what no database can keep
    ForeignMemoryError              what is remembered was made with another model or tokenizer
  FeedbackError (RuntimeError)      the server took no feedback from this client; nothing was recorded
  CriticError (RuntimeError)        a critic could not judge; its verdict is unknown
    SandboxError                    this machine has no sandbox, or the command could not be run in it
  MemoryKeyError (ValueError)       a key of a memory is no vector of numbers
  LearnerError (RuntimeError)       an update could not be made; serving is unaffected
    AdapterError                    an adapter's files are missing or do not match their digest
      DamagedAdapterError           the same, of an adapter that is named; trying again will not help
"""


class GradatimError(Exception):
    """Base of the tree: catch this to catch everything that is raised on purpose."""


class ConfigError(GradatimError, ValueError):
    """The configuration cannot be used as written."""


class InUseError(GradatimError, RuntimeError):
    """Another server holds this data directory, or the port is taken."""


class EngineError(GradatimError, RuntimeError):
    """Generation failed."""


class PromptTooLongError(EngineError, ValueError):
    """The prompt leaves no room in the context window."""


class InvalidRequestError(EngineError, ValueError):
    """The messages cannot be rendered, or an option is out of this model's range."""


class OverloadedError(EngineError):
    """The queue is full; the request may be retried."""


class UnknownAdapterError(EngineError, KeyError):
    """That adapter is not loaded, or does not exist."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class ModelError(EngineError):
    """The base model cannot be loaded."""


class SessionError(GradatimError, RuntimeError):
    """A session cannot be gone on from now: another request has it, or it was forgotten."""


class UnknownSessionError(SessionError):
    """There is no session of that name: it never was, or it was evicted or forgotten."""


class StoreError(GradatimError, RuntimeError):
    """A record could not be read or written."""


class TransitionError(StoreError):
    """An adapter may not move between those two stages."""


class ConflictError(StoreError):
    """This id was already used for another target."""


class RecordError(StoreError):
    """A record holds what no database can keep."""


class ForeignMemoryError(StoreError):
    """What is remembered was made with another base model or tokenizer: its tokens mean something else."""


class FeedbackError(GradatimError, RuntimeError):
    """The server took no feedback from this client. ``status`` is its answer's, 0 where none came."""

    def __init__(self, message: str, *, status: int = 0, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class CriticError(GradatimError, RuntimeError):
    """A critic could not judge. Its verdict is unknown, which is never a bad mark."""


class SandboxError(CriticError):
    """This machine has no sandbox, or the command could not be run in it. Nothing was run."""


class MemoryKeyError(GradatimError, ValueError):
    """A key of a memory is no vector of finite numbers, or has another width."""


class LearnerError(GradatimError, RuntimeError):
    """An update could not be made; serving is unaffected."""


class AdapterError(LearnerError):
    """An adapter's files are missing, or do not match their digest."""


class DamagedAdapterError(AdapterError):
    """The files of ``adapter_id`` are damaged for good: trying again will not help."""

    def __init__(self, adapter_id: str, message: str) -> None:
        super().__init__(message)
        self.adapter_id = adapter_id
