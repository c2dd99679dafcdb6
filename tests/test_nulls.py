import copy

import pytest
import torch
from test_models import build

from depthutil import nulls


@pytest.fixture(params=["gpt2", "llama", "gemma2"])
def model(request):
    return build(request.param)


def state(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("make", [nulls.untrained, nulls.shuffled])
def test_nulls_have_the_same_shape_and_leave_the_model_and_the_random_state(model, make):
    before, rng = state(model), torch.random.get_rng_state()
    one, again, other = make(model, 3), make(model, 3), make(model, 4)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    for name, weight in one.state_dict().items():
        assert weight.shape == before[name].shape and weight.dtype == before[name].dtype
        assert torch.equal(weight, again.state_dict()[name])
    assert any(not torch.equal(w, other.state_dict()[name]) for name, w in one.state_dict().items())
    assert not one.training


def test_tied_weights_stay_tied(model):
    one = nulls.shuffled(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (one.get_input_embeddings().weight is one.get_output_embeddings().weight) == tied


def test_the_spread_of_new_weights_can_be_given(model):
    wide = nulls.untrained(model, std=0.5).get_input_embeddings().weight
    assert wide.std().item() == pytest.approx(0.5, rel=0.2)
    assert model.config.initializer_range != 0.5


def test_precision_is_the_models(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert nulls.untrained(half).dtype == nulls.shuffled(half).dtype == torch.bfloat16
