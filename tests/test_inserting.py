"""Blocks put between others: their order, their weights by hand, and laws that can be learned."""

import copy

import pytest
import torch
from test_interventions import any_family, every, logits
from test_models import FAMILIES, OTHERS, build, tokens
from torch import nn

from depthutil import interventions as iv
from depthutil import models, surgery
from depthutil.stream import anatomy
from depthutil.surgery import inserting


def blocks(model):
    return anatomy(model).blocks


def weights(block):
    return {name: w.detach().clone() for name, w in block.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def insert(model, *given, **more):
    """A copy of the model with new blocks; the predictor learns no longer than it must."""
    return surgery.insert(copy.deepcopy(model), *given, **{"epochs": 1, **more})


# Any family -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["predicted", "mean", "copy"])
@every
def test_new_blocks_come_where_they_should_and_stay(family, method, tmp_path):
    model, ids = any_family(family), tokens()
    before = [weights(block) for block in blocks(model)]
    outside = {n: w for n, w in model.state_dict().items() if all(f".{i}." not in n for i in "012")}
    longer = insert(model, [1, 0], method)
    assert longer.config.num_hidden_layers == anatomy(longer).depth == 5
    found = [weights(block) for block in blocks(longer)]
    assert [next((i for i, b in enumerate(before) if same(b, f)), None) for f in found] == (
        [0, 0, 1, 1, 2] if method == "copy" else [0, None, 1, None, 2]
    )
    shapes = [{name: w.shape for name, w in each.items()} for each in found]
    assert all(each == shapes[0] for each in shapes)
    now = longer.state_dict()
    assert outside and all(torch.equal(w, now[name]) for name, w in outside.items())
    assert surgery.sharing(longer) == list(range(5))
    for number, block in enumerate(blocks(longer)):
        for module in block.modules():
            assert getattr(module, "layer_idx", None) in (None, number)
    expected = logits(longer, ids, use_cache=False)
    assert torch.isfinite(expected).all()
    longer.save_pretrained(tmp_path)
    loaded = type(longer).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids, use_cache=False), expected)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (loaded.generate(ids, **how, use_cache=u) for u in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_identities_change_nothing_and_can_be_trained(family, precision):
    model, ids = build(family).to(precision), tokens()
    longer = insert(model, [0, 1, 2], "identity")
    assert anatomy(longer).depth == 6
    assert torch.equal(logits(longer, ids), logits(model, ids))
    new, old = blocks(longer)[1], weights(blocks(longer)[0])
    zero = [name for name, w in new.named_parameters() if not w.any()]
    assert 2 <= len(zero) <= 4 and all(
        torch.equal(w, old[name]) for name, w in new.named_parameters() if name not in zero
    )
    longer.float()(ids, labels=ids, use_cache=False).loss.backward()
    written = [w.grad for name, w in new.named_parameters() if name in zero and w.dim() > 1]
    assert len(written) == 2 and all(grad.abs().max() > 0 for grad in written)


@pytest.mark.parametrize("family", OTHERS)
def test_identities_are_refused_where_what_writes_is_not_known(family):
    model = any_family(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"which weights of a block .* is not known"):
        surgery.insert(model, 0, "identity")
    assert anatomy(model).depth == 3 and same(before, model.state_dict())


# What the weights are -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_means_are_half_way(family):
    model = any_family(family)
    one, other = (weights(block) for block in blocks(model)[1:])
    for name, weight in weights(blocks(insert(model, 1, "mean"))[2]).items():
        assert torch.allclose(weight, (one[name] + other[name]) / 2, atol=1e-6), name
    half = model.bfloat16()
    one, other = (weights(block) for block in blocks(half)[1:])
    for name, weight in weights(blocks(insert(half, 1, "mean"))[2]).items():
        exact = ((one[name].double() + other[name].double()) / 2).bfloat16()
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, exact), name


def test_copies_run_twice():
    model, ids = build("llama"), tokens()
    batch = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    with iv.repeat(model, 2, 2):
        expected = models.losses(model, batch)
    assert models.losses(insert(model, 2, "copy"), batch) == pytest.approx(expected, abs=1e-6)


def test_only_matrices_are_predicted():
    model = build("gpt2")
    mean, guess = (weights(blocks(insert(model, 0, way))[1]) for way in ("mean", "predicted"))
    for name, weight in mean.items():
        assert torch.equal(weight, guess[name]) == (weight.dim() == 1), name


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 6, 20), (3, 20, 4)])
def test_matrices_are_put_together_again(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    basis, scores = inserting._decomposed(stack)
    rank = min(shape[1], shape[0] * shape[2])
    assert basis.shape == (shape[1], rank) and scores.shape == (shape[0], rank, shape[2])
    assert torch.allclose((basis @ scores.double()).float(), stack, atol=1e-5)
    side = torch.cat(list(stack), 1).double()
    sizes = torch.linalg.svdvals(side)
    assert torch.allclose(basis.norm(dim=0).sort(descending=True).values, sizes[:rank])
    flat = scores.double().transpose(0, 1).flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(rank).double(), atol=1e-5)


def lawful(law, depth=14):
    """A model whose block at each place has the weights that a law says, and those between."""
    model = build("llama", num_hidden_layers=depth)
    ends = [weights(block) for block in blocks(model)[:2]]

    def at(place):
        return {name: law(place / depth, *(end[name] for end in ends)) for name in ends[0]}

    with torch.no_grad():
        for number, block in enumerate(blocks(model)):
            for name, weight in block.named_parameters():
                weight.copy_(at(number)[name])
    return model, at


LAWS = {
    "line": lambda t, one, other: one + t * other,
    "circle": lambda t, one, other: one * torch.cos(torch.tensor(4 * t)) + other * 4 * t,
}


@pytest.mark.parametrize("law", LAWS)
def test_a_law_in_depth_is_learned(law):
    model, at = lawful(LAWS[law])
    guess, copied = (
        weights(blocks(insert(model, 6, way, epochs=150))[7]) for way in ("predicted", "copy")
    )
    for name, truth in at(6.5).items():
        errors = [(each[name] - truth).norm() / truth.norm() for each in (guess, copied)]
        if truth.dim() == 2:
            assert errors[0] < 0.5 * errors[1], name
    cosines = [
        torch.cosine_similarity(guess[name].flatten(), truth.flatten(), dim=0)
        for name, truth in at(6.5).items()
    ]
    assert min(cosines) > 0.999


def test_a_law_that_the_mean_does_not_know():
    """Three kinds in turn that sum to zero: between two is the third, minus their sum."""

    def turn(t, one, other):
        angle = torch.tensor(14 * t * 2 * torch.pi / 3)
        return one * torch.cos(angle) + other * torch.sin(angle)

    model, at = lawful(turn)
    surgery.drop(model, 7)
    guess, mean = (
        weights(blocks(insert(model, 6, way, epochs=150))[7]) for way in ("predicted", "mean")
    )
    for name, truth in at(7).items():
        if truth.dim() == 2:
            cosines = [
                torch.cosine_similarity(each[name].flatten(), truth.flatten(), dim=0)
                for each in (guess, mean)
            ]
            assert cosines[0] > 0.99 and cosines[1] < -0.99, name


def test_what_has_no_law_is_not_learned():
    """Weights of independent blocks tell nothing of each other: what is predicted is noise."""
    model = build("llama", num_hidden_layers=8, hidden_size=32, intermediate_size=48)
    truth = weights(blocks(model)[4])
    guess = weights(blocks(insert(surgery.drop(model, 4), 3, epochs=10))[4])
    for name, weight in truth.items():
        if weight.dim() == 2:
            cosine = torch.cosine_similarity(guess[name].flatten(), weight.flatten(), dim=0)
            assert abs(cosine) < 0.2 and guess[name].norm() > 0.1 * weight.norm(), name


def test_zeros_stay_zeros():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    guess = weights(blocks(surgery.insert(model, 0, epochs=1))[1])
    lora = [w for name, w in guess.items() if "lora_B" in name]
    assert anatomy(model).depth == 4 and lora and not any(w.any() for w in lora)


# Chance, places, optimizers -------------------------------------------------------------


def test_the_seed_decides_and_nothing_else():
    model = build("llama", num_hidden_layers=4)
    torch.manual_seed(7)
    one = insert(model, 1).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))  # the global state was left alone
    with torch.no_grad():
        again = insert(model, 1).state_dict()
    assert same(one, again) and not same(one, insert(model, 1, seed=1).state_dict())


def test_several_at_once_are_those_of_one_at_a_time():
    model = build("llama", num_hidden_layers=4)
    both = insert(model, [0, 2])
    assert same(surgery.drop(both, 1).state_dict(), insert(model, 2).state_dict())


@pytest.mark.parametrize("method", inserting.WAYS)
def test_the_optimizer_follows(method):
    model, ids = build("llama"), tokens()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(ids, labels=ids).loss.backward()
    adam.step()
    adam.zero_grad()
    surgery.insert(model, 0, method, epochs=1, optimizer=adam)
    held = [w for group in adam.param_groups for w in group["params"]]
    assert set(held) == set(model.parameters()) and len(held) == len(set(held))
    old = dict(blocks(model)[0].named_parameters())
    for name, weight in blocks(model)[1].named_parameters():
        assert (weight in adam.state) == torch.equal(weight, old[name]), name
        if weight in adam.state:
            moment = adam.state[weight]["exp_avg"]
            assert torch.equal(moment, adam.state[old[name]]["exp_avg"])
    model(ids, labels=ids).loss.backward()
    adam.step()


# Never a silent wrong model -------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((3,), "whole numbers from 0 to 2"),
        ((-1,), "whole numbers from 0 to 2"),
        ((0.5,), "whole numbers from 0 to 2"),
        (([],), "at least one"),
        (([1, 1],), "names a place twice"),
        ((2,), "behind block 2, the last one, there is no second neighbour"),
        (([0, 2], "mean"), "behind block 2, the last one"),
        ((0, "lesa"), "method is 'predicted', 'mean', 'copy' or 'identity'"),
    ],
)
def test_bad_input_changes_nothing(given, message):
    model = build("llama")
    before, there = copy.deepcopy(model.state_dict()), list(blocks(model))
    with pytest.raises(ValueError, match=message):
        surgery.insert(model, *given)
    assert list(blocks(model)) == there and same(before, model.state_dict())


@pytest.mark.parametrize("name", ["seed", "epochs"])
def test_numbers_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} is a whole number"):
        surgery.insert(build("llama"), 0, **{name: -1})


def test_models_that_nothing_can_be_told_from_are_refused():
    with pytest.raises(ValueError, match="2 blocks has none with two neighbours"):
        surgery.insert(build("llama", num_hidden_layers=2), 0)
    looped = surgery.loop(build("llama"), 0, 1, times=2)
    with pytest.raises(ValueError, match="blocks 0 and 2 share their weights"):
        surgery.insert(looped, 0, "copy")
    placed = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="depends on its place"):
        surgery.insert(placed, 0, "mean")
    other = build("llama")
    blocks(other)[2].mlp.up_proj = nn.Linear(16, 20)
    for after, method in ((1, "mean"), (0, "predicted")):
        with pytest.raises(ValueError, match="have weights of other names or shapes"):
            surgery.insert(other, after, method)
    packed = build("llama")
    weight = torch.zeros(24, 16, dtype=torch.int8)
    blocks(packed)[1].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight of block 1 holds no numbers"):
        surgery.insert(packed, 0)
    assert [anatomy(m).depth for m in (looped, placed, other, packed)] == [5, 3, 3, 3]
