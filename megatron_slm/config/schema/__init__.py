"""Schema of the configuration: one keyword-only dataclass per topic, one field per flag.

The name of a field is its flag (``num_layers`` is ``--num-layers``) and its recipe key; the field's metadata hold the
help text and the constraints. Names, meanings and defaults follow Megatron-LM; the help text states every default that
differs. Project-specific fields start with ``slm_`` or ``reference_``. The package imports no torch, so that parsing
is fast.

:func:`megatron_slm.config.checks.resolve` assigns a value to every setting with the default UNSET.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_slm.config.schema.data import DataConfig, TokenizerConfig
from megatron_slm.config.schema.diagnostics import DiagnosticsConfig
from megatron_slm.config.schema.model import ModelConfig
from megatron_slm.config.schema.objective import ObjectiveConfig, ReferenceConfig
from megatron_slm.config.schema.output import CheckpointConfig, LoggingConfig
from megatron_slm.config.schema.precision import PrecisionConfig
from megatron_slm.config.schema.training import OptimizerConfig, ParallelConfig, TrainingConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DiagnosticsConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ReferenceConfig",
    "RunConfig",
    "TokenizerConfig",
    "TrainingConfig",
]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a run, grouped by topic; immutable."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
