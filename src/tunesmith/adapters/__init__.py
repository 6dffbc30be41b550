"""LoRA adapters on a transformers model, by PEFT: where they go, how they start, how they are kept."""
