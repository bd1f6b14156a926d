"""Plan a run before it starts: memory, time and layout on a number of GPUs.

    python tools/plan_run.py --config RECIPE.yaml ... --gpus 64 --gpu h100

All other arguments are those of the trainer, such as --vocab-size and --reference-load. The command searches the layout
(TP, PP with virtual stages, CP, micro-batch size and recomputation) for the fastest run that fits, and prints it as
flags and as a recipe. It reads recipes only: data, tokenizer and checkpoints need not be on this machine. With --gpu
cpu, it plans the given layout, and measures the speed of this machine for that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.adoption import adopt_settings
from megatron_slm.checkpoint.source import find_source
from megatron_slm.config.checks import derive
from megatron_slm.config.constraints import UNSET
from megatron_slm.config.flags import Parser, parse
from megatron_slm.config.paths import expand_user
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import ModelConfig, RunConfig
from megatron_slm.planning.devices import CPU, DEVICES, Device, cpu_device
from megatron_slm.planning.report import flags, plan_values, recipe, rejection_lines, remedy_lines, text
from megatron_slm.planning.search import Plan, Problem, rejections, remedies, search
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import write_text
from megatron_slm.runtime.output import print_result
from megatron_slm.runtime.reporting import run_tool
from megatron_slm.training.preflight import needs_reference

PLACEHOLDER = "REFERENCE"  # of a reference model that is not given yet


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the planner's flags; return them and the trainer's arguments.

    Raises:
        ConfigError: an invalid value.
    """
    parser = Parser(description=__doc__, usage="%(prog)s --gpus N --gpu DEVICE [...] TRAINING ARGUMENTS")
    add = parser.add_argument
    add("--gpus", type=int, default=1, help="number of devices, or of processes with --gpu cpu [1]")
    add("--gpu", type=str.lower, choices=[*DEVICES, CPU], default="h100", help="device [h100]")
    add("--no-search", action="store_true", help="plan the given layout only")
    add("--no-time", action="store_true", help="plan the memory of the given layout only")
    add("--json", action="store_true", help="print JSON, errors included, with sizes in bytes and times in seconds")
    add("--output", type=expand_user, metavar="FILE.yaml", help="write the layout as a recipe, for a last --config")
    add(
        "--reference-config",
        type=expand_user,
        nargs="+",
        metavar="RECIPE.yaml",
        help="models of --reference-load, if they are elsewhere: one recipe each",
    )
    add("--write-gb-per-second", type=float, default=10.0, help="write bandwidth of the file system [10]")
    arguments, training = parser.parse_known_args(list(argv))
    bounded = ("--gpus", arguments.gpus, 1), ("--write-gb-per-second", arguments.write_gb_per_second, 0.001)
    for flag, value, least in bounded:
        if not least <= value < 1e7:
            raise ConfigError(f"{flag} {value} must be at least {least} and below 10,000,000.")
    return arguments, training


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 if no layout fits."""
    given = sys.argv[1:] if argv is None else argv
    return run_tool(lambda: _plan_or_explain(given))


def _plan_or_explain(argv: Sequence[str]) -> None:
    """Plan; with --json, also print an error as JSON, so that the output is valid in every case."""
    try:
        report, error = _plan(argv)
    except ConfigError as problem:
        if "--json" in argv:
            print_result(json.dumps({"error": str(problem)}, indent=1))
        raise
    print_result(report)
    if error is not None:
        raise error


def _plan(argv: Sequence[str]) -> tuple[str, ConfigError | None]:
    """Return the report, and an error if the run does not fit."""
    arguments, training = parse_arguments(argv)
    problem = read_problem(arguments, training)
    lines: list[str] = []
    values: dict[str, Any] = {}
    bandwidth, with_time = 1e9 * arguments.write_gb_per_second, not arguments.no_time
    plan: Plan | None
    if arguments.no_search or arguments.no_time or arguments.gpu == CPU:
        plan = Plan(problem.layout({}))
        title = "as given"
    else:
        plan, title = search(problem), "fastest layout that fits"
    if plan is None:
        found = remedies(problem)
        lines += remedy_lines(found)
        values["remedies"] = [
            {"name": remedy.name, "fits": remedy.plan is not None, "settings": remedy.plan and remedy.plan.settings}
            for remedy in found
        ]
    else:
        values["plan"] = plan_values(plan, bandwidth, with_time=with_time)
        lines += text(values["plan"], title)
        if title != "as given":
            neighbors = rejections(problem, plan)
            lines += rejection_lines(neighbors)
            values["rejected"] = [vars(rejection) for rejection in neighbors]
        lines += ["flags: " + flags(plan), "recipe:", *(f"  {line}" for line in recipe(plan).splitlines())]
        values |= {"flags": flags(plan), "recipe": recipe(plan)}
        if arguments.output is not None:
            write_text(arguments.output, recipe(plan), "--output", is_ours=_is_recipe)
    error = None
    if plan is None or not plan.fits:
        needed = "" if plan is None else f" ({plan.memory.moment} on stage {plan.memory.stage})"
        error = ConfigError(f"the run does not fit on {arguments.gpus} {arguments.gpu}{needed}. See the report above.")
        values["error"] = str(error)
    return json.dumps(values, indent=1) if arguments.json else "\n".join(lines), error


def _is_recipe(path: Path) -> bool:
    """Return whether a file is a recipe of this command, which may be replaced."""
    return path.read_text(encoding="utf-8", errors="replace").startswith("tensor_model_parallel_size:")


def read_problem(arguments: argparse.Namespace, training: Sequence[str]) -> Problem:
    """Return the run to be planned.

    Raises:
        ConfigError: a setting is missing or invalid.
    """
    config = parse(training, adopt_settings).config
    if config.training.micro_batch_size is UNSET:
        config = with_settings(config, {"micro_batch_size": 1})
    if config.training.global_batch_size is UNSET:
        raise ConfigError("missing required setting: --global-batch-size, which the layout must not change.")
    if needs_reference(config) and not config.reference.is_co_located and not config.reference.reference_scores:
        count = len(arguments.reference_config or [PLACEHOLDER])
        config = with_settings(config, {"reference_load": [f"{PLACEHOLDER}{number or ''}" for number in range(count)]})
    models = _reference_models(arguments.reference_config, config)
    config = derive(config)
    return Problem(config, arguments.gpus, _vocab_size(config), _device(arguments), models)


def _reference_models(paths: Sequence[str] | None, run: RunConfig) -> tuple[ModelConfig | None, ...]:
    """Return the models of --reference-config, else of --reference-load: None if a directory is not on this machine."""
    directories = run.reference.reference_load
    if paths is None:
        return tuple(_saved_model(each, run) if Path(each).is_dir() else None for each in directories)
    if len(paths) != max(len(directories), 1):
        raise ConfigError(
            f"--reference-config has {len(paths)} recipes, and --reference-load {len(directories)} models. Give one "
            "recipe per model."
        )
    return tuple(map(_recipe_model, paths))


def _saved_model(directory: str, run: RunConfig) -> ModelConfig:
    return find_source(directory, run.reference.reference_ckpt_step, "--reference-load").config().model


def _recipe_model(path: str) -> ModelConfig:
    config = derive(parse(["--config", path]).config)
    if config.model.num_layers is UNSET or config.model.hidden_size is UNSET:
        raise ConfigError(
            f"--reference-config {path} does not define a model: --num-layers or --hidden-size is missing."
        )
    return config.model


def _vocab_size(config: RunConfig) -> int:
    """Return the vocabulary size: that of the flag, or of the tokenizer."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from megatron_slm.tokenizers.tokenizer import build_run_tokenizer

    tokenizer = config.tokenizer
    if tokenizer.tokenizer_type is UNSET:
        raise ConfigError("the vocabulary size is unknown. Give --vocab-size, or the tokenizer.")
    try:
        return build_run_tokenizer(config).vocab_size
    except ConfigError as error:
        raise ConfigError(f"the vocabulary size is unknown: {error} Or give --vocab-size.") from error


def _device(arguments: argparse.Namespace) -> Device:
    if arguments.gpu != CPU:
        return DEVICES[arguments.gpu]
    import psutil

    return cpu_device(psutil.virtual_memory().total, arguments.gpus)
