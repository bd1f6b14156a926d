"""Compare published models of every family with the transformers library, in several layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_slm.cli.convert_checkpoint import main
from megatron_slm.config.schema import ParallelConfig
from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.inference.model import open_model
from megatron_slm.inference.scoring import score_tokens
from megatron_slm.runtime import process
from megatron_slm.runtime.groups import ParallelLayout
from megatron_slm.testing.published import IDS, VARIANTS, Published, save_model
from megatron_slm.testing.ranks import run_ranks

TOLERANCE = 1e-4
REQUESTS = [ScoringRequest(row.tolist()) for row in IDS]
EXPERTS = [name for name in VARIANTS if "moe" in name or name == "mixtral"]

Outputs = dict[str, tuple[Tensor, Tensor | None]]  # losses [b, s - 1], and logits [b, s, v] on one rank


def _outputs(rank: int, world_size: int, models: dict[str, str], tp: int = 1, pp: int = 1, ep: int = 1) -> Outputs:
    """Return losses, and on one rank logits, of every model."""
    groups = process.start(ParallelLayout(tp, pp, expert=ep))
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
    )
    outputs = {}
    for name, path in models.items():
        model = open_model(path, parallel, groups, precision="fp32")
        scores = torch.stack([torch.from_numpy(row.log_probs) for row in score_tokens(model, REQUESTS)])
        outputs[name] = -scores, _logits(model.chunks[0]) if world_size == 1 else None
    process.stop()
    return outputs


@torch.no_grad()
def _logits(model: torch.nn.Module) -> Tensor:
    hidden = model(IDS, torch.arange(IDS.size(1)).expand_as(IDS), None)
    weight = hidden.lm_head.weight if hidden.weight is None else hidden.weight
    return (hidden.heads[0] @ weight.t()).transpose(0, 1)


@pytest.fixture(scope="module")
def on_one_rank(published: dict[str, Published]) -> Outputs:
    models = {name: str(model.directory) for name, model in published.items()}
    return run_ranks(_outputs, 1, models, initialize=False)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_losses_equal_those_of_transformers(
    published: dict[str, Published], on_one_rank: Outputs, name: str
) -> None:
    losses, logits = on_one_rank[name]
    expected = published[name]
    assert expected.logits.std() > 0.1
    assert logits is not None and logits.size(-1) == 384  # padded
    torch.testing.assert_close(logits[..., : expected.logits.size(-1)], expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(losses, expected.losses, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"ep": 2}], ids=str)
def test_every_layout_loads_a_published_model(
    published: dict[str, Published], on_one_rank: Outputs, layout: dict[str, int]
) -> None:
    names = EXPERTS if "ep" in layout else VARIANTS
    models = {name: str(published[name].directory) for name in names}
    for outputs in run_ranks(_outputs, 2, models, *_sizes(layout), initialize=False):
        for name, (losses, _) in outputs.items():
            assert (losses - on_one_rank[name][0]).abs().max() < 1e-5, name


def _sizes(layout: dict[str, int]) -> tuple[int, ...]:
    return tuple(layout.get(name, 1) for name in ("tp", "pp", "ep"))


@pytest.fixture(scope="module")
def converted(published: dict[str, Published], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Import and export every model, in files of at most 60 kB."""
    root = tmp_path_factory.mktemp("converted")
    for name, model in published.items():
        assert main(["import", "--hf-path", str(model.directory), "--save", str(root / f"{name}-checkpoint")]) == 0
        arguments = ["--load", str(root / f"{name}-checkpoint"), "--hf-path", str(root / name)]
        assert main(["export", *arguments, "--max-shard-size", "60KB"]) == 0
    return {name: root / name for name in published}


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_export_after_import_reproduces_every_tensor(
    published: dict[str, Published], converted: dict[str, Path], name: str
) -> None:
    before, after = _tensors(published[name].directory), _tensors(converted[name])
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    index = json.loads((converted[name] / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_runs_the_exported_model(
    published: dict[str, Published], converted: dict[str, Path], name: str
) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(converted[name], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, published[name].logits, atol=1e-6, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted[name])
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).size(1) > prompt.size(1)


def test_checkpoints_keep_the_precision(tmp_path: Path) -> None:
    """bf16 and fp16 weights are neither widened nor rounded; a wider export is exact."""
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        root = tmp_path / name
        save_model("qwen3_moe", root / "model", dtype)
        assert main(["import", "--hf-path", str(root / "model"), "--save", str(root / "run")]) == 0
        for out, flags in (("same", []), ("wide", ["--dtype", "float32"])):
            assert main(["export", "--load", str(root / "run"), "--hf-path", str(root / out), *flags]) == 0
        config: dict[str, Any] = json.loads((root / "same" / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == name
        before, same, wide = (_tensors(root / part) for part in ("model", "same", "wide"))
        for key, tensor in before.items():
            assert same[key].dtype == dtype and torch.equal(same[key], tensor)
            assert wide[key].dtype == torch.float32 and torch.equal(wide[key], tensor.float())
