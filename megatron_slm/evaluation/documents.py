"""Documents of a task: scored continuations, prompts for generated text, and expected answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ACCURACY, ACCURACY_NORM, EXACT_MATCH = "acc", "acc_norm", "exact_match"
BITS_PER_BYTE, PERPLEXITY = "bits_per_byte", "perplexity"


@dataclass(frozen=True)
class Continuation:
    """Represent a text whose log-likelihood after a context is computed."""

    context: str
    text: str

    @property
    def answer(self) -> str:
        """Return the text without the space that separates it from the context."""
        return self.text.removeprefix(" ")


@dataclass(frozen=True)
class Prompt:
    """Represent a text that the model continues greedily, up to a stop sequence or a number of tokens."""

    context: str
    stop: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Document:
    """Represent one item of a task."""

    choices: tuple[Continuation, ...] = ()  # the only one is a reference answer
    gold: int = 0  # index of the right choice
    prompt: Prompt | None = None
    answer: str = ""  # expected in the generated text


@dataclass(frozen=True)
class Task:
    """Represent a named list of documents and the metrics to report."""

    name: str
    documents: Sequence[Document]
    metrics: tuple[str, ...]
    fewshot: int | None  # examples in each context; None if the data do not state it
    source: str  # of the documents
    is_mathematical: bool = False  # answers are compared by math-verify

    @property
    def generates(self) -> bool:
        """Return whether the metrics need generated text."""
        return EXACT_MATCH in self.metrics
