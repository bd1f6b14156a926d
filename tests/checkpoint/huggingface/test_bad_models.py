"""Published models that are damaged, contradictory or not supported are refused with the place of the fault."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_slm.checkpoint.huggingface.source import HuggingFaceSource
from megatron_slm.checkpoint.source import find_source
from megatron_slm.cli.convert_checkpoint import main
from megatron_slm.config.schema import ModelConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.published import LLAMA3, Published, save_tokenizer


@pytest.fixture
def model(published: dict[str, Published], tmp_path: Path) -> Path:
    return copy(published, "llama", tmp_path)


def copy(published: dict[str, Published], name: str, directory: Path) -> Path:
    return Path(shutil.copytree(published[name].directory, directory / name))


def edit(model: Path, **fields: Any) -> None:
    """Change fields of config.json; None removes a field."""
    path = model / "config.json"
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def check(model: Path) -> None:
    source = find_source(str(model), None, "--load")
    assert isinstance(source, HuggingFaceSource)
    source.check()


def refusal(model: Path) -> str:
    with pytest.raises(ConfigError) as error:
        check(model)
    return str(error.value)


def settings(model: Path) -> ModelConfig:
    return find_source(str(model), None, "--load").config().model


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
    "dynamic": ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic'"),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 2}}, "low_freq_factor 2"),
    "base": ("llama", {"rope_parameters": {"rope_theta": 10000.5}}, "rope_theta 10000.5"),
    "two spellings": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "different values of rope_type"),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "layers' rope": ("llama", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "between layers (full_"),
    "layer types": ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, "'linear_attention'"),
    "parallel": ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual True"),
    "norms of heads": ("stablelm", {"qk_layernorm": True}, "qk_layernorm True"),
    "squared relu": ("nemotron", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported; supported are relu2"),
    "gemma": ("llama", {"model_type": "gemma2"}, "'gemma2' is not supported: it multiplies embeddings by the square"),
    "activation": ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    "gpt2 activation": ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
    "biases": ("llama", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
    "qwen3 bias": ("qwen3", {"attention_bias": True}, "attention_bias True"),
    "scaling": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers [1]"),
    "family": ("llama", {"model_type": "phi3"}, "model_type 'phi3' is not supported; supported are llama"),
    "no family": ("llama", {"model_type": None}, "model_type is missing"),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, "weights are quantized"),
    "text": ("llama", {"hidden_size": "32"}, "hidden_size must be an integer, not '32'"),
    "no size": ("llama", {"intermediate_size": None}, "intermediate_size is missing"),
    "heads": ("llama", {"head_dim": None, "hidden_size": 33}, "does not divide hidden_size 33"),
    "no heads": ("llama", {"num_attention_heads": 0}, "num_attention_heads must be above 0, not 0"),
    "window": ("mistral", {"sliding_window": -1}, "sliding_window must be above 0, not -1"),
    "groups": ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    "nan": ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite, not nan"),
    "huge": ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps must be finite, not 1000"),
    "setting": ("llama", {"attention_dropout": 2}, "--attention-dropout is 2.0, and must be in [0, 1)"),
    "shape": (
        "llama",
        {"num_key_value_heads": 4},
        "k_proj.weight has the shape [16, 32], and config.json implies [32,",
    ),
    "vocabulary": (
        "llama",
        {"vocab_size": 320},
        "embed_tokens.weight has the shape [301, 32], and config.json implies",
    ),
    "mlp": (
        "llama",
        {"intermediate_size": 64},
        "gate_proj.weight has the shape [48, 32], and config.json implies [64,",
    ),
    "gpt2 mlp": ("gpt2", {"n_inner": 64}, "transformer.h.0.mlp.c_fc.weight has the shape [32, 128], and config.json"),
    "positions": (
        "gpt2",
        {"n_positions": 32},
        "transformer.wpe.weight has the shape [64, 32], and config.json implies",
    ),
    "layers": ("llama", {"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
    "fewer layers": ("llama", {"num_hidden_layers": 1}, "contains model.layers.1.input_layernorm.weight"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_configurations_that_cannot_be_represented(published: dict[str, Published], tmp_path: Path, case: str) -> None:
    name, fields, expected = UNSUPPORTED[case]
    model = copy(published, name, tmp_path)
    edit(model, **fields)
    error = refusal(model)
    assert expected in error and error.startswith(f"--load: {model}")


def _change_tensors(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def test_missing_and_additional_tensors_are_named(model: Path) -> None:
    _change_tensors(
        model, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    check(model)  # a buffer that old checkpoints contain
    _change_tensors(model, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(4)}))
    assert "contains model.layers.0.extra.weight, which the model of its config.json does not have" in refusal(model)
    _change_tensors(model, lambda tensors: tensors.pop("model.layers.0.extra.weight"))
    _change_tensors(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    assert "lacks model.layers.1.input_layernorm.weight" in (error := refusal(model)) and "and 4 more tensors" in error


def _replace(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    _change_tensors(model, lambda tensors: tensors.update({name: change(tensors[name])}))


def test_shapes_and_types_of_all_layers_are_checked(model: Path) -> None:
    """A tensor of a later layer is as wrong as one of the first."""
    name = "model.layers.1.mlp.down_proj.weight"
    for change, expected in (
        (lambda tensor: tensor[:, :40].contiguous(), f"{name} has the shape [32, 40], and config.json implies"),
        (lambda tensor: torch.zeros(32, 48).to(torch.float8_e4m3fn), f"{name} has the data type F8_E4M3; supported"),
        (lambda tensor: torch.zeros(32, 48).double(), f"{name} has the data type F64; supported are F32, F16, BF16"),
    ):
        _replace(model, name, change)
        assert expected in refusal(model)


def test_mixed_data_types_are_widened_exactly(model: Path, tmp_path: Path) -> None:
    query, down = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    for name in (query, down):
        _replace(model, name, torch.Tensor.bfloat16)
    before = load_file(model / "model.safetensors")
    assert main(["import", "--hf-path", str(model), "--save", str(tmp_path / "run")]) == 0
    assert main(["export", "--load", str(tmp_path / "run"), "--hf-path", str(tmp_path / "out")]) == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in before.items())


def test_lm_head_that_contradicts_tied_embeddings(published: dict[str, Published], tmp_path: Path) -> None:
    model = copy(published, "llama-tied", tmp_path)
    head = "lm_head.weight"
    _change_tensors(model, lambda tensors: tensors.update({head: tensors["model.embed_tokens.weight"].clone()}))
    check(model)
    _replace(model, head, lambda tensor: tensor + 1)
    assert f"{head} differs from model.embed_tokens.weight, but tie_word_embeddings is true" in refusal(model)


def test_files_are_chosen_as_by_transformers(model: Path) -> None:
    """The single file comes first; an index cannot name files of other directories."""
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "other.safetensors"}}))
    check(model)
    (model / "model.safetensors").rename(model / "part.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "part.safetensors"}}))
    check(model)
    for name in ("../part.safetensors", str(model / "part.safetensors")):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert f"{index} names {name!r}, which is not a file of its directory" in refusal(model)


def test_damaged_files_are_named(model: Path) -> None:
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    for cut in (4, 100, len(content) - 1):
        weights.write_bytes(content[:cut])
        assert f"{weights} is damaged or incomplete" in refusal(model)
    weights.unlink()
    assert "contains no weights" in refusal(model)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors, which model.safetensors.index.json names, is missing" in refusal(model)
    index.write_text("{}")
    assert f"{index} is damaged" in refusal(model)
    (model / "config.json").write_text("{")
    assert "is not JSON" in refusal(model)


def test_tokenizer_with_more_entries_than_the_model(model: Path) -> None:
    save_tokenizer(model, 310)
    error = refusal(model)
    assert "has ids up to 309, and the model has 301 embeddings" in error and "resize_token_embeddings(310)" in error


class _Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_torch_files_are_read_without_code(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    edit(model, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (model / "modeling.py").write_text("import os\nos.mkdir('executed')\n")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    torch.save(parameters, model / "pytorch_model.bin")
    assert main(["import", "--hf-path", str(model), "--save", "run"]) == 0
    assert main(["export", "--load", "run", "--hf-path", "out"]) == 0
    exported = load_file("out/model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())
    assert "auto_map" not in json.loads(Path("out/config.json").read_text())
    sparse = {name: tensor.to_sparse() for name, tensor in tensors.items()}
    for content in ({**tensors, "x": _Malicious()}, _Malicious(), {1: torch.ones(1)}, sparse):
        torch.save(content, model / "pytorch_model.bin", pickle_module=pickle)
        assert "was not loaded" in refusal(model)
    assert not Path("executed").exists()


def test_spellings_and_defaults_of_fields(published: dict[str, Published], tmp_path: Path) -> None:
    """Old and new spellings of rope parameters; optional fields of each family."""
    llama = copy(published, "llama-3.1", tmp_path)
    expected = settings(llama)
    assert expected.use_rope_scaling and expected.rope_scaling_factor == 8 and expected.rotary_base == 500000
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    edit(llama, rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling)
    assert settings(llama) == expected
    for name, activation in (("gelu", "geglu"), ("gelu_pytorch_tanh", "geglu_tanh"), ("gelu_new", "geglu_tanh")):
        edit(llama, hidden_act=name)
        assert settings(llama).activation == activation
    edit(llama, hidden_act="silu")
    edit(llama, num_key_value_heads=None, head_dim=None)
    assert not settings(llama).group_query_attention and settings(llama).kv_channels == 8
    mistral = copy(published, "mistral", tmp_path)
    edit(mistral, num_key_value_heads=None, num_attention_heads=16, sliding_window=None, max_position_embeddings=8192)
    assert settings(mistral).num_query_groups == 8 and settings(mistral).max_position_embeddings == 4096
    qwen3 = copy(published, "qwen3", tmp_path)
    edit(qwen3, head_dim=None, sliding_window=16)
    assert settings(qwen3).kv_channels == 128 and settings(qwen3).max_position_embeddings == 64
    edit(qwen3, use_sliding_window=True)
    assert settings(qwen3).max_position_embeddings == 16
    mixtral = copy(published, "mixtral", tmp_path)
    edit(mixtral, rope_parameters=None)
    assert settings(mixtral).rotary_base == 1000000
    for dtype, is_bf16 in (({"dtype": None, "torch_dtype": "bfloat16"}, True), ({"torch_dtype": None}, False)):
        edit(mixtral, **dtype)
        assert find_source(str(mixtral), None, "--load").config().training.bf16 is is_bf16


def test_base_models_lack_a_prefix(published: dict[str, Published], tmp_path: Path) -> None:
    """The original GPT-2 files have names without the prefix, and buffers of the attention mask."""
    model = copy(published, "gpt2", tmp_path)
    tensors = load_file(model / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, model / "model.safetensors")
    assert main(["import", "--hf-path", str(model), "--save", str(tmp_path / "run")]) == 0
    assert main(["export", "--load", str(tmp_path / "run"), "--hf-path", str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("flag", "step"), [("--load", "--ckpt-step"), ("--reference-load", "--reference-ckpt-step")])
def test_a_published_model_has_no_steps(flag: str, step: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} model is a published model, which has no step 5. Leave {step} out"):
        HuggingFaceSource.find("model", 5, flag)
