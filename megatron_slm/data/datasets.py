"""Training and validation datasets: Megatron-Core's GPT dataset over blends of ``.bin/.idx`` corpora."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import Dataset

from megatron_slm.config.schema import DataConfig
from megatron_slm.data.blends import Blend, Drawn, drawn, parse_blend
from megatron_slm.data.corpus import check_corpus, check_tokenizer
from megatron_slm.data.parts import check_parts, split_of, wants_split
from megatron_slm.data.tokenizers.tokenizer import Tokenizer
from megatron_slm.runtime.errors import ConfigError


@dataclass(frozen=True)
class Datasets:
    """Samples to train on, and named sets to evaluate on."""

    train: Dataset
    valid: dict[str, Dataset]
    drawn: Callable[[], list[Drawn]] = list  # what the run takes from each corpus; reads the lengths of all documents


def blends(data: DataConfig) -> dict[str, Blend]:
    """Every blend of the run, by the flag that gives it.

    Raises:
        ConfigError: weights that cannot be.
    """
    words = {"--data-path": data.data_path, "--train-data-path": data.train_data_path}
    words |= {f"--valid-data-path {name}": words for name, words in data.valid_data_path.items()}
    return {flag: parse_blend(given, flag) for flag, given in words.items() if given}


def check_corpora(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuse a missing, damaged or foreign corpus, and one made with another tokenizer, before work begins."""
    for flag, (prefixes, weights) in blends(data).items():
        for prefix in prefixes:
            check_corpus(prefix, flag)
            check_tokenizer(prefix, tokenizer, flag)
        whole = data.full_validation and not (flag == "--data-path" and data.valid_data_path)
        if whole and weights is not None and flag != "--train-data-path":
            raise ConfigError(
                f"--full-validation takes all of a set once, so that the weights of {flag} cannot hold. Leave out the "
                "weights, or --full-validation."
            )


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
    check_parts(data, valid_samples=valid_samples, seq_length=seq_length)
    blend = parse_blend(data.train_data_path or data.data_path)
    if data.train_data_path:
        train = build([blend, None, None], [train_samples, 0, 0])[0]
    else:
        want_split = wants_split(data, valid_samples)
        sizes = [train_samples, valid_size if want_split else 0, 0]
        train, held_out, _ = build(blend, sizes, split=split_of(data, valid_samples))
        if want_split and held_out is not None:
            valid["valid"] = held_out
    if train is None:
        raise ConfigError("the training split is empty. Check --data-path and --split.")
    _check_size(train, train_samples, blend)
    reports = [partial(drawn, "train", train, blend, train_samples, seq_length)]
    for name, words in data.valid_data_path.items():
        own = parse_blend(words)
        built = build([None, own, None], [0, valid_size, 0])[1]
        if built is None or not len(built):  # type: ignore[arg-type]
            raise ConfigError(f"--valid-data-path {name}: the corpus gives no sample of {seq_length} tokens.")
        valid[name] = built
        if len(own[0]) > 1:
            size: int = len(built)  # type: ignore[arg-type]
            reports.append(partial(drawn, name, built, own, min(size, valid_size or size), seq_length))
    return Datasets(train, valid, lambda: [row for report in reports for row in report()])


def _check_size(train: Dataset, wanted: int, blend: Blend) -> None:
    """Several corpora without weights are read once, so that a long run would end in the middle."""
    size: int = len(train)  # type: ignore[arg-type]
    if size < wanted:
        raise ConfigError(
            f"the {len(blend[0])} corpora hold {size:,} samples in one epoch, and the run takes {wanted:,}. Corpora "
            "without weights are read once: give weights (--data-path W1 P1 W2 P2), or fewer --train-iters."
        )


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
    if split is not None:  # parts that nobody reads are not built: of an empty one it would never make an end
        config.split_matrix = [
            None if size == 0 else part for part, size in zip(config.split_matrix, sizes, strict=True)
        ]
    try:
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    except PermissionError as error:
        raise ConfigError(
            f"the sample indices cannot be written to {error.filename}: {error.strerror}. "
            "Give a folder that can be written with --data-cache-path."
        ) from error
