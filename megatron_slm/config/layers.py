"""Layered recipes: a recipe extends others with ``base:``, and later layers override earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_slm.config.paths import expand_user
from megatron_slm.config.recipe import convert, read_recipe
from megatron_slm.runtime.errors import ConfigError

BASE = "base"

Layer = tuple[Path, dict[str, Any]]


def read_layers(recipes: Sequence[Path]) -> list[Layer]:
    """Return the settings of each recipe, preceded by those of its bases, with the path of the file.

    ``base`` is a recipe or a list of recipes, relative to the directory of the recipe that names it. A base that
    several recipes share is applied once, before the first of them.

    Raises:
        ConfigError: a recipe cannot be read, or derives from itself.
    """
    layers: dict[Path, Layer] = {}
    for recipe in recipes:
        for path, values in _read(recipe, ()):
            layers.setdefault(path.resolve(), (path, values))
    return list(layers.values())


def _read(path: Path, derived: tuple[Path, ...]) -> list[Layer]:
    """Return the layers of one recipe; ``derived`` is the chain of recipes that extend it."""
    if path.resolve() in {recipe.resolve() for recipe in derived}:
        raise ConfigError(f"{derived[0]}: a recipe derives from itself: {' -> '.join(map(str, (*derived, path)))}.")
    values = read_recipe(path)
    bases = _bases(values.pop(BASE, None), path)
    return [*(layer for base in bases for layer in _read(base, (*derived, path))), (path, values)]


def _bases(named: Any, path: Path) -> list[Path]:
    names = named if isinstance(named, list) else [] if named is None else [named]
    return [path.parent / expand_user(convert(name, str, f"{path}: {BASE}")) for name in names]
