"""Test the launcher on a private Slurm cluster of two nodes: chains, requeues, failing nodes, cancellation."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import yaml
from evaluation_samples import choice_lines, write_requests
from slurm_cluster import SlurmCluster

from megatron_slm.config.checkpoint_files import latest_step
from megatron_slm.launch.command import main
from megatron_slm.launch.records import JobRecord, read_jobs
from megatron_slm.runtime.lock import LOCK_FILE
from megatron_slm.testing.tiny import captured, command, losses, records

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"no Slurm: {slurm_cluster.missing()}"),
]
ROOT = Path(__file__).parents[2]
STEPS = 60  # enough seconds for a signal to arrive
SECONDS = 600
JOB = ["--gpus-per-node", "0", "--no-check-nodes"]
TWO_NODES = [*JOB, "--nodes", "2"]

# An interpreter whose node check fails on one node.
SICK_NODE = """#!/bin/bash
if [ "$2 $3" = "megatron_slm.cli check-nodes" ]; then
    [ "$SLURMD_NODENAME" = node0 ] || { echo "$SLURMD_NODENAME" > "${@: -3:1}"; exit 0; }
    echo "$SLURMD_NODENAME" > "${@: -1}"
    exit 4
fi
exec PYTHON "$@"
"""


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("cluster"), "SlurmdTimeout=30\n") as running:
        yield running


@pytest.fixture
def cluster(running_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """Return the cluster, with whose environment the launcher runs in this process."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    variables = running_cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return running_cluster


def flags(corpus: str, **more: Any) -> list[str]:
    return command(corpus, dp=2, **{"train_iters": STEPS, **more})


def run(*argv: str) -> str:
    """Run the launcher and return its output."""
    outcome = captured(list(argv), main)
    assert outcome.code == 0, outcome.errors
    return outcome.output


def submit(directory: Path, *argv: str) -> JobRecord:
    run("--run-dir", str(directory), *argv)
    return read_jobs(directory)[0]


def log_of(job: JobRecord) -> str:
    path = job.records / f"{job.job_id}.log"
    return path.read_text() if path.exists() else "the job has not started"


def wait_for(condition: Callable[[], bool], job: JobRecord) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, log_of(job)
        time.sleep(0.2)


def wait_for_end(job: JobRecord) -> tuple[int, str]:
    wait_for(lambda: job.ended() is not None, job)
    ended = job.ended()
    assert ended is not None
    return ended


def has_steps(directory: Path, count: int) -> bool:
    return (directory / "metrics.jsonl").is_file() and len(records(directory)) >= count


def statuses(directory: Path) -> dict[str, dict[str, Any]]:
    return {status["name"]: status for status in json.loads(run("status", str(directory), "--json"))}


def has_finished(directory: Path) -> bool:
    return all(status["state"] == "FINISHED" for status in statuses(directory).values())


@pytest.mark.slow
def test_chain_trains_scores_trains_and_evaluates(tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    """RM, scoring, θ and evaluation are submitted by one command; a second one finds them finished."""
    write_requests(tmp_path / "tasks" / "colors.jsonl", choice_lines())
    results = tmp_path / "my chain" / "evaluate" / "colors.json"
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"train_iters": 4, "micro_batch_size": 4}))
    common = command(corpus, dp=2, save_interval=2, seq_length=64)
    del common[common.index("--micro-batch-size") : common.index("--micro-batch-size") + 2]
    chain = {
        "directory": "my chain",
        "defaults": {"gpus_per_node": 0, "check_nodes": False, "nodes": 1, "time": "01:00:00"},
        "stages": {
            "evaluate": {
                "after": "theta",
                "command": "evaluate",
                "flags": f"'my chain/theta' --tasks colors --tasks-dir tasks --output '{results}'",
            },
            "theta": {
                "after": "score",
                "recipes": "model.yaml",
                "nodes": 2,
                "flags": [*common, "--objective", "slm", "--reference-scores", "rm"],
            },
            "rm": {"recipes": ["model.yaml"], "ranks_per_node": 2, "flags": common},
            "score": {
                "after": ["rm"],
                "command": "score-corpus",
                "flags": ["--reference-load", "my chain/rm", "--data-path", corpus, "--reference-scores", "rm"],
            },
        },
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    output = run("chain", "chain.yaml")
    assert re.search(r"rm: job \d+; .*\nscore: job \d+, after rm; .*\ntheta: job \d+, after score", output), output
    jobs = {job.stage: job for job in read_jobs(tmp_path / "my chain")}
    assert wait_for_end(jobs["evaluate"])[0] == 0, "\n".join(map(log_of, jobs.values()))
    wait_for(lambda: has_finished(tmp_path / "my chain"), jobs["evaluate"])
    found = statuses(tmp_path / "my chain")
    assert list(found) == ["rm", "score", "theta", "evaluate"]
    assert (found["theta"]["step"], found["theta"]["iterations"]) == (4, 4)
    assert records(tmp_path / "my chain" / "theta")[0]["share_selected"] < 1
    assert "step 4/4" in run("logs", "my chain", "--stage", "theta", "--rank", "0")
    assert "step 4/4" not in run("logs", "my chain", "--stage", "theta", "--rank", "1")
    assert json.loads(results.read_text())["directory"] == "my chain/theta/iter_0000004"
    assert run("chain", "chain.yaml").count("finished already") == 4


@pytest.mark.slow
def test_failed_stage_cancels_the_stages_after_it(tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    chain = {
        "directory": "runs",
        "defaults": {"gpus-per-node": 0, "check-nodes": False},
        "stages": {
            "rm": {"flags": flags(corpus), "setup": "false"},
            "theta": {"after": "rm", "flags": [*flags(corpus), "--load", "runs/rm", "--finetune"]},
            "longer": {"after": "theta", "flags": flags(corpus)},
        },
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    run("chain", "chain.yaml")
    last = read_jobs(tmp_path / "runs")[-1]
    wait_for(lambda: statuses(tmp_path / "runs")["longer"]["state"] == "CANCELLED", last)
    found = statuses(tmp_path / "runs")
    assert found["rm"]["state"] == "FAILED" and found["theta"]["state"] == "CANCELLED"
    assert "depends on rm, which did not succeed" in run("status", "runs")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_signalled_run_is_requeued_and_resumes(
    launcher: str, tmp_path: Path, cluster: SlurmCluster, corpus: str, undisturbed: list[tuple[Any, ...]]
) -> None:
    """Slurm sends SIGUSR1 before the time limit to all processes of the step, as scancel does."""
    directory = tmp_path / "it's 100% τ; x"
    job = submit(directory, *TWO_NODES, "--launcher", launcher, *flags(corpus))
    wait_for(lambda: has_steps(directory, 2), job)
    cluster.run("scancel", "--signal=USR1", job.job_id)
    assert wait_for_end(job) == (0, "finished"), log_of(job)
    text = log_of(job)
    assert "the run stopped before its end (SIGUSR1); requeueing job" in text
    assert text.count("stopping after step") == 1 and "resuming from" in text
    assert losses(directory) == undisturbed


@pytest.mark.slow
def test_slurm_signals_before_the_time_limit(
    tmp_path: Path, cluster: SlurmCluster, corpus: str, undisturbed: list[tuple[Any, ...]]
) -> None:
    """The ranks are paused, since the run would end before the signal; Slurm continues them to deliver it."""
    directory = tmp_path / "run"
    limits = ["--time", "3", "--signal-time", "60"]
    job = submit(directory, *TWO_NODES, *limits, *flags(corpus, slm_hang_timeout=0))
    wait_for(lambda: has_steps(directory, 2), job)
    for process in cluster.processes(job=job.job_id):
        if process.name() != "srun" and "megatron_slm.pretrain" in process.cmdline():
            process.suspend()
    assert wait_for_end(job) == (0, "finished"), log_of(job)
    assert "the run stopped before its end (SIGUSR1); requeueing job" in log_of(job)
    assert losses(directory) == undisturbed


@pytest.mark.slow
def test_run_survives_a_failing_node(
    tmp_path: Path, cluster: SlurmCluster, corpus: str, undisturbed: list[tuple[Any, ...]]
) -> None:
    directory = tmp_path / "run"
    job = submit(directory, *TWO_NODES, *flags(corpus, save_interval=5))
    wait_for(lambda: has_steps(directory, 7), job)
    cluster.fail_node(1)
    wait_for(lambda: cluster.state(job.job_id) not in ("RUNNING", "COMPLETING"), job)
    assert job.ended() is None, log_of(job)
    cluster.start_node(1)
    assert wait_for_end(job) == (0, "finished"), log_of(job)
    assert "resuming from" in log_of(job)
    assert losses(directory) == undisturbed


@pytest.mark.slow
def test_unhealthy_node_is_excluded(tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    directory, python = tmp_path / "run", tmp_path / "python"
    python.write_text(SICK_NODE.replace("PYTHON", sys.executable))
    python.chmod(0o755)
    settings = ["--gpus-per-node", "0", "--python", str(python)]
    job = submit(directory, *settings, *command(corpus, train_iters=2))
    assert wait_for_end(job) == (0, "finished"), log_of(job)
    assert "unhealthy nodes are excluded: node0; requeueing" in log_of(job)
    shown = cluster.run("scontrol", "show", "job", job.job_id)
    assert "ExcNodeList=node0" in shown and " NodeList=node1" in shown


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_job_continues_on_a_spare_node(launcher: str, tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    directory, python = tmp_path / "my run", tmp_path / "python"
    python.write_text(SICK_NODE.replace("PYTHON", sys.executable))
    python.chmod(0o755)
    settings = ["--gpus-per-node", "0", "--spare-nodes", "1", "--python", str(python), "--ranks-per-node", "2"]
    job = submit(directory, *settings, "--launcher", launcher, *command(corpus, dp=2, train_iters=2))
    assert wait_for_end(job) == (0, "finished"), log_of(job)
    assert "the ranks start on node1" in log_of(job) and "requeueing" not in log_of(job)
    assert "2 x CPU over gloo" in log_of(job)


@pytest.mark.slow
def test_cancel_leaves_nothing_behind(tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    directory = tmp_path / "run"
    argv = [*TWO_NODES, *flags(corpus, train_iters=100_000, save_interval=1)]
    job = submit(directory, *argv)
    wait_for(lambda: has_steps(directory, 2), job)
    refused = captured(["--run-dir", str(directory), *argv], main)
    assert refused.code == 2 and "is RUNNING. Wait for it, or cancel it" in refused.errors
    assert f"job {job.job_id} is cancelled" in run("cancel", str(directory))
    assert cluster.state(job.job_id) == "CANCELLED" and not cluster.processes(job=job.job_id)
    assert not (directory / LOCK_FILE).exists() and not list(directory.glob("*partial*"))
    done = latest_step(directory)
    assert done is not None
    again = submit(directory, *TWO_NODES, *flags(corpus, train_iters=100_000, exit_interval=1))
    assert wait_for_end(again) == (0, "finished"), log_of(again)
    assert latest_step(directory) == done + 1, "the next run resumes"


def test_cancelled_chain_is_gone(tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    stages = {"first": {"flags": flags(corpus)}, "second": {"flags": flags(corpus), "after": "first"}}
    chain = {"directory": "runs", "defaults": {"gpus_per_node": 0, "nodes": 2, "sbatch": "hold"}, "stages": stages}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    run("chain", "chain.yaml")
    assert run("cancel", "runs").count("is cancelled") == 2
    assert {status["state"] for status in statuses(tmp_path / "runs").values()} == {"CANCELLED"}


def test_hostile_directives_reach_slurm(tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    name = "a 'b' \"c\" \\ $HOME `id` # τ"
    directory = tmp_path / "100% 'my' \"τ\" #run"
    job = submit(directory, *JOB, "--name", name, "--sbatch", "hold", "comment=x # $y", *command(corpus, train_iters=1))
    shown = cluster.run("scontrol", "show", "job", job.job_id)
    assert f"job {job.job_id} is cancelled" in run("cancel", str(directory))
    assert f"JobName={name}" in shown and "Comment=x # $y" in shown
    assert f"StdOut={directory}/slurm/{job.job_id}.log" in shown.replace("%%", "%"), shown


@pytest.mark.slow
def test_array_runs_every_seed(tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    directory = tmp_path / "seeds"
    argv = command(corpus, train_iters=2)
    job = submit(directory, *JOB, "--seeds", "3", "5", *argv)
    wait_for(lambda: all(job.ended(seed) is not None for seed in job.seeds), job)
    wait_for(lambda: has_finished(directory), job)
    assert list(statuses(directory)) == ["seeds seed 3", "seeds seed 5"]
    assert losses(directory / "seed-3") != losses(directory / "seed-5")
    assert "step 2/2" in run("logs", str(directory), "--seed", "5")


def test_wrong_flag_never_queues(tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    argv = [*TWO_NODES, "--run-dir", str(tmp_path / "run"), *flags(corpus, tensor_model_parallel_size=3)]
    outcome = captured(argv, main)
    assert outcome.code == 2 and "--tensor-model-parallel-size 3" in outcome.errors, outcome.errors
    assert not (tmp_path / "run").exists() and not cluster.run("squeue", "--noheader")
