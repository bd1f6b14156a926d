"""Test the node check and the monitoring of ranks under Slurm, on a private local cluster of two nodes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import slurm_cluster
from slurm_cluster import SlurmCluster

from megatron_slm.testing.tiny import command, make_corpus, records

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"no Slurm: {slurm_cluster.missing()}"),
]
ROOT = Path(__file__).parents[2]
SECONDS = 300
CHECK = (
    "megatron_slm.cli.check_nodes --time-limit 60 --min-relative-rate 0.01 --min-save-gb 0 --min-tmp-gb 0 "
    "--min-memory-gb 0 --gpus 0"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("cluster")) as running:
        running.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        yield running


def python_without(directory: Path, node: str, fault: str) -> Path:
    """Return an interpreter that runs ``fault`` instead on one node."""
    path = directory / "python"
    path.write_text(f'#!/bin/bash\n[ "$SLURMD_NODENAME" != {node} ] || {{ {fault}; }}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def wait_for_end(cluster: SlurmCluster, job: str, log: Path) -> str:
    end = time.monotonic() + SECONDS
    while cluster.state(job) not in ("COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED"):
        assert time.monotonic() < end, log.read_text() if log.exists() else "the job has not started"
        time.sleep(0.2)
    return cluster.state(job)


def test_node_without_python_is_named_and_left_out(tmp_path: Path, cluster: SlurmCluster) -> None:
    """Also if it is the first node, on which the check would decide; both checks wait at the same time."""
    faults = [("node1", "node0", "exit 127"), ("node0", "node1", "sleep 1000")]
    with contextlib.ExitStack() as stack:
        checks = [stack.enter_context(start_check(tmp_path / node, cluster, node, fault)) for node, _, fault in faults]
        errors = [check.communicate(timeout=SECONDS)[1] for check in checks]
    for (node, other, _), message in zip(faults, errors, strict=True):
        good, bad = tmp_path / node / "good", tmp_path / node / "bad"
        assert good.exists(), message
        assert good.read_text() == f"{other}\n" and bad.read_text() == f"{node}\n", message
        assert f"unhealthy node {node}: no process started there within 40 s" in message


def start_check(directory: Path, cluster: SlurmCluster, node: str, fault: str) -> subprocess.Popen[str]:
    """Start the check of both nodes, one of which has a fault, as one job."""
    directory.mkdir()
    python, good, bad = python_without(directory, node, fault), directory / "good", directory / "bad"
    options = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=200"]
    check = [*CHECK.replace("60", "40").split(), "--save", str(directory), "--needed", "1"]
    command = [str(python), "-m", *check, "--healthy-nodes", str(good), "--unhealthy-nodes", str(bad)]
    pipe = subprocess.PIPE
    return subprocess.Popen(["srun", *options, *command], env=cluster.environment, stdout=pipe, stderr=pipe, text=True)


def test_job_is_requeued_without_the_unhealthy_node(tmp_path: Path, cluster: SlurmCluster) -> None:
    """The script of docs/slurm.md for a job of one node."""
    python, script, log = python_without(tmp_path, "node0", "exit 127"), tmp_path / "job.sbatch", tmp_path / "log"
    result = tmp_path / "result"
    script.write_text(
        f"#!/bin/bash\nnodes={tmp_path}/good bad={tmp_path}/bad\nrm -f $nodes $bad\n"
        f"srun {python} -m {CHECK} --healthy-nodes $nodes --unhealthy-nodes $bad --output {result}\n"
        '[ -e $bad ] || echo "$SLURMD_NODENAME" > $bad\n'  # no process ran the check
        "if [ ! -s $nodes ]; then\n  trap '' TERM\n  scontrol requeue $SLURM_JOB_ID\n"
        '  scontrol update JobId=$SLURM_JOB_ID ExcNodeList="$(paste -sd, $bad)"\n  exit\nfi\n'
        "srun --nodelist=$nodes bash -c 'echo \"trained on $SLURMD_NODENAME\"'\n"
    )
    job = cluster.run("sbatch", "--parsable", "--nodes=1", "--requeue", f"--output={log}", str(script))
    assert wait_for_end(cluster, job, log) == "COMPLETED", log.read_text()
    assert "trained on node1" in log.read_text()
    assert json.loads(result.read_text())["healthy"] == ["node1"]


def test_stopped_rank_ends_the_step(tmp_path: Path, cluster: SlurmCluster) -> None:
    corpus, save, log = make_corpus(tmp_path / "corpus", 1), tmp_path / "run", tmp_path / "log"
    argv = command(corpus, save, dp=2, train_iters=10_000, slm_hang_timeout=5)
    words = f"{sys.executable} -m megatron_slm.pretrain {' '.join(argv)}"
    wrapped = f"srun --kill-on-bad-exit=1 {words}; echo code $?"
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}", f"--wrap={wrapped}"]
    job = cluster.run("sbatch", "--parsable", *options)
    end = time.monotonic() + SECONDS
    while not ((save / "metrics.jsonl").is_file() and len(records(save)) > 3):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    ranks = [process for process in psutil.process_iter() if is_rank(process, str(save), "1")]
    assert ranks
    os.kill(ranks[0].pid, signal.SIGSTOP)
    began = time.monotonic()
    wait_for_end(cluster, job, log)
    text = log.read_text()
    assert time.monotonic() - began < 60, text
    assert "error: rank 1 on node1 (process " in text and "has not responded for" in text
    assert "code 4" in text or "code 137" in text, text


def is_rank(process: psutil.Process, save: str, rank: str) -> bool:
    try:
        return save in process.cmdline() and process.environ().get("SLURM_PROCID") == rank
    except psutil.Error:
        return False
