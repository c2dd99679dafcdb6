"""The interactive figure: what it accepts, what it contains, and that its own fit is right."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from depthutil import figures
from depthutil.explorer import law_explorer

NAMES = ["c_width", "c_depth", "c_data", "alpha_width", "alpha_depth", "alpha_data", "L0"]
DATA = Path(str(resources.files("depthutil") / "data"))


@pytest.fixture(scope="module")
def runs():
    table = pd.read_csv(DATA / "chinchilla_runs.csv")
    return table[table.loss < table.loss.nlargest(40).min()]


def errors(theta, runs):
    """Log errors of the law, its terms given by their size at the middle of the runs."""
    x = np.log(runs[["width", "depth", "tokens"]].to_numpy(float))
    terms = np.exp(theta[:3] - (x - x.mean(0)) * theta[3:6])
    return np.log(np.maximum(terms.sum(1) + theta[6], 1e-9)) - np.log(runs.loss.to_numpy())


def scipy_fit(runs, held=None, value=None):
    """The least objective that scipy finds, with one exponent (or L0) held if asked."""
    free = [k for k in range(7) if k != held]
    best = (np.inf, None)
    for alpha_width in (0.5, 0.9, 1.3):
        for alpha_depth in (0.3, 1.3, 2.2):
            theta = np.array([-1.5, -2.3, -0.85, alpha_width, alpha_depth, 0.3, 1.7])
            if held is not None:
                theta[held] = value

            def full(part, theta=theta):
                out = theta.copy()
                out[free] = part
                return out

            found = least_squares(
                lambda part, full=full: errors(full(part), runs), theta[free], method="lm"
            )
            if 2 * found.cost < best[0]:
                best = (2 * found.cost, full(found.x))
    return 100 * best[0] / len(runs), best[1]


@pytest.fixture(scope="module")
def fit(runs):
    _, theta = scipy_fit(runs)
    middle = np.log(runs[["width", "depth", "tokens"]].to_numpy(float)).mean(0)
    values = [*np.exp(theta[:3] + theta[3:6] * middle), *theta[3:]]
    return SimpleNamespace(params=pd.Series(values, index=NAMES))


@pytest.fixture(scope="module")
def page(runs, fit):
    return law_explorer(runs, fit)._repr_html_()


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag, **wanted):
        wanted = {key.replace("_", "-"): value for key, value in wanted.items()}
        return [a for t, a in self.found if t == tag and wanted.items() <= a.items()]


def test_every_parameter_has_one_labelled_slider_at_the_fit(page, fit):
    elements = Elements(page)
    for name in NAMES:
        (slider,) = elements.all("input", type="range", data_param=name)
        assert slider["aria-label"]
        assert float(slider["min"]) < float(slider["value"]) < float(slider["max"])
        if not name.startswith("c_"):
            assert float(slider["value"]) == pytest.approx(fit.params[name], abs=0.005)
        assert len(elements.all("output", data_output=name)) == 1
    assert len(elements.all("output", data_output="objective")) == 1
    assert all(svg["aria-label"] for svg in elements.all("svg", role="img"))
    assert len(elements.all("svg", role="img")) == 4


def test_the_page_is_self_contained_small_and_the_same_every_time(page, runs, fit):
    assert page == law_explorer(runs, fit).html
    assert len(page.encode()) < 60_000
    assert not re.search(r"https?://|src=|@import|\bid=", page)
    assert page.count("<script>") == page.count("</script>") == 1
    assert "@@" not in page and "$" + "payload" not in page


def test_both_themes_use_the_palette_of_the_book(page):
    for ink in figures.COLORS.values():
        assert ink in page and figures.recolour(ink, "dark") in page


def test_where_html_is_not_shown_one_line_says_what_it_is(runs, fit):
    assert repr(law_explorer(runs, fit)) == (
        "<interactive figure: 203 runs and the law with α_ℓ = 1.33, objective 0.003027>"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.drop(columns=["depth", "loss"]), "runs lacks depth, loss"),
        (
            lambda r: r.assign(loss=[np.nan] + [2.0] * (len(r) - 1)),
            "'loss' must be finite and above 0, but is nan",
        ),
        (lambda r: r.assign(tokens=-1.0), "'tokens' must be finite and above 0, but is -1"),
        (lambda r: r.assign(depth=12), "fewer than two values of depth"),
        (lambda r: r.iloc[:0], "fewer than two values of width"),
    ],
)
def test_bad_runs_get_one_clear_sentence(runs, fit, change, message):
    with pytest.raises(ValueError, match=message):
        law_explorer(change(runs), fit)


def test_bad_fits_get_one_clear_sentence(runs, fit):
    def but(**values):
        return SimpleNamespace(params=pd.Series({**fit.params, **values}))

    with pytest.raises(ValueError, match=r"fit.params lacks alpha_depth"):
        law_explorer(runs, SimpleNamespace(params=fit.params.drop("alpha_depth")))
    with pytest.raises(ValueError, match=r"fit.params\['L0'\] is nan"):
        law_explorer(runs, but(L0=np.nan))
    with pytest.raises(ValueError, match=r"fit.params\['c_depth'\] is -1"):
        law_explorer(runs, but(c_depth=-1.0))
    with pytest.raises(TypeError, match="fit must be the result"):
        law_explorer(runs, dict(fit.params))
    with pytest.raises(TypeError, match="runs must be a pandas DataFrame"):
        law_explorer(runs.to_dict("list"), fit)


def run_in_node(body, runs, fit):
    """Run JavaScript that sees the script's functions as ``law`` and sets ``answer``."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the figure's own fit is not checked")
    columns = {name: runs[name].tolist() for name in ("width", "depth", "tokens", "loss")}
    script = (
        f"const law = require({json.dumps(str(DATA / 'law_explorer.js'))});"
        f"const data = law.prepare({json.dumps(columns)});"
        f"const best = law.toTheta({json.dumps(dict(fit.params))}, data);"
        f"let answer; {body}; console.log(JSON.stringify(answer));"
    )
    done = subprocess.run([node, "-"], input=script, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "low", "high", "values"),
    [
        ("alpha_depth", 0.4, 2.65, [0.4, 0.5, 1.0, 1.9, 2.6]),
        ("alpha_width", 0.28, 1.89, [0.3, 0.7, 1.2, 1.7]),
        ("alpha_data", 0.09, 0.6, [0.15, 0.3, 0.5]),
        ("L0", 1.05, 2.07, [1.2, 1.6, 1.9]),
    ],
)
def test_the_parameters_that_follow_are_the_least_squares_fit(runs, fit, name, low, high, values):
    held = NAMES.index(name)
    found = run_in_node(
        f"const laws = law.profile(best, {held}, {low}, {high}, data);"
        f"answer = {values}.map((v) => law.follow(laws, {held}, v, data))"
        ".map((t) => [law.objective(t, data), t])",
        runs,
        fit,
    )
    for value, (objective, theta) in zip(values, found, strict=True):
        expected, reference = scipy_fit(runs, held, value)
        assert theta[held] == value
        assert objective <= expected * (1 + 1e-6)
        assert objective == pytest.approx(100 * np.mean(errors(np.array(theta), runs) ** 2))
        np.testing.assert_allclose(theta, reference, rtol=5e-3, atol=5e-3)


def test_a_coefficient_that_is_held_stays(runs, fit):
    target = float(np.log(3 * fit.params["c_depth"]))
    value, objective = run_in_node(
        f"const laws = law.profile(best, 1, {target} - 3, {target} + 3, data);"
        f"const t = law.follow(laws, 1, {target}, data);"
        "answer = [law.getParameter(t, 1, data), law.objective(t, data)]",
        runs,
        fit,
    )
    assert value == pytest.approx(target, abs=1e-9)
    # Holding c_ℓ leaves six parameters: no better than the best fit, and far
    # better than moving c_ℓ alone, which takes the objective above 0.1.
    assert 0.0030 < objective < 0.0034


def test_the_best_depth_is_the_least_loss_at_fixed_size(runs, fit):
    size = 3e9
    shape = run_in_node(f"answer = law.optimalShape(best, {size}, data)", runs, fit)
    p = fit.params
    depth = np.geomspace(1, 1000, 200_001)
    loss = p.c_width * (size / 12 / depth) ** (-p.alpha_width / 2)
    loss += p.c_depth * depth**-p.alpha_depth
    assert shape["depth"] == pytest.approx(depth[loss.argmin()], rel=1e-3)
    assert 12 * shape["width"] ** 2 * shape["depth"] == pytest.approx(size)


def test_two_figures_move_apart_on_a_phone_without_errors(browser, page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{page}{page}", encoding="utf-8")
    tab = browser.new_page(viewport={"width": 360, "height": 800})
    problems = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(file.as_uri())
    first, second = tab.locator(".law-explorer").all()

    def read(figure, name):
        return figure.locator(f'[data-output="{name}"]').text_content()

    def curves():
        return first.locator(".law-curve").evaluate_all("all => all.map(c => c.outerHTML)")

    assert read(first, "objective") == "0.003027"
    before = curves()
    for mode in ("none", "term", "fit"):
        first.locator(f"input[value={mode}]").check()
        for name in NAMES:
            slider = first.locator(f'[data-param="{name}"]')
            for key in ("Home", "End"):
                first.locator("[data-control=reset]").click()
                slider.press(key)
                drawn = first.locator("form").inner_html()
                assert not re.search("NaN|undefined|Infinity", drawn)
    assert curves() != before
    assert read(second, "objective") == "0.003027"

    # The figure's argument: α_ℓ moved alone ruins the fit, re-fitted it hardly matters.
    objective, depth = [], []
    for mode in ("none", "fit"):
        first.locator("[data-control=reset]").click()
        first.locator(f"input[value={mode}]").check()
        first.locator('[data-param="alpha_depth"]').fill("2")
        objective.append(float(read(first, "objective")))
        depth.append(read(first, "best-depth"))
    assert objective[0] > 40 * 0.003027
    assert objective[1] < 1.06 * 0.003027
    assert depth[0] != depth[1]
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert problems == []
