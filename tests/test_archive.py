import pandas as pd
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
