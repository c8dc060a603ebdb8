"""What kind of task a request is, as its instructions say: a digest of its system part.

What was judged under one set of instructions says nothing of answers under another, however alike two questions are.
Digits, and names of days and months, do not count: many instructions tell the date. Knows no words besides these, so
instructions that name a user or carry a document are a scope of their own.
"""

from __future__ import annotations

import calendar
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from gradatim.types import Message

ROLES = ("system", "developer")  # of messages that instruct
_NAMES = {name.lower() for names in (calendar.day_name, calendar.month_name) for name in names if name}
_VARYING = re.compile(rf"\b({'|'.join(sorted(_NAMES))})\b|[0-9]+")


def scope_of(messages: Sequence[Message]) -> str:
    """16 hexadecimal digits; "" where nothing instructs."""
    told = [_text(m.get("content")) for m in messages if m.get("role") in ROLES]
    words = _VARYING.sub("#", "\n".join(told).lower()).split()
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16] if words else ""


def _text(content: Any) -> str:
    """Content is a string, or a list of parts."""
    if isinstance(content, list | tuple):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
