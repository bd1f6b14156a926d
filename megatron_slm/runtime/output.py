"""Standard output and error on terminals of any encoding, on full disks, and if the caller has closed them."""

from __future__ import annotations

import atexit
import codecs
import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast

from megatron_slm.runtime.errors import ConfigError

ASCII = {"τ": "tau", "θ": "theta", "−": "-", "–": "-", "—": "-", "±": "+-", "×": "x", "…": "...", "·": "*", "≥": ">="}


def prepare_output() -> None:
    """Configure standard output and error to accept any character, and reopen closed standard streams.

    Call this before opening files, which would otherwise get the descriptors of closed streams.
    """
    _open_closed_streams()
    codecs.register_error("spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="spelled")


def print_error(text: str) -> None:
    """Print a line to standard error; ignore errors, which cannot be reported."""
    print(text, file=fail_safe(sys.stderr), flush=True)


def print_summary(text: str) -> None:
    """Print the summary of completed work to standard output; write errors do not change the exit code."""
    print(text, file=fail_safe(sys.stdout), flush=True)


def print_result(text: str) -> None:
    """Print the requested result of a command to standard output; a closed pipe is not an error.

    Raises:
        ConfigError: standard output cannot be written.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        _discard_at_exit()
    except OSError as error:
        _discard_at_exit()
        raise ConfigError(f"standard output cannot be written ({error.strerror}). Write it elsewhere.") from error


def fail_safe(stream: TextIO) -> TextIO:
    """Wrap ``stream`` to ignore write errors, such as a full disk or a closed pipe, after one warning."""
    return cast(TextIO, _FailSafe(stream))


class _FailSafe:
    """Text stream that ignores write errors."""

    has_warned = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        _discard_at_exit()
        if self._stream is sys.stdout and not _FailSafe.has_warned and not isinstance(error, BrokenPipeError):
            _FailSafe.has_warned = True
            print_error(f"warning: standard output cannot be written ({error.strerror}); its lines are lost.")


def _discard_at_exit() -> None:
    atexit.unregister(_discard_unwritten)
    atexit.register(_discard_unwritten)


def _discard_unwritten() -> None:
    """Discard unwritable buffered output, with which the interpreter would fail at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_closed_streams() -> None:
    """Open /dev/null for each closed standard stream; in this order, each gets the descriptor of its stream."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 (stays open)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Handle encoding errors: spell Greek letters and signs in ASCII, replace other characters by "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in text), error.end
