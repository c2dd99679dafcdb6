import errno
import os
import subprocess

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from depthutil import archive

FRAME = pd.DataFrame({"depth": [1, 2], "loss": [0.5, 0.25]})
META = {"config": {"width": 8}, "seeds": [0, 1], "scale": "demo", "wall_seconds": 90.0}


def test_round_trip(tmp_path):
    path = archive.save(FRAME, tmp_path / "new" / "run.parquet", **META)
    back = archive.load(path)
    pd.testing.assert_frame_equal(back.frame, FRAME)
    assert back.provenance["config"] == {"width": 8}
    assert "“demo”" in back.caption and "seeds [0, 1]" in back.caption
    assert [p.name for p in path.parent.iterdir()] == ["run.parquet"]


def test_a_stranger_can_open_it(tmp_path):
    path = archive.save(FRAME, tmp_path / "run.parquet", **META)
    pd.testing.assert_frame_equal(pd.read_parquet(path), FRAME)


def test_truncated_file_is_named(tmp_path):
    path = archive.save(FRAME, tmp_path / "run.parquet", **META)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"run\.parquet is not a whole Parquet file"):
        archive.load(path)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_a_file_that_ends_early_is_named(part, tmp_path):
    path = archive.save(FRAME, tmp_path / "run.parquet", **META)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"run\.parquet is not a whole Parquet file"):
        archive.load(path)


def test_a_number_changed_on_the_way_is_noticed(tmp_path):
    path = archive.save(FRAME, tmp_path / "run.parquet", **META)
    whole = path.read_bytes()
    at = whole.index(np.float64(0.25).tobytes())
    path.write_bytes(whole[: at + 6] + bytes([whole[at + 6] ^ 1]) + whole[at + 7 :])
    with pytest.raises(ValueError, match=r"not a whole Parquet file.*checksum"):
        archive.load(path)


def test_wherever_the_damage_is_the_message_is_one_sentence(tmp_path):
    path = archive.save(FRAME, tmp_path / "run.parquet", **META)
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            archive.load(path)  # not all of a file's bytes mean something
        except ValueError as error:
            assert str(error).startswith(f"{path} "), at


@pytest.mark.parametrize("content", [b"", b"depth,loss\n1,0.5\n", b"\0" * 500, b"PAR1" * 100])
def test_what_is_no_parquet_file_is_named(content, tmp_path):
    path = tmp_path / "run.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.parquet is not a whole Parquet file"):
        archive.load(path)


def test_a_folder_is_named():
    with pytest.raises(ValueError, match="results is a folder: name one of the files in it"):
        archive.load("results")


@pytest.mark.parametrize("meta", [b"{", b"[1]", b"null", b"\xff", b'{"config": {}}'])
def test_unreadable_provenance_is_named(meta, tmp_path):
    path = tmp_path / "run.parquet"
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({b"depthutil": meta}), path)
    with pytest.raises(ValueError, match=r"lacks the provenance .*commit.*pandas\.read_parquet"):
        archive.load(path)


def test_foreign_file_is_named(tmp_path):
    path = tmp_path / "foreign.parquet"
    FRAME.to_parquet(path)
    with pytest.raises(ValueError, match="lacks the provenance"):
        archive.load(path)


def test_missing_file_says_where_it_looked():
    with pytest.raises(FileNotFoundError, match=r"results/nothing\.parquet"):
        archive.load("results/nothing.parquet")


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        archive.save(FRAME, tmp_path / "run.parquet", **META | {"config": {"f": object()}})
    assert not list(tmp_path.iterdir())


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not 'run\.pkl'"):
        archive.save(FRAME, tmp_path / "run.pkl", **META)


def test_every_archived_run_is_whole():
    for path in archive.find("results").rglob("*.parquet"):
        assert len(archive.load(path).frame), path


def test_a_folder_is_replaced_whole_and_a_failure_leaves_the_old_one(tmp_path):
    target = tmp_path / "model"
    for word in ("old", "new"):
        with archive.replacing(target) as partial:
            partial.mkdir()
            (partial / f"{word}.txt").write_text(word)
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    with pytest.raises(OSError, match="disk"), archive.replacing(target) as partial:
        partial.mkdir()
        (partial / "half.txt").write_text("half")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk"), archive.replacing(tmp_path / "file") as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["new.txt"]


# What the disk says ---------------------------------------------------------------------


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError, match=r"the folder .*a/b cannot be made: a file is in the place"):
        with archive.replacing(tmp_path / "a" / "b" / "c.txt"):
            pass
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("x")
    with pytest.raises(OSError, match=r"folder cannot be written: it is a folder, name a file"):
        with archive.replacing(tmp_path / "folder") as partial:
            partial.write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


@pytest.mark.parametrize(
    "code, reason", [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "you may not write there")]
)
def test_a_full_disk_and_a_closed_folder_name_the_path(tmp_path, code, reason):
    with pytest.raises(OSError, match=rf"here.txt cannot be written: {reason}") as caught:
        with archive.replacing(tmp_path / "here.txt") as partial:
            partial.write_text("half")
            raise OSError(code, os.strerror(code), None if code == errno.ENOSPC else str(partial))
    assert caught.value.errno == code
    assert list(tmp_path.iterdir()) == []


def test_what_went_wrong_elsewhere_stays_what_it_was(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"other\.txt"):
        with archive.replacing(tmp_path / "here.txt"):
            open(tmp_path / "other.txt")
    assert list(tmp_path.iterdir()) == []


# What else may be lost ------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        FRAME.set_index("depth"),
        FRAME.set_index(["depth", "loss"]),
        FRAME.set_index(pd.Index(["a", "b"])),
        FRAME.set_index(pd.Index([0.5, 1.5])),
    ],
)
def test_an_index_that_says_something_is_not_dropped(frame, tmp_path):
    with pytest.raises(ValueError, match=r"index of the frame .* would be lost.*reset_index"):
        archive.save(frame, tmp_path / "a.parquet", **META)
    assert list(tmp_path.iterdir()) == []
    some = FRAME.iloc[[1]]  # numbers of rows say nothing
    assert len(archive.load(archive.save(some, tmp_path / "a.parquet", **META)).frame) == 1


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    frame = pd.DataFrame({"depth": np.arange(50), "loss": np.linspace(1, 2, 50)})
    path = archive.save(frame, tmp_path / "a.parquet", **META)
    whole, right = path.read_bytes(), archive.load(path)
    rng, wrong = np.random.default_rng(0), []
    for at in rng.integers(8 * len(whole), size=400):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            read = archive.load(path)
        except ValueError as error:
            assert "a.parquet" in str(error)
            continue
        if not read.frame.equals(right.frame) or read.provenance != right.provenance:
            wrong.append(int(at))
    assert wrong == []


def test_archives_from_before_the_checksum_are_read(tmp_path):
    path = archive.save(FRAME, tmp_path / "a.parquet", **META)
    table = pq.read_table(path)
    about = {k: v for k, v in table.schema.metadata.items() if k != archive._SUM}
    pq.write_table(table.replace_schema_metadata(about), path, write_page_checksum=True)
    assert archive.load(path).provenance["seeds"] == [0, 1]


def test_the_commit_of_another_repository_is_not_ours(tmp_path, monkeypatch):
    """An installed package inside somebody's repository, committed with it or not."""
    site = tmp_path / "project" / "site-packages"
    package = site / "depthutil"
    package.mkdir(parents=True)
    (package / "archive.py").write_text("")
    git = ["git", "-C", str(tmp_path / "project"), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(archive, "_PACKAGE", package)
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "mine"]):
        subprocess.run([*git, *command], check=True)
    assert archive.commit() == "unknown"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
    assert archive.commit() == "unknown"
    own = tmp_path / "clone"
    subprocess.run(["git", "init", "-q", str(own)], check=True)
    (own / "depthutil").mkdir()
    monkeypatch.setattr(archive, "_PACKAGE", own / "depthutil")
    assert archive.commit() == "unknown"  # nothing is committed there
    subprocess.run(
        ["git", "-C", str(own), *git[3:], "commit", "-q", "--allow-empty", "-m", "a"], check=True
    )
    assert archive.commit() == "unknown"  # nor this file
    (own / "depthutil" / "archive.py").write_text("")
    git[2] = str(own)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
    assert len(archive.commit()) == 40
    (own / "depthutil" / "archive.py").write_text("changed")
    assert archive.commit()[-1] == "+"
