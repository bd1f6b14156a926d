"""Training and validation datasets: Megatron-Core's GPT dataset over blends of ``.bin/.idx`` corpora."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import Dataset

from megatron_slm.config.schema import DataConfig
from megatron_slm.data.corpus import check_corpus, check_tokenizer
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.runtime.errors import ConfigError

DEFAULT_SPLIT = "969, 30, 1"  # Megatron-LM's
Blend = tuple[list[str], list[float] | None]


@dataclass(frozen=True)
class Datasets:
    """Samples to train on, and named sets to evaluate on."""

    train: Dataset
    valid: dict[str, Dataset]


def parse_blend(words: Sequence[str]) -> Blend:
    """Prefixes and weights from the words of ``--data-path``, by Megatron-LM's rule: pairs of weight and prefix
    where every second word is a number, else prefixes alone."""
    if len(words) % 2 == 0:
        try:
            return list(words[1::2]), [float(word) for word in words[0::2]]
        except ValueError:
            pass  # not a blend with weights: a list of prefixes
    return list(words), None


def corpora(data: DataConfig) -> list[tuple[str, str]]:
    """(flag, prefix) of every corpus that the run reads."""
    found = [("--data-path", prefix) for prefix in parse_blend(data.data_path)[0]]
    found += [("--train-data-path", prefix) for prefix in parse_blend(data.train_data_path)[0]]
    for name, words in data.valid_data_path.items():
        found += [(f"--valid-data-path {name}", prefix) for prefix in parse_blend(words)[0]]
    return found


def check_corpora(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuse a missing, damaged or foreign corpus, and one made with another tokenizer, before work begins."""
    for flag, prefix in corpora(data):
        check_corpus(prefix, flag)
        check_tokenizer(prefix, tokenizer, flag)


def build_datasets(
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
) -> Datasets:
    """Build, or read from the cache, the sample indices of all datasets. Collective over all ranks.

    Args:
        train_samples: samples of the whole run; the corpus is repeated as often as it takes.
        valid_samples: samples of one evaluation of each set; with --full-validation one epoch is taken instead.
        seed: of the order of documents and samples.

    Raises:
        ConfigError: the cache folder cannot be written, or a split is empty.
    """
    build = partial(_build, data, tokenizer=tokenizer, seq_length=seq_length, seed=seed)
    valid_size = None if data.full_validation else valid_samples
    valid: dict[str, Dataset] = {}
    if data.train_data_path:
        train = build([parse_blend(data.train_data_path), None, None], [train_samples, 0, 0])[0]
    else:
        want_split = not data.valid_data_path and valid_samples > 0
        sizes = [train_samples, valid_size if want_split else 0, 0]
        split = data.split or (DEFAULT_SPLIT if want_split else "1, 0, 0")
        train, held_out, _ = build(parse_blend(data.data_path), sizes, split=split)
        if want_split and held_out is not None:
            valid["valid"] = held_out
    if train is None:
        raise ConfigError("the training split is empty. Check --data-path and --split.")
    for name, words in data.valid_data_path.items():
        built = build([None, parse_blend(words), None], [0, valid_size, 0])[1]
        if built is None:
            raise ConfigError(f"--valid-data-path {name}: the corpus gives no sample of {seq_length} tokens.")
        valid[name] = built
    return Datasets(train, valid)


def _build(
    data: DataConfig,
    blend: Blend | list[Blend | None],
    sizes: list[int | None],
    *,
    tokenizer: Tokenizer,
    seq_length: int,
    seed: int,
    split: str | None = None,
) -> list[Dataset | None]:
    where = {"blend": blend, "split": split} if isinstance(blend, tuple) else {"blend_per_split": blend}
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        path_to_cache=data.data_cache_path,
        tokenizer=tokenizer,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=data.reset_attention_mask,
        **where,
    )
    try:
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    except PermissionError as error:
        raise ConfigError(
            f"the sample indices cannot be written to {error.filename}: {error.strerror}. "
            "Give a folder that can be written with --data-cache-path."
        ) from error
