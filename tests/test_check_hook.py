"""What is asked of a check cell: that it ran, and that spoilt data makes it fail."""

import check_hook
import numpy as np
import pandas as pd
import pytest
import torch


def killed(source, **namespace):
    namespace = {"np": np, "pd": pd, **namespace}
    before = {name: repr(value) for name, value in namespace.items()}
    exec(source, dict(namespace))  # passes
    asked = check_hook.ask(source, namespace)
    assert {name: repr(value) for name, value in namespace.items()} == before
    return [bool(a["ran"] and a["held"] and a["by"]) for a in asked]


GOOD = {
    "a number": ("assert abs(x - 2) < 0.1", {"x": 2.0}),
    "a sign": ("assert (x > 0).all()", {"x": np.array([1.0, 2.0])}),
    "an order": ("assert x.argmax() == 2", {"x": np.array([1.0, 2.0, 3.0])}),
    "a table": (
        "assert t.loc['a', 'v'] < t.loc['b', 'v']",
        {"t": pd.DataFrame({"v": [1.0, 2.0]}, ["a", "b"])},
    ),
    "a tensor": ("assert x.std() > 0.5", {"x": torch.tensor([0.0, 2.0])}),
    "a dict": ("assert d['small'] < d['large']", {"d": {"small": 1.0, "large": 2.0}}),
    "a verdict": ("assert ok", {"ok": True}),
    "in a loop": ("for x in xs:\n    assert x < 3", {"xs": [1.0, 2.0]}),
    "a function": ("assert f(2) == 4", {"f": lambda x: 2 * x}),
    "a word": (
        "assert (t.regime != 'flow').all()",
        {"t": pd.DataFrame({"regime": ["a", "b"], "n": [1.0, 2.0]})},
    ),
    "computed": ("gaps = [abs(x - 2.0)]\nassert max(gaps) < 1e-9", {"x": 2.0}),
    "a small one": ("gap = float(abs(np.arange(3) - np.arange(3)).max())\nassert gap < 1e-9", {}),
    "through a name": ("y = x * 2\nassert y < 5", {"x": 2.0}),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_check_of_data_can_fail(name):
    source, namespace = GOOD[name]
    assert killed(source, **namespace) == [True]


BAD = {
    "itself": ("assert (x == x.copy()).all()", {"x": np.array([1.0, 2.0])}),
    "always": ("assert len(x) == 2", {"x": np.array([1.0, 2.0])}),
    "a constant": ("assert 1 < 2", {}),
    "empty": ("for x in []:\n    assert x > 0", {}),
    "left out": ("if len(x) > 5:\n    assert x.sum() > 0", {"x": np.array([1.0, 2.0])}),
    "far below": ("assert x.sum() < 1e12", {"x": np.array([1.0, 2.0])}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_check_that_cannot_fail_is_found(name):
    source, namespace = BAD[name]
    namespace = {**namespace, "np": np}
    (asked,) = check_hook.ask(source, namespace)
    # Numbers that are missing are not below anything, so that only the last two depend on data.
    assert not (asked["ran"] and asked["by"]) or "missing" in asked["by"]


def test_each_assertion_is_asked_by_itself():
    source = "assert x > 0\nassert len(y) == 2\nassert y[1] > y[0]"
    assert killed(source, x=1.0, y=[1.0, 2.0]) == [True, False, True]


def test_random_states_and_figures_are_left_alone():
    import matplotlib.pyplot as plt

    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    source = (
        "import matplotlib.pyplot as plt\nplt.figure()\nprint('seen')\n"
        "z = rng.normal() + torch.rand(1, generator=g).item() + np.random.rand()\n"
        "assert z < x"
    )
    namespace = {"np": np, "torch": torch, "plt": plt, "rng": rng, "g": generator, "x": 99.0}
    before = rng.bit_generator.state, generator.get_state(), torch.get_rng_state()
    figures = plt.get_fignums()
    (asked,) = check_hook.ask(source, namespace)
    assert asked["ran"] and asked["by"]
    assert rng.bit_generator.state == before[0]
    assert torch.equal(generator.get_state(), before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert plt.get_fignums() == figures and "z" not in namespace


def test_it_ends_in_time():
    import time

    source = "w = sum(i for i in range(3_000_000))\nassert len(x) == 2"
    begin = time.process_time()
    check_hook.ask(source, {"x": [1, 2]}, seconds=0.3)
    assert time.process_time() - begin < 3
