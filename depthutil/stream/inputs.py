"""What a model is given: a batch as it takes it, where, and the forward pass without the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from depthutil import _checks
from depthutil.stream.parts import Anatomy


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; the CPU if it has no parameters."""
    first = next(module.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    if device.type == "meta":  # device_map keeps these weights elsewhere until they are used
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


def forward(parts: Anatomy, inputs: Mapping[str, Tensor]) -> Any:
    """Run the backbone; a mask that masks nothing is left out, for attention's fast path."""
    where = device_of(parts.embedding if parts.embedding is not None else parts.backbone)
    inputs = {name: values.to(where) for name, values in inputs.items()}
    if "attention_mask" in inputs and bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]
    return parts.backbone(**inputs, use_cache=False)


def inputs_of(
    batch: Any, parts: Anatomy, mask: str | Callable = "all", number: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """A batch as the model takes it, and which positions count.

    Parameters
    ----------
    batch : array or mapping
        Token ids ``(documents, positions)`` of any integer type, or a mapping with ``input_ids``
        and, where given, ``attention_mask`` and ``position_ids`` of the same shape.
    parts : Anatomy
        Of the model, which says what ids and positions there are.
    mask : str or callable
        ``"all"`` real positions; ``"next"``, where the token and the next are real;
        ``"inner"``, the same without the first of each document, which in many models is a sink
        of attention with an enormous state (arXiv 2402.17762); or a function of ids and
        attention mask that returns booleans of their shape.
    number : int
        Of the batch, for messages.

    Returns
    -------
    dict of str to torch.Tensor
        ``input_ids``, and what else was given, as 64-bit integers.
    torch.Tensor
        Booleans ``(documents, positions)``, on the CPU.

    Raises
    ------
    ValueError
        If something has the wrong shape or type, or lies beyond the model; the message names
        the batch and the value.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2Model
    >>> from depthutil.stream import anatomy
    >>> parts = anatomy(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)))
    >>> inputs_of([[1, 2, 9]], parts)
    Traceback (most recent call last):
    ...
    ValueError: batch 0 holds token id 9, and the model has tokens 0 to 7 only
    """
    if not callable(mask):
        _checks.word(mask, ("next", "inner", "all"), "mask", other="a function")
    known = ("input_ids", "attention_mask", "position_ids")
    if isinstance(batch, Mapping) or hasattr(batch, "input_ids"):
        inputs = {name: torch.as_tensor(batch[name]) for name in known if name in batch}
        if "input_ids" not in inputs:
            raise ValueError(f"batch {number} has no input_ids, but {sorted(batch)}")
    elif isinstance(batch, str):
        raise TypeError(f"batch {number} is a text: models.batches(tokenizer, texts) makes tokens")
    else:
        inputs = {"input_ids": torch.as_tensor(batch)}
    ids = inputs["input_ids"]
    if ids.ndim != 2 or 0 in ids.shape or not _whole(ids):
        raise ValueError(
            f"batch {number} must be token ids (documents, positions), not {ids.dtype} of shape "
            f"{tuple(ids.shape)}: for one document, use ids[None]"
        )
    ids = inputs["input_ids"] = ids.long()
    tokens = parts.tokens
    if int(ids.min()) < 0 or int(ids.max()) >= tokens:
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(
            f"batch {number} holds token id {bad}, and the model has tokens 0 to {tokens - 1} only"
        )
    real = _zero_or_one(inputs.get("attention_mask", torch.ones_like(ids)), ids, number)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].long()
    _check_positions(inputs, real, parts, number)
    if callable(mask):
        what = f"what the mask's function returned for batch {number}"
        return inputs, _zero_or_one(torch.as_tensor(mask(ids, real)), ids, number, what) & real
    if mask == "all":
        return inputs, real
    keep = torch.zeros_like(real)
    keep[:, :-1] = real[:, :-1] & real[:, 1:]
    if mask == "inner":
        keep &= real.cumsum(1) > 1
    return inputs, keep


def _whole(values: Tensor) -> bool:
    kind = values.dtype
    return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)


def _zero_or_one(values: Tensor, ids: Tensor, number: int, what: str = "") -> Tensor:
    """A mask as booleans on the CPU, if it is one."""
    what = what or f"the attention_mask of batch {number}"
    if values.shape != ids.shape:
        raise ValueError(f"{what} has shape {tuple(values.shape)}, and ids {tuple(ids.shape)}")
    if not ((values == 0) | (values == 1)).all():
        other = values[(values != 0) & (values != 1)].flatten()[0].item()
        raise ValueError(f"{what} is 1 where a position counts and 0 elsewhere, and holds {other}")
    return values.bool().cpu()


def _check_positions(inputs: dict[str, Tensor], real: Tensor, parts: Anatomy, number: int) -> None:
    ids, given = inputs["input_ids"], inputs.get("position_ids")
    if given is None and (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError(
            f"batch {number} is filled up on the left, which shifts positions: fill up on the "
            "right (models.batches does), or give position_ids"
        )
    if given is not None and (given.shape != ids.shape or not _whole(given)):
        raise ValueError(
            f"batch {number}: position_ids are whole numbers of the shape of the ids, "
            f"{tuple(ids.shape)}, not {given.dtype} of shape {tuple(given.shape)}"
        )
    if given is not None:
        inputs["position_ids"] = given = given.long()
    low, high = (0, ids.shape[1] - 1) if given is None else (int(given.min()), int(given.max()))
    room = parts.positions
    if low < 0 or (room is not None and high >= room):
        raise ValueError(
            f"batch {number} has positions {low} to {high}, and the model has room for "
            f"{'positions from 0 on' if low < 0 else room}: cut texts, models.batches(length=)"
        )
