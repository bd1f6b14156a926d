"""The trainer: step, loop, checkpoints, evaluation and metrics."""
