"""Record what every layer writes to the residual stream, and read the geometry of depth off it.

:func:`record` runs a language model over a corpus. For each token it stacks the stream's start
and every write to it, ``U = [h_0, Δ_1, …, Δ_ℓ]``, and keeps statistics of the Gram matrix
``G = U Uᵀ``: states are partial sums of writes, so every norm and angle follows from it.
:class:`Trajectory` gives them with standard errors over documents. Toy networks come in
through :meth:`Trajectory.from_states`. :func:`decode_early` reads the loss along depth.

Writes are recorded, not states: the difference of two large states has lost the digits that a
small write needs. Products are taken in double precision. Single precision would not do: where
an early layer writes one channel a thousand times larger than the rest and the last layer takes
it back, or where a large update is nearly parallel to its state, it misplaces angles by up to
8e-3 radians, double precision by less than 1e-9 (tests/test_trajectory.py measures both).
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from depthutil import _checks, _runs, archive, models, stream
from depthutil.gram import STATISTICS, of_blocks, of_states, ratio, statistics
from depthutil.moments import Moments, tally

_PER_TOKEN = ("norms", "angles", "update_angles")
_STACK_BYTES = {"cpu": 4e6, "cuda": 256e6}  # of writes multiplied at a time: a cache, a GPU
_GROUP = {"cpu": 512, "cuda": 4096}  # tokens whose Gram matrices are evaluated at a time


# Sums over tokens and documents -----------------------------------------------------------


class _Sums:
    """What is kept of a corpus; its size does not depend on the number of tokens."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings  # depth, sublayers, parallel, normed, null, sample, per_token
        self.tokens = self.documents = self.batches = 0
        self.layout: dict[str, tuple[int, int]] = {}
        self.vectors = self.pairs = None
        rows = 1 + settings["depth"] * (2 if settings["sublayers"] else 1)
        self.gram = np.zeros((rows, rows))
        self.priority, self.sampled = np.zeros(0), np.zeros((0, rows, rows))
        self.sampled_from = np.zeros((0, 2), dtype=np.int64)  # document, position
        self.kept: dict[str, list[np.ndarray]] = {}

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
            hit = (chosen >= start) & (chosen < stop)
            picked = torch.as_tensor(chosen[hit] - start, device=device)
            picked = gram[picked, : len(self.gram), : len(self.gram)].cpu().numpy()
            self.sampled = np.concatenate([self.sampled, picked])
            if self.settings["per_token"]:
                for name in _PER_TOKEN:
                    array = values[name].to(torch.float32).cpu().numpy()
                    self.kept.setdefault(name, []).append(array)
            start = stop
        self.batches += 1
        if totals is None:
            return
        gram, *sums = (total.cpu().numpy() for total in totals)
        self.gram += gram
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
        if self.vectors is not None:
            return
        ends = np.cumsum([value.shape[1] for value in values.values()])
        starts = [0, *ends[:-1]]
        self.layout = {
            name: (int(a), int(b)) for name, a, b in zip(values, starts, ends, strict=True)
        }
        self.vectors = Moments(parts[0].shape[1], joint=True)
        self.pairs = Moments(parts[1].shape[1], joint=False)
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

    def _keep_sample(self, names, chosen, priority, position) -> None:
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
        arrays = {n: getattr(self, n) for n in ("gram", "priority", "sampled", "sampled_from")}
        for part in ("vectors", "pairs"):
            moments = getattr(self, part)
            if moments is not None:
                arrays |= {f"{part}.{name}": getattr(moments, name) for name in Moments.names}
        arrays |= {f"kept.{name}": np.concatenate(parts) for name, parts in self.kept.items()}
        counts = {n: getattr(self, n) for n in ("tokens", "documents", "batches", "layout")}
        arrays["counts"] = np.array(json.dumps(counts))
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`state` gave."""
        for name in ("gram", "priority", "sampled", "sampled_from"):
            setattr(self, name, arrays[name])
        for name, value in json.loads(str(arrays["counts"])).items():
            setattr(self, name, value)
        self.layout = {name: tuple(ends) for name, ends in self.layout.items()}
        for part, joint in (("vectors", True), ("pairs", False)):
            if f"{part}.n" in arrays:
                moments = Moments(len(arrays[f"{part}.n"]), joint)
                for name in Moments.names:
                    setattr(moments, name, arrays[f"{part}.{name}"])
                setattr(self, part, moments)
        kept = [name for name in arrays if name.startswith("kept.")]
        self.kept = {name.removeprefix("kept."): [arrays[name]] for name in kept}


# What a recording gives -------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    """How a network's residual stream moves along depth, over many tokens.

    Made by :func:`record`, :meth:`from_states` or :meth:`from_writes`. Tables have a row for
    each ``layer`` and the columns ``mean`` (over all tokens), ``stderr`` (its standard
    error, with documents as the independent units) and ``std`` (spread over tokens). Angles are
    in radians. A token for which a number is not defined (the angle of a write that is
    zero) is left out of that number.

    Layers are numbered as in the formulas: ``h_0`` enters the first block, ``Δ_1`` is
    what that block writes, ``h_l = h_0 + Δ_1 + … + Δ_l``, and ``h_ℓ`` is the last state,
    before the final norm.

    Attributes
    ----------
    name : str
        The model, or what was given instead.
    depth, width : int
        Blocks, and size of the stream (0 where only Gram matrices were given).
    writes : str
        ``"block"``, one write a block, or ``"sublayer"``: attention and MLP.
    parallel : bool or None
        Whether both sublayers are added to the block's input (GPT-NeoX, Phi); None where a block
        has no two that could be found.
    tokens, documents : int
        How many were counted.
    gram : numpy.ndarray
        Mean Gram matrix of ``[h_0, writes…]``, ``(writes + 1, writes + 1)``.
    per_token : dict or None
        On request ``norms``, ``angles``, ``update_angles`` ``(tokens, layers)`` in single
        precision, and ``document``, ``position`` and ``token`` ``(tokens,)``.
    """

    name: str
    depth: int
    width: int
    writes: str
    parallel: bool | None
    tokens: int
    documents: int
    gram: np.ndarray = field(repr=False)
    per_token: dict[str, np.ndarray] | None = field(repr=False)
    _sums: _Sums = field(repr=False)

    # Toy networks

    @classmethod
    def from_states(
        cls, states: Any, *, name: str = "states", per_token: bool = False, sample: int = 512
    ) -> Trajectory:
        """The trajectory of any residual network, each input a document of one token.

        Parameters
        ----------
        states : array
            Residual stream ``(depth + 1, inputs, width)``, as
            :meth:`depthutil.toy.ToyResult.states` returns it.
        name, per_token, sample
            As attributes here, and as in :func:`record`.

        Examples
        --------
        >>> states = np.array([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 1.0]]])
        >>> Trajectory.from_states(states).angles()["mean"].round(4).tolist()
        [0.7854, 0.7854]
        """
        if len(getattr(states, "shape", ())) != 3:
            of_states(states)  # says what is wrong
        parts = (
            torch.from_numpy(of_states(states[:, i : i + _GROUP["cpu"]]))
            for i in range(0, max(states.shape[1], 1), _GROUP["cpu"])
        )
        settings = _settings(states.shape[0] - 1, per_token=per_token, sample=sample)
        return _of_inputs(parts, settings, name, states.shape[2])

    @classmethod
    def from_writes(
        cls,
        writes: Any,
        *,
        sublayers: bool = False,
        parallel: bool = False,
        name: str = "writes",
        per_token: bool = False,
        sample: int = 512,
    ) -> Trajectory:
        """The trajectory of a network whose writes are known, each input a document.

        Parameters
        ----------
        writes : array
            The stream's start and the writes, ``(writes + 1, inputs, width)``.
        sublayers, parallel : bool
            Whether two writes make a block, and whether both are added to its input.
        name, per_token, sample
            As attributes here, and as in :func:`record`.

        Examples
        --------
        >>> writes = np.array([[[3.0, 0.0]], [[0.0, 4.0]]])
        >>> Trajectory.from_writes(writes).norms()["mean"].tolist()
        [3.0, 5.0]
        """
        writes = torch.as_tensor(writes).detach().cpu().double()
        if writes.ndim != 3 or writes.shape[0] < 2 or 0 in writes.shape:
            raise ValueError(
                f"writes must be (writes + 1, inputs, width), not {tuple(writes.shape)}"
            )
        if sublayers and writes.shape[0] % 2 == 0:
            raise ValueError(f"{writes.shape[0] - 1} writes are not two for each block")
        if not torch.isfinite(writes).all():
            raise ValueError("writes hold numbers that are not finite: leave those inputs out")
        depth = (writes.shape[0] - 1) // (2 if sublayers else 1)
        stacks = (part.transpose(0, 1) for part in writes.split(_GROUP["cpu"], dim=1))
        parts = (stack @ stack.transpose(1, 2) for stack in stacks)
        settings = _settings(depth, sublayers, parallel, per_token=per_token, sample=sample)
        return _of_inputs(parts, settings, name, writes.shape[2])

    # Files

    def save(self, path: str | os.PathLike) -> Path:
        """Write everything to one file, all of it or nothing; :meth:`load` reads it.

        Its size does not grow with the number of tokens, unless ``per_token`` was kept. To
        archive the tables with their provenance, give :meth:`table` to
        :func:`depthutil.archive.save`.

        Parameters
        ----------
        path : path
            Ends with ``.npz`` by custom. A file that is there is replaced.

        Returns
        -------
        pathlib.Path

        Examples
        --------
        >>> import tempfile
        >>> rng = np.random.default_rng(0)
        >>> walk = Trajectory.from_states(rng.standard_normal((9, 50, 16)).cumsum(axis=0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = Trajectory.load(walk.save(f"{folder}/walk.npz"))
        >>> again.angles().equals(walk.angles())
        True
        """
        path = Path(path)
        about = {"name": self.name, "width": self.width, "settings": self._sums.settings}
        with archive.replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, trajectory=json.dumps(about), **self._sums.state())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Trajectory:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is not a whole trajectory.
        """
        arrays = _read(Path(path), ("trajectory",), "whole trajectory: save it again")
        about = json.loads(str(arrays.pop("trajectory")))
        sums = _Sums(about["settings"])
        sums.restore(arrays)
        return _result(sums, about["name"], about["width"])

    # Tables

    def norms(self) -> pd.DataFrame:
        """``‖h_l‖`` for l = 0 … ℓ."""
        return self._table("norms")

    def angles(self) -> pd.DataFrame:
        """``θ(h_l, h_{l+1})`` for l = 0 … ℓ − 1: the size of each update."""
        return self._table("angles")

    def update_norms(self) -> pd.DataFrame:
        """``‖Δ_l‖`` for l = 1 … ℓ."""
        return self._table("update_norms")

    def update_angles(self, lag: int = 1, *, null: bool = False) -> pd.DataFrame:
        """``θ(Δ_l, Δ_{l+lag})`` for l = 1 … ℓ − lag: the correlation of updates.

        Parameters
        ----------
        lag : int
            How many layers apart.
        null : bool
            Instead, the angle of neighbouring layers' updates at two different tokens, half
            a batch apart: what they share whatever the token. Needs
            ``record(..., null=True)``.
        """
        return self._pairs("angles", lag, null)

    def update_cosines(self, lag: int = 1, *, null: bool = False) -> pd.DataFrame:
        """The cosines of :meth:`update_angles`."""
        return self._pairs("cosines", lag, null)

    def angle_to_end(self) -> pd.DataFrame:
        """``θ(h_l, h_ℓ)`` for l = 0 … ℓ."""
        return self._table("angle_to_end")

    def projections(self) -> pd.DataFrame:
        """``(h_l − h_0)·(h_ℓ − h_0) / ‖h_ℓ − h_0‖²`` for l = 0 … ℓ: from 0 to 1."""
        return self._table("projections")

    def contributions(self) -> pd.DataFrame:
        """Size of each write relative to the stream it is added to, by ``part``.

        ``block`` is ``‖Δ_l‖/‖h‖`` with ``h = h_{l−1}``; of sublayers, also ``attention``
        ``‖a_l‖/‖h‖`` and ``mlp`` ``‖m_l‖/‖h + a_l‖``. In parallel blocks both
        are added to ``h``, so there ``mlp`` is ``‖m_l‖/‖h‖`` (arXiv 2505.13898, section 3).
        """
        return self._parts("contributions")

    def cosines(self) -> pd.DataFrame:
        """Cosine of each write with the stream it is added to, by ``part``.

        Negative erases, zero adds, positive amplifies. Streams as in :meth:`contributions`.
        """
        return self._parts("cosines")

    def block_influence(self) -> pd.DataFrame:
        """``1 − cos(h_{l−1}, h_l)`` for l = 1 … ℓ (arXiv 2403.03853)."""
        return self._table("block_influence")

    def last_angle_after_norm(self) -> pd.DataFrame:
        """``θ(h_{ℓ−1}, norm(h_ℓ))``, one row.

        This is what the last two ``hidden_states`` of ``transformers`` give, because for most
        families the last one has been through the final norm. The last row of :meth:`angles`
        is the last block's own.
        """
        if "last_angle_after_norm" not in self._sums.layout:
            raise ValueError(f"{self.name} was not recorded with a final norm")
        return self._table("last_angle_after_norm")

    def average(
        self,
        statistic: str = "angles",
        first: int | None = None,
        last: int | None = None,
    ) -> pd.Series:
        """Mean of a statistic over layers, with its standard error over documents.

        Layers of one document vary together, which this error counts.

        Parameters
        ----------
        statistic : str
            A key of :data:`depthutil.gram.STATISTICS` that this trajectory has.
        first, last : int, optional
            Layers to begin and end with, both included. By default the statistic's first
            and last entry are left out: these layers read from and write to the vocabulary.

        Returns
        -------
        pandas.Series
            ``mean``, ``stderr``, ``first``, ``last``.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> walk = rng.standard_normal((9, 50, 16)).cumsum(axis=0)
        >>> Trajectory.from_states(walk).average("update_angles").round(2).to_dict()
        {'mean': 1.55, 'stderr': 0.02, 'first': 2.0, 'last': 6.0}
        """
        layers = self._layers(statistic)
        if len(layers) == 0 or (first is None and last is None and len(layers) < 3):
            raise ValueError(
                f"{statistic} of {self.depth} layers has no middle: name first and last"
            )
        first = layers[1] if first is None else first
        last = layers[-2] if last is None else last
        inside = np.flatnonzero((layers >= first) & (layers <= last))
        if not (layers[0] <= first <= last <= layers[-1]):
            raise ValueError(
                f"{statistic} has layers {layers[0]} to {layers[-1]}, not {first} to {last}"
            )
        entries = inside + self._sums.layout[statistic][0]
        return pd.Series(
            {
                "mean": self._sums.vectors.mean()[entries].mean(),
                "stderr": self._sums.vectors.stderr_of_average(entries),
                "first": first,
                "last": last,
            }
        )

    def grams(self, first: int = 1, last: int | None = None) -> np.ndarray:
        """Gram matrices of one random token of each document, of a sample of documents.

        They are what :func:`depthutil.signatures.signature` takes as ``gram_matrix``.

        Parameters
        ----------
        first, last : int, optional
            Blocks to begin and end with, both included; all by default. What is before
            ``first`` makes up the start.

        Returns
        -------
        numpy.ndarray
            ``(documents, blocks + 1, blocks + 1)``, of ``[h_{first−1}, Δ_first, …, Δ_last]``.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> walk = rng.standard_normal((9, 50, 16)).cumsum(axis=0)
        >>> Trajectory.from_states(walk).grams(first=2, last=7).shape
        (50, 7, 7)
        """
        last = self.depth if last is None else last
        if not 1 <= first <= last <= self.depth:
            raise ValueError(f"blocks are numbered 1 to {self.depth}, not {first} to {last}")
        whole = self._sums.sampled
        if self.writes == "sublayer":
            whole = of_blocks(torch.from_numpy(whole)).numpy()
        whole = whole[:, : last + 1, : last + 1]
        result = whole[:, first - 1 :, first - 1 :].copy()
        result[:, 0, 1:] = result[:, 1:, 0] = whole[:, :first, first:].sum(1)
        result[:, 0, 0] = whole[:, :first, :first].sum((1, 2))
        return result

    def table(self) -> pd.DataFrame:
        """Every statistic in one table: ``statistic, layer, lag, mean, stderr, std``.

        Made for :func:`depthutil.archive.save`. ``lag`` is 1 but for updates further apart.
        """
        parts = [self._table(name).assign(statistic=name, lag=1) for name in self._sums.layout]
        for what in ("angles", "cosines"):
            parts += [
                self._pairs(what, lag, False).assign(statistic=f"update_{what}", lag=lag)
                for lag in range(2, self.depth)
            ]
        table = pd.concat(parts, ignore_index=True)
        return table[["statistic", "layer", "lag", "mean", "stderr", "std"]]

    def _layers(self, statistic: str) -> np.ndarray:
        if statistic not in self._sums.layout:
            raise ValueError(
                f"this trajectory has no {statistic!r}, but {', '.join(self._sums.layout)}"
            )
        start, stop = self._sums.layout[statistic]
        first = STATISTICS[statistic]
        return np.arange(stop - start) + (self.depth if first is None else first)

    def _table(self, statistic: str) -> pd.DataFrame:
        layers, at = self._layers(statistic), slice(*self._sums.layout[statistic])
        moments = self._sums.vectors
        return _frame(layers, moments, at)

    def _pairs(self, what: str, lag: int, null: bool) -> pd.DataFrame:
        if null:
            if "null_cosines" not in self._sums.layout:
                raise ValueError("there is no null: record with null=True")
            if lag != 1:
                raise ValueError(f"the null is of neighbouring layers, not of lag {lag}")
            return self._table(f"null_{what}")
        if not 1 <= lag < max(self.depth, 2):
            raise ValueError(f"the lag of {self.depth} updates is 1 to {self.depth - 1}, not {lag}")
        i, j = np.triu_indices(self.depth, 1)
        at = np.flatnonzero(j - i == lag)
        at = at + (len(i) if what == "cosines" else 0)
        return _frame(np.arange(len(at)) + 1, self._sums.pairs, at)

    def _parts(self, what: str) -> pd.DataFrame:
        names = [name for name in self._sums.layout if name.startswith(what + ".")]
        parts = {name.partition(".")[2]: self._table(name) for name in names}
        tables = [frame.assign(part=part) for part, frame in parts.items()]
        table = pd.concat(tables, ignore_index=True)
        return table[["layer", "part", "mean", "stderr", "std"]]


def _frame(layers: np.ndarray, moments: Moments, at: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": layers,
            "mean": moments.mean()[at],
            "stderr": moments.stderr()[at],
            "std": moments.std()[at],
        }
    )


def _settings(
    depth: int,
    sublayers: bool = False,
    parallel: bool | None = False,
    *,
    normed: bool = False,
    null: bool = False,
    sample: int = 512,
    per_token: bool = False,
) -> dict[str, Any]:
    return {
        "depth": depth,
        "sublayers": sublayers,
        "parallel": parallel,
        "normed": normed,
        "null": bool(null),
        "sample": _checks.count(sample, "sample", low=0),
        "per_token": bool(per_token),
    }


def _of_inputs(
    parts: Iterable[Tensor], settings: dict[str, Any], name: str, width: int
) -> Trajectory:
    sums = _Sums(settings)
    for gram in parts:
        each = torch.arange(len(gram))
        nothing = torch.zeros(len(gram), dtype=torch.long)
        sums.add([(gram, None)], each, nothing, nothing - 1)
    return _result(sums, name, width)


def _result(sums: _Sums, name: str, width: int) -> Trajectory:
    kept = {key: np.concatenate(parts) for key, parts in sums.kept.items()}
    return Trajectory(
        name=name,
        depth=sums.settings["depth"],
        width=width,
        writes="sublayer" if sums.settings["sublayers"] else "block",
        parallel=sums.settings["parallel"],
        tokens=sums.tokens,
        documents=sums.documents,
        gram=sums.gram / sums.tokens,
        per_token=kept or None,
        _sums=sums,
    )


# Watching a model -------------------------------------------------------------------------


class _Shelf:
    """Memory for what hooks keep, used again for every batch.

    On a CPU, keeping a module's output alive makes the next modules write to fresh pages,
    which costs twice what copying it to pages already there does. A GPU's allocator has no
    such cost, and there outputs are kept as they are.
    """

    def __init__(self):
        self.slots: list[Tensor] = []
        self.used = 0

    def keep(self, states: Tensor) -> Tensor:
        if states.device.type != "cpu":
            return states
        if self.used == len(self.slots):
            self.slots.append(states.new_empty(0))
        slot = self.slots[self.used]
        if slot.dtype != states.dtype or slot.numel() < states.numel():
            slot = self.slots[self.used] = states.new_empty(states.numel())
        self.used += 1
        return slot[: states.numel()].view(states.shape).copy_(states)


class _Trace:
    """What passed through the hooks in one forward pass."""

    def __init__(self, parts: models.Anatomy):
        self.start: Tensor | None = None
        self.after: Tensor | None = None
        self.read: list[Tensor | None] = [None] * parts.depth  # blocks' inputs, where needed
        self.written: list[list[Tensor]] = [[] for _ in parts.blocks]


@contextmanager
def _watching(parts: models.Anatomy, shelf: _Shelf | None = None) -> Iterator[_Trace]:
    """Hooks on all that writes."""
    trace = _Trace(parts)
    shelf = _Shelf() if shelf is None else shelf
    shelf.used, keep = 0, shelf.keep

    def store(name: str, number: int | None = None) -> Callable[[Tensor], None]:
        if number is None:
            return lambda h: setattr(trace, name, keep(h))
        if name == "read":
            return lambda h: trace.read.__setitem__(number, keep(h))
        return lambda h: trace.written[number].append(keep(h))

    before = [(parts.blocks[0], store("start"))]
    after = [(parts.norm, store("after"))]
    for number, block in enumerate(parts.blocks):
        writes = () if parts.writes is None else parts.writes[number]
        if not writes:
            before.append((block, store("read", number)))
        modules = [write.module for write in writes] or [block]
        after += [(module, store("written", number)) for module in modules]
    with stream.hooked(before, after):
        yield trace


def _pick(states: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows ``(tokens, width)`` of hidden states, which may be on any device."""
    flat = states.reshape(-1, states.shape[-1])
    return flat[rows if isinstance(rows, slice) else rows.to(flat.device)]


class _Stack:
    """The stream's start and writes of some tokens, in double precision."""

    def __init__(self, parts: models.Anatomy, trace: _Trace, sublayers: bool, device: torch.device):
        self.parts, self.trace, self.sublayers, self.device = parts, trace, sublayers, device
        self.rows = 1 + parts.depth * (2 if sublayers else 1)

    def size(self, width: int) -> int:
        """How many tokens to take at a time."""
        budget = _STACK_BYTES.get(self.device.type, 4e6)
        return max(16, int(budget / (8 * width * (self.rows + 1))))

    def fill(self, out: Tensor, rows: Tensor | slice, after: bool = True) -> Tensor:
        """Write ``[h_0, writes…, norm(h_ℓ)]`` of these tokens into ``out``."""
        trace = self.trace
        out[:, 0] = self._get(trace.start, rows)
        for number in range(self.parts.depth):
            writes = self._writes(number, rows)
            if self.sublayers:
                out[:, 2 * number + 1], out[:, 2 * number + 2] = writes
                continue
            write = out[:, number + 1]
            write.copy_(writes[0])
            for more in writes[1:]:
                write += more
        if after:
            out[:, self.rows] = self._get(trace.after, rows)
        return out

    def _writes(self, number: int, rows: Tensor | slice) -> list[Tensor]:
        """What one block writes, in one part or two."""
        written = [self._get(states, rows) for states in self.trace.written[number]]
        if self.parts.writes is None:  # output − input
            return [written[0].double() - self._get(self.trace.read[number], rows)]
        writes = self.parts.writes[number]
        return [
            states if write.scale == 1 else write.scale * states.double()
            for write, states in zip(writes, written, strict=True)
        ]

    def _get(self, states: Tensor, rows: Tensor | slice) -> Tensor:
        states = _pick(states, rows)
        return states if states.device == self.device else states.to(self.device)

    def empty(self, tokens: int, width: int) -> Tensor:
        shape = (tokens, self.rows + 1, width)
        return torch.empty(shape, dtype=torch.float64, device=self.device)


def _groups(
    stack: _Stack, rows: Tensor, width: int, null: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Gram matrices of a batch's tokens, a group at a time, and cosines with other tokens."""
    size = min(stack.size(width), len(rows))
    buffer = stack.empty(size, width)
    other = stack.empty(size, width) if null else None
    partners = rows.roll(len(rows) // 2)
    group = _GROUP.get(stack.device.type, _GROUP["cpu"])
    for begin in range(0, len(rows), group):
        grams, nulls = [], []
        for start in range(begin, min(begin + group, len(rows)), size):
            some = rows[start : min(start + size, begin + group)]
            filled = stack.fill(buffer[: len(some)], _as_slice(some))
            grams.append(filled @ filled.transpose(1, 2))
            if null:
                theirs = partners[start : start + len(some)]
                theirs = stack.fill(other[: len(some)], theirs, after=False)
                nulls.append(_across_tokens(filled, theirs, stack))
        yield torch.cat(grams), torch.cat(nulls) if null else None


def _across_tokens(mine: Tensor, theirs: Tensor, stack: _Stack) -> Tensor:
    """Cosines of each update of a token with the next layer's update of another token."""
    mine, theirs = (stack_[:, 1 : stack.rows] for stack_ in (mine, theirs))
    if stack.sublayers:
        mine, theirs = mine[:, 0::2] + mine[:, 1::2], theirs[:, 0::2] + theirs[:, 1::2]
    mine, theirs = mine[:, :-1], theirs[:, 1:]
    return ratio((mine * theirs).sum(2), mine.norm(dim=2) * theirs.norm(dim=2))


def _as_slice(rows: Tensor) -> Tensor | slice:
    """Consecutive rows as a slice, which is read without a copy."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


# Recording --------------------------------------------------------------------------------


def record(
    model: nn.Module,
    batches: Iterable[Any],
    writes: str = "block",
    *,
    per_token: bool = False,
    mask: str | Callable[[Tensor, Tensor], Tensor] = "next",
    null: bool = False,
    sample: int = 512,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 60,
    progress: bool | Callable[[int, int | None, float | None], None] = False,
) -> Trajectory:
    """Run a language model over a corpus and keep the statistics of its writes.

    On the first batch, the recorded writes are compared with the states that the blocks return.
    Memory does not grow with the corpus unless values are wanted per token. The head is not run.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model, see :func:`depthutil.models.anatomy`. Run in evaluation mode.
    batches : iterable
        Token ids ``(documents, positions)``, or mappings with ``input_ids`` and, where
        documents are filled up, ``attention_mask``; :func:`depthutil.models.batches` makes
        them. Each row is a document.
    writes : str
        ``"block"``, or ``"sublayer"`` to tell attention from MLP, which gives everything
        that ``"block"`` does and more.
    per_token : bool
        Keep norms, angles and update angles of every token, 4 bytes a number.
    mask : str or callable
        Positions that count: ``"next"``, where the token and the next are real (arXiv
        2602.05970, appendix A), so never the last; ``"all"`` real ones; or a function of ids and
        attention mask that returns booleans of their shape.
    null : bool
        Also compare the updates of each token with the next layer's at another token.
    sample : int
        Of how many documents to keep one token's Gram matrix, see :meth:`Trajectory.grams`.
    device : str or torch.device, optional
        Where products are taken, by default where the last block is.
    checkpoint : path, optional
        File to save to and, where it exists, to continue from, to the same bits.
    checkpoint_seconds : float
        Time between checkpoints.
    progress : bool or callable
        Print progress and time left to standard error about every ten seconds, or call
        with ``(batches done, all batches, seconds left)``; the last two are None if
        ``batches`` has no length.

    Returns
    -------
    Trajectory

    Raises
    ------
    ValueError
        If the model's writes do not add up to its states, if a batch has the wrong shape or no
        position counts, or if the checkpoint belongs to another recording.
    FloatingPointError
        If a state is not finite; the message names batch, row and position.

    Examples
    --------
    >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> model = GPTNeoXForCausalLM(GPTNeoXConfig(
    ...     vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
    ...     intermediate_size=32, max_position_embeddings=32))
    >>> corpus = [torch.randint(50, (3, 20)) for _ in range(2)]
    >>> recorded = record(model, corpus, writes="sublayer")
    >>> recorded.documents, recorded.tokens  # the last position of each does not count
    (6, 114)
    >>> recorded.angles().columns.tolist(), len(recorded.angles())
    (['layer', 'mean', 'stderr', 'std'], 4)
    """
    parts = models.anatomy(model)
    _checks.word(writes, ("block", "sublayer"), "writes")
    name = _name(model)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    device = _product_device(parts) if device is None else torch.device(device)
    total = len(batches) if hasattr(batches, "__len__") else None
    sums, digest, reached, identity, done = None, "", "", "", 0
    shelf, report, width = _Shelf(), None, parts.width
    number, saved = -1, time.perf_counter()
    with stream.evaluating(model):
        for number, batch in enumerate(batches):
            inputs, keep = stream.inputs_of(batch, parts, mask, number)
            if sums is None:
                parts = _measured(model, parts, inputs, writes)
                settings = _settings(
                    parts.depth,
                    writes == "sublayer",
                    parts.parallel,
                    normed=True,
                    null=null,
                    sample=sample,
                    per_token=per_token,
                )
                sums = _Sums(settings)
                if path is not None:
                    identity = stream.fingerprint(model, settings)
                    if path.exists():
                        done, reached = _resume(path, identity, sums)
                report = _runs.Progress(progress, total, done, of="batch")
            if path is not None:
                digest = stream.fingerprint(digest, inputs, keep)
            if number < done:
                if number == done - 1 and digest != reached:
                    raise ValueError(f"{path} is the checkpoint of a recording of other text")
                continue
            width = _one_batch(parts, inputs, keep, sums, device, number, shelf)
            report(number + 1, f"{sums.tokens:,} tokens")
            if path is not None and time.perf_counter() - saved >= checkpoint_seconds:
                _save(path, identity, digest, sums)
                saved = time.perf_counter()
    if number + 1 < done:
        raise ValueError(f"{path} has seen {done} batches, and now there are fewer")
    if sums is None or sums.tokens == 0:
        raise ValueError("no position counts: batches are empty, or the mask leaves nothing")
    if path is not None and sums.batches > done:
        _save(path, identity, digest, sums)
    return _result(sums, name, width)


def _measured(
    model: nn.Module, parts: models.Anatomy, inputs: dict[str, Tensor], writes: str
) -> models.Anatomy:
    """The parts as they are found on a batch, if such writes can be recorded of them."""
    parts = stream.measured(model, inputs, parts, head=False)
    name = f"{type(model).__name__} ({parts.family})"
    if writes == "sublayer" and not (parts.sublayers and parts.parallel is not None):
        raise ValueError(
            f"attention and MLP of {name} cannot be told apart: no two modules of each block were "
            "found whose outputs are what it adds, one after the other or both at once; record "
            "writes='block'"
        )
    if parts.writes is None:
        parameter = next(model.parameters(), None)
        if parameter is not None and torch.finfo(parameter.dtype).bits == 16:
            warnings.warn(
                f"what blocks of {name} add was found only as a difference of states, which in "
                f"{parameter.dtype} has few digits where the stream is large: load the model with "
                "dtype='float32' for exact small writes",
                stacklevel=3,
            )
    return parts


def _one_batch(
    parts: models.Anatomy,
    inputs: dict[str, Tensor],
    keep: Tensor,
    sums: _Sums,
    device: torch.device,
    number: int,
    shelf: _Shelf,
) -> int:
    """Run the model on one batch and add its tokens; returns the stream's width."""
    rows = keep.reshape(-1).nonzero().squeeze(1)
    ids = inputs["input_ids"]
    document, position = rows // ids.shape[1], rows % ids.shape[1]
    with _watching(parts, shelf) as trace:
        stream.forward(parts, inputs)
    width = trace.start.shape[-1]
    stack = _Stack(parts, trace, sums.settings["sublayers"], device)
    groups = _groups(stack, rows, width, sums.settings["null"])
    groups = _finite(groups, document, position, number, device)
    some = (tensor.to(device) for tensor in (document, position, ids.reshape(-1)[rows]))
    sums.add(groups, *some)
    return width


def _finite(groups, document, position, number, device):
    """Groups as they come, unless one holds a state that is no number."""
    start = 0
    for gram, null in groups:
        # One sum tells: it is not finite if anything is not.
        if not math.isfinite(float(gram.sum())):
            bad = int((~torch.isfinite(gram).flatten(1).all(1)).nonzero()[0]) + start
            where = int(document[bad]), int(position[bad])
            raise FloatingPointError(_not_finite(number, "states", *where))
        start += len(gram)
        yield gram, null


def _product_device(parts: models.Anatomy) -> torch.device:
    device = stream.device_of(parts.blocks[-1])
    # Apple's GPUs have no double precision.
    return torch.device("cpu") if device.type == "mps" else device


def _name(model: nn.Module) -> str:
    return getattr(model.config, "name_or_path", "") or type(model).__name__


def writes_of(model: nn.Module, batch: Any, writes: str = "block") -> Tensor:
    """The stream's start and every write to it, as vectors, for a few sentences.

    Memory grows with everything: for a corpus, use :func:`record`.

    Parameters
    ----------
    model, batch, writes
        As one batch of :func:`record`.

    Returns
    -------
    torch.Tensor
        ``(writes + 1, documents, positions, width)`` in double precision. Its cumulative sum
        over the first axis are the states.

    Raises
    ------
    ValueError
        As :func:`record`.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> writes_of(model, torch.tensor([[1, 2, 3]]), "sublayer").shape
    torch.Size([7, 1, 3, 4])
    """
    parts = models.anatomy(model)
    _checks.word(writes, ("block", "sublayer"), "writes")
    inputs, _ = stream.inputs_of(batch, parts, "all")
    rows = torch.arange(inputs["input_ids"].numel())
    with stream.evaluating(model):
        parts = _measured(model, parts, inputs, writes)
        with _watching(parts) as trace:
            stream.forward(parts, inputs)
        stack = _Stack(parts, trace, writes == "sublayer", _product_device(parts))
        out = stack.fill(stack.empty(len(rows), trace.start.shape[-1]), slice(None), after=False)
    return out[:, : stack.rows].transpose(0, 1).unflatten(1, inputs["input_ids"].shape)


# Checkpoints and progress -----------------------------------------------------------------


def _save(path: Path, identity: str, digest: str, sums: _Sums) -> None:
    with archive.replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, identity=identity, digest=digest, **sums.state())


def _read(path: Path, needed: Iterable[str], what: str) -> dict[str, np.ndarray]:
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


def _resume(path: Path, identity: str, sums: _Sums) -> tuple[int, str]:
    arrays = _read(path, ("identity", "digest"), "whole checkpoint of a recording: remove it")
    theirs, digest = str(arrays["identity"]), str(arrays["digest"])
    if theirs != identity:
        raise ValueError(
            f"{path} is the checkpoint of another recording (model or settings differ): "
            "remove it, or name another"
        )
    sums.restore(arrays)
    return sums.batches, digest


# Decoding early ---------------------------------------------------------------------------


def decode_early(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    documents: int | None = None,
    through_last: bool = True,
    mask: str | Callable[[Tensor, Tensor], Tensor] = "next",
    progress: bool | Callable[[int, int | None, float | None], None] = False,
) -> pd.DataFrame:
    """The loss that the model would have if it stopped at each layer.

    ``h_l`` goes through the last block, the final norm and the head (arXiv 2602.05970,
    figure 2), so that l = ℓ − 1 is the model itself. Each layer costs a block and the
    head, several forward passes together: take a sample of documents, whose standard
    error the table gives.

    Parameters
    ----------
    model, batches, mask, progress
        As in :func:`record`; positions without a next token never count.
    documents : int, optional
        How many to decode, spread evenly over all; all by default.
    through_last : bool
        False leaves the last block out (the logit lens); then l goes up to ℓ.

    Returns
    -------
    pandas.DataFrame
        ``layer, mean, stderr, std`` of the cross-entropy, in nats per token, errors over
        documents. ``attrs`` holds ``documents``, ``of`` (how many there were) and ``tokens``.

    Raises
    ------
    ValueError
        If the model has no head, or does something else between the final norm and its
        logits than is known.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> losses = decode_early(model, [torch.randint(8, (6, 10))], documents=4)
    >>> losses["layer"].tolist(), losses.attrs
    ([0, 1, 2], {'documents': 4, 'of': 6, 'tokens': 36})
    """
    parts = models.anatomy(model)
    documents = None if documents is None else _checks.count(documents, "documents")
    batches = [stream.inputs_of(b, parts, mask, number) for number, b in enumerate(batches)]
    chosen, there = _spread(batches, documents)
    moments = Moments(parts.depth + (0 if through_last else 1), joint=False)
    report = _runs.Progress(progress, len(chosen), of="batch")
    tokens = count = 0
    with stream.evaluating(model):
        for number, (inputs, keep) in enumerate(chosen):
            ids, keep = inputs["input_ids"], keep.clone()
            keep[:, -1] = False
            if "attention_mask" in inputs:
                keep[:, :-1] &= inputs["attention_mask"][:, 1:].bool().cpu()
            rows = keep.reshape(-1).nonzero().squeeze(1)
            if number == 0:
                parts = stream.measured(model, inputs, parts, head=True)
            losses = _losses(parts, inputs, rows, through_last)
            _all_finite(losses, rows, ids.shape[1], number)
            inside = rows // ids.shape[1] == torch.arange(len(ids))[:, None]
            inside = inside.double()
            if moments.n.sum() == 0 and len(rows):
                moments.shift = losses.mean(0).numpy()
            losses = losses - torch.from_numpy(moments.shift)
            moments.add(*(total.numpy() for total in tally(losses, inside)))
            tokens += len(rows)
            count += int((inside.sum(1) > 0).sum())
            report(number + 1, f"{tokens:,} tokens")
    if tokens == 0:
        raise ValueError("no position counts: batches are empty, or the mask leaves nothing")
    table = _frame(np.arange(len(moments.n)), moments, slice(None))
    table.attrs = {"documents": count, "of": there, "tokens": tokens}
    return table


def _all_finite(losses: Tensor, rows: Tensor, length: int, number: int) -> None:
    bad = (~torch.isfinite(losses).all(1)).nonzero()
    if len(bad):
        row, position = divmod(int(rows[bad[0]]), length)
        raise FloatingPointError(_not_finite(number, "losses", row, position))


def _not_finite(number: int, what: str, row: int, position: int) -> str:
    return (
        f"batch {number}: the {what} of row {row} at position {position} are not finite: load the "
        "model in another precision (float16 overflows first), or leave that document out"
    )


def _spread(
    batches: list[tuple[dict[str, Tensor], Tensor]], documents: int | None
) -> tuple[list[tuple[dict[str, Tensor], Tensor]], int]:
    """Evenly spaced rows of all batches, and how many rows there are."""
    starts = np.cumsum([0, *(len(keep) for _, keep in batches)])
    there = int(starts[-1])
    if documents is None or documents >= there:
        return batches, there
    rows = (np.arange(documents) * there) // documents
    result = []
    for start, stop, (inputs, keep) in zip(starts[:-1], starts[1:], batches, strict=True):
        some = torch.from_numpy(rows[(rows >= start) & (rows < stop)] - start)
        if len(some):
            result.append(({name: tensor[some] for name, tensor in inputs.items()}, keep[some]))
    return result, there


def _losses(
    parts: models.Anatomy, inputs: dict[str, Tensor], rows: Tensor, through_last: bool
) -> Tensor:
    """Cross-entropies ``(tokens, layers)`` of the next token, decoded at every layer."""
    states: list[Tensor] = []
    last: dict[str, Any] = {}

    def keep_arguments(module, args, kwargs, output):
        last.update(args=args, kwargs=kwargs)

    before = [(block, states.append) for block in parts.blocks]
    after = [(parts.blocks[-1], states.append)]
    with stream.watched(parts.blocks[-1:], keep_arguments), stream.hooked(before, after):
        stream.forward(parts, inputs)
    end, where = states[-1], stream.device_of(parts.blocks[-1])
    args, kwargs = last["args"], last["kwargs"]

    def final(number: int) -> Tensor:
        state = states[number]
        if not through_last:
            return state
        if number == parts.depth - 1:  # the model's own last step
            return end
        given, named = stream.with_hidden(args, kwargs, state.to(where))
        return stream.tensor(parts.blocks[-1](*given, **named))

    targets = inputs["input_ids"].reshape(-1)[(rows + 1).clamp(max=inputs["input_ids"].numel() - 1)]
    columns = [
        _cross_entropy(parts, final(number), rows, targets)
        for number in range(parts.depth + (not through_last))
    ]
    return torch.stack(columns, 1)


def _cross_entropy(parts: models.Anatomy, state: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    losses = []
    size = max(1, 2**24 // parts.vocabulary)
    norm_at = stream.device_of(parts.norm)
    for some, goal in zip(rows.split(size), targets.split(size), strict=True):
        logits = parts.logits(_pick(state, some).to(norm_at))
        goal = goal.to(logits.device)
        losses.append(nn.functional.cross_entropy(logits, goal, reduction="none").double().cpu())
    return torch.cat(losses) if losses else torch.zeros(0, dtype=torch.float64)
