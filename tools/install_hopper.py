"""Install megatron_slm with Transformer Engine from a directory of wheels, without network access.

Usage: python tools/install_hopper.py WHEELS [--collect | --check]

With --collect, wheels of everything that this environment lacks are downloaded or built, on a machine with network
access. Otherwise the wheels are checked: versions, Python and platform tags, the CUDA version and the C++ ABI of their
libraries, and that nothing is missing. The script needs the standard library and pip only.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.tags import Tag, sys_tags
from pip._vendor.packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from pip._vendor.packaging.version import InvalidVersion, Version

PROJECT = Path(__file__).resolve().parent.parent
EXTRA = "hopper"
OLDEST_PYTHON = (3, 11)
# Exceptions for files that are no complete zip archives, or use features that pip does not read.
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, StopIteration, KeyError, ValueError)
CUDA_LIBRARY = re.compile(rb"libcudart\.so\.(\d+)")  # name of a dynamic dependency, with CUDA's major version
TORCH_LIBRARY, NEW_ABI = b"libtorch", b"NSt7__cxx1112basic_string"


@dataclass(frozen=True)
class Environment:
    """Represent the Python environment that receives the wheels."""

    tags: frozenset[Tag]
    installed: Mapping[str, Version]  # by canonical name
    cuda: str | None  # CUDA version of torch; None if torch is missing or a CPU build
    new_abi: bool  # torch was built with the C++11 ABI
    python: str = platform.python_version()

    @staticmethod
    def current() -> Environment:
        """Return the environment of this interpreter."""
        installed: dict[str, Version] = {}
        for found in metadata.distributions():
            with suppress(InvalidVersion, TypeError):  # of a damaged package
                installed.setdefault(canonicalize_name(found.metadata["Name"]), Version(found.version))
        code = "import torch; print(torch.version.cuda, torch.compiled_with_cxx11_abi())"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
        shown = output.split()[-2:]
        cuda, abi = shown if len(shown) == 2 else ("None", "True")
        return Environment(frozenset(sys_tags()), installed, None if cuda == "None" else cuda, abi == "True")


@dataclass(frozen=True)
class Wheel:
    """Represent a wheel file."""

    path: Path
    name: str
    version: Version
    tags: frozenset[Tag]

    def requirements(self) -> list[str]:
        """Return the requirements in the metadata."""
        return self._metadata().get_all("Requires-Dist", [])

    def python(self) -> SpecifierSet:
        """Return the supported versions of Python."""
        return SpecifierSet(self._metadata()["Requires-Python"] or "")

    def supports(self, environment: Environment) -> bool:
        """Return whether the wheel is for the Python and the platform of the environment."""
        return bool(self.tags & environment.tags) and self.python().contains(environment.python, prereleases=True)

    def _metadata(self) -> Message:
        with zipfile.ZipFile(self.path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return Parser().parsestr(archive.read(name).decode())

    def libraries(self) -> Iterator[bytes]:
        """Read all files, which verifies their checksums, and yield the content of the shared libraries."""
        with zipfile.ZipFile(self.path) as archive:
            for name in archive.namelist():
                content = archive.read(name)
                if name.endswith(".so") or ".so." in name:
                    yield content


@dataclass
class Plan:
    """Hold the wheels to install and the problems that prevent it."""

    wheels: dict[str, Wheel] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_wheels(directory: Path) -> tuple[list[Wheel], list[str]]:
    """Return the wheels of a directory, and a message for each unreadable one."""
    wheels, problems = list[Wheel](), list[str]()
    for path in sorted(path for path in directory.iterdir() if path.suffix == ".whl"):
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
            wheel = Wheel(path, name, version, tags)
            wheel.python()
        except (InvalidWheelFilename, InvalidVersion) as error:
            problems.append(f"{path.name} is not the name of a wheel: {error}. Restore its original name.")
        except UNREADABLE as error:
            problems.append(_damage(path, error))
        else:
            wheels.append(wheel)
    return wheels, problems


def _damage(path: Path, error: Exception) -> str:
    return f"{path.name} is damaged ({str(error) or 'no metadata'}). Copy it again."


def project_requirements(project: Path) -> list[str]:
    """Return the requirements of the source tree with the extra ``hopper``."""
    import tomllib  # not in Python 3.10, of which main reports that it is too old

    with (project / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["project"]
    return [*settings["dependencies"], *settings["optional-dependencies"][EXTRA]]


def make_plan(requirements: Sequence[str], wheels: Sequence[Wheel], environment: Environment) -> Plan:
    """Return the wheels that satisfy the requirements and theirs, as far as they are not installed."""
    plan, seen = Plan(), set[str]()
    waiting = [(text, "megatron_slm", frozenset[str]()) for text in requirements]
    while waiting:
        text, parent, extras = waiting.pop(0)
        if text + str(sorted(extras)) in seen:
            continue
        seen.add(text + str(sorted(extras)))
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            plan.problems.append(f"{parent} has an unreadable requirement {text!r}: {error}.")
            continue
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}):
            continue
        wheel = _satisfy(requirement, parent, wheels, environment, plan)
        if wheel is not None:
            plan.wheels[wheel.name] = wheel
            waiting += [(each, wheel.name, frozenset(requirement.extras)) for each in wheel.requirements()]
    for wheel in plan.wheels.values():
        try:
            plan.problems += library_problems(wheel, environment)
        except UNREADABLE as error:
            plan.problems.append(_damage(wheel.path, error))
    return plan


def _satisfy(
    requirement: Requirement, parent: str, wheels: Sequence[Wheel], environment: Environment, plan: Plan
) -> Wheel | None:
    """Return the newest fitting wheel; None if the requirement is installed, or is added to the problems."""
    name = canonicalize_name(requirement.name)
    if name in environment.installed and requirement.specifier.contains(environment.installed[name], prereleases=True):
        return None
    named = [wheel for wheel in wheels if wheel.name == name]
    fitting = [wheel for wheel in named if requirement.specifier.contains(wheel.version, prereleases=True)]
    usable = [wheel for wheel in fitting if wheel.supports(environment)]
    if usable:
        return max(usable, key=lambda wheel: wheel.version)
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    needed = f"{requirement.name}{extras}{requirement.specifier} (required by {parent})"
    if fitting:
        reason = f"{fitting[0].path.name} is for another Python or platform than {_platform()}"
    elif named:
        reason = f"the directory has {', '.join(str(wheel.version) for wheel in named)}"
    elif name in environment.installed:
        reason = f"{environment.installed[name]} is installed"
    else:
        reason = "there is no wheel"
    plan.problems.append(f"{needed}: {reason}. Add a wheel of this version for this Python.")
    return None


def _platform() -> str:
    return f"Python {platform.python_version()} on {platform.machine()} with {' '.join(platform.libc_ver())}"


def library_problems(wheel: Wheel, environment: Environment) -> Iterator[str]:
    """Yield a message if libraries of a wheel were built for another CUDA version or C++ ABI than torch."""
    majors, uses_torch, has_new_abi = set[str](), False, False
    for content in wheel.libraries():
        majors |= {major.decode() for major in CUDA_LIBRARY.findall(content)}
        uses_torch |= TORCH_LIBRARY in content
        has_new_abi |= TORCH_LIBRARY in content and NEW_ABI in content
    cuda = (environment.cuda or "").partition(".")[0]
    if majors and cuda and cuda not in majors:
        yield (
            f"{wheel.path.name} was built for CUDA {', '.join(sorted(majors))}, and torch for CUDA {environment.cuda}. "
            "Use a wheel for the CUDA version of torch."
        )
    if uses_torch and has_new_abi != environment.new_abi:
        abi = {True: "the C++11 ABI", False: "the older C++ ABI"}
        yield (
            f"{wheel.path.name} was built with {abi[has_new_abi]}, and torch with {abi[environment.new_abi]}. Build it "
            "against the installed torch."
        )


def environment_problems(environment: Environment, wheels: Sequence[Wheel]) -> Iterator[str]:
    """Yield a message if torch or the build backend do not fit."""
    if "torch" in environment.installed and environment.cuda is None:
        yield (
            f"torch {environment.installed['torch']} is a build for CPUs. Install a build for CUDA, or use an NGC "
            "PyTorch image."
        )
    has_wheel = any(wheel.name == "megatron-slm" for wheel in wheels)
    setuptools = environment.installed.get("setuptools")
    if not has_wheel and (setuptools is None or setuptools < Version("77")):
        yield "setuptools 77 or later is needed to build megatron_slm. Install it, or add a wheel of megatron_slm."


@contextmanager
def kept_versions(environment: Environment) -> Iterator[list[str]]:
    """Yield the options of pip that keep the installed torch and NumPy."""
    kept = [f"{name}=={environment.installed[name]}" for name in ("torch", "numpy") if name in environment.installed]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(kept) + "\n")
        constraints.flush()
        yield ["--constraint", constraints.name]


def collect(directory: Path, environment: Environment) -> int:
    """Download or build the wheels that this environment lacks; return the exit code.

    pip would build Transformer Engine's extension for another torch if it isolated the build.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    with kept_versions(environment) as kept, tempfile.NamedTemporaryFile(suffix=".json") as report:
        options = ["--dry-run", "--quiet", "--no-build-isolation", *kept, "--report", report.name]
        code = subprocess.run([*pip, "install", *options, f"{PROJECT}[{EXTRA}]"], check=False).returncode
        if code:
            return code
        found = [each["metadata"] for each in json.loads(report.read())["install"]]
    names = [(canonicalize_name(each["name"]), each["version"]) for each in found]
    missing = [f"{name}=={version}" for name, version in names if name != "megatron-slm"]
    if missing:
        options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(directory)]
        code = subprocess.run([*pip, "wheel", *options, *missing], check=False).returncode
    print(
        f"{directory}: {', '.join(missing) or 'nothing is missing'}." if not code else "not all wheels were collected."
    )
    return code


def install(directory: Path, wheels: Sequence[Wheel], environment: Environment) -> int:
    """Install the project without an index, and import the result; return the exit code."""
    ours = [wheel for wheel in wheels if wheel.name == "megatron-slm"]
    found = max(ours, key=lambda wheel: wheel.version).path if ours else PROJECT
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation"]
    with kept_versions(environment) as kept:
        command = [*pip, "--find-links", str(directory), *kept, f"{found}[{EXTRA}]"]
        code = subprocess.run(command, check=False).returncode
    if not code and found != PROJECT:  # pip keeps an installed version with the same number
        code = subprocess.run([*pip, "--no-deps", "--force-reinstall", str(found)], check=False).returncode
    if code:
        return code
    check = "import torch, transformer_engine.pytorch, megatron.core, megatron_slm"
    elsewhere = tempfile.gettempdir()  # not in the source tree, whose package would be imported
    imported = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False, cwd=elsewhere)
    if imported.returncode:
        print(f"installed, but not importable:\n{imported.stderr.strip()}", file=sys.stderr)
        return 1
    print("installed: torch, Transformer Engine, Megatron-Core and megatron_slm can be imported.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check the wheels, and install them; return 2 if something is missing."""
    parser = argparse.ArgumentParser(description="Install megatron_slm[hopper] from a directory of wheels.")
    parser.add_argument("wheels", type=Path, help="directory of wheels")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--collect", action="store_true", help="download or build the wheels that are missing here")
    action.add_argument("--check", action="store_true", help="check the wheels without installing them")
    arguments = parser.parse_args(argv)
    if sys.version_info < OLDEST_PYTHON:
        print(f"Python {platform.python_version()} is too old. Use Python 3.11 or later.", file=sys.stderr)
        return 2
    environment = Environment.current()
    if arguments.collect:
        problems = list(environment_problems(environment, []))
        print(*problems, sep="\n", file=sys.stderr)
        return 2 if problems else collect(arguments.wheels, environment)
    try:
        wheels, problems = read_wheels(arguments.wheels)
        requirements = project_requirements(PROJECT)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}. Give the directory of the wheels.", file=sys.stderr)
        return 2
    plan = make_plan(requirements, wheels, environment)
    problems = [*environment_problems(environment, wheels), *problems, *plan.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 2
    names = ", ".join(f"{wheel.name} {wheel.version}" for wheel in plan.wheels.values()) or "nothing"
    print(f"to install: {names}; everything else is present.")
    return 0 if arguments.check else install(arguments.wheels, wheels, environment)


if __name__ == "__main__":
    sys.exit(main())
