"""Where the stores of a token memory lie between two runs of a server: one folder a tenant, one in it a key space.

What lies there is derived. A folder that is gone costs a new reading of that tenant's answers, so whatever is to be
forgotten takes the whole folder with it. It knows no keys, only what they were made with; it is at hand where memory is
off, too.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import uuid
from collections.abc import Mapping, Set
from pathlib import Path

from gradatim.errors import StoreError
from gradatim.memory import token_file
from gradatim.memory.key_space import difference

log = logging.getLogger(__name__)


class TokenFolders:
    """Below ``folder``, which need not be there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, tenant: str, space_digest: str) -> Path:
        return self._of(tenant) / space_digest[:32]

    def keep(self, tenant: str, space_digests: Set[str]) -> None:
        """Remove what that tenant has in other spaces: of weights that answer no more."""
        kept = {self.path(tenant, digest) for digest in space_digests}
        folder = self._of(tenant)
        for path in folder.iterdir() if folder.exists() else ():
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)  # it is tried again

    def drop(self, tenant: str, entry_id: str) -> None:
        """Nothing of that entry is kept when this returns, nor of the tenant's others. A fault is logged."""
        folder = self._of(tenant)
        gone = folder.with_name(f".{uuid.uuid4().hex}")  # at once: it may be written to meanwhile
        try:
            folder.rename(gone)
        except FileNotFoundError:
            return
        except OSError as e:
            log.error("the token memory of a tenant cannot be removed, with %s in it: %s", entry_id, e)
            return
        _remove(gone)

    def prune(self, remembered: Set[str]) -> None:
        """Drop every tenant of whom something lies there that is no entry of these, or cannot be read: a process that
        was killed had forgotten it, and not removed it here. So with what it left half written."""
        for folder in self._folder.glob("*"):
            for path in folder.glob("*/.*"):
                _remove(path)
            if folder.name.startswith(".") or not all(_holds_only(remembered, path) for path in folder.glob("*")):
                _remove(folder)

    def unusable(self, ours: Mapping[str, str]) -> list[str]:
        """What lies there and cannot be used, and why: made with something else than ``ours``, or damaged."""
        out = []
        for file in sorted(self._folder.glob(f"*/*/{token_file.TRUTH_FILE}")):
            try:
                out.append(difference(str(file.parent), token_file.about(file.parent)[0], ours))
            except StoreError as e:
                out.append(str(e))
        return [said for said in out if said]

    def _of(self, tenant: str) -> Path:
        return self._folder / hashlib.sha256(tenant.encode()).hexdigest()[:32]


def _holds_only(remembered: Set[str], path: Path) -> bool:
    try:
        return token_file.about(path)[1] <= remembered
    except StoreError as e:
        log.warning("a token memory is made anew: %s", e)
        return False


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError as e:
        log.error("%s, with what was forgotten, cannot be removed: %s", path, e)
