"""What a follower of the log has come to, in a file beside the records, so that a start need not read it all again.

Derived: it may be deleted, and one that cannot be used costs only the time of reading the log. It knows nothing of what
it keeps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StateFile:
    """``path`` is None where nothing is kept."""

    path: Path | None

    def save(self, state: Mapping[str, Any]) -> None:
        """A disk that refuses is logged, and the file stays as it was."""
        if self.path is None:
            return
        part = self.path.with_suffix(".part")
        try:
            part.write_text(json.dumps(state))
            part.replace(self.path)
        except OSError as e:
            log.warning("%s cannot be written: %s", self.path, e.strerror)

    def load(self, restore: Callable[[Mapping[str, Any]], None]) -> bool:
        """Whether ``restore`` took what is there; where it may have taken a part, the caller begins anew."""
        if self.path is None or not self.path.exists():
            return True
        try:
            restore(json.loads(self.path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as e:
            log.warning("%s cannot be used (%s); the log is read from its beginning", self.path, e)
            return False
        return True
