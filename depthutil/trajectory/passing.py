"""What passes through a model in one forward pass, and the Gram matrices of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from depthutil.gram import ratio
from depthutil.stream import Anatomy, Stream

_STACK_BYTES = {"cpu": 4e6, "cuda": 256e6}  # of writes multiplied at a time: a cache, a GPU
_GROUP = {"cpu": 512, "cuda": 4096}  # tokens whose Gram matrices are evaluated at a time


class Buffers:
    """Memory for what hooks keep, used again for every batch.

    On a CPU, keeping a module's output alive makes the next modules write to fresh pages,
    which costs twice what copying it to pages already there does. A GPU's allocator has no
    such cost, and there outputs are kept as they are.
    """

    def __init__(self) -> None:
        self.slots: list[Tensor] = []
        self.used = 0

    def keep(self, states: Tensor) -> Tensor:
        if states.device.type != "cpu":
            return states
        if self.used == len(self.slots):
            self.slots.append(states.new_empty(0))
        slot = self.slots[self.used]
        if slot.dtype != states.dtype or slot.numel() < states.numel():
            slot = self.slots[self.used] = states.new_empty(states.numel())
        self.used += 1
        return slot[: states.numel()].view(states.shape).copy_(states)


class Trace:
    """What passed through the hooks in one forward pass."""

    def __init__(self, parts: Anatomy):
        self.start = self.after = torch.zeros(0)
        self.read = [torch.zeros(0)] * parts.depth  # blocks' inputs, where needed
        self.written: list[list[Tensor]] = [[] for _ in parts.blocks]


Hooks = list[tuple[nn.Module, Callable]]


def trace_of(
    live: Stream,
    inputs: dict[str, Tensor],
    buffers: Buffers | None = None,
    more: tuple[Hooks, Hooks] = ([], []),
) -> Trace:
    """Run a batch, and keep all that is written; ``more`` is hooked before and after too."""
    parts, trace = live.parts, Trace(live.parts)
    buffers = Buffers() if buffers is None else buffers
    buffers.used, keep = 0, buffers.keep

    def store(name: str, number: int | None = None) -> Callable[[Tensor], None]:
        if number is None:
            return lambda h: setattr(trace, name, keep(h))
        if name == "read":
            return lambda h: trace.read.__setitem__(number, keep(h))
        return lambda h: trace.written[number].append(keep(h))

    assert parts.norm is not None  # or the model had been refused when it was measured
    before = [(parts.blocks[0], store("start"))]
    after = [(parts.norm, store("after"))]
    for number, block in enumerate(parts.blocks):
        writes = () if parts.writes is None else parts.writes[number]
        if not writes:
            before.append((block, store("read", number)))
        modules = [write.module for write in writes] or [block]
        after += [(module, store("written", number)) for module in modules]
    live.run(inputs, [*before, *more[0]], [*after, *more[1]])
    return trace


def pick(states: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows ``(tokens, width)`` of hidden states, which may be on any device."""
    flat = states.reshape(-1, states.shape[-1])
    return flat[rows if isinstance(rows, slice) else rows.to(flat.device)]


class Writes:
    """The stream's start and writes of some tokens, in double precision."""

    def __init__(self, parts: Anatomy, trace: Trace, sublayers: bool, device: torch.device):
        self.parts, self.trace, self.sublayers, self.device = parts, trace, sublayers, device
        self.rows = 1 + parts.depth * (2 if sublayers else 1)

    def size(self, width: int) -> int:
        """How many tokens to take at a time."""
        budget = _STACK_BYTES.get(self.device.type, 4e6)
        return max(16, int(budget / (8 * width * (self.rows + 1))))

    def fill(self, out: Tensor, rows: Tensor | slice, after: bool = True) -> Tensor:
        """Write ``[h_0, writes…, norm(h_ℓ)]`` of these tokens into ``out``."""
        trace = self.trace
        out[:, 0] = self._get(trace.start, rows)
        for number in range(self.parts.depth):
            writes = self._writes(number, rows)
            if self.sublayers:
                out[:, 2 * number + 1], out[:, 2 * number + 2] = writes
                continue
            write = out[:, number + 1]
            write.copy_(writes[0])
            for more in writes[1:]:
                write += more
        if after:
            out[:, self.rows] = self._get(trace.after, rows)
        return out

    def _writes(self, number: int, rows: Tensor | slice) -> list[Tensor]:
        """What one block writes, in one part or two."""
        written = [self._get(states, rows) for states in self.trace.written[number]]
        if self.parts.writes is None:  # output − input
            return [written[0].double() - self._get(self.trace.read[number], rows)]
        writes = self.parts.writes[number]
        return [
            states if write.scale == 1 else write.scale * states.double()
            for write, states in zip(writes, written, strict=True)
        ]

    def _get(self, states: Tensor, rows: Tensor | slice) -> Tensor:
        states = pick(states, rows)
        return states if states.device == self.device else states.to(self.device)

    def empty(self, tokens: int, width: int) -> Tensor:
        shape = (tokens, self.rows + 1, width)
        return torch.empty(shape, dtype=torch.float64, device=self.device)


def gram_matrices(
    stack: Writes, rows: Tensor, width: int, null: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Gram matrices of a batch's tokens, a group at a time, and cosines with other tokens."""
    size = min(stack.size(width), len(rows))
    buffer = stack.empty(size, width)
    other = stack.empty(size, width) if null else None
    partners = rows.roll(len(rows) // 2)
    group = _GROUP.get(stack.device.type, _GROUP["cpu"])
    for begin in range(0, len(rows), group):
        grams, nulls = [], []
        for start in range(begin, min(begin + group, len(rows)), size):
            some = rows[start : min(start + size, begin + group)]
            filled = stack.fill(buffer[: len(some)], _as_slice(some))
            grams.append(filled @ filled.transpose(1, 2))
            if other is not None:
                theirs = partners[start : start + len(some)]
                theirs = stack.fill(other[: len(some)], theirs, after=False)
                nulls.append(_across_tokens(filled, theirs, stack))
        yield torch.cat(grams), torch.cat(nulls) if null else None


def _across_tokens(mine: Tensor, theirs: Tensor, stack: Writes) -> Tensor:
    """Cosines of each update of a token with the next layer's update of another token."""
    mine, theirs = (stack_[:, 1 : stack.rows] for stack_ in (mine, theirs))
    if stack.sublayers:
        mine, theirs = mine[:, 0::2] + mine[:, 1::2], theirs[:, 0::2] + theirs[:, 1::2]
    mine, theirs = mine[:, :-1], theirs[:, 1:]
    return ratio((mine * theirs).sum(2), mine.norm(dim=2) * theirs.norm(dim=2))


def _as_slice(rows: Tensor) -> Tensor | slice:
    """Consecutive rows as a slice, which is read without a copy."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def not_finite(number: int, what: str, row: int, position: int) -> str:
    """What to say of a batch whose states or losses are no numbers."""
    return (
        f"batch {number}: the {what} of row {row} at position {position} are not finite: load the "
        "model in another precision (float16 overflows first), or leave that document out"
    )
