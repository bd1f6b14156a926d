"""Preparation of a job: checks of its command, recipes and script, and submission."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from pathlib import Path

import yaml

from megatron_slm.checkpoint.adoption import adopt_settings
from megatron_slm.cli.pretrain import print_checked_plan
from megatron_slm.config.constraints import UNSET
from megatron_slm.config.flags import parse
from megatron_slm.config.layers import read_layers
from megatron_slm.config.paths import expand_user, metrics_file
from megatron_slm.config.schema import RunConfig
from megatron_slm.launch import slurm
from megatron_slm.launch.flags import JobRequest, job_parser
from megatron_slm.launch.quoting import check_line
from megatron_slm.launch.records import SCRIPT_FILE, JobRecord, original_of, queued_states, read_jobs
from megatron_slm.launch.script import ENDED, EXCLUDED, FAILURES, MARK, Work, render
from megatron_slm.launch.settings import PRETRAIN, JobSettings
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_regular, explained_write, write_text
from megatron_slm.training.preflight import default_device, resolve_values

RECIPES = "recipes"  # subdirectory of the records
SEED_FLAGS = ("--seed", "--save", "--load")


@dataclass(frozen=True)
class Prepared:
    """Represent a checked job before its submission."""

    record: JobRecord  # without job id
    script: str
    recipes: dict[str, str]  # content by file name

    @property
    def script_path(self) -> Path:
        """Return the path of the batch script."""
        return self.record.records / SCRIPT_FILE

    @property
    def is_finished(self) -> bool:
        """Return whether this job has already succeeded with the same script and recipes."""
        files = {self.script_path: self.script} | self._recipe_files()
        with suppress(OSError, UnicodeDecodeError):
            unchanged = all(path.read_text(encoding="utf-8") == text for path, text in files.items())
            seeds: list[int | None] = [*self.record.seeds] or [None]
            return unchanged and all((self.record.ended(seed) or (1, ""))[0] == 0 for seed in seeds)
        return False

    def write(self) -> None:
        """Write script and recipes, and remove the state of an earlier job."""
        directory = self.record.records
        with explained_write(directory, "--run-dir"):
            (directory / RECIPES).mkdir(parents=True, exist_ok=True)
            for name in (ENDED, EXCLUDED, FAILURES):
                for path in (directory / name, *(directory / f"seed-{seed}" / name for seed in self.record.seeds)):
                    path.unlink(missing_ok=True)
        for path, text in self._recipe_files().items():
            write_text(path, text, "--run-dir")
        write_text(self.script_path, self.script, "--run-dir", is_ours=_is_script)

    def submit(self, after: Sequence[str] = ()) -> JobRecord:
        """Submit the written script and record the job id; a job that cannot be recorded is cancelled."""
        record = replace(self.record, job_id=slurm.submit(self.script_path, after))
        try:
            record.write()
        except BaseException:
            slurm.cancel([record.job_id])  # neither status nor cancel would find it
            raise
        return record

    def _recipe_files(self) -> dict[Path, str]:
        return {self.record.records / RECIPES / name: text for name, text in self.recipes.items()}


def prepare(
    request: JobRequest,
    *,
    stage: str | None = None,
    after: Sequence[str] = (),
    dependents: Sequence[str] = (),
) -> Prepared:
    """Check the command of a job, and return its script.

    Args:
        request: command line of the job.
        stage: name of the stage in a chain.
        after: stages that precede it and may create its files, which are not checked then.
        dependents: stages that Slurm cancels if this one fails.

    Raises:
        ConfigError: the command is wrong, or a file is missing.
    """
    settings, trains = request.settings, request.command == PRETRAIN
    if settings.seeds:
        _check_seeds(request)
    arguments = list(request.arguments)
    config = _parsed(request, arguments) if trains else None
    save = config.checkpoint.save if config is not None else None
    if save is None and request.run_dir is None:
        raise ConfigError("--run-dir is missing: it receives the script and the logs. Add it" + " or --save." * trains)
    run_dir = Path(check_line(expand_user(request.run_dir or save or ""), "--run-dir")).absolute()
    if "\\" in str(run_dir):
        raise ConfigError(f"--run-dir {run_dir} has a backslash, with which Slurm finds no log file. Rename it.")
    if settings.container_image is not None:
        _check_mounts(Path.cwd(), run_dir, *([] if save is None else [Path(save).absolute()]))
    if request.check_files:
        _check_programs(settings)
    if config is not None:
        arguments += _save_flags(config, run_dir, with_seeds=bool(settings.seeds))
        config = _check_run(request, arguments, run_dir, checks_files=request.check_files and not after)
    else:
        _check_command(request)
    recipes = _copy_recipes(request.recipes)
    work = Work(
        command=request.command,
        arguments=[*_recipe_flags(recipes, run_dir), *arguments],
        run_dir=run_dir,
        save=None if config is None else Path(save or run_dir).absolute(),
        dependents=list(dependents),
    )
    record = JobRecord(
        job_id="",
        stage=stage or settings.name or run_dir.name,
        run_dir=str(run_dir),
        save=None if work.save is None else str(work.save),
        metrics=None if config is None or settings.seeds else _absolute(metrics_file(config)),
        iterations=None if config is None else config.training.train_iters,
        seeds=settings.seeds,
        after=list(after),
    )
    return Prepared(record, render(settings, work, Path.cwd()), recipes)


def check_idle(record: JobRecord) -> None:
    """Raise ConfigError if an earlier job of the run directory is in the queue."""
    try:
        earlier = read_jobs(record.run_dir)
    except ConfigError:
        return
    if original_of(record.run_dir) is not None:
        return  # the jobs are those of another directory
    for state in queued_states(earlier):
        if not state.has_ended:
            raise ConfigError(
                f"job {state.task_id} of {record.run_dir} is {state.state}. Wait for it, or cancel it with "
                "megatron-slm-launch cancel."
            )


def _parsed(request: JobRequest, arguments: Sequence[str]) -> RunConfig:
    """Return the settings of a training run, unresolved; its action must be to train."""
    command = parse([*_config_flags(request), *arguments], other_flags=list(job_parser()._option_string_actions))
    if command.action != "train":
        raise ConfigError(f"--{command.action} is for the trainer: python -m megatron_slm.pretrain --{command.action}.")
    return command.config


def _save_flags(config: RunConfig, run_dir: Path, *, with_seeds: bool) -> list[str]:
    """Return the flags with which the run saves to its directory and resumes."""
    checkpoint = config.checkpoint
    if with_seeds or config.training.skip_train:
        return []
    flags = [] if checkpoint.save is not None else ["--save", str(run_dir)]
    return flags if checkpoint.load is not None else [*flags, "--load", checkpoint.save or str(run_dir)]


def _check_run(request: JobRequest, arguments: Sequence[str], run_dir: Path, *, checks_files: bool) -> RunConfig:
    """Return the settings of a training run after the checks of --dry-run at the world size of the job."""
    world_size = request.settings.world_size
    for number, seed in enumerate(request.settings.seeds or [None]):
        flags = [] if seed is None else _seed_flags(run_dir, seed)
        argv = [*_config_flags(request), *arguments, *flags]
        if not checks_files and not _origin_exists(config := parse(argv).config):
            return config if config.model.num_layers is UNSET else resolve_values(config, world_size)
        command = parse(argv, adopt_settings)
        config = resolve_values(command.config, world_size)
        if checks_files:
            shown = number == 0 and not request.dry_run
            print_checked_plan(config, command.note, world_size, runs_here=_runs_here(request), shown=shown)
    return config


def _config_flags(request: JobRequest) -> list[str]:
    return ["--config", *request.recipes] if request.recipes else []


def _origin_exists(config: RunConfig) -> bool:
    """Return whether the checkpoint that the run starts from exists, which an earlier stage may still have to save."""
    checkpoint = config.checkpoint
    return all(path is None or Path(path).exists() for path in (checkpoint.load, checkpoint.pretrained_checkpoint))


def _seed_flags(run_dir: Path, seed: int) -> list[str]:
    save = str(run_dir / f"seed-{seed}")
    return ["--seed", str(seed), "--save", save, "--load", save]


def _runs_here(request: JobRequest) -> bool:
    """Return whether the device and software of this machine are those of the job's nodes, as far as is known."""
    uses_gpus = request.settings.gpus_per_node > 0
    return request.settings.container_image is None and uses_gpus == (default_device().type == "cuda")


def _check_mounts(*directories: Path) -> None:
    """Raise ConfigError for a directory that a container cannot mount under its path."""
    for directory in directories:
        if {":", ","} & set(str(directory)):
            raise ConfigError(f"{directory} has a colon or a comma, which separate mounts of a container. Rename it.")


def _check_programs(settings: JobSettings) -> None:
    """Raise ConfigError if the virtual environment, the interpreter or the file of the image is missing."""
    paths = [("--venv", settings.venv and str(Path(settings.venv) / "bin" / "activate"))]
    if settings.container_image is None:
        paths.append(("--python", settings.python if "/" in (settings.python or "") else None))
    elif settings.container_image.startswith(("/", "./", "../")):
        paths.append(("--container-image", settings.container_image))
    for flag, path in paths:
        if path is not None and not Path(path).exists():
            raise ConfigError(
                f"{flag}: {path} does not exist. Correct the path; add --no-check-files if it exists on the nodes only."
            )


def _check_seeds(request: JobRequest) -> None:
    if request.command != PRETRAIN:
        raise ConfigError(f"--seeds is for training runs, and --command is {request.command}. Leave it out.")
    if request.run_dir is None:
        raise ConfigError("--seeds needs --run-dir, below which each seed has a directory.")
    for flag in SEED_FLAGS:
        if any(argument == flag or argument.startswith(f"{flag}=") for argument in request.arguments):
            raise ConfigError(
                f"{flag} and --seeds exclude each other: each seed has its seed and directory. Leave it out."
            )


def _check_command(request: JobRequest) -> None:
    """Raise ConfigError for wrong flags of a command other than training."""
    if request.recipes:
        raise ConfigError(f"--config is for training runs, and --command is {request.command}. Leave it out.")
    module = import_module(f"megatron_slm.cli.{request.command.replace('-', '_')}")
    parse_arguments = getattr(module, "parse_arguments", None)
    if parse_arguments is not None and signature(parse_arguments).parameters:  # others parse only sys.argv
        parse_arguments(request.arguments)


def _copy_recipes(recipes: Sequence[str]) -> dict[str, str]:
    """Return recipes and their bases as files in order of application, for the job and its restarts."""
    layers = read_layers([Path(expand_user(recipe)) for recipe in recipes])
    files = {}
    for number, (path, values) in enumerate(layers, 1):
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        files[f"{number}-{path.name}"] = f"# {str(path.absolute())!r}\n{text}"
    return files


def _recipe_flags(recipes: dict[str, str], run_dir: Path) -> list[str]:
    directory = Work("", [], run_dir).records / RECIPES
    return ["--config", *(str(directory / name) for name in recipes)] if recipes else []


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _is_script(path: Path) -> bool:
    check_regular(path)
    with path.open("rb") as file:
        return MARK.encode() in b"".join(file.readlines(1000)[:2])
