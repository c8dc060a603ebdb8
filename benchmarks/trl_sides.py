"""TRL's side of ``bench_dpo_step``: its own trainers, driven one ``training_step`` at a time on given token ids.

They take no token ids of their own accord, so each is built on one line of text and then fed through its own collator.
Settings are those that are fastest for TRL here: the model in the dtype of the run, bf16 autocast in bf16, no gradient
checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from step_workload import ALPHA, BETA, LR, MICRO, RANK, Pair, Thumb, start_weights
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from gradatim.nn.base import Base


class _Trl:
    """A trainer whose adapter starts at the same weights as ours."""

    def __init__(
        self, base: Base, trainer: type[Any], config: type[Any], rows: list[dict[str, Any]], **own: Any
    ) -> None:
        settings = config(
            per_device_train_batch_size=MICRO,
            bf16=base.dtype == torch.bfloat16,
            learning_rate=LR,
            max_length=None,
            use_cpu=base.device.type == "cpu",
            report_to=[],
            disable_tqdm=True,
            **({"gradient_checkpointing": False} | own),
        )
        weights = start_weights(base.model)
        self._trainer = trainer(
            model=base.model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear"),
        )
        self._named = {
            n.removeprefix("base_model.model.").replace(f".lora_{x}.default.weight", f".{x}"): p
            for n, p in self._trainer.model.named_parameters()
            for x in "AB"
            if f".lora_{x}.default.weight" in n
        }
        with torch.no_grad():
            for path, pair in weights.modules.items():
                for x, tensor in zip("AB", pair, strict=True):
                    self._named[f"{path}.{x}"].copy_(tensor)
        self._optimizer = self._trainer.create_optimizer()

    def _accumulate(self, batches: Sequence[Any]) -> float:
        """The gradient of the mean over batches; the mean loss."""
        self._optimizer.zero_grad()
        self._trainer.current_gradient_accumulation_steps = len(batches)
        return sum(float(self._trainer.training_step(self._trainer.model, batch)) for batch in batches)

    def descend(self) -> None:
        torch.nn.utils.clip_grad_norm_(list(self._named.values()), 1.0)
        self._optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        out = {}
        for name, parameter in self._named.items():
            assert parameter.grad is not None
            out[name] = parameter.grad.float().clone()
        return out


class TrlDpo(_Trl):
    """``at_once``: pairs in one of its passes; it accumulates the gradients of several."""

    def __init__(self, base: Base, folder: Path, *, checkpointing: bool = False, at_once: int = MICRO) -> None:
        self._at_once = at_once
        rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
        own: Mapping[str, Any] = {"output_dir": str(folder), "beta": BETA, "gradient_checkpointing": checkpointing}
        super().__init__(base, DPOTrainer, DPOConfig, rows, **own)

    def reference(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Log-probabilities (2,) of each pair under the bare base."""
        out = []
        for start in range(0, len(pairs), self._at_once):
            batch = self._collate(pairs[start : start + self._at_once], None)
            chosen, rejected = self._trainer.compute_ref_log_probs(self._trainer.model, batch)
            out += list(torch.stack([chosen, rejected], 1))
        return out

    def _collate(self, pairs: Sequence[Pair], reference: Sequence[Tensor] | None) -> Any:
        rows: list[dict[str, Any]] = []
        for k, p in enumerate(pairs):
            row: dict[str, Any] = {
                "prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected),
            }  # fmt: skip
            if reference is not None:
                row |= {"ref_chosen_logps": float(reference[k][0]), "ref_rejected_logps": float(reference[k][1])}
            rows.append(row)
        return self._trainer.data_collator(rows)

    def gradient(self, pairs: Sequence[Pair], reference: Sequence[Tensor] | None = None) -> float:
        """The default computes the reference in the step; with ``reference`` it is the cached one."""
        self._trainer.precompute_ref_logps = reference is not None
        batches = []
        for start in range(0, len(pairs), self._at_once):
            mine = None if reference is None else reference[start : start + self._at_once]
            batches.append(self._collate(pairs[start : start + self._at_once], mine))
        return self._accumulate(batches)

    def step(self, pairs: Sequence[Pair], reference: Sequence[Tensor] | None = None) -> float:
        loss = self.gradient(pairs, reference)
        self.descend()
        return loss


class TrlThumbs(_Trl):
    """KTO with its pass over mismatched answers, or APO-zero-unpaired; both compute the reference in the step."""

    def __init__(self, base: Base, folder: Path, loss: str) -> None:
        texts = [{"prompt": "a", "completion": f" {word}", "label": word < "c"} for word in "abcd"]
        own: Mapping[str, Any] = {"output_dir": str(folder), "beta": BETA, "loss_type": loss}
        super().__init__(base, KTOTrainer, KTOConfig, texts, **own)

    def gradient(self, thumbs: Sequence[Thumb]) -> float:
        rows = [
            {
                "prompt_ids": list(t.prompt),
                "completion_ids": list(t.answer),
                "KL_completion_ids": list(t.mismatched),
                "label": t.good,
            }
            for t in thumbs
        ]
        if not self._trainer.calculate_KL:
            rows = [{k: v for k, v in row.items() if k != "KL_completion_ids"} for row in rows]
        return self._accumulate([self._trainer.data_collator(rows)])


class TrlSft(_Trl):
    def __init__(self, base: Base, folder: Path) -> None:
        super().__init__(base, SFTTrainer, SFTConfig, [{"prompt": "a", "completion": " b"}], output_dir=str(folder))

    def gradient(self, thumbs: Sequence[Thumb]) -> float:
        rows = [
            {"input_ids": [*t.prompt, *t.answer], "labels": [-100] * len(t.prompt) + list(t.answer)} for t in thumbs
        ]
        return self._accumulate([self._trainer.data_collator(rows)])
