"""Published models of every family, with the results of the transformers library."""

from __future__ import annotations

import pytest
import torch

from megatron_slm.testing.published import IDS, VARIANTS, Published, save_model


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    root = tmp_path_factory.mktemp("published")
    models = {}
    for name in VARIANTS:
        model = save_model(name, root / name)
        with torch.no_grad():
            models[name] = Published(root / name, model(IDS).logits)
    return models
