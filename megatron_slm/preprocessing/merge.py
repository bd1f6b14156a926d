"""Makes one corpus of many, in order: the bytes that one machine would have written, with bounded memory."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_slm.corpus.checks import CorpusInfo, corpus_info
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
from megatron_slm.corpus.metadata import read_metadata, remove_metadata, write_metadata
from megatron_slm.preprocessing.corpus_writer import check_corpus_writable, write_all
from megatron_slm.preprocessing.journal import OUTPUT, lock_output
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_output_prefix, explained_write, publish

COPIED_AT_ONCE = 1 << 26  # bytes
# Counts in the metadata are summed; the rest is kept if all agree.
COUNTS = ("documents", "tokens", "text_bytes", "empty", "blank_lines", "skipped")
TOKENIZER_FIELDS = {"fingerprint": "fingerprint", "vocab_size": "vocabulary size", "eod": "end-of-document id"}
NO_RANGE_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class Merged:
    """What a merge wrote."""

    corpora: int
    documents: int
    tokens: int
    unrecorded: tuple[str, ...]  # inputs without metadata; the output has none then


def merge_corpora(prefixes: Sequence[str], output_prefix: str) -> Merged:
    """Write the corpora ``prefixes``, one behind the other, as one. It appears under its name only when it is complete.

    Raises:
        ConfigError: an input is missing, damaged, of another dtype or tokenizer, or is the output; or the output
            cannot be written. What stood under the output's name is then as it was.
    """
    _check_names(prefixes, output_prefix)
    check_corpus_writable(output_prefix, OUTPUT)
    infos = [_checked(prefix) for prefix in prefixes]
    metadata, unrecorded = _merged_metadata(infos)
    _check_kinds(infos)
    _check_space(infos, output_prefix)
    with explained_write(output_prefix, OUTPUT):
        Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
        _write(infos, output_prefix)
        remove_metadata(output_prefix)
    if metadata is not None:
        write_metadata(output_prefix, metadata)
    return Merged(len(infos), sum(i.documents for i in infos), sum(i.tokens for i in infos), unrecorded)


def _write(infos: Sequence[CorpusInfo], output_prefix: str) -> None:
    """Write the merged corpus under temporary names, and give it its name."""
    tokens, index = (path(partial_prefix(output_prefix)) for path in (bin_path, idx_path))
    tokens.touch()
    with tokens.open("r+b", buffering=0) as output:
        lock_output(output)
        try:
            write_merged_index(infos, index)
            _copy_tokens(infos, output)
            publish(tokens, bin_path(output_prefix))
            publish(index, idx_path(output_prefix))
        finally:
            for path in (tokens, index):
                path.unlink(missing_ok=True)


def _check_names(prefixes: Sequence[str], output_prefix: str) -> None:
    check_output_prefix(output_prefix, OUTPUT, directory_allowed=True)  # of the shards, as a rule
    seen: set[str] = set()
    for prefix in prefixes:
        if _same(prefix, output_prefix):
            raise ConfigError(f"{OUTPUT} {output_prefix} is one of the inputs. Give it another name.")
        if (real := os.path.realpath(bin_path(prefix))) in seen:
            raise ConfigError(
                f"{prefix} is named twice. To draw from a corpus more often, give it more weight in the blend "
                "(--data-path)."
            )
        seen.add(real)
    if Path(f"{output_prefix}.journal").is_file():
        raise ConfigError(
            f"{OUTPUT} {output_prefix}: a preprocessing job is writing there, or was killed. Let it end (--resume), or "
            f"remove {output_prefix}.journal."
        )
    if output_prefix.endswith((".bin", ".idx")):
        raise ConfigError(f"{OUTPUT} {output_prefix}: give the prefix without {output_prefix[-4:]}.")


def _same(prefix: str, other: str) -> bool:
    return os.path.realpath(bin_path(prefix)) == os.path.realpath(bin_path(other))


def _checked(prefix: str) -> CorpusInfo:
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            hint = f" Give the prefix without {path.suffix}." if prefix.endswith((".bin", ".idx")) else ""
            raise ConfigError(f"{prefix}: {path} is missing.{hint or ' Make this shard first.'}")
    try:
        return corpus_info(prefix)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{prefix}: {error} Make this shard again; tools/inspect_dataset.py tells more.") from error


def _check_kinds(infos: Sequence[CorpusInfo]) -> None:
    first = infos[0]
    for info in infos[1:]:
        if info.dtype != first.dtype:
            raise ConfigError(
                f"{info.prefix} holds ids of dtype {info.dtype}, and {first.prefix} of {first.dtype}: they were made "
                "with vocabularies of different size. Make them again with one tokenizer."
            )


def _merged_metadata(infos: Sequence[CorpusInfo]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return the metadata of the merged corpus, or None and the inputs that have none.

    Raises:
        ConfigError: two inputs were made with different tokenizers, or one of them without end-of-document tokens.
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
    merged["tokenizer"] = max((metadata["tokenizer"] for metadata in all_metadata), key=len)  # with most fields
    merged |= {"documents": sum(info.documents for info in infos), "tokens": sum(info.tokens for info in infos)}
    return merged, ()


def _check_metadata(known: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Raise ConfigError if two corpora record different values of a field; earlier releases recorded fewer fields."""
    for field, words in TOKENIZER_FIELDS.items():
        values = [
            (prefix, m["tokenizer"]["name"], m["tokenizer"][field]) for prefix, m in known if field in m["tokenizer"]
        ]
        for prefix, name, value in values:
            first = values[0]
            if value != first[2]:
                raise ConfigError(
                    f"{prefix} was made with {name} of {words} {value}, and {first[0]} with {first[1]} of {words} "
                    f"{first[2]}. Make them again with one tokenizer."
                )
    ended = [(prefix, metadata["append_eod"]) for prefix, metadata in known if "append_eod" in metadata]
    with_end = next((prefix for prefix, value in ended if value), None)
    without = next((prefix for prefix, value in ended if not value), None)
    if with_end is not None and without is not None:
        raise ConfigError(
            f"{with_end} was made with --append-eod, and {without} without, so that its documents have no end. Make "
            "them again with the same flags, or draw from both in a blend (--data-path)."
        )


def _check_space(infos: Sequence[CorpusInfo], output_prefix: str) -> None:
    wanted = sum(bin_path(info.prefix).stat().st_size + idx_path(info.prefix).stat().st_size for info in infos)
    place = Path(output_prefix).absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise ConfigError(
            f"{OUTPUT} {output_prefix} needs {wanted:,} bytes, and {free:,} are free there. Free some, or give "
            "another disk."
        )


def _copy_tokens(infos: Sequence[CorpusInfo], output: IO[bytes]) -> None:
    output.truncate(0)
    with progress("merging", sum(bin_path(info.prefix).stat().st_size for info in infos), "B") as bar:
        for info in infos:
            with bin_path(info.prefix).open("rb", buffering=0) as source:
                left = os.fstat(source.fileno()).st_size
                while left:
                    done = _copy(source, output, min(left, COPIED_AT_ONCE))
                    if done == 0:
                        raise OSError(errno.EIO, f"{source.name} became shorter while it was copied")
                    left -= done
                    bar.advance(done)


def _copy(source: IO[bytes], output: IO[bytes], count: int) -> int:
    """Copy up to ``count`` bytes, inside the kernel where it can (it then shares blocks where the file system can)."""
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
    """Write the index of corpora, one behind the other, as Megatron-Core's builder would.

    Raises:
        ConfigError: the pointers of an input are not the sums of its lengths, so that its tokens lie otherwise.
    """
    sequences, documents = sum(info.sequences for info in infos), sum(info.documents for info in infos)
    with target.open("wb") as file:
        file.write(packed_header(infos[0].dtype, sequences, documents))
        for info in infos:  # an index is opened anew for each array: there may be more shards than open files
            for part in chunks(read_index(info.prefix).lengths):
                file.write(part.tobytes())
        begin = 0
        for info in infos:
            begin = _write_pointers(read_index(info.prefix), begin, file)
        file.write(bytes(8))  # the first document begins at the first sequence
        first = 0
        for info in infos:
            for part in chunks(read_index(info.prefix).boundaries[1:]):
                file.write((part + first).tobytes())
            first += info.sequences


def _write_pointers(index: Index, begin: int, file: IO[bytes]) -> int:
    """Write the byte offset of each sequence of a corpus that begins at byte ``begin``; where the next one begins."""
    own = 0
    for lengths, pointers in zip(chunks(index.lengths), chunks(index.pointers), strict=True):
        starts, own = byte_offsets(lengths, own, index.dtype)
        if not np.array_equal(starts, pointers):
            raise ConfigError(
                f"{index.prefix}: the offsets in {idx_path(index.prefix)} are not those of its lengths. Look at it "
                "with tools/inspect_dataset.py --check, and make this shard again."
            )
        file.write((starts + begin).tobytes())
    return begin + own
