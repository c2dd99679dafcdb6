"""Types of command-line arguments: what cannot be meant ends in one sentence and status 2."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, 1, "a whole number of at least 1")


def index(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, 0, "a whole number of at least 0")


def rate(text: str) -> float:
    """A number above 0 and at most 1."""
    value = _number(text, float, 0.0, "a number above 0")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value


def folder(text: str) -> Path:
    """A folder, which may still have to be made."""
    path = Path(text)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise argparse.ArgumentTypeError(f"{place} is a file: name a folder")
    return path


def file(text: str) -> Path:
    """A file in such a folder, which may still have to be made."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file")
    folder(str(path.parent))
    return path


def device(text: str) -> str:
    """A device that PyTorch knows and this machine has."""
    try:
        torch.empty(0, device=text)
    except Exception as error:
        reason = " ".join(str(error).split())[:80]
        raise argparse.ArgumentTypeError(
            f"there is no device {text!r} here: take cpu, or cuda where there is a GPU ({reason})"
        ) from error
    return text


def within(
    parser: argparse.ArgumentParser, name: str, wanted: Sequence[int] | None, total: int
) -> None:
    """End if one of the wanted numbers is not one of the first ``total``."""
    if wanted is None:
        return
    if not wanted:
        parser.error(f"argument {name}: name at least one of 0 to {total - 1}, or leave it out")
    beyond = [number for number in wanted if number >= total]
    if beyond:
        parser.error(f"argument {name}: there is no {beyond[0]}, only 0 to {total - 1}")


def _number(text: str, kind: type, low: float, what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not value >= low:
        raise argparse.ArgumentTypeError(f"must be {what}, not {text}")
    return value
