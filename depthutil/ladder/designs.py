"""Ways of using depth: growing, looping, tying, scaled norms, scaled writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthutil import _checks, surgery
from depthutil.stream import anatomy


@dataclass(frozen=True)
class Design:
    """How a model of the ladder uses its depth; the default is the ladder's own way.

    Parameters
    ----------
    label : str
        What it is called, in a model's name too.
    grow : {None, "midas", "lidas", "last", "random"}
        Start with one block of layers and grow by :func:`depthutil.surgery.grow`.
    block : int
        Layers by which it grows; the depth is a multiple.
    alpha : float
        Of the lengths of the stages, PROP-α: :func:`depthutil.surgery.stages`.
    until : float
        The share of all steps in which it grows; afterwards it trains at full depth. A learning
        rate that falls should do so after it (``LadderConfig.cooldown``).
    loop : tuple of int, optional
        ``(e, L, k, d)``: e layers, L layers that run k times with the same weights, d layers.
        The depth of the model is e + kL + d.
    norm_scaling : bool
        Multiply what both norms of layer i, from 0, return by 1/√(i + 1): LayerNorm Scaling
        (Sun et al., arXiv 2502.05795).
    write_scale : float
        Multiply what each sublayer adds to the stream.

    Raises
    ------
    ValueError
        If a setting makes no sense, or two exclude each other.

    Examples
    --------
    >>> Design("midas", grow="midas", block=2).depths(12)
    [2, 4, 6, 8, 10, 12]
    >>> Design("loop", loop=(2, 2, 4, 2)).layers(12)
    [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5]
    """

    label: str = ""
    grow: str | None = None
    block: int = 2
    alpha: float = 1.0
    until: float = 0.85
    loop: tuple[int, int, int, int] | None = None
    norm_scaling: bool = False
    write_scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.counts(self, ("block",))
        if self.loop is not None:
            object.__setattr__(self, "loop", tuple(self.loop))
            whole = len(self.loop) == 4 and all(isinstance(n, int) and n >= 0 for n in self.loop)
            if not whole or self.loop[1] < 1 or self.loop[2] < 1:
                raise ValueError(f"loop is (before, looped, times, behind), not {self.loop}")
        if self.grow is not None:
            _checks.word(self.grow, surgery.METHODS, "grow")
            if self.loop is not None or self.norm_scaling:
                raise ValueError("a model that grows has no loops and no norms scaled by place")
        if not 0 < self.until <= 1:
            raise ValueError(f"until is a share of the steps, above 0 up to 1, not {self.until}")
        for name in ("alpha", "write_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is a number, not {getattr(self, name)}")

    def text(self, depth: int) -> str:
        """What is done, in words, for a model of this depth.

        Examples
        --------
        >>> Design("lns", norm_scaling=True).text(4)
        'norm outputs of layer i, from 0, times 1/√(i + 1)'
        """
        said = []
        if self.grow is not None:
            depths = self.depths(depth)
            growing = f"grown by {self.grow} from {depths[0]} to {depths[-1]} layers, {self.block}"
            said.append(f"{growing} at a time, in the first {self.until:.0%} of the steps")
        if self.loop is not None:
            before, looped, times, behind = self.loop
            said.append(f"{before} layers, {looped} that run {times} times, {behind} layers")
        if self.norm_scaling:
            said.append("norm outputs of layer i, from 0, times 1/√(i + 1)")
        if self.write_scale != 1:
            said.append(f"writes times {self.write_scale:.3g}")
        return "; ".join(said) or "every layer trained from the start"

    def check(self, depth: int) -> None:
        """Raise a ValueError if a model of this depth cannot be made so."""
        if self.loop is not None:
            before, looped, times, behind = self.loop
            whole = before + looped * times + behind
            if whole != depth:
                raise ValueError(f"loop {self.loop} makes {whole} layers, not {depth}")
        if self.grow is not None and depth % self.block:
            raise ValueError(f"a depth of {depth} is no multiple of blocks of {self.block}")

    def layers(self, depth: int) -> list[int]:
        """For each layer, which of the layers that have weights of their own it is."""
        self.check(depth)
        if self.loop is None:
            return list(range(depth))
        before, looped, times, behind = self.loop
        end = before + looped
        return [*range(before), *list(range(before, end)) * times, *range(end, end + behind)]

    def depths(self, depth: int) -> list[int]:
        """The depths of its stages."""
        self.check(depth)
        return [depth] if self.grow is None else list(range(self.block, depth + 1, self.block))

    def ends(self, depth: int, steps: int) -> list[int]:
        """After which of all steps each of its stages ends."""
        depths = self.depths(depth)
        growing = surgery.stages(max(round(steps * self.until), 1), depths, self.alpha)
        return [*growing[:-1], steps]

    def depth_at(self, depth: int, step: int, steps: int) -> int:
        """How deep it is in the update that follows ``step`` of ``steps`` updates."""
        stages = zip(self.depths(depth), self.ends(depth, steps), strict=True)
        return next((deep for deep, end in stages if step < end), depth)

    def arranged(self, model: Any, depth: int) -> Any:
        """A model whose layers have weights of their own, looped and scaled as designed."""
        if self.loop is not None:
            before, looped, times, _ = self.loop
            surgery.loop(model, before, before + looped - 1, times)
        blocks: Any = anatomy(model).blocks
        for number, block in enumerate(blocks):
            if self.norm_scaling:
                scale = (number + 1) ** -0.5
                block.input_layernorm = _Scaled(block.input_layernorm, scale)
                block.post_attention_layernorm = _Scaled(block.post_attention_layernorm, scale)
            if self.write_scale != 1:
                block.self_attn.o_proj = _Scaled(block.self_attn.o_proj, self.write_scale)
                block.mlp.down_proj = _Scaled(block.mlp.down_proj, self.write_scale)
        return model


#: The designs that the book compares, at a depth of twelve layers and in blocks of two.
DESIGNS = {
    design.label: design
    for design in (
        Design("baseline"),
        Design("lns", norm_scaling=True),
        Design("midas", grow="midas"),
        Design("lidas", grow="lidas"),
        Design("last", grow="last"),
        Design("random", grow="random"),
        Design("loop-2x6", loop=(0, 2, 6, 0)),
        Design("loop-6x2", loop=(0, 6, 2, 0)),
        Design("loop-2-2x4-2", loop=(2, 2, 4, 2)),
        Design("tied", loop=(0, 1, 12, 0)),
    )
}


class _Scaled(nn.Module):
    """A norm or a linear map whose output is multiplied by a constant.

    Its weight has the name that it had, and :func:`plain_weights` multiplies it by the constant,
    so that a trained model is an ordinary one again. In training the two differ: Adam moves a
    weight by steps of one size, whatever stands before it.
    """

    scale: Tensor

    def __init__(self, module: Any, scale: float):
        super().__init__()
        self.weight: nn.Parameter = module.weight
        self.linear = isinstance(module, nn.Linear)
        self.epsilon = getattr(module, "variance_epsilon", 0.0)
        # A buffer, and no number that a compiler would take for a reason to compile again.
        self.register_buffer("scale", torch.tensor(float(scale)), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        if self.linear:
            return self.scale * nn.functional.linear(states, self.weight)
        long = states.float()
        long = long * torch.rsqrt(long.square().mean(-1, keepdim=True) + self.epsilon)
        return self.scale * self.weight * long.to(states.dtype)


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of an ordinary model that computes the same."""
    state = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, _Scaled):
            state[f"{name}.weight"] = state[f"{name}.weight"] * module.scale.cpu()
    return state
