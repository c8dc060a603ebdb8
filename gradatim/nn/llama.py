"""The packed pass for Llama-style models, with layers of our own in place of the library's.

The same numbers as ``gradatim.nn.pack.score`` in less time and memory. A model qualifies by its parts (embedding,
RMSNorm, rotary positions, grouped attention with or without biases, SiLU MLP, head: Llama, Mistral, Qwen2, SmolLM2
and what else is built of them), and the caller compares the result with the model's own. The modules' forward
methods and hooks are not called.

It knows no losses, examples or adapters' files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradatim.nn.attend import plan
from gradatim.nn.head import Scored, predict, rows_of
from gradatim.nn.layers import NAMES, Layer, Pass, layer_forward
from gradatim.nn.lora import Lora
from gradatim.nn.trie import Answer, pack

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}


def qualifies(model: Any) -> bool:
    """Whether it is built of nothing but the parts that this module computes."""
    base = getattr(model, "base_model", None)
    if base is None or _children(base) != _MODEL or _children(model) - {"lm_head"} != {model.base_model_prefix}:
        return False
    config = model.config
    plain_head = getattr(model.get_output_embeddings(), "bias", None) is None
    return (
        plain_head
        and getattr(config, "sliding_window", None) is None
        and all(_plain_layer(layer) for layer in base.layers)
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _plain_layer(layer: Any) -> bool:
    if _children(layer) != _LAYER or _children(layer.self_attn) != _ATTENTION or _children(layer.mlp) != _MLP:
        return False
    silu = isinstance(layer.mlp.act_fn, nn.SiLU) or type(layer.mlp.act_fn).__name__ == "SiLUActivation"
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    plain = all(type(linear) is nn.Linear for linear in _linears(layer))
    return silu and plain and all(hasattr(norm, "variance_epsilon") for norm in norms)


def _linears(layer: Any) -> list[nn.Linear]:
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    return [getattr(layer.self_attn, name) for name in attention] + [getattr(layer.mlp, name) for name in mlp]


class LlamaPass:
    """Called as ``pack.score`` without the model: answers in, one Scored each out. Gradients go to the adapter that
    is on ``lora``. For models that ``qualifies`` accepts."""

    def __init__(self, model: Any, lora: Lora) -> None:
        self._model = model
        self._lora = lora
        names = {module: name for name, module in model.named_modules()}
        self._paths = [[names[linear] for linear in _linears(layer)] for layer in model.base_model.layers]
        assert all(len(paths) == len(NAMES) for paths in self._paths)

    def __call__(self, answers: Sequence[Answer]) -> list[Scored]:
        """ValueError where a prompt or completion is empty."""
        packed = pack(answers)
        base, head = self._model.base_model, self._model.get_output_embeddings().weight
        device = head.device
        wanted = rows_of(packed, answers, device)
        wide = torch.promote_types(head.dtype, torch.float32)
        with torch.no_grad():
            x = base.embed_tokens(torch.tensor(packed.token_ids, device=device)).to(wide)  # (N, H)
            positions = torch.tensor([packed.position_ids], device=device)
            cos, sin = (t[0] for t in base.rotary_emb(x, positions))  # (N, D)
        attention = base.layers[0].self_attn
        groups = attention.q_proj.out_features // attention.k_proj.out_features
        run = Pass(plan(packed.blocks, groups, device, wide), cos, sin, self._lora.scaling)
        last = replace(run, plan=run.plan.narrow(wanted.needed))
        branches = self._lora.branches()
        for i, (module, paths) in enumerate(zip(base.layers, self._paths, strict=True)):
            pairs = [branches.get(path, (None, None)) for path in paths]
            flat = [t for pair in pairs for t in pair]
            ends = i + 1 == len(base.layers)
            x = layer_forward(x, _layer(module), last if ends else run, wanted.needed if ends else None, flat)
        return predict(_norm(x, base.norm), head, wanted)


def _layer(module: Any) -> Layer:
    linears = _linears(module)
    norms = (module.input_layernorm, module.post_attention_layernorm)
    return Layer(
        weights=tuple(linear.weight for linear in linears),
        biases=tuple(linear.bias for linear in linears),
        norms=(norms[0].weight, norms[1].weight),
        eps=(norms[0].variance_epsilon, norms[1].variance_epsilon),
        scaling=module.self_attn.scaling,
    )


def _norm(x: Tensor, norm: Any) -> Tensor:
    """The last norm, under autograd: rows are few."""
    inverse = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    normed: Tensor = x * inverse * norm.weight
    return normed.to(norm.weight.dtype)
