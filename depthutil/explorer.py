"""The law of loss against width, depth and data as a figure that the reader moves.

:func:`law_explorer` turns the runs and their fit into one piece of HTML that
carries its own style, script and data: it works without network in a notebook,
on Colab and in the built book. The drawing and the fit that follows a slider
are in ``data/law_explorer.js``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import pandas as pd

from depthutil import _checks, figures

_COLUMNS = ("width", "depth", "tokens", "loss")
_TERMS = (("depth", "ℓ", "ℓ"), ("width", "m", "m"), ("data", "D", "D"))


@dataclass(frozen=True)
class LawExplorer:
    """An interactive figure: shown as HTML where a notebook displays it.

    Attributes
    ----------
    html : str
        Self-contained ``<div>`` element, the same bytes for the same input.
    summary : str
        One line for where HTML cannot be shown.
    """

    html: str
    summary: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.summary


def law_explorer(runs: pd.DataFrame, fit: Any) -> LawExplorer:
    """Draw the law, its three terms and the optimal shape, with a slider on every parameter.

    The law is ``L = c_m/m**α_m + c_ℓ/ℓ**α_ℓ + c_D/D**α_D + L_0``. While one
    slider moves, the other parameters stay, or keep the size of the term at the
    middle of the runs, or are re-fitted to the runs.

    Parameters
    ----------
    runs : pandas.DataFrame
        The runs that were fitted, one a row: ``width``, ``depth`` (layers),
        ``tokens`` and ``loss`` (nats per token).
    fit : ScalingFit
        The law fitted to them, with ``law="width-depth-data"``. Only its
        ``params`` are read.

    Returns
    -------
    LawExplorer
        Displays itself as HTML.

    Raises
    ------
    ValueError
        If ``runs`` lacks a column, holds a value that is not positive and
        finite or does not vary in width and depth, or if ``fit`` lacks a
        parameter of the law or holds one that is not positive and finite.
    TypeError
        If ``runs`` is not a DataFrame or ``fit`` has no ``params``.

    Notes
    -----
    Law: Liu et al., arXiv 2602.05970, appendix B. The objective is the one
    fitted there, 100 times the mean squared error of the log loss.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import pandas as pd
    >>> runs = pd.DataFrame({"width": [512, 768, 1024], "depth": [8, 12, 24],
    ...                      "tokens": [1e9, 4e9, 2e10], "loss": [4.0, 3.2, 2.7]})
    >>> fit = SimpleNamespace(params=pd.Series({
    ...     "c_width": 270.0, "c_depth": 6.7, "c_data": 530.0,
    ...     "alpha_width": 0.95, "alpha_depth": 1.3, "alpha_data": 0.3, "L0": 1.75}))
    >>> law_explorer(runs, fit)
    <interactive figure: 3 runs and the law with α_ℓ = 1.30, objective 0.008229>
    """
    columns = _check_runs(runs)
    params = _check_params(fit)
    payload = json.dumps({"params": params, "runs": columns}, separators=(",", ":"))
    # Two equal figures on a page share this key; the script starts both, once.
    asset = resources.files("depthutil") / "data"
    style = _style((asset / "law_explorer.css").read_text(encoding="utf-8"))
    script = (asset / "law_explorer.js").read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([payload, style, script]).encode()).hexdigest()[:12]
    page = _PAGE.substitute(
        key=key,
        style=style,
        parameters=_parameters(params, columns),
        n=len(columns["loss"]),
        size=f"{_middle_size(columns):.1f}",
        script=script,
        payload=payload,
    )
    summary = (
        f"<interactive figure: {len(columns['loss'])} runs and the law with "
        f"α_ℓ = {params['alpha_depth']:.2f}, objective {_objective(params, columns):.4g}>"
    )
    return LawExplorer(html=page, summary=summary)


def _check_runs(runs: Any) -> dict[str, list[float]]:
    if not isinstance(runs, pd.DataFrame):
        raise TypeError(
            f"runs must be a pandas DataFrame with the columns {', '.join(_COLUMNS)}, "
            f"not {type(runs).__name__}"
        )
    missing = [name for name in _COLUMNS if name not in runs]
    if missing:
        raise ValueError(f"runs lacks {', '.join(missing)}: it needs {', '.join(_COLUMNS)}")
    _checks.columns(runs, _COLUMNS)
    # Seven digits are more than any of these was measured to.
    columns = {
        name: [_short(value, 7) for value in _checks.real(runs[name], name)] for name in _COLUMNS
    }
    for name in ("width", "depth"):
        if len(set(columns[name])) < 2:
            raise ValueError(
                f"runs holds fewer than two values of {name}, so nothing can be drawn along it"
            )
    return columns


def _check_params(fit: Any) -> dict[str, float]:
    params = getattr(fit, "params", None)
    if not isinstance(params, pd.Series):
        raise TypeError(
            f"fit must be the result of scaling.fit(runs, law='width-depth-data'), "
            f"not {type(fit).__name__}"
        )
    names = [f"{kind}_{term}" for kind in ("c", "alpha") for term in ("width", "depth", "data")]
    names.append("L0")
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(
            f"fit.params lacks {', '.join(missing)}: "
            "the figure shows the law fitted with law='width-depth-data'"
        )
    for name in names:
        if not (np.isfinite(params[name]) and params[name] > 0):
            raise ValueError(
                f"fit.params[{name!r}] is {params[name]}: the figure needs a positive finite "
                "number, so fit again with more runs or with this parameter fixed"
            )
    # Six digits: the same bytes on machines whose fits differ by rounding.
    return {name: _short(params[name], 6) for name in names}


def _short(value: float, digits: int) -> float | int:
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() else value


def _objective(params: dict[str, float], columns: dict[str, list[float]]) -> float:
    size = {name: np.asarray(columns[name], float) for name in _COLUMNS}
    loss = params["L0"] + sum(
        params[f"c_{term}"] * size[column] ** -params[f"alpha_{term}"]
        for term, column in (("width", "width"), ("depth", "depth"), ("data", "tokens"))
    )
    return float(100 * np.mean(np.log(size["loss"] / loss) ** 2))


def _middle_size(columns: dict[str, list[float]]) -> float:
    """Decimal logarithm of the runs' typical number of parameters, 12 m²ℓ."""
    width, depth = (np.log10(np.asarray(columns[name], float)) for name in ("width", "depth"))
    return float(np.clip(np.mean(np.log10(12) + 2 * width + depth), 7, 12))


def _style(css: str) -> str:
    inks = figures.COLORS | {"grey": figures.MUTED}
    light = " ".join(f"--le-{name}: {ink};" for name, ink in inks.items())
    dark = figures.recolour(light, "dark")
    return css.replace("@@LIGHT@@", f"color-scheme: light; {light}").replace(
        "@@DARK@@", f"color-scheme: dark; {dark}"
    )


def _slider(name: str, symbol: str, title: str, low: float, high: float, value: float) -> str:
    return (
        f'<div class="slider"><label>{symbol}</label>'
        f'<input type="range" data-param="{name}" aria-label="{title}" '
        f'min="{low:.2f}" max="{high:.2f}" step="0.01" value="{value:.2f}">'
        f'<output data-output="{name}" aria-live="off"></output></div>'
    )


def _parameters(params: dict[str, float], columns: dict[str, list[float]]) -> str:
    groups = []
    for term, size, index in _TERMS:
        alpha = params[f"alpha_{term}"]
        law = f"<i>c</i><sub>{index}</sub> / <i>{size}</i><sup><i>α</i><sub>{index}</sub></sup>"
        groups.append(
            f'<fieldset class="{term}"><legend><span class="swatch"></span>{term} term {law}'
            "</legend>"
            + _slider(f"alpha_{term}", f"<i>α</i><sub>{index}</sub>", f"exponent of {term}",
                      0.3 * alpha, 2 * alpha, alpha)
            # Decades from the best fit: a coefficient acts by its factor.
            + _slider(f"c_{term}", f"<i>c</i><sub>{index}</sub>",
                      f"coefficient of {term}, in powers of ten from the best fit", -1.5, 1.5, 0)
            + "</fieldset>"
        )  # fmt: skip
    floor = params["L0"]
    high = min(1.2 * floor, max(min(columns["loss"]), 1.01 * floor))
    groups.append(
        '<fieldset class="rest"><legend><span class="swatch"></span>irreducible loss '
        "<i>L</i><sub>0</sub></legend>"
        + _slider("L0", "<i>L</i><sub>0</sub>", "irreducible loss", 0.6 * floor, high, floor)
        + "</fieldset>"
    )
    return "".join(groups)


# No ids anywhere, so that any number of these can share a page: labels wrap or
# name their inputs, and radio buttons are grouped by their form.
_PAGE = Template("""\
<div class="law-explorer" role="group" aria-label="The law of loss, to move" \
data-key="$key" data-lm-suppress-shortcuts="true">
<style>
$style</style>
<noscript><p>This figure moves with sliders and needs JavaScript; the chapter's text and tables \
give its numbers for the best fit.</p></noscript>
<form autocomplete="off">
<fieldset class="follow"><legend>When you move one parameter, the others</legend>
<label><input type="radio" name="follow" value="none" checked>stay</label>
<label><input type="radio" name="follow" value="term">keep the term's size mid-data</label>
<label><input type="radio" name="follow" value="fit">are re-fitted to the $n runs</label>
</fieldset>
<div class="buttons">
<button type="button" data-control="reset">Reset to the best fit</button>
<span>Force and re-fit:</span>
<button type="button" data-alpha-depth="0.5">1/√ℓ</button>
<button type="button" data-alpha-depth="1">1/ℓ</button>
<button type="button" data-alpha-depth="2">1/ℓ²</button>
</div>
<div class="parameters">$parameters</div>
<p class="status">Objective <output data-output="objective"></output> \
(root mean square error <output data-output="typical-error" aria-live="off"></output>), \
<output data-output="verdict"></output></p>
<div class="panels">
<div class="panel terms"><p class="title">The law's terms along depth</p>\
<svg viewBox="0 0 380 252" role="img" aria-label="The law's terms along depth"></svg></div>
<div class="panel objective"><p class="title">The objective along <span></span></p>\
<svg viewBox="0 0 380 252" role="img" aria-label="Objective along a parameter"></svg></div>
<div class="panel errors"><p class="title">Data against the law</p>\
<svg viewBox="0 0 380 252" role="img" aria-label="Error of the law for each run"></svg></div>
<div class="panel shape"><p class="title">The best shape at fixed parameters</p>\
<svg viewBox="0 0 380 252" role="img" aria-label="Loss against depth at fixed size"></svg>
<div class="slider"><label><i>N</i></label><input type="range" data-control="size" \
aria-label="parameters N, as a power of ten" min="7" max="12" step="0.1" value="$size">\
<output data-output="size" aria-live="off"></output></div>
<p class="note"><output data-output="best-shape" aria-live="off"></output></p></div>
</div>
</form>
<script>
(() => {
$script
const figures = document.querySelectorAll('.law-explorer[data-key="$key"]:not([data-ready])');
for (const figure of figures) {
  figure.dataset.ready = "";
  lawExplorer(figure, $payload);
}
})();
</script>
</div>
""")
