"""Messages to tokens and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.nn.base import Base
from gradatim.nn.render import Renderer

END = 257


@pytest.fixture(scope="module")
def renderer(tiny_base: Base) -> Renderer:
    return Renderer(tiny_base)


def rendered(renderer: Renderer, *messages: dict[str, Any]) -> str:
    return "".join(renderer.token_text(i) for i in renderer.prompt_ids(messages))


def test_messages_go_through_the_chat_template(renderer: Renderer) -> None:
    got = rendered(renderer, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert got == "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n"


def test_parts_developer_and_tool_messages_are_understood(renderer: Renderer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    got = rendered(
        renderer,
        {"role": "developer", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    )
    assert got.startswith("<|start|>system\nab<|end|>\n<|start|>assistant\n<|end|>\n<|start|>tool\n42<|end|>")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"content": "x"},
        {"role": 3, "content": "x"},
        {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["text"]},
    ],
)
def test_what_cannot_be_rendered_is_a_value_error(renderer: Renderer, message: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"messages\[0\]"):
        renderer.prompt_ids([message])


def test_no_messages_are_a_value_error(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match="empty"):
        renderer.prompt_ids([])


def test_an_answer_ends_with_the_end_of_turn_token(renderer: Renderer) -> None:
    ids = renderer.completion_ids("click(3)")
    assert ids[-1] == END and renderer.decode(ids) == "click(3)"
    assert renderer.completion_ids("") == (END,)


def test_an_empty_plain_prompt_is_the_start_token(renderer: Renderer) -> None:
    assert renderer.text_ids("") == (256,)
    assert renderer.decode(renderer.text_ids("abc")) == "abc"


def test_a_model_without_a_chat_template_says_so(tiny_base: Base) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_base.tokenizer)
    tokenizer.chat_template = None
    renderer = Renderer(replace(tiny_base, tokenizer=tokenizer))
    assert renderer.completion_ids("x")[-1] == END
    with pytest.raises(ValueError, match="completions"):
        renderer.prompt_ids([{"role": "user", "content": "x"}])


@settings(max_examples=50)
@given(text=st.text(max_size=20))
def test_streamed_pieces_make_the_whole_text_and_split_no_character(renderer: Renderer, text: str) -> None:
    stream = renderer.stream()
    ids = renderer.completion_ids(text)[:-1]
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == renderer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_comes_out_at_the_end(renderer: Renderer) -> None:
    stream = renderer.stream()
    first = renderer.completion_ids("é")[0]
    assert (stream.push(first), stream.flush()) == ("", "\ufffd")


def test_a_hint_stands_at_the_end_of_the_last_user_message(renderer: Renderer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "What now?"}]},
    ]
    ids = renderer.hinted_ids(renderer.prompt_ids(messages), messages, " try 2 ")
    assert "".join(renderer.token_text(i) for i in ids).endswith(
        "<|end|>\n<|start|>user\nWhat now?\n\nHint: try 2<|end|>\n<|start|>assistant\n"
    )


def test_what_comes_before_a_hint_stays_as_it_was_captured(renderer: Renderer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    plain = renderer.prompt_ids(messages)
    captured = (5, 6, 7, *plain)  # a template that the messages do not show, such as one with tools
    assert renderer.hinted_ids(captured, messages, "x")[: 3 + len(plain) - 14] == captured[: 3 + len(plain) - 14]
    assert renderer.hinted_ids(captured, messages, "x")[3:] == renderer.hinted_ids(plain, messages, "x")


def test_no_hint_where_there_is_no_place_for_it(renderer: Renderer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    plain = renderer.prompt_ids(messages)
    assert renderer.hinted_ids(plain, [], "x") == ()
    assert renderer.hinted_ids(plain, [{"role": "system", "content": "Hi"}], "x") == ()
    assert renderer.hinted_ids((*plain[:-3], 9, 9, 9), messages, "x") == ()
    assert renderer.hinted_ids(plain[-2:], messages, "x") == ()
    assert renderer.hinted_ids(plain, [{"role": "user", "content": [{"type": "image_url"}]}], "x") == ()
