"""Messages and quantities shared by several relations."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.schema import ParallelConfig, RunConfig

TENSOR = "--tensor-model-parallel-size"
PIPELINE = "--pipeline-model-parallel-size"


def not_dividing(divisor: int, divisor_flag: str, size: int, size_flag: str) -> Iterator[str]:
    """Yield a message if ``divisor`` does not divide ``size``."""
    if size % divisor:
        yield f"{divisor_flag} {divisor} does not divide {size_flag} {size}. Choose a divisor of {size}."


def both_given(first: str, has_first: object, second: str, has_second: object, hint: str = "") -> Iterator[str]:
    """Yield a message if two mutually exclusive flags were given."""
    if has_first and has_second:
        yield f"{first} and {second} were both given. Give one{hint}."


def has_uneven_stages(parallel: ParallelConfig) -> bool:
    """Return whether the first or last pipeline stage has an explicit number of layers."""
    return bool(parallel.decoder_first_pipeline_num_layers or parallel.decoder_last_pipeline_num_layers)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Return the number of data-parallel ranks; 0 if the layout does not divide the process count."""
    parallel = config.parallel
    shared = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    shared *= parallel.context_parallel_size
    return world_size // shared if world_size % shared == 0 else 0
