"""What this book adds to Jupyter Book: a small Sphinx extension.

- Buttons that open a chapter in Colab or download it. Colab cannot open Markdown
  notebooks, so the buttons point at the exported ``.ipynb``; without a repository
  there is no Colab button.
- Every SVG figure in two inks, one for the light theme and one for the dark.
- A chapter is read again when its executed notebook is newer than its page.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import notebooks
from docutils import nodes
from sphinx.transforms import SphinxTransform

from depthutil import figures

#: The branch to which the workflow publishes the site, with notebooks/ in it.
PUBLISHED_BRANCH = "gh-pages"


def colab_url(repo: str, page: str) -> str:
    """Where Colab opens a page's published notebook."""
    return (
        f"https://colab.research.google.com/github/{repo}/blob/"
        f"{PUBLISHED_BRANCH}/notebooks/{page}.ipynb"
    )


def links(page: str, repo: str | None) -> list[tuple[str, str, str]]:
    """(kind, text, address) of a chapter's buttons; relative addresses start at the site's root."""
    local = [("notebook", "Notebook", f"notebooks/{page}.ipynb")]
    if notebooks.has_exercises(page):
        local.append(("student", "Without solutions", f"notebooks/student/{page}.ipynb"))
    return ([("colab", "Open in Colab", colab_url(repo, page))] if repo else []) + local


def _relative(page: str, address: str) -> str:
    return address if "://" in address else "../" * page.count("/") + address


class Badges(SphinxTransform):
    """Put a chapter's buttons below its title."""

    default_priority = 500

    def apply(self, **kwargs):
        page = self.env.docname
        if not notebooks.is_notebook(page, Path(self.app.srcdir)):
            return
        title = next(iter(self.document.findall(nodes.title)), None)
        if title is None:
            return
        anchors = "".join(
            f'<a class="book-badge book-badge-{kind}" href="{_relative(page, address)}"'
            f"{'' if kind == 'colab' else ' download'}>{text}</a>"
            for kind, text, address in links(page, self.app.config.colab_repository)
        )
        # A site-relative address is not a Sphinx reference, so it is written as HTML.
        html = f'<p class="book-badges">{anchors}</p>'
        title.parent.insert(title.parent.index(title) + 1, nodes.raw("", html, format="html"))


class TwoInks(SphinxTransform):
    """Show each SVG figure in the inks of the reader's theme."""

    default_priority = 10

    def apply(self, **kwargs):
        source_folder = Path(self.env.doc2path(self.env.docname)).parent
        for image in list(self.document.findall(nodes.image)):
            if not image["uri"].endswith(".svg"):
                continue
            path = (source_folder / image["uri"]).resolve()
            if not path.exists():
                path = Path(self.app.srcdir) / image["uri"].lstrip("/")
            if not path.exists():
                continue
            drawn = path.read_text(encoding="utf-8")
            pair = []
            for theme in ("light", "dark"):
                text = figures.recolour(drawn, theme)
                name = f"{hashlib.sha256(text.encode()).hexdigest()[:20]}-{theme}.svg"
                inked = path.with_name(name)
                if not inked.exists():
                    inked.write_text(text, encoding="utf-8")
                copy = image.deepcopy()
                copy["uri"] = os.path.relpath(inked, source_folder)
                # "dark-light" tells the theme that an image looks right in both.
                copy["classes"] = [*image.get("classes", []), f"ink-{theme}", "dark-light"]
                pair.append(copy)
            # The light copy stands where the figure stood, names and all.
            image.replace_self(pair)


def add_buttons(app, page, template, context, doctree):
    """The same links as a menu in the page's header."""
    if doctree is None or not notebooks.is_notebook(page, Path(app.srcdir)):
        return
    icons = {
        "colab": "fas fa-play",
        "notebook": "fas fa-download",
        "student": "fas fa-graduation-cap",
    }
    buttons = [
        {
            "type": "link",
            "url": _relative(page, address),
            "text": text,
            "tooltip": text,
            "icon": icons[kind],
            "label": f"{kind}-button",
        }
        for kind, text, address in links(page, app.config.colab_repository)
    ]
    context["header_buttons"].append(
        {
            "type": "group",
            "buttons": buttons,
            "icon": "fas fa-rocket",
            "tooltip": "Run this chapter",
            "label": "run-buttons",
        }
    )


def drop_thebe(app, page, template, context, doctree):
    """Leave out Jupyter Book's live-code scripts: unused here, and declared twice."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename}{script.attributes.get('body', '')}".lower()
    ]


def depend_on_execution(app, page, source):
    """Read a page again when its notebook was executed again."""
    executed = notebooks.EXECUTED / f"{page}.ipynb"
    if executed.exists():
        app.env.note_dependency(str(executed))


def copy_notebooks(app, error):
    """The exported notebooks belong to the site: they are what the buttons open."""
    if error is None and notebooks.EXPORTED.is_dir() and app.builder.format == "html":
        shutil.rmtree(Path(app.outdir) / "notebooks", ignore_errors=True)
        shutil.copytree(notebooks.EXPORTED, Path(app.outdir) / "notebooks")


def setup(app):
    app.add_config_value("colab_repository", notebooks.repository(), "env")
    app.add_transform(Badges)
    app.add_transform(TwoInks)
    app.connect("source-read", depend_on_execution)
    # After the theme has made its (empty) list of header buttons.
    app.connect("html-page-context", add_buttons, priority=900)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_notebooks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
