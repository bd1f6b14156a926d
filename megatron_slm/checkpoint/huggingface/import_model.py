"""Import a published model as a checkpoint of this trainer, one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.checkpoint.huggingface.files import CONFIG_FILE
from megatron_slm.checkpoint.huggingface.load import PublishedModel
from megatron_slm.checkpoint.huggingface.source import HuggingFaceSource, tokenizer_settings
from megatron_slm.checkpoint.huggingface.tokenizer_files import copy_files, present_files
from megatron_slm.checkpoint.tensor_store import Piece, write_tensors
from megatron_slm.config.checkpoint_files import (
    CONFIG_FILE as RUN_CONFIG_FILE,
)
from megatron_slm.config.checkpoint_files import TRACKER, Manifest, file_sizes, step_directory
from megatron_slm.config.paths import TOKENIZER_DIRECTORY
from megatron_slm.config.recipe import dump_config, with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.model.size import padded_vocab_size
from megatron_slm.runtime.checksums import file_checksums, text_checksum
from megatron_slm.runtime.console import BYTES
from megatron_slm.runtime.console import progress as progress_bar
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import explained_write, free_space, sync, write_text
from megatron_slm.tokenizers.identity import tokenizer_identity
from megatron_slm.tokenizers.tokenizer import build_run_tokenizer

HF_FLAG = "--hf-path"


def import_model(path: str, save: str) -> Path:
    """Write the weights, settings and tokenizer of a published model to ``save``; return the checkpoint directory.

    The checkpoint has step 0 and no optimizer state. Weights keep their precision.

    Raises:
        ConfigError: the model cannot be read or represented, ``save`` is not empty, or the disk is full.
    """
    source = HuggingFaceSource.find(path, None, HF_FLAG)
    if not source.recognizes(source.directory, None):
        raise ConfigError(f"{HF_FLAG} {path} contains no {CONFIG_FILE}. Specify the directory of a published model.")
    root = Path(save)
    check_empty(root, "--save")
    source.check()
    if tokenizer_settings(source.directory):
        source.tokenizer()  # complete, since it is copied
    final = step_directory(root, 0)
    partial_directory = final.with_name(f"{final.name}.partial")
    try:
        with explained_write(save, "--save"):
            _write(source, root, partial_directory)
            partial_directory.rename(final)
            sync(root)
    except BaseException:
        for directory in (partial_directory, root / TOKENIZER_DIRECTORY):
            shutil.rmtree(directory, ignore_errors=True)
        raise
    write_text(root / TRACKER, "0\n", "--save")
    return final


def _write(source: HuggingFaceSource, root: Path, directory: Path) -> None:
    """Write a complete checkpoint to ``directory``, and the tokenizer beside it."""
    directory.mkdir(parents=True)
    _copy_files(source.directory, root / TOKENIZER_DIRECTORY)
    config = _run_config(source, root)
    with PublishedModel(source) as published:
        _write_weights(published, directory)
    write_text(directory / RUN_CONFIG_FILE, dump_config(config), "--save")
    _manifest(config, directory).write(directory, text_checksum)
    for name in file_sizes(directory):
        sync(directory / name)


def check_empty(directory: Path, flag: str) -> None:
    """Raise ConfigError unless ``directory`` is missing or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{flag} {directory} exists and is not empty. Choose another directory.")


def check_space(directory: Path, size: int, flag: str) -> None:
    """Raise ConfigError if the disk reports less free space than ``size`` bytes."""
    free = free_space(directory)
    if free is not None and free < size:
        raise ConfigError(
            f"{flag} {directory.parent}: the weights take {size / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB "
            "free. Free space, or choose another disk."
        )


def _copy_files(source: Path, destination: Path) -> None:
    """Copy the tokenizer, and the fields of config.json that are not settings here, for a later export."""
    destination.mkdir()
    copy_files({CONFIG_FILE: source / CONFIG_FILE, **present_files(source)}, destination)


def _run_config(source: HuggingFaceSource, root: Path) -> RunConfig:
    config = with_settings(source.config(), tokenizer_settings((root / TOKENIZER_DIRECTORY).resolve()))
    return replace(config, checkpoint=replace(config.checkpoint, save_optim=False, save_rng=False))


def _write_weights(published: PublishedModel, directory: Path) -> None:
    pieces = list(_pieces(published))
    size = sum(piece.dtype.itemsize * torch.Size(piece.shape).numel() for piece in pieces)
    check_space(directory, size, "--save")
    with progress_bar(f"importing {published.directory.name}", size, BYTES) as bar:

        def read(piece: Piece) -> Tensor:
            bar.advance(piece.dtype.itemsize * torch.Size(piece.shape).numel())
            return piece.read()

        write_tensors([replace(piece, read=partial(read, piece)) for piece in pieces], directory, _common())


def _common() -> dict[str, Any]:
    return {"iteration": 0}


def _pieces(published: PublishedModel) -> Iterator[Piece]:
    model = published.model
    for weight in published.weights:
        like, axes = published.describe(weight), weight.axes(model)
        shape = tuple(like.shape)
        if weight.is_vocabulary:
            shape = (padded_vocab_size(model, shape[0], 1), *shape[1:])
        for unit in weight.units(model):
            read = partial(_padded, published, weight, unit, shape)
            yield Piece(weight.key, axes, unit, shape, like.dtype, read)


def _padded(published: PublishedModel, weight: Any, unit: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Return one entry, with zeros for the padding of the vocabulary."""
    tensor = published.read(weight, unit)
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[: tensor.shape[0]] = tensor
    return padded


def _manifest(config: RunConfig, directory: Path) -> Manifest:
    sizes = file_sizes(directory)
    names = list(sizes)
    checksums = file_checksums([directory / name for name in names], "--save", just_written=True)
    has_tokenizer = config.tokenizer.tokenizer_type is not None
    unknown = {"name": "unknown tokenizer", "fingerprint": "", "vocab_size": config.model.vocab_size}
    return Manifest(
        step=0,
        consumed_samples=0,
        tokenizer=tokenizer_identity(build_run_tokenizer(config)) if has_tokenizer else unknown,
        layout={"tensor": 1, "pipeline": 1, "data": 1},
        files=sizes,
        checksums=dict(zip(names, checksums, strict=True)),
    )
