"""Where sessions lie between two runs of a server: one folder a tenant, one file in it a session.

Whose a file is stands in its header, so that it can be forgotten whether memory is on or off. It knows no tensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gradatim.errors import StoreError
from gradatim.memory.key_space import difference, made_with

log = logging.getLogger(__name__)
_UNSOUND = (OSError, SafetensorError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Whose a session is, and what it can be gone on from with."""

    tenant: str
    id: str
    base_sha256: str
    tokenizer_sha256: str
    users: set[str] = field(default_factory=set)  # who wrote in it
    episodes: set[str] = field(default_factory=set)  # that it was part of
    used_at: float = 0.0
    scope: str = ""  # of its first request

    def concerns(self, scope: str, value: str) -> bool:
        """Whether it is to go where that is forgotten."""
        return {
            "all": True,
            "tenant": value == self.tenant,
            "session": value == self.id,
            "user": value in self.users,
            "episode": value in self.episodes,
        }.get(scope, False)

    def header(self) -> dict[str, str]:
        told = [self.tenant, self.id, self.base_sha256, self.tokenizer_sha256]
        return {"about": json.dumps([*told, sorted(self.users), sorted(self.episodes), self.used_at, self.scope])}


def _about(header: Mapping[str, str]) -> About:
    tenant, session_id, base, tokenizer, users, episodes, used_at, *scope = json.loads(header["about"])
    return About(
        tenant=tenant,
        id=session_id,
        base_sha256=base,
        tokenizer_sha256=tokenizer,
        users=set(users),
        episodes=set(episodes),
        used_at=float(used_at),
        scope=str(*scope),  # earlier files have none
    )


class SessionFolder:
    """Below ``folder``, which need not be there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, tenant: str, session_id: str) -> Path:
        names = (hashlib.sha256(name.encode()).hexdigest()[:32] for name in (tenant, session_id))
        return self._folder / next(names) / f"{next(names)}.safetensors"

    def all(self) -> Iterator[tuple[Path, About, str]]:
        """Each file, whose it is, and which weights read it. One that cannot be read is logged and left out."""
        for path in sorted(self._folder.glob("*/*.safetensors")):
            try:
                with safe_open(path, framework="np") as file:
                    header = file.metadata() or {}
                found = path, _about(header), header["model"]
            except _UNSOUND as e:
                log.warning("%s is no sound session and is left aside: %s", path, e)
                continue
            yield found

    def tidy(self) -> None:
        """Remove what a process that was killed left half written. StoreError."""
        for path in self._folder.glob("*/.*"):
            self.remove(path)

    def unusable(self, ours: Mapping[str, str]) -> list[str]:
        """What was read with another model than ``ours``, and with which."""
        said = [
            difference(str(path), made_with(about.base_sha256, about.tokenizer_sha256), ours)
            for path, about, _ in self.all()
        ]
        return [one for one in said if one]

    def remove(self, path: Path) -> None:
        """StoreError where the disk refuses."""
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise StoreError(f"the session {path} cannot be removed: {e.strerror}") from e

    def forget(self, scope: str, value: str) -> set[tuple[str, str]]:
        """Remove what is to go: (tenant, id) of each. StoreError."""
        gone = set()
        for path, about, _ in list(self.all()):
            if about.concerns(scope, value):
                self.remove(path)
                gone.add((about.tenant, about.id))
        if scope == "all":
            for path in self._folder.glob("*/*"):
                self.remove(path)
        return gone
