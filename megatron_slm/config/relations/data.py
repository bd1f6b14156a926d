"""Relations of the flags that name corpora."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.relations.wording import both_given
from megatron_slm.config.schema import Config


def training_corpora(config: Config, _: int) -> Iterator[str]:
    """One flag names the training corpora."""
    data = config.data
    if not data.data_path and not data.train_data_path:
        yield "no corpus to train on: give --data-path."
    if data.split is not None and data.train_data_path:
        yield "--split has no effect with --train-data-path."
    yield from both_given("--data-path", data.data_path, "--train-data-path", data.train_data_path)


RELATIONS = (training_corpora,)
