"""Show the tokens of a text that one or more checkpoints select: token loss, reference loss, excess loss, selection.

Runs in one process or under torchrun, in any parallel layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.cli.layout import add_checkpoint_flags, add_layout_flags, add_model_flags, given_layout, start_ranks
from megatron_slm.cli.selection_checkpoints import (
    LOAD,
    REFERENCE,
    Choice,
    choose_checkpoints,
    run_name,
    shared_tokenizer,
)
from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.schema import ParallelConfig
from megatron_slm.config.schema.training import PARAMS_DTYPES
from megatron_slm.config.tokenizer_flags import add_tokenizer_flags, given_tokenizer_settings
from megatron_slm.runtime.errors import ConfigError, refuse
from megatron_slm.runtime.reporting import run_command

if TYPE_CHECKING:
    from megatron_slm.analysis.selection_view import CheckpointTokens, ReferenceTokens
    from megatron_slm.inference.model import InferenceModel
    from megatron_slm.inference.text_selection import TextLosses
    from megatron_slm.inference.texts import EncodedTexts
    from megatron_slm.objective.selection.policy import Policy
    from megatron_slm.runtime.groups import Groups
    from megatron_slm.scores.sidecar import ContextRule

REFUSED = {
    "--context-parallel-size": "Ranks beyond tensor and pipeline parallelism divide the windows.",
    "--prompt": "Use --input FILE, or --input - for standard input.",
    "--output": "Use --html FILE or --json FILE.",
    "--reference-scores": "Sidecars belong to corpora; give the reference model with --reference-load.",
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    _add_models(parser.add_argument)
    _add_text(parser.add_argument)
    _add_output(parser.add_argument)
    add_layout_flags(parser.add_argument)
    add_tokenizer_flags(parser.add_argument_group("tokenizer", "default: the tokenizer of the checkpoint's run"))
    arguments = parse_strictly(parser, argv, REFUSED)
    least = {"micro_batch_size": 1, "max_tokens": 0, "seq_length": 1, "stride": 1, "ckpt_step": 0}
    given = {name: getattr(arguments, name) for name in least}
    ratio = arguments.slm_selection_ratio
    of_reference = {"ckpt-step": arguments.reference_ckpt_step, "precision": arguments.reference_precision}
    refuse(
        [
            *(
                f"--{name.replace('_', '-')} is {value}, and must be at least {least[name]}."
                for name, value in given.items()
                if value is not None and value < least[name]
            ),
            *([] if ratio is None or 0 < ratio <= 1 else [f"--slm-selection-ratio is {ratio}, and must be in (0, 1]."]),
            *(
                ["Give either --all-steps or --ckpt-step."]
                if arguments.all_steps and given["ckpt_step"] is not None
                else []
            ),
            *(
                f"--reference-{name} has no effect without {REFERENCE}. Add it, or leave it out."
                for name, value in of_reference.items()
                if value is not None and arguments.reference_load is None
            ),
        ]
    )
    return arguments


def _add_models(add: Callable[..., argparse.Action]) -> None:
    add(
        LOAD,
        type=expand_user,
        nargs="+",
        required=True,
        metavar="DIR[:STEP]",
        help="checkpoint directories of the training model; :STEP chooses an iteration, default --ckpt-step",
    )
    add_model_flags(add)
    add("--all-steps", action="store_true", help="show every iteration that the directories of --load hold")
    add(REFERENCE, type=expand_user, metavar="DIR", help="checkpoint directory of the reference model")
    add("--reference-ckpt-step", type=int, help="checkpoint iteration of the reference model; default the newest")
    add(
        "--reference-precision",
        choices=PARAMS_DTYPES,
        help="precision of the reference model; default as in the run of the first checkpoint",
    )
    add("--slm-selection-ratio", type=float, metavar="K", help="fraction of tokens to select; default the run's")
    add("--slm-score", help="score or combination of scores to rank tokens by; default the run's")
    add_checkpoint_flags(add)
    add("--micro-batch-size", type=int, default=8, help="windows per data-parallel rank and forward pass")


def _add_text(add: Callable[..., argparse.Action]) -> None:
    add(
        "--input",
        type=expand_user,
        required=True,
        metavar="FILE",
        help="plain text, or JSON lines by the suffix .jsonl or .json; - for standard input",
    )
    add(
        "--json-key",
        metavar="KEY",
        help="read JSON lines, and the text under this key; default text for .jsonl and .json",
    )
    add("--append-eod", action="store_true", help="end each text with the end-of-document token")
    add("--seq-length", type=int, help="tokens of a scoring window; default and maximum those of the models")
    add("--stride", type=int, help="stride between scoring windows in tokens; default half of --seq-length")


def _add_output(add: Callable[..., argparse.Action]) -> None:
    add("--html", type=expand_user, metavar="FILE", help="write an HTML page with sliders and search")
    add("--json", type=expand_user, metavar="FILE", help="write the tokens and their values as JSON")
    add("--table", action="store_true", help="print one line per token instead of the text")
    add("--max-tokens", type=int, default=1000, metavar="N", help="number of tokens to print; 0 prints all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(lambda: show_selection(parse_arguments(sys.argv[1:] if argv is None else argv)))


def show_selection(arguments: argparse.Namespace) -> None:
    """Score the text with every model, and print and write the selections. Collective over all ranks."""
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.analysis.selection_page import write_selection_page
    from megatron_slm.analysis.selection_terminal import print_selection
    from megatron_slm.analysis.selection_view import SelectionView, write_json
    from megatron_slm.inference.texts import encode_texts, read_texts
    from megatron_slm.runtime.collective import on_every_rank, on_first_rank
    from megatron_slm.runtime.console import make_console

    parallel = given_layout(arguments)
    groups = start_ranks(parallel, arguments)
    on_first_rank(lambda: check_outputs(arguments))
    texts = on_first_rank(lambda: read_texts(arguments.input, arguments.json_key))
    choices, rule = on_first_rank(lambda: choose_checkpoints(arguments))
    tokenizer = on_every_rank(lambda: shared_tokenizer(choices, arguments))
    encoded = on_every_rank(lambda: encode_texts(tokenizer, texts, append_eod=arguments.append_eod))
    scorer = Scorer(arguments, parallel, groups, encoded, rule, choices)
    reference, losses = scorer.reference()
    view = SelectionView(
        source="standard input" if arguments.input == "-" else Path(arguments.input).name,
        tokenizer=tokenizer.name,
        window=rule.window,
        stride=rule.stride,
        ids=encoded.ids,
        texts=encoded.texts,
        starts=encoded.starts,
        eod=tokenizer.eod,
        reference=reference,
        checkpoints=[scorer.checkpoint(choice, losses) for choice in choices],
    )
    print_selection(make_console(groups.is_logging_rank), view, arguments.max_tokens, table=arguments.table)
    for path, write in ((arguments.html, write_selection_page), (arguments.json, write_json)):
        if path:
            on_first_rank(lambda path=path, write=write: write(view, path))  # type: ignore[misc]


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raise ConfigError if an output file has no directory, is a foreign file, or is the input."""
    from megatron_slm.analysis.page import HTML_FLAG, page_test
    from megatron_slm.analysis.selection_page import NAME
    from megatron_slm.analysis.selection_view import JSON_FLAG, is_selection_file
    from megatron_slm.runtime.files import check_output_file

    if arguments.html and arguments.json and Path(arguments.html).resolve() == Path(arguments.json).resolve():
        raise ConfigError(f"{HTML_FLAG} and {JSON_FLAG} are the same file. Choose another path for one of them.")
    tests = ((HTML_FLAG, arguments.html, page_test(NAME)), (JSON_FLAG, arguments.json, is_selection_file))
    for flag, path, is_ours in tests:
        if path is not None:
            check_output_file(path, flag, is_ours=is_ours)
            if Path(path).exists() and Path(arguments.input).exists() and Path(path).samefile(arguments.input):
                raise ConfigError(f"{flag} {path} is the file of --input, which is not replaced. Choose another path.")


class Scorer:
    """Score a text with one model after another, and select tokens."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        parallel: ParallelConfig,
        groups: Groups,
        texts: EncodedTexts,
        rule: ContextRule,
        choices: Sequence[Choice],
    ) -> None:
        from megatron_slm.objective.selection.policy import needs_reference_entropy, parse_policy

        self.arguments, self.parallel, self.groups = arguments, parallel, groups
        self.texts, self.rule, self.first = texts, rule, choices[0].config
        self.policies = {choice.policy: parse_policy(choice.policy) for choice in choices}
        self.needs_entropy = any(map(needs_reference_entropy, self.policies.values()))

    def reference(self) -> tuple[ReferenceTokens | None, TextLosses | None]:
        """Return the reference losses, or None without a reference model. Collective over all ranks."""
        from megatron_slm.analysis.selection_view import ReferenceTokens

        path, given = self.arguments.reference_load, self.arguments
        if path is None:
            return None, None
        theta = given.precision or self.first.training.params_dtype
        precision = given.reference_precision or self.first.reference.reference_precision or theta
        model = self._open(path, given.reference_ckpt_step, REFERENCE, precision)
        losses = self._score(model, "the reference model", with_entropy=self.needs_entropy)
        directory = Path(model.directory or path).resolve()
        return ReferenceTokens(run_name(directory), str(directory), losses.loss, losses.entropy), losses

    def checkpoint(self, choice: Choice, reference: TextLosses | None) -> CheckpointTokens:
        """Return the losses and the selection of a checkpoint. Collective over all ranks."""
        from megatron_slm.analysis.selection_view import CheckpointTokens
        from megatron_slm.inference.text_selection import select_tokens
        from megatron_slm.objective.selection.config import SelectionConfig
        from megatron_slm.objective.selection.policy import needs_token_entropy, top_ks

        model = self._open(choice.path, choice.step, LOAD, self.arguments.precision)
        policy: Policy = self.policies[choice.policy]
        losses = self._score(model, choice.label, with_entropy=needs_token_entropy(policy))
        config = SelectionConfig(
            policy,
            scope="micro-batch",
            seed=choice.config.training.seed,
            temperature=choice.config.objective.slm_gumbel_temperature,
        )
        selection = select_tokens(losses, reference, config, choice.ratio)
        first = next(top_ks(policy))
        return CheckpointTokens(
            label=choice.label,
            directory=str(choice.source.directory.resolve()),
            policy=choice.policy,
            ratio=choice.ratio if choice.uses_ratio else None,
            score_name=("stochastic " if first.stochastic else "") + first.score,
            lowest_first=first.sign < 0,
            threshold=selection.threshold,
            loss=losses.loss,
            score=selection.score,
            selected=selection.selected,
        )

    def _open(self, path: str, step: int | None, flag: str, precision: str | None) -> InferenceModel:
        from megatron_slm.inference.model import open_model

        settings: dict[str, Any] = given_tokenizer_settings(self.arguments)
        return open_model(
            path,
            self.parallel,
            self.groups,
            step=step,
            flag=flag,
            precision=precision,
            tokenizer_settings=settings,
            verify=self.arguments.slm_verify_checksums,
        )

    def _score(self, model: InferenceModel, label: str, *, with_entropy: bool = False) -> TextLosses:
        from megatron_slm.inference.text_selection import score_texts

        size = self.arguments.micro_batch_size
        return score_texts(model, self.texts, self.rule, micro_batch_size=size, label=label, with_entropy=with_entropy)
