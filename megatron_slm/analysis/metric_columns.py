"""Metrics of a run as columns of numbers, read line by line."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]
LARGEST = 2**63  # larger integers are no metrics
LARGEST_VALUE = 1e300  # larger values are as good as infinite: sums and axes of them overflow


@dataclass(frozen=True)
class Series:
    """Values of one metric; NaN for values that are infinite or above :data:`LARGEST_VALUE`."""

    steps: NDArray[np.int64]
    tokens: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Column:
    """Values of a metric, and the numbers of the records that have it."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))


class MetricColumns:
    """Hold the numbers of the records of one kind and set."""

    def __init__(self) -> None:
        self.steps, self.tokens = array("q"), array("q")
        self.columns: dict[str, Column] = {}

    def add(self, record: Record) -> None:
        """Append the numbers of a record."""
        row = len(self.steps)
        self.steps.append(record["step"])
        self.tokens.append(tokens_of(record))
        for name, value in record.items():
            if name not in ("step", "tokens") and is_number(value):
                if name not in self.columns:
                    self.columns[name] = Column()
                self.columns[name].rows.append(row)
                self.columns[name].values.append(value if abs(value) <= LARGEST_VALUE else math.nan)

    def series(self, metric: str) -> Series:
        """Return a metric in the order of steps; of a repeated step the last record counts."""
        column = self.columns.get(metric, Column())
        steps, tokens = np.array(self.steps, np.int64), np.array(self.tokens, np.int64)
        rows = np.array(column.rows, np.int64)
        _, last = np.unique(steps[::-1], return_index=True)
        kept = np.isin(rows, len(steps) - 1 - last, assume_unique=True)
        rows, values = rows[kept], np.array(column.values, np.float64)[kept]
        order = np.argsort(steps[rows])
        return Series(steps[rows][order], tokens[rows][order], values[order])


class Metrics:
    """Hold the numbers of all records of a run, by kind and set."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.tables: dict[tuple[str, str | None], MetricColumns] = {}
        self.step = self.tokens = 0  # of the last step
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Append a record, unless its step is beyond all integers of a file of this trainer."""
        if not is_number(record["step"]):
            return
        name = record.get("set")
        key = (record["kind"], None if name is None else str(name))
        if key not in self.tables:
            self.tables[key] = MetricColumns()
        self.tables[key].add(record)
        if record["step"] >= self.step:
            self.step, self.tokens = record["step"], tokens_of(record)

    def series(self, metric: str, kind: str, name: str | None) -> Series:
        """Return one metric of a kind of record, of the set ``name`` for evaluations, from the records that have it."""
        return self.tables.get((kind, name), MetricColumns()).series(metric)

    def tokens_by_step(self) -> dict[int, int]:
        """Return the tokens that the run had read after each step of the metrics that records them."""
        pairs = (pair for table in self.tables.values() for pair in zip(table.steps, table.tokens, strict=True))
        return {step: tokens for step, tokens in pairs if tokens}

    def sets(self, kind: str) -> list[str]:
        """Return the names of the validation sets or benchmarks, in the order of the file."""
        return [name for table_kind, name in self.tables if table_kind == kind and name is not None]

    def names(self, kind: str) -> list[str]:
        """Return the names of all numeric metrics of a kind of record, except step and tokens.

        Evaluations without the name of a set, which no trainer writes, are left out.
        """
        keys = [(each, name) for each, name in self.tables if each == kind and (kind == "train" or name is not None)]
        tables = (self.tables[key] for key in keys)
        return list(dict.fromkeys(name for table in tables for name in table.columns))


def tokens_of(record: Record) -> int:
    """Return the tokens that a run had read before a record; 0 if they are not recorded."""
    tokens = record.get("tokens")
    return tokens if isinstance(tokens, int) and abs(tokens) < LARGEST else 0


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a column can hold."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST)
