"""Remedies for the unsupported flags of Megatron-LM: per flag, else per family of flags."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

_PHASES = "use --rampup-batch-size, or train in phases: --load with another --global-batch-size."
_DECOUPLED = "embeddings and other weights share one learning rate. Use --lr and --min-lr."
_SPLITS = "name sets with --valid-data-path NAME=PREFIX ...; each is evaluated separately."
_SCALED_ROPE = "rotary embeddings are scaled as in Llama 3 only. Use --use-rope-scaling."
_OFFLOAD = "optimizer state is kept on the device. Shard it with --use-distributed-optimizer."
_SAME_BATCH = "evaluation uses the batch sizes of training. Set the extent with --eval-iters."

CURATED: dict[str, str] = {
    # precision
    "--fp16-lm-cross-entropy": "the loss is computed in fp32. Use --bf16 and leave the flag out.",
    "--fp32-residual-connection": "the residual stream has the precision of the weights. For fp32, leave out --bf16.",
    "--apply-query-key-layer-scaling": "it guards against fp16 overflow only. Use --bf16 and leave the flag out.",
    "--no-check-for-nan-in-loss-and-grad": "a NaN or infinite loss always ends the run. Leave the flag out.",
    "--optimizer-cpu-offload": _OFFLOAD,
    "--deterministic-mode": "runs on CPUs are deterministic; on GPUs this depends on the kernels. Leave the flag out.",
    "--use-cpu-initialization": "weights are initialized on the device of the run. Leave the flag out.",
    # optimizer and schedule
    "--decoupled-lr": _DECOUPLED,
    "--decoupled-min-lr": _DECOUPLED,
    "--step-batch-size-schedule": _PHASES,
    "--decrease-batch-size-if-needed": _PHASES,
    "--warmup": "this name is from an old release. Use --lr-warmup-fraction.",
    "--batch-size": "this name is from an old release. Use --micro-batch-size.",
    "--model-parallel-size": "this name is from an old release. Use --tensor-model-parallel-size.",
    "--checkpoint-activations": "this name is from an old release. Use --recompute-activations.",
    "--override-ckpt-iteration": "the step comes from the checkpoint. Choose one with --ckpt-step.",
    # model
    "--quick-geglu": "the sigmoid approximation of GELU is not supported. Use --activation geglu.",
    "--init-method-xavier-uniform": "weights are initialized from a normal distribution. Set --init-method-std.",
    "--rotary-interleaved": "rotary embeddings rotate the halves of a head, as in Llama. Leave the flag out.",
    "--rotary-scaling-factor": _SCALED_ROPE,
    "--mscale": _SCALED_ROPE,
    "--mscale-all-dim": _SCALED_ROPE,
    "--no-rope-freq": "all layers use the same position embedding. Leave the flag out.",
    "--window-size": "sliding-window attention is not supported. Reduce --seq-length instead.",
    "--window-attn-skip-freq": "sliding-window attention is not supported. Reduce --seq-length instead.",
    "--spec": "layers come from --transformer-impl local or transformer_engine.",
    "--padded-vocab-size": "the padded size follows from --vocab-size and --make-vocab-size-divisible-by.",
    "--encoder-num-layers": "models are decoder-only. Use --num-layers.",
    "--decoder-num-layers": "models are decoder-only. Use --num-layers.",
    "--encoder-seq-length": "models are decoder-only. Use --seq-length.",
    "--decoder-seq-length": "models are decoder-only. Use --seq-length.",
    "--qk-l2-norm": "normalize queries and keys with --qk-layernorm.",
    # experts
    "--expert-tensor-parallel-size": "experts are split over the ranks of --tensor-model-parallel-size.",
    "--moe-layer-recompute": "use --recompute-granularity.",
    # parallelism
    "--num-virtual-stages-per-pipeline-rank": (
        "use --num-layers-per-virtual-pipeline-stage: layers per pipeline rank / virtual stages."
    ),
    "--use-megatron-fsdp": "parameters are not sharded. Use --use-distributed-optimizer and tensor parallelism.",
    "--use-torch-fsdp2": "parameters are not sharded. Use --use-distributed-optimizer and tensor parallelism.",
    "--use-tp-pp-dp-mapping": "ranks are ordered TP, CP, DP, PP. Leave the flag out.",
    "--disable-gloo-process-groups": "Megatron-Core needs Gloo groups to save optimizer state. Leave the flag out.",
    # data
    "--tokenizer-special-tokens": "special tokens are read from the tokenizer's files.",
    "--trust-remote-code": "tokenizers are read without running their code. Leave the flag out.",
    "--test-data-path": "there is no test set. Add it as a validation set: --valid-data-path test=PREFIX.",
    "--multiple-validation-sets": _SPLITS,
    "--validation-set-names": _SPLITS,
    "--eval-global-batch-size": _SAME_BATCH,
    "--eval-micro-batch-size": _SAME_BATCH,
    "--start-eval-at-iter": "evaluation starts at the first iteration. Set --eval-interval.",
    "--data-parallel-random-init": "all data-parallel ranks start with the same weights. Leave the flag out.",
    "--yaml-cfg": "recipes are flat YAML with the flags' names. Use --config.",
    # checkpoints and logs
    "--persistent-save-interval": "there is one kind of checkpoint. Use --save-interval.",
    "--dist-ckpt-strictness": "loading is always strict. Leave the flag out.",
    "--wandb-entity": "set the environment variable WANDB_ENTITY.",
    "--exit-signal": "use --exit-signal-handler: SIGTERM and SIGUSR1 save and end the run.",
    "--exit-signal-handler-for-training": "use --exit-signal-handler.",
    "--chat-template": "conversations are formatted by tools/preprocess_sft.py (--chat-template).",
    "--sft-tokenizer-prompt-format": "conversations are formatted by tools/preprocess_sft.py (--chat-template).",
}

# Patterns of a family of flags -> remedy; the first matching family applies.
FAMILIES: dict[str, str] = {
    "^--(no-)?rl- ^--grpo langrl perform-rl refit-method": "reinforcement learning is not supported.",
    "^--logits-": (
        "logits are neither saved nor distilled. Score a corpus with tools/score_corpus.py for --reference-scores."
    ),
    "fp8 fp4 kitchen te-precision": (
        "linear layers run in FP8 with --fp8-format and --fp8-recipe, and FP4 is not supported. Leave the flag out."
    ),
    "^--fim-": "fill-in-the-middle is not supported. Transform documents before tools/preprocess_data.py.",
    "inference flash-decode graph prefill decode-only speculative static-engine mla-latents max-tokens- to-oom": (
        "inference and CUDA graphs are not supported. Leave the flag out."
    ),
    "mamba hybrid-layer hybrid-override hybrid-model ^--linear- ^--gdp-": (
        "only transformer layers with attention and an MLP are supported. Leave the flag out."
    ),
    "dsa mla- lora-rank qk-head qk-pos v-head mhc latent-attention experimental attention-output-gate": (
        "only multi-head and grouped-query attention (--group-query-attention) are supported. Leave the flag out."
    ),
    "yarn rope rotary": "rotary embeddings are configured by --rotary-base, --rotary-percent and --use-rope-scaling.",
    (
        "bert biencoder retriever ^--ict- evidence embedding-path titles block-data indexer query-in-block "
        "^--mask- short-seq head-lr one-sent"
    ): "only GPT models are supported. Leave the flag out.",
    "dino vision swin ^--img- patch-dim classes channels per-class iter-per-epoch sample-rate test-mode": (
        "vision models are not supported. Leave the flag out."
    ),
    "moe expert grouped-gemm": (
        "experts are configured by --num-experts, --moe-router-topk and the other --moe-* flags in --help."
    ),
    "^--save-.*-interval dump log wandb tensorboard otel nvtx profil record app-tag result-rejected workload": (
        "metrics are written to --slm-metrics-file, --tensorboard-dir and --wandb-project. Leave the flag out."
    ),
    "muon": "--optimizer is adam or sgd: Muon is outside of the distributed optimizer of Megatron-Core.",
    "lion- ^--(use-)?mup qk-clip optimizer weight-decay -wd- pin-cpu layer-wise": (
        "--optimizer is adam or sgd, with one learning rate and weight decay for all weights."
    ),
    "mtp": "multi-token prediction is configured by --mtp-num-layers and --mtp-loss-scaling-factor.",
    "offload recompute saved-activations": (
        "save memory with --recompute-granularity, --sequence-parallel or a smaller --micro-batch-size."
    ),
    "fsdp hsdp sharding-strategy data-sharding gtp weight-shards meta-device": (
        "parameters are not sharded over data-parallel ranks. Use --use-distributed-optimizer and tensor parallelism."
    ),
    "tp-comm ^--overlap ^--delay ^--defer wgrad ^--ep-overlap": (
        "communication overlap is configured by --overlap-grad-reduce and --overlap-param-gather."
    ),
    "pipeline microbatch-group": (
        "configure stages with --pipeline-model-parallel-size and --decoder-first-pipeline-num-layers (or -last-)."
    ),
    (
        "^--ddp- align- nccl sharp symmetric all-gather high-priority p2p process-group mpu comm-type "
        "hierarchical context-parallel seqlen-per communication-unit"
    ): "communication groups and buckets use Megatron-Core's defaults. Leave the flag out.",
    "ckpt checkpoint persistent load-main replication ^--save- save-tokenizer fully-reshard": (
        "checkpoints are configured by --save, --load, --save-interval and --ckpt-step."
    ),
    "straggler": (
        "slow ranks are named in the log. Set --slm-straggler-factor, or leave the comparison out with "
        "--no-log-straggler."
    ),
    (
        "inprocess ^--adlr- ^--ft- ft-package ft-timeouts fault injection verify-integrity weight- "
        "hash sniff large-grads ^--gpu"
    ): "recover from checkpoints: set --save-interval and --exit-signal-handler, and rerun the command.",
    "tokenizer vocab tiktoken pad-tokens gigatoken": (
        "tokenizers are configured by --tokenizer-type, --tokenizer-model, --vocab-file and --merge-file."
    ),
    "data dataset msc object-storage sampling-seed": (
        "data are configured by --data-path, --valid-data-path, --split and --data-cache-path."
    ),
    "samples train-sync phase": (
        "the schedule is configured by --train-iters or --train-samples, --lr-decay-* and --lr-warmup-*."
    ),
    "timeout": "set the timeout of collectives with --distributed-timeout-minutes.",
    (
        "fus jit rng-tracker norm residual activation glu- initialization init-method heterogeneous relative- "
        "attention matmul onnx invariant scatter-output chunks freeze"
    ): "layers are Megatron-Core's standard layers, and all weights are trained. Leave the flag out.",
}

NO_REMEDY = "Leave it out, or see --help for the settings."


def remedy(flag: str) -> str:
    """Return the reason why a flag of Megatron-LM is unsupported, and its replacement."""
    if flag in CURATED:
        return CURATED[flag]
    return next((text for patterns, text in FAMILIES.items() if re.search(patterns.replace(" ", "|"), flag)), NO_REMEDY)


@cache
def megatron_flags() -> frozenset[str]:
    """Return all flags of Megatron-LM's pretrain_gpt.py."""
    text = resources.files("megatron_slm.config.megatron_lm").joinpath("flags.txt").read_text(encoding="utf-8")
    return frozenset(text.split())
