"""A small random decoder, and its dense float64 reference in NumPy, in which any attention may be rewritten."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvqa import decoder, sharding
from jaxvqa.decoder import Decoder, DecoderConfig


def cells_from(starts: Any, grid: tuple[int, int]) -> Any:
    """`Row.cells` of images whose cells follow one another from `starts` on: [.., I, h·w]."""
    return jnp.asarray(starts)[..., None] + jnp.arange(grid[0] * grid[1], dtype=jnp.int32)


def side_by_side(features: Any, ids: Any, image_token_id: int) -> tuple[Any, Any]:
    """Features [B, I, P, D] as `prefill` takes them, [B, I·P, D], and the slots of tokens that take all in order."""
    is_image = jnp.asarray(ids) == image_token_id
    slots = jnp.where(is_image, jnp.cumsum(is_image, axis=1) - 1, -1).astype(jnp.int32)
    return features.reshape(len(features), -1, features.shape[-1]), slots


CONFIG = DecoderConfig(
    num_layers=4, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=40, max_length=512,
    rope_theta=1000.0, rope_factor=1.0, norm_eps=1e-5, qkv_bias=True, qk_norm=True, tied=False,
)  # fmt: skip
"""Every option at once: biases, q/k norm, grouped heads, a free head size."""


def parameters(specs=None, *, config: DecoderConfig = CONFIG, seed: int = 0, dtype=jnp.float32) -> Any:
    """Random parameters of `config`, or as declared by `specs`; norms and biases differ from their neutral values."""

    rng = np.random.default_rng(seed)

    def draw(s):
        noise = rng.standard_normal(s.shape)
        return jnp.asarray(0.3 * noise if s.init == "normal" else (s.init == "ones") + 0.1 * noise, dtype)

    return sharding.tree_map_specs(draw, decoder.specs(config) if specs is None else specs)


@dataclass(frozen=True)
class Dense:
    hidden: list[np.ndarray]
    """Per layer, [B, T, D]."""
    probs: list[np.ndarray]
    """Per layer, [B, N, T, T], as changed."""
    values: list[np.ndarray]
    """Per layer, [B, T, K, H]."""
    logits: np.ndarray
    """[B, T, V]."""


def causal(lengths, length: int) -> np.ndarray:
    """Which keys a query sees, bool [B, T, S]."""
    t = np.arange(length)
    return (t[None, None, :] <= t[None, :, None]) & (t < np.asarray(lengths)[:, None])[:, None, :]


def dense(
    params: Decoder,
    x: np.ndarray,
    lengths,
    config: DecoderConfig = CONFIG,
    change: Callable[[int, np.ndarray], np.ndarray] = lambda layer, probs: probs,
) -> Dense:
    """The decoder as its papers write it; `change(layer, probs)` rewrites the attention probabilities of a layer."""
    c, p = config, jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x, T = np.asarray(x, np.float64), x.shape[1]
    seen = causal(lengths, T)[:, None]
    angle = np.arange(T)[:, None] / c.rope_factor * c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    turn = np.exp(1j * angle)[None, :, None, :]

    def norm(x, scale):
        return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + c.norm_eps)

    def rotate(x):
        half = c.head_dim // 2
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    hidden, all_probs, all_values = [], [], []
    for i in range(c.num_layers):
        w = jax.tree.map(lambda a, i=i: a[i], p.layers)
        h = norm(x, w.attn_norm)
        q, k, v = (np.einsum("btd,dnh->btnh", h, m) for m in (w.q_proj, w.k_proj, w.v_proj))
        if c.qkv_bias:
            q, k, v = q + w.q_bias, k + w.k_bias, v + w.v_bias
        if c.qk_norm:
            q, k = norm(q, w.q_norm), norm(k, w.k_norm)
        k_all, v_all = (np.repeat(m, c.num_heads // c.num_kv_heads, axis=2) for m in (rotate(k), v))
        scores = np.einsum("btnh,bsnh->bnts", rotate(q), k_all) / np.sqrt(c.head_dim)
        scores = np.where(seen, scores, -np.inf)
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs = change(i, probs / probs.sum(axis=-1, keepdims=True))
        x = x + np.einsum("bnts,bsnh,nhd->btd", probs, v_all, w.o_proj)
        h = norm(x, w.mlp_norm)
        gate = h @ w.gate_proj
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w.up_proj)) @ w.down_proj
        hidden.append(x)
        all_probs.append(probs)
        all_values.append(v)
    head = p.embed.T if p.lm_head is None else p.lm_head
    return Dense(hidden, all_probs, all_values, norm(x, p.norm) @ head)
