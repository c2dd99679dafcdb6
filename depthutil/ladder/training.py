"""Train one model of a ladder, and choose its learning rate."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from depthutil import _checks, _runs, archive, moments, surgery
from depthutil.corpus import Corpus, Windows, corpus, pieces
from depthutil.ladder.model import LadderModel, new_model, read_checkpoint
from depthutil.ladder.recipe import LadderConfig, Shard, recipe, slug

# To look at a GPU's loss is to wait for it: steps between looks.
_WATCH = 50
_SEARCH_SEED = 1000  # a search shares no initial weights and no order with a model that is kept
# The compiler takes longer than so few steps can win back.
_COMPILE_STEPS = 1_000


def train(
    config: LadderConfig,
    depth: int,
    seed: int,
    *,
    learning_rate: float | None = None,
    text: Corpus | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 60,
    progress: bool | Callable[[int, int, float], None] = False,
    device: str | torch.device | None = None,
    threads: int | None = None,
    compiled: bool | None = None,
    autocast: bool = False,
    stop: int | None = None,
) -> LadderModel:
    """Train one model of a ladder.

    Parameters
    ----------
    config : LadderConfig
    depth, seed : int
        Which model; also others than the configuration lists.
    learning_rate : float, optional
        Its peak; the configuration's by default, if that has a single one.
    text : Corpus, optional
        :func:`depthutil.corpus.corpus` by default.
    checkpoint : path, optional
        File to save to and, where it exists, to continue from; on a CPU, with the same
        number of threads, to the same bits as without an interruption.
    checkpoint_seconds : float
        Time between checkpoints.
    progress : bool or callable
        Print step and time left to standard error about every ten seconds, or call with
        ``(step, steps, seconds left)`` after every step.
    device : str or torch.device, optional
        A GPU where there is one, by default.
    threads : int, optional
        Cores for each operation, by default what PyTorch is set to.
    compiled : bool, optional
        Compile the blocks with ``torch.compile``: the same model, cheaper steps. By default
        in runs of a thousand steps or more, where a C++ compiler is; an
        interrupted run goes on as it began.
    autocast : bool
        Products in bfloat16, for GPUs; float32 otherwise.
    stop : int, optional
        Train no further than this step for now; with a checkpoint, another call goes on.

    Returns
    -------
    LadderModel

    Raises
    ------
    FloatingPointError
        If the loss is no longer a number; the message names depth, seed and step.
    ValueError
        If the checkpoint is damaged or of another model or text, or if no rate is chosen.

    Examples
    --------
    >>> from depthutil.corpus import Document
    >>> config = LadderConfig(width=16, sequence=32, batch=4, steps=2, warmup=1,
    ...                       test_sequences=4)
    >>> text = Corpus("an example", (Document("a", "to be or not to be, " * 9),),
    ...               (Document("b", "that is the question"),))
    >>> result = train(config, depth=1, seed=0, text=text)
    >>> result.losses.columns.tolist()
    ['depth', 'seed', 'step', 'tokens', 'training_loss', 'held_out_loss', 'stderr']
    """
    if not isinstance(config, LadderConfig):
        raise TypeError(f"config is a LadderConfig, not {type(config).__name__}")
    if learning_rate is None and len(config.learning_rates) > 1:
        raise ValueError(
            f"there are {len(config.learning_rates)} learning rates: give one of "
            f"{config.learning_rates}, or let best_rate choose"
        )
    config = replace(config, depths=(depth,), seeds=(seed,))
    rate = config.learning_rates[0] if learning_rate is None else learning_rate
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = None if checkpoint is None else Path(checkpoint)
    state = read_checkpoint(path) if path is not None and path.exists() else None
    if state is not None and compiled is None:
        compiled = state["compiled"]
    if compiled is None:
        compiled = config.steps >= _COMPILE_STEPS and (device.type == "cuda" or compiler())
    with _runs.cpu(threads):
        options = (text or corpus(), device, compiled, autocast)
        trainer = Trainer(config, depth, seed, rate, *options)
        if state is not None and path is not None:
            trainer.load(path, state)
        _run(trainer, path, checkpoint_seconds, progress, stop)
    return LadderModel.of(trainer)


def _run(
    trainer: Trainer, path: Path | None, every: float, progress: Any, stop: int | None
) -> None:
    earlier, steps, saved = trainer.seconds, trainer.config.steps, 0.0
    end = steps if stop is None else min(_checks.count(stop, "stop"), steps)
    of = f"depth {trainer.shard.depth}, seed {trainer.shard.seed}: step"
    report = _runs.Progress(progress, steps, trainer.step, of=of, first=False)
    while trainer.step < end:
        trainer.advance()
        report(trainer.step, trainer.tell())
        trainer.seconds = earlier + report.seconds
        if path is not None and (trainer.step == end or report.seconds - saved >= every):
            trainer.save(path)
            saved = report.seconds


def best_rate(
    config: LadderConfig, depth: int, folder: str | os.PathLike, **options: Any
) -> tuple[float, pd.DataFrame]:
    """Try each of a configuration's learning rates at a depth, and choose one.

    Models of a seed of their own are trained for ``config.search_steps``; the one with the
    lowest training loss over the last fifth wins, so that the held-out text chooses nothing.

    Parameters
    ----------
    config : LadderConfig
    depth : int
    folder : path
        For a checkpoint of each rate, from which a further call reads the result.
    **options
        As for :func:`train`.

    Returns
    -------
    tuple
        The rate, and a table with ``depth, learning_rate, training_loss``; without a row
        if there was no choice.
    """
    if len(config.learning_rates) == 1:
        return config.learning_rates[0], pd.DataFrame()
    steps = config.search_steps
    short = replace(config, steps=steps, test_every=max(steps // 5, 1))
    rows = []
    for rate in config.learning_rates:
        path = Path(folder) / f"search_{slug(short, depth, _SEARCH_SEED)}_{rate:g}.pt"
        try:
            tried = train(
                short, depth, _SEARCH_SEED, learning_rate=rate, checkpoint=path, **options
            )
            loss = tried.losses["training_loss"].iloc[-1]
        except FloatingPointError:  # a rate that is too high is a result
            loss = math.inf
        rows.append({"depth": depth, "learning_rate": rate, "training_loss": loss})
    table = pd.DataFrame(rows)
    if not np.isfinite(table["training_loss"]).any():
        raise FloatingPointError(
            f"depth {depth} could be trained with none of the rates {config.learning_rates}"
        )
    return float(table.loc[table["training_loss"].idxmin(), "learning_rate"]), table


def _loss(hidden: Tensor, head: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    logits = F.linear(hidden, head).float()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=reduction)


class Trainer:
    """One model and everything a checkpoint has to hold."""

    def __init__(
        self,
        config: LadderConfig,
        depth: int,
        seed: int,
        rate: float,
        text: Corpus,
        device: torch.device,
        compiled: bool,
        autocast: bool,
    ):
        self.config, self.shard, self.peak = config, Shard(depth, seed), rate
        self.text, self.device, self.compiled = text, device, compiled
        self.step, self.seconds = 0, 0.0
        self.records: list[list[float]] = []
        self.final: list[list[float]] = []
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.machine, self.commit = machine(device), archive.commit()
        self.batch = Windows(text.training, config.sequence, config.batch, seed)
        self.model = new_model(config, depth, seed).to(device)
        weights = list(self.model.parameters())
        groups = [
            {"params": [w for w in weights if w.dim() == 2], "weight_decay": config.weight_decay},
            {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
        ]
        # One pass over the weights instead of a dozen; PyTorch before 2.4 has it on GPUs only.
        fused = {"fused": True} if device.type == "cuda" or torch.__version__ >= "2.4" else {}
        self.adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), **fused)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
        self.tail = _loss
        if compiled:
            self.compile()
            self.tail = torch.compile(_loss, dynamic=False)

    def compile(self) -> None:
        """Block by block, so that one compilation, of seconds, serves every block and depth."""
        for block in self.model.model.layers:
            block.compile(dynamic=False)

    def grow(self) -> None:
        """To the depth of this step, weights and optimizer."""
        depth, seed = self.shard
        design, layers = self.config.design, self.model.model.layers
        deep = design.depth_at(depth, self.step, self.config.steps)
        while design.grow is not None and len(layers) < deep:
            surgery.grow(self.model, self.adam, design.grow, design.block, seed=seed)
            if self.compiled:
                self.compile()

    def advance(self) -> None:
        """One step of AdamW and, where it is time, a test."""
        self.grow()
        rows = torch.from_numpy(self.batch(self.step)).to(self.device)
        loss = self.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.config.rate(self.peak, self.step)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.total += loss.detach()
        self.step += 1
        due = self.step % self.config.test_every == 0 or self.step == self.config.steps
        if due or self.device.type == "cpu" or self.step % _WATCH == 0:
            self.check()
        if due:
            self.test()

    def loss(self, rows: Tensor, reduction: str = "mean") -> Tensor:
        with self.autocast:
            ids = rows[:, :-1].clamp(min=0)  # what lies behind a text's end is not scored
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            return self.tail(hidden, self.model.lm_head.weight, rows[:, 1:], reduction)

    def check(self) -> None:
        if not torch.isfinite(self.total):
            depth, seed = self.shard
            raise FloatingPointError(
                f"the loss of depth {depth}, seed {seed} is no number any more at step "
                f"{self.step:,}: lower the learning rate of {self.peak:g}"
            )

    @torch.no_grad()
    def score(self, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Summed loss and number of bytes of every document, or of some sequences of it."""
        rows, owners = pieces(self.text.held_out, self.config.sequence)
        if count is not None:  # the same ones each time, from all documents
            chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
            rows, owners = rows[chosen], owners[chosen]
        sums = np.zeros(len(self.text.held_out))
        size = max(self.config.batch, 32)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            # One shape of batch, which is compiled once; rows of −100 are not scored.
            full = np.full((size, part.shape[1]), -100)
            full[: len(part)] = part
            each = self.loss(torch.from_numpy(full).to(self.device), "none")
            each = each.view(len(full), -1).double().sum(1).cpu()
            np.add.at(sums, owners[start : start + len(part)], each.numpy()[: len(part)])
        sizes = np.zeros(len(sums))
        np.add.at(sizes, owners, (rows[:, 1:] >= 0).sum(1))
        return sums, sizes

    def test(self) -> None:
        since = self.records[-1][0] if self.records else 0
        last = self.step == self.config.steps
        sums, sizes = self.score(
            self.config.final_sequences if last else self.config.test_sequences
        )
        if last:
            self.final = np.stack([sums, sizes], 1).tolist()
        trained = self.total.item() / (self.step - since)
        self.records.append([self.step, trained, *moments.of_totals(sums, sizes)])
        self.total.zero_()

    def tell(self) -> str:
        """What its progress says beside the step."""
        return f"held-out loss {self.records[-1][2]:.3f}" if self.records else ""

    def save(self, path: Path) -> None:
        """Write a checkpoint, all of it or nothing."""
        self.check()
        with archive.replacing(path) as partial:
            torch.save(self.state(), partial)

    def state(self) -> dict[str, Any]:
        """Everything that it takes to go on, or to make a :class:`LadderModel`."""
        return {
            "settings": self.settings(),
            "step": self.step,
            "seconds": self.seconds,
            "records": self.records,
            "final": self.final,
            "total": self.total,
            "compiled": self.compiled,
            "device": self.machine,
            "commit": self.commit,
            "weights": self.model.state_dict(),
            "adam": self.adam.state_dict(),
        }

    def settings(self) -> dict[str, Any]:
        depth, seed = self.shard
        own = {"depth": depth, "seed": seed, "learning_rate": self.peak}
        return recipe(self.config) | own | {"corpus": self.text.summary}

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, if it belongs to these settings and this text."""
        ours, saved = self.settings(), state["settings"]
        other = [key for key in ours if saved.get(key) != ours[key]]
        if other == ["corpus"]:
            raise ValueError(
                f"{path} was trained on the {saved['corpus']['source']}, and this is the "
                f"{self.text.source} with other files: go on with that Python, or remove it"
            )
        if other:
            raise ValueError(
                f"{path} belongs to a model with other {', '.join(other)}: remove it, or name "
                "another folder"
            )
        # As deep as it was in its last update: it may grow before the next.
        self.step, self.seconds = max(state["step"] - 1, 0), state["seconds"]
        self.grow()
        self.step = state["step"]
        self.model.load_state_dict(state["weights"])
        self.adam.load_state_dict(state["adam"])
        self.total.copy_(state["total"])
        self.records, self.final = state["records"], state["final"]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"


def compiler() -> bool:
    """Whether PyTorch can compile for this CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
