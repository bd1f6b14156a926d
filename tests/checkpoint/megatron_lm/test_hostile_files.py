"""Test that no pickle in a checkpoint of Megatron-LM runs code, and that damage and other formats are refused."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_slm.checkpoint.adoption import adopt_settings
from megatron_slm.checkpoint.megatron_lm.source import MegatronSource
from megatron_slm.checkpoint.optimizer_state import check_slices
from megatron_slm.checkpoint.source import find_source
from megatron_slm.config.flags import parse
from megatron_slm.mcore.pickle_classes import trust_checkpoints
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.megatron_models import command
from megatron_slm.testing.tiny import run_each
from megatron_slm.training.fallback import verified_start
from megatron_slm.training.preflight import resolve_values
from megatron_slm.training.start import plan_start


class Attack:
    """Serialize as a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def pickled(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def replace_object(directory: Path, prefix: str, content: Any) -> None:
    """Append an object to a data file, and reference it in the metadata instead of the original."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.startswith(prefix))
    info = metadata.storage_data[index]
    data, content = directory / info.relative_path, pickled([content])
    info.offset, info.length = data.stat().st_size, len(content)
    data.write_bytes(data.read_bytes() + content)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_common(directory: Path, **entries: Any) -> None:
    path = directory / "common.pt"
    path.write_bytes(pickled({"args": Namespace(), "iteration": 3, **entries}))


@pytest.fixture
def copied(recorded: Path, tmp_path: Path) -> Path:
    """Return a directory with copies of all recorded checkpoints."""
    return Path(shutil.copytree(recorded, tmp_path / "copies", ignore=shutil.ignore_patterns("runs")))


def checkpoint(copied: Path, name: str) -> Path:
    return copied / name / "iter_0000003"


def found(copied: Path, name: str) -> MegatronSource:
    source = find_source(str(copied / name), None, "--load")
    assert isinstance(source, MegatronSource)
    return source


def test_files_that_are_read_at_the_start_do_not_run_code(copied: Path) -> None:
    mark = copied / "mark"
    replace_common(checkpoint(copied, "gpt"), args=Attack(mark))
    replace_object(checkpoint(copied, "llama"), "common_state/", {"args": Attack(mark)})
    (checkpoint(copied, "moe") / ".metadata").write_bytes(pickle.dumps(Attack(mark)))
    for name, file in (("gpt", r"common\.pt"), ("llama", r"\.distcp"), ("moe", r"\.metadata")):
        for read in (MegatronSource.check, MegatronSource.config):
            with pytest.raises(ConfigError, match=rf"--load: .*{file} holds posix\.system.*--trust-checkpoint"):
                read(found(copied, name))
    assert not mark.exists()


def test_objects_of_data_files_do_not_run_code(copied: Path) -> None:
    """Runs read the optimizer's objects, and no random states or extra states of other trainers."""
    mark = copied / "mark"
    places = {"llama": "optimizer.distributed", "llama-twin": "rng_state/", "moe": "decoder.layers.mlp.experts"}
    for name, prefix in places.items():
        replace_object(checkpoint(copied, name), prefix, Attack(mark))
    replace_common(checkpoint(copied, "gpt"), args=Namespace(share=Fraction(1, 3)))
    outcomes = run_each(
        command("llama", load=copied / "llama", use_distributed_optimizer=True),
        command("llama", load=copied / "llama-twin", use_distributed_optimizer=True),
        command("moe", load=copied / "moe", finetune=True, train_iters=2),
        command("gpt", load=copied / "gpt", finetune=True, train_iters=2),
        command("gpt", load=copied / "gpt", finetune=True, train_iters=2, trust_checkpoint=True),
    )
    assert [outcome.code for outcome in outcomes] == [2, 0, 0, 2, 0], [outcome.errors for outcome in outcomes]
    assert "holds posix.system" in outcomes[0].errors and "--trust-checkpoint" in outcomes[0].errors
    assert "holds fractions.Fraction" in outcomes[3].errors
    assert not mark.exists()


def test_placeholders_stay_inert_in_trusted_checkpoints(copied: Path) -> None:
    mark = copied / "mark"
    replace_common(checkpoint(copied, "gpt"), args=Attack(mark))
    try:
        trust_checkpoints(True)
        assert found(copied, "gpt").arguments == {"arguments": (f"touch '{mark}'",), "state": {}}
    finally:
        trust_checkpoints(False)
    assert not mark.exists()


def test_legacy_format_is_refused_with_the_conversion_command(copied: Path) -> None:
    mark, directory = copied / "mark", checkpoint(copied, "gpt")
    shutil.rmtree(directory)
    (directory / "mp_rank_00").mkdir(parents=True)
    (directory / "mp_rank_00" / "model_optim_rng.pt").write_bytes(pickled(Attack(mark)))
    for path in (copied / "gpt", directory):
        with pytest.raises(ConfigError, match=r"format torch of Megatron-LM.*--ckpt-convert-format torch_dist"):
            find_source(str(path), None, "--load")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_cut_and_missing_files_are_named(copied: Path, name: str) -> None:
    data = checkpoint(copied, name) / "__1_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"is damaged: __1_0\.distcp has \d+ bytes, and at least \d+ bytes"):
        found(copied, name).check()
    data.unlink()
    with pytest.raises(ConfigError, match=r"is damaged: __1_0\.distcp is missing"):
        found(copied, name).check()
    for file in (".metadata", "metadata.json"):
        (checkpoint(copied, name) / file).write_bytes(b"\x80\x04broken")
        with pytest.raises(ConfigError, match="is damaged"):
            MegatronSource("--load", checkpoint(copied, name)).check()


def test_files_outside_of_the_checkpoint_are_refused(copied: Path) -> None:
    path = checkpoint(copied, "gpt") / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=r"names '\.\./\.\./secret', which is no file of the checkpoint"):
        found(copied, "gpt").check()


def test_newest_intact_step_is_used(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damage is in a data file, or in the arguments, which --use-checkpoint-args and the plan read first."""
    run = copied / "gpt"
    for step in (1, 2):
        shutil.copytree(checkpoint(copied, "gpt"), run / f"iter_000000{step}")
    for name, use in (("__0_0.distcp", "iter_0000002"), ("common.pt", "iter_0000002")):
        (checkpoint(copied, "gpt") / name).write_bytes(b"")
        for flags in ({}, {"use_checkpoint_args": True}, {"finetune": True}):
            argv = command("gpt", load=run, use_distributed_optimizer=True, **flags)
            config = resolve_values(parse(argv, adopt_settings).config, 1)
            start = verified_start(plan_start(config), config)
            assert start.checkpoint is not None and start.checkpoint.directory == run / use
            assert "Using step 2, the newest intact checkpoint" in " ".join(capsys.readouterr().err.split())
    for flags in ({"load": run, "ckpt_step": 3}, {"load": run / "iter_0000003"}):
        with pytest.raises(ConfigError, match=r"iter_0000003 is damaged"):
            config = resolve_values(parse(command("gpt", **flags), adopt_settings).config, 1)
            verified_start(plan_start(config), config)


def test_other_formats_are_refused(copied: Path) -> None:
    (checkpoint(copied, "gpt") / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ConfigError, match="is in the format zarr"):
        found(copied, "gpt").check()
    (checkpoint(copied, "llama") / "metadata.json").unlink()
    with pytest.raises(ConfigError, match="torch_dcp or fsdp_dtensor"):
        find_source(str(copied / "llama"), None, "--load")


def test_optimizer_state_in_slices_is_refused() -> None:
    """A format of earlier versions, in which ranks save slices of flattened parameters."""
    key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    request = {"state": {0: ShardedTensor.from_rank_offsets(key, torch.ones(4))}}
    check_slices(request, {key: (4,)}, "--load")
    with pytest.raises(ConfigError, match=r"is \[1, 4\] in the checkpoint .* fully_sharded_model_space.*no-load-optim"):
        check_slices(request, {key: (1, 4)}, "--load")
