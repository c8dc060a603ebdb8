"""LoRA adapters (Hu 2021, arXiv:2106.09685): y = W x + (alpha / r) B A x, with W frozen.

Two halves. Files: adapters in PEFT's folder format, written so that a crash leaves either the whole adapter or
none, read with every doubt turned into AdapterError, and named by a digest of their weights. Training: ``Lora``
hangs fp32 branches on the linear layers of any decoder, whose weights stay frozen and are never merged into: a
young adapter added to bf16 weights is rounded away.

It knows nothing of losses, examples, stages or which adapter is live.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from gradatim.errors import AdapterError, ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
STATE_FILE = "optimizer.safetensors"  # beside the adapter, not part of its digest
STATE_DIGEST_FILE = "optimizer.sha256"
FISHER_FILE = "fisher.safetensors"  # likewise: what elastic weight consolidation keeps of the adapter's past
FISHER_DIGEST_FILE = "fisher.sha256"
TMP_PREFIX = ".tmp-"  # a folder so named was being written when its process died

_PREFIX = "base_model.model."  # PEFT's, in front of the module's own path


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter in memory. ``modules`` maps a module's path, as in ``model.named_modules()``, to (A, B)."""

    rank: int
    scaling: float  # alpha / rank
    modules: Mapping[str, tuple[Tensor, Tensor]]  # A (r, in), B (out, r), fp32


# ----------------------------------------------------------------------------------------------- digest


def digest(weights: LoraWeights) -> str:
    """SHA-256, in hex, over rank, alpha and the sorted names, dtypes, shapes and data of all tensors."""
    sha = hashlib.sha256(f"lora r={weights.rank} alpha={weights.scaling * weights.rank:.6f}\n".encode())
    for name, tensor in sorted(_named_tensors(weights).items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.numpy().data)
    return sha.hexdigest()


def _named_tensors(weights: LoraWeights) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for path, (a, b) in weights.modules.items():
        out[f"{_PREFIX}{path}.lora_A.weight"] = a.detach().to("cpu", torch.float32).contiguous()
        out[f"{_PREFIX}{path}.lora_B.weight"] = b.detach().to("cpu", torch.float32).contiguous()
    return out


# -------------------------------------------------------------------------------------------------- read


def read_adapter(folder: Path, sha256: str | None = None) -> LoraWeights:
    """The adapter in a PEFT folder, on the CPU in fp32.

    AdapterError where a file is missing, truncated or not what its config says, a number is not finite, the
    variant of LoRA is another one, or the digest differs from ``sha256``.
    """
    config = _read_config(folder / CONFIG_FILE)
    rank = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    weights = LoraWeights(rank, scaling, _modules(_read_tensors(folder / WEIGHTS_FILE), rank, folder))
    if sha256 is not None and (found := digest(weights)) != sha256:
        raise AdapterError(
            f"{folder}: the weights have digest {found[:12]}, not {sha256[:12]}: the files were changed after they "
            "were written; restore them from a backup or roll back to another adapter"
        )
    return weights


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors that were given as ``extra`` to ``write_adapter``; empty where none were. AdapterError."""
    return _read_beside(folder / STATE_FILE, folder / STATE_DIGEST_FILE)


def read_fisher(folder: Path) -> dict[str, Tensor]:
    """The tensors that were given as ``fisher`` to ``write_adapter``; empty where none were. AdapterError."""
    return _read_beside(folder / FISHER_FILE, folder / FISHER_DIGEST_FILE)


def _read_beside(path: Path, digest_path: Path) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    data = _read_bytes(path)
    if hashlib.sha256(data).hexdigest() != _read_bytes(digest_path).decode(errors="replace").strip():
        raise AdapterError(f"{path} does not match {digest_path.name}")
    return _parse_tensors(data, path)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise AdapterError(f"cannot read {path}: {e.strerror}") from e


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read_bytes(path))
    except ValueError as e:
        raise AdapterError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} does not describe a LoRA adapter")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{path}: r = {rank!r}, lora_alpha = {alpha!r} make no sense")
    for option in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if config.get(option):
            raise AdapterError(f"{path}: {option} is not supported; train a plain LoRA adapter")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    return _parse_tensors(_read_bytes(path), path)


def _parse_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(data)
    except SafetensorError as e:
        raise AdapterError(f"{path} is not a whole safetensors file: {e}") from e


def _modules(tensors: Mapping[str, Tensor], rank: int, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{path: (A, B)} of PEFT's tensor names, each pair checked."""
    paths = sorted({name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in tensors})
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for path in paths:
        a = tensors.get(f"{_PREFIX}{path}.lora_A.weight")
        b = tensors.get(f"{_PREFIX}{path}.lora_B.weight")
        if a is None or b is None:
            raise AdapterError(f"{folder}: {path} lacks lora_A or lora_B")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(f"{folder}: {path} has shapes {tuple(a.shape)}, {tuple(b.shape)}, but r = {rank}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterError(f"{folder}: {path} has weights that are not finite")
        out[path] = (a.float(), b.float())
    if len(tensors) != 2 * len(out) or not out:
        raise AdapterError(f"{folder}: {len(tensors)} tensors, which are not one lora_A and lora_B per module")
    return out


# ------------------------------------------------------------------------------------------------- write


def write_adapter(
    folder: Path,
    weights: LoraWeights,
    alpha: float,
    base_name: str,
    extra: Mapping[str, Tensor] | None = None,
    fisher: Mapping[str, Tensor] | None = None,
) -> str:
    """Write a PEFT folder that a crash cannot leave half made, and give the digest of its weights.

    ``extra`` (the optimiser's state) and ``fisher`` go into files of their own with their own digests. A folder that
    exists already is left alone where it holds these weights; otherwise AdapterError, as adapters are never changed
    in place. AdapterError too where the disk is full or read-only.
    """
    sha = digest(weights)
    if folder.exists():
        read_adapter(folder, sha)
        return sha
    tmp = folder.parent / f"{TMP_PREFIX}{folder.name}-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _write_files(tmp, weights, alpha, base_name)
        _write_beside(tmp / STATE_FILE, tmp / STATE_DIGEST_FILE, extra or {})
        _write_beside(tmp / FISHER_FILE, tmp / FISHER_DIGEST_FILE, fisher or {})
        _fsync(tmp)
        os.rename(tmp, folder)
        _fsync(folder.parent)
        _fsync(folder.parent.parent)  # where the folder of all adapters may be new
    except OSError as e:
        raise AdapterError(f"cannot write {folder}: {e.strerror}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return sha


def _write_files(tmp: Path, weights: LoraWeights, alpha: float, base_name: str) -> None:
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    _write(tmp / CONFIG_FILE, json.dumps(_peft_config(weights, alpha, base_name), indent=2).encode())
    _write(tmp / WEIGHTS_FILE, save_tensors(_named_tensors(weights), metadata={"format": "pt"}))


def _write_beside(path: Path, digest_path: Path, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        data = save_tensors(dict(tensors), metadata={"format": "pt"})
        _write(path, data)
        _write(digest_path, hashlib.sha256(data).hexdigest().encode())


def _peft_config(weights: LoraWeights, alpha: float, base_name: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": weights.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in weights.modules}),
    }


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _fsync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------------- training


def linear_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of all linear layers but the output head, sorted. ModelError where there are none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    paths = sorted(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
    if not paths:
        raise ModelError(f"{type(model).__name__} has no nn.Linear layers that LoRA could be attached to")
    return tuple(paths)


def fresh_weights(model: nn.Module, rank: int, alpha: float, seed: int) -> LoraWeights:
    """The start of every adapter: A uniform as nn.Linear's own (Kaiming), B = 0, so that it changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, tuple[Tensor, Tensor]] = {}
    for path in linear_paths(model):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        bound = 1 / math.sqrt(linear.in_features)
        a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        modules[path] = (a, torch.zeros(linear.out_features, rank))
    return LoraWeights(rank, alpha / rank, modules)


class Lora:
    """Trainable fp32 LoRA branches on a model whose own weights it freezes; one adapter at a time.

    All A and B live in one flat vector, and so do their gradients, which makes clipping and the optimiser a few
    passes over memory. With no adapter loaded the branches are skipped, not multiplied by zero: the model is then
    exactly the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._handles = [
            model.get_submodule(path).register_forward_hook(self._hook(path)) for path in linear_paths(model)
        ]
        model.requires_grad_(False)
        self._clear()

    def _clear(self) -> None:
        self.rank, self.scaling = 0, 0.0
        self.flat = torch.empty(0)  # (parameters,) fp32
        self.enabled = False
        self._branches: dict[str, tuple[Tensor, Tensor]] = {}

    def load(self, weights: LoraWeights | None, *, trainable: bool = False) -> None:
        """Put an adapter on the model in place of the last one; None takes it off. ModelError if it does not fit."""
        self._clear()
        if weights is None:
            return
        device = next(self.model.parameters()).device
        self._check(weights)
        self.rank, self.scaling, self.enabled = weights.rank, weights.scaling, True
        named = [(path, *weights.modules[path]) for path in sorted(weights.modules)]
        self.flat = torch.cat([t.detach().float().reshape(-1) for _, a, b in named for t in (a, b)]).to(device)
        if trainable:
            self.flat.grad = torch.zeros_like(self.flat)
        start = 0
        for path, a, b in named:
            a_leaf, start = self._leaf(start, a.shape)
            b_leaf, start = self._leaf(start, b.shape)
            self._branches[path] = (a_leaf, b_leaf)

    def _leaf(self, start: int, shape: torch.Size) -> tuple[Tensor, int]:
        """A leaf whose data and gradient are windows on the flat ones."""
        end = start + shape.numel()
        leaf = self.flat[start:end].view(shape)
        if self.flat.grad is not None:
            leaf.requires_grad_()
            leaf.grad = self.flat.grad[start:end].view(shape)
        return leaf, end

    def _check(self, weights: LoraWeights) -> None:
        for path, (a, b) in weights.modules.items():
            try:
                linear = self.model.get_submodule(path)
            except AttributeError as e:
                raise ModelError(f"the adapter is for another model: this one has no {path}") from e
            if not isinstance(linear, nn.Linear) or linear.weight.shape != (b.shape[0], a.shape[1]):
                raise ModelError(f"the adapter is for another model: {path} has another shape here")

    def zero_grad(self) -> None:
        if self.flat.grad is not None:
            self.flat.grad.zero_()

    def gradient(self) -> Tensor:
        """A copy (P,) of what backward passes added up since the last ``zero_grad``."""
        assert self.flat.grad is not None, "loaded without gradients"
        return self.flat.grad.clone()

    def weights(self) -> LoraWeights | None:
        """A copy, on the CPU, of the adapter as it is now."""
        if not self._branches:
            return None
        modules = {p: (a.detach().cpu().clone(), b.detach().cpu().clone()) for p, (a, b) in self._branches.items()}
        return LoraWeights(self.rank, self.scaling, modules)

    def branches(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The trainable (A, B) of each adapted module; none where no adapter is loaded or it is disabled."""
        return self._branches if self.enabled else {}

    def view(self) -> LoraWeights:
        """The adapter itself, on the model's device: not a copy. Its tensors in sorted order of paths, A before B, are
        ``flat``."""
        modules = {p: (a.detach(), b.detach()) for p, (a, b) in self._branches.items()}
        return LoraWeights(self.rank, self.scaling, modules)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare base inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, path: str) -> Any:
        def add_branch(_module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:  # y (..., out)
            if not self.enabled or (branch := self._branches.get(path)) is None:
                return y
            a, b = branch
            x = args[0]
            h = F.linear(x.reshape(-1, x.shape[-1]), a.to(x.dtype))  # (T, r)
            # in place: the frozen layer's backward does not need its output
            return y.view(-1, y.shape[-1]).addmm_(h, b.to(x.dtype).t(), alpha=self.scaling).view(y.shape)

        return add_branch


def blend(start: LoraWeights, end: LoraWeights, share: float) -> LoraWeights:
    """That share of the way from one adapter to another, factor by factor. Both have the same modules and rank."""
    modules = {
        path: (torch.lerp(a, end.modules[path][0], share), torch.lerp(b, end.modules[path][1], share))
        for path, (a, b) in start.modules.items()
    }
    return LoraWeights(start.rank, start.scaling, modules)


def relative_norm(model: Any, weights: LoraWeights) -> float:
    """The largest ``||s B A|| / ||W||`` (Frobenius) of any adapted layer, without building ``B A`` (out, in):
    ``||B A||^2 = tr((B^T B)(A A^T))``, both (r, r)."""
    ratios = []
    for path, (a, b) in weights.modules.items():
        a64, b64 = a.double(), b.double()
        squared = float(((b64.T @ b64) * (a64 @ a64.T)).sum())
        base = float(model.get_submodule(path).weight.detach().float().norm())
        ratios.append(weights.scaling * max(0.0, squared) ** 0.5 / base if base else math.inf)
    return max(ratios, default=0.0)
