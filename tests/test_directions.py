"""Directions of updates, on paths and layers of which the answer is known."""

import itertools

import numpy as np
import pytest
import torch

from depthutil import directions, gram
from depthutil.signatures import evenness


def test_angles_keep_their_digits():
    for size in (1e-9, 1e-4, 1.0):
        x = torch.tensor([1.0, 0.0], dtype=torch.float64)
        y = torch.tensor([np.cos(size), np.sin(size)], dtype=torch.float64)
        assert directions.angle(x, 3 * y).item() == pytest.approx(size, rel=1e-7)
    assert directions.angle(x, -x).item() == pytest.approx(np.pi)


def test_cosines_are_means_over_each_document():
    rng = np.random.default_rng(0)
    writes = rng.standard_normal((3, 10, 5))
    documents = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    found = directions.cosines(writes, documents)
    unit = writes / np.linalg.norm(writes, axis=-1, keepdims=True)
    for d, i, j in itertools.product(range(3), range(3), range(3)):
        mine = (unit[i] * unit[j]).sum(-1)[documents == d].mean()
        assert found[d, i, j] == pytest.approx(mine)
    assert directions.cosines(torch.from_numpy(writes)).shape == (1, 3, 3)


def test_lags_are_diagonals_with_errors_over_documents():
    rng = np.random.default_rng(0)
    matrices = rng.standard_normal((7, 5, 5))
    table = directions.by_lag(matrices)
    assert table.index.tolist() == [1, 2, 3, 4] and table.index.name == "lag"
    each = np.array([np.diagonal(m, 2).mean() for m in matrices])
    assert table.loc[2, "mean"] == pytest.approx(each.mean())
    assert table.loc[2, "stderr"] == pytest.approx(each.std(ddof=1) / np.sqrt(7))
    assert directions.by_lag(matrices[:1])["stderr"].isna().all()


def test_the_order_test_counts_orders():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((4, 4))
    matrix = matrix + matrix.T
    orders = [list(order) for order in itertools.permutations(range(4))]
    chance = np.array([matrix[o[:-1], o[1:]].mean() for o in orders])
    found = directions.order_test(matrix)
    assert found["neighbours"] == pytest.approx(np.diagonal(matrix, 1).mean())
    assert found["any order"] == pytest.approx(chance.mean())
    assert found["spread"] == pytest.approx(chance.std())
    assert found["p"] == pytest.approx((chance >= found["neighbours"] - 1e-12).mean())


def test_an_order_is_found_where_there_is_one_and_only_there():
    rng, p = np.random.default_rng(1), {"fading": [], "none": []}
    place = np.arange(9)
    for _ in range(30):
        noise = rng.standard_normal((9, 9)) * 0.1
        noise = noise + noise.T
        fading = np.exp(-abs(np.subtract.outer(place, place)) / 3)
        p["fading"].append(directions.order_test(fading + noise, draws=200)["p"])
        p["none"].append(directions.order_test(noise, draws=200)["p"])
    assert max(p["fading"]) < 0.02
    assert 0.3 < np.mean(p["none"]) < 0.7 and np.mean(np.array(p["none"]) < 0.05) < 0.2
    for shape in ((2, 2), (3, 4), (3,)):
        with pytest.raises(ValueError, match="an order needs three layers or more"):
            directions.order_test(np.ones(shape))
    with pytest.raises(ValueError, match="draws"):
        directions.order_test(fading, draws=0)


def test_directions_that_are_used_are_counted():
    rng = np.random.default_rng(0)
    plane = np.zeros((5000, 20))
    plane[:, :2] = rng.standard_normal((5000, 2))
    assert directions.participation_ratio(plane) == pytest.approx(2, abs=0.05)
    assert directions.participation_ratio(rng.standard_normal((5000, 20))) > 19


def test_a_straight_path_is_its_chord_and_a_walk_is_longer():
    turn = np.linspace(0, 1.0, 9)
    arc = np.stack([np.cos(turn), np.sin(turn)], -1)[:, None]
    path, chord = directions.path_and_chord(gram.of_states(arc))
    assert path == pytest.approx(1.0) and chord == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    start = 30 * np.eye(1, 500)
    walk = np.concatenate([start[None], rng.standard_normal((40, 1, 500)) / 22]).cumsum(0)
    path, chord = directions.path_and_chord(gram.of_states(walk))
    assert path / chord == pytest.approx(np.sqrt(40), rel=0.15)


def test_progress_tells_straightness_from_evenness():
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((50, 30, 400))
    walk = np.concatenate([np.zeros((1, 30, 400)), steps]).cumsum(0)
    projection, cosine = directions.progress(gram.of_states(walk))
    even = np.arange(51) / 50
    assert np.abs(projection.mean(1) - even).max() < 0.05
    assert np.abs(cosine.mean(1) - np.sqrt(even[1:])).max() < 0.05
    straight = np.arange(6)[:, None, None] * np.ones((1, 2, 3))
    projection, cosine = directions.progress(gram.of_states(straight))
    assert np.allclose(projection, np.arange(6)[:, None] / 5) and np.allclose(cosine, 1)


def test_references_have_the_lengths_of_the_model_and_one_cosine():
    rng = np.random.default_rng(0)
    g = gram.of_states(rng.standard_normal((6, 4, 50)).cumsum(0))
    for cosine in (0.0, 0.3, 1.0):
        made = directions.with_cosine(g, cosine)
        assert np.allclose(np.diagonal(made, 0, 1, 2)[:, 1:], np.diagonal(g, 0, 1, 2)[:, 1:])
        size = np.sqrt(np.diagonal(g, 0, 1, 2))
        assert np.allclose(made[:, 1, 4], cosine * size[:, 1] * size[:, 4])
        assert not made[:, 0].any()


def test_evenness_is_one_for_equal_sizes_and_one_nth_for_one():
    assert evenness(np.ones((2, 7))) == pytest.approx(1)
    assert evenness(np.eye(5)) == pytest.approx(0.2)
