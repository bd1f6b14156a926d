"""Batch scripts: quoting of hostile values, reaction to exit codes; bash runs them with stand-ins for Slurm."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from stub_slurm import StubSlurm

from megatron_slm.config.checkpoint_files import TRACKER
from megatron_slm.config.paths import STOP_FILE
from megatron_slm.launch.script import STOPS, Work, render
from megatron_slm.launch.settings import APPTAINER, LAUNCH_VARIABLES, TORCHRUN, JobSettings, limit_seconds
from megatron_slm.runtime.errors import ConfigError

HOSTILE = [
    *("a b", "it's", 'a "b"', "$HOME", "`id`", "$(touch pwned)", "a;b", "a|b&", "*", "~", "!x", "#x", "[0]=x", "{a,b}"),
    *("\\", "a\\nb", "τ = 0.6", "模型", "-1e-3", "--flag=$x y", "%j", "a\nb", "", "\t", "${x}", "'", '"', "x=1", ">f"),
]
PLAIN = JobSettings(nodes=2, gpus_per_node=4, python="python", check_nodes=False)


@pytest.fixture
def stub(tmp_path: Path) -> StubSlurm:
    return StubSlurm(tmp_path / "stub")


def work(directory: Path, *arguments: str, **fields: object) -> Work:
    return Work("pretrain", list(arguments), directory, **{"save": directory, **fields})  # type: ignore[arg-type]


def script_of(settings: JobSettings, directory: Path, *arguments: str, **fields: object) -> str:
    return render(settings, work(directory, *arguments, **fields), Path("/work dir"))


def test_hostile_values_reach_the_command_unchanged(tmp_path: Path, stub: StubSlurm) -> None:
    run = tmp_path / 'it\'s $HOME "τ" %j; #x'
    env = [f"VALUE_{number}={value}" for number, value in enumerate(HOSTILE)]
    shown = "".join(f'printf "%s\\0" "$VALUE_{number}" >> "$STUB/values"\n' for number in range(len(HOSTILE)))
    settings = replace(
        PLAIN,
        env=env,
        module=["cuda/12 $x"],
        python="/opt/my python",
        container_image="img $x;",
        container_runtime=APPTAINER,
        container_mounts=["/a b:/c'd"],
    )
    result = stub.run(script_of(settings, run, *HOSTILE), actions=("", shown))
    assert result.code == 0, result.errors
    module, srun = result.calls
    assert module == ["module", "load", "cuda/12 $x"]
    place = srun.index("/opt/my python")
    assert srun[place:] == ["/opt/my python", "-m", "megatron_slm.pretrain", *HOSTILE]
    assert srun[:place][-1] == "img $x;" and "/a b:/c'd" in srun and f"{run}:{run}" in srun
    assert (stub.directory / "values").read_text().split("\0")[:-1] == HOSTILE
    assert (run / "slurm" / "ended").read_text() == "0 finished\n"
    assert not list(tmp_path.rglob("pwned"))


def test_directives_are_quoted_for_sbatch(tmp_path: Path) -> None:
    settings = replace(
        PLAIN,
        name='a "b" \\ it\'s',
        partition="gpu",
        time="1-12:00:00",
        cpus_per_task=8,
        sbatch=["comment=x # y", "exclusive", "--mem=0"],
    )
    script = script_of(settings, tmp_path / "50%")
    assert '#SBATCH --job-name="a \\"b\\" \\\\ it\'s"\n#SBATCH --partition=gpu\n' in script
    assert '#SBATCH --comment="x # y"\n#SBATCH --exclusive\n#SBATCH --mem=0\n' in script
    assert "/50%%/slurm/%j.log" in script and "#SBATCH --gpus-per-node=4" in script
    assert "    srun --label --kill-on-bad-exit=1 --cpus-per-task=8\n" in script
    assert "gpus-per-node" not in script_of(replace(PLAIN, sbatch=["gres=gpu:h100:4"]), tmp_path)
    first_command = next(line for line in script.splitlines() if line and not line.startswith("#"))
    assert script.rindex("#SBATCH") < script.index(first_command), "sbatch reads no directives after a command"


def test_job_name_defaults_to_the_run(tmp_path: Path) -> None:
    assert f"--job-name={tmp_path.name}\n" in script_of(PLAIN, tmp_path)


def test_variables_of_an_outer_launcher_do_not_reach_the_ranks(tmp_path: Path, stub: StubSlurm) -> None:
    """A job that is submitted from an allocation or a torchrun shell inherits its environment."""
    outer = dict.fromkeys(LAUNCH_VARIABLES, "7")
    result = stub.run(script_of(PLAIN, tmp_path / "run"), actions=('env > "$STUB/environment"',), **outer)
    assert result.code == 0, result.errors
    names = {line.partition("=")[0] for line in (stub.directory / "environment").read_text().splitlines()}
    assert "SLURM_JOB_ID" in names and not names & {*LAUNCH_VARIABLES}


def test_failing_setup_ends_the_job(tmp_path: Path, stub: StubSlurm) -> None:
    result = stub.run(script_of(replace(PLAIN, setup=["false"]), tmp_path / "run"))
    assert result.code == 1 and not result.calls
    assert (tmp_path / "run" / "slurm" / "ended").read_text() == "1 the environment cannot be prepared\n"


def test_stopped_run_is_requeued(tmp_path: Path, stub: StubSlurm) -> None:
    run = tmp_path / "run"
    stop = f"echo SIGUSR1 > '{run}/{STOP_FILE}'"
    result = stub.run(script_of(PLAIN, run), actions=(stop,))
    assert result.calls[1] == ["scontrol", "requeue", "12"] and len(result.calls) == 2
    assert "the run stopped before its end (SIGUSR1); requeueing job 12" in result.errors
    assert not (run / "slurm" / "ended").exists()
    result = stub.run(script_of(replace(PLAIN, requeue=False), run))
    assert result.code == 75 and len(result.calls) == 1, "dependent stages must not start"
    assert (run / "slurm" / "ended").read_text().startswith("75 the run stopped before its end")


def test_time_limits_that_are_shorter_than_the_start_up_end_the_job(tmp_path: Path, stub: StubSlurm) -> None:
    run = tmp_path / "run"
    script = script_of(replace(PLAIN, restarts=0), run)
    for _ in range(STOPS):
        assert len(stub.run(script, actions=(f"echo SIGUSR1 > '{run}/{STOP_FILE}'",)).calls) == 2, "requeued"
    result = stub.run(script)
    assert result.code == 75 and f"(SIGUSR1), {STOPS + 1} times without a new checkpoint" in result.errors
    assert "SIGUSR2, 4 times" in stub.run(script, 138).errors
    (run / STOP_FILE).write_text("SIGTERM\n")  # preempted
    assert len(stub.run(script).calls) == 2


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("5:30", 330), ("01:00:02", 3602), ("1-12", 129_600), ("1-0:01:01", 86_461), ("UNLIMITED", math.inf)],
)
def test_signal_at_the_start_of_a_job_is_refused(time: str, seconds: float) -> None:
    assert limit_seconds(time) == seconds
    replace(PLAIN, time=time, signal_time=60).check()
    if seconds < 65_536:
        with pytest.raises(ConfigError, match="SIGUSR1 would be sent at the start"):
            replace(PLAIN, time=time, signal_time=int(seconds)).check()


def test_job_that_slurm_has_requeued_already_is_not_ended(tmp_path: Path, stub: StubSlurm) -> None:
    """Slurm may notice the failure of a node before the script does."""
    run = tmp_path / "run"
    result = stub.run(script_of(PLAIN, run), 1, 1, actions=("", "", "echo JobState=PENDING Reason=BeginTime"))
    assert [call[0] for call in result.calls] == ["srun", "scontrol", "scontrol"] and result.code == 75
    assert not (run / "slurm" / "ended").exists()
    result = stub.run(script_of(PLAIN, run), 1, 1, 1)
    assert "the job cannot be requeued. Submit it again" in (run / "slurm" / "ended").read_text()


@pytest.mark.parametrize("code", [2, 3])
def test_errors_that_a_restart_repeats_end_the_job(code: int, tmp_path: Path, stub: StubSlurm) -> None:
    result = stub.run(script_of(PLAIN, tmp_path / "run", dependents=["score", "theta"]), code)
    assert result.code == code and len(result.calls) == 1
    assert "Slurm cancels the stages that depend on this job: score, theta" in result.errors


def test_failures_are_limited_until_a_checkpoint_is_saved(tmp_path: Path, stub: StubSlurm) -> None:
    run, script = tmp_path / "run", script_of(replace(PLAIN, restarts=2), tmp_path / "run")
    for _ in range(2):
        assert len(stub.run(script, 137).calls) == 2, "requeued"
    result = stub.run(script, 137)
    assert result.code == 137 and len(result.calls) == 1
    assert "3 times without a new checkpoint" in result.errors
    (run / TRACKER).write_text("10\n")
    assert len(stub.run(script, 137).calls) == 2, "requeued after a new checkpoint"


def test_command_without_signal_handler_is_requeued(tmp_path: Path, stub: StubSlurm) -> None:
    work = Work("score-corpus", ["--x", "y"], tmp_path / "run")
    script = render(replace(PLAIN, restarts=2), work, tmp_path)
    for _ in range(2):
        result = stub.run(script, 138)
        assert result.calls[0][-5:] == ["-m", "megatron_slm.cli", "score-corpus", "--x", "y"]
        assert result.calls[1] == ["scontrol", "requeue", "12"]
    result = stub.run(script, 140)
    assert result.code == 75 and len(result.calls) == 1 and "SIGUSR2, 3 times" in result.errors


def test_unhealthy_node_is_excluded(tmp_path: Path, stub: StubSlurm) -> None:
    run = tmp_path / "my run"
    script = script_of(replace(PLAIN, check_nodes=True, sbatch=["exclude=node9"]), run)
    report = 'echo node1 > "${@: -1}"'  # the file that the last argument names
    result = stub.run(script, 1, actions=(report,))
    save, files = str(run), f"{run}/slurm"
    assert result.calls[0][-12:-6] == ["megatron_slm.cli", "check-nodes", "--gpus", "4", "--save", save]
    assert result.calls[0][-6:-4] == ["--needed", "2"]
    assert result.calls[0][-4:] == [
        *("--healthy-nodes", f"{files}/healthy_nodes", "--unhealthy-nodes", f"{files}/unhealthy_nodes")
    ]
    assert result.calls[1:] == [
        ["scontrol", "requeue", "12"],
        ["scontrol", "update", "JobId=12", "ExcNodeList=node9,node1"],
    ]
    assert "unhealthy nodes are excluded: node1; requeueing" in result.errors
    result = stub.run(script, 1, actions=("printf 'node0\\nnode2\\n' > \"${@: -1}\"",))
    assert result.code == 2 and "all nodes are unhealthy: node0,node2" in result.errors
    assert "launch: the node check failed with exit code 1; requeueing" in stub.run(script, 1).errors
    healthy = stub.run(script, actions=('echo node0 > "${@: -3:1}"',))
    assert healthy.code == 0 and [call[0] for call in healthy.calls] == ["srun", "srun"]
    assert (run / "slurm" / "failures").read_text() == "none 1\n", "a check that names no node counts as a failure"


def test_only_node_is_excluded_if_its_check_names_none(tmp_path: Path, stub: StubSlurm) -> None:
    script = script_of(replace(PLAIN, nodes=1, check_nodes=True), tmp_path / "run")
    result = stub.run(script, 127, SLURM_JOB_NUM_NODES="1", SLURMD_NODENAME="node5")
    assert result.calls[2] == ["scontrol", "update", "JobId=12", "ExcNodeList=node5"]


def test_job_with_a_failing_node_continues_on_a_spare_one(tmp_path: Path, stub: StubSlurm) -> None:
    run = tmp_path / "my run"
    settings = replace(PLAIN, spare_nodes=1, check_nodes=True)
    script = script_of(settings, run, "--lr", "1")
    assert "#SBATCH --nodes=3\n" in script and "--needed 2 --healthy-nodes" in script
    report = 'printf \'node0\\nnode2\\n\' > "${@: -3:1}"; echo node1 > "${@: -1}"'
    result = stub.run(script, 0, 137, actions=(report,), SLURM_JOB_NUM_NODES="3")
    check, ranks, *requeue = result.calls
    assert "--nodes=3" in check and "--ntasks=3" in check
    assert ranks[3:7] == ["--nodes=2", "--ntasks=8", "--nodelist=node0,node2", "python"]
    assert requeue[1] == ["scontrol", "update", "JobId=12", "ExcNodeList=node1"], "a later start excludes it"
    report = 'echo node2 > "${@: -3:1}"; touch "${@: -1}"'
    script = script_of(replace(settings, nodes=1, launcher=TORCHRUN), run)
    hostnames, *_, ranks = stub.run(script, actions=(report,)).calls[1:]
    assert hostnames == ["scontrol", "show", "hostnames", "node2"]
    assert ranks[3:6] == ["--nodes=1", "--ntasks=1", "--nodelist=node2"]
    assert ranks[ranks.index("--nnodes") + 1] == "1"


def test_seeds_have_their_directories(tmp_path: Path, stub: StubSlurm) -> None:
    run = tmp_path / "my run"
    script = script_of(replace(PLAIN, seeds=[7, 11]), run, "--lr", "1")
    assert "#SBATCH --array=0-1\n" in script and "%A_%a.log" in script
    result = stub.run(script, SLURM_ARRAY_TASK_ID="1")
    save = f"{run}/seed-11"
    assert result.calls[0][-8:] == ["--lr", "1", "--seed", "11", "--save", save, "--load", save]
    assert (run / "slurm" / "seed-11" / "ended").exists()


def test_torchrun_runs_once_per_node(tmp_path: Path, stub: StubSlurm) -> None:
    script = script_of(replace(PLAIN, launcher=TORCHRUN, cpus_per_task=None), tmp_path / "run", "--lr", "1")
    assert "#SBATCH --ntasks-per-node=1\n" in script
    srun = stub.run(script).calls[-1]
    assert srun[srun.index("-m") :][:6] == ["-m", "megatron_slm.torchrun", "--nnodes", "2", "--nproc-per-node", "4"]
    assert srun[-5:] == [":10012", "-m", "megatron_slm.pretrain", "--lr", "1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": 0}, "--nodes is 0, and must be at least 1"),
        ({"spare_nodes": -1}, "--spare-nodes is -1, and must be at least 0"),
        ({"spare_nodes": 1, "check_nodes": False}, "--spare-nodes has no effect with --no-check-nodes"),
        ({"time": "tomorrow"}, "--time 'tomorrow' is no time of Slurm"),
        ({"partition": "a\nb"}, "--partition: .* must be one line"),
        ({"account": "a\x1b[31m"}, "--account: .* must be one line"),
        ({"env": ["A B=1"]}, "--env 'A B=1' must be NAME=VALUE"),
        ({"env": ["A=\udcff"]}, "--env A: .* is not valid UTF-8 text"),
        ({"setup": ["echo \0"]}, "--setup: .* is not valid UTF-8 text"),
        ({"env": ["RANK=1"]}, "--env RANK: Slurm sets this variable"),
        ({"container_mounts": ["/a:/a"]}, "--container-mounts needs --container-image"),
        ({"container_image": "x", "container_mounts": ["/a:/a,/b:/b"]}, "has a comma"),
        ({"container_image": "x", "container_mounts": ["/a b:"]}, "must be SOURCE:TARGET"),
        ({"container_runtime": APPTAINER}, "--container-runtime apptainer needs --container-image"),
        ({"sbatch": ["mem 4G"]}, "--sbatch 'mem 4G' is no option"),
        ({"sbatch": ["nodes=4"]}, "--sbatch nodes: the script sets this option. Use --nodes instead"),
        ({"seeds": [1, 1]}, "--seeds has 1 twice"),
        ({"signal_time": 70000}, "exceeds Slurm's limit"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JobSettings(**fields).check()  # type: ignore[arg-type]
