"""Loss masks: round trip, damage, and their part in the identity of a corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_slm.corpus.loss_masks import HEADER_BYTES, LossMask, check_mask, mask_path, masked_identity, write_mask
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.numbered import write_numbered_corpus


def test_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prefix = write_numbered_corpus(tmp_path / "c", [[61], [40]])
    bits = rng.random(101) < 0.4
    header = write_mask(prefix, "mine", np.split(bits, [3, 3, 40, 41]), {"ratio": 0.4})
    assert header == check_mask(prefix, "mine")
    assert (header.tokens, header.selected, header.origin) == (101, int(bits.sum()), {"ratio": 0.4})
    mask = LossMask(prefix, "mine")
    for start in range(0, 101, 7):
        for stop in (start, start + 1, 101):
            assert (mask.get(start, stop) == bits[start:stop]).all()


def test_damage_is_refused(tmp_path: Path) -> None:
    prefix = write_numbered_corpus(tmp_path / "c", [[100]])
    with pytest.raises(
        ConfigError, match=r"c\.answers\.mask is missing. Recreate the corpus with tools/preprocess_sft"
    ):
        check_mask(prefix, "answers")
    write_mask(prefix, "answers", [np.ones(100, bool)], {})
    path, whole = mask_path(prefix, "answers"), mask_path(prefix, "answers").read_bytes()
    for place, message in (
        (HEADER_BYTES + 1, "content does not match"),
        (200, "damaged header"),
        (0, "not a loss mask"),
    ):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ConfigError, match=message):
            check_mask(prefix, "answers")
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"has 4108 bytes, but its header requires 4109"):
        check_mask(prefix, "answers")
    path.write_bytes(whole)
    write_numbered_corpus(tmp_path / "c", [[100]], first=1)
    with pytest.raises(ConfigError, match="made for another corpus"):
        check_mask(prefix, "answers")


def test_files_of_others_are_kept(tmp_path: Path) -> None:
    prefix = write_numbered_corpus(tmp_path / "c", [[8]])
    mask_path(prefix, "answers").write_text("notes")
    with pytest.raises(ConfigError, match="was not written by megatron_slm"):
        write_mask(prefix, "answers", [np.ones(8, bool)], {})
    assert mask_path(prefix, "answers").read_text() == "notes"


def test_identity_includes_the_mask(tmp_path: Path) -> None:
    prefix = write_numbered_corpus(tmp_path / "c", [[8]])
    identities = {masked_identity(prefix, None), masked_identity(prefix, "a")}
    assert len(identities) == 1, "a corpus without the mask"
    for bits in (np.ones(8, bool), np.zeros(8, bool)):
        write_mask(prefix, "a", [bits], {})
        identities.add(masked_identity(prefix, "a"))
    assert len(identities) == 3
