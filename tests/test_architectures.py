"""Every causal language model class of the installed transformers, at a small size.

Each is recorded exactly or refused in one sentence. ``architectures.json`` keeps what became of
each with the version that constraints.txt pins; ``python tests/test_architectures.py`` writes it.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from depthutil import models, trajectory

KEPT = Path(__file__).with_name("architectures.json")
DEPTH, LARGEST = 3, 1e7  # blocks; parameters of a model that is still small

#: What sizes are called, in one configuration or another.
NAMES = {
    DEPTH: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers conv_L_cache",
    64: "vocab_size vocab_size_per_layer_input intermediate_size n_inner ffn_dim decoder_ffn_dim "
    "encoder_ffn_dim d_ff ffn_hidden_size dim_ff dff max_position_embeddings n_positions n_ctx "
    "max_seq_len seq_length mamba_d_ssm",
    32: "hidden_size n_embd d_model dim embed_dim word_embed_proj_dim emb_dim embedding_size "
    "moe_intermediate_size shared_expert_intermediate_size lru_width attention_hidden_size "
    "cross_attention_hidden_size",
    16: "q_lora_rank kv_lora_rank qk_head_dim attention_window_size",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state "
    "ssm_state_size mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim mamba_headdim "
    "chunk_size mamba_chunk_size linear_key_head_dim linear_value_head_dim "
    "hidden_size_per_layer_input dim_head adapter_rank global_head_dim laurel_rank index_head_dim "
    "index_topk linear_head_dim",
    6: "sliding_window prompt_length",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts time_step_rank mamba_dt_rank rotary_dim block_size linear_num_value_heads "
    "prompt_types segment_types linear_num_heads",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k num_experts_per_token eos_token_id "
    "linear_num_key_heads index_n_heads",
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups n_groups "
    "bos_token_id",
    0: "pad_token_id num_kv_shared_layers",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
SIZES["use_mamba_kernels"] = False

#: What some classes ask for besides.
ALSO = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.3},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global"], 1], [["local"], 1], [["global"], 1]]},
    "granite": {"residual_multiplier": 0.4, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "local"],
    },
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def small(kind: str):
    """A model of a class with random weights, norms and scales included."""
    kind_of_model = getattr(transformers, CLASSES[kind])
    kind_of_config = kind_of_model.config_class or transformers.CONFIG_MAPPING[kind]
    usual = kind_of_config()
    known = usual.to_dict()
    sizes = {
        name: size
        for name, size in SIZES.items()
        if (name in known or hasattr(usual, name)) and not isinstance(known.get(name), list | dict)
    }
    for name in ("layer_types", "layers_block_type", "block_types"):
        if isinstance(known.get(name), list) and known[name]:
            sizes[name] = (list(dict.fromkeys(known[name])) * DEPTH)[:DEPTH]
    if "qk_rope_head_dim" in known:
        sizes = {n: s for n, s in sizes.items() if n not in ("head_dim", "qk_head_dim")}
        sizes["num_key_value_heads"] = 4
    sizes |= ALSO.get(kind, {})
    try:
        config = kind_of_config(**sizes)
    except Exception:  # some names only mirror others
        config = kind_of_config(**{name: size for name, size in sizes.items() if name in known})
    with torch.device("meta"):
        parameters = sum(p.numel() for p in kind_of_model(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters are not small")
    torch.manual_seed(0)
    model = kind_of_model(config).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    return model


IDS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(2))


def plainly(model):
    """What blocks read and return in the model's own forward pass, and its loss."""
    seen, handles = [], []
    blocks = models.anatomy(model).blocks
    for block in blocks:
        handles.append(
            block.register_forward_pre_hook(
                lambda m, args, kwargs: seen.append((args or [kwargs["hidden_states"]])[0].clone()),
                with_kwargs=True,
            )
        )
    handles.append(
        blocks[-1].register_forward_hook(
            lambda m, args, out: seen.append((out if torch.is_tensor(out) else out[0]).clone())
        )
    )
    try:
        logits = model(IDS, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return torch.stack(seen).double(), loss.item()


def refusal(call, model):
    """The result and None, or None and the sentence of a refusal."""
    try:
        return call(), None
    except ValueError as error:
        words = str(error)
    assert type(model).__name__ in words, words
    assert "\n" not in words and 40 < len(words) < 500 and not words.endswith("."), words
    return None, words


def outcome(kind: str) -> str:
    """What becomes of a class: "recorded" with or without sublayers, "refused", "not built"."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = small(kind)
            model(IDS, use_cache=False)
        except Exception:
            return "not built"
        writes, refused = refusal(lambda: trajectory.writes_of(model, IDS), model)
        if refused:
            assert refusal(lambda: trajectory.record(model, [IDS]), model)[1] == refused
            assert refusal(lambda: trajectory.decode_early(model, [IDS]), model)[1]
            return "refused"
        states, loss = plainly(model)
        largest = states.abs().max()
        assert (writes.cumsum(0) - states).abs().max() < 4e-6 * largest
        parts, alone = refusal(lambda: trajectory.writes_of(model, IDS, "sublayer"), model)
        if not alone:
            assert (parts.cumsum(0)[::2] - states).abs().max() < 4e-6 * largest
        losses, hidden = refusal(lambda: trajectory.decode_early(model, [IDS]), model)
        if not hidden:
            assert abs(losses["mean"].iloc[-1] - loss) < 1e-4
        return "recorded" + (", blocks only" if alone else "") + (", not decoded" * bool(hidden))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_recorded_exactly_or_refused_in_a_sentence(kind):
    kept = json.loads(KEPT.read_text())
    found = outcome(kind)
    # Another version of transformers may build a class otherwise; what is recorded is exact.
    if transformers.__version__ == kept["transformers"]:
        assert found == kept["outcomes"][kind]


def test_most_classes_are_recorded():
    outcomes = list(json.loads(KEPT.read_text())["outcomes"].values())
    assert sum(o.startswith("recorded") for o in outcomes) > 120
    assert outcomes.count("recorded") > 110  # with their sublayers, and decoded


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    outcomes = {kind: outcome(kind) for kind in sorted(CLASSES)}
    kept = {"transformers": transformers.__version__, "outcomes": outcomes}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    for what in sorted(set(outcomes.values())):
        kinds = [kind for kind, found in outcomes.items() if found == what]
        print(f"{what}: {len(kinds)}: {' '.join(kinds)}")
