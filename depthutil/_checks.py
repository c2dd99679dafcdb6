"""What configurations check of their fields, with messages that name field and value."""

from __future__ import annotations

from typing import Any

import numpy as np


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
        value = getattr(config, name)
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is a whole number of at least 1, not {value!r}")
        object.__setattr__(config, name, int(value))
