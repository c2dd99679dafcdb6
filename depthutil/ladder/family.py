"""The whole ladder: finished models and all of their losses, written and read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from depthutil import _checks, archive, models
from depthutil.corpus import Corpus
from depthutil.ladder.model import LadderModel
from depthutil.scaling import DepthFamily

_NONE = "there is no depth ladder here yet: make ladder trains it"


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
    about: dict[str, Any] = {
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


def losses(label: str = "", draws: int = 1000, seed: int = 0) -> DepthFamily:
    """Final losses of the ladder's models, and on how many documents they can be relied.

    Parameters
    ----------
    label : str
        As in :func:`curves`.
    draws : int
        Bootstrap samples of the held-out documents, the same documents for all models.
    seed : int
        Of the samples.

    Returns
    -------
    depthutil.scaling.DepthFamily
        Models in the order of seed and depth; losses in nats per byte.

    Raises
    ------
    FileNotFoundError
        If no ladder was trained.
    """
    frame = documents(label).frame
    loss = frame.pivot(index="document", columns=["seed", "depth"], values="loss")
    loss = loss.sort_index(axis=1)
    size = frame.groupby("document")["bytes"].first().loc[loss.index].to_numpy(float)
    n, rng = len(size), np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.full(n, 1 / n), _checks.count(draws, "draws"))
    weights = np.vstack([np.ones(n), drawn]) * size
    means = weights @ loss.to_numpy() / weights.sum(axis=1, keepdims=True)
    return DepthFamily(loss.columns.to_frame(index=False).assign(loss=means[0]), means[1:])


def _archived(name: str, label: str = "") -> archive.Archived:
    name += f"_{label}.parquet" if label else ".parquet"
    try:
        return archive.load(archive.find(name))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{_NONE} ({name} is missing)") from error
