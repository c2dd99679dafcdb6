"""Networks whose answer is known by construction: what the instruments must find in them."""

import numpy as np
import pytest
import torch

from depthutil import hops
from depthutil import interventions as iv

CONFIG = hops.HopConfig(depth=9, nodes=6, hops=3)
AT = [1, 4, 6]


@pytest.fixture(scope="module")
def network():
    return hops.built(CONFIG, at=AT)


@pytest.fixture(scope="module")
def asked():
    return hops.questions(CONFIG, 60, hops=3, seed=1)


def test_it_answers_by_as_many_hops_as_it_has_blocks_for(network, asked):
    odds = network(asked.ids).logits[:, -1].softmax(1)
    assert (odds.argmax(1) == asked.answers).all()
    assert odds.gather(1, asked.answers[:, None]).min() > 0.99
    for at, right in (([3], 1), ([0, 8], 2)):
        shares = hops.accuracy(hops.built(CONFIG, at=at), CONFIG, 200)
        assert shares[right] == 1 and shares.drop(right).max() < 0.05


def test_skipping_finds_the_blocks_that_hop(network, asked):
    table = iv.skip_effects(
        network, [asked.ids], per_document=True, mask=lambda ids, real: last_but_one(ids)
    )
    # The answer is read at the last position, which has no next token: effects on updates.
    later = table.query("effect == 'update' and skipped not in @AT")
    assert (later["mean"].fillna(0) < 1e-5).all()
    clean = network(asked.ids).logits[:, -1].softmax(1)
    for block in range(CONFIG.depth):
        with iv.skip(network, block):
            change = (network(asked.ids).logits[:, -1].softmax(1) - clean).norm(dim=1)
        assert change.min() > 0.9 if block in AT else change.max() < 1e-5


def last_but_one(ids):
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -2] = True
    return mask


def test_erasing_finds_until_when_each_edge_is_needed(network, asked):
    """The edge of hop i, up to the state that block at[i] reads, and no longer."""
    means = iv.mean_states(network, [asked.ids], mask="all")
    before = []
    for row in range(12):
        table = iv.erasure_effects(network, [asked.ids[row][None]], means)
        effect = table.pivot(index="layer", columns="position", values="mean").to_numpy()
        needed = {int(p): AT[hop] for hop, p in enumerate(asked.path[row])}
        for position in range(1, effect.shape[1] - 1):
            until = needed.get(position, -1)
            before += effect[: until + 1, position].tolist()
            assert (effect[until + 1 :, position] < 0.01).all()
    # Erased, an edge leads anywhere; sometimes by luck to the answer.
    assert np.mean(before) > 0.9 and np.median(before) > 0.9


def test_attributions_find_the_edges_that_are_still_needed(network, asked):
    table = iv.integrated_gradients(network, asked.ids[:16], asked.answers[:16], steps=400)
    assert max(table.attrs["gap"].values()) < 0.05
    # After the last hop the answer stands at the last position alone.
    late = table.query("layer > 6").pivot(index="layer", columns="position", values="mean")
    assert late.iloc[:, :-1].abs().to_numpy().max() < 1e-3 and late.iloc[:, -1].min() > 0.3


def test_a_trace_finds_where_a_fact_is_read(network, asked):
    words = hops.HopTokenizer(CONFIG.nodes, CONFIG.hops)
    for row in range(4):
        text = words.decode(asked.ids[row])
        place = int(asked.path[row, 1])
        edge, answer = text.split()[place], words.decode([int(asked.answers[row])])
        table = iv.causal_trace(network, words, text, edge, answer, noise=6.0, draws=16)
        odds = table.pivot(index="layer", columns="position", values="probability").to_numpy()
        clean, corrupted = table.attrs["clean"], table.attrs["corrupted"]
        assert clean > 0.99 and corrupted < 0.7
        # Restored at the edge, until block 4 has read it; at the end, from then on. (Noise on
        # an edge also draws the other hops to it a little.)
        at_edge, at_end, gap = odds[:, place], odds[:, -1], clean - corrupted
        assert at_edge[: AT[1] + 1].min() - at_edge[AT[1] + 1 :].max() > 0.7 * gap
        assert at_end[AT[1] + 1 :].min() - at_end[: AT[1] + 1].max() > 0.7 * gap


def test_a_depth_score_is_the_mean_place_of_the_blocks_that_hop(network, asked):
    import pandas as pd

    clean = network(asked.ids).logits[:, -1].softmax(1)
    rows = []
    for block in range(CONFIG.depth):
        with iv.skip(network, block):
            change = (network(asked.ids).logits[:, -1].softmax(1) - clean).norm(dim=1)
        rows.append((block, "output", CONFIG.depth, change.mean().item()))
    table = pd.DataFrame(rows, columns=["skipped", "effect", "block", "mean"])
    expected = np.mean(AT) / (CONFIG.depth - 1)
    assert iv.depth_score(table).score == pytest.approx(expected, abs=0.02)


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(tmp_path):
    config = hops.HopConfig(depth=1, nodes=4, hops=2, width=16, heads=2, steps=60)
    network, tests = hops.train(config, every=20)

    class Killed(Exception):
        pass

    def kill(step, total, left):
        if step == 41:
            raise Killed

    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        hops.train(config, path, every=20, progress=kill)
    assert torch.load(path, weights_only=True)["step"] == 40
    again, same = hops.train(config, path, every=20)
    assert same.equals(tests)
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="is of another run"):
        hops.train(hops.HopConfig(depth=2, nodes=4), path)


def test_bad_questions_are_one_sentence(tmp_path):
    cases = [
        (lambda: hops.HopConfig(nodes=27), "nodes are 2 to 26"),
        (lambda: hops.HopConfig(width=10, heads=4), "4 heads do not divide a width of 10"),
        (lambda: hops.HopConfig(depth=0), "depth is a whole number of at least 1"),
        (lambda: hops.questions(CONFIG, 5, hops=4), "hops are 1 to 3, not 4"),
        (lambda: hops.questions(CONFIG, 0), "count is a whole number of at least 1"),
        (lambda: hops.built(CONFIG, at=[4, 2]), "at names blocks of 0 to 8, rising"),
        (lambda: hops.built(CONFIG, at=[9]), "at names blocks of 0 to 8, rising"),
        (lambda: hops.HopTokenizer(3, 1)("ab bz"), "'bz' is no edge"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    path = hops.save([(CONFIG, hops.built(CONFIG, AT))], tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="there is no network w16-d3-s0 in"):
        hops.trained(hops.HopConfig(depth=3), path)
