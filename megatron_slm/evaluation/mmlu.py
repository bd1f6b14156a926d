"""MMLU from Arrow files, with the prompts of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources.abc import Traversable
from typing import Any

from megatron_slm.evaluation.documents import Continuation, Document
from megatron_slm.evaluation.request_files import UNREADABLE
from megatron_slm.runtime.errors import ConfigError

LETTERS = "ABCD"
MAX_FEWSHOT = 5  # examples of each subject
_GROUPS = {
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law "
        "jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law "
        "world_religions"
    ),
    "other": (
        "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
        "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
    ),
    "social_sciences": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
        "security_studies sociology us_foreign_policy"
    ),
    "stem": (
        "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
        "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
        "high_school_mathematics high_school_physics high_school_statistics machine_learning"
    ),
}


def mmlu_subjects() -> Mapping[str, tuple[str, ...]]:
    """Return the subjects of every task: mmlu, mmlu_GROUP and mmlu_SUBJECT."""
    groups = {f"mmlu_{name}": tuple(subjects.split()) for name, subjects in _GROUPS.items()}
    every = tuple(subject for subjects in groups.values() for subject in subjects)
    return {"mmlu": every, **groups, **{f"mmlu_{subject}": (subject,) for subject in every}}


def read_mmlu(directory: Traversable, subjects: tuple[str, ...], fewshot: int, limit: int | None) -> list[Document]:
    """Return the test questions of some subjects, each after ``fewshot`` questions with answers.

    Args:
        directory: contains SUBJECT/test and SUBJECT/dev.
        subjects: names of the subjects.
        fewshot: at most :data:`MAX_FEWSHOT`.
        limit: read only the first questions of each subject.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    documents = []
    for subject in subjects:
        topic = subject.replace("_", " ")
        opening = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        for example in _rows(directory / subject / "dev")[:fewshot] if fewshot else []:
            opening += f"{_question(example)} {LETTERS[example['answer']]}\n\n"
        for row in _rows(directory / subject / "test")[:limit]:
            context = opening + _question(row)
            choices = tuple(Continuation(context, f" {letter}") for letter in LETTERS)
            documents.append(Document(choices, row["answer"]))
    return documents


def _question(row: dict[str, Any]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def _rows(directory: Traversable) -> list[dict[str, Any]]:
    """Return the questions in the Arrow files of a directory."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    try:
        for path in sorted(directory.iterdir(), key=lambda path: path.name):
            if path.name.endswith(".arrow"):
                with path.open("rb") as file:
                    rows += pa.ipc.open_stream(file).read_all().to_pylist()
    except (*UNREADABLE, pa.ArrowException) as error:
        raise ConfigError(f"--tasks-dir: {directory} cannot be read ({error}). Unpack the package again.") from error
    if not rows:
        raise ConfigError(f"--tasks-dir: {directory} contains no Arrow files. Unpack the package again.")
    if not all(map(_is_question, rows)):
        raise ConfigError(
            f"--tasks-dir: {directory} has rows that are not questions of MMLU. Unpack the package again."
        )
    return rows


def _is_question(row: dict[str, Any]) -> bool:
    choices, answer = row.get("choices"), row.get("answer")
    is_complete = isinstance(choices, list) and len(choices) == len(LETTERS) and answer in range(len(LETTERS))
    return is_complete and isinstance(row.get("question"), str)
