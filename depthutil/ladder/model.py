"""One model of the ladder: how it begins, what it reached, its card."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from depthutil import _checks, _runs, archive, surgery
from depthutil.corpus import BOS, VOCABULARY, Corpus, write_tokenizer
from depthutil.ladder.designs import Design, plain_weights
from depthutil.ladder.recipe import HEAD, LadderConfig
from depthutil.stream import anatomy


def new_model(config: LadderConfig, depth: int, seed: int, step: int = 1) -> Any:
    """A model to train. Each matrix is drawn by its own name: depth changes none of them.

    One that grows has the depth of a step.
    """
    unique = len(set(config.design.layers(depth)))
    if config.design.grow is not None:
        unique = config.design.depth_at(depth, step, config.steps)
    return config.design.arranged(_drawn(config, unique, seed), depth)


def _drawn(config: LadderConfig, depth: int, seed: int) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError(
            "the depth ladder needs transformers: pip install 'depthutil[models]'"
        ) from error
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=depth,
            num_attention_heads=config.width // HEAD,
            num_key_value_heads=config.width // HEAD,
            max_position_embeddings=config.sequence,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=BOS,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, config.init_std, generator=_runs.generator("ladder", seed, name))
    return model


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a trainer has saved."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["settings"]["depth"]
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole checkpoint of depthutil.ladder: remove it to begin again"
        ) from error
    return state


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
    def of(cls, trainer: Any) -> LadderModel:
        """What a trainer has reached."""
        return cls._from(trainer.state(), trainer.text)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, text: Corpus | None = None) -> LadderModel:
        """What a checkpoint of :func:`train` holds, of a run that may still go on.

        ``text``, if given, names the held-out documents in ``documents``.
        """
        return cls._from(read_checkpoint(Path(path)), text)

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
            weights={name: w.detach().cpu() for name, w in state["weights"].items()},
        )

    @property
    def config(self) -> LadderConfig:
        """The settings as a configuration of this one model."""
        known = {f.name for f in fields(LadderConfig)} & set(self.settings)
        own: dict[str, Any] = {
            name: (self.settings[name[:-1]],) for name in ("depths", "seeds", "learning_rates")
        }
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

    @property
    def schedule(self) -> str:
        """How the rate goes on after the warm-up, in words."""
        cooldown = self.settings.get("cooldown")
        if cooldown is None:
            return "cosine to 0"
        return f"constant, then to 0 over the last {cooldown:.0%}" if cooldown else "constant"

    @cached_property
    def model(self) -> Any:
        """The ``LlamaForCausalLM``, on the CPU, in evaluation mode."""
        trained = new_model(self.config, self.settings["depth"], self.settings["seed"], self.step)
        trained.load_state_dict(self.weights)
        config = replace(self.config, design=Design())
        model = _drawn(config, anatomy(trained).depth, self.settings["seed"])
        model.load_state_dict(plain_weights(trained))
        first = surgery.sharing(trained)
        surgery.tie(model, [[i for i, f in enumerate(first) if f == k] for k in sorted(set(first))])
        return model.eval()

    def save(self, folder: str | os.PathLike, dtype: str = "float32") -> Path:
        """Write the model as ``folder/name`` in Hugging Face format with its card, or nothing.

        ``dtype`` is that of the weights in the file, ``"float32"`` or ``"float16"``.
        """
        _checks.word(dtype, ("float32", "float16"), "dtype")
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
            config |= {"dtype": dtype, "torch_dtype": dtype}
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            state = {k: w.to(getattr(torch, dtype)) for k, w in self.model.state_dict().items()}
            weights = safetensors.torch.save(state, {"format": "pt"})
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
            heads=s["width"] // HEAD,
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
            schedule=self.schedule,
            uses=self.config.design.text(s["depth"]),
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
{warmup} steps of warm-up, {schedule}, weight decay {weight_decay:g}, \
gradient norm at most 1, {steps:,} steps of {batch} sequences |
| use of depth | {uses} |
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
