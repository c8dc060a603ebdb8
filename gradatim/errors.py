"""Every error this package raises on purpose.

GradatimError
  ConfigError (ValueError)          the configuration cannot be used as written
  InUseError (RuntimeError)         another server holds this data directory, or the port is taken
  EngineError (RuntimeError)        generation failed
    PromptTooLongError (ValueError) the prompt leaves no room in the context window
    OverloadedError                 the queue is full; try again later
    UnknownAdapterError (KeyError)  that adapter is not loaded or does not exist
    ModelError                      the base model cannot be loaded
  StoreError (RuntimeError)         a record could not be read or written
    TransitionError                 an adapter may not move between those two stages
    ConflictError                   this id was already used for another target
    RecordError                     a record holds what no database can keep
    ForeignMemoryError              what is remembered was made with another model or tokenizer
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
