"""Measure whether a model's residual stream is what names let us suppose.

Names do not say what the code between blocks, norm and head does: whether a block adds to the
stream or rescales it, whether its sublayers read one after the other, what happens to logits
after the head, whether a position sees later ones. :func:`measured` finds out on a short piece
of the first batch, by hooks that change what one part reads and look at what another returns.
What it cannot confirm it refuses in one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

from depthutil.stream.adding import Inside, adding_up, differ, exact, first_tensor, same
from depthutil.stream.hooks import evaluating, hooked, watched
from depthutil.stream.inputs import device_of, forward
from depthutil.stream.parts import Anatomy, Write, anatomy

#: How many documents and positions of the first batch a model is measured on.
PROBE = (2, 32)

#: How much larger the stream is made to see whether a block adds to it.
SCALE = 1000.0

#: What part of its length a stream so enlarged may move in one block that adds. A block that
#: rescales or normalises moves it by all of its length, or by what it rescales.
MOVES = 0.05


def measured(
    model: nn.Module, inputs: Mapping[str, Tensor], parts: Anatomy | None = None, *, head: bool
) -> Anatomy:
    """What a model's blocks, sublayers, norm and head really do, on a piece of a batch.

    Costs a few forward passes of at most ``PROBE`` tokens.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model or its backbone.
    inputs : dict of str to torch.Tensor
        ``input_ids`` ``(documents, positions)`` and, where given, ``attention_mask`` and
        ``position_ids``.
    parts : Anatomy, optional
        What names say, by default ``anatomy(model)``.
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
    parts = anatomy(model) if parts is None else parts
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

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            reads, gives = first_tensor(*args, *kwargs.values()), first_tensor(output)
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
                m is module and same(reads, end) and same(gives, self.last)
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
            if not same(self.returned[number - 1][0], self.read[number][0]):
                raise self.refuse(f"what block {number} returns is not what the next module reads")

    def check_additive(self) -> None:
        """A block that adds leaves a stream that is much larger nearly as it was."""
        moved: dict[int, tuple[float, float]] = {}
        scales: dict[int, float] = {}
        before, after = [], []
        for number, block in enumerate(self.parts.blocks):
            h, out = self.read[number][0], self.returned[number][0]
            relative = float((exact(out) - exact(h)).norm() / exact(h).norm().clamp(min=1e-30))
            scale = SCALE * max(1.0, relative)
            if h.dtype == torch.float16:  # which ends at 65,504
                scale = min(scale, 2e4 / float(h.abs().max().clamp(min=1e-30)))
            scale = max(2.0 ** round(math.log2(scale)), 1.0) if math.isfinite(scale) else 1.0
            scales[number] = scale

            def enlarge(states: Tensor, scale: float = scale) -> Tensor:
                return states * scale

            def look(
                states: Tensor,
                number: int = number,
                h: Tensor = h,
                out: Tensor = out,
                scale: float = scale,
                relative: float = relative,
            ) -> Tensor:
                large = scale * exact(h)
                far = float((exact(states) - large).norm() / large.norm().clamp(min=1e-30))
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
        known, found = self.parts.writes, self.found[number]
        if known is None and found is None:
            return False
        writes = [w for w, _ in found or ()] if known is None else known[number]
        block, out = self.parts.blocks[number], self.returned[number][0]
        large = scale * self.read[number][0]
        whole: list[Tensor] = []
        got: list[list[Tensor]] = [[] for _ in writes]
        after: list[tuple[nn.Module, Callable]]
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
        mine, theirs = exact(self.returned[-1][0]), exact(got[0])
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
        each = parts.writes or ()
        flat = [write for writes in each for write in writes]
        got: list[list[Tensor]] = [[] for _ in flat]
        with hooked(after=[(w.module, _keeping(g)) for w, g in zip(flat, got, strict=True)]):
            forward(parts, self.inputs)
        if {len(g) for g in got} != {1}:
            raise self.refuse("its sublayers do not run exactly once each, in order")
        outputs = iter(got)
        for number, writes in enumerate(each):
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
        return exact(states).reshape(len(self.real), -1)[self.real]

    def _look_inside(self, streams: Sequence[Tensor]) -> tuple[list[Inside], list[Tensor]]:
        """What every block's modules return on these streams, and what the blocks return."""
        insides = [Inside(block, len(self.real)) for block in self.parts.blocks]
        whole: dict[int, Tensor] = {}
        before, after = [], []
        for number, block in enumerate(self.parts.blocks):
            own = self.returned[number][0]

            def keep(states: Tensor, number: int = number, own: Tensor = own) -> Tensor:
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
            added = (exact(out) - exact(h)).norm(dim=-1, keepdim=True)
            size = exact(h).norm(dim=-1, keepdim=True).clamp(min=1e-30)
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
        seen: Inside,
        again: Inside,
        later: Tensor,
    ) -> list[tuple[Write, nn.Module | None]] | None:
        eps = torch.finfo(whole.dtype).eps
        start, end = self._rows(small), self._rows(whole)
        found = adding_up(seen.distinct(self.real), end - start, start, eps)
        if found is None:
            return None
        if len(found) == 2:
            # The one that mixes positions is attention. Who reads after it mixes too.
            mixes = []
            for write in found:
                one, two = (inside.value(write.module)[later] for inside in (seen, again))
                mixes.append(differ(one, two, whole.dtype))
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
        return differ(exact(own[0]), exact(other[0]), own[0].dtype)

    def _parallel(self) -> bool | None:
        """Whether the MLP reads the same stream as attention; None if blocks differ.

        Where one of them writes nothing (it has been silenced) there is nothing to see.
        """
        own: dict[int, Tensor] = {}
        other: dict[int, Tensor] = {}
        speaks: set[int] = set()

        def heard(number: int, states: Tensor) -> None:
            if bool((states != 0).any()):
                speaks.add(number)

        def instead(given: Tensor, states: Tensor) -> Tensor:
            return given.clone()

        def keep(store: dict[int, Tensor], number: int, states: Tensor) -> None:
            store[number] = states.clone()

        def run(store: dict[int, Tensor], silent: bool) -> None:
            before: list[tuple[nn.Module, Callable]] = []
            after: list[tuple[nn.Module, Callable]] = []
            for number, (attention, mlp) in enumerate(self.parts.writes or ()):
                out, small = self.returned[number][0], self.small[number]
                before.append((self.parts.blocks[number], partial(instead, small)))
                silence = torch.zeros_like if silent else partial(heard, number)
                after.append((attention.module, silence))
                after.append((mlp.module, partial(keep, store, number)))
                after.append((self.parts.blocks[number], partial(instead, out)))
            with hooked(before, after):
                forward(self.parts, self.inputs)

        run(own, False)
        run(other, True)
        alike = {
            not differ(exact(own[n]), exact(other[n]), own[n].dtype) for n in speaks if own[n].any()
        }
        if not alike:
            return self.parts.parallel
        return alike.pop() if len(alike) == 1 else None

    # What becomes of logits?

    def find_logits(self) -> None:
        """The scale and soft cap that take the head's output to the model's logits."""
        parts = self.parts
        end = self.returned[-1][0].reshape(len(self.real), -1)[self.real][:64]
        plain = replace(parts, scale=1.0, softcap=None)
        mine = plain.logits(end.to(device_of(parts.norm or self.model))).double().cpu()
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

        def miss(p: np.ndarray) -> np.ndarray:
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
