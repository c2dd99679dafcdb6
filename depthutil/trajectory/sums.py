"""What is kept of a corpus: sums over its tokens and documents, and a sample of Gram matrices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthutil import _checks
from depthutil.gram import statistics
from depthutil.moments import Moments, tally
from depthutil.trajectory.passing import not_finite

PER_TOKEN = ("norms", "angles", "update_angles")


def frame(
    layers: np.ndarray, moments: Moments, at: Any, maxima: np.ndarray | None = None
) -> pd.DataFrame:
    """A table by layer of means, errors, spread and, where they were kept, maxima."""
    table = {
        "layer": layers,
        "mean": moments.mean()[at],
        "stderr": moments.stderr()[at],
        "std": moments.std()[at],
    }
    return pd.DataFrame(table if maxima is None else table | {"max": maxima[at]})


class Decoded:
    """Sums over tokens and documents of what is decoded early.

    Parameters
    ----------
    layers : int
    compared : bool
        Whether distance and overlap are there beside the loss.
    """

    NAMES = ("loss", "kl", "overlap")

    def __init__(self, layers: int, compared: bool = False):
        self.names, self.layers = self.NAMES[: 3 if compared else 1], layers
        self.moments = Moments(len(self.names) * layers, joint=False)
        self.tokens = self.documents = 0

    def add(self, values: Tensor, rows: Tensor, shape: Sequence[int], number: int) -> None:
        """Add a batch of ``shape``; ``values`` of those rows of it."""
        bad = (~torch.isfinite(values).all(1)).nonzero()
        if len(bad):
            row, position = divmod(int(rows[bad[0]]), shape[1])
            raise FloatingPointError(not_finite(number, "losses", row, position))
        inside = (rows // shape[1] == torch.arange(shape[0])[:, None]).double()
        if self.tokens == 0 and len(rows):
            self.moments.shift = values.mean(0).numpy()
        values = values - torch.from_numpy(self.moments.shift)
        self.moments.add(*(total.numpy() for total in tally(values, inside)))
        self.tokens += len(rows)
        self.documents += int((inside.sum(1) > 0).sum())

    def table(self, there: int | None = None) -> pd.DataFrame:
        """As :func:`decode_early` returns it."""
        if self.tokens == 0:
            raise ValueError("no position counts: batches are empty, or the mask leaves nothing")
        layers, n = np.arange(self.layers), self.layers
        table = frame(layers, self.moments, slice(0, n))
        for place, name in enumerate(self.names[1:], 1):
            part = frame(layers, self.moments, slice(place * n, (place + 1) * n))
            table[name], table[f"{name}_stderr"] = part["mean"], part["stderr"]
        table.attrs = {"documents": self.documents, "tokens": self.tokens}
        table.attrs["of"] = self.documents if there is None else there
        return table

    def state(self) -> dict[str, np.ndarray]:
        """Everything as arrays, for a checkpoint."""
        arrays = {f"decoded.{name}": getattr(self.moments, name) for name in Moments.names}
        return arrays | {"decoded.counts": np.array([self.tokens, self.documents])}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`state` gave."""
        for name in Moments.names:
            setattr(self.moments, name, arrays[f"decoded.{name}"])
        self.tokens, self.documents = (int(n) for n in arrays["decoded.counts"])


class Sums:
    """What is kept of a corpus; its size does not depend on the number of tokens."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings  # depth, sublayers, parallel, normed, null, sample, per_token
        self.tokens = self.documents = self.batches = 0
        self.layout: dict[str, tuple[int, int]] = {}
        self.vectors = self.pairs = Moments(0, joint=False)  # until the first tokens are seen
        self.maxima = np.zeros(0)  # of what ``vectors`` are means of
        rows = 1 + settings["depth"] * (2 if settings["sublayers"] else 1)
        self.gram = np.zeros((rows, rows))
        self.priority, self.sampled = np.zeros(0), np.zeros((0, rows, rows))
        self.sampled_from = np.zeros((0, 2), dtype=np.int64)  # document, position
        self.kept: dict[str, list[np.ndarray]] = {}
        self.decoded: Decoded | None = None
        if settings.get("decode"):
            layers = settings["depth"] + (settings["decode"] == "lens")
            self.decoded = Decoded(layers, bool(settings["top"]))

    def add(
        self,
        groups: Iterable[tuple[Tensor, Tensor | None]],
        document: Tensor,
        position: Tensor,
        token: Tensor,
    ) -> None:
        """Add one batch: Gram matrices in groups, and each token's row, position and id."""
        device = document.device
        rows = int(document.max()) + 1 if len(document) else 0
        counts = np.bincount(document.cpu().numpy(), minlength=rows)
        names, chosen, priority = self._choose(counts)
        totals: list[Tensor] | None = None
        start = 0
        for gram, null in groups:
            stop = start + len(gram)
            values, pairs = statistics(
                gram, **{n: self.settings[n] for n in ("sublayers", "parallel", "normed")}
            )
            if null is not None:
                values["null_cosines"] = null
                values["null_angles"] = torch.atan2((1 - null * null).clamp(min=0).sqrt(), null)
            parts = [torch.cat(list(values.values()), 1), pairs]
            self._prepare(values, parts)
            inside = document[start:stop] == torch.arange(rows, device=device)[:, None]
            inside = inside.to(gram.dtype)
            new = [gram[:, : len(self.gram), : len(self.gram)].sum(0)]
            for part, moments in zip(parts, (self.vectors, self.pairs), strict=True):
                new += tally(part - torch.as_tensor(moments.shift, device=device), inside)
            totals = new if totals is None else [a + b for a, b in zip(totals, new, strict=True)]
            largest = parts[0].nan_to_num(nan=-torch.inf).amax(0).cpu().numpy()
            self.maxima = np.maximum(self.maxima, largest)
            hit = (chosen >= start) & (chosen < stop)
            picked = torch.as_tensor(chosen[hit] - start, device=device)
            picked = gram[picked, : len(self.gram), : len(self.gram)]
            self.sampled = np.concatenate([self.sampled, picked.cpu().numpy()])
            if self.settings["per_token"]:
                for name in PER_TOKEN:
                    array = values[name].to(torch.float32).cpu().numpy()
                    self.kept.setdefault(name, []).append(array)
            start = stop
        self.batches += 1
        if totals is None:
            return
        whole, *sums = (total.cpu().numpy() for total in totals)
        self.gram += whole
        self.vectors.add(*sums[:3])
        self.pairs.add(*sums[3:])
        self._keep_sample(names, chosen, priority, position.cpu().numpy())
        if self.settings["per_token"]:
            # Rows without a counted token are no documents: number those that remain.
            number = self.documents + np.cumsum(counts > 0) - 1
            ids = {"document": number[document.cpu().numpy()], "position": position.cpu().numpy()}
            for name, array in {**ids, "token": token.cpu().numpy()}.items():
                self.kept.setdefault(name, []).append(array)
        self.tokens += len(document)
        self.documents += int((counts > 0).sum())

    def _prepare(self, values: dict[str, Tensor], parts: list[Tensor]) -> None:
        """On the first tokens: the layout, and numbers near the means, subtracted from all."""
        if self.layout:
            return
        ends = np.cumsum([value.shape[1] for value in values.values()])
        starts = [0, *ends[:-1]]
        self.layout = {
            name: (int(a), int(b)) for name, a, b in zip(values, starts, ends, strict=True)
        }
        self.vectors = Moments(parts[0].shape[1], joint=True)
        self.pairs = Moments(parts[1].shape[1], joint=False)
        self.maxima = np.full(parts[0].shape[1], -np.inf)
        for part, moments in zip(parts, (self.vectors, self.pairs), strict=True):
            moments.shift = torch.nan_to_num(part.nanmean(0)).cpu().numpy()

    def _choose(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One random token of each document that may enter the sample."""
        rng = np.random.default_rng([17, self.batches])
        where, priority = rng.random((2, len(counts)))
        first = np.cumsum(counts) - counts
        chosen = first + np.minimum((where * counts).astype(int), np.maximum(counts - 1, 0))
        limit = np.inf
        if len(self.priority) >= self.settings["sample"]:
            limit = self.priority.max() if len(self.priority) else -np.inf
        names = self.documents + np.cumsum(counts > 0) - 1
        enters = (counts > 0) & (priority < limit)
        return names[enters], chosen[enters], priority[enters]

    def _keep_sample(
        self,
        names: np.ndarray,
        chosen: np.ndarray,
        priority: np.ndarray,
        position: np.ndarray,
    ) -> None:
        self.priority = np.concatenate([self.priority, priority])
        new = np.stack([names, position[chosen]], axis=1).astype(np.int64)
        self.sampled_from = np.concatenate([self.sampled_from, new])
        size = self.settings["sample"]
        if len(self.priority) > size:
            best = np.sort(np.argsort(self.priority, kind="stable")[:size])
            self.priority, self.sampled = self.priority[best], self.sampled[best]
            self.sampled_from = self.sampled_from[best]

    def state(self) -> dict[str, np.ndarray]:
        """Everything as arrays, for a checkpoint."""
        names = ("gram", "priority", "sampled", "sampled_from", "maxima")
        arrays = {name: getattr(self, name) for name in names}
        for part in ("vectors", "pairs"):
            moments = getattr(self, part)
            if self.layout:
                arrays |= {f"{part}.{name}": getattr(moments, name) for name in Moments.names}
        arrays |= {f"kept.{name}": np.concatenate(parts) for name, parts in self.kept.items()}
        arrays |= {} if self.decoded is None else self.decoded.state()
        counts = {n: getattr(self, n) for n in ("tokens", "documents", "batches", "layout")}
        arrays["counts"] = np.array(json.dumps(counts))
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`state` gave."""
        for name in ("gram", "priority", "sampled", "sampled_from"):
            setattr(self, name, arrays[name])
        for name, value in json.loads(str(arrays["counts"])).items():
            setattr(self, name, value)
        self.layout = {name: (start, stop) for name, (start, stop) in self.layout.items()}
        for part, joint in (("vectors", True), ("pairs", False)):
            if f"{part}.n" in arrays:
                moments = Moments(len(arrays[f"{part}.n"]), joint)
                for name in Moments.names:
                    setattr(moments, name, arrays[f"{part}.{name}"])
                setattr(self, part, moments)
        # Files of before maxima were kept do not know them, and what goes on from one never will.
        unknown = np.full(len(self.vectors.n), np.nan)
        self.maxima = arrays.get("maxima", unknown)
        if self.decoded is not None:
            self.decoded.restore(arrays)
        kept = [name for name in arrays if name.startswith("kept.")]
        self.kept = {name.removeprefix("kept."): [arrays[name]] for name in kept}


def settings_of(
    depth: int,
    sublayers: bool = False,
    parallel: bool | None = False,
    *,
    normed: bool = False,
    null: bool = False,
    sample: int = 512,
    per_token: bool = False,
    decode: str | None = None,
    top: int = 0,
) -> dict[str, Any]:
    """What decides how a corpus is summed up, as JSON holds it."""
    more = {} if decode is None else {"decode": decode, "top": top}
    return more | {
        "depth": depth,
        "sublayers": sublayers,
        "parallel": parallel,
        "normed": normed,
        "null": bool(null),
        "sample": _checks.count(sample, "sample", low=0),
        "per_token": bool(per_token),
    }


def read(path: Path, needed: Iterable[str], what: str) -> dict[str, np.ndarray]:
    """The arrays of a file that hold, among others, those that are needed."""
    try:
        with open(path, "rb") as file:
            arrays = dict(np.load(file, allow_pickle=False))
        for name in (*needed, "counts"):
            arrays[name]
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and key errors alike
        raise ValueError(f"{path} is no {what}") from error
    return arrays
