"""Supervised fine-tuning on transformers' Trainer: settings, trainer, checkpoints, callbacks."""
