"""Chains, status, logs, and cancellation, with stand-ins for Slurm's answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_slm.cli.__main__ import main as run_by_name
from megatron_slm.launch import chain, slurm, submission
from megatron_slm.launch.chain import read_chain
from megatron_slm.launch.command import main
from megatron_slm.launch.records import JobRecord, read_jobs, write_chain
from megatron_slm.runtime import lock as locks
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.launch import SlurmJob
from megatron_slm.testing.tiny import MODEL, Outcome, captured

ROOT = Path(__file__).parents[2]
TRAINING = [*MODEL, "--train-iters", "4", "--micro-batch-size", "2", "--data-path", "corpus", "--no-check-files"]
SEVEN_FIELDS = re.compile(r"^((?:[^|\n]*\|){6}[^|\n]*)$", re.MULTILINE)  # of squeue, without the batch script
Answers = Callable[..., list[list[str]]]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Return a function that defines the output of Slurm's commands by name, and returns the list of their calls."""

    def define(**outputs: str | list[str]) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(command: list[str], env: dict[str, str] | None = None) -> str:
            calls.append(list(command))
            output = outputs.get(command[0])
            if output is None:
                raise ConfigError(f"{command[0]} failed: not expected")
            text = output.pop(0) if isinstance(output, list) else output
            return SEVEN_FIELDS.sub(r"\1|", text) if command[0] == "squeue" else text

        monkeypatch.setattr(slurm, "_run", run)
        return calls

    return define


def run(*argv: str) -> Outcome:
    return captured(list(argv), main)


def record(directory: Path, job_id: str = "12", **fields: object) -> JobRecord:
    """Write and return the record of a job."""
    job = JobRecord(job_id, "theta", str(directory), **fields)  # type: ignore[arg-type]
    job.records.mkdir(parents=True)
    job.write()
    return job


def write_chain_file(stages: dict[str, object], **defaults: object) -> Path:
    path = Path("chain.yaml")
    path.write_text(yaml.safe_dump({"directory": "runs", "defaults": defaults, "stages": stages}))
    return path


def test_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    outcome = run("--dry-run", "--nodes", "2", "--gpus-per-node", "0", "--run-dir", "run", *TRAINING)
    assert outcome.code == 0, outcome.errors
    assert outcome.output.startswith("#!/bin/bash\n") and f"    --load {tmp_path}/run\n" in outcome.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nodes", "2"], "--run-dir is missing"),
        (["--run-dir", "run", "--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size 3"),
        (["--run-dir", "run", "--nodez", "3"], "--nodez is unknown"),
        (["--run-dir", "a\\b"], "has a backslash"),
        (["--run-dir", "a\nb"], "must be one line"),
        (["--run-dir", "run", "--print-config"], "--print-config is for the trainer"),
        (["--seeds", "1", "2"], "--seeds needs --run-dir"),
        (["--run-dir", "run", "--seeds", "1", "--seed", "2"], "--seed and --seeds exclude each other"),
        (["--run-dir", "a:b", "--container-image", "x.sqsh"], "has a colon or a comma"),
        (["--run-dir", "run", "--partitoin", "gpu"], "--partitoin is unknown. Did you mean --partition?"),
        (["stauts", "run"], "'stauts' is no command. Did you mean status?"),
        (["--run-dir", "run", "--command", "score-corpus", "--context", "x"], "--context: invalid choice: 'x'"),
        (["--run-dir", "run", "--command", "soak", "--config", "x.yaml"], "--config is for training runs"),
    ],
)
def test_wrong_command_lines_are_refused(argv: list[str], message: str, answers: Answers, tmp_path: Path) -> None:
    calls = answers()
    outcome = run(*argv, *([] if "--command" in argv else TRAINING))
    assert outcome.code == 2 and message in outcome.errors, outcome.errors
    assert not calls and not list(tmp_path.iterdir())


def test_job_keeps_its_recipes(tmp_path: Path, answers: Answers) -> None:
    """The recipes of a queued job may be edited; sbatch gets no variables that override its script."""
    answers(sbatch="12;cluster\n", squeue="")
    Path("base.yaml").write_text("lr: 1.0e-3\ntrain_iters: 4\n")
    Path("my run.yaml").write_text("base: base.yaml\nno_bf16: true\n")
    argv = ["--config", "my run.yaml", "--run-dir", "run", "--nodes", "1", "--gpus-per-node", "1", *TRAINING]
    assert "submitted job 12" in run(*argv).output
    recipes = tmp_path / "run" / "slurm" / "recipes"
    assert yaml.safe_load((recipes / "1-base.yaml").read_text()) == {"lr": 1e-3, "train_iters": 4}
    assert yaml.safe_load((recipes / "2-my run.yaml").read_text()) == {"no_bf16": True}
    script = (tmp_path / "run" / "slurm" / "job.sbatch").read_text()
    assert f"--config {recipes}/1-base.yaml '{recipes}/2-my run.yaml'\n" in script
    job = read_jobs("run")[0]
    assert (job.job_id, job.save, job.iterations) == ("12", str(tmp_path / "run"), 4)
    answers(sbatch="13\n", squeue="12|12|RUNNING|1:00|1:00|None|node0\n")
    assert "job 12 of" in run(*argv).errors


def test_foreign_script_is_not_replaced(tmp_path: Path, answers: Answers) -> None:
    answers(sbatch="12\n", squeue="")
    script = tmp_path / "run" / "slurm" / "job.sbatch"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/bash\nprecious\n")
    assert "was not written by megatron_slm" in run("--run-dir", "run", "--gpus-per-node", "1", *TRAINING).errors
    assert "precious" in script.read_text()


def test_job_that_cannot_be_recorded_is_cancelled(tmp_path: Path, answers: Answers) -> None:
    calls = answers(sbatch="12\n", squeue="", scancel="")
    (tmp_path / "run" / "slurm" / "job.json").mkdir(parents=True)
    assert "job.json is a directory" in run("--run-dir", "run", "--gpus-per-node", "1", *TRAINING).errors
    assert calls[-1] == ["scancel", "--quiet", "12"]


def test_sbatch_environment_cannot_override_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "x.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --partition=gpu\n")
    for name in ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CONF"):
        monkeypatch.setenv(name, "1")
    found = {name for name in slurm._submission_environment(script) if name.startswith(("SLURM", "SBATCH"))}
    assert found == {"SBATCH_ACCOUNT", "SLURM_CONF"}


def test_missing_slurm_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="squeue is not installed on this machine"):
        slurm.queue(["1"])


def test_chain_is_ordered_and_passes_dependencies(answers: Answers) -> None:
    stages: dict[str, object] = {
        "theta": {"after": ["rm", "score"], "flags": TRAINING[:-1], "nodes": 2, "requeue": False},
        "rm": {"flags": TRAINING[:-1], "setup": ["echo 1", "echo 2"], "env": {}} | {"env": ["A=b c"]},
        "score": {
            "command": "score-corpus",
            "after": "rm",
            "flags": "--reference-load runs/rm --data-path 'my corpus' --reference-scores rm",
        },
    }
    calls = answers(sbatch=["1\n", "2\n", "3\n"], squeue="")
    path = write_chain_file(stages, **{"gpus_per_node": 1, "time": "24:00:00", "check-files": False})
    outcome = run("chain", str(path))
    assert outcome.code == 0, outcome.errors
    dependencies = [call[2] if len(call) > 3 else None for call in calls if call[0] == "sbatch"]
    assert dependencies == [None, "--dependency=afterok:1", "--dependency=afterok:1:2"]
    assert all("--kill-on-invalid-dep=yes" in call for call in calls[1:] if call[0] == "sbatch" and len(call) > 3)
    assert [job.stage for job in read_jobs("runs")] == ["rm", "score", "theta"]
    rm = Path("runs/rm/slurm/job.sbatch").read_text()
    assert "\necho 1\necho 2\nexport A='b c'\n" in rm and "#SBATCH --time=24:00:00\n" in rm
    assert "dependents='score, theta'\n" in rm and "#SBATCH --job-name=runs-rm\n" in rm
    assert "    --data-path 'my corpus'\n" in Path("runs/score/slurm/job.sbatch").read_text()
    assert "#SBATCH --no-requeue\n" in Path("runs/theta/slurm/job.sbatch").read_text()


@pytest.mark.parametrize(
    ("succeeded", "finished"),
    [({"rm", "score"}, {"rm", "score"}), ({"score", "theta"}, set()), ({"rm", "theta"}, {"rm"})],
)
def test_stages_after_one_that_runs_again_are_not_finished(succeeded: set[str], finished: set[str]) -> None:
    after: dict[str, list[str]] = {"rm": [], "score": ["rm"], "theta": ["rm", "score"]}
    stages: Any = [SimpleNamespace(name=name, after=names) for name, names in after.items()]
    prepared: Any = {name: SimpleNamespace(is_finished=name in succeeded) for name in after}
    assert chain._finished(chain.Chain(Path("runs"), stages), prepared) == finished


def test_refused_stage_cancels_those_that_were_submitted(answers: Answers) -> None:
    stages: dict[str, object] = {"a": {"flags": TRAINING[:-1]}, "b": {"flags": TRAINING[:-1], "after": "a"}}
    calls = answers(sbatch=["1\n", "error\n"], scancel="", squeue="")
    outcome = run("chain", str(write_chain_file(stages, gpus_per_node=1, check_files=False)))
    assert outcome.code == 2 and "is no job id" in outcome.errors
    assert calls[-1] == ["scancel", "--quiet", "1"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {"after": "b"}, "b": {"after": "a"}}, "stages depend on each other: "),
        ({"a": {"after": "c"}}, "a: after names 'c', which is no stage"),
        ({"a": {"partitoin": "x"}}, "partitoin is no setting of a stage. Did you mean partition"),
        ({"a/b": {}}, "a stage name has letters"),
        ({"a": {"nodes": "two"}}, "chain.yaml: a: .*invalid int value"),
        ({"a": {"flags": "--lr 'x"}}, "a: flags: .* has an unpaired quote"),
        ({"a": {"requeue": "maybe"}}, "requeue must be true or false"),
        ({"a": {"nodes": {"x": 1}}}, "a: nodes must be a value or a list"),
        ({"a": "text"}, "chain.yaml: a must be a mapping"),
        ({}, "stages is missing"),
    ],
)
def test_wrong_chains_are_refused(stages: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_chain(write_chain_file(stages), dry_run=False)


def test_stages_with_two_names_of_one_directory_are_refused(answers: Answers) -> None:
    answers()
    stages: dict[str, object] = {"a": {"flags": TRAINING[:-1]}, "b": {"flags": TRAINING[:-1], "run-dir": "x/../runs/a"}}
    outcome = run("chain", str(write_chain_file(stages, gpus_per_node=1, check_files=False)), "--dry-run")
    assert outcome.code == 2 and "several stages have the run directory" in outcome.errors


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (["--venv", "my env"], "--venv: .*my env/bin/activate"),
        (["--python", "bin/python"], "--python: bin/python"),
        (["--container-image", "./my image.sqsh"], "--container-image: ./my image.sqsh"),
    ],
)
def test_missing_programs_never_wait_in_the_queue(argv: list[str], path: str, answers: Answers, tmp_path: Path) -> None:
    calls = answers()
    outcome = run("--run-dir", "run", "--gpus-per-node", "0", *argv, *TRAINING[:-1])
    assert outcome.code == 2 and re.search(f"{path} does not exist", outcome.errors), outcome.errors
    assert not calls and not list(tmp_path.iterdir())
    assert run("--dry-run", "--run-dir", "run", "--gpus-per-node", "0", *argv, *TRAINING).code == 0


def test_job_of_another_cluster_with_the_same_id_is_left_alone(tmp_path: Path, answers: Answers) -> None:
    job = record(tmp_path / "my run", save=str(tmp_path / "my run"))
    calls = answers(squeue="12|12|RUNNING|0:01|0:59|None|n0|/home/x/other.sbatch\n", scancel="")
    assert run("status", "my run").output.startswith("theta: ENDED")
    assert run("cancel", "my run").output == "theta: not in the queue\n"
    assert [call[0] for call in calls if call[0] == "scancel"] == []
    answers(squeue=f"12|12|RUNNING|0:01|0:59|None|n0|{job.records}/job.sbatch\n")
    assert run("status", "my run").output.startswith("theta: RUNNING")


def test_example_chain_is_valid() -> None:
    chain = read_chain(ROOT / "examples" / "slurm" / "chain.yaml", dry_run=True)
    assert [stage.name for stage in chain.stages] == ["reference", "score", "theta", "evaluate"]
    recipes = [recipe for stage in chain.stages for recipe in stage.request.recipes]
    assert recipes and all((ROOT / recipe).exists() for recipe in recipes)
    assert chain.dependents("reference") == ["score", "theta", "evaluate"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["nonsense"], "'nonsense' is no command"), (["score-corpus", "--context", "x"], "invalid choice: 'x'")],
)
def test_commands_run_by_name(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["megatron_slm.cli", *argv])
    assert run_by_name() == 2
    assert message in capsys.readouterr().err


def metrics(path: Path, step: int) -> None:
    train = {"kind": "train", "step": step, "seconds": 1.5, "tokens_per_second": 2e6, "seconds_left": 7200.0}
    path.write_text(json.dumps(train) + "\n" + json.dumps({"kind": "eval", "step": step}) + '\n{"kind": "tr')


def test_status_of_a_running_job(tmp_path: Path, answers: Answers) -> None:
    answers(squeue="12|12|RUNNING|1:02:03|22:57:57|None|node[0-7]\n", sacct="")
    run_dir = tmp_path / "run"
    record(run_dir, save=str(run_dir), metrics=str(run_dir / "metrics.jsonl"), iterations=100)
    metrics(run_dir / "metrics.jsonl", 40)
    expected = "theta: RUNNING  job 12  1:02:03 on node[0-7], 22:57:57 to the limit  step 40/100  "
    assert run("status", "run").output == f"{expected}1.5 s/step, 2,000,000 tokens/s  2h00m left\n"


@pytest.mark.parametrize(
    ("squeue", "ended", "expected"),
    [
        ("12|12|PENDING|0:00|1:00|Resources|\n", None, "theta: PENDING  job 12  (Resources)"),
        ("", "0 finished\n", "theta: FINISHED  job 12"),
        ("", "137 failed: x\n", "theta: FAILED  job 12  exit code 137: failed: x"),
        ("12|12|CANCELLED|0:00|1:00|None|\n", None, "theta: CANCELLED  job 12"),
        ("", None, "theta: ENDED  job 12  without a record of its script"),
        ("12|12|RUNNING|0:01|UNLIMITED|None|n0\n", "1 an earlier start\n", "theta: RUNNING  job 12  0:01 on n0"),
    ],
)
def test_states_without_accounting(
    squeue: str, ended: str | None, expected: str, tmp_path: Path, answers: Answers
) -> None:
    answers(squeue=squeue)
    job = record(tmp_path / "run")
    if ended is not None:
        (job.records / "ended").write_text(ended)
    assert run("status", "run").output.startswith(expected)


def test_status_reads_the_accounting_of_forgotten_jobs(tmp_path: Path, answers: Answers) -> None:
    answers(squeue="", sacct="12|CANCELLED by 0\n")
    record(tmp_path / "run")
    assert run("status", "run").output == "theta: CANCELLED  job 12\n"


def test_status_of_a_chain_names_the_failed_stage(tmp_path: Path, answers: Answers) -> None:
    answers(squeue="")
    first = replace(record(tmp_path / "runs" / "rm"), stage="rm")
    (first.records / "ended").write_text("2 exit code 2\n")
    second = replace(record(tmp_path / "runs" / "theta", "13"), after=["rm"])
    write_chain(tmp_path / "runs", [first, second])
    lines = run("status", "runs").output.splitlines()
    assert lines == [
        "rm: FAILED  job 12  exit code 2: exit code 2",
        "theta: CANCELLED  job 13  it depends on rm, which did not succeed",
    ]


def test_status_of_an_array(tmp_path: Path, answers: Answers) -> None:
    answers(squeue="12|12_0|RUNNING|0:01|0:59|None|n0\n12|12_[1-2]|PENDING|0:00|1:00|Priority|\n")
    run_dir = tmp_path / "run"
    job = record(run_dir, save=str(run_dir), seeds=[5, 6, 7])
    (run_dir / "seed-5").mkdir()
    metrics(run_dir / "seed-5" / "metrics.jsonl", 3)
    lines = run("status", "run").output.splitlines()
    assert lines[0].startswith("theta seed 5: RUNNING  job 12  0:01 on n0, 0:59 to the limit  step 3")
    assert lines[2] == "theta seed 7: PENDING  job 12  (Priority)"
    assert job.saves()[1] == run_dir / "seed-6"


def test_logs_of_one_rank(tmp_path: Path, answers: Answers) -> None:
    answers(squeue="")
    job = record(tmp_path / "run")
    (job.records / "12.log").write_text("launch: x\n 0: zero τ\n10: ten\n 1: one\n 0: last")
    assert run("logs", "run", "--rank", "0").output == " 0: zero τ\n"
    assert run("logs", "run", "--rank", "0", "--follow").output == " 0: zero τ\n 0: last\n"
    assert run("logs", "run", "--lines", "1").output == " 1: one\n"
    assert "--stage x: run has the stages theta" in run("logs", "run", "--stage", "x").errors
    assert "holds no job of megatron-slm-launch" in run("logs", "nowhere").errors
    shutil.rmtree(tmp_path / "run" / "slurm")
    assert "if its files were deleted, find the job with squeue --me" in run("cancel", "run").errors


def test_cancel_removes_the_lock_of_the_job(tmp_path: Path, answers: Answers) -> None:
    running, gone = "12|12|RUNNING|0:01|0:59|None|n0\n", "12|12|CANCELLED|0:01|0:59|None|n0\n"
    calls = answers(squeue=[running, gone, gone], scancel="")
    run_dir = tmp_path / "run"
    record(run_dir, save=str(run_dir))
    owner = replace(locks._this_process(), job=SlurmJob("12"))
    (run_dir / locks.LOCK_FILE).write_text(json.dumps(asdict(owner)))
    outcome = run("cancel", "run")
    assert outcome.output == f"theta: job 12 is cancelled\nremoved the lock of job 12 in {run_dir}\n", outcome.errors
    assert ["scancel", "--quiet", "12"] in calls and not (run_dir / locks.LOCK_FILE).exists()


def test_copied_directory_does_not_cancel_the_jobs_of_its_original(tmp_path: Path, answers: Answers) -> None:
    """A job of the copy may be submitted, and a directory that was moved is still that of its job."""
    calls = answers(squeue="12|12|RUNNING|0:01|0:59|None|n0\n", scancel="", sbatch="13\n")
    record(tmp_path / "runs" / "theta")
    write_chain(tmp_path / "runs", read_jobs("runs/theta"))
    shutil.copytree("runs", "copy")
    for copy, original in (("copy", "runs"), ("copy/theta", "runs/theta")):
        assert f"{copy} is a copy of {tmp_path / original}, whose jobs it names" in run("cancel", copy).errors
    assert not any(call[0] == "scancel" for call in calls)
    submission.check_idle(replace(read_jobs("copy/theta")[0], run_dir=str(tmp_path / "copy" / "theta")))
    with pytest.raises(ConfigError, match="is RUNNING"):
        submission.check_idle(read_jobs("runs/theta")[0])
    shutil.move("runs", "moved")
    answers(squeue=["12|12|RUNNING|0:01|0:59|None|n0\n", "", ""], scancel="")
    assert run("cancel", "moved").output == "theta: job 12 is cancelled\n"


def test_cancel_keeps_the_lock_of_another_job(tmp_path: Path, answers: Answers) -> None:
    answers(squeue=["", "", "99|99|RUNNING|0:01|0:59|None|n0\n"], scancel="")
    run_dir = tmp_path / "run"
    record(run_dir, save=str(run_dir))
    owner = replace(locks._this_process(), job=SlurmJob("99"))
    (run_dir / locks.LOCK_FILE).write_text(json.dumps(asdict(owner)))
    assert run("cancel", "run").output == "theta: not in the queue\n"
    assert (run_dir / locks.LOCK_FILE).exists()
