"""One decoder for Llama, Qwen2 and Qwen3: pure functions over parameters stacked by layer.

The layers run as few scans over layer *indices* as the request allows (scanning over slices would copy the weights).
A run of layers with the same edits and the same readouts is one scan, edits and readouts being indexed and stacked by
layer; a single such layer is a plain call. Stopping early is a shorter last segment.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass, register_static

from jaxvqa.attention import NEVER, Mask, attend, attention_rows
from jaxvqa.errors import JaxVQAError
from jaxvqa.sharding import (
    ACT_BTD,
    ACT_BTF,
    ACT_BTKH,
    ACT_BTNH,
    ACT_BTV,
    BATCH,
    CACHE_LBSKH,
    ArraySpec,
    constrain,
    einsum,
    layout,
    stack,
    take,
)
from jaxvqa.taps import Edit, Mix, Plugin, Readouts, ReadSpec, Tap, Taps
from jaxvqa.typing import Array, Float, Int


@register_static
@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder. Qwen2 has `qkv_bias`; Qwen3 has `qk_norm` and a free `head_dim`."""

    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_length: int
    rope_theta: float
    rope_factor: float
    """Positions are divided by it (linear rope scaling); 1 is none."""
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    """The output head is the transposed embedding."""
    mrope: tuple[int, int, int] | None = None
    """Multimodal rope: how many rotary frequencies turn by the time, the row and the column of a token."""
    mrope_interleaved: bool = False
    """Whether the three take turns over the frequencies (Qwen3-VL) or each has a run of them (Qwen2-VL)."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any], tied: bool | None = None) -> "DecoderConfig":
        """Read the text part of an HF config; `tied` overrides its `tie_word_embeddings`.

        Raises `JaxVQAError` with every missing key and every option that this decoder does not have.
        """
        kinds, family = _TEXT_MODELS, hf.get("model_type", "llama")
        if family not in kinds:
            raise JaxVQAError(f"text model type {family!r} is not supported; supported are {', '.join(kinds)}")
        own = _TEXT_DEFAULTS.get(family, {}) | hf
        hf = _LLAMA_DEFAULTS | {k: v for k, v in own.items() if v is not None}
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        faults = []
        multimodal = family.endswith("_vl_text")
        if kind not in ("default", "linear", *["mrope"] * multimodal):
            faults.append(f"rope type {kind!r} (supported: default, linear)")
        sections = rope.get("mrope_section", _SECTIONS.get(family)) if multimodal else None
        if multimodal and (sections is None or len(sections) != 3):
            faults.append(f"mrope_section {sections!r} (expected three numbers)")
        if hf.get("use_sliding_window"):
            faults.append("use_sliding_window=true (supported: false)")
        if family == "mistral" and hf.get("sliding_window"):
            faults.append(f"sliding_window {hf['sliding_window']} (supported: null)")
        if hf["hidden_act"] != "silu":
            faults.append(f"hidden_act {hf['hidden_act']!r} (supported: silu)")
        if hf.get("attention_bias") or hf.get("mlp_bias"):
            faults.append("attention_bias or mlp_bias (supported: false)")
        if faults:
            raise JaxVQAError(f"config.json, text model: {'; '.join(faults)}")
        return cls(
            num_layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf.get("num_key_value_heads", hf["num_attention_heads"]),
            head_dim=hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]),
            vocab_size=hf["vocab_size"],
            max_length=hf["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta", hf["rope_theta"])),
            rope_factor=float(rope.get("factor", 1.0)) if kind == "linear" else 1.0,
            norm_eps=hf["rms_norm_eps"],
            qkv_bias=kinds[family] == "qwen2",
            qk_norm=kinds[family] == "qwen3",
            tied=hf.get("tie_word_embeddings", False) if tied is None else tied,
            mrope=tuple(sections) if sections else None,
            mrope_interleaved=family == "qwen3_vl_text",
        )

    def to_hf(self, kind: str | None = None) -> dict[str, Any]:
        """The text part of an HF config; the inverse of `from_hf`.

        kind: HF's type of the text model; None takes the one whose layers these are, without multimodal rope.
        """
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_factor != 1.0:
            rope |= {"rope_type": "linear", "factor": self.rope_factor}
        if self.mrope:
            rope |= {"mrope_section": list(self.mrope)}
        if self.mrope_interleaved:
            rope |= {"mrope_interleaved": True}
        return {
            "model_type": kind or ("qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"),
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_length,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": rope,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
        }


# HF's type of a text model -> whose layers it has.
_TEXT_MODELS = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}

# Values that HF leaves out of a config.json when they equal its own (llava-hf/llava-1.5-7b-hf does).
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
_QWEN2_DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_QWEN2_VL_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}
# Those of each type of text model where they are not Llama's.
_TEXT_DEFAULTS = {
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN2_DEFAULTS,
    "qwen3": _QWEN2_DEFAULTS | {"head_dim": 128},
    "qwen2_vl_text": _QWEN2_VL_DEFAULTS,
    "qwen2_5_vl_text": _QWEN2_VL_DEFAULTS,
    "qwen3_vl_text": _QWEN2_DEFAULTS | {"head_dim": 128, "max_position_embeddings": 128000, "rope_theta": 500000.0},
}
_SECTIONS = {"qwen3_vl_text": (24, 20, 20)}


@register_dataclass
@dataclass(frozen=True)
class Layer:
    """One decoder block; in a `Decoder` every leaf has a leading layer axis L."""

    attn_norm: Float[Array, "D"]
    q_proj: Float[Array, "D N H"]
    k_proj: Float[Array, "D K H"]
    v_proj: Float[Array, "D K H"]
    o_proj: Float[Array, "N H D"]
    q_bias: Float[Array, "N H"] | None
    k_bias: Float[Array, "K H"] | None
    v_bias: Float[Array, "K H"] | None
    q_norm: Float[Array, "H"] | None
    k_norm: Float[Array, "H"] | None
    mlp_norm: Float[Array, "D"]
    gate_proj: Float[Array, "D F"]
    up_proj: Float[Array, "D F"]
    down_proj: Float[Array, "F D"]


@register_dataclass
@dataclass(frozen=True)
class Decoder:
    """Parameters of the whole decoder; `lm_head` is None when it is the transposed embedding."""

    embed: Float[Array, "V D"]
    layers: Layer
    norm: Float[Array, "D"]
    lm_head: Float[Array, "D V"] | None


def specs(c: DecoderConfig) -> Decoder:
    """Declare every parameter: shape, logical axes, initialisation."""
    D, N, K, H, F = c.width, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_width
    out_scale = 0.02 / (2 * c.num_layers) ** 0.5
    layer = Layer(
        attn_norm=ArraySpec((D,), (None,), "ones"),
        q_proj=ArraySpec((D, N, H), ("embed", "heads", None)),
        k_proj=ArraySpec((D, K, H), ("embed", "kv_heads", None)),
        v_proj=ArraySpec((D, K, H), ("embed", "kv_heads", None)),
        o_proj=ArraySpec((N, H, D), ("heads", None, "embed"), scale=out_scale),
        q_bias=ArraySpec((N, H), ("heads", None), "zeros") if c.qkv_bias else None,
        k_bias=ArraySpec((K, H), ("kv_heads", None), "zeros") if c.qkv_bias else None,
        v_bias=ArraySpec((K, H), ("kv_heads", None), "zeros") if c.qkv_bias else None,
        q_norm=ArraySpec((H,), (None,), "ones") if c.qk_norm else None,
        k_norm=ArraySpec((H,), (None,), "ones") if c.qk_norm else None,
        mlp_norm=ArraySpec((D,), (None,), "ones"),
        gate_proj=ArraySpec((D, F), ("embed", "mlp")),
        up_proj=ArraySpec((D, F), ("embed", "mlp")),
        down_proj=ArraySpec((F, D), ("mlp", "embed"), scale=out_scale),
    )
    return Decoder(
        embed=ArraySpec((c.vocab_size, D), ("vocab", "embed")),
        layers=stack(layer, c.num_layers),
        norm=ArraySpec((D,), (None,), "ones"),
        lm_head=None if c.tied else ArraySpec((D, c.vocab_size), ("embed", "vocab")),
    )


@register_dataclass
@dataclass(frozen=True)
class Stream:
    """The tokens that flow through the layers.

    `order` decides who sees whom (a token sees keys of no greater order; `NEVER` marks padding), `positions` turn the
    rotary embedding. Segment 0 is a shared prefix, seen by all; other segments see it and themselves: several questions
    about one image, or several options after one prompt, in one sequence. Without segments the tokens must be
    right-padded and in ascending order, which is what fused attention kernels assume.
    """

    hidden: Float[Array, "B T D"]
    positions: Int[Array, "B T *axes"]
    """One number per token or, in multimodal rope, three."""
    order: Int[Array, "B T"]
    segment: Int[Array, "B T"] | None = None


@register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys (after rope) and values (raw) of the tokens so far; S is the capacity.

    Rows share the slots: `filled` is the next free one. Slots that a row does not use (padding) have order `NEVER`.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    order: Int[Array, "B S"]
    filled: Int[Array, ""]
    length: Int[Array, "B"]
    """Valid tokens per row: the order of the next one and, without `shift`, its position."""
    shift: Int[Array, "B"] | None = None
    """What the position of the next token has beyond its order; multimodal rope only."""

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


def right_padded(
    hidden: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    start: Int[Array, "B"] | int = 0,
    *,
    positions: Int[Array, "B T 3"] | None = None,
    shift: Int[Array, "B"] | None = None,
) -> Stream:
    """A stream of right-padded rows whose first token has order `start`.

    Positions are the orders, plus `shift` (`Cache.shift`) where there is one, unless they are given.
    """
    B, T, _ = hidden.shape
    offsets = jnp.arange(T, dtype=jnp.int32)[None]
    order = jnp.broadcast_to(jnp.reshape(jnp.asarray(start, jnp.int32), (-1, 1)) + offsets, (B, T))
    if positions is None:
        positions = order if shift is None else order + shift[:, None]
    return Stream(hidden, positions, jnp.where(offsets < lengths[:, None], order, NEVER))


def last_row(order: Int[Array, "B T"]) -> Int[Array, "B 1"]:
    """Index of the last valid token of each row."""
    return jnp.maximum(jnp.sum(order < NEVER, axis=1, dtype=jnp.int32) - 1, 0)[:, None]


def run(
    params: Decoder,
    config: DecoderConfig,
    stream: Stream,
    *,
    cache: Cache | None = None,
    capacity: int | None = None,
    taps: Taps = Taps(),
    spec: ReadSpec = ReadSpec(),
    plugins: tuple[Plugin, ...] = (),
    backend: str = "auto",
    remat: bool = False,
) -> tuple[Float[Array, "B T D"], Cache | None, Readouts, tuple[Plugin, ...]]:
    """Run layers `spec.start` .. `spec.stop`−1 over the tokens of `stream`.

    Without `cache` the tokens see each other only, and with `capacity` a cache of that many slots is returned. With
    `cache` they are appended to it (their segments, if any, are forgotten afterwards). `remat` recomputes each layer
    in the backward pass. The result is not normalised: see `finish`.
    """
    start, stop = spec.start, config.num_layers if spec.stop is None else spec.stop
    _check(config, taps, spec, plugins, start, stop)
    stream = jax.tree.map(lambda x: constrain(x, BATCH), stream)
    T = stream.hidden.shape[1]
    if cache is not None:
        if cache.k.shape[0] != stop - start:
            raise JaxVQAError(f"the cache holds {cache.k.shape[0]} layers, but layers {start}..{stop - 1} run")
        keys = (cache.k, cache.v)
        at = cache.filled
        k_order = jax.lax.dynamic_update_slice(cache.order, stream.order, (0, at))
        # Earlier tokens are a prefix that all segments share.
        k_segment = None
        if stream.segment is not None:
            k_segment = jax.lax.dynamic_update_slice(jnp.zeros_like(cache.order), stream.segment, (0, at))
    elif capacity is not None:
        if capacity < T:
            raise JaxVQAError(f"cache capacity {capacity} is below the {T} tokens of the prompt")
        shape = (stop - start, stream.hidden.shape[0], capacity, config.num_kv_heads, config.head_dim)
        keys = tuple(jnp.zeros(shape, stream.hidden.dtype, out_sharding=layout(CACHE_LBSKH)) for _ in range(2))
        at = jnp.int32(0)
        k_order = jnp.pad(stream.order, ((0, 0), (0, capacity - T)), constant_values=NEVER)
        k_segment = None
    else:
        keys, at, k_order, k_segment = None, None, None, None

    edits = taps.edits
    readouts: list[dict[str, Array]] = []
    for a, b in _segments(start, stop, edits, spec, plugins):
        for i, plugin in enumerate(plugins):
            if a in plugin.cuts:
                stream, carry, new = plugin.step(plugin.params, a, stream, plugin.carry)
                if stream.hidden.shape[1] != T:
                    raise JaxVQAError(f"a plugin made {stream.hidden.shape[1]} tokens of {T}; their number must stay")
                plugins = (*plugins[:i], replace(plugin, carry=carry), *plugins[i + 1 :])
                edits = (*edits, *new)
        if cache is None:
            mask = Mask(stream.order, stream.order, stream.segment, stream.segment, causal=stream.segment is None)
        else:
            mask = Mask(stream.order, k_order, stream.segment, k_segment)
        rope = _rope(stream.positions, config)
        # An edit that a plugin made may begin or end inside the segment.
        for c, d in _segments(a, b, edits, spec, ()):
            active = tuple(e for e in edits if e.start <= c < e.stop)
            want = spec.read if c in spec.layers else frozenset()

            def layer(x, keys, i, active=active, want=want, mask=mask, rope=rope):
                with jax.named_scope("decoder/layer"):
                    weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), params.layers)
                    tap = _merge([e.at(i) for e in active])
                    slot = None if keys is None else (*keys, i - start, at)
                    return _layer(
                        weights, config, x, mask, rope, slot, cache is not None, tap, taps.rows, want, spec, backend
                    )

            if remat:
                layer = jax.checkpoint(layer)
            x = stream.hidden
            if d - c == 1:
                # The layer's weights wait for its input: else XLA gathers those of all single layers at once.
                x, i = jax.lax.optimization_barrier((x, jnp.int32(c)))
                x, keys, read = layer(x, keys, i)
                read = jax.tree.map(lambda r: r[None], read)
            else:

                def step(carry, i, layer=layer):
                    x, keys, read = layer(*carry, i)
                    return (x, keys), read

                (x, keys), read = jax.lax.scan(step, (x, keys), jnp.arange(c, d))
            stream = replace(stream, hidden=x)
            if want:
                readouts.append(read)

    out = Readouts(**{name: jnp.concatenate([r[name] for r in readouts]) for name in spec.read})
    if keys is not None:
        added = jnp.sum(stream.order < NEVER, axis=1, dtype=jnp.int32)
        length = added if cache is None else cache.length + added
        shift = None if cache is None else cache.shift
        if stream.positions.ndim == 3:
            reached = jnp.where(stream.order[:, :, None] < NEVER, stream.positions, -1).max(axis=(1, 2))
            before = jnp.zeros_like(length) if shift is None else shift
            shift = jnp.where(added > 0, reached + 1 - length, before)
        cache = Cache(keys[0], keys[1], k_order, at + T, length, shift)
    return stream.hidden, cache, out, plugins


def finish(params: Decoder, config: DecoderConfig, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Final normalisation and output head: f32 logits."""
    hidden = rms_norm(hidden, params.norm, config.norm_eps)
    # On a mesh the head, split along the width, is gathered, or partial logits are summed: whichever is smaller.
    out = ACT_BTV
    if hidden.shape[0] * hidden.shape[1] < config.width:
        hidden, out = constrain(hidden, ("lookup", None, "embed")), ("lookup", None, "vocab")
    equation, head = ("BTD,DV->BTV", params.lm_head) if params.lm_head is not None else ("BTD,VD->BTV", params.embed)
    with jax.named_scope("decoder/logits"):
        return constrain(einsum(equation, hidden, head, out=out, preferred_element_type=jnp.float32), ACT_BTV)


def embed_tokens(params: Decoder, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Word embeddings."""
    return take(params.embed, ids, ACT_BTD)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square normalisation: f32 statistics, cast, then scale (the order of HF's Llama)."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(jnp.square(f), axis=-1, keepdims=True) + eps)
    return scale * f.astype(x.dtype)


def _check(config, taps, spec, plugins, start, stop):
    if not 0 <= start < stop <= config.num_layers:
        raise JaxVQAError(f"layers {start}..{stop} are not a range of this model's {config.num_layers} layers")
    if outside := [layer for layer in spec.layers if not start <= layer < stop]:
        raise JaxVQAError(f"cannot read layers {outside}: layers {start}..{stop - 1} run")
    for e in taps.edits:
        if not 0 <= e.start < e.stop <= config.num_layers:
            raise JaxVQAError(f"edit of layers {e.start}..{e.stop}: the model has {config.num_layers} layers")
        sizes = {x.shape[0] for x in jax.tree.leaves((e.tap.key_bias, e.tap.perturb))}
        sizes |= {e.tap.mix.alpha.shape[0], e.tap.mix.maps.shape[0]} if e.tap.mix is not None else set()
        if sizes - {1, e.stop - e.start}:
            raise JaxVQAError(
                f"edit of layers {e.start}..{e.stop}: leading axes {sorted(sizes)}, expected 1 or the range"
            )
    for p in plugins:
        if outside := [c for c in p.cuts if not 0 <= c < config.num_layers]:
            raise JaxVQAError(f"plugin cuts {outside} lie outside the model's {config.num_layers} layers")


def _segments(start: int, stop: int, edits: tuple[Edit, ...], spec: ReadSpec, plugins) -> list[tuple[int, int]]:
    """Maximal runs of layers with the same edits and readouts, cut at the plugins' points."""

    def signature(layer):
        return [e.start <= layer < e.stop for e in edits], layer in spec.layers

    cuts = {c for p in plugins for c in p.cuts}
    bounds = [
        layer
        for layer in range(start, stop)
        if layer == start or layer in cuts or signature(layer) != signature(layer - 1)
    ]
    return list(zip(bounds, [*bounds[1:], stop], strict=True))


def _merge(taps: list[Tap]) -> Tap:
    """Edits of one layer by several callers: biases and perturbations add; two mixtures are ambiguous."""
    mixes = [t.mix for t in taps if t.mix is not None]
    if len(mixes) > 1:
        raise JaxVQAError("two edits mix a map into the same layer; give one `Mix` with several images")

    def total(values):
        values = [v for v in values if v is not None]
        return sum(values[1:], values[0]) if values else None

    return Tap(total([t.key_bias for t in taps]), mixes[0] if mixes else None, total([t.perturb for t in taps]))


def _layer(w: Layer, c, x, mask, rope, slot, extend, tap, rows, want, spec, backend):
    """One block. `slot` is (cache k, cache v, its layer, next free slot) or None. Returns x, (cache k, v), readouts."""
    read = {}
    h = rms_norm(x, w.attn_norm, c.norm_eps)
    q = einsum("BTD,DNH->BTNH", h, w.q_proj, out=ACT_BTNH)
    k = einsum("BTD,DKH->BTKH", h, w.k_proj, out=ACT_BTKH)
    v = einsum("BTD,DKH->BTKH", h, w.v_proj, out=ACT_BTKH)
    if w.q_bias is not None:
        q, k, v = q + w.q_bias, k + w.k_bias, v + w.v_bias
    if w.q_norm is not None:
        q, k = rms_norm(q, w.q_norm, c.norm_eps), rms_norm(k, w.k_norm, c.norm_eps)
    if "keys" in want:
        read["keys"] = k
    if "values" in want:
        read["values"] = v
    q, k = _rotate(q, *rope), _rotate(k, *rope)
    keys = None
    if slot is not None:
        cache_k, cache_v, i, at = slot
        cache_k, cache_v = (
            jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (i, 0, at, 0, 0))
            for old, new in ((cache_k, k), (cache_v, v))
        )
        keys = (cache_k, cache_v)
        if extend:
            k, v = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in keys)
    scale = c.head_dim**-0.5
    bias = _pad_keys(tap.key_bias, k.shape[1])
    out = attend(q, k, v, mask, scale=scale, key_bias=bias, backend=backend)
    if "rows" in want or tap.perturb is not None:
        rows = last_row(mask.q_order) if rows is None else constrain(rows, BATCH)
    if "rows" in want:
        picked = jnp.take_along_axis(q, rows[:, :, None, None], axis=1)
        probs = attention_rows(picked, k, mask.at(rows), scale=scale, key_bias=bias)
        read["rows"] = probs.mean(axis=1) if spec.heads == "mean" else probs
    if tap.mix is not None:
        out = _mix(out, v, mask.q_order, tap.mix)
    if tap.perturb is not None:
        perturb = constrain(tap.perturb.astype(out.dtype), ACT_BTNH)
        out = jax.vmap(lambda x, at, p: x.at[at].add(p))(out, rows, perturb)
    x = x + einsum("BTNH,NHD->BTD", out, w.o_proj, out=ACT_BTD)

    h = rms_norm(x, w.mlp_norm, c.norm_eps)
    gate = jax.nn.silu(einsum("BTD,DF->BTF", h, w.gate_proj, out=ACT_BTF))
    h = gate * einsum("BTD,DF->BTF", h, w.up_proj, out=ACT_BTF)
    x = x + einsum("BTF,FD->BTD", h, w.down_proj, out=ACT_BTD)
    if "hidden" in want:
        read["hidden"] = x
    return x, keys, read


def _mix(out, v, order, mix: Mix):
    """VIF's mixture in its linear form; see `Mix`."""
    S = v.shape[1]
    maps = _pad_keys(mix.maps, S).astype(jnp.float32)
    mean = jnp.einsum("BIS,BSKH->BIKH", maps, v.astype(jnp.float32))
    seen = (order[:, :, None] > mix.last[:, None, :]) & (order < NEVER)[:, :, None]
    weight = jnp.where(seen, mix.alpha[:, None, :], 0.0)  # [B, T, I]
    added = jnp.einsum("BTI,BIKH->BTKH", weight, mean)
    added = jnp.repeat(added, out.shape[2] // v.shape[2], axis=2, out_sharding=layout(ACT_BTNH))
    rest = 1.0 - mix.alpha.sum(axis=-1)[:, None, None, None]
    rows = seen.any(axis=-1) if mix.rows is None else mix.rows & seen.any(axis=-1)
    # Other rows are not divided: at α = 1 the quotient would be 0/0, and its gradient NaN even where it is not used.
    total = jnp.where(rows, rest[:, :, 0, 0] + weight.sum(axis=-1), 1.0)
    mixed = (rest * out + added) / total[:, :, None, None]
    return jnp.where(rows[:, :, None, None], mixed.astype(out.dtype), out)


def _pad_keys(x: Array | None, length: int) -> Array | None:
    """An edit over keys, made as long as the keys: zeros for those that it does not know (generated tokens)."""
    if x is None or x.shape[-1] >= length:
        return x if x is None else x[..., :length]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, length - x.shape[-1]),))


def _rope(positions: Int[Array, "B T *axes"], c: DecoderConfig) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, [B, T, 1, H/2] in f32 (bf16 rounds position 257 to 256)."""
    frequency = c.rope_theta ** (-jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
    turned = positions[:, :, _mrope_axes(c)] if positions.ndim == 3 else positions[:, :, None]
    angles = (turned.astype(jnp.float32) / c.rope_factor * frequency)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def _mrope_axes(c: DecoderConfig) -> np.ndarray:
    """Which of a token's three positions turns each rotary frequency, int [H/2]."""
    if c.mrope is None or sum(c.mrope) != c.head_dim // 2:
        raise JaxVQAError(f"positions of three axes: mrope sections {c.mrope} of heads of size {c.head_dim}")
    if not c.mrope_interleaved:
        return np.repeat(np.arange(3), c.mrope)
    axes = np.zeros(c.head_dim // 2, int)
    for axis in (1, 2):
        axes[axis : 3 * c.mrope[axis] : 3] = axis
    return axes


def _rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotate the two halves of each head (HF's layout of rotary embeddings)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
