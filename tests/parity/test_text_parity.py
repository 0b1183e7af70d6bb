"""The decoders of Qwen2 (biases) and Qwen3 (q/k norm, free head size) against HF: hidden states, logits, rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny import VOCABULARY

from jaxvqa import decoder
from jaxvqa.decoder import Decoder, DecoderConfig, Layer
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps

pytestmark = pytest.mark.parity

TOLERANCE, ROWS_TOLERANCE = 1e-4, 1e-5
LENGTHS = np.array([520, 503], np.int32)
ROWS = np.array([[519, 250, 3], [502, 499, 40]], np.int32)
SHARED = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM._from_config(
        Qwen2Config(**SHARED, rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=True),
        attn_implementation="eager",
    )


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM._from_config(
        Qwen3Config(**SHARED, head_dim=12, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=5e5)),
        attn_implementation="eager",
    )


def parameters(model, c: DecoderConfig) -> Decoder:
    """HF's tensors as ours, written out by hand: [out, in] -> [in, out], heads split, layers stacked."""
    state = {k.removeprefix("model."): v.numpy() for k, v in model.state_dict().items()}

    def stacked(name, change=lambda w: w):
        names = [f"layers.{i}.{name}" for i in range(c.num_layers)]
        return jnp.stack([jnp.asarray(change(state[n])) for n in names]) if names[0] in state else None

    def heads(n):
        return lambda w: w.T.reshape(-1, n, c.head_dim) if w.ndim == 2 else w.reshape(n, c.head_dim)

    N, K, attention = c.num_heads, c.num_kv_heads, "self_attn."
    layers = Layer(
        attn_norm=stacked("input_layernorm.weight"),
        q_proj=stacked(attention + "q_proj.weight", heads(N)),
        k_proj=stacked(attention + "k_proj.weight", heads(K)),
        v_proj=stacked(attention + "v_proj.weight", heads(K)),
        o_proj=stacked(attention + "o_proj.weight", lambda w: w.T.reshape(N, c.head_dim, -1)),
        q_bias=stacked(attention + "q_proj.bias", heads(N)),
        k_bias=stacked(attention + "k_proj.bias", heads(K)),
        v_bias=stacked(attention + "v_proj.bias", heads(K)),
        q_norm=stacked(attention + "q_norm.weight"),
        k_norm=stacked(attention + "k_norm.weight"),
        mlp_norm=stacked("post_attention_layernorm.weight"),
        gate_proj=stacked("mlp.gate_proj.weight", np.transpose),
        up_proj=stacked("mlp.up_proj.weight", np.transpose),
        down_proj=stacked("mlp.down_proj.weight", np.transpose),
    )
    head = None if c.tied else jnp.asarray(state["lm_head.weight"].T)
    return Decoder(jnp.asarray(state["embed_tokens.weight"]), layers, jnp.asarray(state["norm.weight"]), head)


@functools.partial(jax.jit, static_argnums=1)
def ours(params, config, ids):
    stream = decoder.right_padded(decoder.embed_tokens(params, ids), jnp.asarray(LENGTHS))
    spec = ReadSpec(layers=(0, 1, 2), read=frozenset({"hidden", "rows"}), heads="all")
    hidden, _, read, _ = decoder.run(params, config, stream, taps=Taps(rows=jnp.asarray(ROWS)), spec=spec)
    normed = decoder.rms_norm(hidden, params.norm, config.norm_eps)
    return read.hidden.at[-1].set(normed), decoder.finish(params, config, hidden), read.rows


@pytest.mark.parametrize("make", [qwen2, qwen3])
def test_text_decoder_matches_hf(make, measured):
    model = make().eval()
    reference.randomise(model)
    config = DecoderConfig.from_hf(model.config.to_dict())
    params = parameters(model, config)
    declared = jax.tree.map(lambda s: s.shape, decoder.specs(config), is_leaf=lambda x: hasattr(x, "axes"))
    assert jax.tree.map(jnp.shape, params) == declared
    ids = reference.prompts(0, tuple(LENGTHS), (0, 0))
    theirs = reference.run(model, ids, LENGTHS, attentions=True)
    hidden, logits, rows = ours(params, config, ids)
    valid = np.arange(ids.shape[1]) < LENGTHS[:, None]
    expected = np.take_along_axis(theirs.attentions, ROWS[None, :, None, :, None], axis=3)
    found = {
        **{f"hidden {i}": np.abs(hidden[i] - theirs.hidden[i])[valid].max() for i in range(config.num_layers)},
        "logits": np.abs(logits - theirs.logits)[valid].max(),
        "rows": np.abs(rows - expected).max(),
    }
    for name, d in found.items():
        measured(f"{make.__name__}: {name}", d)
    rows_off = found.pop("rows")
    assert max(found.values()) <= TOLERANCE and rows_off <= ROWS_TOLERANCE


def test_the_gradient_of_attention_probabilities_matches_torch(measured):
    """What `attn.retain_grad()` gives in torch: dL/dA = dL/dO · Vᵀ at chosen rows, future keys included."""
    import torch

    model = qwen3().eval()
    reference.randomise(model)
    config = DecoderConfig.from_hf(model.config.to_dict())
    ids, lengths, rows, layer, token = reference.prompts(0, (40, 33), (0, 0)), np.array([40, 33], np.int32), 2, 1, 7
    at = np.array([[39, 12], [32, 5]], np.int32)

    tokens, mask = reference.pad(ids, lengths, "right")
    out = model(input_ids=tokens, attention_mask=mask, output_attentions=True)
    out.attentions[layer].retain_grad()
    out.logits[torch.arange(2), torch.tensor(lengths) - 1, token].sum().backward()
    expected = np.take_along_axis(out.attentions[layer].grad.numpy(), at[:, None, :, None], axis=2)

    @jax.jit
    def gradient(params):
        def score(perturb):
            stream = decoder.right_padded(decoder.embed_tokens(params, jnp.asarray(ids)), jnp.asarray(lengths))
            taps = Taps((Edit(Tap(perturb=perturb), layer, layer + 1),), jnp.asarray(at))
            spec = ReadSpec(layers=(layer,), read=frozenset({"values"}))
            hidden, _, read, _ = decoder.run(params, config, stream, taps=taps, spec=spec)
            last = jnp.take_along_axis(hidden, jnp.asarray(lengths)[:, None, None] - 1, axis=1)
            return decoder.finish(params, config, last)[:, 0, token].sum(), read.values[0]

        zero = jnp.zeros((1, 2, rows, config.num_heads, config.head_dim))
        g, values = jax.grad(score, has_aux=True)(zero)
        return jnp.einsum("BRKGH,BSKH->BKGRS", g[0].reshape(2, rows, config.num_kv_heads, -1, config.head_dim), values)

    ours = np.asarray(gradient(parameters(model, config))).reshape(expected.shape)
    valid = np.broadcast_to(np.arange(40) < lengths[:, None, None, None], ours.shape)
    d = np.abs(ours - expected)[valid].max()
    measured("gradient of probabilities against torch", d)
    assert np.abs(expected).max() > 0.01 and d <= TOLERANCE


@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"],
)
def test_what_a_config_leaves_out_is_what_hf_takes_and_the_way_back_says_it(kind):
    from transformers import CONFIG_MAPPING

    sections = {"mrope_section": [16, 24, 24]} if kind.endswith("_vl_text") else {}
    given = {"model_type": kind, "sliding_window": None, "rope_scaling": sections}
    theirs = CONFIG_MAPPING[kind]().to_dict() | {"sliding_window": None}
    theirs["rope_parameters"] |= sections
    config = DecoderConfig.from_hf(given)
    assert config == DecoderConfig.from_hf(theirs)
    assert config == DecoderConfig.from_hf(config.to_hf(kind if sections else None))
