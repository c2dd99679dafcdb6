"""Where a model's blocks read and write, as far as names say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: For each ``model_type`` that is known by name, where in the backbone its blocks and its
#: final norm are, and in a block, attention and MLP, and the two modules whose outputs are added to
#: the stream. Of all others, ``measured`` finds what writes.
FAMILIES = {
    "gpt2": ("h", "attn", "mlp", "attn", "mlp", "ln_f"),
    "gpt_neox": ("layers", "attention", "mlp", "attention", "mlp", "final_layer_norm"),
    # Two bare linear maps among the rest of the block make up its MLP, which is no module.
    "opt": ("layers", "self_attn", None, "self_attn", "fc2", "final_layer_norm"),
    "phi": ("layers", "self_attn", "mlp", "self_attn", "mlp", "final_layernorm"),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3"),
        ("layers", "self_attn", "mlp", "self_attn", "mlp", "norm"),
    ),
    # These normalise a sublayer's output once more before they add it to the stream.
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "olmo2"),
        (
            "layers",
            "self_attn",
            "mlp",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ),
    ),
}


class Write(NamedTuple):
    """A module whose output is added to the stream.

    Attributes
    ----------
    module : torch.nn.Module
    scale : float
        What its output is multiplied with before (Granite's ``residual_multiplier``).
    """

    module: nn.Module
    scale: float = 1.0


@dataclass(frozen=True)
class Anatomy:
    """Where a model's blocks read and write.

    :func:`anatomy` fills it in by names. What names do not say is None until
    :func:`measured` has found it on a batch.

    Attributes
    ----------
    family : str
        The ``model_type`` of the configuration.
    backbone : torch.nn.Module
        The model without its head.
    container : torch.nn.ModuleList
        What holds the blocks, to swap, drop or repeat them.
    blocks : tuple of torch.nn.Module
        In the order in which they run.
    attention, mlp : tuple of torch.nn.Module, or None
        For each block, the modules that compute; None where it is not known, or no one module
        does (OPT's MLP). In a hybrid, ``attention`` is whatever mixes positions.
    writes : tuple of tuple of Write, or None
        For each block, the modules whose outputs are added to the stream: attention's and
        the MLP's, or only one where a block has one.
    norm : torch.nn.Module or None
        The norm after the last block.
    embedding, head : torch.nn.Module or None
        Token embedding and map to logits; no head in a bare backbone.
    parallel : bool or None
        Whether attention and MLP read the same stream, and not one after the other.
    scale : float
        Logits are ``scale`` times what the head returns (Cohere, Granite).
    softcap : float or None
        Logits are then ``softcap · tanh(logits / softcap)``, where given (Gemma 2).
    """

    family: str
    backbone: nn.Module
    container: nn.ModuleList
    blocks: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...] | None
    mlp: tuple[nn.Module, ...] | None
    writes: tuple[tuple[Write, ...], ...] | None
    norm: nn.Module | None
    embedding: nn.Module | None
    head: nn.Module | None
    parallel: bool | None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Size of the stream, as the configuration or else the embedding says."""
        size = getattr(text_config(self.backbone.config), "hidden_size", None)
        return int(_weight(self.embedding).shape[1] if size is None else size)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, as the configuration or else the embedding says."""
        size = getattr(text_config(self.backbone.config), "vocab_size", None)
        return int(_weight(self.embedding).shape[0] if size is None else size)

    @property
    def tokens(self) -> int:
        """How many token ids the embedding has room for."""
        weight = getattr(self.embedding, "weight", None)
        return self.vocabulary if weight is None else int(weight.shape[0])

    @property
    def positions(self) -> int | None:
        """How many positions the model was made for; None where there is no limit."""
        config = text_config(self.backbone.config)
        room = getattr(config, "max_position_embeddings", None)
        # Rotary frequencies that follow the length of the text have no limit.
        rope = getattr(config, "rope_scaling", None) or {}
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "dynamic":
            return None
        return room if isinstance(room, int) and room > 0 else None

    @property
    def sublayers(self) -> bool:
        """Whether it is known of every block where attention and MLP write."""
        return self.writes is not None and all(len(writes) == 2 for writes in self.writes)

    @property
    def attention_write(self) -> tuple[nn.Module, ...] | None:
        """For each block, the module whose output is what attention adds to the stream."""
        if self.writes is None or not self.sublayers:
            return None
        return tuple(attention.module for attention, _ in self.writes)

    @property
    def mlp_write(self) -> tuple[nn.Module, ...] | None:
        """For each block, the module whose output is what the MLP adds to the stream."""
        if self.writes is None or not self.sublayers:
            return None
        return tuple(mlp.module for _, mlp in self.writes)

    def logits(self, states: Tensor) -> Tensor:
        """What the final norm and the head make of states ``(…, width)``, in float32 or better."""
        return self.decoded(states if self.norm is None else self.norm(states))

    def decoded(self, normed: Tensor) -> Tensor:
        """What the head makes of states that have been through the final norm."""
        if self.head is None:
            raise ValueError(
                f"this {self.family} model has no head: load the causal language model, not the "
                "bare backbone"
            )
        weight = next(self.head.parameters())
        # Weights that a device_map keeps on disk are on no device until they are used.
        logits = self.head(normed if weight.is_meta else normed.to(weight.device))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if self.scale == 1 else self.scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def anatomy(model: nn.Module) -> Anatomy:
    """Find a causal language model's blocks, sublayers, norms, embedding and head, by names.

    Of the families of ``FAMILIES`` everything is known. Of any other decoder, the blocks are
    its only list of as many modules as it has layers; what its sublayers are is measured when
    it is recorded.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal language model, or its backbone. Of a model that also sees or
        hears, its text decoder is taken; of one with adapters, the model inside.

    Returns
    -------
    Anatomy

    Raises
    ------
    ValueError
        If blocks do not add to the stream (an encoder, the post-norm ``opt-350m``) or cannot
        be found; the message names the architecture.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> parts = anatomy(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)))
    >>> parts.depth, parts.width, type(parts.norm).__name__, parts.parallel
    (3, 4, 'LayerNorm', False)
    """
    model = _unwrapped(model)
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or family is None:
        raise TypeError(f"model is a Hugging Face causal language model, not a {kind(model)}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind(model)} ({family}) has an encoder: only decoders have one stream")
    if family == "opt" and not config.do_layer_norm_before:
        raise ValueError(
            f"{kind(model)} with do_layer_norm_before=False (opt-350m) normalises the stream "
            "itself after every write, so that its states are no sums of writes: take another size"
        )
    backbone = _decoder(model)
    family = getattr(getattr(backbone, "config", None), "model_type", family)
    attention = mlp = writes = parallel = None
    if family in FAMILIES:
        blocks_at, attention_at, mlp_at, *writes_at, norm_at = FAMILIES[family]
        container: Any = backbone.get_submodule(blocks_at)
        norm: nn.Module | None = backbone.get_submodule(norm_at)
        attention, mlp = (
            None if at is None else tuple(block.get_submodule(at) for block in container)
            for at in (attention_at, mlp_at)
        )
        writes = tuple(
            tuple(Write(block.get_submodule(at)) for at in writes_at) for block in container
        )
        parallel = family == "phi" or (
            family == "gpt_neox" and bool(getattr(config, "use_parallel_residual", True))
        )
    else:
        container, norm = _generic(backbone, kind(model), family)
    return Anatomy(
        family=family,
        backbone=backbone,
        container=container,
        blocks=tuple(container),
        attention=attention,
        mlp=mlp,
        writes=writes,
        norm=norm,
        embedding=model.get_input_embeddings(),  # type: ignore[operator]
        head=_head(model, backbone),
        parallel=parallel,
        softcap=getattr(text_config(config), "final_logit_softcapping", None),
    )


def _weight(embedding: Any) -> Tensor:
    return embedding.weight


def kind(model: Any) -> str:
    return type(model).__name__


def text_config(config: Any) -> Any:
    """Of a model that also sees or hears, the configuration of what reads text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _unwrapped(model: Any) -> Any:
    """The model inside a wrapper of adapters (PEFT), which act on it in its place."""
    if not hasattr(model, "get_base_model"):
        return model
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        raise ValueError(
            f"{kind(model)} puts learned positions before the tokens (prompt tuning), so that "
            "states are not those of the tokens: record model.get_base_model() without them"
        )
    return model.get_base_model()


def _decoder(model: Any) -> nn.Module:
    """The part that reads text, without the head."""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):  # it has none, or names a part that it lacks
        decoder = None
    if isinstance(decoder, nn.Module) and decoder is not model and hasattr(decoder, "config"):
        return decoder
    if model.base_model is not model:
        return model.base_model
    # Some classes name their base model wrongly: it is the only model inside.
    inside = [m for m in model.children() if hasattr(m, "config") and hasattr(m, "base_model")]
    return inside[0] if len(inside) == 1 else model


def _head(model: Any, backbone: nn.Module) -> nn.Module | None:
    """The map to logits: by the model's own word, else its only map to the vocabulary."""
    if model is backbone:
        return None
    head = model.get_output_embeddings()
    if head is None:
        inside = set(backbone.modules())
        size = getattr(text_config(model.config), "vocab_size", None)
        maps = [
            module
            for module in model.modules()
            if module not in inside and getattr(module, "out_features", None) == size
        ]
        head = maps[0] if len(maps) == 1 else None
    return head


def _generic(backbone: nn.Module, kind: str, family: str) -> tuple[Any, nn.Module | None]:
    """Blocks and final norm of an architecture that is not in the table."""
    depth = getattr(text_config(backbone.config), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and depth
    ]
    # Lists inside a block (experts) are no candidates.
    found = [f for f in found if not any(f[0].startswith(g[0] + ".") for g in found)]
    if len(found) != 1:
        what = "no list" if not found else f"{len(found)} lists ({', '.join(n for n, _ in found)})"
        raise ValueError(
            f"{what} of {depth} blocks found in {kind} ({family}), where one is needed: if a "
            "causal language model is inside (model.language_model), pass that"
        )
    name, container = found[0]
    siblings = list(backbone.get_submodule(name.rpartition(".")[0]).children())
    norms = [module for module in siblings if is_norm(module)]
    after = [module for module in siblings[siblings.index(container) :] if is_norm(module)]
    return container, next(iter(after or norms[::-1]), None)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by the name of its class."""
    return "norm" in type(module).__name__.lower()
