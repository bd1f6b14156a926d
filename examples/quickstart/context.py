"""What the text before a token does to selection: sidecars of several context rules held against the model beside.

    python examples/quickstart/context.py                              # all of it: about 40 minutes on 2 idle cores
    python examples/quickstart/context.py --no-training --tokens 100000   # agreement of the selections alone

Begins from the quickstart's base and reference model. A part of the raw corpus is scored by every rule; then the
tokens that SLM would select in each micro-batch are compared with those that the co-located reference model selects,
for θ as it is at the start of SLM and at its end; then SLM is trained with each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stages
import torch

from megatron_slm.config.schema import DataConfig, ParallelConfig, ReferenceConfig
from megatron_slm.data.batches import BatchShape, BatchStream, MicroBatch
from megatron_slm.data.corpus import check_corpus
from megatron_slm.data.datasets import build_datasets
from megatron_slm.data.scores.code import ScoreCode
from megatron_slm.data.scores.codebooks import Codebooks, TokenCode
from megatron_slm.data.scores.samples import ScoredSamples
from megatron_slm.data.scores.sets import CorpusScores, open_scores
from megatron_slm.data.scores.sidecar import VERSION, ContextRule, read_loss_code
from megatron_slm.data.tokenizers.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerFiles
from megatron_slm.objective.policy import parse_policy
from megatron_slm.objective.selective_loss import ReferenceScores, Selector, select
from megatron_slm.reference.replica import ReferenceReplica
from megatron_slm.reference.scoring import ScoringJob, reference_config
from megatron_slm.reference.windows import make_plan, scored_places
from megatron_slm.runtime import process
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.files import write_text
from megatron_slm.runtime.groups import Groups, ParallelLayout
from megatron_slm.training.step import as_tokens

WINDOW, RATIO, MICRO_BATCH, STEPS = 256, 0.6, 8, 160
DEFAULT = ContextRule("document", WINDOW, WINDOW // 2)  # of tools/score_corpus.py
BESIDE = "co-located"
CORPUS = "context_train"
THETAS = {"start": "base", "end": "slm"}  # θ when SLM begins, and the quickstart's θ when it has ended


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    reference: str
    mean_context: float  # tokens before a token, on average
    passes: float  # tokens that went through the model, per token of the corpus
    mean_loss: float  # of the reference model on the compared tokens
    differs: dict[str, float]  # share of tokens on which the selection is not the co-located one's, by θ
    early: dict[str, float]  # selected share of the first quarter of each sample, by θ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=700_000, help="of the raw corpus that are scored")
    parser.add_argument("--compared", type=int, default=98_304, help="tokens on which selections are compared")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no-training", action="store_true", help="compare selections only")
    parser.add_argument("--strides", type=int, nargs="+", default=[256, 128, 64, 32], help="128 must be among them")
    arguments = parser.parse_args()
    if DEFAULT.stride not in arguments.strides:
        parser.error(
            f"--strides: {DEFAULT.stride} must be among them, which is the default that others are held against."
        )
    rules = [ContextRule(kind, WINDOW, stride) for kind in ("document", "stream") for stride in arguments.strides]
    os.chdir(stages.ROOT)
    folder = stages.FOLDER
    try:
        load_base = stages.prepare_base_and_reference(folder)
        slm = ["--objective", "slm", "--slm-selection-ratio", str(RATIO)]
        stages.train(
            folder, "slm", "raw_train", ["--train-iters", "100", *load_base, *slm, "--reference-load", f"{folder}/rm"]
        )
        prepare_corpus(folder, arguments.tokens)
        for rule in rules:
            score(folder, rule)
        rows = compare(folder, rules, arguments.compared)
        finals = {} if arguments.no_training else train_all(folder, rules, [*load_base, *slm], arguments.seeds)
    except stages.StageFailed as failure:
        return failure.code
    report(rows, finals, vars(arguments))
    return 0


def name_of(rule: ContextRule) -> str:
    return f"{rule.kind}-{rule.stride}"


def prepare_corpus(folder: Path, tokens: int) -> None:
    """The first documents of the raw corpus, with about ``tokens`` tokens."""
    source, target = folder / "data" / "raw_train.jsonl", folder / "data" / f"{CORPUS}.jsonl"
    share = tokens / check_corpus(stages.corpus(folder, "raw_train"), "--data-path").tokens

    def work() -> None:
        left = share * source.stat().st_size
        with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
            for line in lines:
                if left <= 0:
                    break
                left -= len(line.encode())
                out.write(line)
        command = [sys.executable, "tools/preprocess_data.py", "--input", str(target), "--append-eod"]
        command += ["--output-prefix", str(folder / "data" / CORPUS), "--tokenizer-type", "SentencePieceTokenizer"]
        stages.run([*command, "--tokenizer-model", str(folder / "tokenizer.model")])

    stages.stage(f"corpus of {tokens} tokens", folder / "context", [str(tokens)], work)


def score(folder: Path, rule: ContextRule) -> None:
    """The sidecar of one rule."""
    prefix, scores = stages.corpus(folder, CORPUS), folder / "context" / name_of(rule)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["tools/score_corpus.py", "--reference-load", str(folder / "rm"), "--data-path", prefix]
    command += ["--reference-scores", str(scores), "--context", rule.kind, "--stride", str(rule.stride)]
    made = folder / "context" / f"{Path(prefix).name}.{name_of(rule)}.scores"

    def work() -> None:
        made.unlink(missing_ok=True)
        stages.run(command, env=stages.single_threaded())

    settings = [*command[1:], str(check_corpus(prefix, "--data-path").tokens), f"version {VERSION}"]
    stages.stage(f"score {name_of(rule)}", folder / "context", settings, work)


class Comparison:
    """Selections of one θ on the same micro-batches, by several sources of reference losses."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.tokens = 0
        self.differs: dict[str, int] = {}
        self.early: dict[str, int] = {}

    def add(self, batch: MicroBatch, token_loss: torch.Tensor, sources: dict[str, torch.Tensor]) -> None:
        """Count one micro-batch; the first of ``sources`` is what the others are compared with."""
        selected = {name: self._selected(batch, token_loss, loss) for name, loss in sources.items()}
        first = next(iter(selected.values()))
        self.tokens += first.numel()
        for name, own in selected.items():
            self.differs[name] = self.differs.get(name, 0) + int((own != first).sum())
            self.early[name] = self.early.get(name, 0) + int(own[:, : WINDOW // 4].sum())

    def _selected(self, batch: MicroBatch, token_loss: torch.Tensor, reference_loss: torch.Tensor) -> torch.Tensor:
        tokens = as_tokens(batch, token_loss, ReferenceScores(reference_loss), batch.first_sample)
        return select(tokens, self.selector, RATIO).selected


def compare(folder: Path, rules: Sequence[ContextRule], compared: int) -> list[Row]:
    """How the selection by each rule differs from the co-located model's."""
    tokenizer = SentencePieceTokenizer(TokenizerFiles(model=str(folder / "tokenizer.model")))
    groups = process.start(ParallelLayout())
    try:
        return _compare(folder, rules, compared, tokenizer, groups)
    finally:
        process.stop()


def _compare(
    folder: Path, rules: Sequence[ContextRule], compared: int, tokenizer: Tokenizer, groups: Groups
) -> list[Row]:
    prefix = stages.corpus(folder, CORPUS)
    data = DataConfig(data_path=[prefix], data_cache_path=str(folder / "cache"))
    batches = compared // (WINDOW * MICRO_BATCH)
    plain = build_datasets(
        data,
        tokenizer=tokenizer,
        seq_length=WINDOW,
        train_samples=batches * MICRO_BATCH,
        valid_samples=0,
        seed=1,
    ).train
    sidecars = {name_of(rule): _open(folder, rule, data, tokenizer) for rule in rules}
    beside = _model(folder, "rm", tokenizer, groups)
    thetas = {name: _model(folder, run, tokenizer, groups) for name, run in THETAS.items()}
    selector = Selector(parse_policy("excess"), group=groups.dp_cp)
    comparisons = {name: Comparison(selector) for name in thetas}
    losses: dict[str, float] = {}
    shape = BatchShape(MICRO_BATCH, 1, 0, 1)
    streams = {
        name: BatchStream(ScoredSamples(plain, {prefix: scores}), shape, device=groups.device)
        for name, scores in sidecars.items()
    }
    codes = codes_of(sidecars[name_of(DEFAULT)])
    with progress("comparing selections", batches, "micro-batches") as bar:
        for _ in range(batches):
            scored = {name: next(stream)[0] for name, stream in streams.items()}
            batch = next(iter(scored.values()))
            own = beside.score([batch])[0].loss
            sources = {BESIDE: own}
            sources |= {name: rounded(own, batch.labels, code) for name, code in codes.items()}
            sources |= {name: _loss(each) for name, each in scored.items()}
            for name, loss in sources.items():
                losses[name] = losses.get(name, 0.0) + float(loss.mean()) / batches
            for name, theta in thetas.items():
                comparisons[name].add(batch, theta.score([batch])[0].loss, sources)
            bar.advance()
    costs = {BESIDE: ((WINDOW + 1) / 2, 1.0)} | {name_of(rule): cost(prefix, rule) for rule in rules}
    return [_row(name, costs.get(name, costs[BESIDE]), loss, comparisons) for name, loss in losses.items()]


def _row(name: str, costs: tuple[float, float], loss: float, comparisons: dict[str, Comparison]) -> Row:
    differs = {theta: own.differs[name] / own.tokens for theta, own in comparisons.items()}
    early = {theta: 4 * own.early[name] / own.tokens for theta, own in comparisons.items()}
    return Row(name, *costs, loss, differs, early)


def codes_of(scores: CorpusScores) -> dict[str, Codebooks | ScoreCode]:
    """How the co-located losses are rounded: as a sidecar's were, and as one of two bytes would be."""
    [sidecar] = scores.sidecars
    code = sidecar.header.loss
    assert isinstance(code, TokenCode)
    return {
        f"{BESIDE}, 1 byte": read_loss_code(sidecar.path, sidecar.header),
        f"{BESIDE}, 2 byte": ScoreCode(2, code.ceiling),
    }


def rounded(losses: torch.Tensor, labels: torch.Tensor, code: Codebooks | ScoreCode) -> torch.Tensor:
    """``losses`` of ``labels`` as they come back from a sidecar."""
    ids = labels.numpy()
    return torch.from_numpy(code.decode(code.encode(losses.numpy(), ids), ids))


def _loss(batch: MicroBatch) -> torch.Tensor:
    assert batch.reference_loss is not None
    return batch.reference_loss


def _open(folder: Path, rule: ContextRule, data: DataConfig, tokenizer: Tokenizer) -> CorpusScores:
    reference = ReferenceConfig(reference_scores=[str(folder / "context" / name_of(rule))])
    return open_scores(reference, data, tokenizer, with_entropy=False)[data.data_path[0]]


def _model(folder: Path, run: str, tokenizer: Tokenizer, groups: Groups) -> ReferenceReplica:
    job = ScoringJob(ReferenceConfig(reference_load=str(folder / run)), [], "", ParallelConfig(), MICRO_BATCH)
    return ReferenceReplica(reference_config(job), tokenizer, groups, with_entropy=False)


def cost(prefix: str, rule: ContextRule) -> tuple[float, float]:
    """Mean tokens of context, and tokens through the model per token of the corpus, padding included."""
    corpus = check_corpus(prefix, "--data-path")
    plan = make_plan(corpus, rule)
    context = rows = 0
    for chunk in range(plan.chunks):
        for row in plan.rows(chunk):
            rows += 1
            for _, _, each in scored_places([row]):
                first, last = each.first - each.start + 1, len(each)
                context += (first + last) * (last - first + 1) // 2
    return context / corpus.tokens, rows * rule.window / corpus.tokens


def train_all(
    folder: Path, rules: Sequence[ContextRule], flags: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """SLM with every source and every seed, two runs side by side; final held-out losses by source and set."""
    sources = {BESIDE: ["--reference-load", str(folder / "rm")]}
    sources |= {name_of(rule): ["--reference-scores", str(folder / "context" / name_of(rule))] for rule in rules}
    runs = [(name, seed) for seed in seeds for name in sources]
    with progress("training", len(runs), "runs") as bar, ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda run: train_one(folder, [*flags, *sources[run[0]]], *run), runs):
            bar.advance()
    return {
        name: {
            held_out: [stages.held_out_losses(folder / f"context-{name}-{seed}", held_out)[1][-1] for seed in seeds]
            for held_out in ("clean", "raw")
        }
        for name in sources
    }


def train_one(folder: Path, flags: Sequence[str], name: str, seed: int) -> None:
    """One run of one process; its lines go to a file."""
    run = f"context-{name}-{seed}"
    extra = ["--seed", str(seed), "--train-iters", str(STEPS), "--eval-iters", "16"]
    command = stages.training_command(folder, run, CORPUS, [*flags, *extra], processes=1)
    log = folder / f"{run}.log"
    tokens = check_corpus(stages.corpus(folder, CORPUS), "--data-path").tokens
    stages.stage(f"train {run}", folder / run, [*command[1:], str(tokens)], lambda: stages.run_with_log(command, log))


def report(rows: list[Row], finals: dict[str, dict[str, list[float]]], settings: dict[str, Any]) -> None:
    """Print the table, and write it beside the other results."""
    heads = ["reference losses from", "mean context", "passes", "mean loss"]
    heads += [f"differs, θ at the {theta}" for theta in THETAS] + [f"early, θ at the {theta}" for theta in THETAS]
    heads += ["clean loss", "raw loss"] if finals else []
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for row in rows:
        cells = [row.reference, f"{row.mean_context:.0f}", f"{row.passes:.2f}", f"{row.mean_loss:.4f}"]
        cells += [f"{row.differs[theta]:.2%}" for theta in THETAS] + [f"{row.early[theta]:.1%}" for theta in THETAS]
        if finals:
            own = finals.get(row.reference, {})
            cells += [spread(own.get(held_out, [])) for held_out in ("clean", "raw")]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    results = stages.HERE / "results"
    write_text(results / "context.md", f"{table}\n")
    record = {"settings": settings, "rows": [vars(row) for row in rows], "final_losses": finals}
    write_text(results / "context.json", json.dumps(record, indent=1) + "\n")
    print(f"{table}\ntable and figures: {results}/context.*")


def spread(losses: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if len(losses) < 2:
        return "".join(f"{loss:.4f}" for loss in losses)
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"


if __name__ == "__main__":
    sys.exit(main())
