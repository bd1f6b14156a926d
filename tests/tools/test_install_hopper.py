"""Installation from a directory of wheels: a plan without network access, and a message for everything wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from pip._vendor.packaging.tags import parse_tag
from pip._vendor.packaging.version import Version

ROOT = Path(__file__).parents[2]
TAG, OTHER_TAG = "cp312-cp312-linux_x86_64", "cp311-cp311-linux_x86_64"
ENGINE = "transformer-engine[pytorch]>=2.2"
TORCH_ABI = b"\0libtorch.so\0_ZN3c105ErrorC2ERKNSt7__cxx1112basic_stringE\0"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("install_hopper", ROOT / "tools" / "install_hopper.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def wheel(
    directory: Path,
    name: str,
    version: str,
    *requires: str,
    tag: str = "py3-none-any",
    library: bytes | None = None,
    python: str = ">=3.10",
) -> Path:
    """Write a wheel with metadata, and optionally a shared library."""
    path = directory / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: {python}",
            *(f"Requires-Dist: {each}" for each in requires),
        ]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))
        archive.writestr(f"{name}-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "")
        if library is not None:
            archive.writestr(f"{name}/lib.so", library)
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Return a directory with Transformer Engine and its parts."""
    wheel(
        tmp_path,
        "transformer_engine",
        "2.20.2",
        "transformer_engine_torch==2.20.2; extra == 'pytorch'",
        "missing; extra == 'jax'",
    )
    requires = ("torch>=2.1", "transformer_engine_cu13==2.20.2", "old; python_version < '3'")
    library = b"libcudart.so.13" + TORCH_ABI
    wheel(tmp_path, "transformer_engine_torch", "2.20.2", *requires, tag=TAG, library=library)
    wheel(tmp_path, "transformer_engine_cu13", "2.20.2", library=b"\0libcudart.so.13\0")
    return tmp_path


def environment(tool: Any, **changes: Any) -> Any:
    tags = frozenset(parse_tag(TAG) | parse_tag("py3-none-any"))
    known = {"torch": Version("2.11.0a0+abc.nv26"), "setuptools": Version("80")}
    return replace(tool.Environment(tags, known, "13.1", True), **changes)


def plan(tool: Any, directory: Path, *requirements: str, **changes: Any) -> Any:
    found, problems = tool.read_wheels(directory)
    assert not problems
    return tool.make_plan(requirements or (ENGINE, "torch>=2.11.0a0"), found, environment(tool, **changes))


def test_complete_directory(tool: Any, wheels: Path) -> None:
    found = plan(tool, wheels)
    assert sorted(found.wheels) == ["transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"]
    assert not found.problems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuda": "12.9"}, "was built for CUDA 13, and torch for CUDA 12.9"),
        ({"new_abi": False}, "was built with the C++11 ABI, and torch with the older C++ ABI"),
        ({"tags": frozenset(parse_tag(OTHER_TAG) | parse_tag("py3-none-any"))}, "is for another Python or platform"),
        ({"installed": {"torch": Version("2.9.0")}}, "torch>=2.11.0a0 (required by megatron_slm): 2.9.0 is installed"),
        ({"installed": {}}, "torch>=2.1 (required by transformer-engine-torch): there is no wheel"),
    ],
)
def test_unusable_wheels(tool: Any, wheels: Path, changes: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in plan(tool, wheels, **changes).problems)


def test_missing_and_old_wheels(tool: Any, wheels: Path) -> None:
    (wheels / "transformer_engine_cu13-2.20.2-py3-none-any.whl").unlink()
    wheel(wheels, "transformer_engine_cu13", "2.19.0")
    [problem] = plan(tool, wheels).problems
    assert problem.startswith(
        "transformer_engine_cu13==2.20.2 (required by transformer-engine-torch): the directory has 2.19"
    )
    assert "there is no wheel" in plan(tool, wheels, "xxhash").problems[0]


def test_installed_engine_needs_no_wheel(tool: Any, tmp_path: Path) -> None:
    """NVIDIA's images have Transformer Engine."""
    installed = {"torch": Version("2.11.0a0"), "transformer-engine": Version("2.11.0")}
    assert plan(tool, tmp_path, installed=installed) == tool.Plan()


def test_damaged_and_renamed_files(tool: Any, wheels: Path) -> None:
    path = wheels / f"transformer_engine_torch-2.20.2-{TAG}.whl"
    path.write_bytes(path.read_bytes()[:-30])
    (wheels / "engine.whl").write_bytes(b"")
    problems = tool.read_wheels(wheels)[1]
    assert any("engine.whl is not the name of a wheel" in problem for problem in problems)
    assert any(f"{path.name} is damaged" in problem for problem in problems)


def test_wheel_for_a_newer_python(tool: Any, wheels: Path) -> None:
    wheel(wheels, "xxhash", "3.5.0", python=">=3.99")
    [problem] = plan(tool, wheels, "xxhash").problems
    assert "xxhash-3.5.0-py3-none-any.whl is for another Python or platform" in problem


@pytest.mark.parametrize("python", ["3", ">= 3, nonsense"])
def test_odd_files(tool: Any, tmp_path: Path, python: str) -> None:
    """A directory, a broken link and unreadable metadata are damaged wheels, not tracebacks."""
    (tmp_path / "a-1-py3-none-any.whl").mkdir()
    (tmp_path / "b-1-py3-none-any.whl").symlink_to("missing")
    wheel(tmp_path, "c", "1", python=python)
    problems = tool.read_wheels(tmp_path)[1]
    assert [problem.partition(" is damaged")[0][0] for problem in problems] == ["a", "b", "c"]


def test_damaged_library(tool: Any, wheels: Path) -> None:
    path = wheels / "transformer_engine_cu13-2.20.2-py3-none-any.whl"
    path.write_bytes(path.read_bytes().replace(b"libcudart.so.13", b"libcudart.so.99"))
    [problem] = plan(tool, wheels).problems
    assert f"{path.name} is damaged (Bad CRC-32" in problem


def test_environment_without_a_cuda_torch(tool: Any) -> None:
    messages = list(tool.environment_problems(environment(tool, cuda=None), []))
    assert len(messages) == 1 and "is a build for CPUs" in messages[0]
    old = {"setuptools": Version("69")}
    assert "setuptools 77" in next(tool.environment_problems(environment(tool, installed=old), []))


def test_check_reports_everything_and_installs_nothing(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool.Environment, "current", staticmethod(lambda: environment(tool)))
    assert tool.main([str(tmp_path), "--check"]) == 2
    errors = capsys.readouterr().err
    assert "megatron-core>=0.16.1,<0.20" in errors.replace("<0.20,>=0.16.1", ">=0.16.1,<0.20") and ENGINE[:18] in errors
    assert tool.main([str(tmp_path / "none")]) == 2
    (tmp_path / "file").touch()
    assert tool.main([str(tmp_path / "file")]) == 2
    monkeypatch.setattr(tool, "PROJECT", tmp_path)  # without its source tree
    assert tool.main([str(tmp_path)]) == 2
    assert "pyproject.toml: No such file or directory" in capsys.readouterr().err


def test_collected_wheels_are_complete(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a machine with the same environment; an installed package, here NumPy, is not collected."""
    project, index, collected = (tmp_path / name for name in ("project", "index", "collected"))
    project.mkdir()
    index.mkdir()
    lines = ['[project]\nname = "megatron_slm"\nversion = "1"', 'dependencies = ["numpy"]']
    lines += [
        '[project.optional-dependencies]\nhopper = ["fake-engine[pytorch]>=2"]',
        "[tool.setuptools]\npackages = []",
    ]
    (project / "pyproject.toml").write_text("\n".join(lines), encoding="utf-8")
    wheel(index, "fake_engine", "2.1", "fake-engine-torch==2.1; extra == 'pytorch'\nProvides-Extra: pytorch")
    for name in ("fake_engine", "fake_engine_torch"):
        wheel(index, name, "2.1" if name.endswith("torch") else "1.0")
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(index)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(tool, "PROJECT", project)
    here = environment(
        tool, installed={name: Version(metadata.version(name)) for name in ("numpy", "setuptools", "torch")}
    )
    monkeypatch.setattr(tool.Environment, "current", staticmethod(lambda: here))
    assert tool.main([str(collected), "--collect"]) == 0, capfd.readouterr().err
    assert sorted(path.name.partition("-")[0] for path in collected.iterdir()) == ["fake_engine", "fake_engine_torch"]
    assert tool.main([str(collected), "--check"]) == 0, capfd.readouterr().err
    monkeypatch.setattr(tool.Environment, "current", staticmethod(lambda: replace(here, cuda=None)))
    assert tool.main([str(collected), "--collect"]) == 2 and "is a build for CPUs" in capfd.readouterr().err


@pytest.mark.parametrize("has_wheel", [False, True])
def test_installed_package_is_replaced(
    tool: Any, wheels: Path, monkeypatch: pytest.MonkeyPatch, has_wheel: bool
) -> None:
    """An earlier build may have the same version; the newest wheel is used, and imported outside of the sources."""
    for version in ("0.1.0", "0.2.0") if has_wheel else ():
        wheel(wheels, "megatron_slm", version)
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        assert "-c" not in command or Path(options["cwd"]) != ROOT
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tool.subprocess, "run", run)
    assert tool.install(wheels, tool.read_wheels(wheels)[0], environment(tool)) == 0
    source = wheels / "megatron_slm-0.2.0-py3-none-any.whl" if has_wheel else ROOT
    assert commands[0][-1] == f"{source}[hopper]" and "--no-index" in commands[0]
    replaced = [command for command in commands if "--force-reinstall" in command]
    assert [command[-1] for command in replaced] == ([str(source)] if has_wheel else [])
