"""Relations of the data settings."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.relations.wording import both_given
from megatron_slm.config.schema import RunConfig


def training_corpora(config: RunConfig, _: int) -> Iterator[str]:
    """Require exactly one source of training data."""
    data = config.data
    corpora = data.data_path or data.train_data_path or (config.training.skip_train and data.valid_data_path)
    if not corpora and not data.mock_data:
        yield "no training data: give --data-path, or --mock-data for generated data."
    if data.mock_data:
        yield from both_given("--mock-data", True, "--data-path", data.data_path)
        yield from both_given("--mock-data", True, "--train-data-path", data.train_data_path)
        yield from both_given("--mock-data", True, "--valid-data-path", data.valid_data_path)
        yield from both_given("--mock-data", True, "--reference-scores", config.reference.reference_scores)
    if data.split is not None and data.train_data_path:
        yield "--split has no effect with --train-data-path."
    yield from both_given("--data-path", data.data_path, "--train-data-path", data.train_data_path)


RELATIONS = (training_corpora,)
