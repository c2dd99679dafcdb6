"""What averaging fixes at one is one where layers average, and what pairs of models gain."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from depthutil import evidence, models


def test_a_network_that_averages_lies_at_one_and_no_trained_one_does():
    cost = evidence.cost_of_a_layer().set_index("network")
    assert cost.loc[evidence.BUILT, "mean"] == pytest.approx(1, abs=0.1)
    trained = cost.drop(evidence.BUILT)
    assert (trained["low"] > 1.5).all() and len(trained) == 5
    assert (cost["low"] <= cost["mean"]).all() and (cost["mean"] <= cost["high"]).all()
    # Training on makes up for most of it.
    assert cost.loc[evidence.HEALED, "high"] < cost.loc[evidence.LADDER, "mean"]


@pytest.mark.skipif(not (ROOT / "models").exists(), reason="needs the models that come with it")
def test_the_ladders_gain_is_hardly_variance():
    share = evidence.share_of_variance(draws=50).set_index(["network", "depths"])
    assert share.loc[(evidence.BUILT, "1 to 16"), "mean"] == pytest.approx(1, abs=0.02)
    ours = share.loc[(evidence.LADDER, "1 to 16")]
    assert ours["low"] < ours["mean"] < ours["high"] < 0.2
    # From deep to shallow it is the same share.
    back = evidence.share_of_variance((16, 1), draws=2).set_index("network")
    assert back.loc[evidence.LADDER, "mean"] == pytest.approx(ours["mean"])


@pytest.mark.parametrize("depth", [1, 0, float("nan")])
def test_a_single_layer_has_no_worth(depth):
    with pytest.raises(ValueError, match=f"{depth} is below 2"):
        evidence.worth(1.0, 1.0, depth)


@pytest.mark.parametrize("depths", [(4, 4), (4,), (1, 4, 16)])
def test_a_gain_is_between_two_depths(depths):
    with pytest.raises(ValueError, match="between two depths"):
        evidence.share_of_variance(depths)


@pytest.mark.parametrize("draws", [0, -1, 1.5])
def test_draws_are_counted(draws):
    with pytest.raises(ValueError, match="draws"):
        evidence.cost_of_a_layer(draws)


class Fixed(torch.nn.Module):
    """A model whose logits do not depend on what it reads."""

    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask, use_cache=False):
        return type("Output", (), {"logits": self.logits[: len(input_ids), : input_ids.shape[1]]})


def test_a_pair_loses_less_by_what_it_gains():
    draw = torch.Generator().manual_seed(0)
    one, other = (Fixed(torch.randn(6, 9, 5, generator=draw)) for _ in range(2))
    ids = torch.randint(5, (6, 9), generator=draw)
    mask = torch.ones(6, 9, dtype=torch.long)
    mask[0, 4:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    pair = models.pair_losses(one, other, batches)
    both = (models.losses(one, batches) + models.losses(other, batches)) / 2
    np.testing.assert_allclose(pair["loss"], both, rtol=1e-6)
    mean = Fixed((one.logits.log_softmax(-1) + other.logits.log_softmax(-1)) / 2)
    np.testing.assert_allclose(pair["loss"] - pair["gain"], models.losses(mean, batches), rtol=1e-5)
    assert pair["tokens"].tolist() == [3, 8, 8, 8, 8, 8] and (pair["gain"] > 0).all()
    same = models.pair_losses(one, one, batches)
    np.testing.assert_allclose(same["gain"], 0, atol=1e-12)
    with pytest.raises(ValueError, match="of 5 and 4 tokens"):
        models.pair_losses(one, Fixed(other.logits[..., :4]), batches)


def test_both_numbers_are_drawn_line_by_line():
    rows = {"network": ["a", evidence.BUILT], "mean": 2.0, "low": 1.0, "high": 3.0}
    table = pd.DataFrame(rows).assign(depths="1 to 2")
    fig = evidence.draw(table, table.iloc[:1].copy())
    named = [[label.get_text() for label in ax.get_yticklabels()] for ax in fig.axes]
    assert named == [["a", evidence.BUILT], ["a, 1 to 2 layers"]]
