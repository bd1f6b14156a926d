"""Export a checkpoint of this trainer, or of Megatron-LM, as a published model, one tensor at a time."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.family import Family, Weight
from megatron_slm.checkpoint.huggingface.files import CHAT_TEMPLATE, CONFIG_FILE, GENERATION_FILE
from megatron_slm.checkpoint.huggingface.import_model import HF_FLAG, check_empty, check_space
from megatron_slm.checkpoint.huggingface.registry import FAMILIES
from megatron_slm.checkpoint.huggingface.safetensors_writer import Group, write_model
from megatron_slm.checkpoint.huggingface.tokenizer_files import TokenizerSource, find_tokenizer, write_tokenizer
from megatron_slm.checkpoint.native import NativeSource
from megatron_slm.checkpoint.requests import EMBEDDINGS, MODEL_PARTS, SHOWN, weight_prefix
from megatron_slm.checkpoint.source import CheckpointSource, find_source, is_published
from megatron_slm.checkpoint.tensor_store import TensorStore
from megatron_slm.config.checks import derive
from megatron_slm.config.paths import TOKENIZER_DIRECTORY
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.resume import Difference, Rule, differences, show
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.console import BYTES
from megatron_slm.runtime.console import progress as progress_bar
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import explained_write, sync
from megatron_slm.tokenizers.chat_template import find_template

LOAD_FLAG = "--load"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportJob:
    """Settings of an export, one field per flag."""

    load: str
    hf_path: str
    step: int | None = None
    dtype: str | None = None  # one of DTYPES; None: that of the checkpoint
    shard_bytes: int = 5_000_000_000
    tokenizer_model: str | None = None  # None: the tokenizer of the run
    chat_template: str | None = None  # file or text; None: that of the tokenizer
    verify: bool = True


def export_model(job: ExportJob) -> Path:
    """Write a published model to ``job.hf_path``, and return the directory.

    Raises:
        ConfigError: the checkpoint cannot be read, no family represents its model, or the disk is full.
    """
    source = find_source(job.load, job.step, LOAD_FLAG)
    if is_published(job.load):
        raise ConfigError(f"{LOAD_FLAG} {job.load} is a published model already. Give the --save directory of a run.")
    final = Path(job.hf_path).resolve()
    check_empty(final, HF_FLAG)
    source.verify(checksums=job.verify)
    config = source.config()
    tokenizer = find_tokenizer(config, job.tokenizer_model)
    chat_template = find_template(job.chat_template, None).text if job.chat_template is not None else None
    template = _template(tokenizer.directory or source.directory.absolute().parent / TOKENIZER_DIRECTORY)
    family = choose_family(config, template)
    store = TensorStore(source.directory, LOAD_FLAG)
    vocab_size = _vocab_size(source, config, tokenizer, store)
    groups = list(_groups(store, family, config, vocab_size, job))
    dtype = next(name for name, dtype in DTYPES.items() if dtype == groups[0].like[0].dtype)
    size = sum(group.size for group in groups)
    partial_directory = final.with_name(f".partial-{uuid.uuid4().hex[:8]}-{final.name}")
    try:
        with explained_write(final, HF_FLAG):
            partial_directory.mkdir(parents=True)
            check_space(partial_directory, size, HF_FLAG)
            with progress_bar(f"exporting {final.name}", size, BYTES) as bar:
                write_model(groups, partial_directory, job.shard_bytes, bar.advance)
            fields = config_fields(family, config, vocab_size, dtype, template, tokenizer)
            _write_json(partial_directory / CONFIG_FILE, fields)
            write_tokenizer(tokenizer, partial_directory)
            if chat_template is not None:
                (partial_directory / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
            if not (partial_directory / GENERATION_FILE).exists():
                ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id") if fields.get(name) is not None}
                _write_json(partial_directory / GENERATION_FILE, {"_from_model_config": True, **ids})
            for path in partial_directory.iterdir():
                sync(path)
            _publish(partial_directory, final)
    finally:
        shutil.rmtree(partial_directory, ignore_errors=True)
    return final


def _publish(partial_directory: Path, final: Path) -> None:
    """Rename the directory, or move its files to an existing empty one, with the file that makes it a model last."""
    if final.exists():
        for path in sorted(partial_directory.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            path.rename(final / path.name)
        sync(final)
    else:
        partial_directory.rename(final)
    sync(final.parent)


def choose_family(config: RunConfig, template: PublishedConfig | None) -> Family:
    """Return the family of the model: that of the template if it represents the model, else the first that does.

    Raises:
        ConfigError: no family represents the model; the message lists the settings that differ from the closest one.
    """
    preferred = template.values.get("model_type") if template is not None else None
    ordered = sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred)
    results = [(family, unrepresented(family, config)) for family in ordered]
    for family, problems in results:
        if not problems:
            return family
    family, problems = min(results, key=lambda result: len(result[1]))
    raise ConfigError(
        f"{LOAD_FLAG}: no supported family of published models represents this model. The closest is "
        f"{family.model_type}, which differs in {'; '.join(problems)}."
    )


def unrepresented(family: Family, config: RunConfig) -> list[str]:
    """Return the settings that a published model of ``family`` would not have, by exporting and importing them."""
    try:
        fields = json.loads(json.dumps(family.write_fields(config.model)))
        published = PublishedConfig(Path(CONFIG_FILE), HF_FLAG, {**fields, "vocab_size": config.model.vocab_size or 1})
        settings = family.read_settings(published)
    except ConfigError as error:
        return [str(error)]
    imported = derive(with_settings(RunConfig(), settings))
    return [
        f"{each.flag} {show(each.ours)} (not {show(each.theirs)})"
        for each in differences(config, imported)
        if each.rule in (Rule.STRUCTURE, Rule.ERROR) and _matters(each, config)
    ]


def _matters(each: Difference, config: RunConfig) -> bool:
    unused_size = each.name == "ffn_hidden_size" and config.model.num_experts is not None
    return each.name != "seq_length" and not unused_size


def config_fields(
    family: Family,
    config: RunConfig,
    vocab_size: int,
    dtype: str,
    template: PublishedConfig | None,
    tokenizer: TokenizerSource,
) -> dict[str, Any]:
    """Return the contents of ``config.json``.

    Fields that no setting determines, such as token ids, are those of the template if it is of the same family.
    """
    inherited: dict[str, Any] = {}
    if template is not None and template.values.get("model_type") == family.model_type:
        dropped = ("auto_map", "rope_parameters", "torch_dtype", "transformers_version", "_name_or_path")
        inherited = {name: value for name, value in template.values.items() if name not in dropped}
    model = config.model
    fields = {**inherited, **family.write_fields(model)}
    if model.max_position_embeddings == inherited.get("sliding_window"):  # the positions were limited on import
        kept = ("sliding_window", "use_sliding_window", "max_position_embeddings")
        fields |= {name: inherited[name] for name in kept if name in inherited}
    fields.setdefault("bos_token_id", tokenizer.bos)
    fields.setdefault("eos_token_id", tokenizer.eod)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{name: value for name, value in fields.items() if name not in ("architectures", "model_type")},
        "vocab_size": vocab_size,
        "dtype": dtype,
        "torch_dtype": dtype,  # read by transformers before version 5
    }


def _template(directory: Path) -> PublishedConfig | None:
    """Return the ``config.json`` beside the tokenizer, from which the model was imported or started."""
    return PublishedConfig.read(directory, "--tokenizer-model") if (directory / CONFIG_FILE).is_file() else None


def _vocab_size(source: CheckpointSource, config: RunConfig, tokenizer: TokenizerSource, store: TensorStore) -> int:
    """Return the number of tokens: embeddings of the model without its padding."""
    if isinstance(source, NativeSource):
        return max(source.manifest().tokenizer["vocab_size"], config.model.vocab_size or 0)
    embeddings = store.describe(weight_prefix(store.keys()) + EMBEDDINGS)
    rows = len(embeddings) if embeddings is not None else 0
    known = config.model.vocab_size or tokenizer.vocab_size
    if known > rows:
        raise ConfigError(
            f"{LOAD_FLAG}: {EMBEDDINGS} in {source.directory} has {rows:,} rows, and the tokenizer has {known:,} "
            "tokens. Give the tokenizer of the model with --tokenizer-model."
        )
    return known or rows


def _groups(store: TensorStore, family: Family, config: RunConfig, vocab_size: int, job: ExportJob) -> Iterator[Group]:
    """Yield the tensors of the model by layer.

    Raises:
        ConfigError: the checkpoint lacks a tensor, or has one that the family does not.
    """
    dtype = DTYPES[job.dtype] if job.dtype is not None else None
    ordered = []
    saved = store.keys()
    prefix = weight_prefix(saved)
    left = {key for key in saved if key.startswith(tuple(prefix + part for part in MODEL_PARTS))}
    for position, weight in enumerate(family.weights(config.model)):
        names = [prefix + name for name in (weight.key, *weight.aliases)]
        left.difference_update(names)
        key = next((name for name in names if store.describe(name) is not None), None)
        if key is None:
            raise ConfigError(
                f"{LOAD_FLAG}: the checkpoint {store.directory} lacks {weight.key}, which its model settings imply."
            )
        for unit in weight.units(config.model):
            ordered.append(((unit[:1] or (-1,), position, unit), key, weight))
    if left:
        raise ConfigError(
            f"{LOAD_FLAG}: the checkpoint {store.directory} contains {', '.join(sorted(left)[:SHOWN])}, and models of "
            f"the type {family.model_type} do not."
        )
    for (_, _, unit), key, weight in sorted(ordered, key=lambda entry: entry[0]):
        like = store.describe(key)
        assert like is not None
        entry = torch.empty(like.shape[len(unit) :], dtype=dtype or like.dtype, device="meta")
        yield Group(
            names=tuple(weight.published_names(unit)),
            like=tuple(_split(weight, entry, vocab_size)),
            compute=partial(_compute, store, key, weight, unit, vocab_size),
        )


def _compute(store: TensorStore, key: str, weight: Weight, unit: tuple[int, ...], vocab_size: int) -> list[Tensor]:
    return _split(weight, store.read(key, unit), vocab_size)


def _split(weight: Weight, tensor: Tensor, vocab_size: int) -> list[Tensor]:
    """Return the published tensors, without the padding of the vocabulary."""
    return weight.layout.split(tensor[:vocab_size] if weight.is_vocabulary else tensor)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
