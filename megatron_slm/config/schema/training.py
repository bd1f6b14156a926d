"""Settings of parallelism, training and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.constraints import UNSET, flag

PARAMS_DTYPES = ("fp32", "bf16", "fp16")
FUSED_PARTS = (  # parts of the table of implementations, for --require-fused
    *("linear", "attention", "norm", "rope", "weight-gradient", "adam", "lm-head", "fp8", "reference"),
    *("grad-reduce", "param-gather", "tp-comm", "p2p-comm"),
)
# TensorParallelMuon in megatron/core/optimizer/muon.py of 0.16.1 calls OrthogonalizedOptimizer(..., momentum_beta,
# use_nesterov=...), which has the arguments momentum and nesterov in 0.3.0. Later versions of Megatron-Core use the new
# names. Checkpoints would need the state of Muon in all layouts, since it excludes the distributed optimizer.
_MUON = (
    "Megatron-Core has it from version 0.16 on, outside of the distributed optimizer, with the package "
    "emerging-optimizers, whose only release on the package index, 0.3.0, needs Python 3.12 and does not accept the "
    "arguments momentum_beta and use_nesterov of Megatron-Core 0.16. Use --optimizer adam."
)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism"""

    tensor_model_parallel_size: int = flag(1, "degree of tensor model parallelism (TP)", above=0, core="model")
    pipeline_model_parallel_size: int = flag(1, "degree of pipeline model parallelism (PP)", above=0, core="model")
    context_parallel_size: int = flag(1, "degree of context parallelism (CP)", above=0, core="model")
    expert_model_parallel_size: int = flag(1, "degree of expert model parallelism (EP)", above=0, core="model")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "number of layers per virtual pipeline stage; enables the interleaved schedule", above=0
    )
    decoder_first_pipeline_num_layers: int | None = flag(
        None,
        "number of transformer layers on the first pipeline stage; default an even split over all stages",
        above=0,
        core="model.num_layers_in_first_pipeline_stage",
    )
    decoder_last_pipeline_num_layers: int | None = flag(
        None,
        "number of transformer layers on the last pipeline stage; default an even split over all stages",
        above=0,
        core="model.num_layers_in_last_pipeline_stage",
    )
    sequence_parallel: bool = flag(
        False,
        "enable sequence parallelism: shard activations between tensor-parallel regions; no effect if TP is 1",
        core="model",
    )
    use_distributed_optimizer: bool = flag(
        False, "use the distributed optimizer: shard optimizer state over data-parallel ranks", core="optimizer ddp"
    )
    overlap_grad_reduce: bool = flag(False, "overlap the gradient reduction with the backward pass", core="ddp")
    overlap_param_gather: bool = flag(
        False,
        "overlap the parameter all-gather with the forward pass; requires the distributed optimizer",
        core="optimizer ddp",
    )
    align_grad_reduce: bool = flag(
        True, "start overlapped gradient reductions on all pipeline stages at the same time, not when each is ready"
    )
    align_param_gather: bool = flag(
        True,
        "with the interleaved schedule, start overlapped parameter gathers on all pipeline stages at the same time, "
        "not when each is needed",
    )
    overlap_p2p_comm: bool = flag(
        True,
        "overlap pipeline communication with computation in the interleaved schedule",
        spelling="--overlap-p2p-communication",
    )
    overlap_p2p_comm_warmup_flush: bool = flag(
        False,
        "overlap pipeline communication also in the warm-up and flush of the interleaved schedule",
        spelling="--overlap-p2p-communication-warmup-flush",
    )
    tp_comm_overlap: bool = flag(
        False,
        "overlap tensor-parallel communication with the matrix products of Transformer Engine's linear layers; "
        "requires --sequence-parallel",
        core="model",
    )
    tp_comm_overlap_cfg: str | None = flag(
        None, "YAML file with the settings of each overlapped operation, for --tp-comm-overlap"
    )
    tp_comm_bootstrap_backend: str = flag(
        "nccl",
        "backend that sets up the communication of --tp-comm-overlap",
        choices=("nccl", "mpi", "gloo"),
        core="model",
    )
    distributed_backend: str | None = flag(
        None, "backend of torch.distributed; default nccl on GPUs, gloo on CPUs", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: int = flag(10, "timeout in minutes of collective operations", above=0, at_most=525600)
    slm_hang_timeout: float = flag(
        45.0,
        "seconds without progress of a rank within a training step after which the run ends; 0 disables this, for "
        "example for a debugger",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training"""

    micro_batch_size: int = flag(UNSET, "batch size per data-parallel rank and forward pass", required=True, above=0)
    global_batch_size: int = flag(
        UNSET, "training batch size over all ranks; default micro-batch size x data-parallel size", above=0
    )
    rampup_batch_size: list[int] = flag(
        list,
        "initial global batch size, increment, and number of samples after which --global-batch-size is reached; "
        "default constant",
    )
    train_iters: int = flag(UNSET, "total number of training iterations", required=True, above=0)
    train_samples: int | None = flag(
        None,
        "total number of training samples, instead of --train-iters; the schedule is then given in samples",
        above=0,
        at_most=2**53,
    )
    seed: int = flag(
        1234, "random seed of weights, dropout, data order and random selection", at_least=0, at_most=2**32 - 1
    )
    bf16: bool = flag(False, "train in bfloat16 with fp32 master weights", core="optimizer")
    fp16: bool = flag(False, "train in float16 with fp32 master weights and loss scaling", core="optimizer")
    gradient_accumulation_fusion: bool = flag(
        True, "fuse the accumulation of weight gradients with their computation in linear layers; on GPUs only"
    )
    recompute_granularity: str | None = flag(
        None,
        "granularity of activation recomputation in the backward pass",
        choices=("full", "selective"),
        core="model",
    )
    recompute_method: str | None = flag(
        None, "layer selection of --recompute-granularity full", choices=("uniform", "block"), core="model"
    )
    recompute_num_layers: int | None = flag(None, "number of layers per recomputed unit", above=0, core="model")
    exit_interval: int | None = flag(None, "save and exit after an iteration that is a multiple of this", above=0)
    exit_duration_in_mins: int | None = flag(None, "save and exit after this many minutes", above=0)
    exit_signal_handler: bool = flag(
        True, "save and exit at SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 (Megatron-LM: off, SIGTERM only)"
    )
    iterations_to_skip: list[int] = flag(
        list, "iterations whose samples are consumed without training, for example after a NaN"
    )
    check_for_spiky_loss: bool = flag(
        True, "record steps whose loss is a spike, with their samples and documents (Megatron-LM: off)"
    )
    check_for_large_grads: bool = flag(
        True, "record steps whose gradient norm is a spike, with their samples and documents (Megatron-LM: off)"
    )
    slm_spike_window: int = flag(
        128, "number of steps of the running mean and standard deviation that define a spike", at_least=4
    )
    slm_spike_threshold: float = flag(6.0, "number of standard deviations above the mean that is a spike", above=0)
    slm_spike_action: str = flag(
        "log",
        "action at a spike: log it, skip the update of the weights, or stop the run before the update",
        choices=("log", "skip", "stop"),
    )
    replay_step: int | None = flag(
        None,
        "repeat this iteration exactly, from the newest checkpoint before it, report its samples, and exit; writes "
        "nothing to --save",
        above=0,
    )
    skip_train: bool = flag(False, "skip training: evaluate the checkpoint of --load and save no checkpoint")
    require_fused: list[str] = flag(
        list,
        "parts that must use their fastest implementation; the run ends with an error before training if one does not",
        choices=FUSED_PARTS,
    )

    @property
    def params_dtype(self) -> str:
        """Return the dtype of the weights: fp32, bf16 or fp16."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def bytes_per_value(self) -> int:
        """Return the size of a weight or activation in bytes."""
        return 4 if self.params_dtype == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and schedule"""

    optimizer: str = flag(
        "adam",
        "optimizer (adam is AdamW: decoupled weight decay)",
        choices=("adam", "sgd"),
        unsupported=dict.fromkeys(("muon", "dist_muon"), _MUON),
        core="optimizer",
    )
    lr: float = flag(UNSET, "peak learning rate", required=True, at_least=0, at_most=1e6, core="optimizer")
    min_lr: float = flag(0.0, "minimum learning rate, reached at the end of the decay", at_least=0, core="optimizer")
    lr_decay_style: str = flag(
        "linear", "learning-rate decay function", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_decay_iters: int | None = flag(
        None, "number of iterations of the learning-rate decay, including warm-up; default --train-iters", above=0
    )
    lr_decay_samples: int | None = flag(
        None,
        "number of samples of the learning-rate decay, including warm-up; default --train-samples",
        above=0,
        at_most=2**53,
    )
    lr_warmup_samples: int = flag(0, "number of samples of the linear learning-rate warm-up", at_least=0, at_most=2**53)
    lr_warmup_iters: int = flag(0, "number of iterations of the linear learning-rate warm-up", at_least=0)
    lr_warmup_fraction: float | None = flag(
        None, "fraction of --lr-decay-iters used for the warm-up", at_least=0, below=1
    )
    lr_warmup_init: float = flag(0.0, "initial learning rate of the warm-up", at_least=0)
    lr_wsd_decay_style: str = flag(
        "exponential",
        "decay function of the annealing phase of WSD",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = flag(None, "number of iterations of the annealing phase of WSD", at_least=0)
    lr_wsd_decay_samples: int | None = flag(
        None, "number of samples of the annealing phase of WSD", above=0, at_most=2**53
    )
    weight_decay: float = flag(
        0.01, "weight decay coefficient (not applied to biases and normalization weights)", at_least=0, core="optimizer"
    )
    start_weight_decay: float | None = flag(
        None, "initial weight decay coefficient, if it changes over the run", at_least=0
    )
    end_weight_decay: float | None = flag(
        None, "final weight decay coefficient, if it changes over the run", at_least=0
    )
    weight_decay_incr_style: str = flag(
        "constant", "weight decay increment function", choices=("constant", "linear", "cosine")
    )
    adam_beta1: float = flag(
        0.9,
        "first coefficient of Adam's running averages of gradient and squared gradient",
        at_least=0,
        below=1,
        core="optimizer",
    )
    adam_beta2: float = flag(
        0.999,
        "second coefficient of Adam's running averages of gradient and squared gradient",
        at_least=0,
        below=1,
        core="optimizer",
    )
    adam_eps: float = flag(1e-8, "Adam's term for numerical stability", above=0, core="optimizer")
    sgd_momentum: float = flag(0.9, "momentum factor of SGD", at_least=0, below=1, core="optimizer")
    clip_grad: float = flag(
        1.0, "clip gradients to this global L2 norm; 0 disables clipping", at_least=0, core="optimizer"
    )
    accumulate_allreduce_grads_in_fp32: bool = flag(
        True,
        "accumulate and all-reduce gradients in fp32 (Megatron-LM: off without bf16)",
        core="ddp.grad_reduce_in_fp32",
    )
    override_opt_param_scheduler: bool = flag(
        False,
        "use the scheduler settings of the command line, not of the checkpoint",
        spelling="--override-opt_param-scheduler",
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False,
        "use the scheduler settings of the checkpoint, not of the command line",
        spelling="--use-checkpoint-opt_param-scheduler",
    )
