"""Standard output and error for terminals of any encoding, full disks, and streams that the caller has closed."""

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
    """Let standard output and error take any character, whatever the terminal's encoding is, and replace closed ones.

    Call it before files are opened: the first ones would get the descriptors of closed streams.
    """
    _open_closed_streams()
    codecs.register_error("spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="spelled")


def print_error(text: str) -> None:
    """Print a line to standard error; an error in doing so is ignored, because it can be reported nowhere."""
    print(text, file=fail_safe(sys.stderr), flush=True)


def print_summary(text: str) -> None:
    """Print the last line of completed work to standard output, which must not make it fail."""
    print(text, file=fail_safe(sys.stdout), flush=True)


def print_result(text: str) -> None:
    """Print text for which the command was called to standard output; a closed pipe is not an error.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        _discard_at_exit()
    except OSError as error:
        _discard_at_exit()
        raise ConfigError(f"standard output cannot be written ({error.strerror}). Write it elsewhere.") from error


def fail_safe(stream: TextIO) -> TextIO:
    """Return ``stream`` without its errors, such as a full disk or a closed pipe; the first one gives a warning."""
    return cast(TextIO, _FailSafe(stream))


class _FailSafe:
    """A text stream whose errors do not end the process."""

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
    """Keep the interpreter from failing at exit because of lines that it still cannot write."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_closed_streams() -> None:
    """Connect standard streams that the caller has closed to /dev/null, which takes their free descriptors in order."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 it stays open
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Handle encoding errors: spell Greek letters and signs in ASCII, replace other characters by "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in text), error.end
