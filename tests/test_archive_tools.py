"""The command that fills results/, on grids of seconds: run, killed, shared, assembled."""

import re
import signal
import subprocess
import sys
from dataclasses import replace

import archive as command
import pandas as pd
import pytest
import torch
from conftest import ROOT

from depthutil import _runs, archive, corpus, ladder, models, surgery, toy

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
CPU = torch.device("cpu")


@pytest.fixture
def call(tmp_path):
    """The command, with a folder for shards and one for results."""

    def call(name, action, *more):
        places = ["--folder", str(tmp_path / "shards"), "--results", str(tmp_path / "results")]
        command.main([name, action, *places, *more])

    return call


def whole(path, rows=None):
    """An archived table with all of its provenance."""
    archived = archive.load(path)
    assert len(archived.frame) == rows if rows else len(archived.frame)
    assert archived.provenance["wall_seconds"] > 0 and archived.provenance["commit"]
    assert archived.provenance["scale"] in archived.caption
    return archived


# Grids ----------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(command.GRIDS, "fig3b", TINY)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tools!r}]
import archive
from depthutil import toy
archive.GRIDS["fig3b"] = toy.ToyConfig(**{settings!r})
train = toy.train
def often(*args, **options):
    return train(*args, **options | {{"checkpoint_seconds": 0}})
def advance(trainer, original=toy.grid.Trainer.advance):
    if trainer.step == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    original(trainer)
toy.train, toy.grid.Trainer.advance = often, advance
archive.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_was(tiny, call, tmp_path, capsys):
    settings = {f: getattr(TINY, f) for f in TINY.__dataclass_fields__}
    code = KILLED.format(tools=str(ROOT / "tools"), settings=settings)
    words = ["fig3b", "run", "--folder", str(tmp_path / "shards")]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "shards").glob("*.pt")
    assert checkpoint.stem == toy.slug(SHARDS[0])
    call("fig3b", "status")
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"tested at step 20,", lines[0])
    assert all(line.endswith("not begun") for line in lines[1:]) and len(lines) == 4
    call("fig3b", "run")
    assert len(capsys.readouterr().out.splitlines()) == 4
    call("fig3b", "assemble")
    output = tmp_path / "results" / "toy_fig3b.parquet"
    result = toy.ToyResult.load(output)
    assert result.config == replace(TINY, rhos=(0.0, 1.0))
    undisturbed = toy.merge(toy.sweep(SHARDS, threads=1))
    pd.testing.assert_frame_equal(result.losses, undisturbed.losses, check_exact=True)
    assert "parts" not in whole(output).provenance["scale"]


def test_a_shard_that_another_process_trains_is_left_alone(tiny, call, tmp_path, capsys):
    taken = tmp_path / "shards" / f"{toy.slug(SHARDS[1])}.pt"
    with _runs.claimed(taken) as ours:
        assert ours
        call("fig3b", "run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("is taken") for line in lines] == [False, True, False, False]
    assert not taken.exists() and len(list(taken.parent.glob("*.pt"))) == 3
    call("fig3b", "assemble")
    output = tmp_path / "results" / "toy_fig3b.parquet"
    assert whole(output).provenance["scale"].endswith("; 3 of 4 parts")
    call("fig3b", "run", "--shards", "1")
    assert toy.ToyResult.from_checkpoint(taken).losses["step"].max() == TINY.steps


# A real language model ------------------------------------------------------------------


def test_recordings_of_the_real_model_and_what_they_are_of(call, tmp_path, monkeypatch):
    few = {
        "trained": command.Reading(length=24, per_token=True),
        "rounded to Q4_0": command.Reading("Q4_0", length=24, mask="inner"),
        "decoded, lens": command.Reading(length=24, decode="lens"),
    }
    monkeypatch.setattr(command.Recordings, "readings", few)
    call("smollm2", "run", "--documents", "2", "--shards", "0", "1")
    call("smollm2", "assemble")
    layers = whole(tmp_path / "results" / "smollm2_135m_layers.parquet")
    assert layers.provenance["scale"].endswith("46 tokens of 2 texts; 2 of 3 parts")
    call("smollm2", "run", "--documents", "2")
    call("smollm2", "assemble")
    layers = whole(tmp_path / "results" / "smollm2_135m_layers.parquet")
    about = layers.provenance["config"]
    assert about["model"]["sha256"].startswith("b179c952") and about["text"]["documents"] > 300
    assert set(about["recordings"]) == set(few) and "transformers" in about["libraries"]
    table = layers.frame.query("lag == 1").set_index(["recording", "statistic"])
    assert set(layers.frame["recording"]) == set(few)
    angles = table.loc[("trained", "angles")]
    assert len(angles) == 30 and angles["tokens"].iloc[0] == 46
    assert table.loc[("rounded to Q4_0", "angles")]["tokens"].iloc[0] == 44
    rounded = table.loc[("rounded to Q4_0", "angles")]["mean"]
    assert not rounded.reset_index(drop=True).equals(angles["mean"].reset_index(drop=True))
    assert len(table.loc[("decoded, lens", "decoded_overlap")]) == 31
    tokens = whole(tmp_path / "results" / "smollm2_135m_tokens.parquet").frame
    first = tokens.query("position == 0")
    assert len(first) == 2 and (first["norms_12"] > 10_000).all()
    assert (tokens.query("not random")["position"] < 4).all() and "angles_30" in tokens


def test_effects_on_the_real_model_go_into_one_archive_each(call, tmp_path, monkeypatch):
    command = sys.modules["archive"]
    some = {"skipped": "skips", "facts": "facts", "direct": "skips"}
    monkeypatch.setattr(command.Effects, "shards", some)
    monkeypatch.setattr(command.Effects, "length", 12)
    call("effects", "run", "--documents", "1", "--shards", "0", "1")
    call("effects", "assemble", "--documents", "1")
    skips = whole(tmp_path / "results" / "smollm2_135m_skips.parquet")
    assert skips.provenance["scale"] == "smollm2-135m, 1 texts; 1 of 2 parts"
    assert skips.frame.query("effect == 'loss'")["skipped"].tolist() == list(range(30))
    assert set(skips.frame["shard"]) == {"skipped"}
    facts = whole(tmp_path / "results" / "smollm2_135m_facts.parquet").frame
    assert facts["text"].nunique() == 1 and facts["layer"].max() == 30
    jump = facts[facts["position"] == facts["position"].max()].set_index("layer")["probability"]
    assert jump[24] - jump[23] > 0.4


def test_hops_and_healing_are_archived(call, tmp_path, monkeypatch):
    command = sys.modules["archive"]
    call("hops", "run", "--steps", "20", "--shards", "0", "2")
    call("hops", "assemble", "--steps", "20")
    table = whole(tmp_path / "results" / "hops.parquet")
    assert table.provenance["scale"].endswith("2 of 19 parts")
    assert set(table.frame["depth"]) == {1, 3} and table.frame["hops"].max() == 3
    from depthutil import hops

    network = hops.trained(
        hops.HopConfig(depth=1), tmp_path / "results" / "hops_networks.safetensors"
    )
    assert hops.accuracy(network, hops.HopConfig(depth=1), 50).between(0, 1).all()
    monkeypatch.setattr(command.Healing, "marks", (0, 1))
    call("healing", "run", "--steps", "1", "--shards", "6", "7")
    call("healing", "assemble", "--steps", "1")
    healed = whole(tmp_path / "results" / "ladder_healing.parquet").frame
    assert set(healed["depth"]) == {4} and set(healed["block"]) == {-1, 1}
    first = healed.query("step == 0").groupby("block")["loss"].mean()
    assert first[1] > first[-1] + 0.3


def test_students_of_several_seeds_are_split(call, tmp_path, monkeypatch):
    command = sys.modules["archive"]
    tiny = replace(command.SEEDS, width=4, depths=(1, 2), seeds=(0, 1), teachers=(0,), batch=8)
    monkeypatch.setattr(command.Seeds, "parts", {"independent": tiny})
    call("seeds", "run", "--steps", "40")
    call("seeds", "assemble", "--steps", "40")
    table = whole(tmp_path / "results" / "toy_seeds.parquet").frame
    assert sorted(set(table["step"])) == [30, 40] and set(table["depth"]) == {0, 1, 2}
    some = table[table["depth"] > 0]
    # What differs between seeds is a part of the loss; the rest is what they have in common.
    assert (some["variance"] >= 0).all() and (some["variance"] <= some["loss"] * 2).all()
    assert (some["beyond_1"] >= some["beyond_3"] * 0.9).all()
    assert some.query("depth == 1")["without_one"].isna().all()


def test_halves_of_two_networks_are_put_together():
    weights = [torch.arange(4.0).reshape(4, 1, 1), torch.arange(4.0).reshape(4, 1)]
    assert command.odd(weights[0]).flatten().tolist() == [False, True, False, True]
    assert command.odd(weights[1]).shape == (4, 1)
    w1, b, w2 = command.without([weights[0], weights[1], torch.ones(4, 1, 1)], 1)
    assert w1.flatten().tolist() == b.flatten().tolist() == [0, 2, 3]
    assert w2.flatten().tolist() == pytest.approx([4 / 3] * 3)
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    square = (x[:, :1] * x[:, 1:]).repeat(1, 2)
    line, parabola, cubic = (fit(square) for fit in command.polynomials(x))
    assert line > 0.5 and max(parabola, cubic) < 1e-6


def test_every_measurement_is_described():
    ruler = "=" * 19
    _, head, rows, _ = re.split(rf"^{ruler} =+$", command.__doc__, flags=re.MULTILINE)
    described = " ".join(row[: len(ruler)] for row in (head + rows).splitlines())
    assert set(re.findall(r"\w+", described)) == {"name", *command.NAMES}


def test_designs_share_a_trunk_and_are_archived_with_what_is_inside(call, tmp_path, monkeypatch):
    command = sys.modules["archive"]
    pages = {
        f"page {i}": f"Page {i} says nothing that page {i + 1} does not. " * 9 for i in range(9)
    }
    documents = tuple(corpus.Document(name, text) for name, text in pages.items())
    text = ladder.Corpus("nine pages", documents[:7], documents[7:])
    tiny = ladder.LadderConfig(
        width=16, batch=2, test_every=8, test_sequences=2, cooldown=0.25, final_sequences=2
    )
    monkeypatch.setattr(command.Designs, "base", tiny)
    monkeypatch.setattr(command.Designs, "text", text)
    models_at = ["--models", str(tmp_path / "models")]
    call("designs", "run", "--steps", "24", "--shards", "4", *models_at)  # before its baseline
    assert not list((tmp_path / "shards").glob("short*.pt"))
    call("designs", "run", "--steps", "24", "--shards", "0", "2", "4", "8", *models_at)
    call("designs", "assemble", "--steps", "24", *models_at)
    table = whole(tmp_path / "results" / "ladder_designs.parquet").frame
    assert table.groupby("design")["step"].max().to_dict() == {
        "baseline": 24, "lidas": 24, "short": 19, "tied": 24
    }  # fmt: skip
    assert table.query("design == 'lidas'")["layers"].tolist() == [8, 12, 12]
    spent = table.groupby("design")["flops"].max()
    assert spent["lidas"] == pytest.approx(spent["short"], rel=0.04)
    both = table[table["step"] == 8].set_index("design")["held_out_loss"]
    assert both["short"] == both["baseline"]
    # The short baseline is what it would be if it had been trained alone.
    alone = ladder.train(
        command.Designs(24).config("short"), 12, 0, text=text, device="cpu", threads=1
    )
    found = ladder.LadderModel.from_checkpoint(tmp_path / "shards" / "short-s0-n24.pt")
    assert all(torch.equal(w, found.weights[name]) for name, w in alone.weights.items())
    kept = {path.name for path in (tmp_path / "models").iterdir()}
    assert kept == {f"ladder-w16-d12-{name}-s0" for name in ("baseline", "lidas", "tied")}
    model, _ = models.load(str(tmp_path / "models" / "ladder-w16-d12-tied-s0"), device="cpu")
    assert surgery.sharing(surgery.tie(model)) == [0] * 12
    monkeypatch.setattr(command.Inside, "texts", 3)
    monkeypatch.setattr(command.Inside, "step", 200)
    call("inside", "run", "--steps", "24", "--shards", "1", "2")
    call("inside", "assemble", "--steps", "24")
    inside = whole(tmp_path / "results" / "ladder_designs_inside.parquet").frame
    assert set(inside["design"]) == {"lidas"}  # MIDAS is not there
    at = inside.set_index(["measure", "a", "b"])["mean"]
    assert at["swapped, runs of 1", 3, -1] != 0 and at["similarity, mlp", 4, 4] == pytest.approx(1)
    assert at["skipped, runs of 1", 3, -1] == pytest.approx(at["skip, loss", 3, 12], abs=1e-4)
    monkeypatch.setattr(command.Primitives, "marks", (0,))
    call("primitives", "run", "--steps", "2", "--shards", "2", "1")
    assert not list((tmp_path / "shards").glob("primitives*.parquet"))  # nothing of two steps
    monkeypatch.setattr(command.Primitives, "most", 1)
    call("primitives", "run", "--steps", "24", "--shards", "2")
    call("primitives", "assemble", "--steps", "24")
    asked = whole(tmp_path / "results" / "ladder_primitives.parquet").frame
    assert asked.groupby("step")["task"].nunique().to_dict() == {0: 4, 1: 4}
    monkeypatch.setattr(command.Repeats, "marks", (1,))
    monkeypatch.setattr(command.Repeats, "questions", 20)
    call("repeats", "run", "--steps", "24", "--shards", "2")
    call("repeats", "assemble", "--steps", "24")
    asked = whole(tmp_path / "results" / "ladder_repeats.parquet").frame
    assert asked.groupby("run")["first"].max().to_dict() == {0: -1, 2: 10, 4: 8}
    assert asked["loss"].nunique() == 1 + 2 * (11 + 9)


def test_loops_and_what_is_added_to_an_archive(call, tmp_path, monkeypatch):
    command = sys.modules["archive"]
    tiny = ladder.LadderConfig(width=16, sequence=16, batch=2, test_sequences=2, final_sequences=2)
    monkeypatch.setattr(command.ladder, "LadderConfig", lambda: tiny)
    monkeypatch.setattr(command.Loops, "text_count", 3)
    names = command.Loops(4).names
    assert len(set(names)) == len(names) == 63
    one, other = (names.index(f"loop-{n}-s0-n4") for n in ("1x4-p0.5", "4x1-p0.5"))
    call("loops", "run", "--steps", "4", "--shards", str(one))
    call("loops", "assemble", "--steps", "4")
    path = tmp_path / "results" / "ladder_loops.parquet"
    first = whole(path)
    looped = first.provenance["config"]["shards"][0]["design"]
    assert looped["loop"] == [0, 1, 4, 0] and looped["write_scale"] == 0.5
    assert first.provenance["scale"].endswith("1 of 63 parts")
    assert not list((tmp_path / "shards").glob("*.pt"))  # what was to be measured is
    found = first.frame.set_index(["measure", "layer", "lag"])["mean"]
    assert 4 < found["loss", 0, 1] < 7 and len(found["update_norms"]) == 4
    # Another shard, in another folder, is added; one that is there already stays as it is.
    again = ["--folder", str(tmp_path / "again")]
    call("loops", "run", "--steps", "4", "--shards", str(other), str(one), *again)
    call("loops", "assemble", "--steps", "4", "--add", *again)
    both = whole(path)
    assert both.provenance["scale"].endswith("2 of 63 parts")
    assert sorted(both.frame["layers"].unique()) == [1, 4]
    assert len(both.frame.query("layers == 1")) == len(first.frame)
    assert both.provenance["wall_seconds"] > first.provenance["wall_seconds"]
    assert len(both.provenance["config"]["shards"]) == 2
    call("loops", "assemble", "--steps", "4", "--add", *again)  # nothing is new
    assert whole(path).frame.equals(both.frame)
    assert whole(path).provenance["wall_seconds"] == both.provenance["wall_seconds"]


def test_what_is_not_done_is_said(tiny, call, tmp_path):
    with pytest.raises(SystemExit, match=r"no shard of fig3b in .* is finished: run goes on"):
        call("fig3b", "assemble")
    call("fig3b", "run", "--shards", "0", "--steps", "20")
    with pytest.raises(SystemExit, match=r"no shard of fig3b in .* is finished: run goes on"):
        call("fig3b", "assemble")
    assert not (tmp_path / "results").exists()
    call("fig3b", "assemble", "--steps", "20")
    assert whole(tmp_path / "results" / "toy_fig3b.parquet").frame["step"].max() == 20


def small(config):
    sizes = {"width": 4, "vocabulary": 6, "teacher_depth": 8, "teachers": (0, 1)}
    return replace(config, **sizes, depths=(1, 2))


@pytest.mark.parametrize(
    ("name", "shards", "steps"),
    [("phase", 14, {4}), ("budgets", 5, {1, 2, 4, 8, 16}), ("noise", 4, {1, 4})],
)
def test_each_short_grid_is_archived(name, shards, steps, call, tmp_path, monkeypatch, capsys):
    if name == "phase":
        monkeypatch.setitem(command.GRIDS, name, small(command.GRIDS[name]))
    else:
        members = [(small(config), label) for config, label in command.LABELLED[name]]
        monkeypatch.setitem(command.LABELLED, name, members)
    most = str(max(steps))
    call(name, "run", "--steps", most)
    assert len(capsys.readouterr().out.splitlines()) == shards
    call(name, "assemble", "--steps", most)
    out = tmp_path / "results" / f"toy_{name}.parquet"
    archived = whole(out)
    assert {*toy.GRID, "step", "loss"} <= set(archived.frame.columns)
    assert str(out) in capsys.readouterr().out
    assert set(archived.frame["step"]) == steps
    assert ("batch" in archived.frame) == (name == "noise")


def test_the_shards_of_a_grid_have_the_losses_of_the_whole():
    config = small(command.GRIDS["phase"])
    config = replace(config, steps=20, test_every=10)
    parts = toy.merge(toy.sweep(toy.shards(config), threads=1)).losses
    alone = toy.train(config, threads=1).losses
    order = ["step", *toy.GRID]
    alone = alone.sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(parts, alone, rtol=1e-5)


# Folds ----------------------------------------------------------------------------------


def test_nested_steps_are_archived(call, tmp_path, monkeypatch, capsys):
    run = command.NestedSteps
    ways = {way: settings | {"steps": 2} for way, settings in run.ways.items()}
    monkeypatch.setattr(run, "ways", ways)
    monkeypatch.setattr(run, "folds", (2,))
    monkeypatch.setattr(run, "depths", (1, 2))
    call("nested_steps", "run", "--seeds", "2")
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*.parquet")}
    call("nested_steps", "run", "--seeds", "2")  # which finds all of them there
    assert len(made) == 3 and all(p.stat().st_mtime_ns == t for p, t in made.items())
    call("nested_steps", "status", "--seeds", "2")
    assert "done in" in capsys.readouterr().out
    call("nested_steps", "assemble", "--seeds", "2")
    archived = whole(tmp_path / "results" / "nested_steps.parquet", rows=3 * 2 * 2)
    assert set(archived.frame["training"]) == set(ways)
    assert archived.provenance["config"]["networks"] == 2


# How students use their depth -----------------------------------------------------------


@pytest.fixture
def updates(monkeypatch):
    """Small parts."""
    sizes = {"width": 4, "teacher_depth": 8, "batch": 8, "steps": 6, "teachers": (0, 1)}
    parts = {
        name: replace(
            part,
            config=replace(part.config, **sizes, depths=(2, 3), decay=False),
            marks=(0, 6) if part.units is None else (6,),
            units=part.units and 48,
        )
        for name, part in command.PARTS.items()
    }
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setattr(command, "INPUTS", 20)


def test_updates_are_measured_part_by_part_and_joined(updates, call, tmp_path):
    with pytest.raises(SystemExit, match="no shard of updates in"):
        call("updates", "assemble")
    names = list(command.PARTS)
    wanted = [str(names.index(n)) for n in ("main", "starts", "second_order", "shape")]
    call("updates", "run", "--shards", *wanted)
    call("updates", "assemble")
    students = whole(tmp_path / "results" / "toy_updates.parquet")
    profiles = whole(tmp_path / "results" / "toy_updates_profiles.parquet")
    parts = {"main", "starts", "second_order", "shape"}
    assert set(students.frame["part"]) == set(profiles.frame["part"]) == parts
    assert set(students.provenance["config"]) == parts
    last = students.frame[students.frame["step"] == 6]
    assert last["loss"].gt(0).all() and last["regime"].notna().all()
    assert set(profiles.frame["statistic"]) == {"off_path", "straight_off_path", "update", "lag"}
    archived = archive.load(ROOT / "results" / "toy_updates.parquet").frame
    assert set(students.frame.columns) == set(archived.columns)
    archived = archive.load(ROOT / "results" / "toy_updates_profiles.parquet").frame
    assert set(profiles.frame.columns) == set(archived.columns)


def test_parts_can_have_fewer_steps(updates, call, tmp_path):
    shallow = str(list(command.PARTS).index("shallow"))
    call("updates", "run", "--shards", shallow, "--steps", "3")
    call("updates", "assemble", "--steps", "3")
    students = whole(tmp_path / "results" / "toy_updates.parquet")
    assert set(students.frame["part"]) == {"shallow"}
    assert students.frame["step"].max() == 3


def test_students_begin_as_they_are_told():
    config = replace(TINY, loss="mse", head="none", rhos=(0.0,), teachers=(1,), depths=(4,))
    tied, taught = (toy.grid.Trainer(config, CPU, start=s) for s in ("tied", "teacher"))
    (w1, b, w2), own = tied.groups[0].weights, toy.teacher_weights(config, 1, 0.0)
    assert (w1 == w1[:1]).all() and (b == b[:1]).all() and not w2.any()
    w1, _, w2 = taught.groups[0].weights
    assert w1[:, 0].equal(own[0][::2]) and w2[:, 0].equal(2 * own[2][::2])
    wide = toy.grid.Trainer(replace(config, expansion=8), CPU, taught_by=config)
    assert wide.teachers.w1[:, 0].equal(own[0]) and wide.groups[0].weights[0].shape[2] == 32
    with pytest.raises(ValueError, match="start is"):
        toy.grid.Trainer(config, CPU, start="late")


# Many lengths ---------------------------------------------------------------------------


@pytest.fixture
def lengths(monkeypatch):
    config = replace(
        TINY, teachers=(0,), temperatures=(0.1, 1.0), head="given", temperature_on="both"
    )
    config = replace(config, depth_factor=4.0, decay=True, steps=40)
    monkeypatch.setattr(command.Patience, "config", config)
    monkeypatch.setattr(command.Patience, "lengths", (10, 20, 40))


def test_a_branch_ends_like_a_run_that_was_alone_from_the_start(lengths, call, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no shard of patience"):
        call("patience", "assemble")
    call("patience", "run", "--shards", "1")
    call("patience", "run")
    call("patience", "status")
    assert capsys.readouterr().out.count("3 of 3 lengths done, up to 40 steps") == 2
    call("patience", "assemble")
    table = whole(tmp_path / "results" / "toy_patience.parquet").frame
    config, order = command.Patience.config, list(toy.GRID)
    for length in command.Patience.lengths:
        alone = toy.train(replace(config, steps=length, test_every=length), threads=1).losses
        branch = table[table["annealed"] & (table["step"] == length)].drop(columns="annealed")
        pd.testing.assert_frame_equal(
            *(t.sort_values(order).reset_index(drop=True) for t in (alone, branch)),
            check_exact=True,
        )


def test_students_of_other_runs_are_measured(lengths, call, tmp_path, monkeypatch, capsys):
    config = replace(TINY, teachers=(0,), depths=(2, 3), loss="mse", head="none")
    for name, steps in (("fig5", 40), ("second_order", 50), ("shallow_teacher", 60)):
        monkeypatch.setitem(command.GRIDS, name, replace(config, steps=steps, test_every=steps))
    call("fig5", "run", "--shards", "0")
    call("patience", "run", "--shards", "0")
    for name in ("fig5_updates", "patience_updates"):
        call(name, "run")
        call(name, "assemble")
    assert "is not done" in capsys.readouterr().out
    students = {
        name: whole(tmp_path / "results" / f"{name}_updates.parquet").frame
        for name in ("toy_fig5", "toy_patience")
    }
    assert set(students["toy_fig5"]["rho"]) == {1.0}
    assert set(students["toy_patience"]["step"]) == {10, 20, 40}
    assert students["toy_patience"]["relative_loss"].between(0, 2).all()
    archived = archive.load(ROOT / "results" / "toy_fig5_updates.parquet").frame
    assert set(students["toy_fig5"].columns) == set(archived.columns)
