"""The request path: OpenAI's API, feedback, and what an operator asks, over HTTP.

It turns requests into steps and opinions into feedback, and writes both to the store before it answers. It knows
protocols only: not which engine generates, which database records, or that anything is ever learned from it.
"""

from gradatim.server.admin import Admin
from gradatim.server.app import build_app
from gradatim.server.metrics import Metrics

__all__ = ["Admin", "Metrics", "build_app"]
