"""Test jobs under Slurm on a private local cluster of two nodes, whose names are not resolvable."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from slurm_cluster import SlurmCluster

from megatron_slm.config.checkpoint_files import latest_step
from megatron_slm.testing.tiny import command, losses, records

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"no Slurm: {slurm_cluster.missing()}"),
]
ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]
STEPS = 80  # enough seconds for a signal to arrive
SECONDS = 240

# An interpreter that gives test settings to the trainer, and only the directories of the script.
PYTHON = """#!{python}
import os, sys
words = sys.argv[1:]
kept = [word for i, word in enumerate(words) if {{word, words[i - 1]}} & {kept}]
os.execv({python!r}, [{python!r}, *words[:2], *{settings!r}, *kept])
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("cluster")) as running:
        running.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        yield running


def settings(corpus: str, save: Path | None = None, **flags: Any) -> list[str]:
    return command(corpus, save, dp=2, **{"train_iters": STEPS, **flags})


def wait_for(condition: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, log.read_text() if log.exists() else "the job has not started"
        time.sleep(0.1)


def has_steps(save: Path, count: int) -> bool:
    return (save / "metrics.jsonl").is_file() and len(records(save)) >= count


def test_signalled_step_saves_and_requeued_job_resumes(
    tmp_path: Path, cluster: SlurmCluster, corpus: str, undisturbed: list[tuple[Any, ...]]
) -> None:
    """The first script of docs/slurm.md: srun starts the ranks, without MASTER_ADDR; the run has no --load."""
    save, log, script = tmp_path / "run", tmp_path / "log", tmp_path / "job.sbatch"
    words = " ".join(settings(corpus, save))
    script.write_text(
        f"#!/bin/bash\nsrun {sys.executable} -m megatron_slm.pretrain {words} || exit\n"
        f'[ "$(cat {save}/latest_checkpointed_iteration.txt)" = {STEPS} ] || scontrol requeue $SLURM_JOB_ID\n'
    )
    options = [*TWO_NODES, f"--output={log}", "--open-mode=append", "--requeue"]
    job = cluster.run("sbatch", "--parsable", *options, str(script))
    wait_for(lambda: has_steps(save, 2), log)
    cluster.run("scancel", "--signal=USR1", job)  # like --signal=USR1@300: to the ranks, not the script
    wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED", "NODE_FAIL"), log)
    text = log.read_text()
    assert cluster.state(job) == "COMPLETED", text
    assert text.count("2 x CPU over gloo") == 2 and text.count(f"step {STEPS}/{STEPS}") == 1, "two starts of one run"
    assert text.count("stopping after step") == 1 and text.count("SIGUSR1") == 2, text
    assert "resuming from" in text and "started by this job before it was requeued" in text
    assert losses(save) == undisturbed


def test_example_script_requeues_itself(
    tmp_path: Path, cluster: SlurmCluster, corpus: str, undisturbed: list[tuple[Any, ...]]
) -> None:
    """The user's own script of docs/slurm.md; the ranks receive the signal, as before the time limit."""
    save, log, stand_in = tmp_path / "run", tmp_path / "log", tmp_path / "python"
    stand_in.write_text(PYTHON.format(python=sys.executable, kept={"--save", "--load"}, settings=settings(corpus)))
    stand_in.chmod(0o755)
    options = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={log}", f"--chdir={ROOT}"]
    script, variables = str(SCRIPTS / "pretrain.sbatch"), {"RUN": str(save), "PYTHON": str(stand_in)}
    job = cluster.run("sbatch", "--parsable", *options, script, **variables)
    wait_for(lambda: has_steps(save, 2), log)
    cluster.run("scancel", "--signal=USR1", job)
    wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED", "NODE_FAIL"), log)
    assert cluster.state(job) == "COMPLETED", log.read_text()
    assert latest_step(save) == STEPS and "stopping after step" in log.read_text()
    assert losses(save) == undisturbed


def test_user_error_prints_once_and_salloc_runs_one_process(cluster: SlurmCluster, corpus: str, tmp_path: Path) -> None:
    """srun prints a message once; salloc without srun starts one process for any number of reserved tasks."""
    trainer = [sys.executable, "-m", "megatron_slm.pretrain"]
    wrong = subprocess.run(
        ["srun", *TWO_NODES, "--ntasks=2", *trainer, "--lr", "fast"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert wrong.returncode == 2 and wrong.stderr.count("--lr must be a number") == 1, wrong.stderr
    plan = cluster.run("salloc", "--ntasks=4", *trainer, *command(corpus, train_iters=1), "--dry-run", timeout=SECONDS)
    assert "= 1 processes" in plan
    one = cluster.run("srun", "--ntasks=1", *trainer, *command(corpus, train_iters=1), "--dry-run", timeout=SECONDS)
    assert "= 1 processes" in one


def test_preprocessing_array_equals_one_process(tmp_path: Path, cluster: SlurmCluster, corpus: str) -> None:
    tool, text = ROOT / "tools" / "preprocess_data.py", str(Path(corpus.removesuffix("_text_document") + ".jsonl"))
    flags = ["--input", text, "--tokenizer-type", "ByteTokenizer", "--append-eod"]
    options = ["--array=0-1", "--cpus-per-task=1", f"--chdir={ROOT}", f"--output={tmp_path}/log-%a", "--wait"]
    script = str(SCRIPTS / "preprocess_array.sbatch")
    cluster.run("sbatch", *options, script, *flags, "--output-prefix", str(tmp_path / "shards"), timeout=SECONDS)
    merge = [str(tool.with_name("merge_datasets.py")), "--input", f"{tmp_path}/shards_text_document"]
    single = [str(tool), *flags, "--output-prefix", str(tmp_path / "single")]
    for argv in ([*merge, "--output-prefix", f"{tmp_path}/shards_text_document"], single):
        subprocess.run([sys.executable, *argv], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=SECONDS)
    for suffix in ("bin", "idx"):
        names = (tmp_path / f"{name}_text_document.{suffix}" for name in ("shards", "single"))
        shards, expected = (path.read_bytes() for path in names)
        assert shards == expected
