"""The figures of the reward: said once by who judges, shown on status and as metrics without reading the records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gradatim.app import report
from gradatim.app.figures import WINDOW, Sayer, said, show_reward
from gradatim.app.home import Home
from gradatim.config import Config, RewardConfig
from gradatim.reward import FAULT, AuditedReward
from gradatim.store import SqlStore, open_store
from gradatim.types import EpisodeId, Feedback, Reward

from .records import adapter, feedback, step

CONFIG = RewardConfig(min_labels=60, risk=0.2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "s.db") as opened:
        yield opened


def fill(store: SqlStore, n: int, audited: int) -> None:
    for i in range(n):
        name, sign = f"e{i}", 1.0 if i % 3 else -1.0
        store.append(step(f"s{i}", name), feedback("score", name, value=sign, source="judge:j"))
        if i < audited:
            store.append(feedback("outcome", name, value=sign, source="human:audit-kim"))


def judged(i: int, value: float | None, reason: str = "") -> Reward:
    return Reward(episode_id=EpisodeId(f"r{i}"), created_at=1.0, value=value, confidence=0.5, reason=reason)


def metrics(home: Home) -> str:
    registry = CollectorRegistry()
    show_reward(home, registry)
    return generate_latest(registry).decode()


def test_before_anything_was_judged_there_are_none(tmp_path: Path, store: SqlStore) -> None:
    assert said(Home(tmp_path), 0) is None
    assert "gradatim_reward" not in metrics(Home(tmp_path))


def test_status_and_metrics_show_what_the_judging_process_said(
    tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, 150, 120)
    store.append(adapter(0), judged(0, None), judged(1, -1.0, f"{FAULT}: its last answer is empty"), judged(2, 1.0))
    model = AuditedReward(store, CONFIG)
    model.follow(store.end())
    Sayer(store, Home(tmp_path), model)()
    read: list[Any] = []
    genuine = SqlStore.read

    def counted(self: SqlStore, kind: Any, **where: Any) -> Any:
        read.append(kind)
        return genuine(self, kind, **where)

    monkeypatch.setattr(SqlStore, "read", counted)
    shown = report.learning(store, Config(data_dir=tmp_path))["reward"]
    assert read and Feedback not in read
    assert shown["rule"] == "calibrated" and shown["why"] == "fitted to 120 audited labels"
    assert shown["abstain_rate"] == shown["fault_rate"] == pytest.approx(1 / 3)
    assert [row["source"] for row in shown["sources"]] == ["judge:j"]
    json.dumps(shown, allow_nan=False)
    text = metrics(Home(tmp_path))
    assert "gradatim_reward_calibrated 1.0" in text
    assert "gradatim_reward_audited_labels 120.0" in text
    assert f"gradatim_reward_ece {shown['ece']}" in text
    assert 'gradatim_reward_source_reliability{family="judge"}' in text
    assert "judge:j" not in text
    assert 'gradatim_reward_faults{behaviour="its last answer is empty"} 0.33' in text
    assert "window_ece " not in text  # no label came after a reward


def test_only_the_newest_rewards_count(tmp_path: Path, store: SqlStore) -> None:
    store.append(*(judged(i, None) for i in range(WINDOW)))
    sayer = Sayer(store, Home(tmp_path), AuditedReward(store, CONFIG))
    store.append(*(judged(i, 1.0) for i in range(WINDOW // 4)))
    sayer()
    again = Sayer(store, Home(tmp_path), AuditedReward(store, CONFIG))
    for figures in (Home(tmp_path).said("reward"), again._rates()):
        assert (figures["window_rewards"], figures["abstain_rate"]) == (WINDOW, 0.75)


def test_figures_of_other_records_are_not_shown(tmp_path: Path, store: SqlStore) -> None:
    fill(store, 5, 0)
    model = AuditedReward(store, CONFIG)
    model.follow(store.end())
    Sayer(store, Home(tmp_path), model)()
    assert said(Home(tmp_path), store.end()) is not None
    assert said(Home(tmp_path), 1) is None
