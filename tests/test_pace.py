"""How fast is learned after the world changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradatim.config import DriftConfig
from gradatim.learner.pace import Pace
from gradatim.store import open_store
from gradatim.types import DRIFT, AdapterId, Decision, Update, Verdict


def changed(adapt: float) -> Verdict:
    numbers = {"world": 1.0, "adapt": adapt}
    return Verdict(
        adapter_id=AdapterId("agent@0"), created_at=1.0, gate=DRIFT, decision=Decision.PASS, evidence=numbers
    )


@pytest.mark.parametrize(("react", "adapt"), [("adapt", 1.0), ("adapt", 0.0), ("observe", 1.0)])
def test_a_few_updates_after_the_world_changed_are_faster(tmp_path: Path, react: str, adapt: float) -> None:
    with open_store(tmp_path / "s.db") as store:
        pace = Pace(store, DriftConfig(react="adapt" if react == "adapt" else "observe", haste=3.0, haste_updates=2))
        seen = [pace()]
        store.append(changed(adapt))
        for i in range(3):
            seen.append(pace())
            store.append(Update(id=f"u{i}", created_at=2.0, applied=True, parent_id=AdapterId("agent@0")))
    fast = 3.0 if react == "adapt" and adapt else 1.0
    assert seen == [1.0, fast, fast, 1.0]
