"""Combinations of recipes that examples/recipes/README.md lists: dry runs, parameter counts, layouts and memory."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.config import layers
from megatron_slm.config.checks import derive, resolve
from megatron_slm.config.flags import parse
from megatron_slm.model.size import padded_vocab_size, parameter_count
from megatron_slm.planning.devices import DEVICES
from megatron_slm.planning.layout import Layout
from megatron_slm.planning.memory import peak_memory
from megatron_slm.reference import replica
from megatron_slm.testing.chat import make_examples
from megatron_slm.training import setup
from megatron_slm.training.preflight import resolve_values

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
README = (RECIPES / "README.md").read_text(encoding="utf-8")
H100 = DEVICES["h100"]


def rows(heading: str) -> Iterator[list[list[str]]]:
    """Yield the rows of the table of a section, each cell as a list."""
    table = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for line in re.findall(r"^\| ([^-].*) \|$", table, re.MULTILINE)[1:]:
        yield [cell.split(", ") for cell in line.split(" | ")]


def combinations() -> list[tuple[str, str, str, str]]:
    return [each for row in rows("Tested combinations") for each in itertools.product(*row)]


def recipes(model: str, run: str, cluster: str, reference: Path) -> list[str]:
    """Return the flags of a combination."""
    names = [f"models/{model}", *(f"runs/{name}" for name in run.split(" + "))]
    names += [f"clusters/{name}" for name in cluster.split(" + ")]
    needs_reference = run.startswith("slm")
    files = [str(RECIPES / f"{name}.yaml") for name in names]
    return ["--config", *files, *(["--reference-load", str(reference)] if needs_reference else [])]


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read each file once, which takes most of the time."""
    read = functools.cache(layers.read_recipe)
    monkeypatch.setattr(layers, "read_recipe", lambda path: dict(read(path)))


def test_every_recipe_is_listed_or_a_base() -> None:
    files = {f"{path.parent.name}/{path.stem}" for path in RECIPES.rglob("*.yaml") if "laptop" not in path.stem}
    listed = {f"models/{name}" for row in rows("Models") for name in row[0]}
    listed |= {f"runs/{name}" for row in rows("Runs") for name in row[0]}
    listed |= {f"clusters/{name}" for *_, cluster, _ in combinations() for name in cluster.split(" + ")}
    bases = {"models/llama", "runs/pretraining", "runs/1b", "runs/7b", "runs/general"}
    sentence = README.split("in one file: ")[1].split(".\n")[0]
    complete = {f"runs/{name}" for name in sentence.split(", ")}
    assert files == listed | bases | complete
    assert all(parse(["--config", str(RECIPES / f"{name}.yaml")]).config.model.num_layers for name in complete)
    used = {f"runs/{name}" for _, run, *_ in combinations() for name in run.split(" + ")}
    assert used | {f"models/{model}" for model, *_ in combinations()} == {
        name for name in listed if not name.startswith("clusters")
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("runs/laptop-*.yaml")), ids=lambda path: path.stem)
def test_laptop_recipes_are_complete_runs_of_one_process(path: Path) -> None:
    missing = ["--data-path", "corpus", "--tokenizer-model", "model"]  # named in the files
    missing += ["--slm-score", "token-loss"] if path.stem == "laptop-slm" else []  # instead of a reference model
    config = resolve(parse(["--config", str(path), *missing]).config, world_size=1)
    model, training = config.model, config.training
    assert config.objective.objective == path.stem.removeprefix("laptop-").replace("reference", "clm")
    assert f"{training.global_batch_size * model.seq_length:,} tokens" in path.read_text(encoding="utf-8")
    assert parameter_count(model, 32_000) < 20e6, "two CPU cores train it in minutes"


@pytest.mark.parametrize(("names", "count"), list(rows("Models")))
def test_parameter_count_is_the_published_one(names: list[str], count: list[str]) -> None:
    path = RECIPES / "models" / f"{names[0]}.yaml"
    assert f"# {count[0]} parameters: huggingface.co/" in path.read_text(encoding="utf-8")
    model = derive(parse(["--config", str(path)]).config).model
    assert model.vocab_size is not None
    for tensor in (1, 2, 4, 8):
        padded = padded_vocab_size(model, model.vocab_size, tensor)
        assert padded == model.vocab_size and f"{parameter_count(model, padded):,}" == count[0]


def test_combinations_fit_their_gpus(tmp_path: Path) -> None:
    for model, run, cluster, gpus in combinations():
        config = resolve_values(
            parse([*recipes(model, run, cluster, tmp_path), "--data-path", "corpus"]).config, int(gpus)
        )
        tokens = config.training.global_batch_size * config.model.seq_length
        assert tokens == 2**20 or run.startswith("sft")
        assert config.parallel.tensor_model_parallel_size <= 8
        memory = peak_memory(Layout(config, int(gpus), config.model.vocab_size or 0, H100))
        assert memory.total <= H100.usable, f"{model}, {run}, {cluster}, {gpus} GPUs: {memory}"


def test_dry_run_accepts_every_combination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make_examples(tmp_path / "chat", [{"prompt": "a", "completion": "b"}])
    monkeypatch.setattr(replica, "check_reference", lambda *_, **options: None)  # there is no reference model
    monkeypatch.setattr(setup, "reference_identity", lambda *_: "rm")
    files = ["--tokenizer-type", "ByteTokenizer", "--data-path", corpus, "--split", "1,0,0"]
    published = {names[0]: count[0] for names, count in rows("Models")}
    for model, run, cluster, gpus in combinations():
        argv = [*recipes(model, run, cluster, tmp_path), *files, "--dry-run", "--world-size", gpus]
        assert main(argv) == 0, f"{model}, {run}, {cluster}, {gpus} GPUs: {capsys.readouterr().err}"
        output = capsys.readouterr().out
        assert re.search(rf" {published[model]} +│", output) and f"= {gpus} processes" in output
        assert ("this machine cannot run it: FP8" in output) == ("fp8" in cluster)
