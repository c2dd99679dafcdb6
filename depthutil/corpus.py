"""Texts that every machine with Python has: the depth ladder's, byte by byte, and English prose."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: The token that begins a sequence and ends a document, after the 256 bytes.
BOS = 256
VOCABULARY = 257

# Tests, and what is no part of the library; ``encodings`` are tables that repeat one another,
# so that a table held out would not be new.
_SKIP = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
_SKIP |= {"__pycache__", "lib-dynload"}
# Made when Python was built on this very machine.
_BUILT = ("_sysconfigdata", "config-")
_TOPICS = "pydoc_data/topics.py"
_TEXT = (".py", ".txt", ".md", ".rst")
# A word with what may stand around it; prose is at least three quarters words.
_WORD = re.compile(r"[\"'(`*]*[A-Za-z]+(['-][A-Za-z]+)*[\"')`*.,;:!?]*")


class Document(NamedTuple):
    """A file, or a page of the documentation, by its path in the library."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out, both in the order of their paths.

    Attributes
    ----------
    source : str
        Where they are from, in words.
    training, held_out : tuple of Document
        A document is held out if the SHA-256 of its path is divisible by 20: about one in
        twenty, the same ones in every version of Python and in every order.
    """

    source: str
    training: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Source, and for both parts the number of documents and bytes and the SHA-256."""
        found: dict[str, Any] = {"source": self.source}
        for name in ("training", "held_out"):
            found[name] = summary(getattr(self, name))
        return found


def summary(documents: Iterable[Document]) -> dict[str, Any]:
    """The number of documents and bytes, and the SHA-256 of all.

    Examples
    --------
    >>> summary([Document("a.txt", "café")])["bytes"]
    5
    """
    digest, size, count = hashlib.sha256(), 0, 0
    for count, (path, text) in enumerate(documents, 1):  # noqa: B007
        digest.update(f"{path}\0{text}\0".encode())
        size += len(text.encode())
    return {"documents": count, "bytes": size, "sha256": digest.hexdigest()}


def corpus(folder: str | os.PathLike | None = None) -> Corpus:
    """The ladder's text: the standard library's source and documentation, or a folder's files.

    Left out are test modules, what pip installed, what is not UTF-8, empty files and copies,
    and ``encodings``, whose tables repeat one another. Documentation is in the docstrings and
    in ``pydoc_data``, whose pages count as documents, without those that repeat parts of
    longer ones.

    Parameters
    ----------
    folder : path, optional
        A folder whose ``.py``, ``.txt``, ``.md`` and ``.rst`` files to take instead.

    Returns
    -------
    Corpus

    Raises
    ------
    FileNotFoundError
        If the folder does not exist, or Python came without its library's source.
    ValueError
        If there are too few files to hold some out.

    Examples
    --------
    >>> text = corpus()
    >>> {"functools.py"} & {document.path for document in text.training}
    set()
    >>> [document.path for document in text.held_out if document.path == "functools.py"]
    ['functools.py']
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: name one with text files")
    suffixes = (".py",) if folder is None else _TEXT
    documents: dict[str, str] = {}
    texts = set()
    for path in _files(root, suffixes):
        try:
            text = (root / path).read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        pages = _pages(text) if folder is None and path == _TOPICS else {path: text}
        for name, page in pages.items():
            if page.strip() and page not in texts:
                documents[name] = page
                texts.add(page)
    parts: tuple[list, list] = ([], [])
    for path in sorted(documents):
        held = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20 == 0
        parts[held].append(Document(path, documents[path]))
    if not all(parts):
        raise ValueError(
            f"{root} has {len(documents)} text files, of which {len(parts[1])} would be held out: "
            "both parts need at least one file, take a larger folder"
        )
    source = f"files of {root.name}"
    if folder is None:
        source = f"standard library of {platform.python_implementation()} "
        source += platform.python_version()
    return Corpus(source, tuple(parts[0]), tuple(parts[1]))


def _files(root: Path, suffixes: tuple[str, ...], skip: Iterable[str] = _SKIP) -> list[str]:
    found = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in skip]
        for name in names:
            path = Path(folder, name).relative_to(root).as_posix()
            if path.endswith(suffixes) and not path.startswith(_BUILT):
                found.append(path)
    return sorted(found)


def _pages(text: str) -> dict[str, str]:
    """The pages of ``pydoc_data.topics``, without those that repeat parts of longer ones."""
    values = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    pages = ast.literal_eval(values[0])
    seen: set[str] = set()
    kept = {}
    for name in sorted(pages, key=lambda name: (-len(pages[name]), name)):
        page = {" ".join(p.split()) for p in pages[name].split("\n\n") if len(p) > 60}
        if len(page & seen) <= 0.1 * len(page):
            kept[f"{_TOPICS.removesuffix('.py')}/{name}"] = pages[name]
        seen |= page
    return kept


@cache
def prose(characters: int = 600) -> tuple[Document, ...]:
    """English prose that every Python carries, for models that were trained on English.

    Pages of the language reference (``pydoc_data.topics``), docstrings of the standard library,
    and Python's licence where it is beside the library; whole, without copies and without
    what is mostly code or tables. Some 500 documents and 150,000 tokens. Most of it
    describes programs, and a model that has read the web has read it: good for how a model
    works on text, and not for how well it predicts new text.

    Parameters
    ----------
    characters : int
        The shortest document.

    Returns
    -------
    tuple of Document
        In an order by which the first ones are a random sample, the same in every version of
        Python, though documents change a little from one to the next.

    Raises
    ------
    FileNotFoundError
        If Python came without its library's source.

    Examples
    --------
    >>> documents = prose()
    >>> len(documents) > 300, all(len(document.text) >= 600 for document in documents)
    (True, True)
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in [*_files(root, (".py",)), "LICENSE.txt"]:
        try:
            text = (root / path).read_text("utf-8")
            tree = ast.parse(text) if path.endswith(".py") else None
        except (OSError, ValueError, SyntaxError):
            continue
        if path == _TOPICS:
            found |= _pages(text)
        elif tree is None:
            found[path] = text
        else:
            found |= dict(_docstrings(tree, path))
    if not found:
        raise FileNotFoundError(f"{root} holds no source of Python's library: name a folder")
    once = {text: path for path, text in sorted(found.items(), reverse=True)}
    kept = [Document(path, text) for text, path in once.items() if _is_prose(text, characters)]
    return tuple(sorted(kept, key=_order))


def _docstrings(node: ast.AST, name: str) -> Iterable[tuple[str, str]]:
    """Of a module and all that is defined in it, by their names."""
    if text := ast.get_docstring(node):  # type: ignore[arg-type]
        yield name, text
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(inner, f"{name}:{inner.name}")


def _is_prose(text: str, characters: int) -> bool:
    words = text.split()
    return len(text) >= characters and 4 * sum(map(bool, map(_WORD.fullmatch, words))) >= 3 * len(
        words
    )


def _order(document: Document) -> bytes:
    """By this documents stand at random, and at the same places everywhere."""
    return hashlib.sha256(f"order {document.path}".encode()).digest()


def files(folder: str | os.PathLike) -> tuple[Document, ...]:
    """A folder's ``.txt``, ``.md``, ``.rst`` and ``.py`` files, a document each.

    Parameters
    ----------
    folder : path

    Returns
    -------
    tuple of Document
        In the order of their paths; files that are empty or not UTF-8 are left out.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.txt").write_text("Once upon a time")
    ...     print(files(folder))
    (Document(path='a.txt', text='Once upon a time'),)
    """
    root, found = Path(folder), []
    for path in _files(root, _TEXT, skip=()):
        try:
            text = (root / path).read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            found.append(Document(path, text))
    return tuple(found)


# Tokens ---------------------------------------------------------------------------------


def tokens(documents: Iterable[Document]) -> np.ndarray:
    """Documents as one line of tokens, each followed by the token that begins the next."""
    text = [np.frombuffer(d.text.encode(), np.uint8).astype(np.int16) for d in documents]
    end = np.array([BOS], np.int16)
    return np.concatenate([part for document in text for part in (document, end)])


class Windows:
    """The sequences to train on, in an order that depends on the seed and nothing else.

    Each pass through the text cuts it at other places, and shuffles the pieces.
    """

    def __init__(self, documents: Iterable[Document], sequence: int, batch: int, seed: int):
        self.line, self.sequence, self.batch, self.seed = tokens(documents), sequence, batch, seed
        self.each = (len(self.line) - sequence) // sequence
        if self.each < 1:
            raise ValueError(
                f"the text has {len(self.line)} tokens, too few for sequences of {sequence}"
            )
        self.passes: dict[int, np.ndarray] = {}

    def _starts(self, number: int) -> np.ndarray:
        if number not in self.passes:
            random = np.random.default_rng([self.seed, number])
            starts = random.integers(self.sequence) + self.sequence * np.arange(self.each)
            random.shuffle(starts)
            # A batch may end one pass and begin the next.
            self.passes = {k: v for k, v in self.passes.items() if k == number - 1}
            self.passes[number] = starts
        return self.passes[number]

    def __call__(self, step: int) -> np.ndarray:
        """``(batch, sequence + 1)``: the token that begins a sequence, then the text."""
        starts = []
        for index in range(step * self.batch, (step + 1) * self.batch):
            number, place = divmod(index, self.each)
            starts.append(self._starts(number)[place])
        pieces = self.line[np.array(starts)[:, None] + np.arange(self.sequence)]
        return np.pad(pieces, ((0, 0), (1, 0)), constant_values=BOS).astype(np.int64)


def pieces(documents: Iterable[Document], sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """All of the documents, cut one by one into sequences; filled up with −100 at their ends.

    Returns
    -------
    tuple of numpy.ndarray
        ``(sequences, sequence + 1)`` tokens, and for each sequence the number of its document.
    """
    rows, owners = [], []
    for number, document in enumerate(documents):
        text = np.frombuffer(document.text.encode(), np.uint8)
        for start in range(0, len(text), sequence):
            part = text[start : start + sequence]
            row = np.full(sequence + 1, -100, np.int64)
            row[0], row[1 : len(part) + 1] = BOS, part
            rows.append(row)
            owners.append(number)
    return np.stack(rows), np.array(owners)


def held_out(
    n_documents: int | None = None, length: int | None = None, per_document: int = 1
) -> list[str]:
    """Text that no model of the ladder has seen, from the Python that runs this.

    The same files are held out in every version of Python, though what is in them changes a
    little from one to the next. The models' cards and ``curves().provenance`` have the SHA-256
    of the text that their losses belong to; compare it with ``corpus().summary``.

    Parameters
    ----------
    n_documents : int, optional
        How many documents; all by default. They come in an order by which the first ones are
        a random sample.
    length : int, optional
        Longest text in tokens, with the one that begins it; whole documents by default.
    per_document : int
        Pieces of this length from each document, evenly spread, from its beginning on; fewer
        from a document that is too short.

    Returns
    -------
    list of str
        The pieces of the first document, then those of the second, and so on.

    Raises
    ------
    FileNotFoundError
        If Python came without its library's source.
    ValueError
        If a number is too small.

    Examples
    --------
    >>> texts = held_out(n_documents=3, length=128)
    >>> len(texts), max(len(text.encode()) for text in texts)
    (3, 127)
    """
    for name, value, least in (
        ("n_documents", n_documents, 1),
        ("length", length, 2),
        ("per_document", per_document, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is at least {least}, not {value!r}")
    if per_document > 1 and length is None:
        raise ValueError(f"per_document={per_document} needs a length to cut at")
    documents = sorted(corpus().held_out, key=_order)
    texts = [document.text for document in documents[:n_documents]]
    if length is None:
        return texts
    return [piece for text in texts for piece in _cut(text, length - 1, per_document)]


def _cut(text: str, size: int, count: int) -> list[str]:
    content = text.encode()
    count = max(1, min(count, len(content) // size))
    starts = np.linspace(0, max(len(content) - size, 0), count).astype(int)
    # A character of several bytes that a cut divides is left out.
    return [content[start : start + size].decode(errors="ignore") for start in starts]


def _alphabet() -> dict[str, int]:
    """How the ``tokenizers`` library writes bytes: printable ones as they are, others moved."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(moved)}


def write_tokenizer(folder: str | os.PathLike, sequence: int) -> None:
    """Write the tokenizer of the ladder, for ``AutoTokenizer.from_pretrained(folder)``.

    A token is a byte of the UTF-8 text, with the byte's value as its number; 256 stands
    before every text.

    Parameters
    ----------
    folder : path
    sequence : int
        The longest text, in tokens, that the models were trained on.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    bos = "<|begin|>"
    tokenizer = Tokenizer(models.BPE(vocab=_alphabet(), merges=[]))
    tokenizer.add_special_tokens([bos])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]
    )
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": bos,
        "pad_token": bos,
        "model_max_length": sequence,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # A text that happens to contain the letters of the special token stays text.
        "split_special_tokens": True,
    }
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
