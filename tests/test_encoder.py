"""Situations told apart by a sentence encoder: a real, tiny sentence-transformers model, made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gradatim.app import compose
from gradatim.app.memory import TextPlacer
from gradatim.config import MemoryConfig
from gradatim.errors import ConfigError, MemoryKeyError
from gradatim.memory.key_space import KeySpace, Turn, from_bytes, sentence
from gradatim.memory.recall import actions_of, floor_of
from gradatim.nn.base import Base
from gradatim.nn.render import Renderer
from gradatim.nn.sentences import SentenceEncoder, asked_in
from gradatim.store import SqlShelf
from gradatim.testing.records import a_step
from gradatim.types import EpisodeId, MemoryEntry, MemoryKey, StepId
from tests.test_memory_served import product, settings, text

WORDS = ("the", "parcel", "box", "never", "came", "refund", "my", "card", "please", "where")
DIMS = 16


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights: a bag of words, near enough."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=DIMS,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    # where nothing else is said, the vector of a text is the mean of its tokens
    BertModel(shape).save_pretrained(folder / "bert")
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder / "bert")
    return str(folder / "bert")


def test_a_text_has_one_vector_of_length_1_and_an_encoder_one_digest(encoder: str) -> None:
    one, again = SentenceEncoder(encoder), SentenceEncoder(encoder)
    vector = one.vector("the parcel never came")
    assert vector.shape == (DIMS,) and np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_array_equal(vector, again.vector("the parcel never came"))
    assert not np.allclose(vector, one.vector("refund my card"))
    assert one.sha256 == again.sha256 and len(one.sha256) == 64


def test_what_is_no_encoder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory\.encoder = .*nothing"):
        SentenceEncoder(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("messages", "asked"),
    [
        (None, "prompt"),
        ([], "prompt"),
        ([{"role": "system", "content": "be brief"}, {"role": "user", "content": "where?"}], "where?"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "user", "content": ""}], "prompt"),
        ([{"role": "user", "content": "where?"}, {"role": "assistant", "content": None}], "where?"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "prompt"),
    ],
)
def test_what_is_asked_is_the_last_message(messages: list[dict[str, object]] | None, asked: str) -> None:
    assert asked_in(messages, "prompt") == asked


def test_keys_of_sentences_are_of_length_1_and_of_their_own_space() -> None:
    space = KeySpace("base", "tokens", (), sentence("e" * 64))
    key = space.key(np.array([3.0, 4.0]))
    assert key.tolist() == pytest.approx([0.6, 0.8], abs=1e-3)
    poolings = (Turn(), sentence("f" * 64), sentence("e" * 64))
    assert [space.id == KeySpace("base", "tokens", (), p).id for p in poolings] == [False, False, True]
    for bad in ([0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(MemoryKeyError):
            space.key(np.array(bad))


def test_two_wordings_of_one_thing_count_in_full_among_sentences() -> None:
    own, encoded = MemoryConfig(), MemoryConfig(encoder="x")
    assert floor_of(encoded) < floor_of(own)
    said = MemoryEntry(
        id="s+",
        tenant="",
        user="",
        episode_id=EpisodeId("e"),
        step_id=StepId("s"),
        created_at=0.0,
        tokens=(1, 2),
        value=1.0,
    )
    evidence = {
        (config.encoder, cosine): actions_of([(said, cosine)], config)[0].evidence
        for config in (own, encoded)
        for cosine in (0.5, 0.7, 1.0)
    }
    assert evidence["x", 0.7] == evidence["x", 1.0] == evidence["", 1.0]
    assert evidence["", 0.5] < evidence["x", 0.5] < evidence["x", 0.7]


async def test_a_correction_acts_by_the_encoders_key_and_the_engine_looks_for_none(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path, encoder: str
) -> None:
    config = settings(tiny_model_dir, tmp_path, decisions=True, encoder=encoder)
    assert compose.key_layers(config, tiny_base) == ()
    async with product(tiny_base, config) as served:
        first = await served.ask("the parcel never came", user="alice")
        await served.say(response_id=first["id"], kind="correction", correction="left", source="human:a")
        second = await served.ask("the parcel never came", user="alice")
        assert text(second) == "left" and second["gradatim"]["memory"]["near"] == 2  # what was said, and what is right
        plain = await served.http.post("/v1/completions", json={"model": "agent", "prompt": "where", "max_tokens": 2})
        assert plain.status_code == 200
        (kept,) = SqlShelf(served.store.engines).load(MemoryKey)
        assert len(from_bytes(kept.key)) == DIMS
    async with product(tiny_base, config) as served:  # after a restart
        assert text(await served.ask("the parcel never came", user="alice")) == "left"


async def test_a_step_lies_where_its_request_lay(tiny_base: Base, encoder: str) -> None:
    """Whose key is made anew, of messages or of a plain prompt; also where no message has a text."""
    renderer = Renderer(tiny_base)
    placer = TextPlacer(SentenceEncoder(encoder), renderer)
    for messages in ((), ({"role": "user", "content": "my card"},), ({"role": "user", "content": ""},)):
        asked = await placer.of(messages or None, None if messages else "the parcel")
        ids = renderer.prompt_ids(messages) if messages else renderer.more_ids("the parcel")
        step = a_step("s", messages=messages, prompt_ids=ids)
        np.testing.assert_array_equal(await placer.step(step, step.adapter_id), asked)


async def test_keys_of_the_models_own_states_give_way_to_the_encoders(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path, encoder: str
) -> None:
    async with product(tiny_base, settings(tiny_model_dir, tmp_path, decisions=True)) as served:
        first = await served.ask("refund my card", user="alice")
        await served.say(response_id=first["id"], kind="correction", correction="left", source="human:a")
    async with product(tiny_base, settings(tiny_model_dir, tmp_path, decisions=True, encoder=encoder)) as served:
        await served.ask("please", user="alice")
        for _ in range(100):
            if not served.remembering.kept.unkeyed(1):
                break
            await served.remembering.follower.turn()  # type: ignore[union-attr]
        assert text(await served.ask("refund my card", user="alice")) == "left"


async def test_what_is_shown_is_found_by_the_encoder(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path, encoder: str
) -> None:
    async with product(tiny_base, settings(tiny_model_dir, tmp_path, retrieval=True, encoder=encoder)) as served:
        first = await served.ask("where", user="alice")
        await served.say(response_id=first["id"], kind="correction", correction="left", source="human:a")
        second = await served.ask("where", user="alice")
        (shown,) = second["gradatim"]["memory"]["retrieved"]
        assert shown["cosine"] == pytest.approx(1.0, abs=1e-3)
        assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


async def test_without_memory_no_encoder_is_loaded(tiny_model_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    async with product(tiny_base, settings(tiny_model_dir, tmp_path, encoder="/nowhere")) as served:
        assert "memory" not in (await served.ask("where"))["gradatim"]
