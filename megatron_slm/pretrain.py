"""The command line of the trainer: ``torchrun ... -m megatron_slm.pretrain``, or one process without torchrun.

Heavy imports stand inside functions, so that ``--help`` answers at once and the helper processes that the checkpoint
format starts do not load torch for nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_slm.config.checks import check
from megatron_slm.config.flags import Command, parse
from megatron_slm.config.recipe import dump_config
from megatron_slm.runtime.errors import ConfigError, DivergedError, report_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake of the user's, 3 where training diverged."""
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        if command.action == "print-config":
            print(dump_config(command.config), end="")
        else:
            _run(command)
    except (ConfigError, DivergedError) as error:
        report_error(error)
        return error.exit_code
    return 0


def _run(command: Command) -> None:
    from megatron_slm.data.datasets import check_corpora
    from megatron_slm.data.tokenizers.tokenizer import tokenizer_of
    from megatron_slm.objective.policy import parse_policy
    from megatron_slm.runtime.console import make_console
    from megatron_slm.runtime.process import launched_world_size

    config = command.config
    check(config, launched_world_size())
    parse_policy(config.objective.slm_score)
    tokenizer = tokenizer_of(config)
    check_corpora(config.data, tokenizer)
    if config.reference.reference_scores:
        from megatron_slm.training.setup import read_scores

        read_scores(config, tokenizer)
    console = make_console(int(os.environ.get("RANK", 0)) == 0)
    if command.action == "dry-run":
        from megatron_slm.training.plan import print_plan

        print_plan(console, config, tokenizer.vocab_size, launched_world_size())
    else:
        _train(config, tokenizer, console)


def _train(config, tokenizer, console) -> None:  # type: ignore[no-untyped-def]
    from megatron_slm.runtime import process
    from megatron_slm.runtime.software import describe_software
    from megatron_slm.training.loop import train
    from megatron_slm.training.metrics import print_settings
    from megatron_slm.training.setup import build_run, parallel_layout

    groups = process.start(
        parallel_layout(config),
        backend=config.parallel.distributed_backend,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
        seed=config.training.seed,
    )
    try:
        console.print(describe_software(groups))
        print_settings(console, config)
        run = build_run(config, tokenizer, groups, console)
        train(run)
        for sink in run.sinks:
            sink.close()
    finally:
        process.stop()


if __name__ == "__main__":
    sys.exit(main())
