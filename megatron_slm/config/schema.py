"""Every setting of a run: one keyword-only dataclass per topic, one field per flag.

A field's name is its flag (``num_layers`` is ``--num-layers``), its YAML key, and its ``help`` is the flag's help.
Names, meanings and defaults are Megatron-LM's where Megatron-LM has the flag; the help says so where a default
differs. Fields of ours begin with ``slm_`` or ``reference_``. This module imports no torch: parsing must be quick.

Settings with the default UNSET have a value once :func:`megatron_slm.config.checks.resolve` has returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_slm.config.constraints import UNSET, flag


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model"""

    num_layers: int = flag(UNSET, "number of transformer layers", required=True, above=0, core="model")
    hidden_size: int = flag(UNSET, "width of the residual stream", required=True, above=0, core="model")
    ffn_hidden_size: int = flag(
        UNSET,
        "width of the MLP; default 4 x hidden size, or 8/3 x rounded down to 64s if the MLP is gated",
        above=0,
        core="model",
    )
    num_attention_heads: int = flag(UNSET, "number of attention heads", required=True, above=0, core="model")
    group_query_attention: bool = flag(False, "grouped-query attention; needs --num-query-groups")
    num_query_groups: int | None = flag(None, "number of key/value heads for grouped-query attention", above=0)
    kv_channels: int = flag(UNSET, "width of one head; default hidden size / heads", above=0, core="model")
    seq_length: int = flag(UNSET, "tokens in one training sample", required=True, above=0)
    max_position_embeddings: int = flag(UNSET, "longest position; default the sequence length", above=0)
    position_embedding_type: str = flag(
        "learned_absolute", "how positions enter", choices=("learned_absolute", "rope", "none")
    )
    rotary_base: int = flag(10000, "base of the rotary frequencies", above=0)
    rotary_percent: float = flag(1.0, "share of a head's width that is rotated", above=0, at_most=1)
    normalization: str = flag("LayerNorm", "normalisation layer", choices=("LayerNorm", "RMSNorm"), core="model")
    norm_epsilon: float = flag(1e-5, "epsilon of the normalisation", above=0, core="model.layernorm_epsilon")
    swiglu: bool = flag(False, "use gated linear units and SiLU activation instead of GELU (--activation swiglu)")
    activation: str | None = flag(
        None,
        "activation of the MLP, the same function on every device; default swiglu with --swiglu, else gelu, which is "
        "exact (Megatron-LM's fused GELU is gelu_tanh, as in GPT-2)",
        choices=("gelu", "gelu_tanh", "swiglu", "geglu", "squared_relu"),
    )
    disable_bias_linear: bool = flag(False, "no bias in linear layers")
    add_qkv_bias: bool = flag(False, "bias in the query/key/value projection only", core="model")
    untie_embeddings_and_output_weights: bool = flag(False, "an LM head of its own")
    qk_layernorm: bool = flag(False, "normalise queries and keys", core="model")
    attention_dropout: float = flag(0.1, "dropout on attention weights", at_least=0, below=1, core="model")
    hidden_dropout: float = flag(0.1, "dropout on the residual stream", at_least=0, below=1, core="model")
    init_method_std: float = flag(0.02, "standard deviation of the initial weights", at_least=0, core="model")
    make_vocab_size_divisible_by: int = flag(128, "the vocabulary is padded to a multiple of this x TP", above=0)
    vocab_size: int | None = flag(
        None,
        "vocabulary size before padding; default the tokenizer's, and at least that. NullTokenizer needs it, and "
        "TikTokenizer takes as many entries of a .json file, special tokens included",
        above=0,
    )
    attention_softmax_in_fp32: bool = flag(False, "softmax of the attention in fp32", core="model")
    slm_logit_softcap: float | None = flag(None, "logits are capped to c x tanh(logits / c); default: no cap", above=0)
    mtp_num_layers: int | None = flag(
        None, "further heads, each a layer, that predict tokens further ahead", above=0, core="model"
    )
    mtp_loss_scaling_factor: float = flag(0.1, "weight of the further heads' losses together", at_least=0, core="model")
    num_experts: int | None = flag(
        None, "experts of each layer (mixture of experts); default a plain MLP", above=0, core="model.num_moe_experts"
    )
    moe_ffn_hidden_size: int = flag(UNSET, "width of one expert; default that of the MLP", above=0, core="model")
    moe_router_topk: int = flag(2, "experts that each token passes", above=0, core="model")
    moe_router_pre_softmax: bool = flag(
        False, "softmax over all experts before the top k are chosen, not after", core="model"
    )
    moe_router_load_balancing_type: str = flag(
        "aux_loss", "how experts are kept in balance", choices=("aux_loss", "seq_aux_loss", "none"), core="model"
    )
    moe_aux_loss_coeff: float = flag(
        0.0, "coefficient of the load-balancing loss, over all tokens", at_least=0, core="model"
    )
    moe_z_loss_coeff: float | None = flag(
        None, "coefficient of the router's z-loss, over all tokens", at_least=0, core="model"
    )
    moe_token_dispatcher_type: str = flag(
        "allgather", "how tokens go to experts on other ranks", choices=("allgather", "alltoall"), core="model"
    )
    moe_grouped_gemm: bool = flag(False, "all experts of a rank in one kernel; needs Transformer Engine", core="model")
    transformer_impl: str | None = flag(
        None,
        "layer implementation; default Transformer Engine on a GPU where it is installed, else local",
        choices=("local", "transformer_engine"),
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism"""

    tensor_model_parallel_size: int = flag(1, "ranks that share one layer (TP)", above=0, core="model")
    pipeline_model_parallel_size: int = flag(1, "pipeline stages (PP)", above=0, core="model")
    context_parallel_size: int = flag(1, "ranks that share each sample's positions (CP)", above=0, core="model")
    expert_model_parallel_size: int = flag(1, "ranks that share the experts of a layer (EP)", above=0, core="model")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "layers of one virtual stage: turns the interleaved pipeline schedule on", above=0
    )
    decoder_first_pipeline_num_layers: int | None = flag(
        None,
        "number of transformer layers on the first pipeline stage; default even split over all stages",
        above=0,
        core="model.num_layers_in_first_pipeline_stage",
    )
    decoder_last_pipeline_num_layers: int | None = flag(
        None,
        "number of transformer layers on the last pipeline stage; default even split over all stages",
        above=0,
        core="model.num_layers_in_last_pipeline_stage",
    )
    sequence_parallel: bool = flag(
        False, "shard activations between tensor-parallel regions; no effect if TP is 1", core="model"
    )
    use_distributed_optimizer: bool = flag(
        False, "shard optimizer state over data-parallel ranks", core="optimizer ddp"
    )
    overlap_grad_reduce: bool = flag(False, "reduce gradients while the backward pass goes on", core="ddp")
    overlap_param_gather: bool = flag(
        False,
        "gather updated parameters while the forward pass goes on; needs the distributed optimizer",
        core="optimizer ddp",
    )
    distributed_backend: str | None = flag(
        None, "communication backend; default nccl on GPUs, gloo on CPUs", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: int = flag(
        10, "minutes after which a collective that hangs ends the run", above=0, at_most=525600
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training"""

    micro_batch_size: int = flag(UNSET, "samples in one forward pass of one data-parallel rank", required=True, above=0)
    global_batch_size: int = flag(
        UNSET, "samples in one optimizer step over all ranks; default micro-batch size x DP", above=0
    )
    train_iters: int = flag(UNSET, "optimizer steps of the run", required=True, above=0)
    train_samples: int | None = flag(
        None,
        "samples of the run, instead of --train-iters; the schedule is then given in samples",
        above=0,
        at_most=2**53,
    )
    seed: int = flag(1234, "seed of weights, dropout, data order and random selection", at_least=0, at_most=2**32 - 1)
    bf16: bool = flag(False, "bfloat16 weights and activations with fp32 master weights", core="model optimizer")
    recompute_granularity: str | None = flag(
        None, "recompute activations in the backward pass", choices=("full", "selective"), core="model"
    )
    recompute_method: str | None = flag(
        None, "which layers --recompute-granularity full recomputes", choices=("uniform", "block"), core="model"
    )
    recompute_num_layers: int | None = flag(None, "layers in one recomputed unit", above=0, core="model")
    exit_interval: int | None = flag(None, "save and exit when the step is a multiple of this", above=0)
    exit_duration_in_mins: int | None = flag(None, "save and exit after this many minutes", above=0)
    exit_signal_handler: bool = flag(
        True, "save and exit at SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 (Megatron-LM: off, SIGTERM only)"
    )
    skip_train: bool = flag(False, "only evaluate the checkpoint of --load; nothing is trained or saved")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and schedule"""

    optimizer: str = flag(
        "adam", "optimizer (adam is AdamW: decoupled weight decay)", choices=("adam", "sgd"), core="optimizer"
    )
    lr: float = flag(UNSET, "peak learning rate", required=True, at_least=0, at_most=1e6, core="optimizer")
    min_lr: float = flag(0.0, "learning rate at the end of the decay", at_least=0, core="optimizer")
    lr_decay_style: str = flag(
        "linear", "shape of the decay", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_decay_iters: int | None = flag(None, "steps of the decay, warm-up included; default --train-iters", above=0)
    lr_decay_samples: int | None = flag(
        None, "samples of the decay, warm-up included; default --train-samples", above=0, at_most=2**53
    )
    lr_warmup_samples: int = flag(0, "samples of linear warm-up", at_least=0, at_most=2**53)
    lr_warmup_iters: int = flag(0, "steps of linear warm-up", at_least=0)
    lr_warmup_fraction: float | None = flag(None, "warm-up as a share of --lr-decay-iters", at_least=0, below=1)
    lr_warmup_init: float = flag(0.0, "learning rate at the first step of the warm-up", at_least=0)
    lr_wsd_decay_style: str = flag(
        "exponential", "shape of the decay phase of WSD", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = flag(None, "steps of the decay phase of WSD", at_least=0)
    lr_wsd_decay_samples: int | None = flag(None, "samples of the decay phase of WSD", above=0, at_most=2**53)
    weight_decay: float = flag(0.01, "weight decay (not on biases and normalisation)", at_least=0, core="optimizer")
    start_weight_decay: float | None = flag(None, "weight decay at the start, where it changes", at_least=0)
    end_weight_decay: float | None = flag(None, "weight decay at the end, where it changes", at_least=0)
    weight_decay_incr_style: str = flag(
        "constant", "how weight decay changes", choices=("constant", "linear", "cosine")
    )
    adam_beta1: float = flag(0.9, "decay of Adam's first moment", at_least=0, below=1, core="optimizer")
    adam_beta2: float = flag(0.999, "decay of Adam's second moment", at_least=0, below=1, core="optimizer")
    adam_eps: float = flag(1e-8, "epsilon of Adam", above=0, core="optimizer")
    sgd_momentum: float = flag(0.9, "momentum of SGD", at_least=0, below=1, core="optimizer")
    clip_grad: float = flag(1.0, "largest global gradient norm; 0 turns clipping off", at_least=0, core="optimizer")
    accumulate_allreduce_grads_in_fp32: bool = flag(
        True, "add up and reduce gradients in fp32 (Megatron-LM: off without bf16)", core="ddp.grad_reduce_in_fp32"
    )
    override_opt_param_scheduler: bool = flag(
        False, "schedule from the flags, not from the checkpoint", spelling="--override-opt_param-scheduler"
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False, "schedule from the checkpoint, not from the flags", spelling="--use-checkpoint-opt_param-scheduler"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data"""

    data_path: list[str] = flag(
        list, "corpus prefix, or a blend: weight prefix weight prefix ..., or a YAML or JSON file of prefix: weight"
    )
    train_data_path: list[str] = flag(list, "like --data-path, for training only")
    valid_data_path: dict[str, list[str]] = flag(
        dict, "named validation sets: name=PREFIX ..., each also a blend: name=0.3 P1 0.7 P2, or a file"
    )
    data_args_path: str | None = flag(None, "text file that holds the words of --data-path")
    per_split_data_args_path: str | None = flag(None, "JSON file with the blends train and valid")
    split: str | None = flag(
        None,
        "shares of --data-path for training, validation and test; default 969,30,1, or all for training with "
        "--valid-data-path",
    )
    mock_data: bool = flag(
        False, "train on generated mock data instead of corpora; as in Megatron-LM, --split has no effect on them"
    )
    data_order: str = flag(
        "megatron",
        "order of samples: megatron shuffles all epochs together, so that a longer run has another order; stable "
        "shuffles each epoch independently",
        choices=("megatron", "stable"),
    )
    slm_sentences: str = flag(
        "refuse",
        "documents of several sequences, as --split-sentences of preprocess_data.py makes them: refuse them, join the "
        "sentences of a document, or shuffle sentences separately, as Megatron-LM does",
        choices=("refuse", "join", "separate"),
    )
    slm_accept_changed_corpora: bool = flag(
        False, "resume although a corpus has another content than when the checkpoint was saved"
    )
    data_cache_path: str | None = flag(None, "directory for the sample indices; default beside the corpus")
    reset_position_ids: bool = flag(False, "positions begin anew after each end of document")
    reset_attention_mask: bool = flag(False, "no attention across the end of a document")
    eod_mask_loss: bool = flag(False, "no loss on the end-of-document token")
    num_workers: int = flag(2, "batches that are read ahead; 0 reads when needed", at_least=0)
    full_validation: bool = flag(False, "evaluate on one whole epoch of every validation set")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer"""

    tokenizer_type: str = flag(
        UNSET,
        "kind of tokenizer; default GPT2BPETokenizer if --vocab-file is given",
        required=True,
        choices=(
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "Llama2Tokenizer",
            "HuggingFaceTokenizer",
            "GPT2BPETokenizer",
            "TikTokenizer",
            "ByteTokenizer",
            "NullTokenizer",
        ),
    )
    tokenizer_model: str | None = flag(None, "tokenizer file, or the directory of a HuggingFaceTokenizer")
    vocab_file: str | None = flag(None, "vocabulary file of GPT2BPETokenizer")
    merge_file: str | None = flag(None, "merge file of GPT2BPETokenizer")
    tiktoken_pattern: str = flag("v2", "pre-tokenization pattern of a TikTokenizer of .json", choices=("v1", "v2"))
    tiktoken_num_special_tokens: int = flag(1000, "number of special tokens of a TikTokenizer of .json", above=0)
    eod_id: int | None = flag(
        None, "id of the end-of-document token; default the tokenizer's. Required if the tokenizer has none", at_least=0
    )
    null_tokenizer_eod_id: int | None = flag(None, "Megatron-LM's name of --eod-id for NullTokenizer", at_least=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints"""

    save: str | None = flag(None, "folder to save checkpoints in")
    load: str | None = flag(None, "folder to resume from; with --finetune, another run's weights as base")
    pretrained_checkpoint: str | None = flag(None, "weights to begin from when --load holds no checkpoint")
    save_interval: int | None = flag(None, "steps between checkpoints; the last step is always saved", above=0)
    save_retain_interval: int | None = flag(
        None, "keep checkpoints of steps that are multiples of this, and the newest; default all", above=0
    )
    finetune: bool = flag(False, "take only the weights of --load; begin at step 0")
    ckpt_step: int | None = flag(None, "step to load instead of the newest", at_least=0)
    save_optim: bool = flag(True, "save optimizer state")
    save_rng: bool = flag(True, "save random number states")
    load_optim: bool = flag(True, "load optimizer state")
    load_rng: bool = flag(True, "load random number states")
    slm_overwrite_save: bool = flag(False, "remove the run that --save holds, and begin a new one")
    exit_on_missing_checkpoint: bool = flag(False, "exit with an error if --load holds no checkpoint")
    use_checkpoint_args: bool = flag(False, "take the model settings from the checkpoint of --load, not from the flags")
    slm_verify_checksums: bool = flag(
        True, "compare the content of checkpoints and score sidecars with their checksums before use"
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Evaluation and logging"""

    log_interval: int = flag(1, "steps between lines of the log (Megatron-LM: 100)", above=0)
    eval_interval: int | None = flag(
        None, "steps between evaluations (Megatron-LM: 1000); default: first and last", above=0
    )
    eval_iters: int = flag(100, "global batches of one evaluation, of each set", at_least=0)
    tensorboard_dir: str | None = flag(None, "folder for TensorBoard")
    wandb_project: str | None = flag(None, "Weights & Biases project; turns W&B on")
    wandb_exp_name: str | None = flag(None, "name of the run in Weights & Biases")
    wandb_save_dir: str | None = flag(None, "local folder of Weights & Biases")
    slm_log_dir: str | None = flag(None, "directory for a log file of every rank, with times; default no log files")
    slm_metrics_file: str | None = flag(None, "JSONL file of all metrics; default metrics.jsonl in --save")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Selective Language Modeling"""

    objective: str = flag("clm", "clm: gradient of all tokens; slm: of selected tokens", choices=("clm", "slm"))
    slm_selection_ratio: float = flag(
        0.6,
        "share k of the valid tokens that are selected, in (0, 1]",
        above=0,
        at_most=1,
        example="0.6 (the paper's for 1B)",
    )
    slm_score: str = flag(
        "excess",
        "what tokens are ranked by: excess, token-loss, reference-loss, reference-entropy (both lowest first), "
        "random, stochastic-NAME; joined by and/or with own ratios: "
        "'reference-loss:0.7 and reference-entropy:0.7'",
    )
    slm_scope: str = flag(
        "data-parallel",
        "set of tokens that is ranked together",
        choices=("sequence", "micro-batch", "data-parallel", "global-batch"),
    )
    slm_threshold: str = flag(
        "exact",
        "with --slm-scope global-batch, exact: an additional forward pass ranks all tokens of the step first; "
        "predicted: the threshold is predicted from earlier steps, and the selected share is held near the ratio",
        choices=("exact", "predicted"),
    )
    slm_selection_ratio_start: float | None = flag(
        None, "selection ratio of the first step", above=0, at_most=1, example="0.6 (the paper's for 1B)"
    )
    slm_selection_ratio_warmup_iters: int = flag(
        0, "steps over which the ratio goes from --slm-selection-ratio-start to --slm-selection-ratio", at_least=0
    )
    slm_mix: float = flag(
        0.0, "share of the weight that is spread evenly over all valid tokens (plain CLM)", at_least=0, at_most=1
    )
    slm_mtp_selection: str = flag(
        "main",
        "with --mtp-num-layers, main: an MTP head is trained on the tokens that the main head is trained on; "
        "independent: it ranks its own losses",
        choices=("main", "independent"),
    )
    slm_gumbel_temperature: float = flag(1.0, "temperature of stochastic selection", above=0)
    slm_cross_entropy: str | None = flag(
        None,
        "engine of the LM head's loss: torch holds all logits in memory, chunked and triton one block of them; "
        "default triton on a GPU where it is installed, else chunked",
        choices=("torch", "chunked", "triton"),
    )
    slm_exact_mode: str = flag(
        "recompute",
        "when the LM-head gradient of selected tokens is computed; recompute: in the backward pass; speculative: in "
        "the forward pass for tokens above an estimate of the threshold; the selection is the same. --slm-scope "
        "global-batch needs no estimate",
        choices=("recompute", "speculative"),
    )
    slm_saved_logits_mb: int = flag(
        64, "save a micro-batch's logits up to this many MiB per rank instead of recomputing them", at_least=0
    )
    slm_z_loss: float = flag(
        0.0, "coefficient of the z-loss, (log-sum-exp of the logits)^2, of selected tokens", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Reference model"""

    reference_load: str | None = flag(None, "checkpoint of the reference model, made by this trainer")
    reference_ckpt_step: int | None = flag(None, "step of the reference model; default the newest", at_least=0)
    reference_precision: str | None = flag(
        None, "precision of the reference model; default that of the training model", choices=("fp32", "bf16")
    )
    reference_scores: list[str] = flag(
        list,
        "in the place of --reference-load: names of score sidecars made by tools/score_corpus.py; NAME is "
        "CORPUS.NAME.scores beside every corpus, FOLDER/NAME the same in FOLDER",
    )
    reference_combine: str = flag("mean", "how several sidecars become one: mean, min, or weights such as 0.7,0.3")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run, read-only."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
