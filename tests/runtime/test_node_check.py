"""Test the check of nodes: reasons of failure, pairs, time limits, and processes that play nodes."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_slm.cli import check_nodes
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.launch import expand_hosts
from megatron_slm.runtime.node_check import agent, coordinator, device
from megatron_slm.runtime.node_check.agent import run_processes, serve
from megatron_slm.runtime.node_check.coordinator import Coordinator, Result
from megatron_slm.runtime.node_check.local import check_locally, read_versions
from megatron_slm.runtime.node_check.report import (
    NodeReport,
    Requirements,
    failing_pairs,
    find_problems,
    pair_rounds,
)

NAMES = ["node0", "node1", "node2"]


def report(node: str, **changes: Any) -> NodeReport:
    healthy = NodeReport(
        node,
        versions={"Python": "3.11", "the driver": "570"},
        free_gb={"save": 100.0, "tmp": 100.0, "memory": 100.0},
        gpus=2,
        device_memory=[0.99, 0.99],
        rates={"gemm": [600.0, 610.0], "all-reduce in the node": [400.0], "all-reduce between nodes": [40.0, 41.0]},
    )
    return replace(healthy, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"versions": {"Python": "3.12", "the driver": "570"}}, "Python is 3.12, and 3.11 on most nodes"),
        ({"free_gb": {"save": 3.0}}, "--save has 3.0 GB of free space, and 10 GB are needed"),
        ({"free_gb": {"memory": 0.5}}, "the host has 0.5 GB of free memory"),
        ({"gpus": 1}, "1 GPUs are visible, and 2 are expected"),
        ({"device_memory": [0.99, 0.4]}, "GPU 1 has only 40% of its memory free"),
        ({"clock_skew": -7.0}, "the clock is 7.0 s behind the other nodes"),
        ({"rates": {"gemm": [600.0, 300.0]}}, "gemm runs at 300 TFLOP/s, and at 600 TFLOP/s in the median"),
        ({"rates": {"all-reduce between nodes": [10.0, 12.0]}}, "all-reduce between nodes runs at 10 GB/s"),
        ({"errors": ["cuda:0: 5 values are wrong"]}, "cuda:0: 5 values are wrong"),
    ],
)
def test_reason_of_failure(changes: dict[str, Any], reason: str) -> None:
    reports = [report("node0"), report("node1", **changes), report("node2")]
    problems = find_problems(reports, Requirements())
    assert list(problems) == ["node1"] and reason in problems["node1"][0]


def test_healthy_nodes_have_no_problems() -> None:
    reports = [report("node0"), report("node1", clock_skew=5.0, clock_error=4.0), report("node2")]
    reports[1].rates["all-reduce between nodes"] = [10.0, 41.0]  # one slow link is that of its peer
    assert find_problems(reports, Requirements()) == {}
    assert find_problems([], Requirements()) == {}
    assert list(find_problems(reports, Requirements(gpus=8))) == ["node0", "node1", "node2"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_rounds_have_disjoint_pairs_of_neighbors(count: int) -> None:
    nodes = [f"node{number}" for number in range(count)]
    rounds = pair_rounds(nodes)
    for pairs in rounds:
        met = [node for pair in pairs for node in pair]
        assert len(met) == len(set(met))
    everyone = [node for pairs in rounds for pair in pairs for node in pair]
    assert all(everyone.count(node) == min(count - 1, 2) for node in nodes)
    if count > 3:
        failures = {pair: "refused" for pairs in rounds for pair in pairs if set(pair) & {"node1", "node2"}}
        assert sorted(failing_pairs(failures, rounds)) == ["node1", "node2"]


def test_node_lists_of_slurm() -> None:
    expanded = ["node01", "node02", "node7", "gpu5", "r1n9x", "r1n10x"]
    assert expand_hosts("node[01-02,7],gpu5,r[1]n[9-10]x") == expanded
    for malformed in ("", "node[a-b]", "node[1-]"):
        with pytest.raises(ConfigError, match="node list"):
            expand_hosts(malformed)


def test_process_that_hangs_or_fails_is_ended() -> None:
    results, errors = run_processes([[sys.executable, "-c", "import time; time.sleep(60)"]], 0.5)
    assert results == [] and errors == ["the check of the devices did not end within 0 s"]
    results, errors = run_processes([[sys.executable, "-c", "raise SystemExit('no driver')"]], 60)
    assert results == [] and errors == ["the check of the devices failed with exit code 1: no driver"]
    results, errors = run_processes([["/nowhere/python"]], 1)
    assert results == [] and "No such file" in errors[0]


def test_wrong_product_is_found() -> None:
    assert device.compute()["errors"] == []
    product = device.torch.Tensor.__matmul__

    def wrong(left: Any, right: Any) -> Any:
        result = product(left, right)
        result[0, 0] += 1
        return result

    with mock.patch.object(device.torch.Tensor, "__matmul__", wrong):
        assert device.compute()["errors"] == ["cpu: 1 values of a matrix product are wrong"]


def test_directories_are_checked(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.write_text("here")
    found = check_locally("node", str(tmp_path / "not" / "yet"), (str(shared), "here"))
    assert found.errors == [] and set(found.free_gb) == {"memory", "tmp", "save"}
    assert "torch" in found.versions and found.versions == {**found.versions, **read_versions()}
    assert "differs" in check_locally("node", None, (str(shared), "there")).errors[0]
    assert "cannot be read (No such file" in check_locally("node", None, (str(tmp_path / "no"), "")).errors[0]
    with mock.patch.object(Path, "write_bytes", side_effect=OSError(28, "No space left on device")):
        assert "cannot be written (No space left on device)" in check_locally("node", str(tmp_path), None).errors[0]


def play(connection: socket.socket, node: str) -> None:
    with contextlib.suppress(SystemExit):
        serve(connection, node, None, 1.0)


Answer = Callable[[dict[str, Any]], dict[str, Any] | None]


def check(answers: dict[str, Answer], shared: Path | None = None, **options: Any) -> Result:
    """Run the coordinator with nodes that answer in threads of this process; a node without an answer hangs."""
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()

    impatient = mock.patch.object(coordinator, "SECONDS_OF_GRACE", 0.0)
    original = agent._answer

    def dispatch(message: dict[str, Any], node: str, save: str | None, limit: float) -> dict[str, Any]:
        if "ping" in message:
            return original(message, node, save, limit)
        found = answers[node](message)
        if found is None:
            raise SystemExit
        return found

    with impatient, mock.patch.object(agent, "_answer", dispatch):
        for node in answers:
            connection = socket.create_connection(address)
            threading.Thread(target=play, args=(connection, node), daemon=True).start()
        return Coordinator(
            server, NAMES, Requirements(), shared=shared, node="node0", address="127.0.0.1", **{"limit": 2.0, **options}
        ).run()


def healthy(node: str) -> Answer:
    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if "check" in message:
            return {"report": asdict(report(node, rates={"gemm": [600.0]}))}
        return {"paired": {"errors": [], "rate": 40.0}}

    return answer


def hanging(message: dict[str, Any]) -> dict[str, Any]:
    threading.Event().wait(30)
    return {}


def test_coordinator_finds_healthy_nodes(tmp_path: Path) -> None:
    result = check({node: healthy(node) for node in NAMES}, tmp_path / "run")
    assert result.problems == {} and result.healthy == NAMES and list((tmp_path / "run").iterdir()) == []
    assert [found.rates["all-reduce between nodes"] for found in result.reports] == [[40.0, 40.0]] * 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no process started there within 2 s"),
        (hanging, "did not report within the time limit"),
        (lambda message: None, "its process ended during the check"),
    ],
)
def test_coordinator_names_a_node_that_does_not_answer(answer: Answer | None, reason: str) -> None:
    answers = {"node0": healthy("node0"), "node2": healthy("node2")}
    result = check(answers if answer is None else {**answers, "node1": answer})
    assert result.problems == {"node1": [reason]} and result.healthy == ["node0", "node2"]


def test_coordinator_in_a_hurry_names_only_nodes_that_are_absent() -> None:
    with mock.patch.object(coordinator, "SECONDS_IN_HURRY", 0.5):
        answers = {"node0": healthy("node0"), "node2": hanging}
        result = check(answers, limit=60.0, hurries=lambda: True)
    assert list(result.problems) == ["node1"]


def test_coordinator_names_the_node_of_failed_pairs() -> None:
    def unreachable(message: dict[str, Any]) -> dict[str, Any]:
        found = healthy("node1")(message)
        return found if "report" in found else {"paired": {"errors": ["NCCL error"], "rate": 0.0}}

    result = check({"node0": healthy("node0"), "node1": unreachable, "node2": healthy("node2")})
    assert list(result.problems) == ["node1"]
    assert "all-reduce with node0, node2 failed: NCCL error" in result.problems["node1"][0]


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / name for name in ("output", "unhealthy-nodes", "healthy-nodes")}
    argv = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    result = Result(NAMES, {"node1": ["slow", "hot"]}, [report(node) for node in NAMES])
    assert check_nodes._publish(result, 2, check_nodes.parse(argv)) == 0
    assert files["healthy-nodes"].read_text() == "node0\nnode2\n"
    assert files["unhealthy-nodes"].read_text() == "node1\n"
    content = json.loads(files["output"].read_text())
    assert content["unhealthy"] == {"node1": ["slow", "hot"]} and content["reports"][0]["node"] == "node0"
    assert check_nodes._publish(result, 3, check_nodes.parse(argv)) == 4 and not files["healthy-nodes"].exists()
    errors = capsys.readouterr().err
    assert "unhealthy node node1: slow\nunhealthy node node1: hot\n" in errors
    assert "2 of 3 nodes are healthy, and 3 are needed" in errors


def test_needed_nodes_must_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_nodes.main(["--needed", "2"]) == 2
    assert "--needed 2 must be between 1 and the number of nodes, 1" in capsys.readouterr().err


@pytest.mark.slow
def test_check_of_one_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--save", str(tmp_path), "--min-save-gb", "0", "--min-tmp-gb", "0", "--min-memory-gb", "0"]
    assert check_nodes.main([*argv, "--output", str(tmp_path / "result")]) == 0, capsys.readouterr().err
    content = json.loads((tmp_path / "result").read_text())
    assert content["healthy"] == ["task 0"] and content["reports"][0]["gpus"] is not None
