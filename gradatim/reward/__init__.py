"""Many opinions on an episode -> one reward, or an abstention.

``WeightedReward`` is a transparent rule for the start; ``AuditedReward`` uses it until audited labels are enough to
learn the sources' reliabilities from, and to say how often it is wrong.
"""

from gradatim.reward.abstain import FAULT
from gradatim.reward.audited import FITTED, AuditedReward
from gradatim.reward.hidden import Hidden
from gradatim.reward.queue import Wanted, in_turns, queue, unheard
from gradatim.reward.weighted import WeightedReward

__all__ = ["FAULT", "FITTED", "AuditedReward", "Hidden", "Wanted", "WeightedReward", "in_turns", "queue", "unheard"]
