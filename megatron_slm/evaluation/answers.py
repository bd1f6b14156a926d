"""Comparison of generated text with an expected answer."""

from __future__ import annotations

import logging

from megatron_slm.evaluation.documents import Task
from megatron_slm.runtime.errors import ConfigError


def has_answer(generated: str, answer: str, *, mathematical: bool) -> bool:
    """Return whether a generated text has the expected answer.

    Mathematical answers are extracted and compared by math-verify, which reads numbers, LaTeX and ``\\boxed``. Other
    texts must be equal, without spaces at both ends.
    """
    if not mathematical:
        return generated.strip() == answer.strip()
    from math_verify import parse, verify

    return bool(verify(parse(answer), parse(generated)))


def check_answers_can_be_compared(task: Task) -> None:
    """Raise ConfigError if a task needs math-verify and it is not installed."""
    if not (task.generates and task.is_mathematical):
        return
    try:
        import math_verify
    except ImportError as error:
        raise ConfigError(
            f"task {task.name} compares answers with math-verify, which is not installed. Run pip install "
            "'megatron_slm[evaluation]', or leave the task out."
        ) from error
    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # reports every unreadable answer
