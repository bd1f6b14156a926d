"""Small tokenizer models of many types trained on random text, and texts that are difficult to split."""

from __future__ import annotations

import functools
import io
import random
from typing import Any

import sentencepiece
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA_3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # pre-token pattern
ALPHABETS = ["abcde", "éüñe\u0301", "日本語中文", "0123456789", ".,;:'!?()[]/_-=+<>", "абв", "🙂👩🏽‍🚀"]
HARD = [
    *[
        "",
        " ",
        "  ",
        "     ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\t\t",
        " \n",
        "\n ",
        "\n  \n",
        "▁",
        "▁▁",
        "▁a",
        "\0",
        "\x1c",
    ],
    *[
        "\x85",
        "\xa0",
        "\u1680",
        "\u180e",
        "\u2003",
        "\u2028",
        "\u2029",
        "\u200b",
        "\u202f",
        "\u3000",
        "\ufeff",
        "\ufffd",
    ],
    *["e\u0301", "\u0301", "👩🏽‍🚀", "🇩🇪", "ﬁ", "Å", "\u212b", "ſ", "'s", "'S", "'ſ", "n't", "l'll", "'", "''"],
    *[
        "日本語",
        "한국어",
        "ไทย",
        "العربية",
        "12345",
        "٣٤",
        "²",
        "½",
        "x1y2",
        "//",
        ";\n//",
        ";\n\n  /* x",
        "foo.bar(baz)",
    ],
    *[
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<|endoftext|>",
        "<tag>",
        "\U0010ffff",
        "\ue000",
        "Ω",
        "ς",
        "İ",
        "\x7f",
        "\x00\x01",
    ],
]


def texts() -> st.SearchStrategy[str]:
    """Return a strategy of concatenated fragments: difficult cases, words of known alphabets, and any Unicode text."""
    known = st.sampled_from(ALPHABETS).flatmap(lambda alphabet: st.text(alphabet, max_size=6))
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    fragments = st.one_of(st.sampled_from(HARD), st.sampled_from([" ", " ", "\n", "  "]), known, anything)
    return st.lists(fragments, max_size=14).map("".join)


def random_lines(seed: int, count: int = 400) -> list[str]:
    """Return lines of random words separated by spaces, tabs and punctuation."""
    rng = random.Random(seed)
    alphabets = rng.sample(ALPHABETS, 4)  # so that some models separate punctuation, digits and letters
    words = ["".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 5))) for _ in range(120)]
    joints = [" ", " ", " ", "  ", "    ", "\t", "", ", ", ".", "("]
    return ["".join(rng.choice(words) + rng.choice(joints) for _ in range(12)) for _ in range(count)]


@functools.cache
def sentencepiece_model(seed: int, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Train a BPE model of up to 700 pieces with ``options`` of the trainer."""
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "allow_whitespace_only_pieces": True,
        **options,
    }
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_lines(seed)),
        model_writer=written,
        vocab_size=700,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def changed(model: sentencepiece.SentencePieceProcessor, change: Any) -> sentencepiece.SentencePieceProcessor:
    """Return a copy of a model with a changed protocol buffer."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    proto.ParseFromString(model.serialized_model_proto())
    change(proto)
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


@functools.cache
def byte_level_model(seed: int, pattern: str | None = None, **options: Any) -> Tokenizer:
    """Train byte-level BPE with GPT-2's pattern or another one. Options: prefix, normalizer, specials."""
    model = Tokenizer(models.BPE(ignore_merges=pattern is not None))
    if pattern is None:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.get("prefix", False))
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    model.decoder = decoders.ByteLevel()
    if "normalizer" in options:
        model.normalizer = getattr(normalizers, options["normalizer"])()
    _train(model, seed, pre_tokenizers.ByteLevel.alphabet())
    if options.get("specials"):
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(name, model.token_to_id(name)) for name in ("<s>", "</s>")]
        )
    return model


@functools.cache
def metaspace_model(seed: int, prepend_scheme: str | None) -> Tokenizer:
    """Train BPE with byte fallback and the Metaspace pre-tokenizer, or (None) Llama 2's normalizers only."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme or "always")
    _train(model, seed, [], ["<unk>", "<s>", "</s>", *alphabet], limit=120)
    if prepend_scheme is None:
        model.pre_tokenizer = None
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return model


def _train(
    model: Tokenizer, seed: int, alphabet: list[str], specials: list[str] | None = None, limit: int | None = None
) -> None:
    limits: dict[str, Any] = {} if limit is None else {"limit_alphabet": limit}
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials or ["<|endoftext|>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
        **limits,
    )
    model.train_from_iterator(random_lines(seed), trainer)
