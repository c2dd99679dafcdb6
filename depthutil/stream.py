"""A live model's residual stream: watch it, and measure whether it is what we suppose.

``models.anatomy`` guesses by names where a model's blocks, norm and head are. Names do not say
what the code between them does: whether a block adds to the stream or rescales it, whether
its sublayers read one after the other, what happens to logits after the head, whether a position
sees later ones. :func:`measured` finds out on a short piece of the first batch, by hooks that
change what one part reads and look at what another returns. What it cannot confirm
it refuses in one sentence; ``trajectory`` records and decodes only through what it returns.

Hooks are set by :func:`hooked` and :func:`watched` alone, which take them off whatever happens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

from depthutil import _checks, models
from depthutil.models import Anatomy, Write

#: How many documents and positions of the first batch a model is measured on.
PROBE = (2, 32)

#: How much larger the stream is made to see whether a block adds to it.
SCALE = 1000.0

#: What part of its length a stream so enlarged may move in one block that adds. A block that
#: rescales or normalises moves it by all of its length, or by what it rescales.
MOVES = 0.05


# Watching -------------------------------------------------------------------------------


def hidden(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The stream among what a block is given."""
    if args:
        return args[0]
    if "hidden_states" not in kwargs:
        raise ValueError(f"a block reads {sorted(kwargs)} and no hidden_states: it is not known")
    return kwargs["hidden_states"]


def with_hidden(args: tuple, kwargs: dict[str, Any], states: Tensor) -> tuple[tuple, dict]:
    """The same arguments with other states."""
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": states}


def tensor(output: Any) -> Tensor:
    """The states among what a module returns, a tensor or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def with_tensor(output: Any, states: Tensor) -> Any:
    """The same output with other states."""
    if isinstance(output, Tensor):
        return states
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: states})
    return type(output)((states, *output[1:]))


@contextmanager
def hooked(
    before: Sequence[tuple[nn.Module, Callable]] = (),
    after: Sequence[tuple[nn.Module, Callable]] = (),
) -> Iterator[None]:
    """Functions that run before and after modules, taken off at the end whatever happens.

    Parameters
    ----------
    before : sequence of (module, function)
        Called with the states that the module reads; what it returns, unless None, is read
        in their place.
    after : sequence of (module, function)
        Called with the states that the module returns; what it returns, unless None, takes
        their place.

    Examples
    --------
    >>> layer, seen = nn.Linear(2, 2, bias=False), []
    >>> with hooked(before=[(layer, lambda h: 2 * h)], after=[(layer, seen.append)]):
    ...     doubled = layer(torch.ones(1, 2))
    >>> torch.equal(doubled, 2 * layer(torch.ones(1, 2))), len(seen)
    (True, 1)
    """
    handles = []

    def reading(function):
        def hook(module, args, kwargs):
            states = function(hidden(args, kwargs))
            return None if states is None else with_hidden(args, kwargs, states)

        return hook

    def returning(function):
        def hook(module, args, output):
            states = function(tensor(output))
            return None if states is None else with_tensor(output, states)

        return hook

    try:
        for module, function in before:
            hook = reading(function)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for module, function in after:
            handles.append(module.register_forward_hook(returning(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(modules: Iterable[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    """Look at all that modules are given and return, until the block ends.

    ``look`` is called with the module, its positional and its named arguments, and its output,
    and changes none of them.

    Examples
    --------
    >>> layer, seen = nn.Linear(2, 3), []
    >>> with watched([layer], lambda module, args, kwargs, output: seen.append(output.shape)):
    ...     _ = layer(torch.ones(1, 2))
    >>> seen
    [torch.Size([1, 3])]
    """
    handles = []

    def hook(module, args, kwargs, output):
        look(module, args, kwargs, output)

    try:
        for module in modules:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def computing_as(*pairs: tuple[nn.Module, nn.Module]) -> Iterator[None]:
    """Each first module computes what the second would, until the block ends.

    Parameters
    ----------
    *pairs : (module, module)
        Two that exchange their places are two pairs, ``(a, b), (b, a)``.

    Examples
    --------
    >>> one, other, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2)
    >>> with computing_as((one, other)):
    ...     torch.equal(one(x), other(x))
    True
    >>> torch.equal(one(x), other(x)), "forward" in vars(one)
    (False, False)
    """
    own = [vars(module).get("forward") for module, _ in pairs]
    theirs = [other.forward for _, other in pairs]
    try:
        for (module, _), forward in zip(pairs, theirs, strict=True):
            module.forward = forward
        yield
    finally:
        for (module, _), forward in zip(pairs, own, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients, and each module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


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


# What a model is given ------------------------------------------------------------------


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
        ``"all"`` real positions; ``"next"``, where the token and the next are real; or a
        function of ids and attention mask that returns booleans of their shape.
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
    >>> parts = models.anatomy(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)))
    >>> inputs_of([[1, 2, 9]], parts)
    Traceback (most recent call last):
    ...
    ValueError: batch 0 holds token id 9, and the model has tokens 0 to 7 only
    """
    if not callable(mask):
        _checks.word(mask, ("next", "all"), "mask", other="a function")
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


def fingerprint(*things: Any) -> str:
    """A short text that differs where anything that decides a recording differs.

    Parameters
    ----------
    *things
        Models (class, configuration, and all weights and buffers, to the last bit), tensors,
        mappings of them, and what JSON can hold.

    Raises
    ------
    ValueError
        If somebody's hook or another module's forward changes what a model computes, which
        cannot be told from its weights.

    Returns
    -------
    str
        64 hexadecimal digits. About a second for 1.5 GB of weights.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> before = fingerprint(layer)
    >>> _ = layer.weight.data[1, 1].add_(1e-7)
    >>> fingerprint(layer) == before
    False
    """
    digest = hashlib.sha256()
    for thing in things:
        _feed(digest, thing)
    return digest.hexdigest()


def _refuse_hooks(model: nn.Module) -> None:
    """Libraries look at or move what passes through; what others do may be an ablation."""
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        homes = {(getattr(h, "__module__", None) or "").partition(".")[0] for h in hooks}
        # accelerate wraps a module's own forward, and says so.
        replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
        if replaced or homes - {"transformers", "accelerate"}:
            raise ValueError(
                f"{type(model).__name__} has a hook on {name or 'itself'}, and a checkpoint cannot "
                "tell what it does: record without checkpoint=, or take the hook off"
            )


def _feed(digest: Any, thing: Any) -> None:
    if isinstance(thing, nn.Module):
        config = getattr(thing, "config", None)
        _refuse_hooks(thing)
        _feed(digest, type(thing).__qualname__)
        if hasattr(config, "to_dict"):
            _feed(digest, json.dumps(config.to_dict(), sort_keys=True, default=str))
        # A buffer that is not saved decides too: the frequencies of rotary positions.
        for kind in (thing.named_parameters(), thing.named_buffers()):
            for name, values in kind:
                _feed(digest, name)
                _feed(digest, values)
    elif isinstance(thing, Tensor):
        digest.update(f"{tuple(thing.shape)} {thing.dtype}".encode())
        if not thing.is_meta:  # weights that a device_map keeps on disk
            values = thing.detach().cpu().contiguous().flatten()
            digest.update(memoryview(values.view(torch.uint8).numpy()) if len(values) else b"")
    elif isinstance(thing, Mapping) and any(isinstance(v, Tensor) for v in thing.values()):
        for name in sorted(thing):
            _feed(digest, name)
            _feed(digest, thing[name])
    else:
        digest.update(json.dumps(thing, sort_keys=True).encode() + b"\0")


# Measuring ------------------------------------------------------------------------------


def measured(
    model: nn.Module, inputs: Mapping[str, Tensor], parts: Anatomy | None = None, *, head: bool
) -> Anatomy:
    """What a model's blocks, sublayers, norm and head really do, on a piece of a batch.

    Costs a few forward passes of at most :data:`PROBE` tokens.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model or its backbone.
    inputs : dict of str to torch.Tensor
        ``input_ids`` ``(documents, positions)`` and, where given, ``attention_mask`` and
        ``position_ids``.
    parts : Anatomy, optional
        What names say, by default ``models.anatomy(model)``.
    head : bool
        Also measure what becomes of logits after the head, for decoding.

    Returns
    -------
    Anatomy
        With the final norm, ``writes``, ``parallel`` and, with ``head``, ``scale`` and ``softcap``
        as measured.

    Raises
    ------
    ValueError
        If states are no sums of writes, positions are not those of the tokens, a position sees
        later ones, or logits are no known function of the last state; the message names the
        class.
    """
    parts = models.anatomy(model) if parts is None else parts
    with evaluating(model):
        for piece in _pieces(inputs):
            probe = _Probe(model, parts, piece)
            if probe.finite:
                break
        else:
            return parts  # which is said with the token's place when its products are looked at
        probe.check_shape()
        probe.check_additive()
        probe.check_order()
        probe.find_norm()
        probe.check_causal()
        probe.find_writes()
        if head:
            probe.find_logits()
    return probe.parts


class _Probe:
    """One model, and a few tokens to measure it on."""

    def __init__(self, model: nn.Module, parts: Anatomy, inputs: Mapping[str, Tensor]):
        self.model, self.parts, self.inputs = model, parts, dict(inputs)
        self.shape = tuple(self.inputs["input_ids"].shape)
        real = self.inputs.get("attention_mask", torch.ones(self.shape)).bool().cpu()
        self.real = real.reshape(-1)
        self.name = f"{type(model).__name__} ({parts.family})"
        self.read: list[list[Tensor]] = [[] for _ in parts.blocks]
        self.returned: list[list[Tensor]] = [[] for _ in parts.blocks]
        self.outside: list[tuple[nn.Module, Tensor, Tensor]] = []
        with hooked(
            before=[(b, _keeping(got)) for b, got in zip(parts.blocks, self.read, strict=True)],
            after=[(b, _keeping(got)) for b, got in zip(parts.blocks, self.returned, strict=True)],
        ):
            self.last = self._passing_outside()
        self.finite = all(bool(torch.isfinite(h).all()) for got in self.returned for h in got)
        self.finite = self.finite and bool(torch.isfinite(self.last).all())

    def refuse(self, why: str, then: str = "") -> ValueError:
        return ValueError(f"{self.name} cannot be recorded: {why}{then}")

    def _passing_outside(self) -> Tensor:
        """Run; keep what modules outside the blocks read and return, and return the last state."""
        inside = {m for block in self.parts.blocks for m in block.modules()}
        inside.add(self.parts.backbone)

        def keep(module, args, kwargs, output):
            reads, gives = _first(*args, *kwargs.values()), _first(output)
            if reads is not None and gives is not None and reads.shape == gives.shape:
                self.outside.append((module, reads.detach().clone(), gives.detach().clone()))

        others = [m for m in self.parts.backbone.modules() if m not in inside]
        with watched(others, keep):
            output = forward(self.parts, self.inputs)
        return output if isinstance(output, Tensor) else output[0]

    # Are these the states?

    def check_shape(self) -> None:
        """Every block runs once, in order, on one vector for each token."""
        runs = {len(got) for got in (*self.read, *self.returned)}
        if runs != {1}:
            raise self.refuse(
                "its blocks do not run exactly once each, in order (they run "
                f"{', '.join(map(str, sorted(runs)))} times)"
            )
        for states in (self.read[0][0], self.last):
            if states.ndim != 3 or tuple(states.shape[:2]) != self.shape:
                raise self.refuse(
                    f"its stream is {tuple(states.shape)} where tokens are {self.shape}, and not "
                    "one vector for each token (positions of its own, or several streams)"
                )

    def find_norm(self) -> None:
        """The module that takes the last block's output to what the backbone returns."""
        end = self.returned[-1][0]

        def between(module: nn.Module) -> bool:
            return any(
                m is module and _same(reads, end) and _same(gives, self.last)
                for m, reads, gives in self.outside
            )

        found = [m for m, *_ in self.outside if between(m)]
        if not (self.parts.norm is not None and between(self.parts.norm)):
            if not found:
                raise self.refuse(
                    f"what block {self.parts.depth} returns does not become the last hidden state "
                    "by one final norm"
                )
            self.parts = replace(self.parts, norm=found[0])

    def check_order(self) -> None:
        """What a block returns is what the next one reads."""
        for number in range(1, self.parts.depth):
            if not _same(self.returned[number - 1][0], self.read[number][0]):
                raise self.refuse(f"what block {number} returns is not what the next module reads")

    def check_additive(self) -> None:
        """A block that adds leaves a stream that is much larger nearly as it was."""
        moved: dict[int, tuple[float, float]] = {}
        scales: dict[int, float] = {}
        before, after = [], []
        for number, block in enumerate(self.parts.blocks):
            h, out = self.read[number][0], self.returned[number][0]
            relative = float((_exact(out) - _exact(h)).norm() / _exact(h).norm().clamp(min=1e-30))
            scale = SCALE * max(1.0, relative)
            if h.dtype == torch.float16:  # which ends at 65,504
                scale = min(scale, 2e4 / float(h.abs().max().clamp(min=1e-30)))
            scale = max(2.0 ** round(math.log2(scale)), 1.0) if math.isfinite(scale) else 1.0
            scales[number] = scale

            def enlarge(states, scale=scale):
                return states * scale

            def look(states, number=number, h=h, out=out, scale=scale, relative=relative):
                large = scale * _exact(h)
                far = float((_exact(states) - large).norm() / large.norm().clamp(min=1e-30))
                moved[number] = far, max(MOVES, 3 * relative / scale)
                return out.clone()  # so that the next block reads what it did before

            before.append((block, enlarge))
            after.append((block, look))
        with hooked(before, after):
            forward(self.parts, self.inputs)
        for number, (far, allowed) in sorted(moved.items()):
            # A sublayer without a norm of its own grows with the stream, but what is found to be
            # added is added.
            if not far <= allowed and not self._adds(number, scales[number]):
                raise self.refuse(
                    f"block {number + 1} normalises or rescales the stream itself (post-norm, "
                    f"scaled residuals), so that states are no sums of writes: one made "
                    f"{SCALE:,.0f} times larger moves by {far:.0%} of its length"
                )

    def _adds(self, number: int, scale: float) -> bool:
        """Whether an enlarged stream and what modules were found to write make up the output."""
        if self.parts.writes is None and self.found[number] is None:
            return False
        known = self.parts.writes
        writes = [w for w, _ in self.found[number]] if known is None else known[number]
        block, out = self.parts.blocks[number], self.returned[number][0]
        large, whole = scale * self.read[number][0], []
        got: list[list[Tensor]] = [[] for _ in writes]
        after = [(w.module, _keeping(g)) for w, g in zip(writes, got, strict=True)]
        after += [(block, _keeping(whole)), (block, lambda _: out.clone())]
        with hooked([(block, lambda _: large.clone())], after):
            forward(self.parts, self.inputs)
        return self._miss(large, whole[0], writes, [g[0] for g in got]) is None

    def check_causal(self) -> None:
        """A change of the last token leaves all earlier states as they were."""
        ids, real = self.inputs["input_ids"], self.real.reshape(self.shape)
        if self.shape[1] < 2:
            return
        last = torch.where(real, torch.arange(self.shape[1]), -1).max(1).values
        rows = torch.nonzero(last > 0).squeeze(1)
        if len(rows) == 0:
            return
        changed = ids.clone()
        for row in rows.tolist():
            at = int(last[row])
            others = ids[row][ids[row] != ids[row, at]]
            changed[row, at] = others[0] if len(others) else (ids[row, at] + 1) % 2
        got: list[Tensor] = []
        with hooked(after=[(self.parts.blocks[-1], _keeping(got))]):
            forward(self.parts, {**self.inputs, "input_ids": changed})
        mine, theirs = _exact(self.returned[-1][0]), _exact(got[0])
        earlier = torch.arange(self.shape[1])[None] < last[:, None]
        earlier = (earlier & real)[..., None]
        far = ((mine - theirs) * earlier).norm() / (mine * earlier).norm().clamp(min=1e-30)
        eps = torch.finfo(got[0].dtype).eps
        if not float(far) <= (100 if eps < 1e-5 else 3) * eps:
            raise self.refuse(
                f"it is not causal: when the last token changes, earlier states move by "
                f"{float(far):.1%} of their length, so that it has seen what it is to predict",
                " (is_decoder=False or is_causal=False in its configuration?)",
            )

    # What writes?

    def find_writes(self) -> None:
        """The modules whose outputs, scaled, add up to what each block adds."""
        if self.parts.writes is not None:
            self._check_sums()
        else:
            for found in (self._like_their_kind(self.found), self.found):
                if self._take(found):
                    break
        if self.parts.sublayers:
            self.parts = replace(self.parts, parallel=self._parallel())

    def _take(self, found: list) -> bool:
        """Take writes that were found, if they are there for every block and add up."""
        if any(f is None for f in found):
            return False
        before = self.parts
        self.parts = replace(before, writes=tuple(tuple(w for w, _ in f) for f in found))
        if self.parts.sublayers:
            modules = list(zip(*[[m for _, m in f] for f in found], strict=True))
            attention, mlp = (None if any(m is None for m in ms) else ms for ms in modules)
            self.parts = replace(self.parts, attention=attention, mlp=mlp)
        try:
            self._check_sums()
        except ValueError:
            self.parts = before
            return False
        return True

    def _like_their_kind(self, found: list) -> list:
        """Blocks of which less was found, because something writes nothing, taken as their kind.

        That is an attention that somebody has silenced, or one that begins at zero; whether
        the sum is right is checked all the same.
        """
        kinds: dict[type, list] = {}
        for block, writes in zip(self.parts.blocks, found, strict=True):
            if writes is not None and len(writes) > len(kinds.get(type(block), ())):
                names = {module: name for name, module in block.named_modules()}
                kinds[type(block)] = [(names[w.module], w.scale, names.get(m)) for w, m in writes]
        result = []
        for block, writes in zip(self.parts.blocks, found, strict=True):
            kind = kinds.get(type(block), [])
            if len(writes or ()) < len(kind):
                try:
                    writes = [
                        (
                            Write(block.get_submodule(name), scale),
                            None if module is None else block.get_submodule(module),
                        )
                        for name, scale, module in kind
                    ]
                except AttributeError:  # a block of the same class that is built otherwise
                    pass
            result.append(writes)
        return result

    def _check_sums(self) -> None:
        """What was found adds up, on the states as they are."""
        parts = self.parts
        got: list[list[Tensor]] = [[] for writes in parts.writes for _ in writes]
        flat = [write for writes in parts.writes for write in writes]
        with hooked(after=[(w.module, _keeping(g)) for w, g in zip(flat, got, strict=True)]):
            forward(parts, self.inputs)
        if {len(g) for g in got} != {1}:
            raise self.refuse("its sublayers do not run exactly once each, in order")
        outputs = iter(got)
        for number, writes in enumerate(parts.writes):
            h, out = self.read[number][0], self.returned[number][0]
            worst = self._miss(h, out, writes, [next(outputs)[0] for _ in writes])
            if worst is not None:
                raise self.refuse(
                    f"in block {number + 1} what attention and MLP write misses the change of "
                    f"the state by {worst:.1%} of its length"
                )

    def _miss(
        self, h: Tensor, out: Tensor, writes: Sequence[Write], values: Sequence[Tensor]
    ) -> float | None:
        """By what part of its length a sum of writes misses the output; None if it does not."""
        eps = max(torch.finfo(x.dtype).eps for x in (h, out, *values))
        before, after = (self._rows(x) for x in (h, out))
        total, sizes = before, before.norm(dim=-1)
        for write, value in zip(writes, values, strict=True):
            added = write.scale * self._rows(value)
            total, sizes = total + added, sizes + added.norm(dim=-1)
        gap = (total - after).norm(dim=-1)
        # A model that adds in its own precision rounds twice; this allows a few times that.
        return None if (gap <= 4 * eps * sizes).all() else float((gap / after.norm(dim=-1)).max())

    def _rows(self, states: Tensor) -> Tensor:
        """Real tokens' vectors ``(tokens, width)`` in double precision."""
        return _exact(states).reshape(len(self.real), -1)[self.real]

    def _look_inside(self, streams: Sequence[Tensor]) -> tuple[list[_Inside], list[Tensor]]:
        """What every block's modules return on these streams, and what the blocks return."""
        insides = [_Inside(block, len(self.real)) for block in self.parts.blocks]
        whole: dict[int, Tensor] = {}
        before, after = [], []
        for number, block in enumerate(self.parts.blocks):
            own = self.returned[number][0]

            def keep(states, number=number, own=own):
                whole[number] = states.clone()
                return own.clone()  # so that no block reads what became of another's

            before.append((block, lambda _, number=number: streams[number].clone()))
            after.append((block, keep))
        with ExitStack() as stack:
            for inside in insides:
                stack.enter_context(inside.watching())
            stack.enter_context(hooked(before, after))
            forward(self.parts, self.inputs)
        return insides, [whole[number] for number in range(self.parts.depth)]

    @cached_property
    def small(self) -> list[Tensor]:
        """For each block, what it reads, made smaller than what it adds: no digits are lost."""
        result = []
        for (h,), (out,) in zip(self.read, self.returned, strict=True):
            added = (_exact(out) - _exact(h)).norm(dim=-1, keepdim=True)
            size = _exact(h).norm(dim=-1, keepdim=True).clamp(min=1e-30)
            share = torch.where(added > 0, 0.1 * added / size, 1.0).clamp(max=1.0)
            result.append(h * share.to(h.device, h.dtype))
        return result

    @cached_property
    def found(self) -> list[list[tuple[Write, nn.Module | None]] | None]:
        """For each block its writes, in order, and the modules that compute them; or None.

        Blocks are given a small stream, and the outputs of all their modules are looked through
        for two or one that add up.
        """
        small = self.small
        # The first position is nudged; what changes at later ones has mixed positions.
        nudged = []
        for h in small:
            other = h.clone()
            other[:, 0] += 3 * h[:, 0].std() * torch.linspace(-1, 1, h.shape[-1]).to(h)
            nudged.append(other)
        (seen, whole), (again, _) = self._look_inside(small), self._look_inside(nudged)
        later = self.real.reshape(self.shape).clone()
        later[:, 0] = False
        return [
            self._writes_of(number, small[number], whole[number], one, two, later.reshape(-1))
            for number, (one, two) in enumerate(zip(seen, again, strict=True))
        ]

    def _writes_of(
        self,
        number: int,
        small: Tensor,
        whole: Tensor,
        seen: _Inside,
        again: _Inside,
        later: Tensor,
    ) -> list[tuple[Write, nn.Module | None]] | None:
        eps = torch.finfo(whole.dtype).eps
        start, end = self._rows(small), self._rows(whole)
        found = _adding_up(seen.distinct(self.real), end - start, start, eps)
        if found is None:
            return None
        if len(found) == 2:
            # The one that mixes positions is attention. Who reads after it mixes too.
            mixes = []
            for write in found:
                one, two = (inside.value(write.module)[later] for inside in (seen, again))
                mixes.append(_differ(one, two, whole.dtype))
            if not any(mixes) or (not mixes[0] and self._reads(found, number, small)):
                return None  # no attention, or one that reads what the MLP wrote
            if not mixes[0]:
                found = found[::-1]
        return [(self._named(write, eps), seen.computes(write.module)) for write in found]

    def _named(self, write: Write, eps: float) -> Write:
        """The scale that the configuration gives in more digits than could be measured."""
        if write.scale == 1:
            return write
        for value in _named_numbers(self.parts.backbone.config).values():
            if abs(write.scale / value - 1) < 2 * eps:
                return Write(write.module, value)
        return write

    def _reads(self, writes: Sequence[Write], number: int, small: Tensor) -> bool:
        """Whether the second write depends on the first, in one block."""
        first, second = (write.module for write in writes)
        own: list[Tensor] = []
        other: list[Tensor] = []
        block, out = self.parts.blocks[number], self.returned[number][0]
        reading, returning = (block, lambda _: small.clone()), (block, lambda _: out.clone())
        with hooked([reading], [(second, _keeping(own)), returning]):
            forward(self.parts, self.inputs)
        silent = (first, lambda h: torch.zeros_like(h))
        with hooked([reading], [silent, (second, _keeping(other)), returning]):
            forward(self.parts, self.inputs)
        return _differ(_exact(own[0]), _exact(other[0]), own[0].dtype)

    def _parallel(self) -> bool | None:
        """Whether the MLP reads the same stream as attention; None if blocks differ.

        Where one of them writes nothing (it has been silenced) there is nothing to see.
        """
        own: dict[int, Tensor] = {}
        other: dict[int, Tensor] = {}
        speaks: set[int] = set()

        def heard(number, states):
            if bool((states != 0).any()):
                speaks.add(number)

        def run(store, silent: bool):
            before, after = [], []
            for number, (attention, mlp) in enumerate(self.parts.writes):
                out, small = self.returned[number][0], self.small[number]
                before.append((self.parts.blocks[number], lambda _, h=small: h.clone()))
                if silent:
                    after.append((attention.module, lambda h: torch.zeros_like(h)))
                else:
                    after.append((attention.module, lambda h, n=number: heard(n, h)))
                after.append((mlp.module, lambda h, n=number: store.__setitem__(n, h.clone())))
                after.append((self.parts.blocks[number], lambda _, out=out: out.clone()))
            with hooked(before, after):
                forward(self.parts, self.inputs)

        run(own, False)
        run(other, True)
        same = {
            not _differ(_exact(own[n]), _exact(other[n]), own[n].dtype)
            for n in speaks
            if own[n].any()
        }
        if not same:
            return self.parts.parallel
        return same.pop() if len(same) == 1 else None

    # What becomes of logits?

    def find_logits(self) -> None:
        """The scale and soft cap that take the head's output to the model's logits."""
        parts = self.parts
        end = self.returned[-1][0].reshape(len(self.real), -1)[self.real][:64]
        plain = replace(parts, scale=1.0, softcap=None)
        mine = plain.logits(end.to(device_of(parts.norm))).double().cpu()
        where = device_of(parts.embedding if parts.embedding is not None else self.model)
        inputs = {name: values.to(where) for name, values in self.inputs.items()}
        theirs = self.model(**inputs, use_cache=False).logits
        eps = max(torch.finfo(theirs.dtype).eps, torch.finfo(end.dtype).eps)
        theirs = theirs.reshape(len(self.real), -1)[self.real.to(theirs.device)][:64]
        theirs = theirs.double().cpu()
        if mine.shape != theirs.shape:
            raise ValueError(
                f"{self.name} cannot be decoded early: its head gives {mine.shape[-1]} numbers and "
                f"its logits are {theirs.shape[-1]}"
            )
        there = torch.isfinite(theirs) & torch.isfinite(mine)
        named = _named_numbers(parts.backbone.config)
        scale, softcap, gap = _after_head(mine[there], theirs[there], named)
        # The same products, rounded at two places; a cap that is left out shows far above that.
        if not gap <= (1e-4 if eps < 1e-5 else 0.5 * eps):
            raise ValueError(
                f"{self.name} cannot be decoded early: it does something to its logits after the "
                f"head that is neither a scale nor a soft cap (they differ by {gap:.1%})"
            )
        self.parts = replace(parts, scale=scale, softcap=softcap)


def _pieces(inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A few rows and consecutive positions, those that hold the most real tokens first.

    First together, and then, in case one of them holds numbers that are not finite, by the row.
    """
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool().cpu()
    order = real.sum(1).argsort(descending=True, stable=True)
    fits = {name: v for name, v in inputs.items() if v.shape[-2:] == ids.shape}
    others = {name: v for name, v in inputs.items() if name not in fits}
    for rows in (order[: PROBE[0]].sort().values, *order[:, None]):
        start = int(real[rows].int().argmax(1).min())
        columns = slice(start, start + PROBE[1])
        yield {name: v[rows.to(v.device)][:, columns] for name, v in fits.items()} | others


def _keeping(into: list[Tensor]) -> Callable[[Tensor], None]:
    """A hook that keeps copies: what comes later may write to the same memory."""
    return lambda states: into.append(states.detach().clone())


def _first(*things: Any) -> Tensor | None:
    return next((thing for thing in things if isinstance(thing, Tensor)), None)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.device))


def _exact(states: Tensor) -> Tensor:
    return states.detach().cpu().double()


def _differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether what a module returned twice differs by more than the order of its sums makes."""
    eps = torch.finfo(dtype).eps
    return float((one - other).norm()) > (8 if eps < 1e-5 else 1) * eps * float(one.norm())


class _Inside:
    """What all modules of a block read and return in one pass."""

    def __init__(self, block: nn.Module, tokens: int):
        self.names = {module: name for name, module in block.named_modules() if name}
        self.tokens = tokens
        self.outputs: dict[nn.Module, list[Tensor]] = {}
        self.inputs: dict[nn.Module, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        def keep(module, args, kwargs, output):
            gives = _first(*output[:1]) if isinstance(output, tuple | list) else _first(output)
            reads = _first(*args, *kwargs.values())
            if gives is not None and gives.is_floating_point():
                self.outputs.setdefault(module, []).append(gives.detach().clone())
            if reads is not None:
                self.inputs[module] = reads.detach().clone()

        with watched(self.names, keep):
            yield

    def value(self, module: nn.Module) -> Tensor:
        return _exact(self.outputs[module][0]).reshape(self.tokens, -1)

    def distinct(self, real: Tensor) -> dict[nn.Module, Tensor]:
        """Outputs that could be writes, in order; of equal ones the outermost module's."""
        kept: dict[nn.Module, Tensor] = {}
        for module, got in self.outputs.items():  # in the order in which modules end
            if len(got) != 1 or got[0].numel() % self.tokens:
                continue
            value = self.value(module)[real]
            twin = next((m for m, v in kept.items() if _same(v, value)), None)
            if twin is not None:
                if self._depth(module) >= self._depth(twin):
                    continue
                del kept[twin]
            kept[module] = value
        return kept

    def computes(self, module: nn.Module) -> nn.Module | None:
        """The module that computes a write, where it is one module.

        After it may come a norm or dropout, whose output is what is added. A bare linear map
        is the last step of the module that holds it, or, among others of the block (OPT's
        ``fc2``), of none.
        """
        if isinstance(module, nn.Dropout) or models.is_norm(module):
            reads = self.inputs.get(module, torch.zeros(0)).flatten()
            before = [
                m
                for m, got in self.outputs.items()
                if m is not module
                and _same(got[0].flatten(), reads)
                and next(m.parameters(), None) is not None
            ]
            module = min(before, key=self._depth, default=None)
        if module is None or next(module.children(), None) is not None:
            return module
        top = self.names[module].partition(".")[0]
        return next((m for m, name in self.names.items() if name == top and m is not module), None)

    def _depth(self, module: nn.Module) -> int:
        return self.names[module].count(".")


def _adding_up(
    values: Mapping[nn.Module, Tensor], change: Tensor, start: Tensor, eps: float
) -> list[Write] | None:
    """Two outputs, or one, that times a number each make up a block's change."""
    values = {
        m: v
        for m, v in values.items()
        if v.shape == change.shape and v.norm() > 0 and not _same(v, start)
    }
    modules = list(values)
    if not modules or not change.norm() > 0:
        return None
    stack = torch.stack([values[m].flatten() for m in modules])
    products, aims = stack @ stack.T, stack @ change.flatten()
    total = float(change.norm() ** 2)

    def fits(at: list[int]) -> np.ndarray | None:
        """The numbers, if with them the outputs make up the change of every token."""
        some = products[at][:, at]
        try:
            scales = torch.linalg.solve(some, aims[at])
        except RuntimeError:  # one is a multiple of the other
            return None
        # Far off: spare the rest.
        if total - float(scales @ aims[at]) > max(1e-4, 64 * eps**2) * total:
            return None
        # Ones where they will do; other numbers are as exact as they can be known.
        for tried in (torch.ones_like(scales), scales):
            parts = tried[:, None] * stack[at]
            gap = (parts.sum(0).view_as(change) - change).norm(dim=-1)
            sizes = start.norm(dim=-1) + parts.view(len(at), *change.shape).norm(dim=-1).sum(0)
            if bool((gap <= 4 * eps * sizes).all()) and float(tried.abs().min()) > 1e-3:
                return tried.numpy()
        return None

    best: tuple[tuple, list[Write]] | None = None
    for i in range(len(modules)):
        for j in range(i + 1, len(modules)):
            scales = fits([i, j])
            if scales is None:
                continue
            rank = (bool((scales != 1).any()), abs(scales[0] - scales[1]) > 64 * eps, -i - j)
            if best is None or rank < best[0]:
                pair = zip((modules[i], modules[j]), scales, strict=True)
                best = rank, [Write(module, float(scale)) for module, scale in pair]
    if best is not None:
        return best[1]
    for i in reversed(range(len(modules))):
        scales = fits([i])
        if scales is not None:
            return [Write(modules[i], float(scales[0]))]
    return None


def _after_head(
    mine: Tensor, theirs: Tensor, named: Mapping[str, float]
) -> tuple[float, float | None, float]:
    """Scale, soft cap, and how far logits are then from the model's, relative to their size."""
    x, y = mine.numpy(), theirs.numpy()
    size = math.sqrt(float(np.mean(y * y))) or 1.0

    def gap(scale: float, cap: float | None) -> float:
        values = scale * x if cap is None else cap * np.tanh(scale * x / cap)
        return math.sqrt(float(np.mean((values - y) ** 2))) / size

    caps = [value for name, value in named.items() if "cap" in name]
    scales = [v for name, v in named.items() if "cap" not in name]
    scales = [1.0, *scales, *(1 / v for v in scales)]
    fitted = float(x @ y / max(x @ x, 1e-300))
    # In the order of what is known: a cap that is named bends only large logits, and may not
    # show on these; a number of the configuration is exact, and a fitted one is not.
    options = [(scale, cap) for cap in (*caps, None) for scale in scales] + [(fitted, None)]
    gaps = [gap(*option) for option in options]
    if min(gaps) > 1e-5:
        start = np.log([max(abs(fitted), 1e-6), 4 * np.abs(y).max() + 1e-6])
        some = slice(None, None, max(1, len(x) // 4096))

        def miss(p):
            return np.exp(p[1]) * np.tanh(np.exp(p[0] - p[1]) * x[some]) - y[some]

        scale, cap = (float(value) for value in np.exp(least_squares(miss, start).x))
        if cap < 50 * np.abs(y).max():
            options.append((1.0 if abs(scale - 1) < 1e-3 else scale, cap))
            gaps.append(gap(*options[-1]))
    enough = 1.1 * min(gaps) + 1e-7
    return next((*option, far) for option, far in zip(options, gaps, strict=True) if far <= enough)


def _named_numbers(config: Any) -> dict[str, float]:
    """Numbers of a configuration whose names speak of caps and scales of logits."""
    words = ("cap", "logit", "lm_head", "scal", "multiplier")
    return {
        name: float(value)
        for name, value in config.to_dict().items()
        if any(word in name for word in words)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value > 0
    }
