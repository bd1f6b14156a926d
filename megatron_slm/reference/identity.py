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

    With sidecars, it is computed from the fingerprints of their reference models, otherwise from the checkpoints. The
    order of the flags counts if --reference-combine gives them weights, or --reference-corpora a corpus each.

    Args:
        headers: headers of the run's sidecars, if any, in the order of --reference-scores.

    Raises:
        ConfigError: a checkpoint is missing, or its manifest is unreadable.
    """
    if headers:
        models = [model for model, _ in groupby(header.reference for header in headers.values())]
    else:
        step = reference.reference_ckpt_step
        models = [find_source(path, step, FLAG).identity() for path in reference.reference_load]
    if reference.reference_combine in ("mean", "min") and not reference.reference_corpora:
        models = sorted(models)
    identity = " ".join(models)
    return text_checksum(identity) if headers else identity or None
