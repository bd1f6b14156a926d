"""Layered recipes: a recipe derives from others with ``base:``, and later layers win."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_slm.config.paths import expanded_user
from megatron_slm.config.recipe import convert, read_recipe
from megatron_slm.runtime.errors import ConfigError

BASE = "base"

Layer = tuple[Path, dict[str, Any]]


def read_layers(recipes: Sequence[Path]) -> list[Layer]:
    """Return the settings of each recipe after those of its bases, with the file that holds them.

    ``base`` names a recipe or a list of recipes, relative to the directory of the recipe that names it. A file that
    several recipes share applies once, the first time.

    Raises:
        ConfigError: a recipe cannot be read, or derives from itself.
    """
    layers: dict[Path, Layer] = {}
    for recipe in recipes:
        for path, values in _read(recipe, ()):
            layers.setdefault(path.resolve(), (path, values))
    return list(layers.values())


def _read(path: Path, derived: tuple[Path, ...]) -> list[Layer]:
    """Return the layers of one recipe; ``derived`` are the recipes that name it as a base, directly or indirectly."""
    if path.resolve() in {recipe.resolve() for recipe in derived}:
        raise ConfigError(f"{derived[0]}: a recipe derives from itself: {' -> '.join(map(str, (*derived, path)))}.")
    values = read_recipe(path)
    bases = _bases(values.pop(BASE, None), path)
    return [*(layer for base in bases for layer in _read(base, (*derived, path))), (path, values)]


def _bases(named: Any, path: Path) -> list[Path]:
    names = named if isinstance(named, list) else [] if named is None else [named]
    return [path.parent / expanded_user(convert(name, str, f"{path}: {BASE}")) for name in names]
