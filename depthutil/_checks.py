"""What functions check of what they are given, with messages that name the thing and its value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


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
