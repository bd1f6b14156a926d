"""Test that pickles cannot misuse the classes and functions that checkpoints may name."""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_slm.checkpoint.weights import explained_load
from megatron_slm.mcore.pickle_classes import UnsafePickleError, load_with_placeholders
from megatron_slm.mcore.pickles import restricted_loads
from megatron_slm.runtime.errors import ConfigError

START = b"\x80\x05"
READERS: tuple[Callable[[bytes], Any], ...] = (
    restricted_loads,
    lambda content: load_with_placeholders(content, "x.pt"),
)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def with_attribute(owner: bytes, name: str, value: bytes) -> bytes:
    """Return opcodes that set an attribute, as the state of an object with slots."""
    return owner + b"N}" + text(name) + value + b"s\x86b"


@pytest.mark.parametrize("name", ["argparse.Namespace", "pathlib.PosixPath"])
@pytest.mark.parametrize("attribute", ["open", "__init__", "__name__"])
def test_classes_cannot_be_changed(name: str, attribute: str) -> None:
    module, _, kind = name.rpartition(".")
    before = [dict(vars(each)) for each in (argparse.Namespace, pathlib.PosixPath)]
    for read in READERS:
        value = text("other") if attribute == "__name__" else named("builtins", "set")
        content = START + with_attribute(named(module, kind), attribute, value)
        for end in (b".", b"0cos\nsystem\n."):  # with an error after the change
            with pytest.raises(UnsafePickleError, match=name if end == b"." else "os.system"):
                read(content + end)
        assert [dict(vars(each)) for each in (argparse.Namespace, pathlib.PosixPath)] == before
        assert argparse.Namespace.__name__ == "Namespace"


def test_functions_and_enumeration_members_cannot_be_changed() -> None:
    function = named("torch._utils", "_rebuild_parameter")
    for each in (function, named("numpy.core.multiarray", "_reconstruct")):
        for content in (with_attribute(each, "__defaults__", b")"), each + b"}" + text("mark") + b"K\x01sb"):
            with pytest.raises(TypeError, match="partial state"):
                restricted_loads(START + content + b".")
        restricted_loads(START + each + b"(" + named("builtins", "set") + b")}}tb.")  # the state of a partial function
    assert restricted_loads(pickle.dumps(np.ones(1), 2)) == 1
    member = named("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING") + b"K\x00\x85R"
    with pytest.raises(UnsafePickleError, match="_MEM_FORMAT_ENCODING"):
        restricted_loads(START + with_attribute(member, "_value_", b"K\x01") + b".")
    assert _MEM_FORMAT_ENCODING(0).value == 0 and not hasattr(torch._utils._rebuild_parameter, "mark")


def test_arrays_hold_numbers_only() -> None:
    """An array of objects from bytes would contain forged addresses."""
    for array in (np.arange(6, dtype=">u4").reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array(True)):
        found = restricted_loads(pickle.dumps(array, 2))
        assert found.dtype == array.dtype.newbyteorder("=") and np.array_equal(found, array)
    for array in (np.array([{}]), np.zeros(1, "V8"), np.zeros(1, "i8,O"), np.array(["text"]), np.zeros(1, "M8[s]")):
        with pytest.raises(pickle.UnpicklingError, match="other values than numbers"):
            restricted_loads(pickle.dumps(array, 2))
    forged = named("numpy", "ndarray") + b"K\x01\x85" + text("O") + b"C\x08AAAAAAAA\x87R."
    for read in READERS:
        assert type(read(START + forged)).__module__ == "placeholder.numpy"


def test_files_of_early_torch_versions_are_refused(tmp_path: Path) -> None:
    """Their reader writes a patch beside a path that the pickle chooses, if a class has other source code."""
    mark = tmp_path / "mark"
    header = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    kind = named("argparse", "Namespace")
    change = with_attribute(with_attribute(kind, "dump_patches", b"\x88"), "__name__", text(str(mark)))
    body = START + change + b"0(" + text("module") + kind + text("file") + text("code") + b"tQ."
    content = b"".join([*(pickle.dumps(each, 2) for each in header), body, pickle.dumps([])])
    (tmp_path / "common.pt").write_bytes(content)
    for file in (tmp_path / "common.pt", io.BytesIO(content)):
        with pytest.raises(ConfigError, match=r"is not an archive of torch\.save"), explained_load(tmp_path, "--load"):
            torch.load(file, weights_only=False)
    assert not list(tmp_path.glob("mark*"))


@pytest.mark.parametrize(
    "content",
    [
        b"\x96" + struct.pack("<Q", 1 << 44),  # a bytearray of 16 TiB
        b"\x8e" + struct.pack("<Q", 1 << 60),  # bytes beyond the end
        named("_codecs", "encode") + text("a") + text("os.path") + b"\x86R",
        text("tag") + b"Q",  # a tensor without a location
        b"\x82\x01",  # an extension code
        b"\x81",
    ],
)
def test_absurd_content_is_reported_as_damage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "common.pt"
    with ZipFile(path, "w") as archive:
        archive.writestr("common/data.pkl", START + content + b".")
        archive.writestr("common/version", "3")
    message = r"--load: the checkpoint .* (is damaged|does not match)"
    with pytest.raises(ConfigError, match=message), explained_load(tmp_path, "--load"):
        torch.load(path, weights_only=False)
