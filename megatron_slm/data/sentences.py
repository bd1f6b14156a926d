"""Sentence splitting by nltk's Punkt models, as Megatron-LM's --split-sentences does it."""

from __future__ import annotations

from collections.abc import Callable

from megatron_slm.runtime.errors import ConfigError


def sentence_splitter(language: str, keep_newlines: bool) -> Callable[[str], list[str]]:
    """A function from a text to its sentences.

    Args:
        language: name of a Punkt model, for example "english".
        keep_newlines: leave the white space behind a sentence in it.

    Raises:
        ConfigError: the Punkt data is not installed.
    """
    from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer, PunktTokenizer

    try:
        trained = PunktTokenizer(language)
    except LookupError as error:
        raise ConfigError(
            f"--split-sentences needs nltk's punkt_tab data for {language!r}, which is not installed. Run "
            "'python -m nltk.downloader punkt_tab' on a machine with a connection, or point NLTK_DATA at a folder "
            "that holds tokenizers/punkt_tab."
        ) from error
    if not keep_newlines:
        return trained.tokenize

    class KeepsNewlines(PunktLanguageVars):
        # nltk's own expression, with the white space behind a sentence inside the match
        _period_context_fmt = r"""
            %(SentEndChars)s\s*
            (?=(?P<after_tok>
                %(NonWord)s
                |
                (?P<next_tok>\S+)
            ))"""

    return PunktSentenceTokenizer(trained._params, lang_vars=KeepsNewlines()).tokenize
