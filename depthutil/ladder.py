"""The depth ladder: small language models of one width and several depths, all else equal.

Published families change width and depth together. Here every model has the same width and
sees the same text in the same order, so that a difference in loss is one of depth alone. They
are ``LlamaForCausalLM`` of ``transformers`` (Touvron et al., arXiv 2302.13971: norms before the
blocks, rotary positions, SwiGLU), with bytes as tokens, trained on what every machine with
Python has: :func:`corpus`.

:func:`members`, :func:`held_out`, :func:`curves` and :func:`documents` read the ladder that comes
with the book, ``depthutil.models.load`` loads its models; ``make ladder`` trains it
again, through :func:`train` and :func:`assemble`. Training needs the ``models`` extra.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthutil import _ladder, _runs, archive, models
from depthutil._corpus import (
    BOS,
    VOCABULARY,
    Corpus,
    Document,
    corpus,
    held_out,
    write_tokenizer,
)
from depthutil._ladder import LadderConfig, Shard, shards, slug

__all__ = [
    "BOS",
    "VOCABULARY",
    "Corpus",
    "Document",
    "LadderConfig",
    "LadderModel",
    "Shard",
    "assemble",
    "best_rate",
    "corpus",
    "curves",
    "documents",
    "held_out",
    "members",
    "shards",
    "slug",
    "train",
    "write_tokenizer",
]

_SEARCH_SEED = 1000  # a search shares no initial weights and no order with a model that is kept
# The compiler takes longer than so few steps can win back.
_COMPILE_STEPS = 1_000
_NONE = "there is no depth ladder here yet: make ladder trains it"


# Training -------------------------------------------------------------------------------


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
        :func:`corpus` by default.
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
    state = _ladder.read(path) if path is not None and path.exists() else None
    if state is not None and compiled is None:
        compiled = state["compiled"]
    if compiled is None:
        compiled = config.steps >= _COMPILE_STEPS and (device.type == "cuda" or _ladder.compiler())
    with _runs.cpu(threads):
        options = (text or corpus(), device, compiled, autocast)
        trainer = _ladder.Trainer(config, depth, seed, rate, *options)
        if state is not None:
            trainer.load(path, state)
        _run(trainer, path, checkpoint_seconds, progress)
    return LadderModel.of(trainer)


def _run(trainer: _ladder.Trainer, path: Path | None, every: float, progress: Any) -> None:
    earlier, steps, saved = trainer.seconds, trainer.config.steps, 0.0
    of = f"depth {trainer.shard.depth}, seed {trainer.shard.seed}: step"
    report = _runs.Progress(progress, steps, trainer.step, of=of, first=False)
    while trainer.step < steps:
        trainer.advance()
        report(trainer.step, trainer.tell())
        trainer.seconds = earlier + report.seconds
        if path is not None and (trainer.step == steps or report.seconds - saved >= every):
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


# Results --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LadderModel:
    """A model of the ladder, trained or on its way, and how it got there.

    Attributes
    ----------
    settings : dict
        The recipe, depth, seed, learning rate, and the summary of the corpus.
    losses : pandas.DataFrame
        ``depth, seed, step, tokens, training_loss, held_out_loss, stderr``, one test a row, in
        nats per byte. The training loss is the mean since the test before; the held-out loss
        that of ``test_sequences`` sequences, in the last row of ``final_sequences`` (the whole
        held-out text), with its standard error over documents.
    documents : pandas.DataFrame
        ``depth, seed, document, bytes, loss`` of each held-out document at the end.
    wall_seconds : float
        Time it took, over all interruptions.
    device, commit : str
        Where it was trained last, and by which code.
    compiled : bool
        Whether by compiled blocks.
    weights : dict
        The ``state_dict``, on the CPU.
    """

    settings: dict[str, Any]
    losses: pd.DataFrame
    documents: pd.DataFrame
    wall_seconds: float
    device: str
    commit: str
    compiled: bool
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, trainer: _ladder.Trainer) -> LadderModel:
        """What a trainer has reached."""
        buffer = {
            "settings": trainer.settings(),
            "records": trainer.records,
            "final": trainer.final,
            "seconds": trainer.seconds,
            "device": trainer.machine,
            "commit": trainer.commit,
            "compiled": trainer.compiled,
            "weights": {k: v.detach().cpu() for k, v in trainer.model.state_dict().items()},
        }
        return cls._from(buffer, trainer.text)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, text: Corpus | None = None) -> LadderModel:
        """What a checkpoint of :func:`train` holds, of a run that may still go on.

        ``text``, if given, names the held-out documents in ``documents``.
        """
        return cls._from(_ladder.read(Path(path)), text)

    @classmethod
    def _from(cls, state: dict[str, Any], text: Corpus | None) -> LadderModel:
        settings = state["settings"]
        columns = ["step", "training_loss", "held_out_loss", "stderr"]
        losses = pd.DataFrame(state["records"], columns=columns)
        tokens = losses["step"] * settings["batch"] * settings["sequence"]
        losses.insert(1, "tokens", tokens.astype(int))
        ends = pd.DataFrame(state["final"], columns=["loss", "bytes"])
        paths = range(len(ends)) if text is None else [d.path for d in text.held_out][: len(ends)]
        ends = pd.DataFrame(
            {"document": paths, "bytes": ends["bytes"].astype(int), "loss": ends["loss"]}
        )
        ends["loss"] /= ends["bytes"]
        for table in (losses, ends):
            table.insert(0, "depth", settings["depth"])
            table.insert(1, "seed", settings["seed"])
        return cls(
            settings=settings,
            losses=losses,
            documents=ends,
            wall_seconds=state["seconds"],
            device=state["device"],
            commit=state["commit"],
            compiled=state["compiled"],
            weights=state["weights"],
        )

    @property
    def config(self) -> LadderConfig:
        """The settings as a configuration of this one model."""
        known = {f.name for f in fields(LadderConfig)} & set(self.settings)
        own = {name: (self.settings[name[:-1]],) for name in ("depths", "seeds", "learning_rates")}
        return LadderConfig(**{name: self.settings[name] for name in known}, **own)

    @property
    def step(self) -> int:
        """The last test."""
        return int(self.losses["step"].max()) if len(self.losses) else 0

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return self.step == self.settings["steps"]

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.config.name(self.settings["depth"], self.settings["seed"])

    @cached_property
    def model(self) -> Any:
        """The ``LlamaForCausalLM``, on the CPU, in evaluation mode."""
        model = _ladder.new_model(self.config, self.settings["depth"], self.settings["seed"])
        model.load_state_dict(self.weights)
        return model.eval()

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the model as ``folder/name`` in Hugging Face format with its card, or nothing."""
        if not self.finished:
            steps = self.settings["steps"]
            raise ValueError(f"{self.name} is at step {self.step:,} of {steps:,}: train it first")
        import safetensors.torch

        path = Path(folder) / self.name
        with archive.replacing(path) as partial:
            partial.mkdir()
            # Versions of transformers before 5 know base and precision by these names.
            config = json.loads(self.model.config.to_json_string())
            config |= {"architectures": [type(self.model).__name__], "rope_theta": 10000.0}
            config |= {"dtype": "float32", "torch_dtype": "float32"}
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            weights = safetensors.torch.save(self.weights, {"format": "pt"})
            (partial / "model.safetensors").write_bytes(weights)
            write_tokenizer(partial, self.settings["sequence"])
            (partial / "README.md").write_text(self.card())
        return path

    def card(self) -> str:
        """The model card, from what was recorded."""
        s, text = self.settings, self.settings["corpus"]
        last = self.losses.iloc[-1]
        rows = "\n".join(
            f"| {row.step:,} | {row.tokens:,} | {row.training_loss:.4f} | {row.held_out_loss:.4f} |"
            for row in self.losses.itertuples()
        )
        return _CARD.format(
            name=self.name,
            parameters=self.config.parameters(s["depth"]),
            heads=s["width"] // _ladder.HEAD,
            hidden=self.config.hidden,
            init_std=self.config.init_std,
            tokens=self.config.tokens,
            loss=last.held_out_loss,
            stderr=last.stderr,
            rows=rows,
            training=text["training"],
            held_out=text["held_out"],
            source=text["source"],
            hours=self.wall_seconds / 3600,
            compiled="compiled" if self.compiled else "not compiled",
            device=self.device,
            commit=self.commit,
            **{key: value for key, value in s.items() if key != "corpus"},
        )


_CARD = """\
---
license: bsd-3-clause
library_name: transformers
pipeline_tag: text-generation
---
# {name}

One model of the depth ladder: language models of one width and several depths, trained on the same
text in the same order with the same recipe, to measure what depth alone does. It is too small to be
of any other use.

| | |
| --- | --- |
| architecture | Llama (`LlamaForCausalLM`), width {width}, depth {depth}, {heads} heads, \
MLP {hidden} |
| parameters | {parameters:,}; embedding and head are not tied |
| tokens | bytes, after the token that begins a text; context {sequence} |
| held-out loss | {loss:.4f} ± {stderr:.4f} nats per byte (standard error over documents) |
| trained on | {tokens:,} tokens of the {source} |
| training text | {training[documents]} documents, {training[bytes]:,} bytes, \
SHA-256 `{training[sha256]}` |
| held-out text | {held_out[documents]} documents, {held_out[bytes]:,} bytes, \
SHA-256 `{held_out[sha256]}` |
| recipe | AdamW, betas 0.9 and 0.95, peak rate {learning_rate:g}, \
{warmup} steps of warm-up, cosine to 0, weight decay {weight_decay:g}, \
gradient norm at most 1, {steps:,} steps of {batch} sequences |
| initial weights | normal, standard deviation {init_std:.3g} at every depth |
| seed | {seed}: initial weights and order of the text |
| machine | {device}; blocks {compiled} |
| wall time | {hours:.2f} h |
| code | commit `{commit}` |

| step | tokens | training loss | held-out loss |
| ---: | ---: | ---: | ---: |
{rows}

Losses are in nats per byte. The training loss is the mean since the row before, the held-out loss
that of a fixed sample, and in the last row of the whole held-out text.

```python
from depthutil import models

model, tokenizer = models.load("{name}")
```
"""


def assemble(
    found: Sequence[LadderModel],
    text: Corpus,
    models: str | os.PathLike | None,
    results: str | os.PathLike,
    *,
    label: str = "",
    scale: str = "custom",
    searches: pd.DataFrame | None = None,
) -> list[Path]:
    """Write finished models and the tables of all losses.

    Parameters
    ----------
    found : sequence of LadderModel
        Finished, of one recipe and one text.
    text : Corpus
        The text they were trained on.
    models : path or None
        Folder for the models; None to keep no more than the losses.
    results : path
        Folder for ``ladder_losses.parquet``, ``ladder_documents.parquet`` and, with
        ``searches``, ``ladder_rates.parquet``.
    label : str
        Of a second ladder, trained otherwise: ``"short"`` makes ``ladder_losses_short.parquet``.
    scale : str
        What to call the size of the run in captions.
    searches : pandas.DataFrame, optional
        The tables of :func:`best_rate`.

    Returns
    -------
    list of pathlib.Path
        What was written.

    Raises
    ------
    ValueError
        If there is no model, or they differ in more than depth, seed and learning rate.
    """
    if not found:
        raise ValueError("no model of the ladder is finished: run the training first")
    free = {"depth", "seed", "learning_rate"}
    for model in found:
        for key, value in found[0].settings.items():
            if key not in free and model.settings[key] != value:
                raise ValueError(f"{model.name} and {found[0].name} were trained with other {key}")
    if text.summary != found[0].settings["corpus"]:
        raise ValueError(f"the models were not trained on the {text.source} as it is here")
    found = sorted(found, key=lambda model: (model.settings["seed"], model.settings["depth"]))
    about = {
        "config": {k: v for k, v in found[0].settings.items() if k not in free}
        | {"learning_rates": {m.name: m.settings["learning_rate"] for m in found}},
        "seeds": sorted({m.settings["seed"] for m in found}),
        "scale": scale,
        "wall_seconds": sum(m.wall_seconds for m in found),
        "device": " and ".join(sorted({m.device for m in found})),
    }
    written = []
    if models is not None:
        written = [model.save(models) for model in found]
    tables = {
        "ladder_losses": pd.concat([model.losses for model in found], ignore_index=True),
        "ladder_documents": pd.concat([model.documents for model in found], ignore_index=True),
    }
    if searches is not None and len(searches):
        tables["ladder_rates"] = searches
    for name, table in tables.items():
        name += f"_{label}" if label else ""
        written.append(archive.save(table, Path(results) / f"{name}.parquet", **about))
    return written


# The ladder that comes with the book ----------------------------------------------------


def members() -> pd.DataFrame:
    """The ladder's models that are here, for ``depthutil.models.load``.

    Returns
    -------
    pandas.DataFrame
        ``name, width, depth, seed``, in this order of importance; empty if there is no model.

    Examples
    --------
    >>> members().columns.tolist()
    ['name', 'width', 'depth', 'seed']
    """
    found = [re.fullmatch(r"ladder-w(\d+)-d(\d+)-s(\d+)", name) for name in models.available()]
    rows = [(match[0], *map(int, match.groups())) for match in found if match]
    table = pd.DataFrame(rows, columns=["name", "width", "depth", "seed"])
    return table.sort_values(["width", "depth", "seed"], ignore_index=True)


def curves(label: str = "") -> archive.Archived:
    """Loss against training of every model of the ladder, with provenance.

    The table is :class:`LadderModel`'s ``losses`` for all models together.

    Parameters
    ----------
    label : str
        Of a ladder that was trained otherwise, see :func:`assemble`.

    Raises
    ------
    FileNotFoundError
        If no ladder was trained.
    """
    return _archived("results/ladder_losses", label)


def documents(label: str = "") -> archive.Archived:
    """Final loss of every model on every held-out document, with provenance.

    Differences between depths, document by document, are known far better than the losses:
    a document that is hard for one model is hard for all. ``label`` as in :func:`curves`.

    Raises
    ------
    FileNotFoundError
        If no ladder was trained.
    """
    return _archived("results/ladder_documents", label)


def _archived(name: str, label: str = "") -> archive.Archived:
    name += f"_{label}.parquet" if label else ".parquet"
    try:
        return archive.load(archive.find(name))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{_NONE} ({name} is missing)") from error
