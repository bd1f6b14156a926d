"""Identity of a run's reference model, based on content instead of path."""

from __future__ import annotations

from itertools import groupby

from megatron_slm.checkpoint.source import find_source
from megatron_slm.config.schema import ReferenceConfig
from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.scores.sets import Headers

FLAG = "--reference-load"


def reference_identity(reference: ReferenceConfig, headers: Headers) -> str | None:
    """Return a checksum that identifies the reference model, or None if the run has none. Not collective.

    With sidecars, it is computed from the fingerprints of their reference models, in the order of
    --reference-scores if --reference-combine gives them weights; otherwise from the checkpoint.

    Args:
        headers: headers of the run's sidecars, if any, in the order of --reference-scores.

    Raises:
        ConfigError: the checkpoint is missing, or its manifest is unreadable.
    """
    if headers:
        models = [model for model, _ in groupby(header.reference for header in headers.values())]
        has_weights = reference.reference_combine not in ("mean", "min")
        return text_checksum(" ".join(models if has_weights else sorted(set(models))))
    if reference.reference_load is None:
        return None
    return find_source(reference.reference_load, reference.reference_ckpt_step, FLAG).identity()
