"""What functions check of what they are given, with messages that name the thing and its value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd


def word(value: Any, choices: Iterable[str], name: str, *, other: str = "") -> str:
    """One of a few words; ``other`` says what else could have been given.

    Examples
    --------
    >>> word("al", ("all", "next"), "mask", other="a function")
    Traceback (most recent call last):
    ...
    ValueError: mask is 'all', 'next' or a function, not 'al'
    """
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return value
    *most, last = [*map(repr, choices), *([other] if other else [])]
    raise ValueError(f"{name} is {', '.join(most)}{' or ' if most else ''}{last}, not {value!r}")


def flag(value: Any, name: str) -> bool:
    """True or False, and nothing that Python would take for one of them.

    Examples
    --------
    >>> flag("no", "decay")
    Traceback (most recent call last):
    ...
    ValueError: decay is True or False, not 'no'
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is True or False, not {value!r}")
    return bool(value)


def number(
    value: Any, name: str, *, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> float:
    """A finite real number from ``low`` to ``high``; with ``above``, larger than ``low``.

    Examples
    --------
    >>> number(float("nan"), "level", low=0, high=1)
    Traceback (most recent call last):
    ...
    ValueError: level is a number from 0 to 1, not nan
    """
    try:
        real = float(value) if not isinstance(value, bool | str | bytes) else math.nan
    except (TypeError, ValueError):
        real = math.nan
    if not math.isfinite(real) or not low <= real <= high or (above and real == low):
        limits = f" from {low:g} to {high:g}" if math.isfinite(low) and math.isfinite(high) else ""
        if not limits and math.isfinite(low):
            limits = f" {'above' if above else 'of at least'} {low:g}"
        raise ValueError(f"{name} is a {'' if limits else 'finite '}number{limits}, not {value!r}")
    return real


def count(value: Any, name: str, *, low: int = 1) -> int:
    """A whole number of at least ``low``.

    Examples
    --------
    >>> count(2.5, "documents")
    Traceback (most recent call last):
    ...
    ValueError: documents is a whole number of at least 1, not 2.5
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is a whole number of at least {low}, not {value!r}")
    return int(value)


def sequences(config: Any, names: tuple[str, ...], kind: type[int] | type[float]) -> None:
    """Make fields of a frozen dataclass tuples of distinct numbers, or say why they cannot be."""
    for name in names:
        value = getattr(config, name)
        try:
            entries = tuple(kind(entry) for entry in value)
            same = entries == tuple(value) and not isinstance(value, str)
        except (TypeError, ValueError):
            same = False
        if not same:
            what = "numbers" if kind is float else "whole numbers"
            raise ValueError(f"{name} is a sequence of {what}, not {value!r}")
        if not entries or len(set(entries)) < len(entries):
            raise ValueError(f"{name} lists each value once, and at least one, not {value!r}")
        object.__setattr__(config, name, entries)


def counts(config: Any, names: tuple[str, ...]) -> None:
    """Make fields of a frozen dataclass positive integers, or say why they cannot be."""
    for name in names:
        object.__setattr__(config, name, count(getattr(config, name), name))


def real(values: Any, name: str) -> np.ndarray:
    """Real numbers in double precision; what a table calls missing is nan.

    Examples
    --------
    >>> real(pd.array([1.5, None], dtype="Float64"), "loss").tolist()
    [1.5, nan]
    >>> real([1 + 2j], "loss")
    Traceback (most recent call last):
    ...
    ValueError: loss must be real numbers, not complex128
    """
    if isinstance(values, pd.Series | pd.Index | pd.api.extensions.ExtensionArray):
        kind = values.dtype
        if pd.api.types.is_object_dtype(kind):
            return real(values.to_numpy(), name)
        if not pd.api.types.is_numeric_dtype(kind) or pd.api.types.is_complex_dtype(kind):
            raise ValueError(f"{name} must be real numbers, not {kind}")
        return np.array(pd.Series(values).to_numpy(dtype=float, na_value=np.nan))
    array = np.asarray(values)
    if array.dtype.kind == "O":
        array = np.array([np.nan if x is pd.NA else x for x in array.ravel()]).reshape(array.shape)
    if array.dtype.kind not in "iufb" and array.size:
        raise ValueError(f"{name} must be real numbers, not {array.dtype}")
    return array.astype(float)


def positive(values: Any, name: str) -> np.ndarray:
    """Real numbers that are all finite and above 0.

    Examples
    --------
    >>> positive([0.5, float("nan")], "stderr")
    Traceback (most recent call last):
    ...
    ValueError: stderr must be finite and above 0, but is nan in row 1 (1 such): leave those out
    """
    numbers = real(values, name)
    bad = ~(np.isfinite(numbers) & (numbers > 0))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        row = values.index[at[0]] if isinstance(values, pd.Series) else at[0]
        raise ValueError(
            f"{name} must be finite and above 0, but is {numbers[at]:g} in row {row} "
            f"({bad.sum()} such): leave those out"
        )
    return numbers


def columns(table: Any, names: Iterable[str], what: str = "runs") -> None:
    """Columns of a table that are there and hold positive, finite, real numbers."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"{what} must be a pandas DataFrame, not {type(table).__name__}")
    for name in names:
        if name not in table:
            raise ValueError(f"{what} need a column {name!r}; they have {list(table.columns)}")
        positive(table[name], f"column {name!r}")


def wide(table: pd.DataFrame, index: list[str], across: str, value: str) -> pd.DataFrame:
    """A table with a column for each entry of ``across``: no gap, no entry with two values.

    Examples
    --------
    >>> runs = pd.DataFrame({"seed": [0, 0, 1], "depth": [2, 4, 2], "loss": [0.5, 0.2, 0.4]})
    >>> wide(runs, ["seed"], "depth", "loss")
    Traceback (most recent call last):
    ...
    ValueError: loss is missing or not finite at seed 1, depth 4 (1 such of 4): leave out seed 1
    """
    table = table[[*index, across, value]].drop_duplicates()
    twice = table.duplicated([*index, across])
    if twice.any():
        row = table[twice].iloc[0]
        where = ", ".join(f"{name} {row[name]:g}" for name in (*index, across))
        raise ValueError(f"{value} has two values at {where}: say which run is meant")
    result = table.pivot(index=index, columns=across, values=value)
    bad = ~np.isfinite(real(result.to_numpy(), value))
    if bad.any():
        i, j = np.argwhere(bad)[0]
        key = result.index[i] if isinstance(result.index[i], tuple) else (result.index[i],)
        pairs = zip((*index, across), (*key, result.columns[j]), strict=True)
        *row, column = (f"{name} {entry:g}" for name, entry in pairs)
        raise ValueError(
            f"{value} is missing or not finite at {', '.join([*row, column])} ({bad.sum()} such of "
            f"{bad.size}): leave out {', '.join(row)}"
        )
    return result
