"""The scripts that fill results/, on grids of seconds: run, killed, shared, assembled."""

import re
import signal
import subprocess
import sys
from dataclasses import replace

import archive_nested_steps
import archive_toy
import archive_toy_patience
import archive_toy_phase
import archive_toy_updates
import pandas as pd
import pytest
from conftest import ROOT

from depthutil import _runs, archive, toy

TINY = toy.ToyConfig(
    width=4,
    vocabulary=6,
    teacher_depth=8,
    depths=(1, 2),
    teachers=(0, 1),
    rhos=(1.0, 0.0),
    batch=8,
    steps=40,
    test_every=10,
)
SHARDS = toy.shards(TINY)


def whole(path, rows=None):
    """An archived table with all of its provenance."""
    archived = archive.load(path)
    assert len(archived.frame) == rows if rows else len(archived.frame)
    assert archived.provenance["wall_seconds"] > 0 and archived.provenance["commit"]
    assert archived.provenance["scale"] in archived.caption
    return archived


# archive_toy ----------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(archive_toy.RUNS, "fig3b", TINY)
    return ["fig3b", "--folder", str(tmp_path / "shards")]


KILLED = """
import os, signal, sys
sys.path[:0] = [{tools!r}]
import archive_toy
import archive_toy_patience
from depthutil import _grid, toy
archive_toy.RUNS["fig3b"] = toy.ToyConfig(**{settings!r})
train = toy.train
def often(*args, **options):
    return train(*args, **options | {{"checkpoint_seconds": 0}})
def advance(trainer, original=_grid.Trainer.advance):
    if trainer.step == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    original(trainer)
toy.train, _grid.Trainer.advance = often, advance
archive_toy.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_was(place, tmp_path, capsys):
    settings = {f: getattr(TINY, f) for f in TINY.__dataclass_fields__}
    code = KILLED.format(tools=str(ROOT / "tools"), settings=settings)
    done = subprocess.run([sys.executable, "-c", code, "run", *place], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "shards").glob("*.pt")
    assert checkpoint.stem == toy.slug(SHARDS[0])
    archive_toy.main(["status", *place])
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"tested at step (\d+)", line).group(1) for line in lines] == [
        *("20", "0", "0", "0")
    ]
    archive_toy.main(["run", *place])
    assert len(capsys.readouterr().out.splitlines()) == 4
    output = tmp_path / "out.parquet"
    archive_toy.main(["assemble", *place, "--output", str(output)])
    result = toy.ToyResult.load(output)
    assert result.config == replace(TINY, rhos=(0.0, 1.0))
    undisturbed = toy.merge(toy.sweep(SHARDS, threads=1))
    pd.testing.assert_frame_equal(result.losses, undisturbed.losses, check_exact=True)
    assert "parts of the grid" not in whole(output).provenance["scale"]


def test_a_shard_that_another_process_trains_is_left_alone(place, tmp_path, capsys):
    taken = tmp_path / "shards" / f"{toy.slug(SHARDS[1])}.pt"
    with _runs.claimed(taken) as ours:
        assert ours
        archive_toy.main(["run", *place])
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("is taken") for line in lines] == [False, True, False, False]
    assert not taken.exists() and len(list(taken.parent.glob("*.pt"))) == 3
    archive_toy.main(["run", *place, "--shards", "1"])
    assert toy.ToyResult.from_checkpoint(taken).losses["step"].max() == TINY.steps


def test_what_is_not_done_is_said(place, tmp_path, capsys):
    output = tmp_path / "out.parquet"
    with pytest.raises(SystemExit, match="no shard has reached step 40: give fewer --steps"):
        archive_toy.main(["assemble", *place, "--output", str(output)])
    assert not output.exists()
    with pytest.raises(SystemExit):
        archive_toy.main(["run", "fig9", *place[1:]])
    assert "invalid choice: 'fig9'" in capsys.readouterr().err


# archive_toy_phase ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps"), [("phase", 4), ("budgets", 500), ("noise", 2)])
def test_each_run_of_the_phase_script_is_archived(name, steps, tmp_path, monkeypatch, capsys):
    paper = toy.ToyConfig.paper

    def small(experiment, scale, **changes):
        sizes = {"width": 4, "vocabulary": 6, "teacher_depth": 8, "teachers": (0, 1)}
        return replace(paper(experiment, scale, **changes), **sizes, depths=(1, 2))

    monkeypatch.setattr(toy.ToyConfig, "paper", small)
    monkeypatch.setattr(archive_toy_phase, "BUDGETS", (4, 8))
    monkeypatch.setattr(archive_toy_phase, "NOISE", ((4, 1), (8, 2)))
    out, extra = tmp_path / "out.parquet", ["--checkpoint", str(tmp_path / "phase.pt")]
    command = ["x", name, "--steps", str(steps), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command + extra * (name == "phase"))
    archive_toy_phase.main()
    archived = whole(out)
    assert {*toy.GRID, "step", "loss"} <= set(archived.frame.columns)
    assert str(out) in capsys.readouterr().out
    steps = {"phase": {1, 2, 3, 4}, "budgets": {4, 8}, "noise": {2, 4}}[name]
    assert set(archived.frame["step"]) == steps
    assert (tmp_path / "phase.pt").exists() == (name == "phase")


# archive_nested_steps -------------------------------------------------------------------


def test_nested_steps_are_archived(tmp_path, monkeypatch):
    ways = {way: settings | {"steps": 2} for way, settings in archive_nested_steps.WAYS.items()}
    monkeypatch.setattr(archive_nested_steps, "WAYS", ways)
    monkeypatch.setattr(archive_nested_steps, "FOLDS", (2,))
    monkeypatch.setattr(archive_nested_steps, "DEPTHS", (1, 2))
    out = tmp_path / "new" / "nested.parquet"
    monkeypatch.setattr(sys, "argv", ["x", "--seeds", "2", "--out", str(out)])
    archive_nested_steps.main()
    archived = whole(out, rows=3 * 2 * 2)
    assert set(archived.frame["training"]) == set(ways)
    assert archived.provenance["config"]["networks"] == 2


# archive_toy_updates --------------------------------------------------------------------


@pytest.fixture
def updates(tmp_path, monkeypatch):
    """The script with a small base and a place of its own to write results to."""
    sizes = {"width": 4, "teacher_depth": 8, "batch": 8, "steps": 6, "teachers": (0, 1)}
    small = {
        name: replace(
            part,
            config=replace(part.config, **sizes, depths=(2, 3), decay=False),
            marks=(0, 6) if part.units is None else (6,),
            units=part.units and 48,
        )
        for name, part in archive_toy_updates.PARTS.items()
    }
    monkeypatch.setattr(archive_toy_updates, "PARTS", small)
    monkeypatch.setattr(archive_toy_updates, "INPUTS", 20)
    monkeypatch.setattr(archive_toy_updates, "ROOT", tmp_path)
    return archive_toy_updates


def test_updates_are_measured_part_by_part_and_joined(updates, tmp_path, capsys):
    folder = ["--folder", str(tmp_path / "parts")]
    with pytest.raises(SystemExit, match="parts holds no finished part"):
        updates.main(["assemble", *folder])
    with pytest.raises(SystemExit):
        updates.main(["run", "min", *folder])
    assert "there is no part min: choose from main" in capsys.readouterr().err
    names = ["main", "starts", "second_order", "shape"]
    updates.main(["run", *names, *folder])
    updates.main(["assemble", *folder])
    students = whole(tmp_path / "results" / "toy_updates.parquet")
    profiles = whole(tmp_path / "results" / "toy_updates_profiles.parquet")
    assert set(students.frame["part"]) == set(profiles.frame["part"]) == set(names)
    assert set(students.provenance["config"]) == set(names)
    last = students.frame[students.frame["step"] == 6]
    assert last["loss"].gt(0).all() and last["regime"].notna().all()


def test_parts_can_run_side_by_side_and_with_fewer_steps(updates, tmp_path):
    folder = ["--folder", str(tmp_path / "parts")]
    updates.main(["run", "shallow", "--steps", "3", *folder])
    updates.main(["assemble", *folder])
    students = whole(tmp_path / "results" / "toy_updates.parquet")
    assert set(students.frame["part"]) == {"shallow"}
    assert students.frame["step"].max() == 3


# archive_toy_patience -------------------------------------------------------------------


@pytest.fixture
def lengths(tmp_path, monkeypatch):
    config = replace(
        TINY, teachers=(0,), temperatures=(0.1, 1.0), head="given", temperature_on="both"
    )
    config = replace(config, depth_factor=4.0, decay=True, steps=40)
    monkeypatch.setattr(archive_toy_patience, "CONFIG", config)
    monkeypatch.setattr(archive_toy_patience, "LENGTHS", (10, 20, 40))
    return ["--folder", str(tmp_path / "patience")]


def test_a_branch_ends_like_a_run_that_was_alone_from_the_start(lengths, tmp_path):
    output = tmp_path / "patience.parquet"
    with pytest.raises(SystemExit, match="no finished shard"):
        archive_toy_patience.main(["assemble", *lengths, "--output", str(output)])
    archive_toy_patience.main(["run", *lengths, "--shards", "1"])
    archive_toy_patience.main(["run", *lengths])
    archive_toy_patience.main(["assemble", *lengths, "--output", str(output)])
    table = whole(output).frame
    config, order = archive_toy_patience.CONFIG, list(toy.GRID)
    for length in archive_toy_patience.LENGTHS:
        alone = toy.train(replace(config, steps=length, test_every=length), threads=1).losses
        branch = table[table["annealed"] & (table["step"] == length)].drop(columns="annealed")
        pd.testing.assert_frame_equal(
            *(t.sort_values(order).reset_index(drop=True) for t in (alone, branch)),
            check_exact=True,
        )


def test_students_of_the_other_scripts_are_measured(lengths, tmp_path, monkeypatch, capsys):
    small = replace(TINY, teachers=(0,), depths=(2, 3), loss="mse", head="none")
    for name in archive_toy_updates.LARGE:
        monkeypatch.setitem(archive_toy.RUNS, name, small)
    monkeypatch.setattr(archive_toy_updates, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    archive_toy.main(["run", "fig5", *lengths, "--shards", "0"])
    archive_toy_patience.main(["run", *lengths, "--shards", "0"])
    archive_toy_updates.main(["finished", *lengths])
    assert "is not done" in capsys.readouterr().out
    students = {
        name: whole(tmp_path / "results" / f"{name}_updates.parquet").frame
        for name in ("toy_fig5", "toy_patience")
    }
    assert set(students["toy_fig5"]["rho"]) == {1.0}
    assert set(students["toy_patience"]["step"]) == {10, 20, 40}
    assert students["toy_patience"]["relative_loss"].between(0, 2).all()
