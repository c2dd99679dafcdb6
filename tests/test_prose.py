"""English prose that every Python carries, and a reader's own files."""

import sys

from depthutil import corpus, models


def test_prose_is_whole_documents_without_copies():
    documents = corpus.prose()
    assert len(documents) > 300 and documents == corpus.prose()
    texts = [document.text for document in documents]
    assert len(set(texts)) == len(texts) and min(map(len, texts)) >= 600
    for text in texts:
        words = sum(word.strip(".,;:!?()'\"`*").isalpha() for word in text.split())
        assert words > 0.65 * len(text.split()), text[:80]
    kinds = {document.path.split("/")[0].split(":")[0] for document in documents}
    assert {"pydoc_data", "argparse.py"} <= kinds


def test_the_order_does_not_depend_on_where_things_stand():
    documents = corpus.prose()
    assert list(documents) == sorted(documents, key=corpus._order)
    longer = corpus.prose(characters=2000)
    assert [d for d in documents if len(d.text) >= 2000] == list(longer)


def test_the_real_model_reads_prose_and_a_ladder_model_code():
    prose = [document.text for document in corpus.prose()]
    assert models.texts("smollm2-135m", 3) == prose[:3]
    assert len(models.texts("smollm2-135m", 10**6)) == len(prose)
    assert models.texts("ladder-w64-d16-s0", 3)[0] not in prose
    assert models.texts("ladder-w64-d16-s0", 2, source="prose") == prose[:2]


def test_a_folder_of_files_needs_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "b.md").write_text("in a folder")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "picture.png").write_bytes(b"png")
    found = corpus.files(tmp_path)
    assert [tuple(document) for document in found] == [
        ("a.txt", "first"),
        ("tests/b.md", "in a folder"),
    ]
    assert models.texts("smollm2-135m", 9, source=str(tmp_path)) == ["first", "in a folder"]


def test_a_summary_tells_texts_apart():
    one, other = (corpus.summary([corpus.Document("a", text)]) for text in ("x", "y"))
    assert one["documents"] == one["bytes"] == 1 and one["sha256"] != other["sha256"]
    assert corpus.corpus().summary["held_out"] == corpus.summary(corpus.corpus().held_out)
