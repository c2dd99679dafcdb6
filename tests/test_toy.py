import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context

import archive as command
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from depthutil import _runs, archive, signatures, toy

SMALL = toy.ToyConfig(
    width=6,
    vocabulary=10,
    teacher_depth=8,
    depths=(1, 2, 3),
    teachers=(0, 3),
    rhos=(0.0, 1.0),
    temperatures=(0.1, 1.0),
    batch=16,
    steps=12,
    learning_rate=1e-2,
    test_every=4,
    test_batches=2,
    dtype="float64",
)
MSE = {"loss": "mse", "head": "none", "temperatures": (1.0,)}
ONE = replace(SMALL, depths=(2,), teachers=(0,), rhos=(0.5,), temperatures=(0.3,))


def gap(network, weights) -> float:
    """The largest difference between a network's weights and a tuple of them."""
    w1, b, w2, head = weights
    pairs = [(layer.w1, w1[i]) for i, layer in enumerate(network.layers)]
    pairs += [(layer.b, b[i]) for i, layer in enumerate(network.layers)]
    pairs += [(layer.w2, w2[i]) for i, layer in enumerate(network.layers)]
    pairs += [] if network.head is None else [(network.head, head)]
    return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


# The grid equals separate training ------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": (0, 5)},
        {"head": "given", "temperature_on": "both", "depth_factor": 4.0, "decay": True},
        {"rhos": (0.3,), "temperature_on": "both"},
        {**MSE, "depth_factor": 2.0},
        {**MSE, "order": 2},
    ],
    ids=["own", "given", "both", "mse", "second-order"],
)
def test_the_grid_equals_training_each_student_by_itself(changes):
    config = replace(SMALL, **changes)
    result = toy.train(config, students=True)
    assert len(result.weights) == len(config.students(1)) * len(config.depths)
    for key, weights in result.weights.items():
        which = dict(zip(toy.GRID, key, strict=True))
        assert gap(toy.train_plainly(config, **which), weights) < 1e-11, which


def test_in_float32_they_agree_to_its_precision():
    # Adam turns a rounding error of a gradient into one of a step where the gradient is near
    # zero; at the paper's learning rate that stays small for a few steps.
    config = replace(SMALL, dtype="float32", learning_rate=6e-4, steps=8)
    for key, weights in toy.train(config, students=True).weights.items():
        plain = toy.train_plainly(config, **dict(zip(toy.GRID, key, strict=True)))
        assert gap(plain, weights) < 1e-4


def test_a_student_does_not_depend_on_the_rest_of_the_grid():
    config = replace(SMALL, rhos=(0.5, 1.0, 0.0), temperatures=(1.0, 0.3), seeds=(2, 0))
    grid = toy.train(config, students=True)
    alone = toy.train(replace(ONE, temperatures=(0.3,)), students=True)
    ((key, weights),) = alone.weights.items()
    assert gap(grid.student(**dict(zip(toy.GRID, key, strict=True))), weights) < 1e-11


def test_how_students_are_stacked_changes_nothing(monkeypatch):
    whole = toy.train(SMALL)
    monkeypatch.setattr(toy.grid, "CACHE_BYTES", 1)
    pieces = toy.train(SMALL)
    np.testing.assert_allclose(whole.losses["loss"], pieces.losses["loss"], rtol=1e-10)


def test_test_losses_are_those_of_the_trained_student():
    result = toy.train(ONE, students=True)
    student = result.student(depth=2)
    x = toy.inputs(ONE, 0, ONE.steps, test=True)
    *deep, head = toy.teacher_weights(ONE, 0, 0.5)
    teacher = (toy.rms(toy.Network(*deep)(x)) @ head.T / 0.3).log_softmax(-1)
    own = (toy.rms(student(x)) @ student.head.T).log_softmax(-1)
    loss = F.kl_div(own, teacher, log_target=True, reduction="batchmean").item()
    assert math.isclose(result.losses["loss"].iloc[-1], loss, rel_tol=1e-9)
    assert result.losses["step"].tolist() == [4, 8, 12]
    assert len(x) == ONE.batch * ONE.test_batches


# The stack ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 4, 7), (3, 2, 17, 9, 33)])
def test_the_stack_equals_autograd(order, shape):
    depth, networks, batch, width, hidden = shape
    torch.manual_seed(sum(shape))
    mlps = depth * order
    w1 = torch.randn(mlps, networks, hidden, width, dtype=torch.float64)
    b = torch.randn(mlps, networks, hidden, dtype=torch.float64)
    w2 = torch.randn(mlps, networks, width, hidden, dtype=torch.float64) / hidden
    x = torch.randn(networks, batch, width, dtype=torch.float64)
    grad = torch.randn_like(x)
    stack = toy.grid.Stack(w1, b, w2, order)
    last = stack.forward(x, keep=True)
    into = [torch.full_like(w, torch.nan) for w in (w1, b, w2)]
    stack.backward(grad, into)
    states = stack.forward(x, states=True)
    for i in range(networks):
        plain = toy.Network(w1[:, i], b[:, i], w2[:, i], order=order)
        stream = plain.states(x[i])
        stream[-1].backward(grad[i])
        torch.testing.assert_close(states[:, i], torch.stack(stream))
        torch.testing.assert_close(last[i], stream[-1])
        for got, name in zip(into, ("w1", "b", "w2"), strict=True):
            want = torch.stack([getattr(layer, name).grad for layer in plain.layers])
            torch.testing.assert_close(got[:, i], want)


def test_second_order_is_second_order():
    # One smooth flow integrated with more and more layers: halving the step divides the error
    # of a midpoint method by four, of Euler's by two.
    torch.manual_seed(0)
    w1, b, w2 = torch.randn(1, 8, 4), torch.randn(1, 8), torch.randn(1, 4, 8) / 4
    x = torch.randn(64, 4, dtype=torch.float64)

    def flow(depth, order):
        w = [v.double().expand(depth * order, *v.shape[1:]) for v in (w1, b, w2)]
        return toy.Network(w[0], w[1], w[2] / depth, order=order)(x).detach()

    exact = flow(512, 2)
    for order, ratio in ((1, 2), (2, 4)):
        errors = [(flow(depth, order) - exact).norm().item() for depth in (16, 32)]
        assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.15)


# Teachers, students, data ---------------------------------------------------------------


def test_rho_ties_the_layers_of_a_teacher_and_keeps_their_variance():
    config = replace(SMALL, width=32, teacher_depth=64)
    tied, free, half = (toy.teacher_weights(config, 0, rho)[0] for rho in (1.0, 0.0, 0.5))
    assert torch.equal(tied[0], tied[63]) and not torch.equal(free[0], free[63])
    # 64 × 128 × 32 uniform numbers: the variance of 'half' is that of one common draw and
    # 64 own ones, known to about 1 %.
    assert half.var().item() == pytest.approx(1 / 96, rel=0.03)
    common = (half[0] * half[1]).mean() / half.var()
    assert common.item() == pytest.approx(0.5, abs=0.05)


def test_the_teacher_starts_like_a_linear_layer_and_its_answers_shrink_with_depth():
    config = replace(SMALL, width=32, teacher_depth=64)
    w1, b, w2, head = toy.teacher_weights(config, 1, 0.0)
    assert w1.abs().max() <= 32**-0.5 and b.abs().max() <= 32**-0.5
    assert 0.99 * 128**-0.5 / 8 < w2.abs().max() <= 128**-0.5 / 8
    assert head.abs().max() <= 32**-0.5
    given = toy.teacher_weights(replace(config, head="given"), 1, 0.0)[3]
    assert given.std().item() == pytest.approx(32**-0.5, rel=0.2)


def test_a_student_starts_by_saying_nothing():
    w1, b, w2, head = toy.student_weights(SMALL, 0, 3, 0)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(toy.Network(w1, b, w2)(x), toy.rms(x))
    assert not head.any() and w1.any()


def test_random_numbers_depend_on_their_name_alone():
    assert torch.equal(toy.inputs(SMALL, 3, 7), toy.inputs(replace(SMALL, seeds=(9,)), 3, 7))
    streams = [
        toy.inputs(SMALL, 3, 7),
        toy.inputs(SMALL, 3, 8),
        toy.inputs(SMALL, 0, 7),
    ]
    streams.append(toy.inputs(SMALL, 3, 7, test=True)[:16])
    for i, one in enumerate(streams):
        assert not any(torch.equal(one, other) for other in streams[i + 1 :])


# Settings -------------------------------------------------------------------------------


def test_the_papers_settings():
    fig3b, fig4, fig5 = (toy.ToyConfig.paper(name) for name in ("fig3b", "fig4", "fig5"))
    assert (fig3b.batch, fig3b.steps, fig3b.head, fig3b.hidden) == (1024, 40_000, "own", 128)
    assert len(fig3b.temperatures) == 16 and len(fig3b.teachers) == 3
    assert fig3b.temperatures[0] == 0.01 and fig3b.temperatures[-1] == 1
    assert fig3b.rate(48, 39_999) == fig3b.rate(6, 0) == 6e-4
    assert fig4.rhos == (1.0,) and fig4.temperature_on == "both" and fig4.head == "given"
    assert fig4.rate(16, 0) == fig4.rate(16, 64_000) == pytest.approx(6e-4)
    assert fig4.rate(16, 80_000) == pytest.approx(6e-5)
    assert fig4.rate(16, 72_000) == pytest.approx(6e-4 * 0.55)
    assert fig5.loss == "mse" and fig5.rate(4, 0) == pytest.approx(6e-4)
    assert toy.ToyConfig.paper("second_order").depths == (3, 6, 8, 12, 16, 24)
    assert toy.ToyConfig.paper("shallow_teacher").teacher_depth == 24


@pytest.mark.parametrize("scale", ["demo", "colab", "paper"])
@pytest.mark.parametrize("experiment", ["fig3b", "fig4", "fig5", "second_order", "shallow_teacher"])
def test_every_experiment_has_every_scale(experiment, scale):
    config = toy.ToyConfig.paper(experiment, scale)
    assert config.scale == scale
    assert toy.ToyConfig(**asdict(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": 6}, "depths is a sequence of whole numbers, not 6"),
        ({"depths": (1.5,)}, "depths is a sequence of whole numbers"),
        ({"temperatures": "1"}, "temperatures is a sequence of numbers, not '1'"),
        ({"teachers": ()}, "teachers lists each value once, and at least one"),
        ({"rhos": (1, 1)}, "rhos lists each value once"),
        ({"depths": (0, 1)}, "depths are at least 1, not 0"),
        ({"seeds": (-1,)}, "not negative"),
        ({"rhos": (1.5,)}, "rhos lie between 0 and 1"),
        ({"temperatures": (0.0,)}, "temperatures are positive"),
        ({"temperatures": (float("nan"),)}, "temperatures"),
        ({"steps": 0}, "steps is a whole number of at least 1, not 0"),
        ({"batch": 2.0}, "batch is a whole number"),
        ({"learning_rate": -1.0}, "learning_rate is a number above 0"),
        ({"depth_factor": "4"}, "depth_factor is a number above 0"),
        ({"loss": "l2"}, "loss is one of"),
        ({"order": 3}, "order is one of"),
        ({"loss": "mse"}, "does not go with head 'own'"),
        ({"head": "none"}, "'kl' needs a head"),
        ({"loss": "mse", "head": "none"}, "knows no temperature"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match="no experiment 'fig9': choose from fig3b"):
        toy.ToyConfig.paper("fig9")
    with pytest.raises(ValueError, match="no scale 'huge'"):
        toy.ToyConfig.paper("fig3b", "huge")
    with pytest.raises(TypeError, match="config is a ToyConfig, not dict"):
        toy.train({})


# Checkpoints ----------------------------------------------------------------------------

KILLED = """
import sys
from dataclasses import replace
from depthutil import toy
config = toy.ToyConfig(width=6, vocabulary=10, teacher_depth=8, depths=(1, 2), teachers=(0,),
                       temperatures=(0.1, 1.0), batch=16, steps={steps}, test_every=7)
tell = lambda step, steps, left: print(step, flush=True)
toy.train(config, checkpoint=sys.argv[1], checkpoint_seconds=0, threads=1, progress=tell)
"""


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    config = toy.ToyConfig(
        width=6,
        vocabulary=10,
        teacher_depth=8,
        depths=(1, 2),
        teachers=(0,),
        temperatures=(0.1, 1.0),
        batch=16,
        steps=60,
        test_every=7,
    )
    path = tmp_path / "run.pt"
    # The doomed run would go on for minutes: it is killed in the middle of its work.
    command = [sys.executable, "-c", KILLED.format(steps=100_000), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 20:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    reached = toy.ToyResult.from_checkpoint(path).losses["step"].max()
    assert 14 <= reached < 60
    resumed = toy.train(config, checkpoint=path, students=True, threads=1)
    whole = toy.train(config, students=True, threads=1)
    pd.testing.assert_frame_equal(resumed.losses, whole.losses, check_exact=True)
    for key, weights in whole.weights.items():
        assert all(map(torch.equal, weights, resumed.weights[key]))
    assert resumed.wall_seconds > 0


def test_an_interrupted_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    toy.train(replace(ONE, steps=8), checkpoint=path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(toy.grid.os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        toy.train(ONE, checkpoint=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_finished_run_is_read_not_repeated(tmp_path):
    path = tmp_path / "new" / "run.pt"
    first = toy.train(ONE, checkpoint=path)
    begin = time.perf_counter()
    again = toy.train(ONE, checkpoint=path, progress=lambda *_: pytest.fail("it trained"))
    assert time.perf_counter() - begin < 5
    pd.testing.assert_frame_equal(first.losses, again.losses)
    assert first.wall_seconds == again.wall_seconds


def test_more_steps_continue_a_run_whose_rate_is_constant(tmp_path):
    path = tmp_path / "run.pt"
    toy.train(replace(ONE, steps=8), checkpoint=path)
    longer = toy.train(ONE, checkpoint=path)
    whole = toy.train(ONE)
    pd.testing.assert_frame_equal(longer.losses, whole.losses, check_exact=True)
    early = whole.until(8)
    assert early.config.steps == 8 and early.losses["step"].max() == 8
    with pytest.raises(ValueError, match="no test at step 5, but at 4, 8, 12"):
        whole.until(5)


def test_foreign_checkpoints_are_named(tmp_path):
    path = tmp_path / "run.pt"
    decaying = replace(ONE, decay=True)
    toy.train(decaying, checkpoint=path)
    with pytest.raises(ValueError, match="belongs to a run with other batch"):
        toy.train(replace(decaying, batch=8), checkpoint=path)
    with pytest.raises(ValueError, match="belongs to a run with other steps"):
        toy.train(replace(decaying, steps=20), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"run\.pt is not a whole checkpoint"):
        toy.train(decaying, checkpoint=path)


def test_a_loss_that_is_no_number_stops_the_run():
    config = replace(SMALL, learning_rate=1e200, depths=(3,), teachers=(0,), rhos=(0.0,))
    with pytest.raises(FloatingPointError, match=r"depth 3 at temperature 0\.1 .* at step \d+"):
        toy.train(config)


def test_progress_and_threads(capsys):
    before = torch.get_num_threads()
    seen = []
    toy.train(ONE, progress=lambda step, steps, left: seen.append((step, steps, left)), threads=1)
    assert [step for step, _, _ in seen] == list(range(1, 13)) and seen[-1][2] == 0
    toy.train(ONE, progress=True)
    assert "step 12 of 12" in capsys.readouterr().err
    assert torch.get_num_threads() == before


# Results --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return toy.train(SMALL, students=True)


def test_the_table_is_long_and_complete(result):
    table = result.losses
    assert list(table.columns) == [*toy.GRID, "step", "loss"]
    assert len(table) == 2 * 2 * 2 * 3 * 3
    assert not table.duplicated([*toy.GRID, "step"]).any()
    first, last = (table[table["step"] == step]["loss"].mean() for step in (4, 12))
    assert 0 < last < first


def test_archive_round_trip(result, tmp_path):
    path = result.save(tmp_path / "toy.parquet", scale="tiny", device="a test")
    back = toy.ToyResult.load(path)
    assert back.config == result.config and back.wall_seconds == result.wall_seconds
    pd.testing.assert_frame_equal(back.losses, result.losses)


def test_states_of_a_trained_student(result):
    which = {"teacher": 0, "rho": 1.0, "temperature": 1.0, "depth": 3}
    states = result.states(inputs=20, **which)
    assert states.shape == (4, 20, 6)
    assert torch.equal(states, result.states(inputs=20, **which))
    torch.testing.assert_close(
        states[0].square().mean(-1), torch.ones(20).double(), atol=1e-5, rtol=0
    )
    assert signatures.gram(states).shape == (20, 4, 4)
    with pytest.raises(ValueError, match="names 4 of the trained students: say more"):
        result.states(teacher=0, depth=2)
    with pytest.raises(ValueError, match=r"not by \['layers'\]"):
        result.states(layers=2)
    with pytest.raises(ValueError, match="train with students=True"):
        toy.train(ONE).states()


def losses(power, teachers=(0, 1, 2), depths=(6, 12, 24, 48), seeds=(0,)):
    rows = [(t, 0.0, 1.0, d, s, 100, power(t, d)) for t in teachers for d in depths for s in seeds]
    return pd.DataFrame(rows, columns=[*toy.GRID, "step", "loss"])


def test_exponent_of_a_power_law():
    slopes = np.array([0.9, 1.0, 1.2])
    (row,) = toy.exponent(losses(lambda t, d: (1 + t) * d ** -slopes[t])).to_dict("records")
    assert row["alpha"] == pytest.approx(slopes.mean())
    assert row["stderr"] == pytest.approx(slopes.std(ddof=1) / 3**0.5)
    assert row["teachers"] == 3 and row["power_law"] and row["residual"] < 1e-9


def test_seeds_of_one_teacher_are_not_counted_as_teachers():
    frame = losses(lambda t, d: d ** -(1 + t / 10.0), seeds=(0, 1, 2, 3))
    row = toy.exponent(frame).iloc[0]
    assert row["teachers"] == 3
    assert row["stderr"] == pytest.approx(0.1 / 3**0.5)


@pytest.mark.parametrize(
    "decline",
    [
        lambda t, d: 1.0 if d < 20 else 1e-3,  # a threshold
        lambda t, d: 1 / d + 0.1,  # levels off
        lambda t, d: math.exp(-d / 10),  # an exponential
        lambda t, d: d**0.5,  # rises
    ],
)
def test_other_declines_are_not_called_power_laws(decline):
    assert not toy.exponent(losses(decline)).iloc[0]["power_law"]


def test_a_single_teacher_leaves_the_lines_own_error():
    rng = np.random.default_rng(0)
    frame = losses(lambda t, d: rng.lognormal(0, 0.05) / d, teachers=(0,))
    row = toy.exponent(frame).iloc[0]
    assert row["teachers"] == 1 and 0 < row["stderr"] < 0.1
    assert abs(row["alpha"] - 1) < 3 * row["stderr"]


def test_exponent_over_steps_and_depths(result):
    table = toy.exponent(result, at=[4, 12], depths=(1, 2, 3))
    assert len(table) == 2 * 2 * 2
    assert set(table["step"]) == {4, 12}
    with pytest.raises(ValueError, match="no test at step 5: 4, 8, 12 have one"):
        toy.exponent(result, at=5)
    with pytest.raises(ValueError, match="at least three depths"):
        toy.exponent(result, depths=(1, 2))
    with pytest.raises(ValueError, match="not all trained: 1, 2, 3 were"):
        toy.exponent(result, depths=(1, 2, 9))


# Many grids -----------------------------------------------------------------------------


def test_shards_merge_into_the_grid(result):
    merged = toy.merge(toy.sweep(reversed(toy.shards(SMALL)), students=True))
    assert merged.config == SMALL
    order = ["step", *toy.GRID]
    whole = result.losses.sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(merged.losses, whole, rtol=1e-9)
    assert set(merged.weights) == set(result.weights)
    with pytest.raises(ValueError, match="same student"):
        toy.merge([result, result])
    with pytest.raises(ValueError, match="differ in more than the grid"):
        toy.merge([result, toy.train(replace(ONE, batch=8))])
    with pytest.raises(ValueError, match="no results"):
        toy.merge([])


def test_a_sweep_on_processes_equals_one_here(tmp_path):
    configs = toy.shards(replace(SMALL, teachers=(0,)))
    here = toy.sweep(configs, threads=1)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        there = toy.sweep(configs, executor, checkpoints=tmp_path)
    for one, other in zip(here, there, strict=True):
        pd.testing.assert_frame_equal(one.losses, other.losses, check_exact=True)
    assert len(list(tmp_path.glob("*.pt"))) == 2
    for config, other in zip(configs, there, strict=True):
        assert toy.ToyResult.from_checkpoint(tmp_path / f"{toy.slug(config)}.pt").losses.equals(
            other.losses
        )


def test_the_archive_takes_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setitem(command.GRIDS, "fig3b", SMALL)
    place = ["--folder", str(tmp_path), "--results", str(tmp_path / "results")]
    output = tmp_path / "results" / "toy_fig3b.parquet"
    with pytest.raises(SystemExit, match=r"no shard of fig3b in .* is finished"):
        command.main(["fig3b", "assemble", *place])
    command.main(["fig3b", "run", *place, "--steps", "8"])
    command.main(["fig3b", "run", *place, "--shards", "0", "2"])
    command.main(["fig3b", "assemble", *place])
    assert "2 of 4 parts" in archive.load(output).caption
    assert toy.ToyResult.load(output).config == replace(SMALL, rhos=(0.0,))
    command.main(["fig3b", "assemble", *place, "--steps", "8"])
    whole = toy.ToyResult.load(output)
    assert whole.config == replace(SMALL, steps=8) and len(whole.losses) == 2 * 24


def test_a_shard_is_trained_by_one_process_only(tmp_path):
    with (
        _runs.claimed(tmp_path / "a.pt") as first,
        _runs.claimed(tmp_path / "a.pt") as second,
    ):
        assert first and not second
    with _runs.claimed(tmp_path / "a.pt") as again:
        assert again


@pytest.mark.parametrize("on", ["teacher", "both"])
def test_the_temperature_of_both_divides_the_students_logits_too(on):
    config = replace(ONE, temperature_on=on, temperatures=(0.5,))
    generator = torch.Generator().manual_seed(0)
    last = torch.randn((6, config.width), generator=generator, dtype=torch.float64)
    head = torch.randn((config.vocabulary, config.width), generator=generator, dtype=torch.float64)
    target = toy.targets(config, last, head, 0.5)
    # A student that is the teacher answers like it only if both are divided alike.
    own = toy.losses(config, last, head, 0.5, target).item()
    half = toy.losses(config, last, 2 * head, 0.5, target).item()
    assert own == pytest.approx(0, abs=1e-12) if on == "both" else own > 1e-3
    assert half == pytest.approx(0, abs=1e-12) if on == "teacher" else half > 1e-3
