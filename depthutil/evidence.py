"""Do trained layers average? Two numbers that averaging fixes at one, over the book's networks.

An ensemble of ``ℓ`` independent estimates loses ``c/ℓ``. So each of its layers is worth the slope
of that law, and without one it loses just that more, if the others make up for it. And all that
depth takes off its loss is variance between trainings. Both are measured here on networks that
average by construction, on toy students, on the depth ladder and on a real model, from the
archives in ``results/`` and the models in ``models/``.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from depthutil import _checks, archive, figures, ladder, models, powerlaw, scaling

BUILT, FREE, TIED = "built to average", "toy, independent teacher", "toy, tied teacher"
LADDER, HEALED, REAL = "ladder", "ladder, trained on", "SmolLM2"


def worth(coefficient: float, exponent: float, depth: float) -> float:
    """How much ``c/ℓ**α`` falls from one layer less to a depth: what its last layer is worth.

    Parameters
    ----------
    coefficient, exponent : float
        ``c``, in the units of the loss, and ``α``.
    depth : float
        At least 2.

    Examples
    --------
    >>> round(worth(1.0, 1.0, 4), 4)
    0.0833
    """
    if not depth >= 2:
        raise ValueError(f"a layer's worth compares a depth with one less: {depth} is below 2")
    return coefficient * ((depth - 1.0) ** -exponent - depth**-exponent)


def cost_of_a_layer(draws: int = 3) -> pd.DataFrame:
    """What a missing layer costs, over what the family's law of loss says that it is worth.

    Parameters
    ----------
    draws : int
        Draws of the network that is built to average, of 16 layers.

    Returns
    -------
    pandas.DataFrame
        ``network``, ``mean`` (a geometric one), ``low`` and ``high``, and ``over``, what the two
        are the range of. Of the built and the toy networks the other layers are scaled up to make
        up for the missing one.

    Examples
    --------
    >>> bool(abs(cost_of_a_layer().set_index("network").loc["built to average", "mean"] - 1) < 0.2)
    True
    """
    rng, found = np.random.default_rng(0), {}
    built = []
    for _ in range(_checks.count(draws, "draws")):
        depth, width = 16, 50
        noise = rng.standard_normal((4000, depth, width)) / np.sqrt(width)
        lost = [(part.mean(axis=1) ** 2).sum(axis=1).mean() for part in (noise, noise[:, 1:])]
        built.append((lost[1] - lost[0]) / worth(1.0, 1.0, depth))
    found[BUILT] = (built, "draws")
    toy = archive.load("results/toy_updates.parquet").frame.query("part == 'main'")
    toy = toy[toy["step"] == toy["step"].max()]
    for rho, name in ((0.0, FREE), (1.0, TIED)):
        table = toy[toy["rho"] == rho].set_index(["depth", "teacher"])
        loss = table["relative_loss"].unstack()
        law = powerlaw.fit(loss.index, loss)
        scale = loss.mul(loss.index.to_numpy() ** law.exponent, axis=0).mean()
        each = [
            (row["without_one"] - row["relative_loss"]) / worth(scale[teacher], law.exponent, depth)
            for (depth, teacher), row in table.iterrows()
        ]
        found[name] = (each, "teachers and depths")
    healing = archive.load("results/ladder_healing.parquet").frame
    total = healing.assign(loss=healing["loss"] * healing["tokens"])
    sums = total.groupby(["depth", "block", "step"])[["loss", "tokens"]].sum()
    loss = (sums["loss"] / sums["tokens"]).unstack("step")
    ours = family()
    exponent = float(ours.exponent())
    gained = {
        (depth, block): (loss.loc[(depth, block)] - loss.loc[(depth, -1)])
        / worth(ours.coefficient(exponent), exponent, depth)
        for depth, block in loss.index
        if block >= 0
    }
    for name, step in ((LADDER, loss.columns[0]), (HEALED, loss.columns[-1])):
        found[name] = ([one[step] for one in gained.values()], "depths and blocks")
    skips = archive.load("results/smollm2_135m_skips.parquet").frame
    skips = skips.query("effect == 'loss' and shard == 'skipped'")
    cost = skips.groupby("skipped")["mean"].mean()
    middle = cost.drop(11).loc[3:25]  # 11 makes the sink of attention
    published = scaling.fit(scaling.drop_highest(scaling.load_chinchilla(), 40)).params
    real = worth(published["c_depth"], published["alpha_depth"], len(cost))
    found[REAL] = ((middle / real).tolist(), "middle blocks")
    rows = [
        (name, np.exp(np.mean(np.log(values))), min(values), max(values), over)
        for name, (values, over) in found.items()
    ]
    return pd.DataFrame(rows, columns=["network", "mean", "low", "high", "over"])


def family() -> scaling.DepthFamily:
    """The ladder's archived losses, as a family that differs in depth alone."""
    final = ladder.curves().frame.sort_values("step").groupby(["depth", "seed"]).last()
    points = final["held_out_loss"].rename("loss").reset_index()
    return scaling.DepthFamily(points)


def share_of_variance(depths: Sequence[int] = (1, 16), draws: int = 1000) -> pd.DataFrame:
    """Of what depth takes off the loss, the part that is variance between trainings.

    Parameters
    ----------
    depths : sequence of two int
        Of the ladder, both with two seeds in ``models/``.
    draws : int
        Bootstrap samples of the documents.

    Returns
    -------
    pandas.DataFrame
        ``network``, ``depths``, ``mean``, ``low`` and ``high``, and ``over``, what the two are the
        range or the interval of.

    Raises
    ------
    ValueError
        If there are not two depths, or they are the same.
    """
    if len(set(depths)) != 2 or len(depths) != 2:
        raise ValueError(f"depth gains something between two depths, not {tuple(depths)}")
    shallow, deep = depths
    rng = np.random.default_rng(0)
    # Eight trainings whose layers err independently: nothing is shared but the goal.
    parts = {}
    for depth in (1, 16):
        errors = rng.standard_normal((8, depth, 4000)).mean(axis=1)
        parts[depth] = ((errors**2).mean(), errors.var(axis=0, ddof=1).mean())
    one = (parts[1][1] - parts[16][1]) / (parts[1][0] - parts[16][0])
    rows = [(BUILT, "1 to 16", one, one, one, "one simulation")]
    seeds = archive.load("results/toy_seeds.parquet").frame
    for part, name, few, many in (
        ("independent", FREE, 1, 8),
        ("independent", FREE, 8, 32),
        ("tied", TIED, 1, 16),
    ):
        some = seeds[seeds["part"] == part]
        some = some[some["step"] == some["step"].max()].set_index(["depth", "teacher"])
        fall = some.loc[few, ["loss", "variance"]] - some.loc[many, ["loss", "variance"]]
        share = fall["variance"] / fall["loss"]
        rows.append((name, f"{few} to {many}", share.mean(), *_ends(share), "teachers"))
    text = ladder.held_out(length=128, per_document=4)
    whole = ladder.held_out()
    source = [next(i for i, t in enumerate(whole) if piece in t) for piece in text]
    sums = {}
    for depth in depths:
        name = f"ladder-w64-d{depth:02d}-s"
        model, tokenizer = models.load(f"{name}0", device="cpu")
        batches = models.batches(tokenizer, text, length=128, size=16)
        pair = models.pair_losses(model, models.load(f"{name}1", device="cpu")[0], batches)
        kinds = pair[["loss", "gain"]].mul(pair["tokens"], axis=0).assign(tokens=pair["tokens"])
        sums[depth] = kinds.groupby(source).sum()
    count = len(sums[deep])
    weights = rng.multinomial(count, np.full(count, 1 / count), _checks.count(draws, "draws"))
    weights = np.vstack([np.ones(count), weights])
    (lost, gain), (lost_deep, gain_deep) = (
        (weights @ sums[d][["loss", "gain"]].to_numpy()).T / (weights @ sums[d]["tokens"])
        for d in (shallow, deep)
    )
    shares = 2 * (gain - gain_deep) / (lost - lost_deep)
    interval = np.quantile(shares[1:], [0.025, 0.975])
    rows.append((LADDER, f"{shallow} to {deep}", shares[0], *interval, "95 %, documents"))
    return pd.DataFrame(rows, columns=["network", "depths", "mean", "low", "high", "over"])


def draw(cost: pd.DataFrame, share: pd.DataFrame) -> Figure:
    """Both numbers, a network a line; averaging lies at the dashed lines.

    Parameters
    ----------
    cost, share : pandas.DataFrame
        As :func:`cost_of_a_layer` and :func:`share_of_variance` return them.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> row = {"network": "ladder", "mean": 2.0, "low": 1.0, "high": 4.0, "depths": "1 to 2"}
    >>> fig = draw(pd.DataFrame([row]), pd.DataFrame([row]))
    >>> [ax.get_yticklabels()[0].get_text() for ax in fig.axes]
    ['ladder', 'ladder, 1 to 2 layers']
    >>> plt.close(fig)
    """
    fig, axes = plt.subplots(2, 1, figsize=(6.8, 5.2), height_ratios=[len(cost), len(share)])
    titles = (
        "cost of a missing layer / what it is worth",
        "share of depth's gain that is variance",
    )
    for ax, table, title in zip(axes, (cost, share), titles, strict=True):
        names = [
            f"{row.network}, {row.depths} layers" if table is share else row.network
            for row in table.itertuples()
        ]
        for place, row in enumerate(table.itertuples()):
            color = figures.MUTED if row.network == BUILT else figures.COLORS["vermillion"]
            ax.plot([row.low, row.high], [place, place], color=color, lw=5, alpha=0.3)
            ax.plot(row.mean, place, "o", color=color, ms=7)
        ax.axvline(1, color=figures.REGIME_COLORS["ensemble"], ls="--", lw=1.4)
        ax.set_yticks(range(len(names)), labels=names)
        ax.set(ylim=(len(names) - 0.5, -0.5), title=title)
    axes[0].set_xscale("log")
    axes[0].set_xticks([1, 10, 100], labels=["1", "10", "100"])
    axes[0].text(1.3, 0.0, "averaging", color=figures.REGIME_COLORS["ensemble"], va="center")
    axes[1].set_xlim(-0.03, 1.08)
    return fig


def _ends(values: pd.Series) -> tuple[float, float]:
    return float(values.min()), float(values.max())
