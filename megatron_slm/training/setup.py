"""Build a :class:`Run` from a configuration: groups, datasets, model, optimizer, reference model, sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from megatron_slm.checkpoint.source import find_source
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.config.selection import selects_tokens
from megatron_slm.data.batches import BatchShape
from megatron_slm.data.datasets import Datasets, build_datasets, corpus_identities
from megatron_slm.data.usage import format_usage
from megatron_slm.model.experts import AuxiliaryLosses
from megatron_slm.model.gpt import build_model, virtual_stages
from megatron_slm.model.selected_tokens import BackwardFilter
from megatron_slm.model.size import forward_flops_per_token, padded_vocab_size
from megatron_slm.objective.selection.adaptive import AdaptiveSelection, RatioRule
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.policy import parse_policy
from megatron_slm.objective.selection.strategies import SelectionStrategy, build_strategy
from megatron_slm.reference.bubble_plan import plan_bubbles
from megatron_slm.reference.bubbles import BubbleReference
from megatron_slm.reference.ensemble import ReferenceEnsemble
from megatron_slm.reference.history import ModelHistory
from megatron_slm.reference.identity import reference_identity
from megatron_slm.reference.replica import ReferenceReplica
from megatron_slm.reference.sidecar import sidecar_scores
from megatron_slm.runtime.collective import on_every_rank, on_first_rank
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import Groups, ParallelLayout
from megatron_slm.scores.combination import Combine, reference_of_corpus
from megatron_slm.scores.samples import ScoredSamples
from megatron_slm.scores.sets import Headers, ScoreSet, check_scores, open_scores, verify_scores
from megatron_slm.tokenizers.tokenizer import Tokenizer
from megatron_slm.training.benchmarks import read_benchmarks
from megatron_slm.training.communication_overlap import start_overlap
from megatron_slm.training.data_order import DataRecord, SavedRun, check_corpora_unchanged, read_saved_run
from megatron_slm.training.fallback import verified_start
from megatron_slm.training.free_space import check_start_space
from megatron_slm.training.implementations import inspect_run, report_implementations
from megatron_slm.training.loop import Run
from megatron_slm.training.metrics import Throughput
from megatron_slm.training.optimizer import build_optimizer, build_scheduler, set_schedule_length, wrap_data_parallel
from megatron_slm.training.policy_checks import corpus_ratios, needs_reference, reference_needs
from megatron_slm.training.reference_history import start_history
from megatron_slm.training.resume import resume
from megatron_slm.training.run_length import START, RunLength
from megatron_slm.training.sample_orders import OrderBuilder, SampleOrder, continue_orders, repetition_report
from megatron_slm.training.sinks import open_sinks
from megatron_slm.training.spikes import SpikeDetector
from megatron_slm.training.start import Start, plan_start, prepare_save
from megatron_slm.training.state import TrainState
from megatron_slm.training.step import ReferenceSource, no_reference


def parallel_layout(config: RunConfig) -> ParallelLayout:
    """Return the parallel layout of the configuration."""
    return ParallelLayout(
        tensor=config.parallel.tensor_model_parallel_size,
        pipeline=config.parallel.pipeline_model_parallel_size,
        context=config.parallel.context_parallel_size,
        expert=config.parallel.expert_model_parallel_size,
        virtual_pipeline=virtual_stages(config.model, config.parallel),
    )


def build_selection(config: RunConfig, groups: Groups) -> SelectionStrategy:
    """Build the selection strategy of the configuration."""
    objective = config.objective
    policy = parse_policy(objective.slm_score) if selects_tokens(config) else None
    settings = SelectionConfig(
        policy=policy,
        scope=objective.slm_scope,
        dp_cp_group=groups.dp_cp,
        cp_group=groups.cp,
        pp_group=groups.pp,
        mix=objective.slm_mix if policy is not None else 0.0,
        seed=config.training.seed,
        temperature=objective.slm_gumbel_temperature,
        weight_temperature=objective.slm_weight_temperature if policy is not None else None,
        corpus_ratios=corpus_ratios(config),
        mtp_loss_weight=config.model.mtp_loss_scaling_factor if config.model.mtp_num_layers else 0.0,
        mtp_is_independent=objective.slm_mtp_selection == "independent",
    )
    strategy = build_strategy(
        settings,
        groups.device,
        predicts=objective.slm_threshold == "predicted",
        speculates=objective.slm_exact_mode == "speculative",
    )
    if policy is None or objective.slm_ratio_gain is None:
        return strategy
    rule = RatioRule(objective.slm_ratio_gain, objective.slm_ratio_min, objective.slm_ratio_max)
    return AdaptiveSelection(strategy, rule)


def batch_shape(config: RunConfig, groups: Groups) -> BatchShape:
    """Return the split of the global batch into micro-batches, data-parallel and context-parallel ranks."""
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    steps = batch // (micro * groups.dp_size)
    return BatchShape(micro, steps, groups.dp_rank, groups.dp_size, groups.cp_rank, groups.cp_size)


def build_run(config: RunConfig, tokenizer: Tokenizer, groups: Groups, console: Console) -> Run:
    """Build a run, and load the initial checkpoint if there is one. Collective over all ranks.

    With --skip-train, there is no training set, reference model or sidecar. The --save directory is changed last, after
    all checks have passed.
    """
    start = verified_start(on_first_rank(lambda: plan_start(config)), config)
    console.print(start.describe(config.checkpoint.save), style="bold", markup=False)
    config = start.adjusted(config)
    benchmarks = on_first_rank(lambda: read_benchmarks(config, tokenizer))
    shape = batch_shape(config, groups)
    trains = not config.training.skip_train
    headers = on_first_rank(lambda: score_headers(config, tokenizer)) if trains else {}
    scores = _open_scores(config, headers)
    corpora = corpus_identities(config.data)
    saved = on_first_rank(lambda: _saved_run(start, config, corpora, console)) if trains else None
    milestones = saved.milestones if saved is not None else START
    # The configured and saved schedules are compared at the checkpoint's batch sizes.
    batches = saved.config.training if saved is not None else None
    state = _build_state(config, tokenizer, groups, RunLength.from_config(config, milestones, batches))
    identity = on_first_rank(lambda: find_reference(config, headers)) if trains else None
    config = resume(state, config, start, identity, console)
    length = RunLength.from_config(config, milestones)
    config = with_settings(config, {"train_iters": length.iterations})
    if saved is not None and not config.optimizer.use_checkpoint_opt_param_scheduler:
        set_schedule_length(state.scheduler, config, length)
    reference, replicas = _build_reference(config, tokenizer, groups) if trains else (no_reference, [])
    if replicas and config.reference.reference_history is not None:
        state.history = ModelHistory(replicas[0], config.reference)
        start_history(state, config, start, console)
    chunks = [chunk for replica in replicas for chunk in replica.chunks]
    found = inspect_run(state, chunks, has_sidecar=reference is sidecar_scores)
    report_implementations(found, config.training.require_fused, groups.device, console)
    bubbles = _build_bubbles(config, replicas, state, shape)
    datasets = _build_datasets(config, tokenizer, shape, length, corpora)
    if trains:
        builder = OrderBuilder(config.data, tokenizer, corpora)
        record = on_first_rank(lambda: _report_data(config, length, saved, datasets, builder, console))
        state.data = replace(record, reference=identity)
    if scores is not None:
        datasets = replace(datasets, train=ScoredSamples(datasets.train, scores))
    on_first_rank(lambda: check_start_space(config, tokenizer.vocab_size, start))
    on_first_rank(lambda: prepare_save(config, start))
    return Run(
        config=config,
        state=state,
        datasets=datasets,
        shape=shape,
        reference=reference if bubbles is None else bubbles.score,
        bubbles=bubbles,
        throughput=Throughput.from_config(
            config, [replica.config for replica in replicas], tokenizer.vocab_size, groups
        ),
        benchmarks=benchmarks,
        sinks=on_every_rank(lambda: open_sinks(config, groups, state.progress.step)),
        console=console,
    )


def _build_state(config: RunConfig, tokenizer: Tokenizer, groups: Groups, length: RunLength) -> TrainState:
    """Build the initial state of a run of ``length``: model, optimizer, schedule and selection."""
    start_overlap(config)
    backward_filter = BackwardFilter(groups) if config.objective.slm_backward == "filtered" else None
    chunks = wrap_data_parallel(
        build_model(
            config.model,
            vocab_size=tokenizer.vocab_size,
            parallel=config.parallel,
            training=config.training,
            objective=config.objective,
            groups=groups,
            params_dtype=config.training.params_dtype,
            precision=config.precision,
            resets_positions=config.data.reset_position_ids,
            isolates_documents=config.data.reset_attention_mask,
            backward_filter=backward_filter,
        ),
        config,
    )
    for chunk in chunks:
        chunk.train()
    optimizer = build_optimizer(chunks, config)
    return TrainState(
        model_chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config, length),
        groups=groups,
        tokenizer=tokenizer,
        selection=build_selection(config, groups),
        auxiliary=AuxiliaryLosses(chunks, groups),
        spikes=SpikeDetector.from_config(config.training),
        backward_filter=backward_filter,
    )


def _saved_run(start: Start, config: RunConfig, corpora: dict[str, str], console: Console) -> SavedRun | None:
    """Return the saved run to resume, if any.

    Raises:
        ConfigError: one of its corpora has changed.
    """
    if start.checkpoint is None or start.weights_only:
        return None
    checkpoint = start.checkpoint
    saved = read_saved_run(find_source(checkpoint.path, checkpoint.step, checkpoint.flag), config)
    for line in check_corpora_unchanged(saved, corpora, config):
        console.print(line, markup=False)
    return saved


def _build_datasets(
    config: RunConfig, tokenizer: Tokenizer, shape: BatchShape, length: RunLength, corpora: dict[str, str]
) -> Datasets:
    """Build the datasets. Collective over all ranks.

    Raises:
        ConfigError: there is nothing to evaluate with --skip-train.
    """
    trains = not config.training.skip_train
    datasets = build_datasets(
        config.data,
        tokenizer=tokenizer,
        seq_length=config.model.seq_length,
        train_samples=length.samples if trains else 0,
        valid_samples=config.logging.eval_iters * shape.global_batch_size,
        seed=config.training.seed,
        identities=corpora,
    )
    if not trains and not (datasets.valid and config.logging.eval_iters) and not config.logging.eval_tasks:
        raise ConfigError(
            "--skip-train has nothing to evaluate. Specify --valid-data-path, or --data-path with a validation share "
            "in --split, and --eval-iters above 0; or --eval-tasks."
        )
    return datasets


def _report_data(
    config: RunConfig,
    length: RunLength,
    saved: SavedRun | None,
    datasets: Datasets,
    builder: OrderBuilder,
    console: Console,
) -> DataRecord:
    """Print the data usage of the run and the repetition of read text; return the data record."""
    console.print("data usage:", *format_usage(datasets.usage()), sep="\n", markup=False)
    order = SampleOrder.from_config(config, length.samples, builder.identities)
    if saved is None:
        return DataRecord(builder.identities, orders=(order,))
    orders, has_changed = continue_orders(saved.orders, saved.consumed, order, datasets.train, builder)
    if has_changed and not order.is_mock:
        console.print(*repetition_report(orders, datasets.train, length.samples, builder), sep="\n", markup=False)
    return DataRecord(builder.identities, saved.milestones, orders)


def score_headers(config: RunConfig, tokenizer: Tokenizer) -> Headers:
    """Return the validated headers of the run's sidecars, or an empty mapping if it does not use sidecars.

    Raises:
        ConfigError: a sidecar is missing, damaged, unfinished, or does not match the run.
    """
    needs_loss, needs_entropy = reference_needs(config)
    if not (needs_loss or needs_entropy) or not config.reference.reference_scores:
        return {}
    return check_scores(config.reference, config.data, tokenizer, with_entropy=needs_entropy)


def _open_scores(config: RunConfig, headers: Headers) -> ScoreSet | None:
    """Open the run's sidecars, if any. Collective over all ranks."""
    if not headers:
        return None
    if config.checkpoint.slm_verify_checksums:
        verify_scores(headers)
    with_entropy = reference_needs(config)[1]
    return on_every_rank(lambda: open_scores(config.reference, headers, config.data, with_entropy=with_entropy))


def find_reference(config: RunConfig, headers: Headers) -> str | None:
    """Return the identity of the reference model, or None if the score needs none. Not collective."""
    return reference_identity(config.reference, headers) if needs_reference(config) else None


def _build_reference(
    config: RunConfig, tokenizer: Tokenizer, groups: Groups
) -> tuple[ReferenceSource, list[ReferenceReplica]]:
    """Build the reference source; also return the reference models that run in every step."""
    needs_loss, needs_entropy = reference_needs(config)
    if not (needs_loss or needs_entropy):
        return no_reference, []
    settings = config.reference
    if settings.reference_scores:
        return sidecar_scores, []
    paths: Sequence[str | None] = settings.reference_load or [None]
    replicas = [ReferenceReplica(config, path, tokenizer, groups, with_entropy=needs_entropy) for path in paths]
    if len(replicas) == 1:
        return replicas[0].score, replicas
    combine = Combine.parse(settings.reference_combine, len(replicas))
    return ReferenceEnsemble(replicas, combine, reference_of_corpus(settings, config.data)).score, replicas


def _build_bubbles(
    config: RunConfig, replicas: Sequence[ReferenceReplica], state: TrainState, shape: BatchShape
) -> BubbleReference | None:
    """Build the source that scores in pipeline bubbles, if it is configured; a replayed step has no next step."""
    if not replicas or not config.reference.reference_in_bubbles or config.training.replay_step is not None:
        return None
    [replica] = replicas
    models = config.model, replace(replica.config.model, seq_length=config.model.seq_length)
    size = state.tokenizer.vocab_size
    ours, theirs = (forward_flops_per_token(model, padded_vocab_size(model, size, 1)) for model in models)
    plan = plan_bubbles(
        state.groups.pp_size,
        shape.num_micro_batches,
        reference=theirs / ours,
        backward=3 if config.training.recompute_granularity == "full" else 2,
    )
    return BubbleReference(replica, plan, state.model_chunks[0], state.groups)
