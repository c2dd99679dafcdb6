"""Questions of several hops, networks that answer them by construction, and networks trained to.

A question names the edges of a ring in random order and a place to start: after ``"ca bc ab a?2"``
the answer is the place two hops from a. Each further hop needs the result of the one before, so
that a network must take them one after the other, or double what it knows in each layer. What
instruments say about layers can be checked on :func:`built` networks, in which hop i happens in
a block that one chooses.

Pointer chasing of this kind separates depths in theory (arXiv 2402.09268: k hops need about
log k layers, and k where nothing is doubled).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from depthutil import _checks, _runs, archive, models


@dataclass(frozen=True)
class HopConfig:
    """What is asked, and who learns to answer.

    Attributes
    ----------
    depth : int
        Blocks of the network.
    nodes : int
        Places of the ring, at most 26. A ring of n places takes n − k hops backwards where k
        are asked, so that more than half of it is no harder.
    hops : int
        Questions ask for 1 to so many, each as often.
    width, heads : int
    steps, batch : int
    rate : float
        Highest learning rate of AdamW: up over 100 steps, then a cosine down to a twentieth.
    seed : int
        Of weights and questions.
    """

    depth: int = 3
    nodes: int = 6
    hops: int = 3
    width: int = 16
    heads: int = 2
    steps: int = 6_000
    batch: int = 128
    rate: float = 5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("depth", "nodes", "hops", "width", "heads", "steps", "batch")
        _checks.counts(self, names)
        if not 2 <= self.nodes <= 26:
            raise ValueError(f"nodes are 2 to 26, one letter each, not {self.nodes}")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")


class Questions(NamedTuple):
    """Questions as a network takes them.

    Attributes
    ----------
    ids : torch.Tensor
        ``(questions, 1 + nodes + 1)``: a first token, the edges in random order, the question.
    answers : torch.Tensor
        The right token, ``(questions,)``.
    hops : torch.Tensor
        How many were asked for, ``(questions,)``.
    path : torch.Tensor
        The position of the edge that each hop takes, ``(questions, most hops)``; −1 beyond what
        was asked.
    """

    ids: Tensor
    answers: Tensor
    hops: Tensor
    path: Tensor


class HopTokenizer:
    """Edges ``"ab"``, questions ``"a?2"`` and places ``"a"`` as tokens, and back.

    Examples
    --------
    >>> words = HopTokenizer(nodes=3, hops=2)
    >>> ids = words("ab bc ca a?2")["input_ids"]
    >>> words.decode(ids), len(ids)
    ('| ab bc ca a?2', 5)
    """

    def __init__(self, nodes: int, hops: int):
        names = [chr(ord("a") + i) for i in range(_checks.count(nodes, "nodes"))]
        self.words = [one + other for one in names for other in names]
        self.words += [f"{name}?{k + 1}" for k in range(hops) for name in names]
        self.words += [*names, "|"]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = text.split()
        unknown = [word for word in words if word not in self.numbers]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no edge, question or place of this ring")
        first = ["|"] if add_special_tokens and words[:1] != ["|"] else []
        return {"input_ids": [self.numbers[word] for word in first + words]}

    def decode(self, ids: Any, **options: Any) -> str:
        return " ".join(self.words[int(number)] for number in ids)


def questions(
    config: HopConfig, count: int, *, hops: int | None = None, seed: int = 0
) -> Questions:
    """Random questions.

    Parameters
    ----------
    config : HopConfig
    count : int
    hops : int, optional
        The same for all; by default 1 to ``config.hops``, at random.
    seed : int

    Examples
    --------
    >>> asked = questions(HopConfig(nodes=5), 2, hops=2)
    >>> words = HopTokenizer(5, 3)
    >>> row = words.decode(asked.ids[0]).split()
    >>> row[asked.path[0, 0]][1] == row[asked.path[0, 1]][0]  # one edge ends where the next begins
    True
    >>> words.decode([asked.answers[0]]) == row[asked.path[0, 1]][1]
    True
    """
    count = _checks.count(count, "count")
    rng = _runs.generator("questions", seed)
    return _drawn(config, count, rng, hops)


def _drawn(config: HopConfig, count: int, rng: torch.Generator, hops: int | None) -> Questions:
    n = config.nodes
    if hops is not None and not 1 <= hops <= config.hops:
        raise ValueError(f"hops are 1 to {config.hops}, not {hops}")
    ring = torch.rand(count, n, generator=rng).argsort(1)
    after = torch.empty(count, n, dtype=torch.long).scatter_(1, ring, ring.roll(-1, 1))
    order = torch.rand(count, n, generator=rng).argsort(1)
    place = order.argsort(1)  # at which of the edges each place's own stands
    here = torch.randint(n, (count,), generator=rng)
    asked = torch.randint(1, config.hops + 1, (count,), generator=rng)
    asked = asked if hops is None else torch.full_like(asked, hops)
    edges = order * n + after.gather(1, order)
    ask = n * n + (asked - 1) * n + here
    path = torch.full((count, config.hops), -1)
    for hop in range(config.hops):
        going = asked > hop
        path[:, hop] = torch.where(going, place.gather(1, here[:, None])[:, 0] + 1, -1)
        here = torch.where(going, after.gather(1, here[:, None])[:, 0], here)
    base = n * n + config.hops * n
    first = torch.full((count, 1), base + n)
    return Questions(torch.cat([first, edges, ask[:, None]], 1), base + here, asked, path)


def _network(config: HopConfig, **changes: Any) -> Any:
    library, n = models.library(), config.nodes
    given = {
        "vocab_size": n * n + config.hops * n + n + 1,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_positions": n + 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    return library.GPT2LMHeadModel(library.GPT2Config(**{**given, **changes})).eval()


# By construction ------------------------------------------------------------------------


def built(config: HopConfig, at: list[int] | tuple[int, ...], *, sharp: float = 12.0) -> Any:
    """A network that takes one hop in each of some blocks, and does nothing in the others.

    The last position's stream says where one is. In block ``at[i]`` one head finds the edge
    that begins there and writes its end, and another takes away where one was. What every
    instrument should find is therefore known: hop i needs its edge's state up to
    layer ``at[i]``, and no longer.

    Parameters
    ----------
    config : HopConfig
        ``depth``, ``nodes`` and ``hops`` of it are used.
    at : sequence of int
        Blocks, from 0 on, rising: as many as hops that the network takes, whatever is asked.
    sharp : float
        By how much the right edge's attention exceeds the others', in logits. Beyond 30
        attention is a switch, which no integral of gradients sees.

    Returns
    -------
    transformers.GPT2LMHeadModel
        In evaluation mode.

    Raises
    ------
    ValueError
        If the blocks are not there or do not rise.

    Examples
    --------
    >>> config = HopConfig(depth=6, nodes=5)
    >>> network = built(config, at=[1, 4])
    >>> asked = questions(config, 100, hops=2)
    >>> bool((network(asked.ids).logits[:, -1].argmax(1) == asked.answers).all())
    True
    """
    blocks, n = [int(block) for block in at], config.nodes
    if not blocks or blocks != sorted({*blocks}) or not 0 <= blocks[0] <= blocks[-1] < config.depth:
        raise ValueError(f"at names blocks of 0 to {config.depth - 1}, rising, not {list(at)}")
    # The stream: where an edge begins, where it ends, where one is, "question", "first", and
    # one more that the first token has. Every token has two ones, so that every norm does the
    # same to all.
    width = 3 * n + 4 + n % 2  # even, for two heads
    begins, ends, here = (slice(i * n, (i + 1) * n) for i in range(3))
    question, first, filler = 3 * n, 3 * n + 1, 3 * n + 2
    network = _network(config, n_embd=width, n_head=2)
    mean, base = 2 / width, n * n + config.hops * n
    scale = math.sqrt(mean - mean**2 + network.config.layer_norm_epsilon)
    head, one = width // 2, torch.eye(n)
    sharp = _checks.number(sharp, "sharp", low=0, above=True) * math.sqrt(head)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for module in network.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
        words = network.transformer.wte.weight
        for number in range(n * n):
            words[number, begins][number // n] = words[number, ends][number % n] = 1
        for number in range(config.hops * n):
            words[n * n + number, here][number % n] = words[n * n + number, question] = 1
        words[base + n, first] = words[base + n, filler] = 1
        for block in blocks:
            layer = network.transformer.h[block].attn
            ask, key, value = (torch.zeros(width, width) for _ in range(3))
            shift = torch.zeros(3 * width)
            for number, (seek, give) in enumerate(((begins, ends), (here, here))):
                start = number * head
                ask[here, start : start + n] = sharp * one
                key[seek, start : start + n] = one
                # Whoever asks nothing looks at the first token, which gives nothing.
                ask[question, start + n] = -sharp
                shift[start + n] = sharp
                key[first, start + n] = 1
                value[give, start : start + n] = one
            weight = torch.cat([ask, key, value], 1)
            # The block reads (x − mean) / scale.
            layer.c_attn.weight.copy_(scale * weight)
            layer.c_attn.bias.copy_(shift + mean * weight.sum(0))
            layer.c_proj.weight[:n, here] = one
            layer.c_proj.weight[head : head + n, here] = -one
        network.lm_head.weight[base : base + n, here] = 10 * scale * one
    return network


# Trained --------------------------------------------------------------------------------


def train(
    config: HopConfig,
    checkpoint: str | os.PathLike | None = None,
    *,
    every: int = 500,
    progress: Any = False,
) -> tuple[Any, pd.DataFrame]:
    """Train a small GPT-2 on questions, fresh ones at each step.

    Parameters
    ----------
    config : HopConfig
    checkpoint : path, optional
        Kept at each test; a run that was killed goes on from there, to the same numbers.
    every : int
        Steps between two tests, each on 1,000 other questions for each number of hops.
    progress : bool or callable

    Returns
    -------
    transformers.GPT2LMHeadModel
        In evaluation mode.
    pandas.DataFrame
        ``step, hops, accuracy`` of the tests.

    Raises
    ------
    ValueError
        If the checkpoint is of another run.

    Examples
    --------
    >>> config = HopConfig(depth=1, nodes=4, hops=1, width=16, heads=2, steps=200, rate=1e-2)
    >>> network, tests = train(config, every=100)
    >>> tests["step"].tolist()
    [100, 200]
    """
    path = None if checkpoint is None else Path(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = _network(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _share(s, config.steps))
    rng, begin, rows = _runs.generator("hops", config.seed), 0, []
    if path is not None and path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["config"] != json.dumps(asdict(config)):
            raise ValueError(f"{path} is of another run: {kept['config']}")
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        rng.set_state(kept["rng"])
        begin, rows = kept["step"], kept["rows"]
    report = _runs.Progress(progress, config.steps, begin)
    network.train()
    for step in range(begin + 1, config.steps + 1):
        asked = _drawn(config, config.batch, rng, None)
        last = network.transformer(asked.ids, use_cache=False).last_hidden_state[:, -1]
        loss = torch.nn.functional.cross_entropy(network.lm_head(last), asked.answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == config.steps:
            right = accuracy(network.eval(), config)
            network.train()
            rows += [(step, int(hops), float(share)) for hops, share in right.items()]
            if path is not None:
                with archive.replacing(path) as partial:
                    torch.save(
                        {
                            "config": json.dumps(asdict(config)),
                            "network": network.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "schedule": schedule.state_dict(),
                            "rng": rng.get_state(),
                            "step": step,
                            "rows": rows,
                        },
                        partial,
                    )
        report(step, f"loss {loss.item():.3f}")
    return network.eval(), pd.DataFrame(rows, columns=["step", "hops", "accuracy"])


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate."""
    return min(1.0, step / 100) * (0.525 + 0.475 * math.cos(math.pi * step / steps))


@torch.no_grad()
def accuracy(network: Any, config: HopConfig, count: int = 1_000, *, seed: int = -1) -> pd.Series:
    """The share of questions answered rightly, for each number of hops.

    Parameters
    ----------
    network : transformers.GPT2LMHeadModel
        In evaluation mode.
    config : HopConfig
    count : int
        Questions for each number.
    seed : int

    Returns
    -------
    pandas.Series
        Against ``hops``. Guessing among all places but the start is right in one of
        ``nodes − 1``.

    Examples
    --------
    >>> config = HopConfig(depth=2, nodes=5, hops=2)
    >>> float(accuracy(built(config, at=[0]), config)[1])
    1.0
    """
    found = {}
    for hops in range(1, config.hops + 1):
        asked = questions(config, count, hops=hops, seed=seed)
        last = network.transformer(asked.ids, use_cache=False).last_hidden_state[:, -1]
        right = network.lm_head(last).argmax(1) == asked.answers
        found[hops] = float(right.double().mean())
    return pd.Series(found, name="accuracy").rename_axis("hops")


def save(networks: list[tuple[HopConfig, Any]], path: str | os.PathLike) -> Path:
    """Write networks into one file, in 16 bits.

    Parameters
    ----------
    networks : list of (HopConfig, transformers.GPT2LMHeadModel)
    path : path
        Ends in ``.safetensors``.

    Examples
    --------
    >>> import tempfile
    >>> config = HopConfig(depth=2, nodes=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save([(config, built(config, at=[1]))], Path(folder) / "a.safetensors")
    ...     network = trained(config, path)
    >>> round(float(accuracy(network, config)[1]), 3)
    1.0
    """
    from safetensors.torch import save_file

    weights = {
        _begin(config) + name: value.detach().to(torch.float16).contiguous()
        for config, network in networks
        for name, value in network.state_dict().items()
    }
    with archive.replacing(path) as partial:
        save_file(weights, partial)
    return Path(path)


def _begin(config: HopConfig) -> str:
    """What a network's weights are called in the file, before their own names."""
    return f"w{config.width}-d{config.depth}-s{config.seed}/"


def trained(config: HopConfig, path: str | os.PathLike | None = None) -> Any:
    """A network of the archive, ``results/hops_networks.safetensors`` if no other is named.

    Parameters
    ----------
    config : HopConfig
        Its ``width``, ``depth`` and ``seed`` say which; ``nodes``, ``hops`` and ``heads`` are
        those that it was trained with.
    path : path, optional

    Returns
    -------
    transformers.GPT2LMHeadModel
        In evaluation mode.

    Raises
    ------
    ValueError
        If there is none of this width, depth and seed.
    """
    from safetensors import safe_open

    where = archive.find("results/hops_networks.safetensors") if path is None else Path(path)
    begin = _begin(config)
    with safe_open(where, "pt") as file:
        names = [name for name in file.keys() if name.startswith(begin)]
        if not names:
            there = sorted({name.partition("/")[0] for name in file.keys()})
            raise ValueError(f"there is no network {begin[:-1]} in {where}, only {there}")
        weights = {name.removeprefix(begin): file.get_tensor(name).float() for name in names}
    width = weights["transformer.wte.weight"].shape[1]
    # A network that was built has a width of its own, and two heads.
    heads = config.heads if width == config.width else 2
    network = _network(config, n_embd=width, n_head=heads)
    network.load_state_dict(weights)
    return network.eval()
