import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_models import build, tokens

from depthutil import gram as gram_of
from depthutil import signatures, stream, trajectory
from depthutil.trajectory import Trajectory


def angle(x, y):
    """Kahan's angle of vectors, good to the last digits at any angle; in double precision."""
    x, y = x.double(), y.double()
    x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))


def plainly(writes, sublayers=False, parallel=False):
    """Every statistic from vectors, layer by layer, in double precision."""
    writes = writes.double()
    states = list(writes.cumsum(0))
    streams, steps = states, list(writes[1:])
    if sublayers:
        states, steps = states[::2], list(writes[1::2] + writes[2::2])
    end, start = states[-1], states[0]
    length = lambda x: x.norm(dim=-1)  # noqa: E731
    cosine = lambda x, y: (x * y).sum(-1) / length(x) / length(y)  # noqa: E731
    far = (end - start).square().sum(-1)
    values = {
        "norms": [length(h) for h in states],
        "angles": [angle(h, h + d) for h, d in zip(states, steps, strict=False)],
        "update_norms": [length(d) for d in steps],
        "update_angles": [angle(d, e) for d, e in itertools.pairwise(steps)],
        "update_cosines": [cosine(d, e) for d, e in itertools.pairwise(steps)],
        "angle_to_end": [angle(h, end) for h in states],
        "projections": [((h - start) * (end - start)).sum(-1) / far for h in states],
        "block_influence": [1 - cosine(h, h + d) for h, d in zip(states, steps, strict=False)],
        "contributions.block": [length(d) / length(h) for h, d in zip(states, steps, strict=False)],
        "cosines.block": [cosine(d, h) for h, d in zip(states, steps, strict=False)],
    }
    if sublayers:
        attention, mlp, after = writes[1::2], writes[2::2], streams[1::2]
        read = states if parallel else after
        for name, pairs in {
            "attention": list(zip(states, attention, strict=False)),
            "mlp": list(zip(read, mlp, strict=False)),
        }.items():
            values[f"write_norms.{name}"] = [length(w) for _, w in pairs]
            values[f"contributions.{name}"] = [length(w) / length(h) for h, w in pairs]
            values[f"cosines.{name}"] = [cosine(w, h) for h, w in pairs]
    return {name: torch.stack(value, 1) for name, value in values.items()}


def recorded(writes, sublayers=False, parallel=False):
    stack = writes.double().transpose(0, 1)
    gram = stack @ stack.transpose(1, 2)
    return gram_of.statistics(gram, sublayers=sublayers, parallel=parallel)[0]


def worst(mine, theirs, names):
    return max((mine[name] - theirs[name]).abs().max().item() for name in names)


ANGLES = ("angles", "update_angles", "angle_to_end")


# Exactness ------------------------------------------------------------------------------


@pytest.mark.parametrize("sublayers, parallel", [(False, False), (True, False), (True, True)])
def test_every_statistic_equals_the_plain_computation(sublayers, parallel):
    writes = torch.randn(9, 30, 20, generator=torch.Generator().manual_seed(0))
    mine, theirs = recorded(writes, sublayers, parallel), plainly(writes, sublayers, parallel)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert mine[name].shape == theirs[name].shape
        assert (mine[name] - theirs[name]).abs().max() < 1e-7, name


def massive(writes):
    """One channel a thousand times the rest, written by one layer and taken back by the last."""
    writes = writes.clone()
    writes[2, :, 5] += 1000.0
    writes[-1, :, 5] -= 1000.0
    return writes


def test_angles_are_exact_where_they_are_small_and_where_a_channel_is_massive():
    noise = torch.Generator().manual_seed(0)
    random = torch.randn(25, 40, 512, generator=noise)
    tiny = torch.cat([random[:1], 1e-3 * random[1:]])
    along = torch.cat([random[:1], random[:1] * torch.rand(24, 1, 1, generator=noise)])
    along[1:] += 1e-3 * random[1:]  # large updates nearly parallel to the state
    cases = {"tiny": tiny, "massive": massive(random), "massive, tiny": massive(tiny)}
    cases |= {"parallel": along, "massive at the start": random.clone()}
    cases["massive at the start"][0, :, 5] = 1000.0
    for name, writes in cases.items():
        theirs = plainly(writes)
        assert worst(recorded(writes), theirs, ANGLES) < 1e-9, name
        if name == "tiny":
            assert 5e-4 < theirs["angles"].min() and theirs["angles"].max() < 2e-3


def test_single_precision_products_would_not_do():
    random = torch.randn(25, 40, 512, generator=torch.Generator().manual_seed(0))
    writes = massive(torch.cat([random[:1], 1e-3 * random[1:]]))
    stack = writes.transpose(0, 1)
    gram = (stack @ stack.transpose(1, 2)).double()
    single = gram_of.statistics(gram)[0]
    assert worst(single, plainly(writes), ANGLES) > 1e-3
    assert worst(recorded(writes), plainly(writes), ANGLES) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("spike", [False, True])
def test_a_recorded_model_equals_double_precision(family, spike):
    model = build(family).double()
    if spike:
        writer = model.base_model.layers[0].mlp
        with torch.no_grad():
            dict(writer.named_parameters())[
                "dense_4h_to_h.weight" if family == "gpt_neox" else "down_proj.weight"
            ][3] *= 1000
    ids = tokens(3, 20)
    with torch.no_grad():
        *before, _ = model(ids, output_hidden_states=True).hidden_states
        seen = {}
        hook = model.base_model.layers[-1].register_forward_hook(
            lambda module, args, output: seen.update(last=output)
        )
        after = model(ids, output_hidden_states=True).hidden_states[-1]
        hook.remove()
    last = seen["last"] if isinstance(seen["last"], torch.Tensor) else seen["last"][0]
    states = torch.stack([*before, last])[:, :, :-1].flatten(1, 2)
    writes = torch.cat([states[:1], states.diff(dim=0)])
    theirs = plainly(writes)
    theirs["last_angle_after_norm"] = angle(states[-2], after[:, :-1].flatten(0, 1))[:, None]
    taken = after[:, :-1].flatten(0, 1) - states[-2]  # for the last update, by differences
    theirs["last_update_angle_after_norm"] = angle(states[-2] - states[-3], taken)[:, None]
    for precision in (torch.float64, torch.float32):
        got = trajectory.record(model.to(precision), [ids[:2], ids[2:]], "sublayer")
        for name in (*ANGLES, "last_angle_after_norm", "last_update_angle_after_norm"):
            table = got._table(name)
            each = theirs[name].numpy()
            assert np.abs(table["mean"] - each.mean(0)).max() < 1e-5, name
            assert np.abs(table["max"] - each.max(0)).max() < 1e-4, name
    if spike and family != "gemma2":  # whose post-norms take the spike out
        biggest = states[1].abs().max(1).values
        assert (biggest > 100 * states[1].abs().median(1).values).any()


def test_small_angles_of_a_recorded_model():
    model = build("llama")
    with torch.no_grad():  # every block writes about a thousandth of the stream
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 3e-3
            layer.mlp.down_proj.weight *= 3e-3
    ids = tokens(2, 20)
    vectors = trajectory.writes_of(model, ids)[:, :, :-1].flatten(1, 2)
    got = trajectory.record(model, [ids], per_token=True).per_token["angles"]
    theirs = plainly(vectors)["angles"].numpy()
    assert np.median(theirs) < 1e-2
    assert np.abs(got - theirs).max() < 1e-6
    # The plain way loses them: the arc cosine of a number near 1.
    states = vectors.cumsum(0).float()
    cosines = F.cosine_similarity(states[:-1], states[1:], dim=-1).clamp(-1, 1)
    assert np.abs(torch.acos(cosines).T.numpy() - theirs).max() > 1e-5


# Means and errors -----------------------------------------------------------------------


def corpus():
    """Documents of different lengths, filled up at the end, in batches."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for lengths in ((9, 4), (7, 12, 2), (5,)):
        ids = torch.randint(3, 40, (len(lengths), max(lengths)), generator=generator)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        made.append({"input_ids": ids * mask, "attention_mask": mask.long()})
    return made


@pytest.fixture(scope="module")
def neox():
    return build("gpt_neox")


@pytest.fixture(scope="module")
def got(neox):
    return trajectory.record(neox, corpus(), "sublayer", per_token=True, null=True)


def test_a_position_counts_where_it_and_the_next_are_real(got):
    assert (got.documents, got.tokens) == (6, 9 + 4 + 7 + 12 + 2 + 5 - 6)
    lengths = pd.Series(got.per_token["document"]).value_counts().sort_index()
    assert lengths.tolist() == [8, 3, 6, 11, 1, 4]
    first = corpus()[0]["input_ids"][0]
    assert got.per_token["token"][:8].tolist() == first[:8].tolist()
    assert got.per_token["position"][:8].tolist() == list(range(8))


def test_what_fills_a_document_up_changes_nothing(neox, got):
    rows = [
        row[mask.bool()][None]
        for batch in corpus()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=False)
    ]
    alone = trajectory.record(neox, rows, "sublayer", per_token=True)
    for name in ("angles", "norms", "update_angles"):
        assert np.abs(alone.per_token[name] - got.per_token[name]).max() < 1e-5
    assert np.allclose(alone.gram, got.gram, atol=1e-5)
    # Another order of the same sums.
    assert np.allclose(alone.angles(), got.angles(), atol=1e-6)


def test_means_and_errors_over_documents_are_those_of_a_ratio(got):
    values = pd.DataFrame(got.per_token["angles"].astype(float))
    documents = values.groupby(got.per_token["document"])
    mean = values.mean()
    rest = documents.sum() - documents.size().to_numpy()[:, None] * mean.to_numpy()
    stderr = np.sqrt(6 / 5 * (rest**2).sum()) / len(values)
    table = got.angles()
    assert np.allclose(table["mean"], mean, atol=1e-6)
    assert np.allclose(table["stderr"], stderr, rtol=1e-4)
    assert np.allclose(table["std"], values.std(), rtol=1e-4)
    # Over layers: the mean of a document's layers, not of independent numbers.
    both = rest[[0, 1]].mean(axis=1)
    middle = got.average("angles", 0, 1)
    assert math.isclose(middle["mean"], mean[[0, 1]].mean(), rel_tol=1e-6)
    assert math.isclose(
        middle["stderr"], np.sqrt(6 / 5 * (both**2).sum()) / len(values), rel_tol=1e-4
    )


def test_the_error_is_the_spread_of_the_mean():
    # 300 corpora of 25 inputs: their means spread as one corpus says.
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        states = generator.standard_normal((4, 25, 6)).cumsum(axis=0)
        row = Trajectory.from_states(states).update_angles()
        means.append(row["mean"])
        errors.append(row["stderr"])
    ratio = np.mean(errors, axis=0) / np.std(means, axis=0)
    assert (np.abs(ratio - 1) < 0.15).all()  # four standard errors of a spread of 300


def test_layers_are_numbered_as_in_the_formulas(got):
    assert got.norms()["layer"].tolist() == [0, 1, 2, 3]
    assert got.angles()["layer"].tolist() == [0, 1, 2]
    assert got.update_angles()["layer"].tolist() == [1, 2]
    assert got.update_angles(lag=2)["layer"].tolist() == [1]
    assert got.update_norms()["layer"].tolist() == [1, 2, 3]
    assert got.last_angle_after_norm()["layer"].tolist() == [3]
    assert got.projections()["mean"].tolist()[::3] == [0.0, 1.0]
    assert got.contributions().groupby("part")["layer"].apply(list).tolist() == [[1, 2, 3]] * 3
    assert got.cosines()["mean"].between(-1, 1).all()
    assert got.gram.shape == (7, 7) and np.allclose(got.gram, got.gram.T)
    table = got.table()
    assert set(table["statistic"]) == set(trajectory.STATISTICS)
    assert len(table[(table.statistic == "update_angles") & (table.lag == 2)]) == 1


def test_block_and_sublayer_recordings_agree(neox, got):
    blocks = trajectory.record(neox, corpus())
    for name in ("norms", "angles", "update_angles", "angle_to_end", "block_influence"):
        mine, theirs = getattr(blocks, name)(), getattr(got, name)()
        assert np.allclose(mine, theirs, atol=1e-8), name
    assert np.allclose(blocks.grams(), got.grams(), atol=1e-9)
    assert set(blocks.contributions()["part"]) == {"block"}


def test_lags_and_the_null(neox, got):
    ids = tokens(2, 10)
    vectors = trajectory.writes_of(neox, ids)[1:, :, :-1].flatten(1, 2)
    one = trajectory.record(neox, [ids], null=True)
    far = angle(vectors[0], vectors[2]).mean()
    assert math.isclose(one.update_angles(lag=2)["mean"][0], far, rel_tol=1e-6)
    null = angle(vectors[:-1], vectors[1:].roll(9, dims=1)).mean(1)  # the other document
    assert np.allclose(one.update_angles(null=True)["mean"], null, rtol=1e-6)
    assert np.allclose(
        np.cos(one.update_angles(null=True)["mean"]),
        one.update_cosines(null=True)["mean"],
        atol=0.2,
    )
    # Sublayers add up to the same updates.
    again = trajectory.record(neox, [ids], "sublayer", null=True)
    assert np.allclose(again.update_angles(null=True), one.update_angles(null=True))


def test_other_masks(neox):
    ids = tokens(2, 6)
    assert trajectory.record(neox, [ids], mask="all").tokens == 12
    assert trajectory.record(neox, [ids], mask=lambda ids, real: ids == ids[0, 2]).tokens >= 1
    with pytest.raises(ValueError, match="no position counts"):
        trajectory.record(neox, [ids[:, :1]])
    with pytest.raises(ValueError, match="mask's function returned"):
        trajectory.record(neox, [ids], mask=lambda ids, real: real[:, 1:])


# Memory, resuming, errors ---------------------------------------------------------------


def test_what_is_kept_does_not_grow_with_the_corpus(neox):
    sizes = []
    for number in (10, 40):
        batches = [tokens(2, 8, seed) for seed in range(number)]
        kept = trajectory.record(neox, batches, "sublayer", sample=16)._sums
        sizes.append(sum(array.nbytes for array in kept.state().values() if array.ndim))
        assert len(kept.sampled) == 16 and not kept.kept
    assert sizes[0] == sizes[1]


class Stop(Exception):
    pass


def test_a_recording_continues_to_the_same_bits(neox, tmp_path):
    batches = [tokens(2, 8, seed) for seed in range(6)]
    options = {"writes": "sublayer", "per_token": True, "null": True, "sample": 5}
    whole = trajectory.record(neox, batches, **options)

    def interrupt(done, total, left):
        assert total == 6 and left >= 0
        if done == 4:
            raise Stop

    path = tmp_path / "here" / "recording.npz"
    options |= {"checkpoint": path, "checkpoint_seconds": 0}
    with pytest.raises(Stop):
        trajectory.record(neox, batches, progress=interrupt, **options)
    steps = []
    again = trajectory.record(neox, batches, progress=lambda n, *_: steps.append(n), **options)
    assert steps == [4, 5, 6]  # three were saved
    mine, theirs = again._sums.state(), whole._sums.state()
    assert mine.keys() == theirs.keys()
    assert all(
        np.array_equal(mine[name], theirs[name], equal_nan=True)
        for name in mine
        if name != "counts"
    )
    assert [p.name for p in path.parent.iterdir()] == ["recording.npz"]
    # A finished one is read, not run.
    done = trajectory.record(neox, batches, progress=lambda *_: 1 / 0, **options)
    assert done.angles().equals(whole.angles()) and done.width == 16
    with pytest.raises(ValueError, match="recording of other text"):
        trajectory.record(neox, [tokens(2, 8, 9), *batches[1:]], **options)
    with pytest.raises(ValueError, match="now there are fewer"):
        trajectory.record(neox, batches[:4], **options)
    with pytest.raises(ValueError, match="another recording"):
        trajectory.record(build("llama"), batches, **options)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trajectory.record(neox, batches, **options)


def test_progress_is_said_with_the_time_left(neox, capsys):
    trajectory.record(neox, [tokens(), tokens()], progress=True)
    assert "batch 2 of 2, 44 tokens, 0.0 min left" in capsys.readouterr().err
    calls = []
    trajectory.record(neox, iter([tokens()]), progress=lambda *call: calls.append(call))
    assert calls == [(1, None, None)]


def test_a_state_that_is_no_number_is_named():
    model = build("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[7] = math.nan
    bad = tokens(2, 8)
    bad[bad == 7] = 8
    good = bad.clone()
    bad[1, 3] = 7
    with pytest.raises(FloatingPointError, match="batch 1: the states of row 1 at position"):
        trajectory.record(model, [good, bad])
    with pytest.raises(FloatingPointError, match="batch 0: the states of row 1 at position"):
        trajectory.record(model, [bad, good])


def test_the_model_is_left_as_it_was():
    model = build("gpt2", resid_pdrop=0.5).train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    one = trajectory.record(model, [tokens()]).angles()
    assert trajectory.record(model, [tokens()]).angles().equals(one)  # no dropout
    assert [module.training for module in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    handle = model.transformer.ln_f.register_forward_hook(stop)
    with pytest.raises(Stop):
        trajectory.record(model, [tokens()])
    handle.remove()
    assert [module.training for module in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "batch, error, said",
    [
        ("a text", TypeError, "models.batches"),
        (torch.tensor([1, 2, 3]), ValueError, r"use ids\[None\]"),
        (torch.zeros(2, 3), ValueError, "must be token ids"),
        ({"ids": 1}, ValueError, "no input_ids"),
        (
            {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[0, 1, 1]])},
            ValueError,
            "filled up on the left",
        ),
        (
            {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 2)},
            ValueError,
            "has shape",
        ),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused(neox, batch, error, said):
    with pytest.raises(error, match=said):
        trajectory.record(neox, [batch])


def test_a_table_that_is_not_there_is_refused(neox):
    with pytest.raises(ValueError, match="writes is 'block' or 'sublayer'"):
        trajectory.record(neox, [tokens()], "head")
    with pytest.raises(ValueError, match="mask is"):
        trajectory.record(neox, [tokens()], mask="some")
    with pytest.raises(ValueError, match="sample is"):
        trajectory.record(neox, [tokens()], sample=-1)
    one = trajectory.record(neox, [tokens(1)], sample=0)
    assert one.angles()["stderr"].isna().all()  # one document has no spread
    assert one.grams().shape == (0, 4, 4)
    with pytest.raises(ValueError, match="null=True"):
        one.update_angles(null=True)
    with pytest.raises(ValueError, match="the lag of 3 updates is 1 to 2, not 3"):
        one.update_angles(lag=3)
    with pytest.raises(ValueError, match="has no 'loss'"):
        one.average("loss")
    with pytest.raises(ValueError, match="no middle"):
        one.average("update_angles")
    with pytest.raises(ValueError, match="layers 0 to 2, not 1 to 5"):
        one.average("angles", 1, 5)
    with pytest.raises(ValueError, match="numbered 1 to 3"):
        one.grams(first=0)


# Toy networks ---------------------------------------------------------------------------


def test_toy_networks_come_in_through_the_same_class():
    states = torch.randn(9, 600, 12, generator=torch.Generator().manual_seed(1)).cumsum(0)
    toy = Trajectory.from_states(states, per_token=True, sample=1000)
    theirs = plainly(torch.cat([states[:1].double(), states.double().diff(dim=0)]))
    for name, values in theirs.items():
        assert np.allclose(toy._table(name)["mean"], values.mean(0), atol=1e-9), name
    assert (toy.depth, toy.width, toy.tokens, toy.documents) == (8, 12, 600, 600)
    assert toy.per_token["angles"].shape == (600, 8)
    assert np.allclose(toy.grams(), signatures.gram(states))
    with pytest.raises(ValueError, match="not recorded with a final norm"):
        toy.last_angle_after_norm()
    written = torch.cat([states[:1], states.diff(dim=0)])
    same = Trajectory.from_writes(written)
    assert np.allclose(same.angles(), toy.angles(), atol=1e-5)
    for wrong in (torch.zeros(3, 4), np.zeros((1, 2, 3))):
        with pytest.raises(ValueError, match="must be"):
            Trajectory.from_writes(wrong)
        with pytest.raises(ValueError, match="must be"):
            Trajectory.from_states(wrong)
    with pytest.raises(ValueError, match="two for each block"):
        Trajectory.from_writes(written[:-1], sublayers=True)
    with pytest.raises(ValueError, match="not finite"):
        Trajectory.from_writes(written * math.nan)


def test_updates_that_are_zero_are_left_out_of_what_they_do_not_define():
    states = torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(1)).cumsum(0)
    still = states.clone()
    still[2, :20] = still[1, :20]
    mixed, rest = Trajectory.from_states(still), Trajectory.from_states(still[:, 20:])
    assert np.allclose(mixed.update_angles(), rest.update_angles(), atol=1e-12)
    assert mixed.angles()["mean"][1] < rest.angles()["mean"][1]  # an angle of zero is one


def test_signatures_read_a_trajectory():
    walk = np.random.default_rng(0).standard_normal((11, 100, 16)).cumsum(axis=0)
    toy = Trajectory.from_states(walk)
    assert signatures.signature(toy).summary().equals(signatures.signature(walk).summary())
    middle = signatures.signature(gram_matrix=toy.grams(3, 8)).summary()
    assert np.allclose(middle, signatures.signature(walk[2:9]).summary())
    assert signatures.diagnose(toy).reasons == signatures.diagnose(walk).reasons


# Decoding early -------------------------------------------------------------------------


def loss_of(model, ids):
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").double()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama", "qwen3", "phi"])
def test_decoding_early_equals_a_model_without_the_layers_between(family):
    model, ids = build(family), tokens(4, 10)
    losses = trajectory.decode_early(model, [ids[:2], ids[2:]])
    assert losses["layer"].tolist() == [0, 1, 2]
    assert math.isclose(losses["mean"][2], loss_of(model, ids).mean(), rel_tol=1e-5)
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    del stack[1]  # what remains of three: the first and the last
    for module in (model, model.base_model):
        module.config.num_hidden_layers = 2
    each = loss_of(model, ids)
    assert math.isclose(losses["mean"][1], each.mean(), rel_tol=1e-5)
    by_document = each.reshape(4, -1).mean(1)
    assert math.isclose(losses["stderr"][1], by_document.std() / 2, rel_tol=1e-3)
    assert math.isclose(losses["std"][1], each.std(), rel_tol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_neox"])
def test_the_lens_ends_at_the_models_own_loss(family):
    model, ids = build(family), tokens(3, 12)
    own = loss_of(model, ids).mean()
    lens = trajectory.decode_early(model, [ids], through_last=False)
    assert lens["layer"].tolist() == [0, 1, 2, 3]
    assert math.isclose(lens["mean"][3], own, rel_tol=1e-5)
    assert math.isclose(trajectory.decode_early(model, [ids])["mean"][2], own, rel_tol=1e-5)


def test_a_sample_of_documents_is_spread_over_the_corpus(neox):
    some = trajectory.decode_early(neox, corpus(), documents=3)
    assert some.attrs == {"documents": 3, "of": 6, "tokens": 8 + 6 + 1}
    everything = trajectory.decode_early(neox, corpus())
    assert everything.attrs["tokens"] == 33
    assert (some["stderr"] > 0).all()
    with pytest.raises(ValueError, match="documents is a whole number of at least 1, not 0"):
        trajectory.decode_early(neox, corpus(), documents=0)
    with pytest.raises(ValueError, match="no head"):
        trajectory.decode_early(neox.gpt_neox, corpus())


# Files ----------------------------------------------------------------------------------


def test_a_saved_trajectory_is_the_same(tmp_path):
    model = build("llama")
    options = {"writes": "sublayer", "per_token": True, "null": True, "sample": 5}
    batches = [
        torch.randint(1, 30, (4, 9), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    made = trajectory.record(model, batches, **options)
    again = Trajectory.load(made.save(tmp_path / "new" / "made.npz"))
    pd.testing.assert_frame_equal(again.table(), made.table())
    assert again.update_angles(null=True).equals(made.update_angles(null=True))
    assert again.average().equals(made.average())
    assert np.array_equal(again.grams(), made.grams()) and np.array_equal(again.gram, made.gram)
    for name, array in made.per_token.items():
        assert np.array_equal(again.per_token[name], array)
    for name in ("name", "depth", "width", "writes", "parallel", "tokens", "documents"):
        assert getattr(again, name) == getattr(made, name)
    assert str(again) == str(made)


def test_what_is_no_whole_trajectory_is_named(tmp_path):
    path = Trajectory.from_states(np.ones((3, 4, 2))).save(tmp_path / "some.npz")
    whole = path.read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"no archive"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"some\.npz is no whole trajectory: save it again"):
            Trajectory.load(path)
    np.savez(path, counts=1)
    with pytest.raises(ValueError, match="is no whole trajectory"):
        Trajectory.load(path)
    with pytest.raises(FileNotFoundError):
        Trajectory.load(tmp_path / "other.npz")


# What is given, and what a checkpoint knows ---------------------------------------------


def left_filled():
    """Rows that begin with filling, so that mask and positions decide every state."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[2, :2] = 0
    return {
        "input_ids": tokens(3, 9),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_filling_on_the_left_changes_nothing(family):
    model, batch = build(family), left_filled()
    filled = trajectory.record(model, [batch], per_token=True)
    decoded = trajectory.decode_early(model, [batch])
    rows = [
        ids[m.bool()][None]
        for ids, m in zip(*map(batch.get, ("input_ids", "attention_mask")), strict=True)
    ]
    alone = trajectory.record(model, rows, per_token=True)
    assert np.abs(filled.per_token["norms"] - alone.per_token["norms"]).max() < 1e-5
    assert np.allclose(decoded["mean"], trajectory.decode_early(model, rows)["mean"], rtol=1e-5)


def test_a_hole_between_tokens_is_not_seen():
    # Positions go on through it: of filling whose positions stand still, transformers would
    # guess from them alone that it is another document.
    model, mask = build("llama"), torch.ones(2, 9, dtype=torch.long)
    mask[0, 3:5] = 0
    batch = {"attention_mask": mask, "position_ids": torch.arange(9).expand(2, -1)}
    one, other = ({**batch, "input_ids": tokens(2, 9)} for _ in range(2))
    other["input_ids"] = torch.where(mask == 0, 7, one["input_ids"])
    assert not torch.equal(one["input_ids"], other["input_ids"])
    tables = [trajectory.record(model, [b]).table() for b in (one, other)]
    assert tables[0].equals(tables[1])
    decoded = [trajectory.decode_early(model, [b]) for b in (one, other)]
    assert decoded[0].equals(decoded[1])


def test_next_counts_positions_whose_next_token_is_real():
    model, ids = build("llama"), tokens(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    kept = {
        how: trajectory.record(model, [batch], mask=how, per_token=True).per_token
        for how in ("next", "inner", "all")
    }
    position = {how: kept[how]["position"].tolist() for how in kept}
    assert position == {
        "next": [*range(7), *range(4)],
        "inner": [*range(1, 7), *range(1, 4)],
        "all": [*range(8), *range(5)],
    }
    assert trajectory.decode_early(model, [batch]).attrs["tokens"] == 11
    assert trajectory.decode_early(model, [batch], mask="all").attrs["tokens"] == 11
    first = trajectory.decode_early(
        model, [batch], mask=lambda ids, real: real & (ids == ids[0, 0])
    )
    assert first.attrs["tokens"] < 11


@pytest.mark.parametrize("call", [trajectory.record, trajectory.decode_early])
def test_an_unknown_mask_is_no_mask(call):
    with pytest.raises(ValueError, match="mask is 'next', 'inner', 'all' or a function, not 'al'"):
        call(build("llama"), [tokens()], mask="al")


BAD = {
    "half a mask": ({"attention_mask": torch.full((2, 12), 0.5)}, "and holds 0.5"),
    "additive": ({"attention_mask": torch.full((2, 12), -torch.inf)}, "and holds -inf"),
    "far": ({"position_ids": torch.arange(25, 37).expand(2, -1)}, "25 to 36.*room for 32"),
    "before": ({"position_ids": torch.arange(-1, 11).expand(2, -1)}, "-1 to 10"),
    "between": ({"position_ids": torch.rand(2, 12)}, "whole numbers of the shape"),
    "negative": ({"input_ids": torch.full((2, 12), -100)}, "token id -100.*0 to 39"),
    "beyond": ({"input_ids": torch.full((2, 12), 40)}, "token id 40.*0 to 39"),
    "booleans": ({"input_ids": torch.ones(2, 12).bool()}, "not torch.bool"),
    "complex": ({"input_ids": torch.ones(2, 12) * 1j}, "not torch.complex64"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("call", [trajectory.record, trajectory.decode_early])
def test_what_lies_beyond_the_model_is_named(name, call):
    change, message = BAD[name]
    good = {"input_ids": tokens()}
    with pytest.raises(ValueError, match=rf"batch 1.*{message}"):
        call(build("llama"), [good, {**good, **change}])
    with pytest.raises(ValueError, match=r"positions 0 to 32.*room for 32.*models.batches"):
        call(build("gpt2"), [tokens(1, 33)])


@pytest.mark.parametrize(
    "mask, message",
    [
        (lambda ids, real: torch.full(ids.shape, torch.nan), "holds nan"),
        (lambda ids, real: ids / 7, "holds"),
        (lambda ids, real: real[:, 1:], "has shape"),
    ],
)
def test_what_a_mask_function_returns_is_looked_at(mask, message):
    with pytest.raises(ValueError, match=f"mask's function returned for batch 0.*{message}"):
        trajectory.record(build("llama"), [tokens()], mask=mask)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.int64])
def test_ids_of_any_integer_type_are_the_same(kind):
    model, ids = build("llama"), tokens()
    same = trajectory.record(model, [ids.numpy().astype(kind)])
    assert same.table().equals(trajectory.record(model, [ids]).table())


@pytest.mark.parametrize("later", [0, 1])
def test_a_loss_that_is_not_finite_is_named_in_every_batch(later):
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.inf
    good = tokens()
    good[good == 5] = 6
    bad = good.clone()
    bad[1, 3] = 5
    # Attention multiplies what it may not see by zero, which of infinity is no number either.
    message = rf"batch {later}: the (states|losses) of row 1 at position \d are not finite"
    for call in (trajectory.decode_early, trajectory.record):
        with pytest.raises(FloatingPointError, match=message):
            call(model, [good] * later + [bad])


CHANGES = {
    "a weight": lambda m: m.model.layers[1].mlp.down_proj.weight.data[7, 7].mul_(1 + 1e-6),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(1.01),
    "configuration": lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
    "precision": lambda m: m.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_knows_its_model_to_the_last_bit(change, tmp_path):
    path, model = tmp_path / "recording.npz", build("llama")
    whole = trajectory.record(model, [tokens()], checkpoint=path)
    assert (
        trajectory.record(build("llama"), [tokens()], checkpoint=path).table().equals(whole.table())
    )
    CHANGES[change](model)
    with pytest.raises(ValueError, match="checkpoint of another recording"):
        trajectory.record(model, [tokens()], checkpoint=path)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "position_ids"])
def test_a_checkpoint_knows_all_its_inputs(name, tmp_path):
    path, model, batch = tmp_path / "recording.npz", build("llama"), left_filled()
    trajectory.record(model, [batch], checkpoint=path)
    other = {key: value.clone() for key, value in batch.items()}
    other[name][1, 3] = {"input_ids": 4, "attention_mask": 0, "position_ids": 9}[name]
    assert not torch.equal(other[name], batch[name])
    with pytest.raises(ValueError, match="recording of other text"):
        trajectory.record(model, [other], checkpoint=path)


def test_a_checkpoint_does_not_pretend_to_know_what_a_hook_does(tmp_path):
    path, model = tmp_path / "recording.npz", build("llama")
    whole = trajectory.record(model, [tokens()], checkpoint=path).table()
    mlp = model.model.layers[1].mlp
    changes = (
        stream.hooked(after=[(mlp, torch.zeros_like)]),
        stream.computing_as((mlp, model.model.layers[0].mlp)),
    )
    for change in changes:
        with change:
            with pytest.raises(ValueError, match=r"a hook on model\.layers\.1\.mlp.*checkpoint="):
                trajectory.record(model, [tokens()], checkpoint=path)
            assert not trajectory.record(model, [tokens()]).table().equals(whole)
    model(tokens(), output_hidden_states=True)  # leaves hooks of the library's own
    assert trajectory.record(model, [tokens()], checkpoint=path).table().equals(whole)


@pytest.mark.parametrize("call", [trajectory.record, trajectory.decode_early])
def test_a_document_that_is_left_out_does_not_spare_the_rest_the_measuring(call):
    model = build("llama")
    model.config.is_causal = False
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.inf
    ids = tokens(3)
    ids[ids == 5] = 6
    ids[0, 2] = 5
    with pytest.raises(ValueError, match="not causal"):
        call(model, [ids], mask=lambda ids, real: (ids != 5).all(1, keepdim=True) & real)


# Samples, and means over models -------------------------------------------------------------


def test_sampled_writes_are_those_of_the_positions_that_are_named(neox):
    batches = corpus()
    found = trajectory.sample_writes(neox, batches, "sublayer", per_document=3, seed=1)
    assert found.writes.shape[1] == len(found.tokens) == len(found.documents)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert set(found.documents.tolist()) == set((lengths > 2).nonzero().flatten().tolist())
    ids = batches[0]["input_ids"]
    whole = trajectory.writes_of(neox, batches[0], "sublayer")[1:, 0].float()
    for i in (found.documents == 0).nonzero().flatten():
        at = (ids[0] == found.tokens[i]).nonzero().flatten()
        gaps = [(whole[:, a] - found.writes[:, i]).abs().max().item() for a in at if a > 0]
        assert min(gaps) == 0
    again = trajectory.sample_writes(neox, batches, "sublayer", per_document=3, seed=1)
    assert torch.equal(again.writes, found.writes)
    with pytest.raises(ValueError, match="there are no batches"):
        trajectory.sample_writes(neox, [])


def test_middle_means_leave_out_ends_and_models_without_a_middle(got):
    table = trajectory.middle_means({"a": got})
    one = got.average("angles")
    assert table.loc[0, "mean"] == one["mean"] and table.loc[0, "stderr"] == one["stderr"]
    assert table.loc[0, "layers"] == got.depth - 2 and table.loc[0, "depth"] == got.depth
    assert trajectory.middle_means({"a": got}, skip=got.depth).empty
    by_function = trajectory.middle_means({"a": got}, "update_norms", skip=lambda depth: 0)
    assert by_function.loc[0, "layers"] == got.depth


# Decoding in the same pass ------------------------------------------------------------------


@pytest.mark.parametrize("way", ["last", "lens"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "gpt2"])
def test_one_pass_records_and_decodes(family, way, tmp_path):
    model, batches = build(family), corpus()
    apart = trajectory.record(model, batches, "sublayer")
    early = trajectory.decode_early(model, batches, through_last=way == "last", top=3)
    both = trajectory.record(model, batches, "sublayer", decode=way, top=3)
    assert both.table().equals(apart.table())
    pd.testing.assert_frame_equal(both.decoded(), early, check_exact=True)
    assert both.decoded().attrs == early.attrs
    again = trajectory.Trajectory.load(both.save(tmp_path / "both.npz"))
    pd.testing.assert_frame_equal(again.decoded(), early, check_exact=True)
    with pytest.raises(ValueError, match="was not decoded: record with decode="):
        apart.decoded()


def test_what_is_decoded_survives_an_interruption(tmp_path):
    model, batches, path = build("llama"), corpus(), tmp_path / "part.npz"
    options = {"decode": "last", "top": 2, "checkpoint": path, "checkpoint_seconds": 0}

    def stop(done, total, left):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trajectory.record(model, batches, progress=stop, **options)
    resumed = trajectory.record(model, batches, **options)
    whole = trajectory.record(model, batches, decode="last", top=2)
    assert resumed.table().equals(whole.table())
    assert resumed.decoded().equals(whole.decoded())
    with pytest.raises(ValueError, match="checkpoint of another recording"):
        trajectory.record(model, batches, checkpoint=path)


def test_layers_together_are_the_layers_one_by_one(monkeypatch):
    for family in ("llama", "gpt_neox", "gemma2"):
        model, batches = build(family), corpus()
        seen = []
        last = trajectory.decoding.Decoder._last

        def counted(decoder, layers, last=last, seen=seen):
            seen.append(len(layers))
            return last(decoder, layers)

        monkeypatch.setattr(trajectory.decoding.Decoder, "_last", counted)
        together = trajectory.decode_early(model, batches)
        assert max(seen) > 1
        monkeypatch.setattr(trajectory.decoding.Decoder, "_alike", lambda decoder: False)
        apart = trajectory.decode_early(model, batches)
        monkeypatch.undo()
        assert np.allclose(together["mean"], apart["mean"], rtol=1e-6)


def test_layers_are_taken_together_only_where_that_was_seen_for_the_shape():
    """As many positions as documents: what is shared looks like a row for each document."""
    model = build("llama")
    block, mixing = model.model.layers[-1], torch.rand(4, 4).tril()
    own = block.self_attn.forward

    def forward(hidden_states, *args, mixing, **kwargs):
        out, weights = own(hidden_states, *args, **kwargs)
        return out + mixing @ hidden_states, weights

    def give(module, args, kwargs):
        return args, {**kwargs, "mixing": kwargs.get("mixing", mixing)}

    block.register_forward_pre_hook(give, with_kwargs=True)
    block.self_attn.forward = forward
    batches = [tokens(1, 4), tokens(4, 4)]
    both = trajectory.decode_early(model, batches, per_token=True)
    for number, rows in enumerate([slice(0, 3), slice(3, None)]):
        alone = trajectory.decode_early(model, batches[number : number + 1], per_token=True)
        assert np.allclose(both.iloc[rows, 2:], alone.iloc[:, 2:], rtol=1e-6)


def test_a_block_that_cannot_take_layers_together_takes_them_alone():
    model = build("llama")
    block = model.model.layers[-1]
    own = block.forward

    def fussy(hidden_states, *args, **kwargs):
        if len(hidden_states) > 2:
            raise RuntimeError("one batch at a time")
        return own(hidden_states, *args, **kwargs)

    expected = trajectory.decode_early(model, [tokens(2, 8)])
    block.forward = fussy
    assert trajectory.decode_early(model, [tokens(2, 8)]).equals(expected)


def test_distance_and_overlap_are_those_of_the_models_own_prediction():
    model, ids = build("llama").double(), tokens(3, 9)
    table = trajectory.decode_early(model, [ids], through_last=False, top=5)
    with torch.no_grad():
        states = [h[:, :-1] for h in model(ids, output_hidden_states=True).hidden_states]
        final = model.lm_head(states[-1]).log_softmax(-1)  # the last is normed already
        for layer in range(4):
            normed = states[layer] if layer == 3 else model.model.norm(states[layer])
            early = model.lm_head(normed).log_softmax(-1)
            kl = (early.exp() * (early - final)).sum(-1)
            tops = [set(p.topk(5).indices.tolist()) for p in early.flatten(0, 1)]
            ours = [set(p.topk(5).indices.tolist()) for p in final.flatten(0, 1)]
            overlap = [len(a & b) / 5 for a, b in zip(tops, ours, strict=True)]
            assert math.isclose(table["kl"][layer], kl.mean(), rel_tol=1e-5, abs_tol=1e-6)
            assert math.isclose(table["overlap"][layer], np.mean(overlap), rel_tol=1e-9)
            by_document = kl.mean(1)
            error = by_document.std().item() / math.sqrt(3)
            assert math.isclose(table["kl_stderr"][layer], error, rel_tol=1e-3, abs_tol=1e-6)
    assert table["overlap"].iloc[-1] == 1 and table["kl"].iloc[-1] < 1e-9


def test_the_loss_of_every_token_is_there_on_request():
    model, batches = build("llama"), corpus()
    each = trajectory.decode_early(model, batches, per_token=True)
    means = trajectory.decode_early(model, batches)
    assert len(each) == means.attrs["tokens"]
    assert np.allclose(each[[0, 1, 2]].mean(), means["mean"])
    assert each.groupby("document")["position"].max().max() == 10
    assert set(each["document"]) == {0, 1, 2, 3, 4, 5}


def test_what_cannot_be_decoded_is_said():
    with pytest.raises(ValueError, match="decode is 'last' or 'lens', not 'all'"):
        trajectory.record(build("llama"), corpus(), decode="all")
    with pytest.raises(ValueError, match="has no head"):
        trajectory.record(build("llama").model, corpus(), decode="last")


def test_files_of_before_maxima_were_kept_are_read_without_them(tmp_path):
    model, path = build("llama"), tmp_path / "old.npz"
    whole = trajectory.record(model, corpus())
    whole.save(path)
    arrays = dict(np.load(path))
    del arrays["maxima"]
    np.savez(path, **arrays)
    old = trajectory.Trajectory.load(path)
    assert old.angles().drop(columns="max").equals(whole.angles().drop(columns="max"))
    assert old.angles()["max"].isna().all() and whole.angles()["max"].notna().all()
