"""Names of the files of a published model."""

from __future__ import annotations

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
TOKENIZER_JSON, SENTENCEPIECE_MODEL = "tokenizer.json", "tokenizer.model"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
CHAT_TEMPLATE, CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates/*.jinja"
TOKENIZER_FILES = (
    *(TOKENIZER_JSON, SENTENCEPIECE_MODEL, VOCABULARY, MERGES),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE),
    "chat_template.json",
)
