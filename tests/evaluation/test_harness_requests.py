"""Requests and results of lm-evaluation-harness, converted without the package."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_slm.evaluation.documents import Continuation, Prompt
from megatron_slm.evaluation.harness import _prompt, _results, make_harness_model
from megatron_slm.evaluation.metrics import Score
from megatron_slm.runtime.errors import ConfigError


class Runner:
    """Return the requests instead of results."""

    def log_likelihoods(self, requests: list[Any], label: str) -> list[Any]:
        return requests

    rolling_log_likelihoods = generate = log_likelihoods


def test_requests_reach_the_runner_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("lm_eval.api.model")
    module.LM = object  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, module)
    model = make_harness_model(Runner())  # type: ignore[arg-type]

    def requests(*arguments: tuple[Any, ...]) -> list[Any]:
        return [SimpleNamespace(args=each) for each in arguments]

    assert model.loglikelihood(requests(("a", " b"), ("", "c"))) == [Continuation("a", " b"), Continuation("", "c")]
    assert model.loglikelihood_rolling(requests(("a b",), ("",))) == ["a b", ""]
    assert model.generate_until(requests(("a", {"until": "x"}), ("b", {}))) == [
        Prompt("a", ("x",), 256),
        Prompt("b", (), 256),
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"until": ["x", "", "yz"], "max_gen_toks": 5, "max_tokens": 7}, Prompt("a", ("x", "yz"), 5)),
        ({"until": None, "max_new_tokens": 9, "do_sample": False, "temperature": 0.7}, Prompt("a", (), 9)),
        ({"temperature": 0.0}, Prompt("a", (), 256)),
        ({"do_sample": True}, None),
        ({"temperature": 0.7}, None),
    ],
)
def test_generation_settings_are_those_of_the_harness(settings: dict[str, Any], expected: Prompt | None) -> None:
    """Without do_sample, a temperature samples; with do_sample false, it has no effect."""
    if expected is None:
        with pytest.raises(ConfigError, match="a task samples its texts"):
            _prompt("a", settings)
    else:
        assert _prompt("a", settings) == expected


def test_results_have_standard_errors_counts_and_examples() -> None:
    found = {
        "groups": {"both": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
        "group_subtasks": {"both": ["one", "two"], "one": []},
        "results": {
            "one": {"alias": "one", "exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A", "sample_len": 3},
            "two": {"acc,none": 0.25},
            "none": {"alias": "none"},
        },
        "n-samples": {"one": {"original": 9, "effective": 3}, "two": {"original": 9, "effective": 4}},
        "n-shot": {"one": 5, "two": 0},
    }
    both, one, two = _results(found)
    assert both.task == "both" and both.scores == {"acc": Score(0.5, 0.1, 7)} and both.fewshot is None
    assert one.scores == {"exact_match (strict)": Score(1.0, None, 3)} and one.fewshot == 5
    assert two.scores == {"acc": Score(0.25, None, 4)} and two.fewshot == 0
