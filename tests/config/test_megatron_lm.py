"""Megatron-LM's flags: its example scripts, one message for all unsupported flags, facts and remedies."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.config.checks import resolve
from megatron_slm.config.constraints import flag_name
from megatron_slm.config.flags import parse
from megatron_slm.config.megatron_lm.accepted import FACTS, IMPLIED, WITHOUT_EFFECT
from megatron_slm.config.megatron_lm.refused import CURATED, NO_REMEDY, megatron_flags, remedy
from megatron_slm.config.megatron_lm.statements import ACCEPTED
from megatron_slm.config.recipe import settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError

SETTINGS = {flag_name(setting) for _, setting, _ in settings()}
OURS = SETTINGS | {flag.replace("--", "--no-", 1) for flag in SETTINGS}

LLAMA3_8B = """
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
    --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0
    --hidden-dropout 0.0 --swiglu --normalization RMSNorm --init-method-std 0.0134 --attention-backend fused
    --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1
    --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252
    --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine
    --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16
    --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1
    --exit-duration-in-mins 235 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather
    --tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel --mock-data
    --tokenizer-type NullTokenizer --vocab-size 128256 --data-cache-path cache --tiktoken-pattern v2 --split '99,1,0'
    --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1 --log-interval 1 --eval-iters 32
    --eval-interval 100 --save-interval 1000 --log-throughput --profile --profile-step-start 4 --profile-step-end 6
    --ckpt-format torch_dist --distributed-timeout-minutes 60 --save checkpoints --load checkpoints
    --tensorboard-dir logs
"""
GPT3_175B = """
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
    --attention-backend auto --micro-batch-size 1 --global-batch-size 1536 --step-batch-size-schedule 0:16
    --train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006
    --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001
    --lr-decay-iters 430000 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path corpus
    --vocab-file vocab.json --merge-file merges.txt --split 949,50,1 --log-interval 100 --save-interval 10000
    --eval-interval 1000 --save checkpoints --load checkpoints --eval-iters 10 --tensorboard-dir logs
"""
MIXTRAL_8X7B = """
    --use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32
    --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01
    --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
    --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion
    --no-position-embedding --rotary-base 1000000 --num-experts 8 --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce --tokenizer-type Llama2Tokenizer
    --tokenizer-model tokenizer.model --data-path corpus --split 99990,8,2 --micro-batch-size 1
    --global-batch-size 256 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine
    --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500 --clip-grad 1.0 --bf16 --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --use-distributed-optimizer --sequence-parallel
    --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save checkpoints --load checkpoints
    --tensorboard-dir logs --no-load-optim --no-load-rng --wandb-project Mixtral --wandb-exp-name Mixtral_8x7B
"""


def refused(argv: list[str]) -> set[str]:
    """Return the unsupported flags in the error message, each of which has a remedy."""
    with pytest.raises(ConfigError) as error:
        parse(argv)
    lines = [line for line in str(error.value).splitlines() if "is a Megatron-LM flag" in line]
    assert all(len(line.partition("not supported: ")[2]) > 20 for line in lines)
    return {line.split()[0] for line in lines}


def test_llama_script_is_refused_in_one_message() -> None:
    assert refused(LLAMA3_8B.split()) == {"--decoupled-lr", "--decoupled-min-lr"}


def test_gpt3_script_is_refused_in_one_message() -> None:
    assert refused(GPT3_175B.split()) == {"--step-batch-size-schedule"}


@pytest.mark.parametrize(("script", "world_size"), [(LLAMA3_8B, 8), (GPT3_175B, 128), (MIXTRAL_8X7B, 32)])
def test_scripts_are_accepted_without_unsupported_flags(script: str, world_size: int) -> None:
    groups = [f"--{group}".split() for group in script.split("--")[1:]]
    argv = [argument for group in groups if group[0] not in CURATED for argument in group]
    recipe = ["--fp8-recipe", "delayed"] if "--fp8-amax-history-len" in argv else []  # Megatron-LM's default
    config = resolve(parse([*argv, *recipe]).config, world_size)
    assert script is not GPT3_175B or config.tokenizer.tokenizer_type == "GPT2BPETokenizer"
    assert script is not LLAMA3_8B or config.data.split == "99,1,0"


def test_mixtral_script_is_accepted_unchanged() -> None:
    command = parse(MIXTRAL_8X7B.split())
    assert command.config.model.num_experts == 8 and not command.config.checkpoint.load_rng
    assert command.note == (
        "Megatron-LM's flags satisfied by every run: --use-mcore-models, --no-position-embedding; without effect: "
        "--no-masked-softmax-fusion"
    )


def test_implied_settings() -> None:
    config = parse(["--use-rotary-position-embeddings", "--recompute-activations", "--grad-reduce-in-bf16"]).config
    assert config.model.position_embedding_type == "rope"
    assert config.training.recompute_granularity == "selective"
    assert not config.optimizer.accumulate_allreduce_grads_in_fp32
    assert parse(["--squared-relu"]).config.model.activation == "squared_relu"


def test_flag_that_implies_a_setting_overrides_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("position_embedding_type: learned_absolute\n")
    config = parse(["--config", str(recipe), "--use-rotary-position-embeddings"]).config
    assert config.model.position_embedding_type == "rope"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--ckpt-format torch", "--ckpt-format is 'torch': checkpoints are written and read in the format torch_dist"),
        ("--ckpt-format=zarr", "--ckpt-format is 'zarr'"),
        ("--dataloader-type cyclic", "--dataloader-type is 'cyclic'"),
        ("--attention-backend unfused", "--attention-backend is 'unfused'"),
        ("--attention-backend local --transformer-impl transformer_engine", "--attention-backend local: "),
        ("--timing-log-level 3", "--timing-log-level is '3' and must be one of 0, 1, 2"),
        ("--local-rank one", "--local-rank must be an integer, not 'one'"),
        ("--manual-gc-interval=", "--manual-gc-interval is empty"),
        ("--no-position-embedding", "it contradicts --position-embedding-type learned_absolute"),
        ("--no-create-attention-mask-in-dataloader --reset-attention-mask", "--reset-attention-mask needs a mask"),
        (
            "--use-rotary-position-embeddings --position-embedding-type learned_absolute",
            "--use-rotary-position-embeddings contradicts --position-embedding-type learned_absolute",
        ),
        ("--recompute-activations --recompute-granularity full", "--recompute-activations contradicts"),
        ("--fp8-formt hybrid", "--fp8-formt is unknown"),
        ("--num-layers 2 stray", "unexpected positional argument 'stray'"),
    ],
)
def test_untrue_statements_are_refused(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(argv.split())
    assert message in str(error.value)


def test_unsupported_flags_disabled_in_a_recipe_are_ignored(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fp16-lm-cross-entropy: false\nuse-torch-fsdp2: false\ndecoupled_lr: null\nbf16: false\n")
    assert parse(["--config", str(recipe)]).config == RunConfig()
    recipe.write_text("fp17: false\n")
    with pytest.raises(ConfigError, match="fp17 is unknown"):
        parse(["--config", str(recipe)])


def test_recipe_with_megatrons_names(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("use_mcore_models: true\nmanual-gc: false\nno_load_rng: true\nckpt_format: torch_dist\n")
    command = parse(["--config", str(recipe)])
    assert not command.config.checkpoint.load_rng
    assert command.note == "Megatron-LM's flags satisfied by every run: --use-mcore-models, --ckpt-format torch_dist"
    recipe.write_text("fp16-lm-cross-entropy: true\nckpt_format: torch\ndecoupled-lr: 3\n")
    with pytest.raises(ConfigError) as error:
        parse(["--config", str(recipe)])
    for message in (
        f"{recipe}: fp16_lm_cross_entropy is a Megatron-LM flag",
        "ckpt_format is 'torch'",
        "decoupled_lr is a Megatron-LM flag",
    ):
        assert message in str(error.value)


@pytest.mark.parametrize("flag", sorted(ACCEPTED))
def test_every_accepted_flag_is_megatrons(flag: str) -> None:
    assert flag.replace("_", "-") in megatron_flags()
    values = FACTS[flag].values if flag in FACTS else WITHOUT_EFFECT.get(flag, ())
    argv = ["--position-embedding-type", "rope"] if flag == "--no-position-embedding" else []
    value = values and ({"an integer": "3"}.get(values[0], values[0]))
    command = parse([*argv, flag, *([value] if value else [])])
    assert flag in IMPLIED or flag in command.note


def test_every_refused_flag_has_a_remedy() -> None:
    assert set(CURATED) <= megatron_flags()
    bare = [flag for flag in megatron_flags() - OURS - set(ACCEPTED) if remedy(flag) == NO_REMEDY]
    assert not bare
    assert not OURS & {*CURATED, *ACCEPTED}, "a setting needs no remedy"
