import io
import re

import matplotlib.pyplot as plt
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
