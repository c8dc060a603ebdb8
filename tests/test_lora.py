"""Adapters in files and on models."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradatim.errors import AdapterError, ModelError
from gradatim.nn import lora
from gradatim.nn.lora import Lora, LoraWeights, digest, fresh_weights, linear_paths, read_adapter, write_adapter
from tests.tiny import tiny_model, tiny_weights

IDS = torch.arange(1, 10)[None]  # (1, T)


def written(folder: Path, seed: int = 0) -> tuple[LoraWeights, str]:
    weights = tiny_weights(tiny_model(), seed)
    return weights, write_adapter(folder, weights, 8, "tiny")


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    weights, sha = written(tmp_path / "a")
    found = read_adapter(tmp_path / "a", sha)
    assert digest(found) == sha == digest(weights)
    assert found.rank == 4 and found.scaling == 2.0
    assert all(torch.equal(found.modules[p][1], b) for p, (_, b) in weights.modules.items())
    assert os.listdir(tmp_path) == ["a"]


def test_the_digest_names_weights_rank_and_alpha() -> None:
    weights = tiny_weights(tiny_model())
    assert digest(weights) == digest(LoraWeights(4, 2.0, dict(sorted(weights.modules.items(), reverse=True))))
    assert digest(weights) != digest(LoraWeights(4, 1.0, weights.modules))
    assert digest(weights) != digest(tiny_weights(tiny_model(), seed=1))


def test_peft_reads_our_files_and_computes_the_same(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_model()
    weights, _ = written(tmp_path / "a")
    branches = Lora(model)
    branches.load(weights)
    with torch.no_grad():
        ours = model(IDS).logits
        branches.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = PeftModel.from_pretrained(model, str(tmp_path / "a")).eval()(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_we_read_what_peft_writes(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(tiny_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
        theirs.save_pretrained(str(tmp_path / "a"))
    found = read_adapter(tmp_path / "a")
    assert len(found.modules) == 4 and found.scaling == 2.0


def damage_config(folder: Path) -> None:
    (folder / lora.CONFIG_FILE).write_text("{")


def other_variant(folder: Path) -> None:
    config = json.loads((folder / lora.CONFIG_FILE).read_text())
    (folder / lora.CONFIG_FILE).write_text(json.dumps(config | {"use_dora": True}))


def other_rank(folder: Path) -> None:
    config = json.loads((folder / lora.CONFIG_FILE).read_text())
    (folder / lora.CONFIG_FILE).write_text(json.dumps(config | {"r": 8}))


def truncate(folder: Path) -> None:
    data = (folder / lora.WEIGHTS_FILE).read_bytes()
    (folder / lora.WEIGHTS_FILE).write_bytes(data[:-10])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / lora.WEIGHTS_FILE).read_bytes())
    data[-3] ^= 1
    (folder / lora.WEIGHTS_FILE).write_bytes(data)


def lose_weights(folder: Path) -> None:
    (folder / lora.WEIGHTS_FILE).unlink()


@pytest.mark.parametrize("damage", [damage_config, other_variant, other_rank, truncate, flip_a_bit, lose_weights])
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    _, sha = written(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(AdapterError):
        read_adapter(tmp_path / "a", sha)


def test_a_missing_folder_and_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot read"):
        read_adapter(tmp_path / "none")
    weights = tiny_weights(tiny_model())
    next(iter(weights.modules.values()))[1][0, 0] = float("nan")
    write_adapter(tmp_path / "nan", weights, 8, "tiny")
    with pytest.raises(AdapterError, match="not finite"):
        read_adapter(tmp_path / "nan")


def test_writing_again_is_idempotent_and_never_replaces(tmp_path: Path) -> None:
    weights, sha = written(tmp_path / "a")
    assert write_adapter(tmp_path / "a", weights, 8, "tiny") == sha
    with pytest.raises(AdapterError, match="digest"):
        written(tmp_path / "a", seed=1)
    assert digest(read_adapter(tmp_path / "a")) == sha


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterError, match="No space left"):
        written(tmp_path / "adapters" / "a")
    assert os.listdir(tmp_path / "adapters") == []


def test_extra_state_has_its_own_digest(tmp_path: Path) -> None:
    weights = tiny_weights(tiny_model())
    state = {"exp_avg": torch.ones(3, dtype=torch.bfloat16), "step": torch.tensor(4.0)}
    sha = write_adapter(tmp_path / "a", weights, 8, "tiny", state)
    assert sha == digest(weights)
    assert torch.equal(lora.read_state(tmp_path / "a")["exp_avg"], state["exp_avg"])
    (tmp_path / "a" / lora.STATE_FILE).write_bytes(b"junk")
    with pytest.raises(AdapterError, match="does not match"):
        lora.read_state(tmp_path / "a")
    assert digest(read_adapter(tmp_path / "a", sha)) == sha
    shutil.rmtree(tmp_path / "a")
    write_adapter(tmp_path / "a", weights, 8, "tiny")
    assert lora.read_state(tmp_path / "a") == {}


def test_a_fresh_adapter_changes_nothing_and_none_is_bit_identical() -> None:
    model = tiny_model()
    with torch.no_grad():
        plain = model(IDS).logits
        branches = Lora(model)
        branches.load(fresh_weights(model, 4, 8, 0))
        assert torch.equal(model(IDS).logits, plain)
        branches.load(tiny_weights(model))
        assert not torch.equal(model(IDS).logits, plain)
        with branches.disabled():
            assert torch.equal(model(IDS).logits, plain)
        branches.load(None)
        assert torch.equal(model(IDS).logits, plain)


def test_all_linear_layers_but_the_head_are_adapted() -> None:
    paths = linear_paths(tiny_model())
    assert len(paths) == 14
    assert "model.layers.0.self_attn.q_proj" in paths and "lm_head" not in paths
    with pytest.raises(ModelError, match="no nn"):
        linear_paths(torch.nn.Embedding(3, 3))


def test_gradients_are_those_of_the_formula() -> None:
    """y = W x + s B A x, differentiated by hand."""
    linear = torch.nn.Sequential(torch.nn.Linear(5, 3))
    a, b, x = torch.randn(2, 5), torch.randn(3, 2), torch.randn(7, 5)
    branches = Lora(linear)
    branches.load(LoraWeights(2, 0.5, {"0": (a, b)}), trainable=True)
    linear(x).sum().backward()
    ones = torch.ones(7, 3)
    grad = branches.flat.grad
    assert grad is not None
    torch.testing.assert_close(grad[:10].view(2, 5), 0.5 * (ones @ b).t() @ x)
    torch.testing.assert_close(grad[10:].view(3, 2), 0.5 * ones.t() @ (x @ a.t()))
    assert linear[0].weight.grad is None


def test_an_adapter_of_another_model_is_refused() -> None:
    branches = Lora(tiny_model())
    with pytest.raises(ModelError, match="another shape"):
        branches.load(tiny_weights(tiny_model(key_heads=4)))
    with pytest.raises(ModelError, match="no layer"):
        branches.load(LoraWeights(1, 1.0, {"layer": (torch.ones(1, 1), torch.ones(1, 1))}))


def test_changes_to_the_flat_vector_change_the_weights_that_come_out() -> None:
    model = tiny_model()
    weights = tiny_weights(model)
    branches = Lora(model)
    branches.load(weights, trainable=True)
    branches.flat.mul_(2.0)
    made = branches.weights()
    assert made is not None and digest(made) != digest(weights)
    assert all(torch.equal(made.modules[p][0], 2 * a) for p, (a, _) in weights.modules.items())
