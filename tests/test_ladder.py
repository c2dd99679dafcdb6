import hashlib
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import archive as command
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT

from depthutil import _runs, archive, corpus, ladder

FILES = {
    f"part{i}/file{i}.py": f"def f{i}(x):\n    return x + {i}  # été\n" * 20 for i in range(60)
}
SMALL = ladder.LadderConfig(
    width=16,
    depths=(1, 2),
    seeds=(0, 1),
    sequence=32,
    batch=4,
    steps=30,
    warmup=5,
    test_every=10,
    test_sequences=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for path, text in FILES.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text, "utf-8")
    return root


@pytest.fixture(scope="module")
def text(folder) -> ladder.Corpus:
    return ladder.corpus(folder)


@pytest.fixture(scope="module")
def trained(text) -> ladder.LadderModel:
    return ladder.train(SMALL, 2, 0, text=text, device="cpu", threads=1)


# The text -------------------------------------------------------------------------------


def test_the_standard_library_is_divided_by_file_the_same_way_every_time():
    one, two = ladder.corpus(), ladder.corpus()
    assert one == two and one.summary == two.summary
    paths = [[d.path for d in part] for part in (one.training, one.held_out)]
    assert all(part == sorted(part) for part in paths)
    assert not set(paths[0]) & set(paths[1])
    assert {"argparse.py", "asyncio/tasks.py", "pydoc_data/topics/assert"} < set(paths[0])
    assert {"functools.py", "traceback.py"} < set(paths[1])
    for path in (*paths[0], *paths[1]):
        assert not {"test", "tests", "site-packages", "encodings"} & set(path.split("/")), path
        assert not path.startswith("_sysconfigdata"), path  # holds paths of this machine
    texts = [d.text for d in (*one.training, *one.held_out)]
    assert len(set(texts)) == len(texts)
    sizes = [one.summary[part]["bytes"] for part in ("training", "held_out")]
    assert 8e6 < sizes[0] < 14e6 and 0.03 < sizes[1] / sizes[0] < 0.1


def test_documentation_that_repeats_other_pages_is_left_out():
    page = "The statement.\n\n" + "It does this and that, and more, for all of its arguments. " * 3
    other = "Of something else entirely, which no other page here has ever explained."
    topics = {"long": f"A title\n\n{page}\n\nMore.", "short": page, "own": other}
    kept = corpus._pages(f"topics = {topics!r}")
    assert set(kept) == {"pydoc_data/topics/long", "pydoc_data/topics/own"}


def test_a_folder_of_text_serves_too(folder, text):
    assert len(text.training) + len(text.held_out) == len(FILES)
    for document in text.held_out:
        assert int(hashlib.sha256(document.path.encode()).hexdigest(), 16) % 20 == 0
        assert document.text == FILES[document.path]
    (folder / "part0" / "latin.py").write_bytes(b"# \xe9\n")
    (folder / "part0" / "copy.py").write_text(FILES["part0/file0.py"], "utf-8")
    (folder / "part0" / "empty.py").write_text("\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "new.py").write_text("a new text")
    paths = {
        d.path for part in ("training", "held_out") for d in getattr(ladder.corpus(folder), part)
    }
    assert len(paths) == len(FILES) and not paths & {
        "part0/latin.py",
        "part0/empty.py",
        "tests/new.py",
    }


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n")
    with pytest.raises(ValueError, match="1 text files, of which 0 would be held out"):
        ladder.corpus(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ladder.corpus(tmp_path / "none")


def test_every_depth_reads_the_same_text_and_every_pass_all_of_it(text):
    windows = corpus.Windows(text.training, 32, 4, seed=1)
    same, other = (corpus.Windows(text.training, 32, 4, seed=s) for s in (1, 2))
    assert np.array_equal(windows(40), same(40))
    assert not np.array_equal(windows(40), other(40))
    rows = np.concatenate([windows(step) for step in range(windows.each // 4)])
    assert (rows[:, 0] == ladder.BOS).all() and rows.shape[1] == 33
    # One pass but for an incomplete batch: the pieces of the text, each of them once.
    starts = windows._starts(0)[: len(rows)]
    assert len(set(starts)) == len(rows) >= windows.each - 3
    assert set(np.diff(sorted(starts))) <= {32, 64, 96, 128}
    assert (rows[:, 1:] == windows.line[starts[:, None] + np.arange(32)]).all()
    assert not np.array_equal(windows(0), windows(windows.each // 4 + 1))


def test_held_out_pieces_are_the_documents(text):
    rows, owners = corpus.pieces(text.held_out, 32)
    for number, document in enumerate(text.held_out):
        mine = rows[owners == number]
        assert (mine[:, 0] == ladder.BOS).all()
        content = mine[:, 1:].ravel()
        assert bytes(content[content >= 0].tolist()).decode() == document.text


# Tokens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    ladder.write_tokenizer(path, 128)
    return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "def f(x):\n\treturn x  \n",
        "été ∞ 🐍 \x00\x7f\r\n",
        "<|begin|>",
        " a , b 's . <s>",
        "".join(map(chr, range(300))),
    ],
)
def test_tokens_are_bytes_and_back(tokenizer, content):
    ids = tokenizer(content)["input_ids"]
    assert ids == [ladder.BOS, *content.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == content


def test_the_tokenizer_knows_its_special_token_and_its_size(tokenizer):
    assert len(tokenizer) == ladder.VOCABULARY
    assert tokenizer.bos_token_id == tokenizer.pad_token_id == ladder.BOS
    batch = tokenizer(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


# Models and training --------------------------------------------------------------------


def test_a_model_has_the_parameters_it_says_and_starts_like_a_deeper_one():
    config = ladder.LadderConfig()
    for depth in (1, 3):
        model = ladder.model.new_model(config, depth, 0)
        assert sum(w.numel() for w in model.parameters()) == config.parameters(depth)
    shallow = ladder.model.new_model(config, 1, 0).state_dict()
    deep = ladder.model.new_model(config, 3, 0).state_dict()
    assert all(torch.equal(weight, deep[name]) for name, weight in shallow.items())
    other = ladder.model.new_model(config, 1, 1).state_dict()
    assert not torch.equal(shallow["lm_head.weight"], other["lm_head.weight"])
    assert deep["model.layers.2.mlp.up_proj.weight"].std().item() == pytest.approx(0.05, rel=0.02)
    # About the 12 m² a layer that laws of scaling count.
    assert (config.parameters(2) - config.parameters(1)) / 12 / 64**2 == pytest.approx(1, abs=0.03)


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [SMALL.rate(1.0, step) for step in range(SMALL.steps + 1)]
    assert rates[0] == 0.2 and rates[4] == rates[5] == 1.0 and rates[-1] == pytest.approx(0)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_training_lowers_the_loss_and_records_it(trained, text):
    assert trained.losses["step"].tolist() == [10, 20, 30] and trained.finished
    assert trained.losses["tokens"].tolist() == [1280, 2560, 3840]
    assert trained.losses["held_out_loss"].is_monotonic_decreasing
    assert trained.losses["training_loss"].iloc[0] < math.log(257)
    assert trained.documents["document"].tolist() == [d.path for d in text.held_out]
    assert trained.documents["bytes"].tolist() == [len(d.text.encode()) for d in text.held_out]


def test_a_training_step_is_that_of_plain_transformers(text):
    config = replace(SMALL, steps=3, warmup=1, test_every=3)
    ours = ladder.train(config, 2, 1, text=text, device="cpu")
    model = ladder.model.new_model(config, 2, 1)
    matrices = [w for w in model.parameters() if w.dim() == 2]
    gains = [w for w in model.parameters() if w.dim() == 1]
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    windows = corpus.Windows(text.training, 32, 4, 1)
    losses = []
    for step in range(3):
        rows = torch.from_numpy(windows(step))
        logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = config.rate(3e-3, step)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    assert ours.losses["training_loss"].iloc[-1] == pytest.approx(np.mean(losses), abs=1e-5)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(ours.weights[name], weight, atol=2e-5, rtol=1e-3)


def test_the_last_loss_is_that_of_the_model_on_every_held_out_byte(trained, text):
    sums, sizes = [], []
    for document in text.held_out:
        content = document.text.encode()
        total = 0.0
        for start in range(0, len(content), 32):
            ids = torch.tensor([[ladder.BOS, *content[start : start + 32]]])
            with torch.no_grad():
                logits = trained.model(ids).logits[0, :-1]
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        sums.append(total)
        sizes.append(len(content))
    last = trained.losses.iloc[-1]
    assert last.held_out_loss == pytest.approx(sum(sums) / sum(sizes), abs=1e-5)
    np.testing.assert_allclose(trained.documents["loss"], np.divide(sums, sizes), rtol=1e-5)


def test_a_killed_run_goes_on_to_the_same_bits(folder, text, tmp_path):
    checkpoint = tmp_path / "run.pt"
    code = f"""
import os, signal
from depthutil import ladder
from depthutil.ladder import Design
config = ladder.LadderConfig(**{ {f: getattr(SMALL, f) for f in SMALL.__dataclass_fields__} })
def kill(step, steps, left):
    if step == 17:
        os.kill(os.getpid(), signal.SIGKILL)
ladder.train(config, 2, 0, text=ladder.corpus({str(folder)!r}), checkpoint={str(checkpoint)!r},
             checkpoint_seconds=0, progress=kill, device="cpu", threads=1)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert ladder.LadderModel.from_checkpoint(checkpoint).step == 10
    text = ladder.corpus(folder)
    options = {"text": text, "device": "cpu", "threads": 1}
    resumed = ladder.train(SMALL, 2, 0, checkpoint=checkpoint, **options)
    straight = ladder.train(SMALL, 2, 0, **options)
    assert resumed.losses.equals(straight.losses)
    assert resumed.documents.equals(straight.documents)
    assert all(torch.equal(resumed.weights[k], w) for k, w in straight.weights.items())
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_of_something_else_is_refused(text, tmp_path):
    path = tmp_path / "run.pt"
    config = replace(SMALL, steps=6, test_every=6)
    options = {"text": text, "checkpoint": path, "device": "cpu"}
    ladder.train(config, 1, 0, **options)
    for changes, depth, seed, word in (
        ({"weight_decay": 0.2}, 1, 0, "weight_decay"),
        ({}, 2, 0, "depth"),
        ({}, 1, 1, "seed"),
        ({"learning_rates": (1e-3,)}, 1, 0, "learning_rate"),
    ):
        with pytest.raises(ValueError, match=f"belongs to a model with other {word}: remove it"):
            ladder.train(replace(config, **changes), depth, seed, **options)
    fewer = ladder.Corpus("library of another Python", text.training[1:], text.held_out)
    with pytest.raises(ValueError, match="library of another Python with other files: go on with"):
        ladder.train(config, 1, 0, **options | {"text": fewer})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"run\.pt is not a whole checkpoint .* remove it"):
        ladder.train(config, 1, 0, **options)


def test_a_loss_that_is_no_number_stops_with_depth_seed_and_step(text, tmp_path):
    config = replace(SMALL, learning_rates=(1e38,))
    sentence = r"depth 2, seed 1 is no number any more at step 3: lower the learning rate of 1e\+38"
    with pytest.raises(FloatingPointError, match=sentence):
        ladder.train(config, 2, 1, text=text, checkpoint=tmp_path / "run.pt", device="cpu")
    assert not list(tmp_path.iterdir())


def test_progress_goes_to_standard_error(text, capsys):
    ladder.train(replace(SMALL, steps=6), 1, 0, text=text, progress=True, device="cpu")
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("depth 1, seed 0: step 6 of 6, held-out loss 5.")


def test_the_search_takes_the_rate_that_learns_and_survives_one_that_explodes(text, tmp_path):
    config = replace(SMALL, learning_rates=(1e-5, 3e-3, 1e38), search_steps=20)
    options = {"text": text, "device": "cpu"}
    with pytest.raises(ValueError, match="there are 3 learning rates: give one of"):
        ladder.train(config, 1, 0, **options)
    rate, table = ladder.best_rate(config, 1, tmp_path, **options)
    assert rate == 3e-3
    assert table["learning_rate"].tolist() == [1e-5, 3e-3, 1e38]
    assert table["training_loss"].iloc[2] == math.inf
    assert ladder.best_rate(SMALL, 1, tmp_path)[0] == 3e-3


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"width": 40}, "width is a multiple of 16, not 40"),
        ({"width": 0}, "width is a whole number of at least 1, not 0"),
        ({"depths": (0, 1)}, "depths are at least 1"),
        ({"depths": 4}, "depths is a sequence of whole numbers, not 4"),
        ({"depths": (1.5,)}, r"depths is a sequence of whole numbers, not \(1.5,\)"),
        ({"seeds": (0, 0)}, "seeds lists each value once"),
        ({"learning_rates": (0.0,)}, "learning_rates are positive"),
        ({"warmup": 6_000}, "warmup is less than the 6,000 steps, not 6000"),
        ({"weight_decay": -1}, "weight_decay is a number of at least 0, not -1"),
        ({"steps": 2.5}, "steps is a whole number of at least 1, not 2.5"),
        ({"final_sequences": 0}, "final_sequences is a whole number of at least 1, not 0"),
        (
            {"learning_rates": (1e-3, 2e-3), "search_steps": 50},
            "search_steps are more than the warmup of 100",
        ),
    ],
)
def test_settings_without_sense_are_refused_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ladder.LadderConfig(**changes)


def test_scales():
    with pytest.raises(ValueError, match="there is no scale 'tpu': choose from demo, cpu, gpu"):
        ladder.LadderConfig.at("tpu")
    cpu = ladder.LadderConfig.at("cpu")
    assert cpu.tokens > 12e6 and cpu.depths == (1, 2, 3, 4, 6, 8, 12, 16)
    # In float32, three seeds of the ladder fit the 40 MB that the repository may give it.
    assert 3 * 4 * sum(map(cpu.parameters, cpu.depths)) < 40e6
    for scale in ("gpu", "gpu-wide"):
        config = ladder.LadderConfig.at(scale)
        assert config.tokens >= 20 * config.parameters(max(config.depths))
        assert len(config.seeds) == 3 and len(config.learning_rates) > 1


def test_the_order_of_training_makes_early_stops_useful():
    order = ladder.shards(ladder.LadderConfig())
    assert [shard.seed for shard in order] == [0] * 8 + [1] * 8
    assert {shard.depth for shard in order[:4]} == {1, 2, 12, 16}
    assert len(set(order)) == 16


# Models that come with the book ---------------------------------------------------------


def test_a_saved_model_loads_by_name_and_is_the_one_that_was_trained(
    trained, text, tmp_path, monkeypatch
):
    from depthutil import models

    (tmp_path / "models").mkdir()
    monkeypatch.setattr(archive, "_PACKAGE", tmp_path / "depthutil")
    path = trained.save(tmp_path / "models")
    assert path.name == "ladder-w16-d02-s0" and ladder.members()["name"].tolist() == [path.name]
    assert trained.save(tmp_path / "models") == path  # once more, over the old one
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    model, tokenizer = models.load(path.name, device="cpu")
    ids = torch.tensor([tokenizer(text.held_out[0].text[:20])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trained.model(ids).logits, rtol=0, atol=1e-5)
    assert all(torch.equal(model.state_dict()[k], w) for k, w in trained.weights.items())
    config = json.loads((path / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["rope_theta"] == 10_000


def test_the_card_says_what_was_done(trained, text):
    card = trained.card()
    for part in (
        "# ladder-w16-d02-s0",
        f"{SMALL.parameters(2):,}",
        "3,840 tokens of the files of",
        text.summary["training"]["sha256"],
        text.summary["held_out"]["sha256"],
        f"{trained.losses['held_out_loss'].iloc[-1]:.4f}",
        f"{trained.losses['training_loss'].iloc[0]:.4f}",
        "peak rate 0.003, 5 steps of warm-up",
        "| seed | 0",
        "1 of ",
        trained.commit,
    ):
        assert part in card, part


def test_an_unfinished_model_is_not_saved(text, tmp_path):
    def stop(step, steps, left):
        if step == 12:
            raise KeyboardInterrupt

    options = {"text": text, "checkpoint": tmp_path / "a.pt", "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        ladder.train(SMALL, 1, 0, progress=stop, device="cpu", **options)
    begun = ladder.LadderModel.from_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"ladder-w16-d01-s0 is at step 10 of 30: train it first"):
        begun.save(tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_command_trains_shares_and_assembles(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        ladder.recipe.SCALES, "demo", {f: getattr(SMALL, f) for f in SMALL.__dataclass_fields__}
    )
    places = {name: tmp_path / name for name in ("checkpoints", "models", "results")}
    base = ["--folder", str(places["checkpoints"]), "--scale", "demo", "--text", str(folder)]
    base += ["--device", "cpu", "--models", str(places["models"])]
    base += ["--results", str(places["results"])]

    def call(*words) -> str:
        try:
            command.main(["ladder", words[0], *base, *words[1:]])
        except SystemExit as end:
            assert not end.code, end.code
        return capsys.readouterr().out

    assert "shard 3 (ladder-w16-d02-s1): not begun" in call("status")
    with pytest.raises(AssertionError, match=r"no shard of ladder in .* is finished: run goes on"):
        call("assemble")
    config = ladder.LadderConfig.at("demo")
    path = places["checkpoints"] / f"{ladder.slug(config, 1, 0)}.pt"
    with _runs.claimed(path) as ours:
        assert ours
        assert "shard 0: ladder-w16-d01-s0 is taken" in call("run", "--shards", "0", "1")
    assert not path.exists()
    call("run")
    assert "shard 0 (ladder-w16-d01-s0): tested at step 30 of 30, held-out loss" in call("status")
    call("assemble")
    names = [config.name(d, s) for d in (1, 2) for s in (0, 1)]
    files = sorted(p.name for p in places["models"].iterdir())
    assert files == sorted(names)
    assert sorted(p.name for p in places["results"].iterdir()) == [
        "ladder_documents.parquet",
        "ladder_losses.parquet",
    ]
    monkeypatch.setattr(archive, "_PACKAGE", tmp_path / "depthutil")
    found = ladder.curves()
    assert len(found.frame) == 4 * 3 and found.provenance["seeds"] == [0, 1]
    assert found.provenance["config"]["corpus"]["training"]["documents"] > 40
    assert found.provenance["config"]["learning_rates"]["ladder-w16-d01-s0"] == 3e-3
    assert set(ladder.documents().frame.groupby(["depth", "seed"]).groups) == {
        (d, s) for d in (1, 2) for s in (0, 1)
    }
    with pytest.raises(FileNotFoundError, match=r"ladder_losses_one\.parquet is missing"):
        ladder.curves("one")
    call("assemble", "--seeds", "1", "--losses", "one")
    assert ladder.curves("one").provenance["scale"] == "demo, with other seeds"
    assert ladder.documents("one").frame["seed"].unique() == [1]
    assert sorted(p.name for p in places["models"].iterdir()) == files


def test_models_of_different_recipes_are_not_put_together(trained, text, tmp_path):
    other = ladder.train(replace(SMALL, weight_decay=0.0), 1, 0, text=text, device="cpu")
    with pytest.raises(ValueError, match="were trained with other weight_decay"):
        ladder.assemble([trained, other], text, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="no model of the ladder is finished"):
        ladder.assemble([], text, tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())


def test_held_out_text_is_whole_and_cut_as_asked():
    documents = ladder.corpus().held_out
    for document in documents:
        assert int(hashlib.sha256(document.path.encode()).hexdigest(), 16) % 20 == 0
    whole = ladder.held_out()
    assert sorted(whole) == sorted(document.text for document in documents)
    assert ladder.held_out(5) == whole[:5]
    short = ladder.held_out(5, length=100, per_document=3)
    assert len(short) <= 15 and all(len(piece.encode()) <= 99 for piece in short)
    assert short[0] == whole[0][:99] and all(any(p in w for w in whole) for p in short)
    for words in ({"n_documents": 0}, {"length": 1}, {"length": 9, "per_document": 0}):
        with pytest.raises(ValueError, match=f"{list(words)[-1]} is at least"):
            ladder.held_out(**words)
    with pytest.raises(ValueError, match="per_document=2 needs a length to cut at"):
        ladder.held_out(per_document=2)


def test_without_a_ladder_one_sentence_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_PACKAGE", tmp_path / "depthutil")
    assert len(ladder.members()) == 0
    for call in (ladder.curves, ladder.documents):
        with pytest.raises(FileNotFoundError, match="no depth ladder here yet: make ladder trains"):
            call()


def test_the_models_that_are_here_are_whole_and_small():
    folder = archive.find("models")
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 40e6
    for name in ladder.members()["name"]:
        files = {p.name for p in (folder / name).iterdir()}
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files
    if len(ladder.members()):
        losses = ladder.curves().frame
        assert {f"d{d:02d}-s{s}" for d, s in zip(losses.depth, losses.seed, strict=True)} == {
            name.split("-", 2)[2] for name in ladder.members()["name"]
        }


def test_the_wheel_carries_the_models():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'models = "depthutil/_archived/models"' in project
    assert '"results", "models"' in project


def test_a_model_is_trained_on_while_an_edit_holds(trained, text):
    from depthutil import interventions

    given = {"sequence": 32, "batch": 4, "text": text}
    model = trained.model
    whole = ladder.fine_tune(model, 0, **given)
    assert whole["step"].unique().tolist() == [0] and whole["document"].is_unique
    with interventions.skip(model, 1):
        healed = ladder.fine_tune(model, 20, rate=3e-3, test_at=[5], **given)
    loss = healed.groupby("step").apply(
        lambda t: np.average(t["loss"], weights=t["tokens"]), include_groups=False
    )
    assert loss.index.tolist() == [0, 5, 20] and loss[20] < loss[0]
    assert loss[0] != pytest.approx(np.average(whole["loss"], weights=whole["tokens"]), abs=1e-4)
    assert not model.training
    for steps, rate, message in ((-1, 1e-3, "steps is a whole"), (1, 0.0, "rate is a number")):
        with pytest.raises(ValueError, match=message):
            ladder.fine_tune(model, steps, rate=rate, **given)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="no number at step 0"):
        ladder.fine_tune(model, 1, **given)
    assert not model.training
