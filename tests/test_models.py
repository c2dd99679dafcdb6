import json
import os
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from depthutil import models, stream, trajectory

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "gpt_neox": {},
    "gpt_neox sequential": {"use_parallel_residual": False},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "llama": HEADS,
    "mistral": HEADS,
    "qwen2": HEADS,
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": {**HEADS, "final_logit_softcapping": 0.5, "sliding_window": 8},
    "gemma3_text": {**HEADS, "sliding_window": 8},
    "olmo2": HEADS,
    "phi": {},
    "phi3": HEADS,
    "smollm3": HEADS,
}


def config(family: str, **changes):
    kind = family.split()[0]
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    changes = {**SMALL, **FAMILIES.get(family, {}), **changes}
    return AutoConfig.for_model(kind, **changes)


def build(family: str, **changes):
    """A random model whose norms and biases are not the neutral ones of a fresh model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def tokens(rows=2, length=12, seed=0):
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


# Writes add up to states ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_sum_to_the_states_that_the_model_has(family):
    model, ids = build(family), tokens()
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        head = model(ids).logits
    parts = models.anatomy(model)
    assert parts.depth == 3
    assert parts.parallel == (family in ("gpt_neox", "phi"))
    # What is read before the final norm; the last entry has been through it.
    theirs = torch.stack(hidden[:-1]).double()
    for kind in ("sublayer", "block"):
        states = trajectory.writes_of(model, ids, kind).cumsum(0)
        states = states[:: 2 if kind == "sublayer" else 1]
        assert states.shape == (4, 2, 12, 16)
        assert (states[:-1] - theirs).abs().max() < 2e-6 * theirs.abs().max()
        with torch.no_grad():
            last = parts.norm(states[-1].float())
            logits = parts.logits(states[-1].float())
        assert (last - hidden[-1]).abs().max() < 1e-5 * hidden[-1].abs().max()
        assert (logits - head).abs().max() < 1e-5 * head.abs().max()


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma2"])
def test_sixteen_bits_and_a_bare_backbone_are_recorded_too(family):
    half = build(family).to(torch.bfloat16)
    trajectory.record(half, [tokens()], "sublayer")
    backbone = AutoModel.from_config(config(family)).eval()
    recorded = trajectory.record(backbone, [tokens()])
    assert recorded.depth == 3
    with pytest.raises(ValueError, match="no head"):
        models.anatomy(backbone).logits(torch.zeros(1, 16))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_measured_is_what_the_table_says(family, precision, monkeypatch):
    model, ids = build(family).to(precision), tokens()
    known = stream.measured(model, {"input_ids": ids}, head=False)
    named = trajectory.record(model, [ids], "sublayer")
    monkeypatch.delitem(models.FAMILIES, known.family)
    assert models.anatomy(model).writes is None
    found = stream.measured(model, {"input_ids": ids}, head=False)
    for name in ("attention_write", "mlp_write", "attention", "mlp", "norm", "parallel", "writes"):
        assert getattr(found, name) == getattr(known, name), name
    assert found.parallel == (family in ("gpt_neox", "phi"))
    measured = trajectory.record(model, [ids], "sublayer")
    assert measured.table().equals(named.table())  # to the last bit


OTHERS = {
    "falcon": ({"num_kv_heads": 1}, ("self_attention", "mlp"), True),
    "bloom": ({"n_layer": 3, "n_head": 2}, ("self_attention.dense", "mlp.dense_4h_to_h"), False),
    "gpt_neo": (
        {"num_layers": 3, "num_heads": 2, "attention_types": [[["global"], 3]]},
        ("attn", "mlp"),
        False,
    ),
    "gptj": ({"rotary_dim": 4}, ("attn", "mlp"), True),
    "stablelm": ({"num_key_value_heads": 2}, ("self_attn", "mlp"), False),
    "mixtral": ({**HEADS, "num_local_experts": 3}, ("self_attn", "mlp"), False),
    "olmo": (HEADS, ("self_attn", "mlp"), False),
    "cohere": ({**HEADS, "logit_scale": 0.3}, ("self_attn", "mlp"), True),
    "granite": (
        {**HEADS, "residual_multiplier": 0.4, "logits_scaling": 3.0},
        ("self_attn", "mlp"),
        False,
    ),
}


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_sublayers_of_families_without_a_row_are_found_by_what_they_write(family, precision):
    changes, writes, parallel = OTHERS[family]
    model, ids = build(family, **changes).to(precision), tokens()
    assert models.anatomy(model).writes is None and models.anatomy(model).parallel is None
    parts = stream.measured(model, {"input_ids": ids}, head=True)
    for block, attention, mlp in zip(
        parts.blocks, parts.attention_write, parts.mlp_write, strict=True
    ):
        assert (attention, mlp) == tuple(block.get_submodule(at) for at in writes)
    assert parts.parallel is parallel
    eps, scale = torch.finfo(precision).eps, changes.get("residual_multiplier", 1)
    for write in (write for pair in parts.writes for write in pair):
        assert write.scale == pytest.approx(scale, rel=5e-3 if eps > 1e-5 else 1e-6)
    assert parts.scale == changes.get("logit_scale", 1 / changes.get("logits_scaling", 1))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    states = trajectory.writes_of(model, ids, "sublayer").cumsum(0)[::2]
    theirs = torch.stack(output.hidden_states[:-1]).double()
    assert (states[:-1] - theirs).abs().max() < 16 * eps * theirs.abs().max()
    loss = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    )
    assert trajectory.decode_early(model, [ids])["mean"].iloc[-1] == pytest.approx(
        loss.item(), abs=10 * eps
    )


def test_a_block_of_one_write_has_no_sublayers_but_is_recorded():
    model = build("mamba", state_size=4, num_hidden_layers=3)
    parts = stream.measured(model, {"input_ids": tokens()}, head=False)
    assert [len(writes) for writes in parts.writes] == [1, 1, 1]
    assert parts.attention_write is parts.mlp_write is parts.parallel is None
    assert trajectory.record(model, [tokens()]).depth == 3
    with pytest.raises(ValueError, match=r"MambaForCausalLM \(mamba\) cannot be told.*'block'"):
        trajectory.record(model, [tokens()], "sublayer")


# Never a silent wrong figure ------------------------------------------------------------


def test_architectures_without_additive_blocks_are_refused_by_name():
    post = build("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="opt-350m"):
        models.anatomy(post)
    with pytest.raises(ValueError, match=r"T5.*has an encoder"):
        models.anatomy(
            AutoModel.from_config(
                AutoConfig.for_model("t5", d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
            )
        )
    first = AutoConfig.for_model("openai-gpt", vocab_size=40, n_embd=16, n_layer=3, n_head=2)
    with pytest.raises(ValueError, match=r"OpenAIGPTLMHeadModel.*post-norm"):
        trajectory.record(AutoModelForCausalLM.from_config(first), [tokens()])
    with pytest.raises(TypeError, match="not a Linear"):
        models.anatomy(torch.nn.Linear(2, 2))


class PostNorm(torch.nn.Module):
    """An architecture nobody has heard of, whose blocks normalise the stream."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.write, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

        def forward(self, hidden_states):
            return self.norm(hidden_states + self.write(hidden_states))

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"model_type": "secret", "num_hidden_layers": 2})
        self.embed, self.norm = torch.nn.Embedding(40, 8), torch.nn.LayerNorm(8)
        self.layers = torch.nn.ModuleList([self.Block(), self.Block()])

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        states = self.embed(input_ids)
        for block in self.layers:
            states = block(states)
        return self.norm(states)


def test_a_post_norm_model_is_found_out_by_what_its_blocks_return():
    model = PostNorm()
    object.__setattr__(model, "base_model", model)
    with pytest.raises(ValueError, match=r"PostNorm \(secret\).*normalises or rescales"):
        trajectory.record(model, [tokens()])


@pytest.mark.parametrize("writes", ["block", "sublayer"])
def test_a_row_of_the_table_that_is_wrong_is_found_out(monkeypatch, writes):
    # Granite multiplies what it adds: its sublayers' outputs are not its writes.
    granite = build("granite", residual_multiplier=0.5, **HEADS)
    monkeypatch.setitem(models.FAMILIES, "granite", models.FAMILIES["llama"])
    with pytest.raises(ValueError, match="block 1 what attention and MLP write misses"):
        trajectory.record(granite, [tokens()], writes)


def test_a_block_that_runs_twice_is_refused():
    model = build("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(ValueError, match="cannot be recorded"):
        trajectory.record(model, [tokens()])


# Loading --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, as the ladder's are kept."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    path = tmp_path_factory.mktemp("clone") / "models" / "tiny-3"
    words = Tokenizer(WordLevel({"to": 0, "be": 1, "or": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    build("llama").save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def test_load_a_folder_and_a_model_of_the_book_by_its_short_name(folder, monkeypatch, capfd):
    model, tokenizer = models.load(folder, device="cpu")
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert tokenizer("to be")["input_ids"] == [0, 1]
    monkeypatch.setattr(models.archive, "find", lambda name: folder.parent.parent / name)
    assert models.available() == ["smollm2-135m", "tiny-3"]
    loaded = models.load("tiny-3", device="cpu", dtype="bfloat16")
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert capfd.readouterr().err == ""  # no progress bars in a chapter


def test_load_says_what_is_wrong(folder, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*config.json"):
        models.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        models.load("/no/such/folder")
    with pytest.raises(ValueError, match="give one of the two"):
        models.load(folder, device="cpu", device_map="auto")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs accelerate"):
        models.load(folder, device_map="auto")
    with pytest.raises(ValueError, match="dtype is such as"):
        models.load(folder, dtype="int8")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"depthutil\[models\]"):
        models.load(folder)


OFFLINE = """
import time, warnings
import transformers
from depthutil import models
warnings.simplefilter("error")
begin = time.perf_counter()
try:
    models.load("nobody/absent")
except FileNotFoundError as error:
    print(error)
print(time.perf_counter() - begin)
model, tokenizer = models.load("nobody/cached", device="cpu")
print(type(model).__name__, tokenizer("or be")["input_ids"], time.perf_counter() - begin)
"""


def test_without_a_network_load_fails_fast_and_reads_the_hubs_cache(folder, tmp_path):
    cache = tmp_path / "hub" / "models--nobody--cached"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    os.symlink(folder, cache / "snapshots" / ("0" * 40))
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    said, seconds, loaded = done.stdout.splitlines()
    assert said.startswith("'nobody/absent' is not on this machine") and "offline are" in said
    assert float(seconds) < 10
    name, *ids, later = loaded.replace("[", "").replace("]", "").replace(",", "").split()
    assert (name, ids) == ("LlamaForCausalLM", ["2", "1"])
    assert float(later) < 20


@pytest.mark.parametrize(
    "memory, capability, layers, spread, expected",
    [
        (16e9, (7, 5), 2, False, torch.float32),
        (16e9, (7, 5), 2, True, torch.float16),
        (1e4, (7, 5), 2, False, torch.float16),
        (1e4, (8, 0), 2, False, torch.bfloat16),
    ],
)
def test_precision_on_a_gpu(monkeypatch, memory, capability, layers, spread, expected):
    card = type("Card", (), {"total_memory": memory})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    some = config("llama", num_hidden_layers=layers)
    assert models._default_dtype(some, torch.device("cuda"), spread) == expected
    assert models._default_dtype(some, torch.device("cpu"), spread) == torch.float32


def test_parameters_are_counted_without_making_them():
    some = config("llama")
    assert models._parameters(some) == sum(
        p.numel() for p in AutoModelForCausalLM.from_config(some).parameters()
    )
    large = config("llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    begin = time.perf_counter()
    assert models._parameters(large) > 5e10
    assert time.perf_counter() - begin < 10


# Text -----------------------------------------------------------------------------------


def test_batches_cut_fill_up_and_leave_out():
    def letters(text):
        return {"input_ids": [ord(letter) for letter in text]}

    made = models.batches(letters, ["abcdef", "ab", "x", "abc"], length=4, size=2)
    assert [tuple(batch["input_ids"].shape) for batch in made] == [(2, 4), (1, 3)]
    assert made[0]["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    with pytest.raises(ValueError, match="two tokens"):
        models.batches(letters, ["x"])
    with pytest.raises(TypeError, match="list of texts"):
        models.batches(letters, "one text")
    with pytest.raises(ValueError, match="length is a whole number of at least 2"):
        models.batches(letters, ["abc"], length=1)


def test_held_out_texts_are_pieces_of_all_documents():
    from depthutil import ladder

    documents = ladder.held_out()
    pieces = models.texts("any", 2 * len(documents), source="held-out", length=32)
    assert len(pieces) == len(set(pieces)) == 2 * len(documents)
    assert max(len(piece.encode()) for piece in pieces) == 31
    origin = [next(i for i, text in enumerate(documents) if piece in text) for piece in pieces]
    assert len(set(origin)) > 0.9 * len(documents)  # a piece may also stand in another file
    few = models.texts("any", 5, source="held-out", length=32)
    assert len(few) == 5 and set(few) <= set(ladder.held_out(length=32))
    with pytest.raises(ValueError, match="count is a whole number of at least 1, not 0"):
        models.texts("any", 0)


def test_the_books_models_get_held_out_text_and_others_are_streamed(folder, monkeypatch):
    monkeypatch.setattr(models, "_trained_here", lambda: ["ours"])
    monkeypatch.setattr(models, "_streamed", lambda source, count: [source, count])
    assert models.texts("nobody/theirs", 3) == ["HuggingFaceFW/fineweb", 3]
    assert models.texts("ours", 3) == models.texts("nobody/theirs", 3, source="held-out")


def test_texts_are_read_from_a_folder_and_streamed_from_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text("two\nlines")
    (tmp_path / "b.txt").write_text("second")
    assert models.texts("any", 1, source=str(tmp_path)) == ["two\nlines"]
    assert models.texts("any", 9, source=str(tmp_path)) == ["two\nlines", "second"]
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        rows = [{"body": "x"}] if path == "nobody/odd" else [{"text": str(i)} for i in range(9)]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(models, "_hub_has", lambda name, revision, kind: True)
    assert models.texts("nobody/theirs", 2) == ["0", "1"]
    options = {"split": "train", "streaming": True, "name": "sample-10BT"}
    assert asked == [("HuggingFaceFW/fineweb", options)]
    with pytest.raises(ValueError, match=r"no column 'text', but \['body'\]"):
        models.texts("any", 2, source="nobody/odd")


def test_texts_say_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is empty: put text files there"):
        models.texts("any", 2, source=str(tmp_path))
    monkeypatch.setattr(models, "_hub_has", lambda name, revision, kind: False)
    with pytest.raises(ConnectionError, match="source='prose' and source='held-out' need no"):
        models.texts("nobody/theirs", 2)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        models.texts("nobody/theirs", 2)


def test_importing_the_modules_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from depthutil import models, trajectory\n"
        "import json; print(json.dumps(models.available()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), list)


# What is not whole ----------------------------------------------------------------------


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def rewritten(copied, change):
    from safetensors.torch import save_file

    weights = change(weights_of(copied))
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def test_a_model_is_never_filled_up_with_random_weights(copied):
    cut = rewritten(copied, lambda w: {k: v for k, v in w.items() if "1.mlp.up_proj" not in k})
    with pytest.raises(ValueError, match=r"copied lacks 1 weights.*layers.1.mlp.up_proj.weight"):
        models.load(cut)


def test_a_wrappers_prefix_is_named(copied):
    wrapped = rewritten(copied, lambda w: {f"_orig_mod.{k}": v for k, v in w.items()})
    with pytest.raises(ValueError, match=r"lacks \d+ weights.*_orig_mod.*rename"):
        models.load(wrapped)


def test_a_weight_of_another_shape_is_refused(copied):
    name = "model.layers.0.mlp.up_proj.weight"
    bad = rewritten(copied, lambda w: {**w, name: torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="copied could not be loaded"):
        models.load(bad)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("cut", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"version 1"])
def test_a_damaged_file_is_named(copied, name, cut):
    path = copied / name
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is damaged or not whole: fetch it again"):
        models.load(copied)


def test_code_of_its_own_is_not_run(copied):
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "mynet", "auto_map": {"AutoConfig": "configuration_mynet.C"}}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "configuration_mynet.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match=r"code of its own.*trust_remote_code=True.*record"):
        models.load(copied)


@pytest.mark.parametrize(
    "texts, message",
    [
        ({"text": ["to be"]}, r"a dict of 'text'.*table\['text'\]"),
        (pd.DataFrame({"text": ["to be"]}), r"a DataFrame of 'text'"),
        (transformers.BatchEncoding({"input_ids": [[1, 2]]}), "tokens need no batches"),
        (b"to be", "a list of texts"),
        (["to be", None], "text 1 is a NoneType"),
        ([[1, 2, 3]], "text 0 is a list"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(texts, message):
    with pytest.raises(TypeError, match=message):
        models.batches(lambda text: {"input_ids": [1, 2]}, texts)
    frame = pd.DataFrame({"text": ["to be"]})
    assert len(models.batches(lambda text: {"input_ids": [1, 2]}, frame["text"])) == 1


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", True])
def test_how_many_texts_is_a_whole_number(count):
    with pytest.raises(ValueError, match=rf"count is a whole number.*not {count!r}"):
        models.texts("x", count, source="held-out")


def test_losses_are_of_the_next_real_token_of_each_document():
    model = build("llama").eval()
    ids = tokens(rows=3, length=10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = models.losses(
        model,
        [
            {"input_ids": ids[:1], "attention_mask": mask[:1]},
            {"input_ids": ids[1:], "attention_mask": mask[1:]},
        ],
    )
    with torch.no_grad():
        logs = model(ids, attention_mask=mask).logits.log_softmax(-1)
    for row, length in enumerate((10, 6, 10)):
        each = [-logs[row, t, ids[row, t + 1]].item() for t in range(length - 1)]
        assert found[row] == pytest.approx(sum(each) / len(each), rel=1e-5)
