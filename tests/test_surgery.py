"""Lasting changes against forward passes written by hand, and what optimizers go on with."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_interventions import Hand, any_family, close, every, logits
from test_ladder import SMALL, folder, text  # noqa: F401
from test_models import build, tokens

from depthutil import interventions as iv
from depthutil import ladder, models, primitives, surgery
from depthutil.ladder.model import new_model
from depthutil.ladder.training import Trainer

# Any family -----------------------------------------------------------------------------


def batch_of(ids):
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def saved(model, where):
    model.save_pretrained(where)
    return type(model).from_pretrained(where).eval()


def same_with_cache(model, ids):
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return torch.equal(
        model.generate(ids, **how, use_cache=True), model.generate(ids, **how, use_cache=False)
    )


@every
def test_dropped_blocks_are_skipped_ones(family, tmp_path):
    model, ids = any_family(family), tokens()
    for block in range(models.anatomy(model).depth):
        with iv.skip(model, block):
            expected = logits(model, ids, use_cache=False)
        shorter = surgery.drop(copy.deepcopy(model), block)
        assert models.anatomy(shorter).depth == models.anatomy(model).depth - 1
        assert torch.equal(logits(shorter, ids, use_cache=False), expected)
        loaded = saved(shorter, tmp_path / str(block))
        assert torch.equal(logits(loaded, ids, use_cache=False), expected)
        assert same_with_cache(loaded, ids)
    assert models.losses(loaded, batch_of(ids)).shape == (2,)


@every
def test_any_arrangement_runs_its_blocks_in_order(family, tmp_path):
    model, ids = any_family(family), tokens()
    hand, depth = Hand(model, ids), models.anatomy(model).depth
    for places in ([0, 1, 1, 2], [0, 1, 0, 1, 2], [2, 1, 0], [1]):
        kinds = [block_kind(model, place) for place in places]
        expected = hand(order=places)
        for shared in (False, True):
            arranged = surgery.arrange(copy.deepcopy(model), places, shared=shared)
            assert close(logits(arranged, ids, use_cache=False), expected)
            first = [places.index(place) if shared else i for i, place in enumerate(places)]
            assert surgery.sharing(arranged) == first
            loaded = saved(arranged, tmp_path / f"{places}{shared}")
            assert close(logits(loaded, ids, use_cache=False), expected)
            assert [block_kind(loaded, i) for i in range(len(places))] == kinds
            assert same_with_cache(loaded, ids)
            if shared and first != list(range(len(places))):
                assert surgery.sharing(loaded) == list(range(len(places)))
                assert surgery.sharing(surgery.tie(loaded)) == first
    assert models.anatomy(model).depth == depth


def block_kind(model, place):
    return getattr(models.anatomy(model).blocks[place], "attention_type", None)


def test_a_tied_head_stays_tied(tmp_path):
    model = build("llama", tie_word_embeddings=True)
    surgery.grow(model, method="lidas", block=1)
    loaded = saved(model, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_what_a_place_decides_cannot_move():
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = list(models.anatomy(model).blocks)
    with pytest.raises(ValueError, match="depends on its place"):
        surgery.drop(model, 0)
    assert list(models.anatomy(model).blocks) == before and model.config.n_layer == 3
    # Qwen2's windows begin at a layer, whatever stands there.
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model = build("qwen2", **windows)
    surgery.arrange(model, [0, 1, 1, 2])  # the configuration names each layer's kind
    assert model.config.layer_types[1:] == ["sliding_attention"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: surgery.drop(m, [0, 1, 2]), "all 3 blocks would be dropped"),
        (lambda m: surgery.drop(m, 3), "whole numbers from 0 to 2"),
        (lambda m: surgery.drop(m, []), "at least one"),
        (lambda m: surgery.arrange(m, [0, 1.5]), "whole numbers"),
        (lambda m: surgery.arrange(m, "01"), "whole numbers"),
        (lambda m: surgery.arrange(m, [-1]), "whole numbers"),
        (lambda m: surgery.early_layers(m, 4), "has 3 blocks, no 4"),
        (lambda m: surgery.loop(m, 2, 1, 2), "2 is behind 1"),
        (lambda m: surgery.loop(m, 0, 1, 0), "times"),
        (lambda m: surgery.grow(m, method="middle"), "middle"),
        (lambda m: surgery.grow(m, block=2), "3 is no multiple of blocks of 2"),
        (lambda m: surgery.tie(m), "names no blocks that share"),
        (lambda m: surgery.tie(m, [(0, 7)]), "whole numbers"),
    ],
)
def test_bad_input_changes_nothing(change, message):
    model = build("llama")
    weights, blocks = copy.deepcopy(model.state_dict()), list(models.anatomy(model).blocks)
    with pytest.raises(ValueError, match=message):
        change(model)
    assert list(models.anatomy(model).blocks) == blocks
    assert model.config.num_hidden_layers == 3
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())


def test_blocks_of_other_kinds_are_not_tied():
    model = build("gemma2")  # every second block attends to a window
    with pytest.raises(ValueError, match="blocks 0 and 1 are of different kinds"):
        surgery.tie(model, [(0, 1)])
    assert surgery.sharing(surgery.tie(model, [(0, 2)])) == [0, 1, 0]


def test_an_adapter_is_no_obstacle():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert models.anatomy(surgery.drop(model, 1)).depth == 2


# Growing --------------------------------------------------------------------------------


def by_hand(method, depth, block):
    """What the papers say, in lists of layers."""
    layers, n = list(range(depth)), depth // block
    blocks = [layers[i * block : (i + 1) * block] for i in range(n)]
    m = math.ceil(n / 2) - 1
    if method in ("midas", "random"):
        grown = [*blocks[: m + 1], blocks[m], *blocks[m + 1 :]]
    elif method == "last":
        grown = [*blocks, blocks[-1]]
    elif n % 2 or block % 2:  # the middle block, or the lower of two
        first = math.floor(depth / 2 - block / 2)
        return layers[: first + block] + layers[first:]
    else:
        # As Figure 2 of Kapl et al. draws it, between blocks m and m + 1.
        half = block // 2
        new = blocks[m + 1][:half] + blocks[m][half:]
        grown = [*blocks[: m + 1], new, *blocks[m + 1 :]]
    return [layer for one in grown for layer in one]


@pytest.mark.parametrize("method", surgery.METHODS)
@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_the_grown_layers_are_the_right_copies_in_the_right_order(method, block, count):
    # Layers are labelled anew at every step: back to the first stage MIDAS and LIDAS are alike.
    depth = block * count
    small = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
    model = build("llama", num_key_value_heads=1, num_hidden_layers=depth, **small)
    outside = {
        name: (weight, weight.detach().clone())
        for name, weight in model.named_parameters()
        if ".layers." not in name
    }
    for number, layer in enumerate(model.model.layers):
        for weight in layer.parameters():
            weight.data.fill_(number)
    before = list(model.model.layers)
    surgery.grow(model, method=method, block=block)
    layers = model.model.layers
    found = [
        {float(v) for w in layer.parameters() for v in w.detach().flatten()} for layer in layers
    ]
    assert found == [{float(place)} for place in by_hand(method, depth, block)]
    assert surgery.plan(method, depth, block) == by_hand(method, depth, block)
    assert len(layers) == model.config.num_hidden_layers == depth + block
    assert [layer for layer in layers if layer in before] == before
    assert surgery.sharing(model) == list(range(depth + block))
    assert len(outside) == 3
    for name, weight in model.named_parameters():
        if name in outside:
            assert weight is outside[name][0] and torch.equal(weight, outside[name][1])


def test_midas_and_lidas_differ_where_they_should():
    for block in (2, 4):
        for count in range(1, 9):
            plans = [surgery.plan(method, block * count, block) for method in ("midas", "lidas")]
            assert (plans[0] == plans[1]) == (count % 2 == 1)
    # With blocks of one layer there is no half a block: both copy the lower middle.
    assert surgery.plan("midas", 4, 1) == surgery.plan("lidas", 4, 1)


def test_a_grown_model_that_is_not_trained_repeats_itself():
    # What a copy does to the loss is what running the block twice does.
    model, ids = build("llama"), tokens()
    with iv.repeat(model, 1, 2):
        expected = models.losses(model, batch_of(ids))
    grown = surgery.grow(copy.deepcopy(model), method="midas", block=1)
    assert models.losses(grown, batch_of(ids)) == pytest.approx(expected, abs=1e-6)
    # A block that writes nothing costs nothing to copy; one that writes is not free.
    for name, weight in model.named_parameters():
        if "layers.1" in name and ("o_proj" in name or "down_proj" in name):
            weight.data.zero_()
    clean = logits(model, ids)
    assert torch.equal(logits(surgery.grow(model, method="midas", block=1), ids), clean)
    assert (expected != models.losses(model, batch_of(ids))).any()


def test_random_layers_are_no_copies():
    model = build("llama")
    one, other = (
        surgery.grow(copy.deepcopy(model), method="random", seed=seed).model.layers[2]
        for seed in (0, 1)
    )
    theirs = dict(model.model.layers[1].named_parameters())
    for (name, weight), (_, again) in zip(
        one.named_parameters(), other.named_parameters(), strict=True
    ):
        assert not torch.equal(weight, theirs[name]) and not torch.equal(weight, again)
        torch.testing.assert_close(weight.std(), theirs[name].std())


def test_one_seed_shuffles_otherwise_at_each_stage():
    model = build("llama")
    alike = model.model.layers[0].state_dict()
    for layer in model.model.layers:
        layer.load_state_dict(alike)
    depth = len(model.model.layers)
    for _ in range(2):
        surgery.grow(model, method="random", seed=3)
    layers = [layer.mlp.up_proj.weight for layer in model.model.layers]
    new = [weight for weight in layers if not torch.equal(weight, layers[0])]
    assert len(layers) == depth + 2 and len(new) == 2 and not torch.equal(*new)


def test_lengths_of_stages():
    assert surgery.stages(2100, [2, 4, 6, 8, 10, 12]) == [100, 300, 600, 1000, 1500, 2100]
    assert surgery.stages(600, [1, 2, 3], alpha=0) == [200, 400, 600]
    # Kapl et al. report block-only savings of 1.38, 1.24 and 1.16 for six stages.
    for alpha, saving in ((1, 1.38), (2, 1.24), (3, 1.16)):
        ends = surgery.stages(10**6, range(1, 7), alpha)
        spent = sum(
            depth * (end - begin)
            for depth, begin, end in zip(range(1, 7), [0, *ends], ends, strict=False)
        )
        assert 6e6 / spent == pytest.approx(saving, abs=0.006)


# Optimizers -----------------------------------------------------------------------------


def stepped(model, steps=2, groups=1):
    """An optimizer that has a state, in groups of the weights by their numbers of dimensions."""
    weights = list(model.parameters())
    split = (
        [weights] if groups == 1 else [[w for w in weights if (w.dim() > 1) == k] for k in (1, 0)]
    )
    adam = torch.optim.AdamW([{"params": part} for part in split], lr=1e-3)
    for seed in range(steps):
        train_step(model, adam, seed)
    return adam


def train_step(model, adam, seed=0):
    ids = tokens(seed=seed)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    adam.step()
    adam.zero_grad()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_optimizer_goes_on_with_what_it_knew(family, groups):
    model = any_family(family)
    adam = stepped(model, groups=groups)
    states = {w: copy.deepcopy(state) for w, state in adam.state.items()}
    before = [list(block.parameters()) for block in models.anatomy(model).blocks]
    surgery.grow(model, adam, "midas", 1)
    places = surgery.plan("midas", 3, 1)
    held = [w for group in adam.param_groups for w in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    order = {w: i for i, w in enumerate(model.parameters())}
    for group in adam.param_groups:
        numbers = [order[w] for w in group["params"]]
        assert numbers == sorted(numbers)
    for block, place in zip(models.anatomy(model).blocks, places, strict=True):
        for weight, source in zip(block.parameters(), before[place], strict=True):
            if source not in states:  # an expert that no token has chosen
                continue
            for name, value in states[source].items():
                assert torch.equal(adam.state[weight][name], value)
                assert weight is source or adam.state[weight][name] is not value
    copies = [w for w in model.parameters() if w not in states]
    old = [w.detach().clone() for w in copies]
    train_step(model, adam)
    assert any(not torch.equal(w, was) for w, was in zip(copies, old, strict=True))
    twins = zip(models.anatomy(model).blocks[1].parameters(), copies, strict=False)
    assert any(not torch.equal(one, other) for one, other in twins)  # they go ways of their own


def test_the_optimizer_forgets_what_is_dropped_and_tied():
    model = build("llama")
    adam = stepped(model)
    surgery.drop(model, 1, optimizer=adam)
    assert set(adam.state) == set(model.parameters())
    surgery.tie(model, [(0, 1)], optimizer=adam)
    assert set(adam.state) == set(model.parameters()) == set(adam.param_groups[0]["params"])
    train_step(model, adam)
    assert surgery.sharing(model) == [0, 0]
    random = surgery.grow(model, adam, "random", 1)
    new = [w for w in random.parameters() if w not in adam.state]
    assert len(new) == len(list(random.model.layers[1].parameters()))


def test_a_loop_is_trained_as_one():
    model = surgery.loop(build("llama"), 1, 1, times=3)
    adam = stepped(model, steps=1)
    first, *others = (model.model.layers[i] for i in (1, 2, 3))
    for other in others:
        pairs = zip(first.parameters(), other.parameters(), strict=True)
        assert all(one is two for one, two in pairs)
    held = adam.param_groups[0]["params"]
    assert len(held) == len({id(w) for w in held}) == len(list(build("llama").parameters()))


# The ladder -----------------------------------------------------------------------------


GROWING = replace(
    SMALL, depths=(6,), steps=20, cooldown=0.15, design=ladder.Design("midas", grow="midas")
)


def trainer(config, text, depth=6):  # noqa: F811
    return Trainer(config, depth, 0, 3e-3, text, torch.device("cpu"), False, False)


def test_growth_ends_before_the_rate_falls(text):  # noqa: F811
    ours = trainer(GROWING, text)
    depths, rates = [], []
    for step in range(20):
        ours.advance()
        depths.append(len(ours.model.model.layers))
        rates.append(ours.adam.param_groups[0]["lr"])
        assert rates[-1] == GROWING.rate(3e-3, step)
        assert {s["step"].item() for s in ours.adam.state.values()} == {step + 1}
    assert GROWING.growth(6) == [3, 8, 20]
    assert depths == [2] * 3 + [4] * 5 + [6] * 12
    assert rates[4:18] == [3e-3] * 14 and rates[19] < rates[18] < 3e-3
    # One less the square root of what has passed of the last 15 %.
    assert rates[19] == pytest.approx(3e-3 * (1 - math.sqrt(2 / 3)))


@pytest.mark.parametrize("method", ["midas", "lidas", "random"])
def test_growth_goes_on_where_it_was_stopped(method, text, tmp_path):  # noqa: F811
    config = replace(GROWING, design=ladder.Design(method, grow=method))
    whole = ladder.train(config, 6, 0, text=text, device="cpu", threads=1)
    for stop in (2, 3, 4, 8, 15):
        path = tmp_path / f"{stop}.pt"
        half = ladder.train(
            config, 6, 0, text=text, device="cpu", threads=1, checkpoint=path, stop=stop
        )
        assert not half.finished
        again = ladder.train(config, 6, 0, text=text, device="cpu", threads=1, checkpoint=path)
        assert all(torch.equal(w, again.weights[name]) for name, w in whole.weights.items())
        pd_equal(again.losses, whole.losses)


def pd_equal(one, other):
    assert one.to_dict("list") == other.to_dict("list")


@pytest.mark.parametrize(
    "design",
    [
        ladder.Design("lidas", grow="lidas"),
        ladder.Design("lns", norm_scaling=True),
        ladder.Design("loop", loop=(1, 2, 2, 1)),
        ladder.Design("tied", loop=(0, 1, 6, 0), write_scale=1 / 6),
    ],
    ids=lambda design: design.label,
)
def test_a_design_is_saved_as_an_ordinary_model(design, text, tmp_path):  # noqa: F811
    config = replace(GROWING, design=design)
    found = ladder.train(config, 6, 0, text=text, device="cpu")
    trained = new_model(config, 6, 0, found.step)
    trained.load_state_dict(found.weights)
    expected, ids = logits(trained.eval(), tokens()), tokens()
    path = found.save(tmp_path)
    assert path.name == f"ladder-w16-d06-{design.label}-s0"
    model, _ = models.load(str(path), device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.allclose(logits(model, ids), expected, atol=1e-6)
    assert surgery.sharing(surgery.tie(model) if design.loop else model) == [
        design.layers(6).index(layer) for layer in design.layers(6)
    ]
    assert sum(w.numel() for w in model.parameters()) == config.parameters(6)


def test_scaled_norms_are_what_the_paper_says():
    config = replace(GROWING, design=ladder.Design("lns", norm_scaling=True))
    model, plain = new_model(config, 6, 0), new_model(replace(config, design=ladder.Design()), 6, 0)
    h = torch.randn(2, 5, 16)
    for number, (layer, other) in enumerate(
        zip(model.model.layers, plain.model.layers, strict=True)
    ):
        for name in ("input_layernorm", "post_attention_layernorm"):
            ours, theirs = getattr(layer, name)(h), getattr(other, name)(h)
            torch.testing.assert_close(ours, theirs / math.sqrt(number + 1))
        # No identity: the norm does normalise.
        assert ours.square().mean(-1).sqrt().mean().item() == pytest.approx(
            (number + 1) ** -0.5, rel=1e-3
        )


def test_operations_are_counted():
    config = ladder.LadderConfig()
    model = new_model(replace(config, depths=(2,)), 2, 0)
    matrices = sum(w.numel() for name, w in model.named_parameters() if "proj" in name)
    head = model.lm_head.weight.numel()
    attention = 2 * 6 * 64 * 128 * 2 // 2  # scores and weighted sums of 128 / 2 states, two layers
    each = 6 * (matrices + head) + attention
    assert config.flops(2, step=1) == each * 2048
    loop = replace(config, design=ladder.Design("tied", loop=(0, 1, 12, 0)))
    assert loop.flops(12) == config.flops(12) and loop.parameters(12) == config.parameters(1)
    grown = replace(config, design=ladder.Design("midas", grow="midas"))
    steps = [0, *grown.growth(12)]
    by_step = sum(
        (end - begin) * config.flops(depth, step=1)
        for begin, end, depth in zip(steps, steps[1:], range(2, 14, 2), strict=False)
    )
    assert grown.flops(12) == pytest.approx(by_step)
    assert grown.flops(12, step=steps[2]) == pytest.approx(
        steps[1] * config.flops(2, step=1) + (steps[2] - steps[1]) * config.flops(4, step=1)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grow": "middle"}, "middle"),
        ({"loop": (1, 2, 3)}, "before, looped, times, behind"),
        ({"loop": (1, 0, 3, 1)}, "before, looped, times, behind"),
        ({"grow": "midas", "loop": (0, 1, 2, 0)}, "no loops"),
        ({"grow": "midas", "norm_scaling": True}, "no loops"),
        ({"grow": "midas", "until": 0}, "until"),
        ({"write_scale": math.nan}, "write_scale"),
        ({"block": 0}, "block"),
    ],
)
def test_impossible_designs(changes, message):
    with pytest.raises(ValueError, match=message):
        ladder.Design("x", **changes)
    with pytest.raises(ValueError, match="cooldown"):
        ladder.LadderConfig(cooldown=1.0)


def test_designs_do_not_fit_every_depth(text):  # noqa: F811
    with pytest.raises(ValueError, match="no multiple of blocks of 2"):
        ladder.train(GROWING, 5, 0, text=text, device="cpu")
    with pytest.raises(ValueError, match="makes 12 layers, not 6"):
        ladder.train(replace(GROWING, design=ladder.DESIGNS["tied"]), 6, 0, text=text)


def test_names_of_before_stay_what_they_were():
    assert "design" not in ladder.recipe.recipe(ladder.LadderConfig())
    kept = ladder.recipe.recipe(GROWING)
    assert kept["cooldown"] == 0.15 and ladder.Design(**kept["design"]) == GROWING.design


# Primitives -----------------------------------------------------------------------------


def answer(task, prompt):
    """Solve a question by reading it."""
    if task == "copying":
        said, shown = prompt.split("|")
        words, seen = said.split(), shown.split()
        return words[words.index(seen[-1]) + 1][0]
    said, asked = prompt.split(" ?")
    value = dict(pair.split("=") for pair in said.split())
    name = asked[0]
    for _ in range(int(task[-1]) + 1):
        name = value[name]
    return name


@pytest.mark.parametrize("task", primitives.TASKS)
def test_primitives_have_one_right_answer(task):
    lengths, place = set(), []
    for seed in range(200):
        asked = primitives.example(task, seed)
        assert answer(task, asked.prompt) == asked.options[0] == asked.rest[0]
        assert len(set(asked.options)) == len(asked.options) == round(1 / primitives.TASKS[task])
        lengths.add(len(asked.prompt))
        place.append(asked.prompt.index(asked.options[0]))
    assert len(lengths) == 1 and len(set(place)) > 3
