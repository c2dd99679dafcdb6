"""The blocks of a model in another arrangement: some twice, some not at all."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depthutil import _checks
from depthutil.stream import Anatomy, anatomy
from depthutil.stream.parts import kind

#: What a module calls its own place in the model; a cache finds a block's past by it.
INDICES = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num")
#: Where a configuration keeps, for later, which blocks share their weights.
SHARED = "shared_layers"


def arrange(
    model: nn.Module,
    places: Sequence[int],
    *,
    shared: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Give a model the blocks that now stand at these places, in this order.

    A block that is named once moves, one that is named again is copied, and one that is not
    named is gone. Embedding, final norm and head are not touched.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model (:func:`depthutil.stream.anatomy`); changed in place.
    places : sequence of int
        For each block of the new model, from which place its weights come, from 0 on.
    shared : bool
        Whether copies share their weights with the block that they are copies of, in training
        too. A checkpoint holds the weights of each; :func:`tie` makes a model that was loaded
        share them again.
    optimizer : torch.optim.Optimizer, optional
        Learns of weights that come and go. A copy begins with a copy of the state, such as
        Adam's moments, of what it is a copy of. Every group's weights are then in the order of
        ``model.parameters()``.

    Returns
    -------
    transformers.PreTrainedModel
        The same object.

    Raises
    ------
    ValueError
        If no such block is there, or if the family fixes the kind of a block by its place, so
        that the arrangement could not be saved and loaded again. The model is then as it was.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
    ...          "num_attention_heads": 2, "num_key_value_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **small))
    >>> last = model.model.layers[2]
    >>> arrange(model, [0, 2, 2]).model.layers[1] is last, model.config.num_hidden_layers
    (True, 3)
    >>> [block.self_attn.layer_idx for block in model.model.layers]
    [0, 1, 2]
    """
    parts = anatomy(model)
    chosen = checked(places, parts.depth)
    owners = _configs(model, parts.depth)
    settings = [(config, _settings(config, parts.depth, chosen)) for config in owners]
    _check_rebuilt(model, parts, chosen, owners)

    before, old = list(parts.blocks), _parameters(parts.blocks)
    came_from: dict[Tensor, Tensor] = {}  # a copied weight, and what it is a copy of
    blocks: list[nn.Module] = []
    for place in chosen:
        block = before[place]
        if any(block is other for other in blocks):
            block = _copy(block, owners, shared)
            pairs = zip(block.parameters(), before[place].parameters(), strict=True)
            came_from |= {new: source for new, source in pairs if new is not source}
        blocks.append(block)
    del parts.container[:]
    parts.container.extend(blocks)
    for number, block in enumerate(blocks):
        for module in block.modules():
            for name in INDICES:
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, number)
    for config, changes in settings:
        for name, value in changes.items():
            setattr(config, name, value)
    _note_sharing(model, blocks, owners)
    if optimizer is not None:
        kept = set(_parameters(blocks))
        _follow(optimizer, model, came_from, [w for w in old if w not in kept])
    return model


def drop(
    model: nn.Module,
    blocks: int | Sequence[int],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Take blocks out for good.

    Logits are those of :func:`depthutil.interventions.skip`; the time of the blocks and their
    memory are saved. ShortGPT (Men et al., arXiv 2403.03853) drops the blocks of least
    influence: :func:`depthutil.interventions.influence`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    blocks : int or sequence of int
        Negative ones count from the end.
    optimizer : torch.optim.Optimizer, optional
        Forgets their weights.

    Raises
    ------
    ValueError
        If no such block is there, or none would be left.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> drop(model, 1).config.n_layer
    2
    """
    depth = anatomy(model).depth
    given = [blocks] if isinstance(blocks, int) else list(blocks)
    gone = {place % depth for place in checked(given, depth, negative=True)}
    left = [place for place in range(depth) if place not in gone]
    if not left:
        raise ValueError(f"all {depth} blocks would be dropped: leave at least one")
    return arrange(model, left, optimizer=optimizer)


def early_layers(
    model: nn.Module, n: int, *, optimizer: torch.optim.Optimizer | None = None
) -> Any:
    """Keep the first blocks and no others, to train on from there.

    Inheritune (Sanyal et al., arXiv 2404.08634) starts a smaller model so.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    n : int
        How many.
    optimizer : torch.optim.Optimizer, optional
        As in :func:`arrange`.

    Raises
    ------
    ValueError
        If the model has fewer.
    """
    depth = anatomy(model).depth
    n = _checks.count(n, "n")
    if n > depth:
        raise ValueError(f"the model has {depth} blocks, no {n}")
    return arrange(model, range(n), optimizer=optimizer)


def loop(
    model: nn.Module,
    first: int,
    last: int,
    times: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Run through some blocks several times, with the same weights each time.

    ``Loop(e − L × k − d)`` of Kapl et al. (arXiv 2602.16490) is ``loop(model, e, e + L − 1, k)``
    of a model with e + L + d blocks. Unlike :func:`depthutil.interventions.repeat` it stays,
    each visit has its own place in the cache, and it can be trained.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    first, last : int
        The blocks, both included.
    times : int
        How often they run; 1 changes nothing.
    optimizer : torch.optim.Optimizer, optional
        As in :func:`arrange`.

    Raises
    ------
    ValueError
        If there are no such blocks.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=4, n_head=2))
    >>> sharing(loop(model, 1, 2, times=2))
    [0, 1, 2, 1, 2, 5]
    """
    depth, times = anatomy(model).depth, _checks.count(times, "times")
    first, last = checked([first, last], depth)
    if first > last:
        raise ValueError(f"first is no block behind last: {first} is behind {last}")
    middle = list(range(first, last + 1)) * times
    places = [*range(first), *middle, *range(last + 1, depth)]
    return arrange(model, places, shared=True, optimizer=optimizer)


def tie(
    model: nn.Module,
    groups: Iterable[Sequence[int]] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Let blocks share the weights of the first of their group.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    groups : sequence of sequences of int, optional
        By default those that the model had when it was saved, which its configuration names.
    optimizer : torch.optim.Optimizer, optional
        Forgets the weights that are given up.

    Raises
    ------
    ValueError
        If blocks of a group are not alike, or nothing says which groups.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> sharing(tie(model, [(0, 2)]))
    [0, 1, 0]
    """
    parts = anatomy(model)
    if groups is None:
        kept = getattr(parts.backbone.config, SHARED, None)
        if kept is None:
            raise ValueError(
                f"this {parts.family} model's configuration names no blocks that share weights: "
                "say which, tie(model, [(0, 1), (2, 3)])"
            )
        groups = [[i for i, f in enumerate(kept) if f == first] for first in sorted(set(kept))]
    wanted = [checked(group, parts.depth) for group in groups]
    for first, *others in wanted:
        for other in others:
            alike(parts.blocks[first], parts.blocks[other], first, other)
    old = _parameters(parts.blocks)
    for first, *others in wanted:
        for other in others:
            named = dict(parts.blocks[first].named_modules())
            for name, module in parts.blocks[other].named_modules():
                for own in module._parameters:
                    module._parameters[own] = named[name]._parameters[own]
    _note_sharing(model, list(parts.blocks), _configs(model, parts.depth))
    if optimizer is not None:
        kept_weights = set(_parameters(parts.blocks))
        _follow(optimizer, model, {}, [w for w in old if w not in kept_weights])
    return model


def sharing(model: nn.Module) -> list[int]:
    """For each block, the first one that has the same weights as it, itself if there is none.

    Weights are the same if training one trains the other; equal copies are not.
    """
    return _shared(anatomy(model).blocks)


def checked(places: Iterable[Any], depth: int, *, negative: bool = False) -> list[int]:
    """Places of blocks that are there, or a ValueError."""
    try:
        found = [int(place) for place in places]
        whole = all(number == place for number, place in zip(found, places, strict=True))
    except (TypeError, ValueError):
        whole, found = False, []
    low = -depth if negative else 0
    if not whole or not found or not all(low <= place < depth for place in found):
        raise ValueError(
            f"blocks are whole numbers from 0 to {depth - 1}, at least one, not {places!r}"
        )
    return found


def alike(one: nn.Module, other: nn.Module, first: int, second: int) -> None:
    """Raise a ValueError if two blocks are not of one kind."""
    different = _difference(one, other)
    if different:
        raise ValueError(f"blocks {first} and {second} are of different kinds: {different}")


def _inside(model: Any) -> Any:
    """The model inside a wrapper of adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parameters(blocks: Iterable[nn.Module]) -> list[Tensor]:
    return list(dict.fromkeys(w for block in blocks for w in block.parameters()))


def _shared(blocks: Sequence[nn.Module]) -> list[int]:
    seen: dict[tuple, int] = {}
    keys = [tuple(map(id, block.parameters())) for block in blocks]
    return [seen.setdefault(key or (number,), number) for number, key in enumerate(keys)]


def _copy(block: nn.Module, configs: Sequence[Any], shared: bool) -> nn.Module:
    # There is one configuration, that of the model, however many blocks refer to it.
    memo: dict[int, Any] = {id(config): config for config in configs}
    if shared:
        memo |= {id(w): w for w in (*block.parameters(), *block.buffers())}
    return copy.deepcopy(block, memo)


# What the configuration says ------------------------------------------------------------


def _configs(model: nn.Module, depth: int) -> list[Any]:
    """The configurations, of the model and of parts of it, that count these blocks."""
    found: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }
    inner = [c.get_text_config() for c in found.values() if hasattr(c, "get_text_config")]
    found |= {id(config): config for config in inner}
    return [c for c in found.values() if getattr(c, "num_hidden_layers", None) == depth]


def _settings(config: Any, depth: int, places: Sequence[int]) -> dict[str, Any]:
    """What becomes of the settings that are about blocks."""
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        about_blocks = "layer" in name or "block" in name
        if about_blocks and isinstance(value, list | tuple) and len(value) == depth:
            changes[name] = [value[place] for place in places]
    if hasattr(config, "attention_types") and "attention_layers" in changes:  # GPT-Neo
        changes["attention_types"] = [[[word], 1] for word in changes["attention_layers"]]
    changes["num_hidden_layers"] = len(places)
    return changes


def _check_rebuilt(
    model: nn.Module, parts: Anatomy, places: Sequence[int], owners: Sequence[Any]
) -> None:
    """Whether the configuration as it will be describes the blocks as they will be."""
    if getattr(parts.backbone.config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            f"in this {parts.family} model what a block does depends on its place "
            "(scale_attn_by_inverse_layer_idx): blocks cannot move"
        )
    inside = _inside(model)
    config = copy.deepcopy(inside.config)
    for part in (config, config.get_text_config()):
        if getattr(part, "num_hidden_layers", None) == parts.depth:
            for name, value in _settings(part, parts.depth, places).items():
                setattr(part, name, value)
    try:
        with torch.device("meta"):
            rebuilt = type(inside)(type(config).from_dict(config.to_dict()))
        blocks = anatomy(rebuilt).blocks
    except Exception as error:
        raise ValueError(
            f"{kind(inside)} cannot be built with {len(places)} blocks in this arrangement: {error}"
        ) from error
    for number, place in enumerate(places):
        different = _difference(parts.blocks[place], blocks[number])
        if different:
            raise ValueError(
                f"{kind(inside)} ({parts.family}) fixes the kind of a block by its place, and "
                f"block {place} is of another kind than place {number} asks for ({different}): "
                "choose places of the same kind"
            )


def _difference(one: nn.Module, other: nn.Module) -> str:
    """How two blocks differ in kind; empty if they do not."""
    ours, theirs = dict(one.named_modules()), dict(other.named_modules())
    if ours.keys() != theirs.keys():
        return f"modules {', '.join(sorted(ours.keys() ^ theirs.keys())[:2])}"
    for name, module in ours.items():
        own, its = _kind(module), _kind(theirs[name])
        for key in (*own, *its):
            if own.get(key) != its.get(key):
                where = f"{name}.{key}" if name else key
                return f"{where} is {own.get(key)} and {its.get(key)}"
    return ""


def _kind(module: nn.Module) -> dict[str, Any]:
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
        and not name.startswith("_")
        and name not in (*INDICES, "training")
    }
    shapes = {
        name: tuple(w.shape) for name, w in module.named_parameters(recurse=False) if w is not None
    }
    return plain | shapes


# Shared weights -------------------------------------------------------------------------


def _note_sharing(model: Any, blocks: Sequence[nn.Module], configs: Sequence[Any]) -> None:
    """Remember which blocks share weights, so that saving and :func:`tie` come out right."""
    found = _shared(blocks)
    apart = found == list(range(len(found)))
    for config in configs:
        if not apart:
            setattr(config, SHARED, found)
        elif hasattr(config, SHARED):
            delattr(config, SHARED)
    inside = _inside(model)
    # A checkpoint of safetensors cannot say that two weights are one: each is written.
    if not apart and _apart not in inside._state_dict_hooks.values():
        inside.register_state_dict_post_hook(_apart)


def _apart(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    """Tensors that blocks share, as tensors of their own."""
    container = anatomy(module).container
    name = next(name for name, part in module.named_modules() if part is container)
    seen: set[int] = set()
    for key, value in state.items():
        if key.startswith(f"{prefix}{name}.") and isinstance(value, Tensor):
            if value.data_ptr() in seen and value.numel():
                state[key] = value.clone()
            seen.add(value.data_ptr())


# Optimizers -----------------------------------------------------------------------------


def _follow(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    came_from: dict[Tensor, Tensor],
    gone: Iterable[Tensor],
) -> None:
    """Tell an optimizer which weights are new, with whose state they begin, and which are gone."""
    place = {weight: number for number, weight in enumerate(model.parameters())}
    gone = set(gone)
    for group in optimizer.param_groups:
        here = set(group["params"])
        added = [new for new, source in came_from.items() if source in here]
        for new in added:
            if came_from[new] in optimizer.state:
                optimizer.state[new] = copy.deepcopy(optimizer.state[came_from[new]])
        kept = [w for w in (*group["params"], *added) if w not in gone]
        group["params"] = sorted(kept, key=lambda w: place.get(w, len(place)))
    for weight in gone:
        optimizer.state.pop(weight, None)
