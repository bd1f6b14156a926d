"""Run a console command by name: ``python -m megatron_slm.cli score-corpus ...``, as batch scripts do."""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules

from megatron_slm import cli
from megatron_slm.runtime.output import print_error

HELPERS = ("__main__", "layout", "selection_checkpoints")


def command_names() -> list[str]:
    """Return the names of the console commands, without ``megatron-slm-``."""
    return [module.name.replace("_", "-") for module in iter_modules(cli.__path__) if module.name not in HELPERS]


def main() -> int:
    """Run the command that the first argument names, and return its exit code."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in command_names():
        print_error(f"error: {name!r} is no command of megatron_slm. Choose one of {', '.join(command_names())}.")
        return 2
    sys.argv = [f"{sys.argv[0]} {name}", *arguments]
    code: int = import_module(f"megatron_slm.cli.{name.replace('-', '_')}").main()
    return code


if __name__ == "__main__":
    sys.exit(main())
