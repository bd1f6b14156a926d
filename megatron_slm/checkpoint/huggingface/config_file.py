"""Typed access to the ``config.json`` of a published model; imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.huggingface.files import CONFIG_FILE
from megatron_slm.runtime.errors import ConfigError, read_error
from megatron_slm.runtime.files import check_regular

_REQUIRED: Any = object()


@dataclass(frozen=True)
class PublishedConfig:
    """Contents of a ``config.json``. Fields that are missing have the default of the family's configuration class."""

    path: Path
    flag: str  # flag that names the model, for error messages
    values: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(directory: Path, flag: str) -> PublishedConfig:
        """Read the ``config.json`` in a directory.

        Raises:
            ConfigError: the file is unreadable or not a JSON object.
        """
        path = directory / CONFIG_FILE
        try:
            check_regular(path)
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise read_error(flag, path, error) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{flag}: {path} is not JSON: {error}. Download the model again.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{flag}: {path} must contain a JSON object. Download the model again.")
        return PublishedConfig(path, flag, values)

    @property
    def model_type(self) -> str:
        """The family's name, such as "llama"."""
        return self.text("model_type")

    def integer(self, name: str, default: int = _REQUIRED) -> int:
        """Return a positive integer field; null counts as missing."""
        value = self._value(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if self._checked(name, value, int, "an integer") <= 0:
            raise self.error(f"{name} must be above 0, not {value}")
        return value

    def number(self, name: str, default: float = _REQUIRED) -> float:
        """Return a finite numeric field as float."""
        value = self._checked(name, self._value(name, default), (int, float), "a number")
        if not abs(value) <= sys.float_info.max:  # also false for NaN
            raise self.error(f"{name} must be finite, not {value}")
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        """Return a boolean field."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, not {value!r}")
        return value

    def text(self, name: str, default: str = _REQUIRED) -> str:
        """Return a text field."""
        return self._checked(name, self._value(name, default), str, "a text")

    def choice(self, name: str, default: str, choices: Mapping[str, str]) -> str:
        """Return the setting for a published value.

        Args:
            choices: setting by published value.

        Raises:
            ConfigError: the value is not supported.
        """
        value = self.text(name, default)
        if value not in choices:
            raise self.error(f"{name} {value!r} is not supported; supported are {', '.join(choices)}")
        return choices[value]

    def section(self, name: str) -> PublishedConfig:
        """Return a nested object, empty if it is missing or null."""
        value = self.values.get(name)
        return PublishedConfig(self.path, self.flag, self._checked(name, {} if value is None else value, dict, "a map"))

    def expect(self, name: str, accepted: Collection[Any], reason: str) -> None:
        """Raise ConfigError if a field is present and has none of the accepted values."""
        if name in self.values and self.values[name] not in accepted:
            raise self.error(f"{name} {self.values[name]!r} is not supported: {reason}")

    def error(self, problem: str) -> ConfigError:
        """Return the error for a field that cannot be represented."""
        return ConfigError(f"{self.flag}: {self.path}: {problem}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is _REQUIRED:
            raise self.error(f"{name} is missing")
        return default if value is None else value

    def _checked(self, name: str, value: Any, kinds: Any, description: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise self.error(f"{name} must be {description}, not {value!r}")
        return value
