"""Small tokenizers with chat templates of well-known styles, and corpora of examples with answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, processors

from megatron_slm.finetune.preprocess import FinetuneJob, preprocess_examples
from megatron_slm.testing.tokenizer_models import byte_level_model, metaspace_model
from megatron_slm.tokenizers.tokenizer import TokenizerFiles

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}{{ message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""
CHATML_TOOLS = """{% if tools %}{{ '<|im_start|>system\\n' }}{{ tools | tojson }}{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<call>' }}{{ call.function | tojson }}{{ '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA_2 = """{% for message in messages %}{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'system' %}{{ raise_exception('System messages are not supported') }}
{%- else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """{{- bos_token }}{% for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
GENERATION = """{% for message in messages %}{{ message.role + ': ' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}{{ '\\n' }}{% endfor %}"""
HISTORY = """{% for message in messages %}{{ message.role }}{{ ':last' if loop.last else ':' }}{{ message.content }}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant:last' }}{% endif %}"""
END_OF_TEXT = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{{- message.content + '<|im_end|>\\n' }}{% endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else eos_token }}"""
THINKING = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if loop.last and message.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- message.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def save_tokenizer(directory: Path, template: str | None = None, *, kind: str = "byte-level") -> str:
    """Save a tokenizer whose encode() adds <s> to every text, with a chat template; return its directory.

    Args:
        kind: "byte-level" for GPT-2's style, or "metaspace" for Llama 2's, which adds a space before a text.
    """
    model = byte_level_model(7, specials=True) if kind == "byte-level" else metaspace_model(7, None)
    model = Tokenizer.from_str(model.to_str())
    if kind != "byte-level":
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        model.decoder = decoders.Sequence(steps)
    model.add_special_tokens(SPECIALS)
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))]
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {} if template is None else {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(directory)


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    """Write JSON lines, and return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_examples(prefix: Path, records: list[dict[str, Any]], **settings: Any) -> str:
    """Create a corpus of examples with ByteTokenizer, or another; return its prefix."""
    chosen = {"tokenizer_type": "ByteTokenizer", "tokenizer_files": TokenizerFiles(), **settings}
    job = FinetuneJob([write_records(prefix.with_suffix(".jsonl"), records)], str(prefix), **chosen)
    preprocess_examples(job)
    return job.prefix
