"""Merge corpora in order, in constant memory; shards merge to the bytes that a single job would have written."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_slm.corpus.checks import CorpusInfo, check_files_exist, corpus_info
from megatron_slm.corpus.index import (
    Index,
    bin_path,
    byte_offsets,
    chunks,
    idx_path,
    packed_header,
    partial_prefix,
    read_index,
)
from megatron_slm.corpus.loss_masks import (
    LossMask,
    check_mask,
    check_mask_writable,
    mask_names,
    mask_path,
    write_mask,
)
from megatron_slm.corpus.metadata import read_metadata, remove_metadata, write_metadata
from megatron_slm.preprocessing.corpus_writer import check_corpus_writable
from megatron_slm.preprocessing.journal import OUTPUT
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_output_prefix, explained_write, free_space, lock_output, publish, write_all

COPY_BYTES = 1 << 26  # bytes
# These metadata fields are summed; the others are kept if all corpora agree.
COUNTS = ("documents", "tokens", "text_bytes", "empty", "blank_lines", "skipped")
TOKENIZER_FIELDS = {"fingerprint": "fingerprint", "vocab_size": "vocabulary size", "eod": "end-of-document id"}
NO_RANGE_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class Merged:
    """Hold the counts of a merged corpus."""

    corpora: int
    documents: int
    tokens: int
    unrecorded: tuple[str, ...]  # inputs without metadata; if there are any, no metadata is written


def merge_corpora(prefixes: Sequence[str], output_prefix: str) -> Merged:
    """Concatenate corpora. The output is renamed to its final name only when it is complete.

    Raises:
        ConfigError: an input is missing, damaged, of another dtype or tokenizer, or identical to the output; or the
            output cannot be written. An existing output is then unchanged.
    """
    _check_names(prefixes, output_prefix)
    check_corpus_writable(output_prefix, OUTPUT)
    infos = [_checked(prefix) for prefix in prefixes]
    metadata, unrecorded = _merged_metadata(infos)
    masks = _common_masks(prefixes, output_prefix)
    _check_kinds(infos)
    _check_space(infos, output_prefix)
    with explained_write(output_prefix, OUTPUT):
        Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
        _write(infos, output_prefix, masks)
        remove_metadata(output_prefix)
    if metadata is not None:
        write_metadata(output_prefix, metadata)
    return Merged(len(infos), sum(i.documents for i in infos), sum(i.tokens for i in infos), unrecorded)


def _common_masks(prefixes: Sequence[str], output_prefix: str) -> list[str]:
    """Return the names of the loss masks, which all inputs have.

    Raises:
        ConfigError: only some inputs have a mask, a mask is damaged, or its output would replace another file.
    """
    found = {prefix: mask_names(prefix) for prefix in prefixes}
    first, names = prefixes[0], found[prefixes[0]]
    for prefix, others in found.items():
        for name in sorted(set(names) ^ set(others)):
            with_mask, without = (first, prefix) if name in names else (prefix, first)
            raise ConfigError(
                f"{with_mask} has the loss mask {name}, but {without} has not. Create the mask, remove "
                f"{mask_path(with_mask, name)}, or use both corpora in a blend (--data-path)."
            )
        for name in names:
            check_mask(prefix, name)
    for name in names:
        check_mask_writable(output_prefix, name, OUTPUT)
    return names


def _write(infos: Sequence[CorpusInfo], output_prefix: str, masks: Sequence[str]) -> None:
    """Write the merged corpus under temporary names, and rename it when it and its masks are complete."""
    tokens, index = (path(partial_prefix(output_prefix)) for path in (bin_path, idx_path))
    tokens.touch()
    with tokens.open("r+b", buffering=0) as output:
        lock_output(output, OUTPUT)
        try:
            write_merged_index(infos, index)
            _copy_tokens(infos, output)
            for name in masks:
                parts = (part for info in infos for part in LossMask(info.prefix, name).parts())
                origin = {"tool": "merge_datasets", "corpora": len(infos)}
                write_mask(output_prefix, name, parts, origin, files=partial_prefix(output_prefix))
            publish(tokens, bin_path(output_prefix))
            publish(index, idx_path(output_prefix))
        finally:
            for path in (tokens, index):
                path.unlink(missing_ok=True)


def _check_names(prefixes: Sequence[str], output_prefix: str) -> None:
    check_output_prefix(output_prefix, OUTPUT, directory_allowed=True)  # usually the directory of the shards
    seen: set[str] = set()
    for prefix in prefixes:
        if _same(prefix, output_prefix):
            raise ConfigError(f"{OUTPUT} {output_prefix} is one of the inputs. Choose another name.")
        if (real := os.path.realpath(bin_path(prefix))) in seen:
            raise ConfigError(
                f"{prefix} is named twice. To sample a corpus more often, increase its weight in the blend "
                "(--data-path)."
            )
        seen.add(real)
    if Path(f"{output_prefix}.journal").is_file():
        raise ConfigError(
            f"{OUTPUT} {output_prefix}: a preprocessing job is writing there, or was killed. Finish it (--resume), or "
            f"remove {output_prefix}.journal."
        )
    if output_prefix.endswith((".bin", ".idx")):
        raise ConfigError(f"{OUTPUT} {output_prefix}: omit {output_prefix[-4:]} from the prefix.")


def _same(prefix: str, other: str) -> bool:
    return os.path.realpath(bin_path(prefix)) == os.path.realpath(bin_path(other))


def _checked(prefix: str) -> CorpusInfo:
    check_files_exist(prefix, prefix, "Create this shard first.")
    try:
        return corpus_info(prefix)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{prefix}: {error} Recreate this shard; tools/inspect_dataset.py --check shows details."
        ) from error


def _check_kinds(infos: Sequence[CorpusInfo]) -> None:
    first = infos[0]
    for info in infos[1:]:
        if info.dtype != first.dtype:
            raise ConfigError(
                f"{info.prefix} has ids of dtype {info.dtype}, but {first.prefix} has {first.dtype}: they were made "
                "with vocabularies of different sizes. Recreate them with one tokenizer."
            )


def _merged_metadata(infos: Sequence[CorpusInfo]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return the metadata of the merged corpus, or None and the inputs without metadata.

    Raises:
        ConfigError: two inputs were made with different tokenizers or different --append-eod settings.
    """
    found = [(info.prefix, read_metadata(info.prefix)) for info in infos]
    known = [(prefix, metadata) for prefix, metadata in found if metadata is not None]
    _check_metadata(known)
    if len(known) < len(found):
        return None, tuple(prefix for prefix, metadata in found if metadata is None)
    all_metadata = [metadata for _, metadata in known]
    merged = {key: value for key, value in all_metadata[0].items() if all(m.get(key) == value for m in all_metadata)}
    for key in COUNTS:
        if all(isinstance(metadata.get(key), int) for metadata in all_metadata):
            merged[key] = sum(metadata[key] for metadata in all_metadata)
    merged["tokenizer"] = max((metadata["tokenizer"] for metadata in all_metadata), key=len)  # the most complete one
    merged |= {"documents": sum(info.documents for info in infos), "tokens": sum(info.tokens for info in infos)}
    return merged, ()


def _check_metadata(known: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Raise ConfigError if two corpora record different values of a field; earlier releases recorded fewer fields."""
    for field, label in TOKENIZER_FIELDS.items():
        values = [
            (prefix, m["tokenizer"]["name"], m["tokenizer"][field]) for prefix, m in known if field in m["tokenizer"]
        ]
        for prefix, name, value in values:
            first = values[0]
            if value != first[2]:
                raise ConfigError(
                    f"{prefix} was made with {name} of {label} {value}, but {first[0]} with {first[1]} of {label} "
                    f"{first[2]}. Recreate them with one tokenizer."
                )
    ended = [(prefix, metadata["append_eod"]) for prefix, metadata in known if "append_eod" in metadata]
    with_end = next((prefix for prefix, value in ended if value), None)
    without = next((prefix for prefix, value in ended if not value), None)
    if with_end is not None and without is not None:
        raise ConfigError(
            f"{with_end} was made with --append-eod, but {without} without it. Recreate them with the same flags, or "
            "use both in a blend (--data-path)."
        )


def _check_space(infos: Sequence[CorpusInfo], output_prefix: str) -> None:
    wanted = sum(bin_path(info.prefix).stat().st_size + idx_path(info.prefix).stat().st_size for info in infos)
    free = free_space(Path(output_prefix).absolute().parent)
    if free is not None and wanted > free:
        raise ConfigError(
            f"{OUTPUT} {output_prefix} needs {wanted:,} bytes, but only {free:,} are free. Free space, or choose "
            "another disk."
        )


def _copy_tokens(infos: Sequence[CorpusInfo], output: IO[bytes]) -> None:
    output.truncate(0)
    with progress("merging", sum(bin_path(info.prefix).stat().st_size for info in infos), "B") as bar:
        for info in infos:
            with bin_path(info.prefix).open("rb", buffering=0) as source:
                remaining = os.fstat(source.fileno()).st_size
                while remaining:
                    copied = _copy(source, output, min(remaining, COPY_BYTES))
                    if copied == 0:
                        raise OSError(errno.EIO, f"{source.name} was truncated while it was copied")
                    remaining -= copied
                    bar.advance(copied)


def _copy(source: IO[bytes], output: IO[bytes], count: int) -> int:
    """Copy up to ``count`` bytes and return the number copied, in the kernel if possible (which may share blocks)."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source.fileno(), output.fileno(), count)
        except OSError as error:
            if error.errno not in NO_RANGE_COPY:
                raise
    data = source.read(count)
    write_all(output, data)
    return len(data)


def write_merged_index(infos: Sequence[CorpusInfo], target: Path) -> None:
    """Write the index of concatenated corpora, identical to that of Megatron-Core's builder.

    Raises:
        ConfigError: the pointers of an input are not the sums of its lengths.
    """
    sequences, documents = sum(info.sequences for info in infos), sum(info.documents for info in infos)
    with target.open("wb") as file:
        file.write(packed_header(infos[0].dtype, sequences, documents))
        for info in infos:  # indices are reopened for each array: shards may exceed the limit of open files
            for part in chunks(read_index(info.prefix).lengths):
                file.write(part.tobytes())
        base = 0
        for info in infos:
            base = _write_pointers(read_index(info.prefix), base, file)
        file.write(bytes(8))  # the first document starts at sequence 0
        first = 0
        for info in infos:
            for part in chunks(read_index(info.prefix).boundaries[1:]):
                file.write((part + first).tobytes())
            first += info.sequences


def _write_pointers(index: Index, base: int, file: IO[bytes]) -> int:
    """Write the byte offsets of the sequences of a corpus that starts at byte ``base``, and return its end."""
    end = 0
    for lengths, pointers in zip(chunks(index.lengths), chunks(index.pointers), strict=True):
        starts, end = byte_offsets(lengths, end, index.dtype)
        if not np.array_equal(starts, pointers):
            raise ConfigError(
                f"{index.prefix}: the offsets in {idx_path(index.prefix)} are not the sums of its lengths. Recreate "
                "this shard; tools/inspect_dataset.py --check shows details."
            )
        file.write((starts + base).tobytes())
    return base + end
