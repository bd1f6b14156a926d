"""Trainer: step, loop, checkpoints, evaluation and metrics."""
