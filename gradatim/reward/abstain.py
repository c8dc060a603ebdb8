"""When an episode cannot be judged: whose fault that is, and whether what was judged kept the stated risk.

An abstention is worth nothing, and never trained on; but an agent that makes its own work unjudgeable is not let off.
Knows neither sources nor statistics of them.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from gradatim.stats.learn_then_test import log_evidence
from gradatim.types import Episode

FAULT_VALUE = -1.0  # of an episode that nobody can judge because of how the agent answered: as of one that failed, or
# it would pay to be unjudgeable wherever failing is likely
FAULT = "unjudgeable by its own doing"  # so begins the reason of its reward
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_POLITE = re.compile(
    r"\b(?:else|further|more help|other questions?|does (?:that|this) help)\b[^.!?]*\?$", re.IGNORECASE
)
_ALARM = math.log(20.0)  # evidence against the stated risk: a false alarm has a chance of 1 in 20, ever


def fault(episode: Episode) -> str:
    """What the agent did that makes an episode unjudgeable; empty where nothing is its fault."""
    if not episode.steps:
        return ""
    last = episode.steps[-1]
    if last.finish_reason == "aborted":
        return ""
    if not last.text.strip():
        return "its last answer is empty"
    if last.finish_reason == "length":
        return "its last answer was cut off at its length"
    if _is_broken_call(last.text):
        return "its last answer is a tool call that cannot be read"
    if _only_asks(last.text):
        return "it asked back, and nobody answered"
    if len(episode.steps) > 2 and len({step.completion_ids for step in episode.steps[-3:]}) == 1:
        return "it said the same three times in a row"
    return ""


def _is_broken_call(text: str) -> bool:
    """It begins a tool call that is not closed, or is not JSON with a name."""
    if text.count("<tool_call>") != text.count("</tool_call>"):
        return True
    return not all(_names_a_tool(raw) for raw in _CALL.findall(text))


def _names_a_tool(raw: str) -> bool:
    try:
        call = json.loads(raw)
    except ValueError:
        return False
    return isinstance(call, dict) and isinstance(call.get("name"), str)


def _only_asks(text: str) -> bool:
    """Its end is a question, and not the polite one (in English) at the end of an answer."""
    said = text.strip()
    return said.endswith(("?", "\N{FULLWIDTH QUESTION MARK}")) and not _POLITE.search(said)


@dataclass(slots=True)
class Watch:
    """Whether rewards kept the risk, by audited labels that came after them. After an alarm it starts anew."""

    risk: float
    judged: int = 0
    wrong: int = 0

    def see(self, wrong: bool) -> bool:
        """One label of an episode that had a reward. True where the risk is no longer kept."""
        self.judged += 1
        self.wrong += wrong
        if log_evidence(self.wrong, self.judged, self.risk) <= _ALARM:
            return False
        self.judged = self.wrong = 0
        return True
