"""The three regimes: exponents, thresholds, and the diagnostic on networks it has not seen."""

import numpy as np
import pandas as pd
import pytest

from depthutil import regimes, signatures
from depthutil.regimes import compositional, diagnose, ensemble, fit_exponent, measure, procedural

DEPTHS = (8, 16, 32, 64)


# ------------------------------------------------------------- losses and exponents


@pytest.mark.parametrize("setting", regimes.SETTINGS)
def test_exponents_are_those_of_the_derivation(setting):
    network, options, exponent = regimes.SETTINGS[setting]
    fit = fit_exponent(measure(network, DEPTHS, **options))
    # An asymptotic exponent may be off by what it drifts over the range, and by noise.
    assert abs(fit.exponent - exponent) < abs(fit.drift) + 3 * fit.stderr
    assert fit.stderr < 0.1
    assert fit.is_power_law


@pytest.mark.parametrize("flow", regimes.FLOWS)
@pytest.mark.parametrize("order", [1, 2])
def test_flows_agree_on_the_incoherent_exponent(flow, order):
    frame = measure(procedural, DEPTHS, order=order, errors="incoherent", flow=flow)
    fit = fit_exponent(frame)
    assert abs(fit.exponent - (2 * order + 1)) < 4 * fit.stderr < 0.6


def test_ensemble_loss_is_noise_squared_over_depth():
    for noise in (0.5, 3.0):
        loss = measure(ensemble, [20], seeds=range(16), noise=noise)["loss"]
        assert abs(loss.mean() - noise**2 / 20) < 4 * loss.sem()


def test_shared_errors_leave_a_floor_that_is_not_a_power_law():
    frame = measure(ensemble, DEPTHS, noise=2.0, shared=0.25)
    deepest = frame.query("depth == 64")["loss"]
    assert abs(deepest.mean() - 4 * (0.25 + 0.75 / 64)) < 4 * deepest.sem()
    assert not fit_exponent(frame).is_power_law


@pytest.mark.parametrize("folds", [2, 5, 9])
def test_folds_have_a_threshold_that_moves_with_folds(folds):
    loss = measure(compositional, range(1, folds + 3), seeds=range(4), folds=folds)
    mean = loss.groupby("depth")["loss"].mean()
    assert mean[: folds - 1].between(0.98, 1.02).all()
    assert (mean[folds:] == 0).all()


def test_folded_states_are_the_tent_map_up_to_mirroring():
    run = compositional(4, folds=4, width=5, inputs=300, seed=3)
    wave = regimes.tent(run.states[0], 4)
    cell = (run.states[-1] - run.states[-1].min(axis=0)) * 2**4
    # Cells are known only up to where inputs fell; strips may end up mirrored.
    same, mirrored = abs(cell - wave).max(axis=0), abs(1 - cell - wave).max(axis=0)
    assert np.minimum(same, mirrored).max() < 0.05


def test_levels_stop_inputs_and_average_the_thresholds():
    levels = np.repeat([1, 2, 3, 4], 200)
    run = compositional(2, folds=4, levels=levels, inputs=800)
    assert abs(run.loss - 0.5) < 0.02
    moved = np.abs(np.diff(run.states, axis=0)).sum(axis=2) > 0
    assert not moved[1, levels == 1].any()
    assert moved[1, levels > 1].all()


def test_learned_folds_need_as_many_layers_as_folds():
    learned = regimes.learn_folds(3, depths=[2, 3], seeds=12)
    best = learned.frame.groupby("depth")["loss"].min()
    assert best[2] > 0.5
    assert best[3] < 0.01
    assert learned.outputs.shape == (2, 12, len(learned.x))


def test_learned_losses_respect_the_bound_of_counting_pieces():
    folds = 4
    frame = regimes.learn_folds(folds, depths=[1, 2, 3], seeds=8).frame
    bound = 1 - (2.0 ** frame["depth"] - 1) / 2 ** (folds - 1)
    assert (frame["loss"] > bound).all()


def test_measure_all_is_complete_and_quick():
    frame = regimes.measure_all(depths=(4, 8), folds=4, seeds=[0, 1])
    assert list(frame.columns) == ["depth", "seed", "loss", "regime", "setting", "exponent"]
    assert set(frame["regime"]) == {"ensemble", "procedural", "compositional"}
    assert frame.drop(columns="exponent").notna().all(axis=None)


def test_fit_recovers_exponents_and_their_errors():
    rng = np.random.default_rng(0)
    depths = np.array([2, 4, 8, 16, 32])
    clean = 5.0 * depths**-1.5
    z = []
    for _ in range(200):
        noisy = clean[:, None] * np.exp(0.1 * rng.standard_normal((5, 8)))
        fit = fit_exponent(depths, noisy)
        z.append((fit.exponent - 1.5) / fit.stderr)
    assert 0.8 < np.std(z) < 1.5  # t distribution with 7 degrees of freedom: 1.18
    one = fit_exponent(depths, clean * np.exp(0.01 * rng.standard_normal(5)), 0.01 * clean)
    assert abs(one.exponent - 1.5) < 4 * one.stderr
    assert one.stderr == pytest.approx(np.sqrt(1e-4 / np.log(2) ** 2 / 10), rel=0.02)
    assert one.prefactor == pytest.approx(5.0, rel=0.05)


# ------------------------------------------------------------- the diagnostic


def tree(depth, inputs=200, width=24, seed=0):
    """A pointer that climbs a random tree to its root: levels, with words for nodes."""
    rng = np.random.default_rng(seed)
    words = rng.standard_normal((200, width))
    parent = np.array([0, *(rng.integers(max(0, i - 20), i) for i in range(1, 200))])
    node = rng.integers(0, 200, inputs)
    states = [words[node]]
    for _ in range(depth):
        node = parent[node]
        states.append(words[node])
    return np.stack(states)


def regressions(depth, inputs=200, width=16, seed=0):
    """Layers that are fitted to the same change, each on its own few noisy examples."""
    rng = np.random.default_rng(seed)
    change = rng.standard_normal((width, width)) / np.sqrt(width)
    x = rng.standard_normal((inputs, width))
    writes = []
    for _ in range(depth):
        examples = rng.standard_normal((3 * width, width))
        answers = examples @ change + 2 * rng.standard_normal((3 * width, width))
        writes.append(x @ np.linalg.lstsq(examples, answers, rcond=None)[0] / depth)
    return np.concatenate([x[None], x + np.cumsum(writes, axis=0)])


def lorenz(x):
    """Lorenz's model of 1996, a chaotic ring, slowed down."""
    ahead, behind, two_behind = np.roll(x, -1, 1), np.roll(x, 1, 1), np.roll(x, 2, 1)
    return 0.3 * ((ahead - two_behind) * behind - x + 4.0)


@pytest.mark.parametrize("seed", range(100, 112))
def test_held_out_networks_are_named(seed):
    rng = np.random.default_rng(seed)
    depth, width = int(rng.integers(10, 40)), int(rng.choice([16, 24, 48, 96]))
    common = {"width": width, "inputs": 120, "seed": seed}
    one = ensemble(depth, noise=rng.uniform(0.3, 3), **common)
    assert diagnose(one.states).regime == "ensemble"
    two = procedural(
        depth,
        order=int(rng.integers(1, 3)),
        errors=str(rng.choice(["coherent", "incoherent"])),
        flow=str(rng.choice(list(regimes.FLOWS))),
        **common,
    )
    assert diagnose(two.states).regime == "procedural"
    three = compositional(
        depth,
        folds=int(rng.integers(5, 30)),
        levels=str(rng.choice(["same", "mixed"])),
        **common,
    )
    assert diagnose(three.states).regime == "compositional"


@pytest.mark.parametrize("seed", range(4))
def test_networks_of_other_makes_are_named(seed):
    assert diagnose(regressions(16, seed=seed)).regime == "ensemble"
    flow = procedural(12, flow=lorenz, inputs=100, seed=seed)
    assert diagnose(flow.states).regime == "procedural"
    assert diagnose(tree(16, seed=seed)).regime == "compositional"


def random_walk(depth=16, width=32, inputs=200, seed=0, persistence=0.0, common=0.0):
    rng = np.random.default_rng(seed)
    writes = rng.standard_normal((depth, inputs, width))
    for layer in range(1, depth):
        fresh = np.sqrt(1 - persistence**2) * writes[layer]
        writes[layer] = persistence * writes[layer - 1] + fresh
    writes += common * rng.standard_normal((inputs, width))
    return np.concatenate([np.zeros((1, inputs, width)), np.cumsum(writes, axis=0)])


UNDETERMINED = {
    "random walk": (random_walk(), "random walk"),
    "random linear layers": (
        ensemble(16, noise=1e6, seed=5).states,
        "random walk",
    ),
    "half smooth": (random_walk(persistence=0.5, common=1.0), "neither smooth"),
    "independent states": (
        np.random.default_rng(0).standard_normal((17, 200, 32)),
        "undo each other",
    ),
    "no noise": (ensemble(16, noise=0.0).states, "straight"),
    "straight flow": (
        procedural(16, flow=lambda x: np.ones_like(x), width=8).states,
        "straight",
    ),
    "few layers": (ensemble(4).states, "layers are too few"),
    "few inputs": (ensemble(16, inputs=8).states, "inputs are too few"),
    "smooth, ends apart": (
        np.exp(-np.linspace(0, 1, 17)[:, None, None] * np.geomspace(0.3, 30, 200)[:, None])
        * np.random.default_rng(0).standard_normal((200, 32))
        + 0.3 * np.sin(np.linspace(0, 1, 17))[:, None, None] * np.eye(32)[np.arange(200) % 32],
        "end together",
    ),
    "unequal members": (
        np.concatenate(
            [
                np.zeros((1, 200, 32)),
                np.cumsum(
                    0.5 ** np.arange(12)[:, None, None]
                    * np.diff(random_walk(12, common=1.0), axis=0),
                    axis=0,
                ),
            ]
        ),
        "unequal members",
    ),
}


@pytest.mark.parametrize("case", UNDETERMINED)
def test_what_cannot_be_told_is_said_with_a_reason(case):
    states, words = UNDETERMINED[case]
    diagnosis = diagnose(states)
    assert diagnosis.regime == "undetermined", diagnosis
    assert words in str(diagnosis)
    assert diagnosis.margin == 0


def test_random_networks_are_rarely_taken_for_an_ensemble():
    found = [diagnose(random_walk(seed=seed, inputs=50, width=8)).regime for seed in range(200)]
    assert found.count("undetermined") >= 197  # three standard errors: 1 in 700, one-sided


def test_partly_shared_errors_still_look_like_an_ensemble():
    # The shared part is the same in every layer: from states alone, it is part of the change.
    assert diagnose(ensemble(16, shared=0.5).states).regime == "ensemble"


def test_signature_of_an_ensemble_is_flat_and_predicts_the_loss():
    noise, depth = 2.0, 24
    run = ensemble(depth, noise=noise, width=128, inputs=400)
    s = signatures.signature(run.states)
    assert abs(s.agreement - 1 / (1 + noise**2)) < 4 * s.agreement_stderr + 0.01
    assert np.ptp(s.lag_cosine[: depth // 2]) < 0.05
    assert (1 / s.agreement - 1) / depth == pytest.approx(run.loss, rel=0.1)
    assert s.evenness > 0.99


def test_standard_errors_cover_the_spread_over_networks():
    def z(seed):
        s = signatures.signature(ensemble(12, noise=2.0, seed=seed, inputs=100).states)
        return (s.agreement - 0.2) / s.agreement_stderr, s.memory / s.memory_stderr

    spread = np.std([z(seed) for seed in range(60)], axis=0)
    assert (spread < 1.7).all()
    assert (spread > 0.3).all()


def test_signature_ignores_rotation_scale_and_order_of_inputs():
    states = compositional(9, folds=7, levels="mixed", width=12).states
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    other = 5.0 * (states @ rotation)[:, rng.permutation(256)]
    a, b = signatures.signature(states), signatures.signature(other)
    pd.testing.assert_series_equal(a.summary(), b.summary())
    np.testing.assert_allclose(5 * a.update_norms, b.update_norms)


def test_signature_from_the_gram_matrix_is_the_same():
    states = ensemble(8).states
    a = signatures.signature(states)
    b = signatures.signature(gram_matrix=signatures.gram(states))
    pd.testing.assert_series_equal(a.summary(), b.summary())


def test_torch_tensors_of_low_precision_are_read():
    torch = pytest.importorskip("torch")
    states = torch.tensor(ensemble(16).states, dtype=torch.bfloat16, requires_grad=True)
    assert diagnose(states).regime == "ensemble"


def test_inputs_that_never_move_are_left_out():
    states = np.concatenate([ensemble(8).states, np.ones((9, 5, 32))], axis=1)
    assert signatures.signature(states).inputs == 256


# ------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ensemble(0), "depth is a whole number"),
        (lambda: ensemble(2.5), "not 2.5"),
        (lambda: ensemble(4, noise=-1), "not -1"),
        (lambda: ensemble(4, noise=float("nan")), "not nan"),
        (lambda: ensemble(4, shared=2), "between 0 and 1, not 2"),
        (lambda: procedural(4, order=3), "not 3"),
        (lambda: procedural(4, errors="random"), "'coherent' or 'incoherent'"),
        (lambda: procedural(4, flow="water"), "swirl"),
        (lambda: procedural(4, flow=np.zeros_like), "ends elsewhere"),
        (lambda: compositional(4, folds=0), "folds is a whole number"),
        (lambda: compositional(4, folds=60), "40 or fewer"),
        (lambda: compositional(4, levels="some"), "'mixed'"),
        (lambda: compositional(4, levels=[1, 2]), "256 numbers"),
        (lambda: compositional(4, folds=3, inputs=2, levels=[1, 4]), "from 1 to 4"),
        (lambda: regimes.learn_folds(2, []), "depths is empty"),
        (lambda: regimes.learn_folds(2, [0]), "not 0"),
        (lambda: fit_exponent([1, 2], [1.0, 0.5]), "3 different depths"),
        (lambda: fit_exponent([1, 2, 4], [1.0, 0.5]), "(depths, seeds)"),
        (lambda: fit_exponent([1, 2, 4], [1.0, 0.5, 0.0]), "smallest loss is 0.0"),
        (lambda: fit_exponent([1, 2, 4], np.ones((3, 2)), np.ones(3)), "one loss a depth"),
        (lambda: diagnose(np.zeros((5, 4))), "(5, 4)"),
        (lambda: diagnose(np.full((9, 20, 4), np.nan)), "states[0]"),
        (lambda: diagnose(np.zeros((9, 20, 4))), "no input moves"),
        (lambda: signatures.signature(), "either states or gram_matrix"),
        (lambda: signatures.signature(gram_matrix=np.ones((2, 3))), "(2, 3)"),
        (lambda: signatures.signature(ensemble(1).states), "1 layers"),
    ],
)
def test_bad_input_gets_one_clear_sentence(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
