"""Batch scripts: directives, environment, node check, ranks, and the reaction to their exit code.

They are not written by submitit, whose jobs run a pickled Python function: a site can read, edit and submit a script.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from megatron_slm.config.checkpoint_files import TRACKER
from megatron_slm.config.paths import STOP_FILE
from megatron_slm.launch.quoting import INDENT, argument_lines, bash_array, sbatch_line
from megatron_slm.launch.settings import GPU_OPTIONS, LAUNCH_VARIABLES, PRETRAIN, PYXIS, TORCHRUN, JobSettings

MARK = "written by megatron-slm-launch"  # in the second line of a script
RECORDS = "slurm"  # subdirectory of a run for script, recipes, logs and state
ENDED, EXCLUDED, FAILURES = "ended", "excluded_nodes", "failures"  # files of the script in its directory of records
STOPS = 3  # requeues after time limits without a new checkpoint; the start-up may be longer than the limit
INCOMPLETE = 75  # exit code of a job whose run stopped before its end and which is not requeued (EX_TEMPFAIL)

FUNCTIONS = """\
# Record the end of the job: finish CODE MESSAGE.
finish() {
    echo "launch: $2" >&2
    echo "$1 $2" > "$records/ended"
    if [ "$1" != 0 ] && [ -n "$dependents" ]; then
        echo "launch: Slurm cancels the stages that depend on this job: $dependents" >&2
    fi
    exit "$1"
}

# Requeue the job, which then resumes from its newest checkpoint: requeue MESSAGE.
requeue() {
    [ "$requeues" = yes ] || finish 75 "$1; this job is not requeued. Submit it again to resume."
    echo "launch: $1; requeueing job $SLURM_JOB_ID" >&2
    trap '' TERM # Slurm ends this script; a requeued job can be changed before that
    if ! scontrol requeue "$SLURM_JOB_ID"; then # after the failure of a node, Slurm may have requeued it already
        scontrol --oneliner show job "$SLURM_JOB_ID" | grep -Eq 'JobState=(PENDING|COMPLETING|REQUEUED|CANCELLED)' ||
            finish 75 "$1; the job cannot be requeued. Submit it again to resume."
    fi
    if [ -s "$records/excluded_nodes" ]; then
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded$(sort -u "$records/excluded_nodes" | paste -sd,)"
    fi
    exit 75
}

# Requeue the job, unless it ended at least LIMIT times without a new checkpoint: retry CODE MESSAGE LIMIT.
retry() {
    local newest last="" count=0
    newest=$(cat "$save/TRACKER" 2> /dev/null || echo none)
    [ ! -e "$records/failures" ] || read -r last count < "$records/failures"
    [ "$last" = "$newest" ] || count=0
    [ "$count" -lt "$3" ] || finish "$1" "$2, $((count + 1)) times without a new checkpoint"
    echo "$newest $((count + 1))" > "$records/failures"
    requeue "$2"
}
""".replace("TRACKER", TRACKER)

NODE_CHECK = """\
# Check the nodes, one task each. Failing nodes are excluded; if too few are left, the job is requeued.
rm -f "$records/healthy_nodes" "$records/unhealthy_nodes"
"${srun[@]}" --kill-on-bad-exit=0 --wait=600 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \\
    --ntasks-per-node=1 "${container[@]}" "$python" -m megatron_slm.cli check-nodes --gpus GPUS --save "$save" \\
    --needed NEEDED --healthy-nodes "$records/healthy_nodes" --unhealthy-nodes "$records/unhealthy_nodes"
code=$?
if [ ! -s "$records/healthy_nodes" ]; then
    if [ ! -s "$records/unhealthy_nodes" ]; then
        # A single node that cannot start Python is not named by the check.
        [ "$SLURM_JOB_NUM_NODES" -gt 1 ] || echo "$SLURMD_NODENAME" >> "$records/excluded_nodes"
        retry 1 "the node check failed with exit code $code" "$restarts"
    fi
    nodes=$(sort -u "$records/unhealthy_nodes" | paste -sd,)
    count=$(sort -u "$records/unhealthy_nodes" | wc -l)
    if [ "$count" -gt 1 ] && [ "$count" -ge "$SLURM_JOB_NUM_NODES" ]; then
        finish 2 "all nodes are unhealthy: $nodes"
    fi
    cat "$records/unhealthy_nodes" >> "$records/excluded_nodes"
    requeue "unhealthy nodes are excluded: $nodes"
fi
"""

SPARE_NODES = """\
# Start the ranks on healthy nodes; if the job is requeued later, it excludes the unhealthy ones.
cat "$records/unhealthy_nodes" >> "$records/excluded_nodes"
nodes=$(paste -sd, "$records/healthy_nodes")
echo "launch: the ranks start on $nodes" >&2
srun+=(--nodes=NEEDED --ntasks=TASKS --nodelist="$nodes")
"""

OUTCOME = """\
case $code in
    0)
        [ -e "$save/STOP_FILE" ] || finish 0 "finished"
        reason="the run stopped before its end ($(cat "$save/STOP_FILE"))"
        [ "$reason" = "${reason/SIGTERM/}" ] || requeue "$reason" # preempted, perhaps before its first step
        retry 75 "$reason" STOPS
        ;;
    2 | 3) finish "$code" "exit code $code, an error that a restart repeats" ;;
    138 | 140)
        limit=STOPS
        [ "${command[1]}" = megatron_slm.pretrain ] || limit=$restarts # others have no checkpoint as a sign of progress
        retry 75 "the ranks were ended by SIGUSR1 or SIGUSR2" "$limit"
        ;;
    *) retry "$code" "the ranks failed with exit code $code" "$restarts" ;;
esac
""".replace("STOP_FILE", STOP_FILE).replace("STOPS", str(STOPS))


@dataclass(frozen=True)
class Work:
    """Represent the work of a job: a command and its directories."""

    command: str  # name of a console command without "megatron-slm-"
    arguments: list[str]
    run_dir: Path  # absolute
    save: Path | None = None  # of a training run
    dependents: list[str] = field(default_factory=list)  # stages of a chain that Slurm cancels if this job fails

    @property
    def records(self) -> Path:
        """Return the directory of script, recipes, logs and state."""
        return self.run_dir / RECORDS


def render(settings: JobSettings, work: Work, directory: Path) -> str:
    """Return the batch script of a job that runs in ``directory``."""
    sections = [
        [*_head(settings, work), *_directives(settings, work, directory)],
        [*_variables(settings, work), *_command(settings, work), *_steps(settings, work, directory)],
        FUNCTIONS.splitlines(),
        _environment(settings),
        _node_check(settings),
        _ranks(settings),
        OUTCOME.splitlines(),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def log_pattern(settings: JobSettings) -> str:
    """Return the name of the log file in Slurm's notation."""
    return "%A_%a.log" if settings.seeds else "%j.log"


def _head(settings: JobSettings, work: Work) -> list[str]:
    spare = f" and {settings.spare_nodes} spare" if settings.spare_nodes else ""
    return [
        "#!/bin/bash",
        f"# {work.command}, nodes: {settings.nodes}{spare}, ranks per node: {settings.node_ranks}; {MARK}.",
        f"# megatron-slm-launch status|logs|cancel {shlex.quote(str(work.run_dir))}",
    ]


def _directives(settings: JobSettings, work: Work, directory: Path) -> list[str]:
    own = dict(settings.sbatch_options)
    gpus = settings.gpus_per_node if not any(name in own for name in GPU_OPTIONS) else 0
    log = str(work.records).replace("%", "%%") + f"/{log_pattern(settings)}"
    options: list[tuple[str, object]] = [
        ("job-name", settings.name or work.run_dir.name),
        ("partition", settings.partition),
        ("account", settings.account),
        ("qos", settings.qos),
        ("nodes", settings.allocated_nodes),
        ("ntasks-per-node", settings.node_tasks),
        ("gpus-per-node", gpus or None),
        ("cpus-per-task", settings.cpus_per_task),
        ("time", settings.time),
        ("signal", f"USR1@{settings.signal_time}"),
        ("array", f"0-{len(settings.seeds) - 1}" if settings.seeds else None),
        ("chdir", directory),
        ("output", log),
        ("open-mode", "append"),
    ]
    lines = [sbatch_line(name, value) for name, value in options if value is not None]
    lines.append(sbatch_line("requeue" if settings.requeue else "no-requeue"))
    return [*lines, *(sbatch_line(name, value) for name, value in settings.sbatch_options)]


def _environment(settings: JobSettings) -> list[str]:
    lines = [f"module load {shlex.quote(name)}" for name in settings.module]
    if settings.venv is not None:
        lines.append(f"source {shlex.quote(str(Path(settings.venv).absolute() / 'bin' / 'activate'))}")
    lines += settings.setup
    for assignment in settings.env:
        name, _, value = assignment.partition("=")
        lines.append(f"export {name}={shlex.quote(value)}")
    if not lines:
        return []
    failure = "trap 'finish $? \"the environment cannot be prepared\"' EXIT"
    return ["# Environment of the job", failure, "set -e", *lines, "set +e", "trap - EXIT"]


def _variables(settings: JobSettings, work: Work) -> list[str]:
    excluded = dict(settings.sbatch_options).get("exclude")
    lines = [
        f"unset {' '.join(LAUNCH_VARIABLES)}",
        f"requeues={'yes' if settings.requeue else 'no'}",
        f"restarts={settings.restarts} # after failures without a new checkpoint",
        f"excluded={shlex.quote(f'{excluded},' if excluded else '')}",
        f"dependents={shlex.quote(', '.join(work.dependents))}",
        f"save={shlex.quote(str(work.save or work.run_dir))}",
        f"records={shlex.quote(str(work.records))} # script, recipes, logs, state",
    ]
    if settings.seeds:
        lines += [
            f"seeds=({' '.join(map(str, settings.seeds))})",
            "seed=${seeds[$SLURM_ARRAY_TASK_ID]}",
            "save=$save/seed-$seed",
            "records=$records/seed-$seed",
        ]
    return [*lines, 'mkdir -p "$records" && rm -f "$records/ended"']


def _command(settings: JobSettings, work: Work) -> list[str]:
    module = ["megatron_slm.pretrain"] if work.command == PRETRAIN else ["megatron_slm.cli", work.command]
    first = ["-m", *module]
    lines = [f"python={shlex.quote(settings.interpreter)}"]
    lines += bash_array("command", [first, *argument_lines(work.arguments)])
    if settings.seeds:
        lines.append('command+=(--seed "$seed" --save "$save" --load "$save")')
    return lines


def _steps(settings: JobSettings, work: Work, directory: Path) -> list[str]:
    """Return the arrays of srun and the container, which all steps share."""
    srun = ["srun", "--label", "--kill-on-bad-exit=1"]
    if settings.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={settings.cpus_per_task}")  # not inherited since Slurm 22.05
    return [*bash_array("srun", [srun]), *bash_array("container", _container(settings, work, directory))]


def _container(settings: JobSettings, work: Work, directory: Path) -> list[list[str]]:
    if settings.container_image is None:
        return []
    paths = dict.fromkeys((str(directory), str(work.run_dir), *([] if work.save is None else [str(work.save)])))
    mounts = [*(f"{path}:{path}" for path in paths), *settings.container_mounts]
    if settings.container_runtime == PYXIS:
        return [
            [f"--container-image={settings.container_image}"],
            [f"--container-mounts={','.join(mounts)}"],
            [f"--container-workdir={directory}"],
        ]
    binds = [["--bind", mount] for mount in mounts]
    gpus = ["--nv"] if settings.gpus_per_node else []
    return [["apptainer", "exec", *gpus], *binds, ["--pwd", str(directory)], [settings.container_image]]


def _node_check(settings: JobSettings) -> list[str]:
    if not settings.check_nodes:
        return []
    text = NODE_CHECK.replace("GPUS", str(settings.gpus_per_node))
    if settings.spare_nodes:
        text += "\n" + SPARE_NODES.replace("TASKS", str(settings.nodes * settings.node_tasks))
    return text.replace("NEEDED", str(settings.nodes)).splitlines()


def _ranks(settings: JobSettings) -> list[str]:
    if settings.launcher != TORCHRUN:
        return [
            "# Start the ranks; SIGUSR1 before the time limit makes them save and exit.",
            '"${srun[@]}" "${container[@]}" "$python" "${command[@]}"',
            "code=$?",
        ]
    nodes = "$nodes" if settings.spare_nodes else "$SLURM_JOB_NODELIST"
    return [
        "# Start the ranks with one torchrun per node; SIGUSR1 before the time limit makes them save and exit.",
        f'head=$(scontrol show hostnames "{nodes}" | head -n 1)',
        "address=$(scontrol --oneliner show node \"$head\" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)",
        f"torchrun=(-m megatron_slm.torchrun --nnodes {settings.nodes}",
        f'{INDENT}--nproc-per-node {settings.node_ranks} --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID"',
        f'{INDENT}--rdzv-endpoint "$address:$((10000 + SLURM_JOB_ID % 20000))")',
        '"${srun[@]}" "${container[@]}" "$python" "${torchrun[@]}" "${command[@]}"',
        "code=$?",
    ]
