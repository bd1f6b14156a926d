"""Generated texts as JSON lines. Unfinished files are continued."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_slm.inference.generation import Generation
from megatron_slm.inference.prompts import INPUT, PROMPT, STDIN, Prompt
from megatron_slm.inference.sampling import Decoding
from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import (
    check_output_file,
    check_replaceable,
    explained_write,
    lock_output,
    write_all,
    write_bytes,
)

FLAG = "--output"
TEXT, KEY = "text", "generate_text"  # keys of a line, and of the first line of an unfinished file


def job_key(model: str, decoding: Decoding, prompts: Sequence[Prompt]) -> str:
    """Return the checksum of all that the texts depend on.

    Args:
        model: identity of the checkpoint and its precision.
    """
    return text_checksum(json.dumps([model, asdict(decoding), [prompt.record for prompt in prompts]]))


def check_output(path: str, source: str | None = None) -> None:
    """Raise ConfigError if the file has other content than generated texts, is ``source``, or has no directory."""
    check_output_file(path, FLAG, is_ours=_is_output)
    if source not in (None, STDIN) and Path(path).exists() and Path(path).samefile(source):
        raise ConfigError(f"{FLAG} {path} is the file of {INPUT}, which is not replaced. Choose another path.")
    check_replaceable(partial_path(path), FLAG, is_ours=_is_partial)


def partial_path(path: str) -> Path:
    """Return the path of the unfinished file."""
    target = Path(path).resolve()
    return target.with_name(f"{target.name}.partial")


class OutputFile:
    """Append texts to ``PATH.partial``, and publish the complete file as ``PATH``. For one process.

    Args:
        path: path of the complete file.
        key: result of :func:`job_key`; an unfinished file with another key is replaced.

    Raises:
        ConfigError: a file cannot be written, or another process writes it.
    """

    def __init__(self, path: str, key: str) -> None:
        self.path, self.partial = path, partial_path(path)
        header = json.dumps({KEY: key}).encode() + b"\n"
        with explained_write(path, FLAG):
            self.file = self.partial.open("a+b", buffering=0)
            lock_output(self.file, FLAG)
            content = self._content()
            if not content.startswith(header):
                self.file.truncate(0)
                self.file.write(header)
                content = header
            complete = content[: content.rindex(b"\n") + 1]
            self.file.truncate(len(complete))
        self.header_size = len(header)
        self.finished = complete.count(b"\n") - 1  # prompts

    def append(self, prompts: Sequence[Prompt], generations: Sequence[Generation]) -> None:
        """Write one line per prompt: the other keys of its line, the prompt, and the generated text."""
        lines = (
            _encode({**prompt.record, PROMPT: prompt.text, TEXT: generation.text}) + b"\n"
            for prompt, generation in zip(prompts, generations, strict=True)
        )
        with explained_write(self.path, FLAG):
            write_all(self.file, b"".join(lines))

    def publish(self) -> None:
        """Write the complete file, and remove the unfinished one."""
        write_bytes(self.path, self._content()[self.header_size :], FLAG, is_ours=_is_output)
        self.partial.unlink()
        self.file.close()

    def _content(self) -> bytes:
        self.file.seek(0)
        return self.file.read()


def _encode(record: dict[str, Any]) -> bytes:
    """Return a record as JSON in UTF-8, or in ASCII if it has lone surrogates, for which UTF-8 has no bytes."""
    try:
        return json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(record).encode("ascii")


def _is_output(path: Path) -> bool:
    """Return whether a file is empty or begins with a line of generated text."""
    return not path.stat().st_size or {PROMPT, TEXT} <= _first_line_keys(path)


def _is_partial(path: Path) -> bool:
    """Return whether a file is empty, as after a crash, or begins with the key of a job."""
    return not path.stat().st_size or KEY in _first_line_keys(path)


def _first_line_keys(path: Path) -> set[str]:
    try:
        with path.open("rb") as file:
            record = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return set()
    return set(record) if isinstance(record, dict) else set()
