"""Show the tokens of a text that one or more checkpoints select: token loss, reference loss, excess loss, selection.

Runs in one process or under torchrun, in any parallel layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.cli.layout import add_checkpoint_flags, add_layout_flags, add_model_flags, given_layout, start_ranks
from megatron_slm.config.checkpoint_steps import step_directories
from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.schema import ParallelConfig, RunConfig
from megatron_slm.config.schema.training import PARAMS_DTYPES
from megatron_slm.config.selection import selects_tokens
from megatron_slm.config.tokenizer_flags import add_tokenizer_flags, given_tokenizer_settings
from megatron_slm.runtime.errors import ConfigError, UnusableFileError, refuse
from megatron_slm.runtime.reporting import run_command

if TYPE_CHECKING:
    from megatron_slm.analysis.selection_view import CheckpointTokens, ReferenceTokens
    from megatron_slm.checkpoint.source import CheckpointSource
    from megatron_slm.inference.model import InferenceModel
    from megatron_slm.inference.text_selection import TextLosses
    from megatron_slm.inference.texts import EncodedTexts
    from megatron_slm.objective.selection.policy import Policy
    from megatron_slm.runtime.groups import Groups
    from megatron_slm.scores.sidecar import ContextRule
    from megatron_slm.tokenizers.tokenizer import Tokenizer

LOAD, REFERENCE = "--load", "--reference-load"
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


@dataclass(frozen=True)
class Choice:
    """Represent one checkpoint of the training model with its policy."""

    path: str
    step: int | None
    source: CheckpointSource
    label: str
    config: RunConfig
    policy: str
    ratio: float
    uses_ratio: bool


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


def choose_checkpoints(arguments: argparse.Namespace) -> tuple[list[Choice], ContextRule]:
    """Return the checkpoints of the command line with their policies, and the scoring windows that all models allow.

    Raises:
        ConfigError: a checkpoint is missing or incomplete, or a policy needs a reference model.
    """
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.objective.selection.policy import needs_reference_entropy, needs_reference_loss, parse_policy
    from megatron_slm.scores.sidecar import ContextRule

    choices = list(_choices(arguments))
    lengths = {LOAD: min(choice.config.model.seq_length for choice in choices)}
    for choice in choices:
        policy = parse_policy(choice.policy)
        if arguments.reference_load is None and (needs_reference_loss(policy) or needs_reference_entropy(policy)):
            raise ConfigError(
                f"--slm-score {choice.policy} of {choice.label} needs a reference model. Give {REFERENCE} DIR, or "
                "--slm-score token-loss."
            )
    if arguments.slm_selection_ratio is not None and not any(choice.uses_ratio for choice in choices):
        raise ConfigError(
            f"--slm-selection-ratio has no effect: every term of --slm-score {choices[0].policy!r} has a ratio. Leave "
            "it out."
        )
    if arguments.reference_load is not None:
        source = find_source(arguments.reference_load, arguments.reference_ckpt_step, REFERENCE)
        source.check()
        lengths[REFERENCE] = source.config().model.seq_length
    longest = min(lengths.values())
    window = arguments.seq_length or longest
    if window > longest:
        flag = min(lengths, key=lambda name: lengths[name])
        raise ConfigError(f"--seq-length is {window}, and must be at most {longest}, that of the model of {flag}.")
    stride = arguments.stride or max(1, window // 2)
    if stride > window:
        raise ConfigError(f"--stride is {stride}, and must be at most {window}, the tokens of a window.")
    return choices, ContextRule("document", window, stride)


def _choices(arguments: argparse.Namespace) -> Iterator[Choice]:
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.runtime.console import notice

    found: dict[Path, Choice] = {}
    for path, step in _given_steps(arguments):
        try:
            source = find_source(path, step, LOAD)
            source.check()
        except UnusableFileError as error:
            if not arguments.all_steps:
                raise
            notice(f"step {step} is left out: {error}")
            continue
        found.setdefault(source.directory.resolve(), _choice(arguments, source, path, step))
    if not found:
        raise ConfigError(f"{LOAD} {' '.join(arguments.load)}: no step is complete. Choose another directory.")
    labels = [choice.label for choice in found.values()]
    for choice in found.values():
        is_unique = labels.count(choice.label) == 1
        yield choice if is_unique else replace(choice, label=f"{choice.source.directory} ({choice.label})")


def _given_steps(arguments: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """Yield (directory, step) of --load."""
    for text in arguments.load:
        path, colon, number = text.rpartition(":")
        if not colon or not number.isascii() or not number.isdigit() or Path(text).exists():
            path, number = text, arguments.ckpt_step
        if arguments.all_steps and not isinstance(number, str) and (steps := step_directories(Path(path), LOAD)):
            yield from ((path, step) for step in steps)
        else:
            yield path, None if number is None else int(number)


def _choice(arguments: argparse.Namespace, source: CheckpointSource, path: str, step: int | None) -> Choice:
    from megatron_slm.runtime.console import notice
    from megatron_slm.training.curriculum import selection_ratio
    from megatron_slm.training.policy_checks import has_own_ratios

    config = source.config()
    objective = config.objective
    number, consumed = None, 0
    if source.is_resumable:
        manifest = source.manifest()
        number, consumed = manifest.step, manifest.consumed_samples * config.model.seq_length
    label = run_name(source.directory) + ("" if number is None else f" step {number:,}")
    ratio = arguments.slm_selection_ratio or selection_ratio(objective, number or 0, consumed)
    policy = arguments.slm_score or objective.slm_score
    uses_ratio = not has_own_ratios(replace(objective, slm_score=policy))
    chosen = f" with k = {ratio:g}" if uses_ratio else ""
    if not selects_tokens(config) and arguments.slm_selection_ratio is None:
        notice(f"{label} was trained without selection; the selection is shown for {policy}{chosen}")
    adapts = objective.slm_ratio_gain or objective.slm_corpus_ratios
    if adapts and uses_ratio and arguments.slm_selection_ratio is None:
        notice(f"the ratio of {label} adapts or differs between corpora; the selection is shown{chosen}")
    return Choice(path, step, source, label, config, policy, ratio, uses_ratio)


def run_name(directory: Path) -> str:
    """Return the name of the run or the published model in a checkpoint directory."""
    directory = directory.resolve()
    return directory.parent.name if directory.name.startswith("iter_") else directory.name


def shared_tokenizer(choices: Sequence[Choice], arguments: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer of the first checkpoint.

    Raises:
        ConfigError: it cannot be built, or another model was trained with another tokenizer.
    """
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.inference.model import checkpoint_tokenizer

    first = choices[0]
    tokenizer = checkpoint_tokenizer(first.source, first.config, given_tokenizer_settings(arguments))
    named = [(choice.label, choice.source) for choice in choices[1:]]
    if arguments.reference_load is not None:
        source = find_source(arguments.reference_load, arguments.reference_ckpt_step, REFERENCE)
        named.append(("the reference model", source))
    for name, source in named:
        if (conflict := source.tokenizer_conflict(tokenizer)) is not None:
            theirs, ours, remedy = conflict
            raise ConfigError(
                f"{source.flag}: {name} was trained with {theirs}, and {first.label} has {ours}. {remedy} for all "
                "models."
            )
    return tokenizer


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
