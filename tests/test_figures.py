import io
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from depthutil import figures


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    low, high = sorted([_luminance(a), _luminance(b)])
    return (high + 0.05) / (low + 0.05)


def _drawn() -> str:
    figures.use_theme()
    fig, ax = plt.subplots()
    for colour in figures.COLORS.values():
        ax.plot([1, 2], [1, 2], color=colour)
    ax.set_xlabel("depth")
    out = io.StringIO()
    fig.savefig(out, format="svg", metadata={"Date": None})
    plt.close(fig)
    return out.getvalue()


def test_the_dark_copy_has_no_light_ink_left():
    dark = figures.recolour(_drawn(), "dark")
    left = {c.lower() for c in re.findall(r"#[0-9a-fA-F]{6}\b", dark)}
    assert not left & {figures.INK, figures.PAPER, *figures.COLORS.values()}


def test_light_copy_only_loses_its_paper():
    drawn = _drawn()
    assert figures.recolour(drawn, "light") == drawn.replace(figures.PAPER, "none")


@pytest.mark.parametrize(("theme", "page"), [("light", "#ffffff"), ("dark", "#121212")])
def test_text_is_legible_and_lines_visible_in_both_themes(theme, page):
    ink = figures.recolour(figures.INK, theme)
    assert _contrast(ink, page) > 7
    for colour in figures.COLORS.values():
        # 2 rather than WCAG's 3: the palette's yellow and sky never carry text.
        assert _contrast(figures.recolour(colour, theme), page) > 2


def test_same_figure_same_bytes():
    assert _drawn() == _drawn()


def test_unknown_theme():
    with pytest.raises(ValueError, match="'sepia'"):
        figures.recolour("", "sepia")


def test_a_table_without_errors_is_no_measurement():
    fig, ax = plt.subplots()
    with pytest.raises(ValueError, match=r"needs mean and stderr, and has \['layer', 'mean'\]"):
        figures.against_depth(ax, pd.DataFrame({"layer": [1], "mean": [1.0]}))
    plt.close(fig)


def test_layers_may_be_in_a_column_or_in_the_index():
    fig, ax = plt.subplots()
    groups = pd.DataFrame({"depth": [4, 4, 8, 8], "loss": [1.0, 3.0, 1.0, 1.0]}).groupby("depth")
    by = groups["loss"].agg(["mean", "sem"])
    for table in (by, by.reset_index()):
        line, _, (bars,) = figures.against_depth(ax, table, errors=1)
        assert line.get_xydata().tolist() == [[4, 2], [8, 1]]
        assert bars.get_segments()[0][:, 1].tolist() == [1, 3]
    plt.close(fig)


def test_one_value_is_not_faint():
    assert figures.shades([3]) == {3: 1.0}


def test_a_band_is_as_wide_as_its_errors():
    fig, ax = plt.subplots()
    table = pd.DataFrame({"mean": [1.0, 2.0], "sem": [0.1, 0.2]}, index=[4, 8])
    line = figures.band(ax, table, errors=2, color="k", ls="--")
    assert line.get_xydata().tolist() == [[4, 1], [8, 2]] and line.get_linestyle() == "--"
    edges = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(0.8) and edges.max() == pytest.approx(2.4)
    with pytest.raises(ValueError, match="needs mean and stderr"):
        figures.band(ax, table[["mean"]])
    plt.close(fig)
