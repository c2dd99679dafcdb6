"""What a recording gives: every figure of depth, with errors over documents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthutil import archive
from depthutil.gram import STATISTICS, of_blocks, of_states
from depthutil.trajectory.sums import Sums, frame, read, settings_of

GROUP = 512  # tokens whose Gram matrices are evaluated at a time


@dataclass(frozen=True)
class Trajectory:
    """How a network's residual stream moves along depth, over many tokens.

    Made by :func:`record`, :meth:`from_states` or :meth:`from_writes`. Tables have a row for
    each ``layer`` and the columns ``mean`` (over all tokens), ``stderr`` (its standard
    error, with documents as the independent units), ``std`` (spread over tokens) and, but for
    updates of two layers, ``max`` (of any token). Angles are in radians. A token for which a
    number is not defined (the angle of a write that is zero) is left out of that number.

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
    _sums: Sums = field(repr=False)

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
            torch.from_numpy(of_states(states[:, i : i + GROUP]))
            for i in range(0, max(states.shape[1], 1), GROUP)
        )
        settings = settings_of(states.shape[0] - 1, per_token=per_token, sample=sample)
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
        stacks = (part.transpose(0, 1) for part in writes.split(GROUP, dim=1))
        parts = (stack @ stack.transpose(1, 2) for stack in stacks)
        settings = settings_of(depth, sublayers, parallel, per_token=per_token, sample=sample)
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
            arrays: dict[str, Any] = self._sums.state() | {"trajectory": json.dumps(about)}
            np.savez_compressed(file, **arrays)
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
        arrays = read(Path(path), ("trajectory",), "whole trajectory: save it again")
        about = json.loads(str(arrays.pop("trajectory")))
        sums = Sums(about["settings"])
        sums.restore(arrays)
        return result_of(sums, about["name"], about["width"])

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

    def last_update_angle_after_norm(self) -> pd.DataFrame:
        """``θ(Δ_{ℓ−1}, norm(h_ℓ) − h_{ℓ−1})``, one row.

        What differences of ``hidden_states`` take for the angle of the last two updates; the
        last row of :meth:`update_angles` is that of the writes.
        """
        if "last_update_angle_after_norm" not in self._sums.layout:
            raise ValueError(f"{self.name} was not recorded with a final norm and two blocks")
        return self._table("last_update_angle_after_norm")

    def write_norms(self) -> pd.DataFrame:
        """``‖a_l‖`` and ``‖m_l‖``, what attention and MLP write, by ``part``."""
        if "write_norms.mlp" not in self._sums.layout:
            raise ValueError(f"{self.name} was recorded by the block: record writes='sublayer'")
        return self._parts("write_norms")

    def decoded(self) -> pd.DataFrame:
        """The loss decoded at each layer, as :func:`decode_early` gives it for these documents.

        Raises
        ------
        ValueError
            If it was not recorded with ``decode``.
        """
        if self._sums.decoded is None:
            raise ValueError(f"{self.name} was not decoded: record with decode='last' or 'lens'")
        return self._sums.decoded.table()

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

    def plot(self, statistic: str = "angles", ax: Any = None, **style: Any) -> Any:
        """Draw a statistic against layers, with two standard errors.

        Parameters
        ----------
        statistic : str
            A key of :data:`depthutil.gram.STATISTICS` that this trajectory has.
        ax : matplotlib.axes.Axes, optional
            A new one by default.
        **style
            As for :func:`depthutil.figures.against_depth`; the label is the trajectory's name.

        Returns
        -------
        matplotlib.axes.Axes

        Examples
        --------
        >>> walk = np.random.default_rng(0).standard_normal((9, 50, 16)).cumsum(axis=0)
        >>> ax = Trajectory.from_states(walk).plot("update_norms")
        >>> ax.get_xlabel(), ax.get_ylabel(), len(ax.lines)
        ('layer', 'update norms', 1)
        """
        import matplotlib.pyplot as plt

        from depthutil import figures

        table = self._table(statistic)
        ax = plt.subplots()[1] if ax is None else ax
        figures.against_depth(ax, table, **{"label": self.name} | style)
        ax.set(xlabel="layer", ylabel=statistic.replace("_", " ").replace(".", ", "))
        return ax

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
        largest = self._sums.maxima
        return frame(layers, moments, at, np.where(np.isfinite(largest), largest, np.nan))

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
        return frame(np.arange(len(at)) + 1, self._sums.pairs, at)

    def _parts(self, what: str) -> pd.DataFrame:
        names = [name for name in self._sums.layout if name.startswith(what + ".")]
        parts = {name.partition(".")[2]: self._table(name) for name in names}
        tables = [frame.assign(part=part) for part, frame in parts.items()]
        table = pd.concat(tables, ignore_index=True)
        return table[["layer", "part", "mean", "stderr", "std", "max"]]


def _of_inputs(
    parts: Iterable[Tensor], settings: dict[str, Any], name: str, width: int
) -> Trajectory:
    sums = Sums(settings)
    for gram in parts:
        each = torch.arange(len(gram))
        nothing = torch.zeros(len(gram), dtype=torch.long)
        sums.add([(gram, None)], each, nothing, nothing - 1)
    return result_of(sums, name, width)


def result_of(sums: Sums, name: str, width: int) -> Trajectory:
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


def middle_means(
    recorded: Mapping[str, Trajectory],
    statistic: str = "angles",
    skip: int | Callable[[int], int] = 1,
) -> pd.DataFrame:
    """Mean of a statistic over the middle layers of each of several models.

    Parameters
    ----------
    recorded : mapping of str to Trajectory
        By the models' names.
    statistic : str
        A key of :data:`depthutil.gram.STATISTICS`.
    skip : int or callable
        How many layers to leave out at each end, or a function of depth that says so. Models
        that nothing is left of are left out.

    Returns
    -------
    pandas.DataFrame
        ``model, width, depth, layers`` (that are left), ``mean, stderr`` (over documents).

    Examples
    --------
    >>> walk = np.random.default_rng(0).standard_normal((9, 50, 16)).cumsum(axis=0)
    >>> middle_means({"walk": Trajectory.from_states(walk)})["layers"].tolist()
    [6]
    """
    rows = []
    for name, t in recorded.items():
        drop = skip(t.depth) if callable(skip) else skip
        first = (STATISTICS[statistic] or 0) + drop
        last = first + t.depth - 1 - 2 * drop
        if first <= last:
            mean = t.average(statistic, first, last)
            rows.append((name, t.width, t.depth, last - first + 1, mean["mean"], mean["stderr"]))
    return pd.DataFrame(rows, columns=["model", "width", "depth", "layers", "mean", "stderr"])
