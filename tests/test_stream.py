"""What is measured on a model before it is believed."""

import copy

import pytest
import torch
import transformers
from test_models import HEADS, build, config, tokens
from torch import nn

from depthutil import models, stream, trajectory

RECORD = (
    lambda model, ids: trajectory.record(model, [ids]),
    lambda model, ids: trajectory.writes_of(model, ids),
    lambda model, ids: trajectory.decode_early(model, [ids]),
)
everywhere = pytest.mark.parametrize("call", RECORD, ids=["record", "writes_of", "decode_early"])


def changing(model, number, function):
    """A model one of whose blocks does something else to the stream, as its own code would."""
    block = model.base_model.layers[number]
    own = block.forward
    block.forward = lambda hidden_states, *args, **kwargs: function(
        own, hidden_states, args, kwargs
    )
    return model


def half(own, h, args, kwargs):
    out = own(h, *args, **kwargs)
    return out - h / 2


def normed(own, h, args, kwargs):
    return own(h / h.norm(dim=-1, keepdim=True), *args, **kwargs)


def doubled(own, h, args, kwargs):
    return 1.1 * own(h, *args, **kwargs)


@everywhere
@pytest.mark.parametrize("rescale", [half, normed, doubled])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stream_that_is_rescaled_is_no_sum_of_writes(call, rescale, precision, monkeypatch):
    monkeypatch.delitem(models.FAMILIES, "llama")  # a stranger
    model = changing(build("llama").to(precision), 1, rescale)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*block 2 normalises or rescales"):
        call(model, tokens())


@pytest.mark.parametrize("rescale", [half, normed, doubled])
def test_nor_in_a_family_of_the_table(rescale):
    model = changing(build("llama"), 1, rescale)
    with pytest.raises(ValueError, match=r"block 2 (normalises|what attention and MLP write)"):
        trajectory.record(model, [tokens()])


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stream_of_any_size_is_recorded(size, precision):
    model = build("mixtral", **HEADS, num_local_experts=3)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(size)
    parts = stream.measured(model.to(precision), {"input_ids": tokens()}, head=True)
    assert parts.sublayers and parts.parallel is False


@pytest.mark.parametrize("scale", [0.1, 0.6, 0.8, 0.97, 1.3])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_writes_are_multiplied_with_is_found_near_one_too(scale, precision):
    model = build("granite", **HEADS, residual_multiplier=scale).to(precision)
    parts = stream.measured(model, {"input_ids": tokens()}, head=False)
    assert parts.sublayers and parts.attention_write[0] is model.model.layers[0].self_attn
    found = {write.scale for pair in parts.writes for write in pair}
    # In sixteen bits a scale of 0.97 is told from 1 where rounding lets it be.
    assert found <= ({scale} if precision == torch.float32 or scale != 0.97 else {scale, 1.0})


@everywhere
def test_a_model_that_has_seen_the_future_is_refused(call):
    model = build("llama")
    model.config.is_causal = False
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*not causal.*is_causal=False"):
        call(model, tokens())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_one_token_ahead_is_the_future_too(precision):
    def peek(own, h, args, kwargs):
        out = own(h, *args, **kwargs)
        return out + 0.1 * torch.cat([h[:, 1:], h[:, :1]], 1)

    model = changing(build("llama").to(precision), 2, peek)
    with pytest.raises(ValueError, match="cannot be recorded"):
        trajectory.record(model, [tokens()])


@everywhere
def test_positions_that_are_not_tokens_are_refused(call):
    small = {"hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 24}
    model = build("cpmant", **small, prompt_length=4, prompt_types=4, segment_types=4)
    with pytest.raises(ValueError, match=r"CpmAntForCausalLM.*\(2, 16, 16\) where tokens are"):
        call(model, tokens())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_soft_cap_shows_in_sixteen_bits(precision, cap):
    """Of logits of 15, a cap of 30 takes off a tenth; rounding a hundredth."""
    model = build("llama").to(precision)
    with torch.no_grad():
        model.lm_head.weight.mul_(15 / model(tokens()).logits.abs().max())
    own = model.forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        if cap is not None:
            output.logits = cap * torch.tanh(output.logits / cap)
        return output

    model.forward = forward
    parts = stream.measured(model, {"input_ids": tokens()}, head=True)
    assert parts.scale == 1
    assert parts.softcap is None if cap is None else parts.softcap == pytest.approx(cap, rel=0.05)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_else_becomes_of_logits_is_refused(precision):
    model = build("llama").to(precision)
    own = model.forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits[..., ::2] *= 1.05
        return output

    model.forward = forward
    trajectory.record(model, [tokens()])  # which does not ask
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*neither a scale nor a soft cap"):
        trajectory.decode_early(model, [tokens()])


def test_a_final_norm_that_is_guessed_wrongly_is_found():
    model = build("stablelm", num_key_value_heads=2)
    right = model.model.norm
    del model.model.norm
    model.model.add_module("other_norm", nn.LayerNorm(16))
    model.model.add_module("norm", right)
    assert models.anatomy(model).norm is not right
    assert stream.measured(model, {"input_ids": tokens()}, head=True).norm is right


def test_a_head_that_the_model_does_not_name_is_found():
    model = build("llama4_text", **HEADS, num_local_experts=2, intermediate_size_mlp=24)
    model.get_output_embeddings = lambda: None
    assert models.anatomy(model).head is model.lm_head
    assert len(trajectory.decode_early(model, [tokens()])) == 3


# Wrappers and parts of larger models ----------------------------------------------------


class Wrapper(nn.Module):
    """What PEFT puts around a model."""

    def __init__(self, model, **adapter):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})
        self.config = model.config
        self.peft_config = {"default": type("Adapter", (), adapter)}

    def get_base_model(self):
        return self.base_model["model"]


def test_a_model_with_adapters_is_recorded_as_the_model_inside():
    model = build("llama")
    wrapped = Wrapper(copy.deepcopy(model), is_prompt_learning=False)
    one, other = (trajectory.record(m, [tokens()]).table() for m in (model, wrapped))
    assert one.equals(other)
    with pytest.raises(ValueError, match=r"Wrapper .*prompt tuning.*get_base_model\(\)"):
        trajectory.record(Wrapper(model, is_prompt_learning=True), [tokens()])


def test_of_a_model_that_sees_the_text_decoder_is_recorded():
    text = {**HEADS, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    whole = transformers.Gemma3Config(
        text_config=config("gemma3_text", **text).to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=39,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(whole).eval()
    parts = models.anatomy(model)
    assert (parts.width, parts.vocabulary, parts.depth) == (16, 40, 3)
    inside = trajectory.record(model.model.language_model, [tokens()]).table()
    assert trajectory.record(model, [tokens()]).table().equals(inside)
    assert len(trajectory.decode_early(model, [tokens()])) == 3


def test_blocks_of_two_classes_are_one_stream():
    model = build(
        "jamba",
        num_key_value_heads=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    )
    parts = stream.measured(model, {"input_ids": tokens()}, head=False)
    assert len({type(block) for block in parts.blocks}) == 2
    assert [type(m).__name__ for m in parts.attention] == [
        "JambaMambaMixer",
        "JambaAttention",
        "JambaMambaMixer",
    ]
    assert parts.container is model.model.layers


def test_the_module_and_what_it_writes_are_two_things():
    gemma, opt = (models.anatomy(build(family)) for family in ("gemma2", "opt"))
    for block, mlp, write in zip(gemma.blocks, gemma.mlp, gemma.mlp_write, strict=True):
        assert mlp is block.mlp and write is block.post_feedforward_layernorm
    assert opt.mlp is None  # two linear maps among the rest of the block
    assert opt.mlp_write == tuple(block.fc2 for block in opt.blocks)


# Nothing stays --------------------------------------------------------------------------


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_measuring_leaves_no_hook_no_mode_and_no_random_number(family):
    model = build(family, **(HEADS if family == "llama" else {"num_key_value_heads": 2})).train()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    state = torch.random.get_rng_state()
    stream.measured(model, {"input_ids": tokens()}, head=True)
    assert hooks(model) == 0 and all(m.training for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


ABLATED = {
    "llama": ({}, "self_attn", "mlp", False),
    "gpt_neox": ({}, "attention", "mlp", True),
    "stablelm": ({"num_key_value_heads": 2}, "self_attn", "mlp", False),
    "gptj": ({"rotary_dim": 4}, "attn", "mlp", True),
}


@pytest.mark.parametrize("family", ABLATED)
@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("blocks", [(1,), (0, 2)])
def test_a_model_that_somebody_has_ablated_is_recorded_as_it_is(family, part, blocks):
    changes, attention, mlp, parallel = ABLATED[family]
    model = build(family, **changes)
    stack = models.anatomy(model).blocks
    modules = [stack[i].get_submodule({"attention": attention, "mlp": mlp}[part]) for i in blocks]
    with stream.hooked(after=[(module, torch.zeros_like) for module in modules]):
        writes = trajectory.writes_of(model, tokens(), "sublayer")
        assert trajectory.record(model, [tokens()], "sublayer").parallel is parallel
        with torch.no_grad():
            theirs = model(tokens(), output_hidden_states=True).hidden_states
    states = writes.cumsum(0)[::2][:-1]
    assert (states - torch.stack(theirs[:-1]).double()).abs().max() < 1e-5
    silent = [2 * i + (1 if part == "attention" else 2) for i in blocks]
    sizes = writes.flatten(1).norm(dim=1)
    assert (sizes[silent] == 0).all() and (sizes > 0).sum() == 7 - len(blocks)


def test_a_network_that_writes_nothing_yet_is_recorded():
    model = build("llama")
    with torch.no_grad():
        for block in model.model.layers:  # as some begin their training
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    assert trajectory.record(model, [tokens()], "sublayer").angles()["mean"].eq(0).all()
    stranger = build("stablelm", num_key_value_heads=2)
    with torch.no_grad():
        for block in stranger.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    assert trajectory.record(stranger, [tokens()]).angles()["mean"].eq(0).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_come_off_whatever_happens(error):
    model = build("llama")

    def fail(states):
        raise error

    with pytest.raises(error), stream.hooked(after=[(model.model.layers[1], fail)]):
        model(tokens())
    assert hooks(model) == 0
    with pytest.raises(AttributeError), stream.hooked([(model.model.norm, fail), (None, fail)]):
        pass
    assert hooks(model) == 0


def test_modules_that_exchange_their_places_are_put_back_whatever_happens():
    model, ids = build("llama"), tokens()
    one, other = model.model.layers[0].mlp, model.model.layers[2].mlp
    with torch.no_grad():
        whole = model(ids).logits
        with pytest.raises(KeyboardInterrupt), stream.computing_as((one, other), (other, one)):
            exchanged = model(ids).logits
            with stream.computing_as((one, one)):  # inside another, and the same one
                assert torch.equal(model(ids).logits, exchanged)
            raise KeyboardInterrupt
        assert torch.equal(model(ids).logits, whole)
        model.model.layers[0].mlp, model.model.layers[2].mlp = other, one
        assert torch.equal(model(ids).logits, exchanged)
    assert "forward" not in vars(one) and "forward" not in vars(other)


def test_only_a_short_piece_of_the_batch_is_measured(monkeypatch):
    model, seen = build("stablelm", num_key_value_heads=2), []
    model.model.embed_tokens.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    model.config.max_position_embeddings = 4096
    stream.measured(model, {"input_ids": tokens(5, 200)}, head=True)
    assert set(seen) == {stream.PROBE} and len(seen) < 12


def test_padding_is_not_measured():
    model = build("stablelm", num_key_value_heads=2)
    batch = {"input_ids": tokens(3), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    batch["attention_mask"][0, 5:] = batch["attention_mask"][2, 9:] = 0
    assert stream.measured(model, batch, head=True).sublayers
    left = {"input_ids": tokens(2), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    left["attention_mask"][0, :4] = 0
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert stream.measured(model, left, head=True).sublayers


def test_a_stream_is_run_with_hooks_that_come_off():
    model = build("llama")
    live = stream.Stream(model)
    inputs, real = live.inputs(tokens())
    before = live.parts
    with live.open():
        live.measure(inputs, head=True)
        assert live.parts.sublayers and live.parts.depth == before.depth
        plain = live.run(inputs)
        seen = []
        doubled = live.run(
            inputs,
            before=[(live.parts.blocks[1], lambda h: 2 * h)],
            after=[(live.parts.blocks[-1], seen.append)],
        )
        again = live.run(inputs)
    assert real.all() and len(seen) == 1 and not torch.allclose(plain, doubled)
    assert torch.equal(plain, again)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert repr(live) == "Stream(LlamaForCausalLM (llama))" and live.dtype == torch.float32
    with pytest.raises(ZeroDivisionError):
        live.run(inputs, before=[(live.parts.blocks[0], lambda h: 1 / 0)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
