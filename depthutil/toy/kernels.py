"""Residual stacks of many networks at once, forward and backward.

:class:`Stack` says in PyTorch how a stack is computed, on any machine; :class:`FusedStack`
does the same in Triton, on a GPU; :func:`choose` picks one. What both must equal, one
network at a time, is ``Network`` of ``depthutil.toy.model``.

What does the hardware allow? For one input, a layer of width ``d`` and hidden size ``h``
costs ``4dh`` FLOP forward and ``8dh`` backward, 49,152 for ``d = 32`` and ``h = 128``.
:class:`Stack` writes or reads the hidden activation (512 bytes) sixteen times on the way,
hence 6 FLOP a byte, and an H200 needs 14 to be busy in float32: it waits for memory.
:class:`FusedStack` moves the stream and its gradient (128 bytes, five times) and its share of
the weights' gradients (1 KB), and pays ``2dh`` for computing the hidden activation again:
30 FLOP a byte, it waits for arithmetic.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from depthutil.toy.model import EPS, rms

__all__ = ["PRECISIONS", "FusedStack", "Memory", "Stack", "choose"]

#: How :class:`FusedStack` multiplies: in float32; in three passes of tf32, about as exact;
#: in tf32, whose factors have 10 bits of mantissa.
PRECISIONS = ("ieee", "tf32x3", "tf32")

# A program holds a tile of so many numbers (64 inputs of width 32) and 32 hidden units at a
# time. Backward that is 36 KiB of shared memory for "ieee" on a T4, which has 64, and 88 KiB
# for "tf32x3" on an H100, which has 227; what a thread computes with fits its registers, and
# twice as much of either would not. To see this no GPU is needed: tests/test_kernels.py
# compiles for cards that are not there.
TILE, UNITS, OPTIONS = 2048, 32, {"num_warps": 8, "num_stages": 2}
WIDEST = 64


class Stack:
    """Networks of one depth side by side: each layer of all of them is one batched product.

    A layer adds ``W₂ relu(W₁ rms(x) + b)²`` to the stream ``x``, and the stream begins as
    ``rms`` of the input (arXiv 2602.05970, appendix C).

    Parameters
    ----------
    w1, b, w2 : torch.Tensor
        ``(mlps, networks, hidden, width)``, ``(mlps, networks, hidden)`` and
        ``(mlps, networks, width, hidden)``.
    order : int
        1, or 2 for midpoint steps of two MLPs each.
    memory : Memory, optional
        Where :meth:`backward` finds what :meth:`forward` left. Stacks that take turns
        share one.

    Examples
    --------
    >>> w1, b, w2 = torch.ones(3, 2, 8, 4), torch.zeros(3, 2, 8), torch.zeros(3, 2, 4, 8)
    >>> stack = Stack(w1, b, w2)  # two networks of three layers that add nothing
    >>> x = torch.full((2, 5, 4), 3.0)
    >>> stack.forward(x).shape, stack.forward(x, states=True).shape
    (torch.Size([2, 5, 4]), torch.Size([4, 2, 5, 4]))
    >>> bool((stack.forward(x) - 1).abs().max() < 1e-6)
    True
    """

    def __init__(
        self, w1: Tensor, b: Tensor, w2: Tensor, order: int = 1, memory: Memory | None = None
    ):
        self.w1, self.b, self.w2, self.order = w1, b, w2, order
        self.memory = memory or Memory()

    @torch.no_grad()
    def forward(self, x: Tensor, keep: bool = False, states: bool = False) -> Tensor:
        """Send inputs through all layers.

        Parameters
        ----------
        x : torch.Tensor
            ``(networks, batch, width)``.
        keep : bool
            Leave in memory what :meth:`backward` needs.
        states : bool
            Return the stream before the first layer and after each.

        Returns
        -------
        torch.Tensor
            The last state, ``(networks, batch, width)``, or all, layer first.
        """
        mlps, hidden, take = len(self.w1), self.w1.shape[2], self.memory.take
        slots = mlps if keep else 1
        self.u = take("u", (slots, *x.shape), x)
        self.inverse = take("inverse", (slots, *x.shape[:2], 1), x)
        self.r = take("r", (slots, *x.shape[:2], hidden), x)
        self.square, self.pre = (take(name, self.r.shape[1:], x) for name in ("square", "pre"))
        x = rms(x)
        stream = [x.clone()]
        for m in range(0, mlps, self.order):
            if self.order == 2:
                middle = self._write(x.clone(), x, m, 0.5, keep)
                self._write(x, middle, m + 1, 1.0, keep)
            else:
                self._write(x, x, m, 1.0, keep)
            if states:
                stream.append(x.clone())
        return torch.stack(stream) if states else x

    def _write(self, to: Tensor, read: Tensor, m: int, share: float, keep: bool) -> Tensor:
        """Add to a stream, in place, a share of what MLP ``m`` answers to ``read``."""
        slot = m if keep else 0
        u, inverse, r = self.u[slot], self.inverse[slot], self.r[slot]
        torch.linalg.vector_norm(read, dim=-1, keepdim=True, out=inverse)
        inverse.square_().div_(read.shape[-1]).add_(EPS).rsqrt_()
        torch.mul(read, inverse, out=u)
        torch.baddbmm(self.b[m].unsqueeze(1), u, self.w1[m].mT, out=r).relu_()
        return to.baddbmm_(torch.mul(r, r, out=self.square), self.w2[m].mT, alpha=share)

    @torch.no_grad()
    def backward(self, grad: Tensor, into: Sequence[Tensor]) -> None:
        """From the gradient of the last state to those of the weights.

        Parameters
        ----------
        grad : torch.Tensor
            ``(networks, batch, width)``, after a ``forward`` with ``keep=True``.
        into : sequence of torch.Tensor
            Three tensors of the weights' shapes, overwritten.
        """
        grad = grad.clone()
        for m in reversed(range(0, len(self.w1), self.order)):
            if self.order == 2:
                middle = torch.zeros_like(grad)
                self._backward_mlp(grad, m + 1, into, onto=middle)
                grad += middle
                self._backward_mlp(middle / 2, m, into, onto=grad)
            else:
                self._backward_mlp(grad, m, into, onto=grad)

    def _backward_mlp(self, grad: Tensor, m: int, into: Sequence[Tensor], onto: Tensor) -> None:
        """From the gradient of what MLP ``m`` wrote to its weights' and, added, what it read's."""
        w1_grad, b_grad, w2_grad = into
        u, inverse, r = self.u[m], self.inverse[m], self.r[m]
        torch.bmm(grad.mT, torch.mul(r, r, out=self.square), out=w2_grad[m])
        # d(r²) = 2 r dr, and r is zero where the relu was: no mask is needed.
        pre = torch.bmm(2 * grad, self.w2[m], out=self.pre).mul_(r)
        torch.bmm(pre.mT, u, out=w1_grad[m])
        torch.sum(pre, 1, out=b_grad[m])
        du = torch.bmm(pre, self.w1[m])
        along = (du * u).sum(-1, keepdim=True)
        onto.addcmul_(du.addcmul_(u, along, value=-1 / u.shape[-1]), inverse)


class FusedStack(Stack):
    """:class:`Stack` in Triton: the hidden activation never leaves the chip.

    Forward, a tile of inputs of one network passes all layers in one go; what each MLP read
    is kept for backward, which computes the hidden activation again, layer by layer. Each
    tile writes its own share of a layer's weight gradients, and the shares are added in a
    fixed order: equal runs end in equal bits, which atomic additions would not grant.

    Parameters
    ----------
    w1, b, w2, order, memory
        As for :class:`Stack`; contiguous, float32, of width 64 at most.
    precision : str
        One of ``PRECISIONS``; sums are float32 with each.

    Raises
    ------
    ValueError
        If the weights are none that the kernels can compute with.

    Examples
    --------
    >>> w1, b, w2 = torch.ones(3, 2, 8, 4), torch.zeros(3, 2, 8), torch.zeros(3, 2, 4, 8)
    >>> FusedStack(w1.double(), b.double(), w2.double())
    Traceback (most recent call last):
    ...
    ValueError: the Triton kernels compute in float32, not float64
    """

    def __init__(
        self,
        w1: Tensor,
        b: Tensor,
        w2: Tensor,
        order: int = 1,
        memory: Memory | None = None,
        precision: str = "ieee",
    ):
        super().__init__(w1, b, w2, order, memory)
        why = _why_not(w1.device, w1.shape[-1], w1.dtype, precision)
        if why:
            raise ValueError(why)
        if not all(weight.is_contiguous() for weight in (w1, b, w2)):
            raise ValueError("the Triton kernels need contiguous weights: call contiguous()")
        self.settings = settings(w1.shape[-1], w1.shape[2], precision)

    @torch.no_grad()
    def forward(self, x: Tensor, keep: bool = False, states: bool = False) -> Tensor:
        """As :meth:`Stack.forward`."""
        from depthutil.toy import fused

        x, mlps = x.contiguous(), len(self.w1)
        networks, batch, _ = x.shape
        last = torch.empty_like(x)
        keep = keep or states
        self.read = self.memory.take("read", (mlps, *x.shape), x) if keep else last
        tiles = math.ceil(batch / self.settings["ROWS"])
        fused.forward[tiles, networks](
            *(x, self.w1, self.b, self.w2, last, self.read, mlps, networks, batch),
            ORDER=self.order,
            KEEP=keep,
            **self.settings,
        )
        return torch.cat([self.read[:: self.order], last[None]]) if states else last

    def backward(self, grad: Tensor, into: Sequence[Tensor]) -> None:
        """As :meth:`Stack.backward`."""
        super().backward(grad.contiguous(), into)

    def _backward_mlp(self, grad: Tensor, m: int, into: Sequence[Tensor], onto: Tensor) -> None:
        from depthutil.toy import fused

        networks, batch, _ = grad.shape
        tiles = math.ceil(batch / self.settings["ROWS"])
        weights = [weight[m] for weight in (self.w1, self.b, self.w2)]
        parts = [
            self.memory.take(f"part{i}", (tiles, *weight.shape), weight)
            for i, weight in enumerate(weights)
        ]
        fused.backward[tiles, networks](
            *(self.read[m], grad, onto, *weights, *parts, networks, batch), **self.settings
        )
        for part, whole in zip(parts, into, strict=True):
            torch.sum(part, 0, out=whole[m])


def settings(width: int, hidden: int, precision: str) -> dict[str, Any]:
    """What the kernels are compiled for."""
    columns = max(16, 2 ** math.ceil(math.log2(width)))  # no product is smaller in Triton
    blocks = {"ROWS": TILE // max(columns, 32), "COLS": columns, "UNITS": UNITS}
    return {"EPS": EPS, "WIDTH": width, "HIDDEN": hidden, "DOT": precision, **blocks, **OPTIONS}


class Memory:
    """Arrays that are written anew at every step, kept between steps."""

    def __init__(self) -> None:
        self.arrays: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An array of this shape whose content is whatever was there."""
        size = math.prod(shape)
        if name not in self.arrays or self.arrays[name].numel() < size:
            self.arrays[name] = like.new_empty(size)
        return self.arrays[name][:size].view(shape)


def choose(
    kernel: str = "auto",
    device: str | torch.device = "cpu",
    *,
    width: int = 32,
    dtype: str | torch.dtype = torch.float32,
    precision: str = "ieee",
) -> tuple[Callable[..., Stack], str]:
    """Which stack to compute with, and what to say about the choice.

    Parameters
    ----------
    kernel : str
        ``"torch"`` for :class:`Stack`, ``"triton"`` for :class:`FusedStack`, or ``"auto"``:
        Triton on a GPU that it supports, PyTorch on a CPU and wherever Triton cannot.
    device : str or torch.device
    width : int
        Of the residual stream.
    dtype : str or torch.dtype
    precision : str
        One of ``PRECISIONS``, for Triton; PyTorch has a switch of its own,
        ``torch.set_float32_matmul_precision``.

    Returns
    -------
    tuple
        The class to make stacks of, called as :class:`Stack`, and the choice in words.

    Raises
    ------
    ValueError
        If what is asked for by name cannot be had.

    Examples
    --------
    >>> choose()
    (<class 'depthutil.toy.kernels.Stack'>, 'torch')
    >>> choose("triton", dtype="float64")
    Traceback (most recent call last):
    ...
    ValueError: kernel 'triton' cannot be used: the Triton kernels compute in float32, not
    float64; 'auto' takes another where it must
    """
    for name, value, known in (
        ("kernel", kernel, ("auto", "torch", "triton")),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {known}, not {value!r}")
    device = torch.device(device)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if kernel == "torch" and precision != "ieee":
        raise ValueError(f"precision {precision!r} is one of kernel 'triton', not of 'torch'")
    if kernel == "torch" or (kernel == "auto" and device.type == "cpu"):
        return Stack, "torch"
    why = _why_not(device, width, dtype, precision)
    if kernel == "auto" and not why and torch.cuda.get_device_capability(device) < (8, 0):
        why = "Triton supports GPUs from compute capability 8.0"
    if why and kernel == "triton":
        raise ValueError(
            f"kernel 'triton' cannot be used: {why}; 'auto' takes another where it must"
        )
    if why:
        return Stack, f"torch, because {why}"
    return partial(FusedStack, precision=precision), f"triton, {precision}"


def _why_not(device: torch.device, width: int, dtype: Any, precision: str) -> str:
    """What keeps the Triton kernels from computing this; nothing, if they can."""
    if dtype != torch.float32:
        return f"the Triton kernels compute in float32, not {str(dtype).removeprefix('torch.')}"
    if width > WIDEST:
        return f"the Triton kernels hold widths up to {WIDEST}, not {width}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda":
        if precision != "ieee" and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{precision} needs a GPU of compute capability 8.0 or more"
        return ""
    from depthutil.toy import fused

    if device.type == "cpu" and fused.INTERPRETED:
        return ""
    return (
        "the Triton kernels need a GPU with CUDA (or, to follow them step by step, "
        "TRITON_INTERPRET=1 set before Python starts)"
    )
