"""One reward for an episode -> one advantage per step."""

from gradatim.credit.horizon import HorizonCredit
from gradatim.credit.outcome import OutcomeCredit

__all__ = ["HorizonCredit", "OutcomeCredit"]
