"""Models for the tests: a tiny random one that takes a second, and the real one where a test asks for it."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a model hub

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from gradatim.nn.base import Base

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are shared
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=100, help="of the slow test that kills the server; twice as many of the memory's"
    )


_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with a byte-level tokenizer: 258 tokens, 256 positions, as a transformers folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = _TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The tiny model, fp32 on the CPU."""
    from gradatim.nn.base import load_base

    return load_base(str(tiny_model_dir), tmp_path_factory.mktemp("tiny-data"), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2_data_dir() -> Path:
    """A data directory that stays between runs, so that the real model is converted once."""
    folder = Path(os.environ.get("GRADATIM_TEST_DATA") or Path(tempfile.gettempdir()) / f"gradatim-test-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_base(smollm2_data_dir: Path) -> Base:
    """SmolLM2-135M-Instruct, fp32 on the CPU. Skips where the package that ships it is not installed."""
    from gradatim.errors import ModelError
    from gradatim.nn.base import load_base

    try:
        return load_base("smollm2", smollm2_data_dir, dtype="float32", device="cpu")
    except ModelError as e:
        pytest.skip(str(e))
