"""Relations of the parallel layout: processes, model dimensions, and the global batch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.relations.wording import PIPELINE, TENSOR, data_parallel_size, has_uneven_stages, not_dividing
from megatron_slm.config.schema import RunConfig


def processes(config: RunConfig, world_size: int) -> Iterator[str]:
    """Require a process count that is a multiple of TP x PP x CP."""
    if data_parallel_size(config, world_size):
        return
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    shared = f" x --context-parallel-size {context}" if context > 1 else ""
    yield (
        f"{world_size} processes were started, which is not a multiple of {TENSOR} {tensor} x {PIPELINE} "
        f"{pipeline}{shared} = {tensor * pipeline * context}. Start a multiple of that (torchrun --nproc-per-node)."
    )


def tensor_parallel(config: RunConfig, _: int) -> Iterator[str]:
    """Require attention heads and MLP sizes that tensor-parallel ranks split evenly; they may share a query group."""
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    yield from not_dividing(tensor, TENSOR, model.num_attention_heads, "--num-attention-heads")
    groups = model.num_query_groups if model.group_query_attention else None
    if groups and groups % tensor and tensor % groups:
        yield f"{TENSOR} {tensor} is neither a divisor nor a multiple of --num-query-groups {groups}. Choose one."
    for name, size in (("ffn", model.ffn_hidden_size), ("moe-ffn", model.moe_ffn_hidden_size)):
        if size is not None:
            yield from not_dividing(tensor, TENSOR, size, f"--{name}-hidden-size")


def sequence_parallel(config: RunConfig, _: int) -> Iterator[str]:
    """Require a sequence length that tensor-parallel ranks can split evenly."""
    parallel, length = config.parallel, config.model.seq_length
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if parallel.sequence_parallel:
        flag = "--seq-length" if context == 1 else "--seq-length / CP ="
        yield from not_dividing(tensor, TENSOR, length // context, flag)


def context_parallel(config: RunConfig, _: int) -> Iterator[str]:
    """Require a sequence length that splits into two equal chunks per context-parallel rank."""
    context, length = config.parallel.context_parallel_size, config.model.seq_length
    if context > 1 and length % (2 * context):
        yield (
            f"--context-parallel-size {context} splits each sample into {2 * context} chunks, and --seq-length "
            f"{length} is not a multiple of that."
        )


def pipeline_parallel(config: RunConfig, _: int) -> Iterator[str]:
    """Require an even split of layers over pipeline and virtual stages, except for explicit first and last stages."""
    if has_uneven_stages(config.parallel):
        yield from _uneven_pipeline(config)
        return
    pipeline, layers = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    yield from not_dividing(pipeline, PIPELINE, layers, "--num-layers")
    per_stage = config.parallel.num_layers_per_virtual_pipeline_stage
    if per_stage is None or layers % pipeline:
        return
    flag = "--num-layers-per-virtual-pipeline-stage"
    if pipeline == 1:
        yield f"{flag} needs {PIPELINE} above 1."
    yield from not_dividing(per_stage, flag, layers // pipeline, "layers per pipeline rank, --num-layers / PP =")
    if pipeline == 2 and not config.parallel.overlap_p2p_comm:
        yield (
            f"--no-overlap-p2p-communication needs {PIPELINE} above 2 with {flag}: the previous and the next stage are "
            "one rank, whose messages would be confused. Leave it out."
        )
    if per_stage == layers // pipeline and pipeline > 1:
        yield f"{flag} {per_stage} leaves one stage per rank: leave it out."


def _uneven_pipeline(config: RunConfig) -> Iterator[str]:
    """Yield violations of --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers."""
    parallel, layers = config.parallel, config.model.num_layers
    sizes = {
        "--decoder-first-pipeline-num-layers": parallel.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": parallel.decoder_last_pipeline_num_layers,
    }
    given = {flag: size for flag, size in sizes.items() if size is not None}
    named = " and ".join(f"{flag} {size}" for flag, size in given.items())
    pipeline = parallel.pipeline_model_parallel_size
    if pipeline == 1:
        yield f"{named} needs {PIPELINE} above 1."
        return
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield (
            f"{named} cannot be combined with --num-layers-per-virtual-pipeline-stage, which splits layers evenly. "
            "Leave one of them out."
        )
    remaining, stages = layers - sum(given.values()), pipeline - len(given)
    if remaining < stages or (not stages and remaining) or (stages and remaining % stages):
        yield (
            f"{named} leaves {remaining} of --num-layers {layers} for {stages} other pipeline stages, which "
            "need an equal number of at least 1. Change the number of layers of the first or last stage."
        )


def global_batch(config: RunConfig, world_size: int) -> Iterator[str]:
    """Require a global batch size that is a multiple of the micro-batches of all data-parallel ranks."""
    parallel, training = config.parallel, config.training
    ranks = data_parallel_size(config, world_size)
    step = training.micro_batch_size * ranks
    if not step:
        return
    batches = {f"--global-batch-size {training.global_batch_size}": training.global_batch_size}
    if training.rampup_batch_size:
        start, increment, _ = training.rampup_batch_size
        batches |= {
            f"the start of --rampup-batch-size, {start},": start,
            f"the increment of --rampup-batch-size, {increment},": increment,
        }
    stages = parallel.pipeline_model_parallel_size if parallel.num_layers_per_virtual_pipeline_stage else 1
    for shown, batch in batches.items():
        if batch % step:
            yield (
                f"{shown} is not a multiple of --micro-batch-size {training.micro_batch_size} x {ranks} "
                f"data-parallel ranks = {step}."
            )
        elif batch // step % stages:
            yield (
                f"the interleaved schedule needs a multiple of {PIPELINE} {stages} micro-batches a step, and {shown} "
                f"has {batch // step}. Change it."
            )


def overlap(config: RunConfig, _: int) -> Iterator[str]:
    """Require an optimizer and a schedule that support the communication overlap."""
    parallel = config.parallel
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        yield "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce."
    if parallel.overlap_p2p_comm_warmup_flush:
        flag = "--overlap-p2p-communication-warmup-flush"
        if parallel.num_layers_per_virtual_pipeline_stage is None:
            yield f"{flag} needs --num-layers-per-virtual-pipeline-stage. Add it, or leave the flag out."
        elif not parallel.overlap_p2p_comm:
            yield f"{flag} contradicts --no-overlap-p2p-communication. Leave one of them out."
    if parallel.use_distributed_optimizer and config.optimizer.optimizer == "sgd":
        yield "--use-distributed-optimizer cannot save the state of --optimizer sgd. Leave one of them out."


def hang_timeout(config: RunConfig, _: int) -> Iterator[str]:
    """Refuse a time without progress that is shorter than the messages of a busy machine may take."""
    seconds = config.parallel.slm_hang_timeout
    if 0 < seconds < 1:
        yield f"--slm-hang-timeout is {seconds:g}, and must be 0, to disable it, or at least 1 second."


RELATIONS = (
    processes,
    tensor_parallel,
    sequence_parallel,
    context_parallel,
    pipeline_parallel,
    global_batch,
    overlap,
    hang_timeout,
)
