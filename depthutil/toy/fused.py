"""The residual stack in Triton: what ``depthutil.toy.kernels.FusedStack`` launches.

One program owns a tile of inputs of one network. It takes a few hidden units at a time, so
that of a hidden activation nothing ever leaves the chip, and of a weight nothing is kept.
Widths, hidden sizes and batches that fill no block are masked: what is masked is zero, and a
zero adds nothing anywhere.
"""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def _inverse(x, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """One over the root mean square of each row, ``(ROWS, 1)``."""
    return tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)[:, None]


@triton.jit
def _hidden(u, w1, b, units, cols, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, DOT: tl.constexpr):
    """A few of an MLP's hidden activations, and the weights that read ``u`` for them."""
    at = units[:, None] * WIDTH + cols[None, :]
    w1 = tl.load(w1 + at, mask=(units[:, None] < HIDDEN) & (cols[None, :] < WIDTH), other=0.0)
    pre = tl.dot(u, tl.trans(w1), input_precision=DOT)
    pre += tl.load(b + units, mask=units < HIDDEN, other=0.0)[None, :]
    # Not tl.maximum: it would turn a NaN into zero and hide it.
    return tl.where(pre < 0, 0.0, pre), w1


@triton.jit
def _out(w2, units, cols, WIDTH: tl.constexpr, HIDDEN: tl.constexpr):
    """The weights with which a few hidden units write, ``(width, units)``."""
    at = cols[:, None] * HIDDEN + units[None, :]
    return tl.load(w2 + at, mask=(cols[:, None] < WIDTH) & (units[None, :] < HIDDEN), other=0.0)


@triton.jit
def _mlp(
    x,
    w1,
    b,
    w2,
    cols,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    DOT: tl.constexpr,
):
    """What one MLP says to the states of a tile."""
    u = x * _inverse(x, EPS, WIDTH)
    said = tl.zeros_like(x)
    for first in range(0, HIDDEN, UNITS):
        units = first + tl.arange(0, UNITS)
        r, _ = _hidden(u, w1, b, units, cols, WIDTH, HIDDEN, DOT)
        out = _out(w2, units, cols, WIDTH, HIDDEN)
        said = tl.dot(r * r, tl.trans(out), said, input_precision=DOT)
    return said


@triton.jit
def forward(
    x,
    w1,
    b,
    w2,
    last,
    read,
    mlps,
    networks,
    batch,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ORDER: tl.constexpr,
    KEEP: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """All layers of a tile; with ``KEEP``, write down what each MLP read."""
    network = tl.program_id(1).to(tl.int64)  # from here on, offsets may pass 2³¹
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows[:, None] * WIDTH + cols[None, :]
    here = (rows[:, None] < batch) & (cols[None, :] < WIDTH)
    size = batch * WIDTH
    stream = tl.load(x + network * size + at, mask=here, other=0.0)
    stream *= _inverse(stream, EPS, WIDTH)
    for m in range(0, mlps, ORDER):
        n = m * networks + network
        says = stream
        if KEEP:
            tl.store(read + n * size + at, stream, mask=here)
        if ORDER == 2:
            says += 0.5 * _mlp(
                stream,
                w1 + n * HIDDEN * WIDTH,
                b + n * HIDDEN,
                w2 + n * HIDDEN * WIDTH,
                cols,
                EPS,
                WIDTH,
                HIDDEN,
                UNITS,
                DOT,
            )
            n += networks
            if KEEP:
                tl.store(read + n * size + at, says, mask=here)
        stream += _mlp(
            says,
            w1 + n * HIDDEN * WIDTH,
            b + n * HIDDEN,
            w2 + n * HIDDEN * WIDTH,
            cols,
            EPS,
            WIDTH,
            HIDDEN,
            UNITS,
            DOT,
        )
    tl.store(last + network * size + at, stream, mask=here)


@triton.jit
def backward(
    read,
    grad,
    onto,
    w1,
    b,
    w2,
    w1_parts,
    b_parts,
    w2_parts,
    networks,
    batch,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """One MLP backwards: a tile's share of its weights' gradients; what it read's, added.

    ``onto`` may be ``grad`` itself: a program reads all of its tile before it writes any.
    """
    tile = tl.program_id(0)
    network = tl.program_id(1).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows[:, None] * WIDTH + cols[None, :]
    here = (rows[:, None] < batch) & (cols[None, :] < WIDTH)
    read += network * batch * WIDTH
    grad += network * batch * WIDTH
    onto += network * batch * WIDTH
    x = tl.load(read + at, mask=here, other=0.0)
    g = tl.load(grad + at, mask=here, other=0.0)
    inverse = _inverse(x, EPS, WIDTH)
    u = x * inverse
    du = tl.zeros_like(u)
    part = tile * networks + network
    w1 += network * HIDDEN * WIDTH
    b += network * HIDDEN
    w2 += network * HIDDEN * WIDTH
    w1_parts += part * HIDDEN * WIDTH
    b_parts += part * HIDDEN
    w2_parts += part * HIDDEN * WIDTH
    for first in range(0, HIDDEN, UNITS):
        units = first + tl.arange(0, UNITS)
        r, w1_few = _hidden(u, w1, b, units, cols, WIDTH, HIDDEN, DOT)
        # d(r²) = 2 r dr, and r is zero where the relu was: no mask is needed.
        d_pre = 2 * r * tl.dot(g, _out(w2, units, cols, WIDTH, HIDDEN), input_precision=DOT)
        w2_grad = tl.dot(tl.trans(g), r * r, input_precision=DOT)
        w1_grad = tl.dot(tl.trans(d_pre), u, input_precision=DOT)
        du = tl.dot(d_pre, w1_few, du, input_precision=DOT)
        real = units < HIDDEN
        in_w1 = real[:, None] & (cols[None, :] < WIDTH)
        in_w2 = (cols[:, None] < WIDTH) & real[None, :]
        tl.store(w1_parts + units[:, None] * WIDTH + cols[None, :], w1_grad, mask=in_w1)
        tl.store(w2_parts + cols[:, None] * HIDDEN + units[None, :], w2_grad, mask=in_w2)
        tl.store(b_parts + units, tl.sum(d_pre, 0), mask=real)
    along = tl.sum(du * u, 1)[:, None] / WIDTH
    dx = (du - u * along) * inverse
    tl.store(onto + at, tl.load(onto + at, mask=here, other=0.0) + dx, mask=here)


#: Whether kernels run in Triton's interpreter, which is decided when they are first imported.
INTERPRETED = isinstance(forward, InterpretedFunction)
