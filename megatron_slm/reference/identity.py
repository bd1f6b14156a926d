"""Identity of the reference model of a run: its content, whatever its path."""

from __future__ import annotations

from megatron_slm.config.checkpoint_files import MANIFEST_FILE, locate_checkpoint
from megatron_slm.config.schema import ReferenceConfig
from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.runtime.errors import unreadable
from megatron_slm.scores.sets import Headers

FLAG = "--reference-load"


def reference_identity(reference: ReferenceConfig, headers: Headers) -> str | None:
    """Return a checksum of the reference model of a run that needs one: of its manifest, which names all checksums, or
    of the fingerprints of the models that the sidecars were made with. On this rank alone.

    Args:
        headers: of the sidecars that the run reads, if any.

    Raises:
        ConfigError: the checkpoint is missing, or its manifest cannot be read.
    """
    if headers:
        return text_checksum(" ".join(sorted({header.reference for header in headers.values()})))
    if reference.reference_load is None:
        return None
    path = locate_checkpoint(reference.reference_load, reference.reference_ckpt_step, FLAG) / MANIFEST_FILE
    try:
        return text_checksum(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(FLAG, path, error if isinstance(error, OSError) else str(error)) from error
