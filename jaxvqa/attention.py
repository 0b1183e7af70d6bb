"""The one attention core, for causal decoders, vision towers and cross-attention; readouts use `attention_rows`.

Visibility is described by two vectors, never by a [T, S] array: a key is seen when its order is not above the query's
(and, with segments, when it lies in the query's segment or in the shared segment 0). Order of operations: scores,
scale, key bias, mask, softmax in float32, times V.

Backends, by name; one that cannot serve a request raises `BackendError` and never gives something else:

    xla          plain einsums; holds [B, N, T, S]
    xla_chunked  the same over chunks of queries, rematerialised: memory linear in T
    cudnn        cuDNN flash attention (GPU, bf16/f16)
    splash       Pallas splash attention (TPU); causal or full visibility
    auto         the best of these that serves the request on this platform

A single query (T = 1, decode) is memory-bound, and a plain einsum under every backend.
"""

import functools
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from jaxvqa import sharding
from jaxvqa.errors import JaxVQAError
from jaxvqa.typing import Array, Bool, Float, Int

NEVER = 2**30
"""Order of a key that no query may see (padding, an unused cache slot)."""
MASKED = -1e30
"""Score of an invisible key: finite, so that a row without visible keys stays finite (the mean of V)."""
CHUNK = 128
"""Queries per step of `xla_chunked`."""

BACKENDS = ("xla", "xla_chunked", "cudnn", "splash")
_PREFERRED = {"gpu": ("cudnn", "xla_chunked"), "tpu": ("splash", "xla_chunked")}
_XLA_SCORES = 1 << 26  # bytes of f32 scores up to which `auto` prefers plain `xla` on a CPU


class BackendError(JaxVQAError):
    """The named attention backend cannot serve this request."""


@register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: `k_order <= q_order`, and the same segment or the shared segment 0.

    `causal` is a static promise that lets fused kernels skip the vectors: queries and keys are the same right-padded
    tokens in order, without segments.
    """

    q_order: Int[Array, "B T"]
    k_order: Int[Array, "B S"]
    q_segment: Int[Array, "B T"] | None = None
    k_segment: Int[Array, "B S"] | None = None
    causal: bool = field(default=False, metadata={"static": True})

    def at(self, rows: Int[Array, "B R"]) -> "Mask":
        """The mask of chosen query rows."""

        def pick(x):
            return None if x is None else jnp.take_along_axis(x, rows, axis=1)

        return Mask(pick(self.q_order), self.k_order, pick(self.q_segment), self.k_segment)

    def visible(self) -> Bool[Array, "B T S"]:
        """The dense mask; for few queries, or a reference."""
        seen = self.k_order[:, None, :] <= self.q_order[:, :, None]
        if self.q_segment is not None:
            k_segment = self.k_segment[:, None, :]
            seen &= (k_segment == self.q_segment[:, :, None]) | (k_segment == 0)
        return seen


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None,
    *,
    scale: float,
    key_bias: Float[Array, "B #N S"] | None = None,
    backend: str = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(scale·QKᵀ + key_bias, over visible keys) V, with K key heads shared by N/K query heads each.

    `mask` None: every key is visible. `key_bias` is f32. Raises `BackendError`.
    """
    if q.shape[1] == 1:
        backend = "xla"
    elif backend == "auto":
        backend = _choose(q, k, mask, key_bias)
    elif reason := why_not(backend, q, k, mask, key_bias):
        raise BackendError(
            f"attention backend {backend!r} cannot serve this request: {reason}; use 'auto' or 'xla_chunked'"
        )
    kernel = functools.partial(_KERNELS[backend], scale=scale)
    return _on_mesh(kernel, (q, k, v, mask, key_bias), heads_axis=2)


def attention_rows(
    q: Float[Array, "B R N H"],
    k: Float[Array, "B S K H"],
    mask: Mask | None,
    *,
    scale: float,
    key_bias: Float[Array, "B #N S"] | None = None,
) -> Float[Array, "B N R S"]:
    """Attention probabilities of a few query rows: an f32 softmax over [B, N, R, S], whatever the backend.

    Differentiable, and independent of a kernel's log-sum-exp, which is rounded to the input's dtype.
    """

    def rows(q, k, mask, key_bias):
        probs = _probabilities(q, k, mask, key_bias, scale)
        B, K, G, R, S = probs.shape
        return probs.reshape(B, K * G, R, S)

    return _on_mesh(rows, (q, k, mask, key_bias), heads_axis=1)


def why_not(backend: str, q: Array, k: Array, mask: Mask | None, key_bias: Array | None) -> str | None:
    """Why `backend` cannot serve this request (shapes and dtypes suffice); None if it can."""
    platform, head_dim = jax.default_backend(), q.shape[-1]
    per_head = key_bias is not None and key_bias.shape[1] != 1
    if backend in ("xla", "xla_chunked"):
        return None
    if backend == "cudnn":
        widened = head_dim + (8 if key_bias is not None else 0)
        if platform != "gpu":
            return f"it needs a CUDA GPU, this is {platform!r}"
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it needs bfloat16 or float16, found {q.dtype}"
        if widened % 8 or widened > _cudnn_head_limit():
            return f"head size {widened} (limit {_cudnn_head_limit()}, a multiple of 8)"
        return "the key bias differs by head" if per_head else None
    if backend == "splash":
        if platform not in ("tpu", "cpu"):
            return f"it needs a TPU, this is {platform!r}"
        if mask is not None and not mask.causal:
            return "visibility is neither causal nor full (cache, segments)"
        return "the key bias differs by head" if per_head else None
    return f"unknown name; the backends are {', '.join(BACKENDS)}, auto"


def _choose(q, k, mask, key_bias) -> str:
    scores = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
    on_host = ("xla", "xla_chunked") if scores <= _XLA_SCORES else ("xla_chunked",)
    return next(b for b in _PREFERRED.get(jax.default_backend(), on_host) if why_not(b, q, k, mask, key_bias) is None)


def _cudnn_head_limit() -> int:
    return 256 if float(jax.local_devices()[0].compute_capability) >= 9.0 else 128


def _on_mesh(fn, args: tuple, heads_axis: int):
    """Call `fn` per shard of batch and heads: attention never mixes either, so no collective is needed."""
    if not sharding.active():
        return fn(*args)

    def spec(x):
        if x.ndim == 2:  # orders and segments
            return sharding.partition(("batch", None))
        if x.ndim == 3:  # key bias
            return sharding.partition(("batch", "heads" if x.shape[1] > 1 else None, None))
        return sharding.partition(("batch", None, "heads", None))

    in_specs = jax.tree.map(spec, args)
    args = jax.tree.map(lambda x, s: jax.sharding.reshard(x, s), args, in_specs)
    out = ["batch", None, None, None]
    out[heads_axis] = "heads"
    return jax.shard_map(fn, in_specs=in_specs, out_specs=sharding.partition(tuple(out)), check_vma=False)(*args)


def _probabilities(q, k, mask, key_bias, scale) -> Array:
    """f32 [B, K, G, T, S]."""
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    if key_bias is not None:
        bias = key_bias.astype(jnp.float32)
        scores += bias[:, :, None, None, :] if bias.shape[1] == 1 else bias.reshape(B, K, N // K, 1, S)
    if mask is not None:
        scores = jnp.where(mask.visible()[:, None, None], scores, MASKED)
    return jax.nn.softmax(scores, axis=-1)


def _xla(q, k, v, mask, key_bias, *, scale):
    probs = _probabilities(q, k, mask, key_bias, scale)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs.astype(v.dtype), v).reshape(q.shape)


def _xla_chunked(q, k, v, mask, key_bias, *, scale):
    B, T, N, H = q.shape
    chunks = -(-T // CHUNK)

    def split(x):
        """[B, T, ...] -> [chunks, B, CHUNK, ...]; padding queries see what their zeros allow and are cut off again."""
        x = jnp.pad(x, ((0, 0), (0, chunks * CHUNK - T), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, chunks, CHUNK, *x.shape[2:]), 1, 0)

    queries = (q,) if mask is None else (q, mask.q_order, mask.q_segment)

    # Without the checkpoint the backward pass would keep every chunk's probabilities.
    @jax.checkpoint
    def one(queries):
        # The barrier ties the mask to q; a gradient would otherwise compute every chunk's mask ahead, [T, S] in all.
        q, *rest = jax.lax.optimization_barrier(queries)
        part = Mask(rest[0], mask.k_order, rest[1], mask.k_segment) if rest else None
        return _xla(q, k, v, part, key_bias, scale=scale)

    out = jax.lax.map(one, jax.tree.map(split, queries))
    return jnp.moveaxis(out, 0, 1).reshape(B, chunks * CHUNK, N, H)[:, :T]


def _widen(q, k, v, key_bias, scale):
    """Carry a per-key bias through a kernel without one, as 8 more head dimensions: q·k gains bias/scale.

    The bias is split into two terms of the kernel's dtype, so that bf16 keeps 16 bits of it.
    """
    if key_bias is None:
        return q, k, v
    limit = float(jnp.finfo(k.dtype).max) / 4  # MASKED overflows f16; this is still far below any score
    bias = jnp.clip(key_bias[:, 0, :, None].astype(jnp.float32) / scale, -limit, limit)
    hi = bias.astype(k.dtype)
    lo = (bias - hi.astype(jnp.float32)).astype(k.dtype)
    zeros = jnp.zeros((*bias.shape[:2], 6), k.dtype)
    extra = jnp.concatenate([hi, lo, zeros], axis=-1)[:, :, None, :]
    extra = jnp.broadcast_to(extra, (*k.shape[:3], 8))
    return (
        jnp.concatenate([q, jnp.ones((*q.shape[:3], 8), q.dtype)], axis=-1),
        jnp.concatenate([k, extra], axis=-1),
        jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 8))),
    )


def _cudnn(q, k, v, mask, key_bias, *, scale):
    head_dim = q.shape[-1]
    q, k, v = _widen(q, k, v, key_bias, scale)
    kernel = functools.partial(jax.nn.dot_product_attention, q, k, v, scale=scale, implementation="cudnn")
    if mask is None:
        out = kernel()
    elif mask.causal:
        lengths = jnp.sum(mask.k_order < NEVER, axis=1).astype(jnp.int32)
        out = kernel(is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    else:
        out = kernel(mask=mask.visible()[:, None])
    return out[..., :head_dim]


def _splash(q, k, v, mask, key_bias, *, scale):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    head_dim, T, S = q.shape[-1], q.shape[1], k.shape[1]
    # The kernel does not scale. Scaling comes first: a bf16 column of scaled ones would round the bias.
    q, k, v = _widen(q * scale, k, v, key_bias, 1.0)
    # Blocks are multiples of 128. Padded keys come last: a causal mask hides them, a full one needs segment ids.
    pad_q, pad_k = (-T) % 128, (-S) % 128
    q, k, v = (
        jnp.moveaxis(jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), 1, 2)
        for x, pad in ((q, pad_q), (k, pad_k), (v, pad_k))
    )
    shape = (T + pad_q, S + pad_k)
    one_head = splash_attention_mask.CausalMask(shape) if mask is not None else splash_attention_mask.FullMask(shape)
    block = math.gcd(512, math.gcd(*shape))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([one_head] * q.shape[1]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        ),
        interpret=jax.default_backend() == "cpu",
    )  # fmt: skip
    segments = splash_attention_kernel.SegmentIds(
        (jnp.arange(shape[0]) >= T).astype(jnp.int32), (jnp.arange(shape[1]) >= S).astype(jnp.int32)
    )
    out = jax.vmap(lambda q, k, v: jnp.asarray(kernel(q, k, v, segment_ids=segments)))(q, k, v)
    return jnp.moveaxis(out, 1, 2)[:, :T, :, :head_dim].astype(v.dtype)


_KERNELS = {"xla": _xla, "xla_chunked": _xla_chunked, "cudnn": _cudnn, "splash": _splash}
