"""Loading the base model: sharing, digests, and what is no model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradatim.errors import ModelError
from gradatim.nn.base import Base, load_base, weights_digest


def mapped_files() -> dict[str, list[tuple[int, int]]]:
    out: dict[str, list[tuple[int, int]]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        low, _, high = span.partition("-")
        out.setdefault(name, []).append((int(low, 16), int(high, 16)))
    return out


def test_a_model_is_frozen_and_says_what_it_is(tiny_base: Base) -> None:
    assert tiny_base.context_tokens == 256
    assert tiny_base.eos_ids == {257}
    assert (tiny_base.dtype, tiny_base.device) == (torch.float32, torch.device("cpu"))
    assert not tiny_base.model.training
    assert not any(p.requires_grad for p in tiny_base.model.parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at Linux's memory maps")
def test_weights_are_views_of_the_file_in_the_page_cache(tiny_base: Base, tiny_model_dir: Path) -> None:
    spans = mapped_files()[str(tiny_model_dir / "model.safetensors")]
    for weight in tiny_base.model.parameters():
        assert any(low <= weight.data_ptr() < high for low, high in spans)
    assert tiny_base.model.lm_head.weight.data_ptr() == tiny_base.model.model.embed_tokens.weight.data_ptr()


def test_the_digest_is_of_the_weights_and_is_remembered(tiny_base: Base, tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir, copy)
    assert load_base(str(copy), tmp_path, dtype="float32", device="cpu").sha256 == tiny_base.sha256
    (remembered,) = (tmp_path / "models" / "digests").iterdir()
    remembered.write_text("f" * 64)
    assert load_base(str(copy), tmp_path, dtype="float32", device="cpu").sha256 == "f" * 64
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = load_base(str(copy), tmp_path, dtype="float32", device="cpu")
    assert changed.sha256 == weights_digest(changed.model) != tiny_base.sha256


def test_another_dtype_has_another_digest(tiny_base: Base, tiny_model_dir: Path, tmp_path: Path) -> None:
    half = load_base(str(tiny_model_dir), tmp_path, dtype="bfloat16", device="cpu")
    assert half.dtype is half.model.dtype is torch.bfloat16
    assert half.sha256 != tiny_base.sha256


def test_what_is_no_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "none such"}')
    for name, why in (("empty", "config.json"), ("file", "folder"), ("missing", "does not exist"), ("broken", "load")):
        with pytest.raises(ModelError, match=why):
            load_base(str(tmp_path / name), tmp_path, device="cpu")


def test_a_truncated_weights_file_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir, copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load_base(str(copy), tmp_path, device="cpu")


def test_unknown_dtypes_and_devices_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dtype"):
        load_base(str(tiny_model_dir), tmp_path, dtype="int3", device="cpu")
    with pytest.raises(ModelError, match="device"):
        load_base(str(tiny_model_dir), tmp_path, device="abacus")


def test_the_bundled_model_is_converted_once(smollm2_base: Base, smollm2_data_dir: Path) -> None:
    assert smollm2_base.context_tokens == 8192
    assert smollm2_base.sha256 == load_base("smollm2", smollm2_data_dir, dtype="float32", device="cpu").sha256
    assert not list((smollm2_data_dir / "models").glob(".smollm2*")), "no half-made folder is left"
