"""Folding blocks against the formula by hand; weights between two models."""

import copy

import pytest
import torch
from test_models import build, tokens
from transformers import AutoModelForCausalLM

from depthutil import interventions as iv
from depthutil import models, nulls, surgery
from depthutil.stream import anatomy


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def blocks(model):
    return anatomy(model).blocks


def weights(model, number):
    return {n: w.detach().clone() for n, w in blocks(model)[number].named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def kept_state(model):
    return copy.deepcopy(model.state_dict())


# Folding --------------------------------------------------------------------------------


def by_hand(model, group):
    """θ_f + Σ (θ_{f+k} − θ_f): all weights of the later ones, less m − 1 times the first's."""
    each = [weights(model, number) for number in group]
    times = len(group) - 2
    return {
        name: (sum(one[name].double() for one in each[1:]) - times * own.double()).float()
        for name, own in each[0].items()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("group", [[1, 2], [0, 1, 2], [1, 2, 3, 4]])
def test_a_folded_block_is_what_the_formula_says(family, group):
    sizes = {"num_hidden_layers": 6} | ({"n_layer": 6} if family == "gpt2" else {})
    model, ids = build(family, **sizes), tokens()
    expected, rest = by_hand(model, group), [weights(model, n) for n in (0, 5)]
    folded = surgery.fold(copy.deepcopy(model), group)
    assert folded.config.num_hidden_layers == 6 - len(group) + 1 == len(blocks(folded))
    found = weights(folded, group[0])
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        assert torch.allclose(weight, expected[key], atol=1e-5), key
    assert same(weights(folded, -1), rest[1])
    if group[0]:
        assert same(weights(folded, 0), rest[0])
    assert torch.isfinite(logits(folded, ids)).all()


def test_a_fold_of_two_is_the_second_and_one_of_three_is_not():
    """The official code keeps a group's last block; the formula does so for two blocks only."""
    model = build("llama", num_hidden_layers=5)
    last = weights(model, 3)
    two, three = (surgery.fold(copy.deepcopy(model), group) for group in ([2, 3], [1, 2, 3]))
    for name, weight in weights(two, 2).items():
        assert torch.allclose(weight, last[name], atol=1e-6), name
    found = weights(three, 1)
    assert not any(torch.allclose(found[name], last[name], atol=1e-2) for name in found)
    dropped = surgery.drop(copy.deepcopy(model), 2)
    assert torch.allclose(logits(two, tokens()), logits(dropped, tokens()), atol=1e-4)


def test_independent_weights_grow_as_derived():
    model = build("llama", num_hidden_layers=7)
    with torch.no_grad():
        for block in blocks(model):
            for weight in block.parameters():
                weight.normal_()
    for later in (1, 2, 4):
        folded = surgery.fold(copy.deepcopy(model), range(1, later + 2))
        every = torch.cat([w.flatten() for w in weights(folded, 1).values()])
        assert float(every.std()) == pytest.approx(((later - 1) ** 2 + later) ** 0.5, rel=0.06)


def test_a_folded_model_is_saved_and_loaded(tmp_path):
    model, ids = build("llama", num_hidden_layers=5), tokens()
    folded = surgery.fold(model, [1, 2, 3])
    folded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(folded, ids))
    step = folded.generate(ids, max_new_tokens=3, do_sample=False)
    whole = ids
    for _ in range(3):  # without a cache
        whole = torch.cat([whole, logits(folded, whole)[:, -1:].argmax(-1)], 1)
    assert torch.equal(step, whole)


def test_an_optimizer_goes_on_after_a_fold():
    model, ids = build("llama", num_hidden_layers=4), tokens()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(ids, labels=ids).loss.backward()
    adam.step()
    kept = blocks(model)[1].mlp.up_proj.weight
    moment = adam.state[kept]["exp_avg"].clone()
    surgery.fold(model, [1, 2, 3], optimizer=adam)
    assert torch.equal(adam.state[kept]["exp_avg"], moment)
    known = {w for group in adam.param_groups for w in group["params"]}
    assert known == set(model.parameters()) and set(adam.state) <= known
    model(ids, labels=ids).loss.backward()
    adam.step()


def test_sixteen_bits_are_added_up_in_more():
    model = build("llama", num_hidden_layers=6)
    half = copy.deepcopy(model).bfloat16()
    exact = by_hand(half, [0, 1, 2, 3, 4])
    found = weights(surgery.fold(half, range(5)), 0)
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact[name].bfloat16()), name


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ([2], "two neighbours or more"),
        ([1, 3], "two neighbours or more"),
        ([2, 1], "two neighbours or more"),
        ([2, 3, 4], "whole numbers from 0 to 3"),
        ([-2, -1], "whole numbers from 0 to 3"),
        ([0.5, 1.5], "whole numbers from 0 to 3"),
    ],
)
def test_what_cannot_be_folded_is_refused_and_nothing_changes(group, message):
    model = build("llama", num_hidden_layers=4)
    before = kept_state(model)
    with pytest.raises(ValueError, match=message):
        surgery.fold(model, group)
    assert len(blocks(model)) == 4 and same(before, model.state_dict())


def test_weights_that_are_needed_elsewhere_are_not_folded():
    model = surgery.loop(build("llama", num_hidden_layers=3), 0, 1, times=2)
    before = kept_state(model)
    with pytest.raises(ValueError, match="block 1 shares its weights with block 3, which stays"):
        surgery.fold(model, [1, 2])
    assert same(before, model.state_dict())
    tied = surgery.tie(build("llama", num_hidden_layers=3), [(0, 1)])
    alone = surgery.drop(copy.deepcopy(tied), 1)
    assert torch.allclose(logits(surgery.fold(tied, [0, 1]), tokens()), logits(alone, tokens()))


def test_blocks_of_two_kinds_are_not_folded():
    """Gemma 2 gives every second block a window."""
    model = build("gemma2", num_hidden_layers=4)
    before = kept_state(model)
    with pytest.raises(ValueError, match="blocks 0 and 1 are of different kinds"):
        surgery.fold(model, [0, 1])
    assert len(blocks(model)) == 4 and same(before, model.state_dict())


# Folding while outputs stay alike -------------------------------------------------------


def batch_of(ids):
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def test_laco_tries_from_the_top_and_measures_what_folding_would_do():
    model, ids = build("llama", num_hidden_layers=6), tokens()
    with torch.no_grad():
        before = model.model(ids).last_hidden_state
    start = kept_state(model)
    same_, tried = surgery.laco(model, batch_of(ids), size=3, threshold=1.0)
    assert same_ is model and same(start, model.state_dict())
    assert tried["first"].tolist() == [3, 2, 1, 0] and not tried["folded"].any()
    assert (tried["depth"] == 6).all()
    for first, cosine in zip(tried["first"], tried["cosine"], strict=True):
        folded = surgery.fold(copy.deepcopy(model), range(first, first + 3))
        with torch.no_grad():
            after = folded.model(ids).last_hidden_state
        expected = torch.cosine_similarity(before, after, dim=-1).mean()
        assert cosine == pytest.approx(float(expected), abs=1e-5)


def test_laco_folds_what_it_says():
    ids = tokens()
    model = build("llama", num_hidden_layers=8)
    by_steps = copy.deepcopy(model)
    first_try = surgery.laco(copy.deepcopy(model), batch_of(ids), size=2, threshold=1.0)[1]
    threshold = float(first_try["cosine"].median())
    model, tried = surgery.laco(model, batch_of(ids), size=2, threshold=threshold, interval=2)
    assert 0 < tried["folded"].sum() < len(tried)
    for row in tried.itertuples():
        if row.folded:
            assert row.cosine > threshold
            surgery.fold(by_steps, [row.first, row.first + 1])
        assert len(blocks(by_steps)) == row.depth or not row.folded
    assert torch.equal(logits(by_steps, ids), logits(model, ids))
    steps = -tried["first"].diff().dropna()
    assert steps[tried["folded"].shift(fill_value=False).iloc[1:]].eq(2).all()


def test_laco_stops_at_the_lowest_and_leaves_padding_out():
    ids = tokens(length=6)
    alone = surgery.laco(build("llama"), batch_of(ids), size=2, threshold=1.0, lowest=1)[1]
    assert alone["first"].tolist() == [1]
    more = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    padded = [{"input_ids": more, "attention_mask": mask}]
    again = surgery.laco(build("llama"), padded, size=2, threshold=1.0, lowest=1)[1]
    assert again["cosine"].iloc[0] == pytest.approx(alone["cosine"].iloc[0], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 1}, "size is a whole number of at least 2"),
        ({"size": 3, "lowest": 1}, "from block 1 on there are no 3 blocks"),
        ({"threshold": 1.5}, "threshold is a number from -1 to 1"),
        ({"interval": 0}, "interval is a whole number of at least 1"),
        ({"batches": []}, "there is no batch"),
    ],
)
def test_laco_says_what_is_wrong(changes, message):
    given = {"batches": batch_of(tokens()), "size": 2, "threshold": 0.5, **changes}
    with pytest.raises(ValueError, match=message):
        surgery.laco(build("llama"), **given)


# Between two models ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    one = build("llama", num_hidden_layers=4)
    return one, nulls.shuffled(one, seed=1)


def test_ends_are_the_models_and_the_middle_is_half_way(pair):
    one, other = pair
    ids = tokens()
    assert torch.equal(logits(surgery.mixed(one, other, 0.0), ids), logits(one, ids))
    assert torch.allclose(logits(surgery.mixed(one, other, 1.0), ids), logits(other, ids))
    half = surgery.mixed(one, other, 0.5).state_dict()
    for name, weight in one.state_dict().items():
        assert torch.allclose(half[name], (weight + other.state_dict()[name]) / 2, atol=1e-6)


@pytest.mark.parametrize("make", [surgery.mixed, surgery.perturbed])
def test_only_what_is_named_changes_and_the_two_models_do_not(pair, make):
    one, other = pair
    before = [kept_state(model) for model in pair]
    found = make(one, other, 0.5, [1, 2], part="mlp").state_dict()
    for name, weight in one.state_dict().items():
        moved = ("layers.1.mlp" in name) or ("layers.2.mlp" in name)
        assert torch.equal(found[name], weight) != moved, name
    attention = make(one, other, 0.5, 3, part="attention").state_dict()
    changed = {name for name in found if not torch.equal(attention[name], one.state_dict()[name])}
    assert changed == {name for name in found if "layers.3.self_attn" in name}
    assert same(before[0], one.state_dict()) and same(before[1], other.state_dict())


def test_the_control_goes_as_far_tensor_by_tensor(pair):
    one, other = pair
    for share in (0.25, 1.0):
        there = surgery.mixed(one, other, share).state_dict()
        away = surgery.perturbed(one, other, share, seed=3).state_dict()
        for name, weight in one.state_dict().items():
            near, far = (found[name] - weight for found in (there, away))
            assert far.norm() == pytest.approx(float(near.norm()), rel=1e-4), name
            if weight.numel() > 100:
                cosine = torch.cosine_similarity(near.flatten(), far.flatten(), dim=0)
                assert abs(cosine) < 0.4, name
    again, another = (surgery.perturbed(one, other, 1.0, seed=s).state_dict() for s in (3, 4))
    assert same(away, again) and not same(away, another)


def test_weights_that_blocks_share_move_once(pair):
    looped = surgery.loop(build("llama", num_hidden_layers=2), 0, 1, times=2)
    other = nulls.shuffled(looped)
    half = surgery.mixed(looped, other, 0.5, [0, 1, 2, 3])
    assert surgery.sharing(half) == [0, 1, 0, 1]
    expected = (blocks(looped)[0].mlp.up_proj.weight + blocks(other)[0].mlp.up_proj.weight) / 2
    assert torch.allclose(blocks(half)[2].mlp.up_proj.weight, expected, atol=1e-6)


def test_what_cannot_be_mixed_is_refused(pair):
    one, other = pair
    with pytest.raises(ValueError, match="names or shapes"):
        surgery.mixed(one, build("llama", num_hidden_layers=4, intermediate_size=20), 0.5, 1)
    with pytest.raises(ValueError, match="names or shapes"):
        surgery.mixed(one, build("llama"), 0.5)
    with pytest.raises(ValueError, match="whole numbers from 0 to 3"):
        surgery.mixed(one, other, 0.5, 4)
    with pytest.raises(ValueError, match="part is 'block', 'attention' or 'mlp'"):
        surgery.mixed(one, other, 0.5, 1, part="head")
    with pytest.raises(ValueError, match="share is a finite number"):
        surgery.perturbed(one, other, float("nan"))
    with pytest.raises(ValueError, match="names no mlp"):
        model = build("opt")
        surgery.mixed(model, copy.deepcopy(model), 0.5, 1, part="mlp")


# On the book's own models ---------------------------------------------------------------


def test_the_ladder_keeps_the_last_block_better_than_it_folds_three():
    """What the chapter shows: the formula's block is no block, the code's is a dropped one."""
    name = "ladder-w64-d04-s0"
    model, tokenizer = models.load(name)
    some = models.batches(tokenizer, models.texts(name, 8, length=64), length=64, size=8)
    whole = models.losses(model, some).mean()
    folded = models.losses(surgery.fold(copy.deepcopy(model), [1, 2, 3]), some).mean()
    with iv.skip(model, [1, 2]):
        kept = models.losses(model, some).mean()
    assert whole < kept < folded - 0.2
