"""The mathematics on tensors: models, LoRA, losses, packing. It knows no store, no wire and no process."""
