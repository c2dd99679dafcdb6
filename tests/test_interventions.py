"""Edits against forward passes written by hand, and what effects must be."""

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from test_models import FAMILIES, HEADS, OTHERS, build, tokens

from depthutil import interventions as iv
from depthutil import models, stream, trajectory
from depthutil.interventions.passes import Passes
from depthutil.stream import Stream


class Hand:
    """A model's forward pass as one writes it down: start, blocks one after the other, norm, head.

    Masks and angles are those that the model's own code makes, seen once, on a copy.
    """

    def __init__(self, model, ids, **more):
        model = copy.deepcopy(model)  # which no edit of the other touches
        self.parts, self.given, self.model = models.anatomy(model), [], model

        def keep(module, args, kwargs, output):
            self.given.append((args, {k: None if "past" in k else v for k, v in kwargs.items()}))

        with stream.watched(self.parts.blocks, keep), torch.no_grad():
            self.logits = model(ids, use_cache=False, **more).logits
        self.start = stream.hidden(*self.given[0])
        # Cohere and Granite scale their logits.
        self.parts = stream.measured(model, {"input_ids": ids}, head=True)

    @torch.no_grad()
    def block(self, number, h):
        args, kwargs = stream.with_hidden(*self.given[number], h)
        return stream.tensor(self.parts.blocks[number](*args, **kwargs))

    @torch.no_grad()
    def __call__(self, change=lambda number, before, after: after, order=None, start=None):
        h = self.start if start is None else start
        for number in range(self.parts.depth) if order is None else order:
            h = change(number, h, self.block(number, h))
        return self.end(h)

    @torch.no_grad()
    def end(self, h):
        return self.parts.logits(h)


EVERY = [*FAMILIES, *OTHERS]


def any_family(family):
    return build(family, **(OTHERS[family][0] if family in OTHERS else {}))


every = pytest.mark.parametrize("family", EVERY)


def close(one, other):
    return (one.float() - other.float()).abs().max() < 2e-5 * other.abs().max()


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def state_of(model):
    """All that an edit could leave behind."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for m in model.modules()
    ]
    return hooks, list(model.state_dict()), [id(m) for m in model.modules()]


def test_the_pass_by_hand_is_the_models_own():
    for family in EVERY:
        model = any_family(family)
        hand = Hand(model, tokens())
        assert close(hand(), hand.logits), family


@every
def test_a_skipped_block_writes_nothing(family):
    model, ids = any_family(family), tokens()
    hand = Hand(model, ids)
    with iv.skip(model, [1]):
        assert close(logits(model, ids), hand(order=[0, 2]))
    with iv.skip(model, [2, 0]):
        assert close(logits(model, ids), hand(order=[1]))

    def some(number, before, after):
        after = after.clone()
        if number == 1:
            after[:, [3, 11]] = before[:, [3, 11]]
        return after

    with iv.skip(model, 1, positions=[3, -1]):
        assert close(logits(model, ids), hand(some))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, [3, 11]] = True
    with iv.skip(model, 1, positions=mask):
        assert close(logits(model, ids), hand(some))


@every
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_skipped_sublayer_writes_nothing(family, part):
    """By hand: the update less what the sublayer would have written, seen at its write point."""
    model, ids = any_family(family), tokens()
    hand = Hand(model, ids)
    parts, written = hand.parts, {}
    writes = parts.writes[1]
    write = writes[part == "mlp"]

    def keep(module, args, kwargs, output):
        written[module] = stream.tensor(output).clone()  # Falcon adds to it in place

    def without(number, before, after):
        """The second write alone, or the first and what the second makes of the rest."""
        if number != 1:
            return after
        if part == "mlp" or parts.parallel:
            return after - write.scale * written[write.module].view_as(after)
        with stream.rewritten(
            [write.module],
            lambda module, args, kwargs, output: stream.with_tensor(
                output, torch.zeros_like(stream.tensor(output))
            ),
        ):
            return hand.block(1, before)

    with stream.watched([write.module], keep):
        expected = hand(without)
    with iv.skip(model, 1, part=part):
        assert close(logits(model, ids), expected)
    everywhere = list(range(12))
    with iv.skip(model, 1, part=part, positions=everywhere):
        assert close(logits(model, ids), expected)
    with iv.skip(model, 1, part=part, positions=slice(6, None)):
        late = logits(model, ids)
    assert torch.equal(late[:, :6], logits(model, ids)[:, :6])
    assert not close(late[:, 6:], logits(model, ids)[:, 6:])


@every
def test_blocks_change_places(family):
    model, ids = any_family(family), tokens()
    hand = Hand(model, ids)
    with iv.swap(model, 0, 2):
        assert close(logits(model, ids), hand(order=[2, 1, 0]))
    if family in ("gemma2",):  # every other block sees a window only
        with pytest.raises(ValueError, match=r"blocks 0 and 1 of .* attend in different ways"):
            iv.swap(model, 0, 1).__enter__()
    else:
        with iv.swap(model, [0], [1]):
            assert close(logits(model, ids), hand(order=[1, 0, 2]))


@every
def test_blocks_are_repeated(family):
    model, ids = any_family(family), tokens()
    hand = Hand(model, ids)
    for blocks, times, order in (
        (1, 3, [0, 1, 1, 1, 2]),
        ([1, 2], 2, [0, 1, 2, 1, 2]),
        ([0], 2, [0, 0, 1, 2]),
        ([0, 1, 2], 1, [0, 1, 2]),
    ):
        with iv.repeat(model, blocks, times):
            assert close(logits(model, ids), hand(order=order)), blocks
            assert close(logits(model, ids), hand(order=order)), "at the second pass"


@every
def test_states_are_put_in_place_and_noise_is_added(family):
    model, ids, other = any_family(family), tokens(), tokens(seed=1)
    hand, theirs = Hand(model, ids), trajectory.writes_of(model, other)
    states = theirs.cumsum(0).float()

    def put(number, before, after):
        after = after.clone()
        if number == 1:
            after[:, 4:6] = states[2][:, 4:6]
        return after

    with iv.patch(model, 1, [4, 5], states[2][:, 4:6]):
        assert close(logits(model, ids), hand(put))
    start = hand.start.clone()
    start[:, 4] = states[0][:, 4]
    with iv.patch(model, "embedding", 4, states[0][:, 4:5]):
        assert close(logits(model, ids), hand(start=start))
    means = states.mean((1, 2))
    with iv.erase(model, 1, 4, means), iv.skip(model, 2):
        erased = logits(model, ids)
    with iv.patch(model, 1, 4, means[2]), iv.skip(model, 2):
        assert torch.equal(erased, logits(model, ids))
    with iv.noise(model, [4], 3.0, seed=2):
        noisy = logits(model, ids)
        assert torch.equal(noisy, logits(model, ids))
    clean = logits(model, ids)
    assert torch.equal(noisy[:, :4], clean[:, :4])
    assert (noisy[:, 4:] - clean[:, 4:]).abs().max() > 1e-3
    weight = model.get_input_embeddings()
    unit = weight(torch.arange(40)).double().std(correction=0).item()
    with iv.noise(model, None, 3.0):
        added = trajectory_start(model, ids) - hand.start
    with iv.noise(model, None, 0.0):
        assert torch.equal(trajectory_start(model, ids), hand.start)
    # Bloom normalises what the embedding returns, and Gemma and Granite multiply it.
    if family not in ("bloom", "gemma", "gemma2", "gemma3_text", "granite"):
        assert added.std().item() == pytest.approx(3 * unit, rel=0.15)


def trajectory_start(model, ids):
    seen = []
    with stream.hooked(before=[(models.anatomy(model).blocks[0], seen.append)]):
        logits(model, ids)
    return seen[0]


@every
def test_updates_are_scaled(family):
    model, ids = any_family(family), tokens()
    hand = Hand(model, ids)

    def half(number, before, after):
        return before + 0.5 * (after - before) if number else after

    with iv.scale(model, [1, 2], 0.5):
        assert close(logits(model, ids), hand(half))
    with iv.scale(model, 1, 0.0):
        none = logits(model, ids)
    with iv.skip(model, 1):
        assert torch.equal(none, logits(model, ids))


def edits(model):
    """One of each, with a second of some, for orders of ending."""
    return {
        "skip": lambda: iv.skip(model, 1, positions=[2]),
        "skip mlp": lambda: iv.skip(model, 2, part="mlp"),
        "swap": lambda: iv.swap(model, 0, 2),
        "swap runs": lambda: iv.swap(model, [0, 1], [2, 3]),
        "swap neighbours": lambda: iv.swap(model, 1, 2),
        "repeat": lambda: iv.repeat(model, [1, 2]),
        "patch": lambda: iv.patch(model, 0, [1], torch.ones(16)),
        "erase": lambda: iv.erase(model, "embedding", 3, torch.zeros(16)),
        "noise": lambda: iv.noise(model, [1], 3.0),
        "scale": lambda: iv.scale(model, [0, 3], 1.5),
    }


@pytest.mark.parametrize(
    ("family", "error"),
    [
        ("llama", KeyboardInterrupt),
        ("llama", ZeroDivisionError),
        ("gpt2", KeyboardInterrupt),
        ("gpt_neox", KeyboardInterrupt),
        ("opt", KeyboardInterrupt),
        ("mixtral", KeyboardInterrupt),
    ],
)
def test_a_model_is_what_it_was_whatever_happened(family, error):
    more = OTHERS[family][0] if family in OTHERS else {}
    more = {**more, "num_hidden_layers": 4, **({"n_layer": 4} if family == "gpt2" else {})}
    model, ids = build(family, **more), tokens()
    before, own = state_of(model), logits(model, ids)
    for name, edit in edits(model).items():
        with edit():
            inside = logits(model, ids)
        assert not torch.equal(inside, own), name
        assert torch.equal(logits(model, ids), own) and state_of(model) == before, name

        def interrupted(states):
            raise error

        # In the middle of a pass, and nested.
        last = models.anatomy(model).blocks[3]
        with pytest.raises(error), edit(), stream.hooked(before=[(last, interrupted)]):
            logits(model, ids)
        assert torch.equal(logits(model, ids), own) and state_of(model) == before, name
        # One that goes on in the same context after that.
        with edit():
            with pytest.raises(error), stream.hooked(before=[(last, interrupted)]):
                logits(model, ids)
            assert torch.equal(logits(model, ids), inside), name


def test_edits_end_in_any_order_and_the_others_hold():
    model, ids = build("llama", num_hidden_layers=4), tokens()
    own, before = logits(model, ids), state_of(model)
    rng = np.random.default_rng(0)
    kinds = list(edits(model).items())
    for _ in range(30):
        chosen = [kinds[i] for i in rng.permutation(len(kinds))[:4]]
        open_ = []
        for name, edit in chosen:
            context = edit()
            context.__enter__()
            open_.append((name, edit, context))
        while open_:
            _, _, context = open_.pop(rng.integers(len(open_)))
            context.__exit__(None, None, None)
            got = logits(model, ids)
            with ExitStack() as stack:  # a fresh model with those that are left, in their order
                fresh = build("llama", num_hidden_layers=4)
                for name, _, _ in open_:
                    stack.enter_context(edits(fresh)[name]())
                if not any("swap" in name for name, _, _ in open_ + chosen_swaps(chosen)):
                    assert torch.equal(got, logits(fresh, ids))
        assert torch.equal(logits(model, ids), own) and state_of(model) == before


def chosen_swaps(chosen):
    """Edits name the blocks that stand at their places when they begin: swaps change that."""
    return [(name, None, None) for name, _ in chosen if "swap" in name]


def test_swaps_that_end_out_of_order_leave_the_others():
    model = build("llama", num_hidden_layers=4)
    blocks = list(model.model.layers)
    one, two = iv.swap(model, 0, 1), iv.swap(model, 1, 2)
    one.__enter__()
    two.__enter__()
    assert list(model.model.layers) == [blocks[1], blocks[2], blocks[0], blocks[3]]
    one.__exit__(None, None, None)
    assert list(model.model.layers) == [blocks[0], blocks[2], blocks[1], blocks[3]]
    two.__exit__(None, None, None)
    assert list(model.model.layers) == blocks


def test_a_module_that_computes_as_another_may_end_in_any_order():
    one, two, x = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.ones(1, 2)
    third = torch.nn.Linear(2, 2)
    first, second = stream.computing_as((one, two)), stream.computing_as((one, third))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(one(x), third(x))
    second.__exit__(None, None, None)
    assert "forward" not in vars(one)


def test_edits_compose():
    model, ids = build("llama", num_hidden_layers=4), tokens()
    hand = Hand(model, ids)

    def change(number, before, after):
        if number == 1:
            after = before + 2 * (after - before)
        return after

    with iv.scale(model, 1, 2.0), iv.repeat(model, [1, 2]), iv.skip(model, 2, part="block"):
        assert close(logits(model, ids), hand(change, order=[0, 1, 1, 3]))
    with iv.repeat(model, [2]), iv.swap(model, 1, 2):  # the block that stood at 2 is repeated
        assert close(logits(model, ids), hand(order=[0, 2, 2, 1, 3]))
    with iv.swap(model, 1, 2), iv.repeat(model, [2]):
        assert close(logits(model, ids), hand(order=[0, 2, 1, 1, 3]))
    with iv.repeat(model, [1]), iv.repeat(model, [2, 3]):
        assert close(logits(model, ids), hand(order=[0, 1, 1, 2, 3, 2, 3]))
        with pytest.raises(ValueError, match=r"block 3 of .* is repeated already"):
            iv.repeat(model, 3).__enter__()


def test_texts_filled_up_on_the_left_and_caches():
    model, ids = build("mistral", sliding_window=4), tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": places}
    hand = Hand(model, ids, **given)
    with iv.skip(model, 1):
        assert close(logits(model, ids, **given)[mask.bool()], hand(order=[0, 2])[mask.bool()])
    with iv.repeat(model, 1):
        found = logits(model, ids, **given)
        assert close(found[mask.bool()], hand(order=[0, 1, 1, 2])[mask.bool()])
    # A cache: with edits that need no positions, token by token is as all at once.
    for edit in (iv.skip(model, 1), iv.swap(model, 0, 2), iv.scale(model, 0, 0.5)):
        with edit, torch.no_grad():
            whole = model(ids, use_cache=False).logits
            first = model(ids[:, :7], use_cache=True)
            rest = model(ids[:, 7:], past_key_values=first.past_key_values).logits
            assert close(rest, whole[:, 7:])
    for edit in (
        iv.repeat(model, 1),
        iv.skip(model, 1, positions=[2]),
        iv.patch(model, 0, 1, torch.ones(16)),
        iv.noise(model, 1, 3.0),
    ):
        with edit, torch.no_grad():
            first = model(ids[:, :7], use_cache=True)
            assert close(first.logits, model(ids[:, :7], use_cache=False).logits)
            with pytest.raises(ValueError, match="goes on from a cache of 7 tokens"):
                model(ids[:, 7:], past_key_values=first.past_key_values)


@every
def test_later_tokens_never_move_earlier_outputs(family):
    model, ids = any_family(family), tokens()
    other = ids.clone()
    other[:, 8:] = tokens(seed=5)[:, 8:]
    for edit in (
        iv.skip(model, 1),
        iv.skip(model, 1, positions=[3]),
        iv.swap(model, 0, 2),
        iv.repeat(model, 1),
        iv.noise(model, [2, 9], 3.0),
        iv.scale(model, 1, 2.0),
    ):
        with edit:
            one, two = logits(model, ids)[:, :8], logits(model, other)[:, :8]
            assert close(one, two)
    # And passes that begin in the middle.
    live = Stream(model)
    with live.open():
        live.measure({"input_ids": ids})
        first, second = (Passes(live, {"input_ids": x}, check=True) for x in (ids, other))
        for layer in range(4):
            a, b = (p.resume(layer, p.states[layer]) for p in (first, second))
            assert close(a[:, :8], b[:, :8])


@every
def test_a_pass_may_begin_in_the_middle(family):
    model, ids = any_family(family), tokens(rows=3)
    hand, live = Hand(model, ids), Stream(model)
    with live.open():
        live.measure({"input_ids": ids}, head=True)
        passes = Passes(live, {"input_ids": ids}, check=True)
        assert close(torch.stack([passes.states[0]]), torch.stack([hand.start]))
        for layer in range(4):
            twice = passes.states[layer].repeat(2, 1, 1)
            assert close(passes.resume(layer, twice), passes.last.repeat(2, 1, 1))
        found = passes.resume(1, passes.states[0], without=[2])
        assert close(live.parts.norm(hand.block(1, hand.start)), found)


# Bad input ------------------------------------------------------------------------------


def test_what_cannot_be_meant_is_one_sentence():
    model, ids = build("llama"), tokens()
    cases = [
        (lambda: iv.skip(model, 3), "there is no block 3: LlamaForCausalLM .* blocks 0 to 2"),
        (lambda: iv.skip(model, -1), "there is no block -1"),
        (lambda: iv.skip(model, "1"), "there is no block '1'"),
        (lambda: iv.skip(model, []), "at least one block"),
        (lambda: iv.skip(model, [1, 1]), "each once"),
        (lambda: iv.skip(model, 1, part="norm"), "part is 'block', 'attention' or 'mlp'"),
        (lambda: iv.skip(model, 1, positions=[0.5]), "positions are whole numbers"),
        (lambda: iv.swap(model, 1, 1), "block 1 is in a and in b"),
        (lambda: iv.swap(model, [0, 1], [2]), "as many blocks each"),
        (lambda: iv.repeat(model, [0, 2]), "are neighbours"),
        (lambda: iv.repeat(model, 1, 0), "times is a whole number of at least 1"),
        (lambda: iv.patch(model, 1, 0, torch.ones(15)), "end in the model's width"),
        (lambda: iv.patch(model, 1, 0, torch.full((16,), torch.nan)), "not finite"),
        (lambda: iv.patch(model, "head", 0, torch.ones(16)), "there is no block 'head'"),
        (lambda: iv.erase(model, 1, 0, torch.ones(3, 16)), "one for each layer"),
        (lambda: iv.noise(model, 0, -1.0), "scale is a number"),
        (lambda: iv.scale(model, 1, float("nan")), "factor is a"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message), make():
            pass
    inside = [
        (iv.skip(model, 1, positions=[12]), "there is no position 12: .* 0 to 11"),
        (iv.skip(model, 1, positions=torch.ones(3, 12).bool()), r"shape \(3, 12\)"),
        (iv.patch(model, 1, [1, 2], torch.ones(3, 16)), "do not fit the positions"),
    ]
    for edit, message in inside:
        with edit, pytest.raises(ValueError, match=message):
            logits(model, ids)
    mamba = build("mamba", state_size=4)
    with pytest.raises(ValueError, match="told apart"), iv.skip(mamba, 1, part="mlp"):
        pass
    with iv.skip(mamba, 1):
        assert logits(mamba, ids).isfinite().all()


def test_effects_refuse_what_they_cannot_measure():
    model, ids = build("llama"), tokens()
    model.train()
    for call in (iv.skip_effects, iv.local_effects, iv.removal, iv.lens, iv.mean_states):
        with pytest.raises(ValueError, match="in training mode"):
            call(model, [ids])
    model.eval()
    with pytest.raises(ValueError, match="there is no batch"):
        iv.skip_effects(model, [])
    with pytest.raises(ValueError, match="future is a whole number"):
        iv.skip_effects(model, [ids], future=-3)
    with pytest.raises(ValueError, match="no position counts from position 40 on"):
        iv.skip_effects(model, [ids], future=40)
    with pytest.raises(ValueError, match="order is 'influence', 'end', 'random' or a list"):
        iv.removal(model, [ids], "best")
    with pytest.raises(ValueError, match="of 3 blocks 4 cannot be left out"):
        iv.removal(model, [ids], most=4)
    with pytest.raises(ValueError, match="there is no block 7"):
        iv.removal(model, [ids], among=[1, 7])
    with pytest.raises(ValueError, match="prompts have 0 to 11"):
        iv.erasure_effects(model, [ids], torch.zeros(4, 16), read=12)
    with pytest.raises(ValueError, match="a prompt of one token"):
        iv.erasure_effects(model, [ids[:, :1]], torch.zeros(4, 16))
    with pytest.raises(ValueError, match="there is no layer 4"):
        iv.integrated_gradients(model, ids, 3, layers=[4])
    with pytest.raises(ValueError, match="target is a token from 0 to 39"):
        iv.integrated_gradients(model, ids, 40)
    with pytest.raises(ValueError, match="give two"):
        iv.linear_maps(model, model, [ids])
    with pytest.raises(ValueError, match="effects need columns"):
        iv.depth_score(iv.lens(model, [ids]))


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + ord(letter) % 37 for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    names = {  # noqa: RUF012
        3 + ord(letter) % 37: letter for letter in "abcdefghijklmnopqrstuvwxyz ?"
    }

    def decode(self, ids, **options):
        return "".join("" if i == 1 else self.names[int(i)] for i in ids)


def test_a_trace_says_what_is_wrong_with_its_prompt():
    model, letters = build("llama"), Letters()
    for subject, target, message in (
        ("oslo", "e", "the subject 'oslo' is not in"),
        ("e", "e", "the subject 'e' is 2 times in"),
        ("", "e", "is not in"),
        ("paris", "of", r"the target 'of' is 2 tokens \('o' \+ 'f'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            iv.causal_trace(model, letters, "where is paris?", subject, target)
    letters.__class__.__call__ = lambda self, text, **options: {
        "input_ids": [3 + ord(letter) % 37 for letter in text]
    }
    with pytest.raises(ValueError, match="is a single token"):
        iv.causal_trace(model, letters, "a", "a", "b")
    with pytest.warns(UserWarning, match="does not know it: after 'where is paris'"):
        table = iv.causal_trace(model, letters, "where is paris", "paris", "o", draws=3)
    assert table.attrs["subject"] == (9, 13)
    assert table[["layer", "position"]].drop_duplicates().shape == (4 * 14, 2)


# Effects --------------------------------------------------------------------------------


def batch():
    ids = tokens(rows=6, length=14, seed=3)
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "falcon"])
def test_skip_effects_are_those_of_one_pass_for_each_block(family):
    model, given = any_family(family), batch()
    table = iv.skip_effects(model, [given], per_document=True)
    updates = lambda: trajectory.writes_of(model, given, "block")  # noqa: E731
    keep = given["attention_mask"][:, :-1].bool() & given["attention_mask"][:, 1:].bool()
    clean, before = updates(), models.losses(model, [given])
    odds = logits(model, **dict(ids=given["input_ids"], attention_mask=given["attention_mask"]))
    for block in range(3):
        with iv.skip(model, block):
            raw, seen = [], {}
            blocks = models.anatomy(model).blocks

            def keep_update(module, args, kwargs, output, seen=seen):
                seen[module] = stream.tensor(output) - stream.hidden(args, kwargs)

            with stream.watched(blocks, keep_update):
                out = logits(model, given["input_ids"], attention_mask=given["attention_mask"])
            raw = [seen[b] for b in blocks]
            gained = models.losses(model, [given]) - before
        some = table.query("skipped == @block")
        assert np.allclose(some.query("effect == 'loss'")["mean"], gained, atol=2e-5)
        change = (out.float().softmax(-1) - odds.float().softmax(-1)).norm(dim=-1)[:, :-1]
        mean = (change * keep).sum(1) / keep.sum(1)
        assert np.allclose(some.query("effect == 'output'")["mean"], mean, atol=2e-5)
        for later in range(block + 1, 3):
            own = clean[later + 1].float()
            change = ((raw[later] - own).norm(dim=-1) / own.norm(dim=-1))[:, :-1]
            mean = (change * keep).sum(1) / keep.sum(1)
            found = some.query("effect == 'update' and block == @later")
            assert np.allclose(found["mean"], mean, rtol=1e-3, atol=1e-4)
            most = (change * keep).amax(1)
            assert np.allclose(found["max"], most, rtol=1e-3, atol=1e-4)


def test_future_effects_skip_early_and_measure_late():
    model, given = build("llama"), batch()
    ids, mask = given["input_ids"], given["attention_mask"]
    table = iv.skip_effects(model, [given], future=5, per_document=True)
    clean = logits(model, ids, attention_mask=mask).softmax(-1)
    with iv.skip(model, 1, positions=[1, 2, 3, 4]):
        out = logits(model, ids, attention_mask=mask).softmax(-1)
    keep = (mask[:, :-1] & mask[:, 1:]).bool()
    keep[:, :5] = False
    expected = ((out - clean).norm(dim=-1)[:, :-1] * keep).sum(1) / keep.sum(1)
    found = table.query("skipped == 1 and effect == 'output'")["mean"]
    assert np.allclose(found, expected, atol=1e-5)
    # The last block's write at early positions is read by nobody.
    last = table.query("skipped == 2")
    assert (last["mean"].abs() < 1e-6).all() and len(last)


def test_a_direct_effect_lets_nothing_propagate():
    model, given = build("llama"), batch()
    table = iv.local_effects(model, [given], per_document=True)
    hand = Hand(model, given["input_ids"], attention_mask=given["attention_mask"])
    states = [hand.start]
    for number in range(3):
        states.append(hand.block(number, states[-1]))
    update = states[1] - states[0]
    changed = hand.block(2, states[2] - update) - (states[2] - update)
    own = states[3] - states[2]
    keep = (given["attention_mask"][:, :-1] & given["attention_mask"][:, 1:]).bool()
    change = ((changed - own).norm(dim=-1) / own.norm(dim=-1))[:, :-1]
    found = table.query("skipped == 0 and effect == 'update' and block == 2")["mean"]
    assert np.allclose(found, (change * keep).sum(1) / keep.sum(1), rtol=1e-3)
    odds = [hand.end(h).softmax(-1) for h in (states[3], states[3] - update)]
    change = (odds[0] - odds[1]).norm(dim=-1)[:, :-1]
    found = table.query("skipped == 0 and effect == 'output'")["mean"]
    assert np.allclose(found, (change * keep).sum(1) / keep.sum(1), rtol=1e-3)


@pytest.mark.parametrize("rescaled", [False, True])
def test_removal_is_skipping_and_scaling(rescaled):
    model, given = build("llama", num_hidden_layers=4), batch()
    table = iv.removal(model, [given], [2, 0], among=[0, 1, 2], rescaled=rescaled)
    clean = models.losses(model, [given])
    for out, rest, factor in (([2], [0, 1], 1.5), ([2, 0], [1], 3.0)):
        with ExitStack() as stack:
            stack.enter_context(iv.skip(model, out))
            if rescaled:
                stack.enter_context(iv.scale(model, rest, factor))
            gained = models.losses(model, [given]) - clean
        counts = np.array([13, 13, 8, 13, 13, 13])
        found = table[table["removed"] == len(out)]["mean"].iloc[0]
        assert found == pytest.approx((gained * counts).sum() / counts.sum(), abs=2e-5)
    assert table.attrs["loss"] == pytest.approx((clean * counts).sum() / counts.sum(), abs=1e-5)


def test_random_orders_have_a_seed_and_least_influence_comes_first():
    model, given = build("llama", num_hidden_layers=4), batch()
    one, same = (iv.removal(model, [given], "random", draws=3, seed=1) for _ in range(2))
    other = iv.removal(model, [given], "random", draws=3, seed=2)
    assert one.equals(same) and not one["block"].equals(other["block"])
    ranks = iv.influence(model, [given]).sort_values().index.tolist()
    assert iv.removal(model, [given])["block"].tolist() == ranks[:3]
    expected = trajectory.record(model, [given]).block_influence()["mean"].to_numpy()
    assert np.allclose(iv.influence(model, [given]), expected, atol=1e-6)


def test_the_lens_is_decoding_early_without_the_last_block():
    model, given = build("gemma2"), batch()
    theirs = trajectory.decode_early(model, [given], through_last=False, top=5)
    ours = iv.lens(model, [given]).pivot(index="layer", columns="reading", values="mean")
    assert np.allclose(ours["loss"], theirs["mean"], atol=1e-5)
    assert np.allclose(ours["kl"], theirs["kl"], atol=1e-5)
    assert np.allclose(ours["overlap"], theirs["overlap"], atol=1e-9)


def test_an_affine_lens_finds_a_rotation():
    """A model whose last blocks only rotate: an affine reader sees through it, the raw one not."""
    model, ids = build("llama"), torch.randint(3, 40, (24, 30))
    reader = iv.affine_lens(model, [ids], ridge=1e-8)
    states = trajectory.writes_of(model, ids, "block").cumsum(0)[:, :, 1:]
    raw = (states[1] - states[3]).norm()
    assert (reader.read(states[1], 1) - states[3]).norm() < raw
    assert torch.equal(reader.read(states[3], 3).float(), states[3].float())
    early = iv.lens(model, [ids], reader=reader).query("reading == 'kl'")["mean"]
    assert early.iloc[-1] == pytest.approx(0, abs=1e-6)


def test_erasing_is_one_edit_for_each_layer_and_position():
    model, ids = build("gpt_neox"), tokens(rows=3, length=6)
    means = iv.mean_states(model, [ids])
    table = iv.erasure_effects(model, [ids], means).set_index(["layer", "position"])["mean"]
    clean = logits(model, ids)[:, -1].softmax(-1)
    for layer, block in enumerate(["embedding", 0, 1, 2]):
        for position in range(6):
            with iv.erase(model, block, position, means):
                change = (logits(model, ids)[:, -1].softmax(-1) - clean).norm(dim=-1).mean()
            assert table[layer, position] == pytest.approx(change.item(), abs=2e-6)
    two = iv.erasure_effects(model, [ids], means, read=[3, -1]).set_index(["layer", "position"])
    one = iv.erasure_effects(model, [ids], means, read=3).set_index(["layer", "position"])
    assert len(one) == 4 * 4  # what comes after cannot matter
    assert (two["mean"].loc[one.index] >= one["mean"] - 1e-6).all()


def test_a_trace_is_one_edit_for_each_layer_and_position():
    model, letters = build("llama"), Letters()
    letters.__class__.__call__ = lambda self, text, add_special_tokens=True: {
        "input_ids": [3 + ord(letter) % 37 for letter in text]
    }
    text, subject, target = "where is paris", "paris", "o"
    ids = torch.tensor(letters(text)["input_ids"])[None].repeat(4, 1)
    with pytest.warns(UserWarning):
        table = iv.causal_trace(model, letters, text, subject, target, draws=4, seed=7)
    goal = letters(target)["input_ids"][0]
    states = trajectory.writes_of(model, ids, "block").cumsum(0).float()
    found = table.set_index(["layer", "position"])
    assert table.attrs["clean"] == pytest.approx(
        logits(model, ids)[0, -1].softmax(-1)[goal].item(), abs=1e-6
    )
    for layer, block in enumerate(["embedding", 0, 1, 2]):
        for position in (0, 8, 9, 11, 13):
            noisy = iv.noise(model, slice(9, 14), 3.0, seed=7)
            with noisy, iv.patch(model, block, position, states[layer][:, position : position + 1]):
                odds = logits(model, ids)[:, -1].softmax(-1)[:, goal]
            row = found.loc[(layer, position)]
            assert row["probability"] == pytest.approx(odds.mean().item(), abs=2e-6)
            assert row["stderr"] == pytest.approx(odds.std().item() / 2, abs=2e-6)


def test_attributions_are_complete_and_find_a_linear_models_own():
    model, ids = build("gpt2"), tokens(rows=3, length=7)
    table = iv.integrated_gradients(model, ids, [4, 5, 6])
    assert max(table.attrs["gap"].values()) < 1e-5
    # Two points of Gauss and Legendre, and one rectangle at the left as in the paper's code.
    coarse = iv.integrated_gradients(model, ids, [4, 5, 6], steps=2)
    assert max(coarse.attrs["gap"].values()) < 1e-2
    sums = table.groupby("layer")["mean"].sum()
    assert np.allclose(sums, list(table.attrs["gain"].values()), atol=1e-5)
    # After the last block only the position read counts.
    last = table.query("layer == 3")
    assert (last["mean"].iloc[:-1].abs() < 1e-7).all() and last["mean"].iloc[-1] != 0


def test_a_depth_score_knows_no_depth():
    import pandas as pd

    for depth in (2, 5, 30):
        even = pd.DataFrame({"skipped": range(depth), "effect": "output", "mean": 0.3})
        late = even.assign(mean=[0.0] * (depth - 1) + [1.0])
        assert iv.depth_score(even.assign(block=depth)).score == pytest.approx(0.5)
        assert iv.depth_score(late.assign(block=depth)).score == 1
    model, given = build("llama"), batch()
    each = iv.skip_effects(model, [given], per_document=True)
    score = iv.depth_score(each)
    assert 0 < score.score < 1 and score.stderr > 0
    means = iv.depth_score(
        each.groupby(["skipped", "effect", "block"])["mean"].mean().reset_index()
    )
    assert means.score == pytest.approx(score.score) and np.isnan(means.stderr)
    assert iv.depth_score(each, of="update").score < 1


def test_maps_between_models_find_a_copy_and_a_rotation():
    model = build("llama")
    twin = copy.deepcopy(model)
    batches = torch.randint(3, 40, (4, 24, 20))
    maps = iv.linear_maps(model, twin, batches, ridge=1e-9)
    same = maps.query("layer == target")
    assert same["unexplained"].max() < 1e-6
    other = maps.query("layer != target")
    assert other["unexplained"].min() > same["unexplained"].max()
    assert maps["layer"].max() == 3 and maps["target"].max() == 3


# Closed form ----------------------------------------------------------------------------


def test_in_an_averaging_model_an_edit_does_what_arithmetic_says():
    """Blocks whose writes are constants: leaving out k of n takes away k n-ths, exactly."""
    model, ids = build("llama", num_hidden_layers=6), tokens()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
            block.mlp.down_proj.bias = torch.nn.Parameter(torch.arange(16) / 6.0)
    start = trajectory_start(model, ids)
    ends = []
    with stream.hooked(before=[(model.model.norm, ends.append)]):
        for edit, factor in (
            (iv.skip(model, [1, 4]), 4 / 6),
            (iv.scale(model, range(6), 0.5), 3 / 6),
            (iv.repeat(model, [2, 3], 3), 10 / 6),
            (iv.swap(model, 0, 5), 1.0),
            (iv.skip(model, [0, 1], part="attention"), 1.0),
            (iv.skip(model, [0, 1], part="mlp"), 4 / 6),
        ):
            with edit:
                logits(model, ids)
            change = ends.pop() - start
            assert torch.allclose(change, factor * torch.arange(16.0).expand_as(change), atol=1e-5)
    # With what is left scaled up, nothing is lost.
    table = iv.removal(model, [ids], "random", draws=2, rescaled=True, most=4)
    assert table["mean"].abs().max() < 1e-6


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_grouped_heads_and_sixteen_bits(family):
    model = build(family, **{**HEADS, "num_attention_heads": 4, "num_key_value_heads": 2})
    model = model.to(torch.bfloat16)
    ids = tokens()
    hand = Hand(model, ids)
    with iv.skip(model, 1):
        assert (logits(model, ids) - hand(order=[0, 2])).abs().max() < 0.05
    assert np.isfinite(iv.skip_effects(model, [ids])["mean"]).all()


def test_the_largest_of_losses_that_all_fall_is_below_zero():
    from depthutil.interventions.passes import Tally

    tally = Tally()
    tally.add(("a",), torch.tensor([[-2.0, -1.0, 5.0]]), torch.tensor([[True, True, False]]))
    tally.end(("what",))
    assert tally.per_document(("what",))[["mean", "max"]].to_numpy().tolist() == [[-1.5, -1.0]]
