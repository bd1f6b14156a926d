"""Test that rotary embeddings use the position ids, and that documents are refused if they cannot be isolated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slm.config.checks import resolve
from megatron_slm.config.flags import parse
from megatron_slm.config.schema import DataConfig, RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.training.preflight import check_device

LENGTH, BREAK, VOCAB = 12, 5, 64  # a document of 5 tokens, then one of 7


def _losses(rank: int, world_size: int, position_embedding: str) -> dict[str, Tensor]:
    """Return the token losses of one sample for every use of its position ids."""
    from megatron_slm.runtime import process
    from megatron_slm.runtime.groups import ParallelLayout
    from megatron_slm.testing.tiny_gpt import build_tiny_gpt

    groups = process.start(ParallelLayout(), seed=1)
    model = {"position_embedding_type": position_embedding}
    chunks = {resets: build_tiny_gpt(groups, LENGTH, VOCAB, model, resets_positions=resets) for resets in (False, True)}
    chunks[True].load_state_dict(chunks[False].state_dict())
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(0, VOCAB, (2, LENGTH), generator=generator) for _ in range(2))
    straight = torch.arange(LENGTH).repeat(2, 1)
    restarted = straight.clone()
    restarted[:, BREAK:] -= BREAK
    document = (straight >= BREAK).long()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) | (document[:, :, None] != document[:, None, :])

    def losses(chunk: Any, ids: Tensor, attention_mask: Tensor | None, columns: slice = slice(None)) -> Tensor:
        with torch.no_grad():
            return chunk(tokens[:, columns], ids, attention_mask).token_losses(labels[:, columns]).loss

    second = slice(BREAK, LENGTH)
    found = {
        "plain": losses(chunks[False], straight, None),
        "by id, straight": losses(chunks[True], straight, None),
        "by id, restarted": losses(chunks[True], restarted, None),
        "by id, restarted, masked": losses(chunks[True], restarted, mask[:, None])[:, second],
        "second document only": losses(chunks[False], straight[:, : LENGTH - BREAK], None, second),
    }
    process.stop()
    return found


@pytest.mark.parametrize("position_embedding", ["rope", "learned_absolute"])
def test_position_ids_are_used(position_embedding: str) -> None:
    (found,) = run_ranks(_losses, 1, position_embedding, initialize=False)
    torch.testing.assert_close(found["by id, straight"], found["plain"], rtol=0, atol=1e-5)
    changed = (found["by id, restarted"] - found["plain"]).abs()
    assert float(changed[:, :BREAK].max()) < 1e-5
    assert float(changed[:, BREAK:].max()) > 0.1, "the restart has no effect"
    masked, expected = found["by id, restarted, masked"], found["second document only"]
    torch.testing.assert_close(masked, expected, rtol=0, atol=2e-5)


def test_transformer_engine_without_packing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is requested, before torch is loaded; if it is the default of a GPU, when the device is checked."""
    flags = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3"
    flags += " --train-iters 1 --tokenizer-type ByteTokenizer --data-path corpus --reset-attention-mask"
    filtered = [*flags.split(), "--objective", "slm", "--slm-score", "token-loss", "--slm-backward", "filtered"]
    message = "which does not work with --slm-backward filtered. Use --transformer-impl local"
    with pytest.raises(ConfigError, match=message):
        resolve(parse([*filtered, "--transformer-impl", "transformer_engine"]).config, 1)
    resolve(parse([*flags.split(), "--bf16", "--transformer-impl", "transformer_engine"]).config, 1)
    config = resolve(parse(filtered).config, 1)
    check_device(config, torch.device("cpu"))
    monkeypatch.setattr("megatron_slm.model.specs.choose_implementation", lambda *_: "transformer_engine")
    with pytest.raises(ConfigError, match=message):
        check_device(config, torch.device("cuda"))
    check_device(RunConfig(data=DataConfig(reset_position_ids=True)), torch.device("cuda"))
