"""The built site: links, and what a reader's browser makes of each page."""

import functools
import http.server
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import notebooks
import pytest
from conftest import SITE

PAGES = sorted(str(p.relative_to(SITE)) for p in SITE.rglob("*.html") if "_static" not in p.parts)
OWN = [f"{page}.html" for page in notebooks.pages()]


# ------------------------------------------------------------------- without a browser


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.resources, self.ids, self.images = [], [], set(), []
        self.figures = self.captions = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("script", "img", "iframe", "source") and attrs.get("src"):
            self.resources.append(attrs["src"])
        if tag == "link" and attrs.get("href") and "canonical" not in attrs.get("rel", ""):
            self.resources.append(attrs["href"])
        if tag == "img":
            self.images.append(attrs)
        self.figures += tag == "figure"
        self.captions += tag == "figcaption"


@functools.cache
def _page(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


def test_every_page_of_the_book_is_built(site):
    assert set(OWN) <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_internal_links_resolve(name):
    here = SITE / name
    for link in _page(here).links + _page(here).resources:
        address, fragment = urldefrag(link)
        parts = urlsplit(address)
        if parts.scheme:
            continue
        target = (here.parent / unquote(parts.path)).resolve() if parts.path else here
        if target.is_dir():
            target /= "index.html"
        assert target.exists(), f"{link} leads nowhere"
        if fragment and target.suffix == ".html":
            assert unquote(fragment) in _page(target).ids, f"{link}: no such place"


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched_from_elsewhere(name):
    outside = [r for r in _page(SITE / name).resources if urlsplit(r).netloc]
    assert not outside


@pytest.mark.parametrize("name", OWN)
def test_images_have_alt_text_and_figures_captions(name):
    page = _page(SITE / name)
    for image in page.images:
        assert image.get("alt") and not image["alt"].endswith((".svg", ".png")), image
    assert page.figures == page.captions


def test_numbers_are_unique_in_the_book(site):
    """Chapters are counted through all parts, so that “Figure 2.1” is one figure."""
    numbers = []
    for page in notebooks.pages():
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        numbers += re.findall(r'class="caption-number">([^<]+)<', text)
        numbers += re.findall(r'class="eqno">([^<]+)<', text)
    assert len(numbers) > 20 and len(numbers) == len(set(numbers))


def test_colab_buttons_point_at_published_notebooks(site):
    import book_extension

    repo = notebooks.repository()
    for page in notebooks.pages():
        if not notebooks.is_notebook(page):
            continue
        links = _page(site / f"{page}.html").links
        colab = [link for link in links if "colab" in link]
        assert colab == ([book_extension.colab_url(repo, page)] * len(colab) if repo else [])
        assert bool(colab) == bool(repo)
        assert (site / "notebooks" / f"{page}.ipynb").exists()
        student = site / "notebooks" / "student" / f"{page}.ipynb"
        assert student.exists() == notebooks.has_exercises(page)
    kinds = [kind for kind, _, _ in book_extension.links("index", None)]
    assert "colab" not in kinds
    (_, _, url), *_ = book_extension.links("index", "teacher/course")
    assert url == (
        "https://colab.research.google.com/github/teacher/course/blob/gh-pages/"
        "notebooks/index.ipynb"
    )


# ------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class _Visit:
    """A page as a reader sees it, with all that went wrong on the way."""

    def __init__(self, browser, address, name, width=1280, theme="light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme
        )
        self.page, self.troubles = self.context.new_page(), []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("requestfailed", lambda request: self.troubles.append(request.url))
        self.page.on("request", lambda r: self._asked(r, address))
        self.page.goto(address + name, wait_until="networkidle")

    def _said(self, message):
        if message.type == "error":
            self.troubles.append(f"{message.text} {message.location.get('url', '')}")

    def _asked(self, request, address):
        if not request.url.startswith((address, "data:", "blob:")):
            self.troubles.append(f"asked for {request.url}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()


@pytest.mark.parametrize("name", OWN)
def test_page_opens_cleanly_and_mathematics_is_typeset(browser, address, name):
    with _Visit(browser, address, name) as visit:
        page = visit.page
        written = page.locator("span.math, div.math").count()
        page.wait_for_function(
            "n => document.querySelectorAll('mjx-container').length >= n", arg=written
        )
        assert page.locator("mjx-container").count() >= written
        assert page.locator("mjx-merror").count() == 0
        cut = page.locator("div.math").evaluate_all(
            "all => all.filter(e => [e, ...e.querySelectorAll('mjx-container')]"
            ".some(m => m.scrollWidth > m.clientWidth + 2)).map(e => e.id)"
        )
        assert not cut, f"equations wider than the page: {cut}"
        assert not visit.troubles


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", OWN)
def test_phone_width_does_not_overflow(browser, address, name, theme):
    with _Visit(browser, address, name, width=390, theme=theme) as visit:
        page = visit.page
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        # Exactly one of each figure's two inks is shown.
        for ink in ("light", "dark"):
            shown = page.locator(f"img.ink-{ink}").evaluate_all(
                "images => images.filter(i => getComputedStyle(i).display !== 'none').length"
            )
            assert bool(shown) == (ink == theme and bool(page.locator("img.ink-dark").count()))


def test_search_finds_ensemble_averaging(browser, address):
    with _Visit(browser, address, "search.html?q=ensemble+averaging") as visit:
        visit.page.wait_for_selector("#search-results li a", timeout=20_000)
        found = visit.page.locator("#search-results li a").evaluate_all(
            "all => all.map(a => a.href)"
        )
        assert any("three_regimes" in link for link in found), found
        assert not visit.troubles


def test_interactive_figure_moves(browser, address):
    name = "chapters/foundations/training_losses.html"
    with _Visit(browser, address, name) as visit:
        figure = visit.page.locator(".law-explorer").first
        figure.scroll_into_view_if_needed()
        curves = figure.locator(".law-curve")
        outcome = figure.locator('[data-output="objective"]')
        before = (
            curves.evaluate_all("all => all.map(c => c.getAttribute('d'))"),
            outcome.inner_text(),
        )
        assert before[0]
        slider = figure.locator('input[type=range][data-param="alpha_depth"]')
        slider.focus()
        for _ in range(8):
            slider.press("ArrowLeft")
        after = (
            curves.evaluate_all("all => all.map(c => c.getAttribute('d'))"),
            outcome.inner_text(),
        )
        assert after[0] != before[0] and after[1] != before[1]
        assert not visit.troubles
