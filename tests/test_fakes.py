"""The fakes keep the contracts that they stand in for."""

from __future__ import annotations

import pytest

from gradatim.testing.fakes import FakeStore
from gradatim.testing.store import STORE_CHECKS, Check


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
def test_the_store_in_memory_is_a_store(check: Check) -> None:
    stores: dict[str, FakeStore] = {}
    check(lambda name: stores.setdefault(name, FakeStore()))
