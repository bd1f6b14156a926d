"""Accepted flags of Megatron-LM that are not settings: they imply a setting, state a fact, or have no effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_slm.config.schema import RunConfig

SWITCH: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """Fact stated by a flag.

    Args:
        remedy: error message for other values of the flag.
        values: values that state the fact; SWITCH for a flag without a value.
        holds: returns whether the fact is true of a configuration.
    """

    remedy: str
    values: tuple[str, ...] = SWITCH
    holds: Callable[[RunConfig], bool] = lambda config: True


# Flag -> setting and value that it implies in Megatron-LM.
IMPLIED: dict[str, tuple[str, Any]] = {
    "--use-rotary-position-embeddings": ("position_embedding_type", "rope"),
    "--sft": ("objective", "sft"),
    "--squared-relu": ("activation", "squared_relu"),
    "--openai-gelu": ("activation", "gelu_tanh"),
    "--recompute-activations": ("recompute_granularity", "selective"),
    "--grad-reduce-in-bf16": ("accumulate_allreduce_grads_in_fp32", False),
    "--disable-fp8-wgrad": ("fp8_wgrad", False),
    "--disable-manual-gc-eval": ("manual_gc_eval", False),
    "--disable-flight-recorder-dump-on-timeout": ("flight_recorder_dump_on_timeout", False),
    "--disable-flight-recorder-include-only-active": ("flight_recorder_include_only_active", False),
    "--disable-flight-recorder-extra-dump-on-exec": ("flight_recorder_extra_dump_on_exec", False),
    "--disable-align-grad-reduce": ("align_grad_reduce", False),
    "--override-opt-param-scheduler": ("override_opt_param_scheduler", True),
    "--use-checkpoint-opt-param-scheduler": ("use_checkpoint_opt_param_scheduler", True),
}

_FORMAT = "checkpoints are written and read in the format torch_dist. Convert others with Megatron-LM's tools."

FACTS: dict[str, Fact] = {
    "--use-mcore-models": Fact("every model is a Megatron-Core model."),
    "--use-flash-attn": Fact("attention scores are never stored."),
    "--calculate-per-token-loss": Fact("the loss is always normalized over the tokens of the global batch."),
    "--cross-entropy-loss-fusion": Fact("the loss is always computed together with the LM head."),
    "--log-throughput": Fact("every log line has tokens/s and TFLOP/s."),
    "--use-dist-ckpt": Fact(_FORMAT),
    "--auto-detect-ckpt-format": Fact(_FORMAT),
    "--dist-ckpt-optim-fully-reshardable": Fact("optimizer state is always fully reshardable."),
    "--distrib-optim-fully-reshardable-mem-efficient": Fact("optimizer state is always gathered on one rank."),
    "--no-one-logger": Fact("one-logger is not used."),
    "--no-position-embedding": Fact(
        "it contradicts --position-embedding-type learned_absolute. Choose rope or none.",
        holds=lambda config: config.model.position_embedding_type != "learned_absolute",
    ),
    "--no-create-attention-mask-in-dataloader": Fact(
        "--reset-attention-mask needs a mask. Leave one of them out.",
        holds=lambda config: not config.data.reset_attention_mask,
    ),
    "--attention-backend": Fact(
        "attention scores are never stored, and torch or Transformer Engine select the kernel. Give "
        "auto, flash or fused (local only with --transformer-impl local), or leave the flag out.",
        values=("auto", "flash", "fused", "local"),
    ),
    "--ckpt-format": Fact(_FORMAT, values=("torch_dist",)),
    "--dist-ckpt-format": Fact(_FORMAT, values=("torch_dist",)),
    "--dataloader-type": Fact(
        "samples are read in the order of the sample index. Give single, or leave the flag out.", values=("single",)
    ),
    "--cross-entropy-fusion-impl": Fact(
        "--slm-cross-entropy chooses the implementation of the loss. Leave this flag out.", values=("native",)
    ),
    "--data-parallel-sharding-strategy": Fact(
        "parameters are not sharded over data-parallel ranks; shard optimizer state with --use-distributed-optimizer.",
        values=("no_shard",),
    ),
    "--softmax-type": Fact("attention uses the standard softmax. Leave the flag out.", values=("vanilla",)),
    "--rope-type": Fact("rotary embeddings are not scaled. Leave the flag out.", values=("rope",)),
    "--moe-layer-freq": Fact("with --num-experts, every layer is a mixture of experts.", values=("1",)),
    "--moe-router-score-function": Fact("the router uses softmax scores.", values=("softmax",)),
    "--rerun-mode": Fact("iterations are never rerun. Give disabled, or leave the flag out.", values=("disabled",)),
}

_LEVEL = ("0", "1", "2")
INTEGER = ("an integer",)

# Flag -> its values: choices, INTEGER, or SWITCH. They change neither losses nor files: kernel choices with the
# same result, memory management, details of Megatron-LM's log, and a setting that Transformer Engine ignores.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "--no-masked-softmax-fusion",
            "--no-bias-gelu-fusion",
            "--no-bias-swiglu-fusion",
            "--no-bias-dropout-fusion",
            "--no-rope-fusion",
            "--no-gradient-reduce-div-fusion",
            "--no-persist-layer-norm",
            "--no-mmap-bin-files",
            "--ckpt-fully-parallel-save",
            "--no-ckpt-fully-parallel-save",
            "--ckpt-fully-parallel-load",
            "--ckpt-assume-constant-structure",
            "--use-persistent-ckpt-worker",
            "--async-ckpt-use-cpu-shm",
            "--log-device-memory-used",
            "--log-energy",
            "--log-max-attention-logit",
            "--log-memory-to-tensorboard",
            "--log-num-zeros-in-grad",
            "--log-params-norm",
            "--log-progress",
            "--log-timers-to-tensorboard",
            "--log-validation-ppl-to-tensorboard",
            "--log-world-size-to-tensorboard",
            "--no-log-loss-scale-to-tensorboard",
            "--disable-log-loss-scale-to-tensorboard",
            "--no-barrier-with-level-1-timing",
        ),
        SWITCH,
    ),
    "--empty-unused-memory-level": _LEVEL,
    "--async-strategy": ("nvrx", "mcore"),
    "--timing-log-level": _LEVEL,
    "--timing-log-option": ("max", "minmax", "all"),
    **dict.fromkeys(
        (
            "--local-rank",
            "--local_rank",
            "--logging-level",
            "--log-memory-interval",
            "--tensorboard-log-interval",
            "--tensorboard-queue-size",
            "--num-dataset-builder-threads",
            "--dist-ckpt-workers",
            "--fp8-interval",
            "--async-ckpt-cpu-priority",
            "--async-ckpt-io-priority",
        ),
        INTEGER,
    ),
}
