"""The attention core against a dense float64 softmax, the identities that methods rest on, and the backends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa import attention
from jaxvqa.attention import MASKED, NEVER, BackendError, Mask, attend, attention_rows

# (B, T, S, N, K, H): heads of their own, grouped heads, cross-attention.
MHA, GQA, CROSS = (2, 9, 9, 4, 4, 8), (2, 9, 9, 4, 2, 8), (2, 5, 11, 4, 2, 8)
TOLERANCE = 2e-6
"""f32 rounding of a softmax and one product of unit-sized terms."""
SCALE = 8**-0.5

seeds = st.integers(0, 2**31 - 1)
lengths_of = st.lists(st.integers(1, 9), min_size=2, max_size=2)


def draw(seed, shape, dtype=np.float32, size=1.0):
    """q, k, v and a generator for more."""
    B, T, S, N, K, H = shape
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(s) * size for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    return (*(jnp.asarray(x, dtype) for x in (q, k, v)), rng)


def causal(lengths, length=9):
    """The mask of right-padded tokens."""
    order = np.tile(np.arange(length, dtype=np.int32), (len(lengths), 1))
    order = np.where(order < np.asarray(lengths)[:, None], order, NEVER).astype(np.int32)
    return Mask(jnp.asarray(order), jnp.asarray(order), causal=True)


def dense(q, k, v, visible=None, bias=None, scale=SCALE):
    """Output and probabilities [B, N, T, S] in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) * scale
    if bias is not None:
        scores += np.asarray(bias, np.float64)[:, :, None, :]
    if visible is not None:
        scores = np.where(visible[:, None], scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", probs, v), probs


jitted = jax.jit(attend, static_argnames=("scale", "backend"))
jitted_rows = jax.jit(attention_rows, static_argnames="scale")


@pytest.mark.parametrize("heads", [1, 4], ids=["shared-bias", "bias-by-head"])
@pytest.mark.parametrize("shape", [MHA, GQA], ids=["mha", "gqa"])
@given(seed=seeds, lengths=lengths_of)
def test_causal_attention_equals_a_dense_softmax(shape, heads, seed, lengths):
    q, k, v, rng = draw(seed, shape)
    bias = rng.standard_normal((2, heads, 9)).astype(np.float32)
    mask = causal(lengths)
    out = jitted(q, k, v, mask, scale=SCALE, key_bias=bias, backend="xla")
    rows = jitted_rows(q, k, mask, scale=SCALE, key_bias=bias)
    expected, probs = dense(q, k, v, np.asarray(mask.visible()), bias)
    valid = np.arange(9) < np.array(lengths)[:, None]
    np.testing.assert_allclose(np.asarray(out)[valid], expected[valid], atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(rows).swapaxes(1, 2)[valid], probs.swapaxes(1, 2)[valid], atol=TOLERANCE)


@given(seed=seeds)
def test_cross_attention_sees_every_key(seed):
    q, k, v, _ = draw(seed, CROSS)
    expected, probs = dense(q, k, v)
    np.testing.assert_allclose(jitted(q, k, v, None, scale=SCALE), expected, atol=TOLERANCE)
    np.testing.assert_allclose(jitted_rows(q, k, None, scale=SCALE), probs, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@given(seed=seeds, size=st.floats(0.1, 4), lengths=lengths_of)
def test_rows_sum_to_one_in_bf16_too(dtype, seed, size, lengths):
    """A kernel's log-sum-exp is rounded to bf16: rows built from it sum to 0.93-1.03 at these sizes."""
    q, k, _, _ = draw(seed, GQA, dtype, size)
    rows = jitted_rows(q, k, causal(lengths), scale=SCALE)
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows.sum(axis=-1), 1, atol=1e-5)


@given(seed=seeds, chosen=st.lists(st.integers(0, 8), min_size=6, max_size=6), lengths=lengths_of)
def test_chosen_rows_are_rows_of_the_whole(seed, chosen, lengths):
    q, k, _, _ = draw(seed, GQA)
    at, mask = np.array(chosen, np.int32).reshape(2, 3), causal(lengths)
    picked = jnp.take_along_axis(q, at[:, :, None, None], axis=1)
    rows = jitted_rows(picked, k, mask.at(jnp.asarray(at)), scale=SCALE)
    every = jitted_rows(q, k, mask, scale=SCALE)
    np.testing.assert_allclose(rows, jnp.take_along_axis(every, at[:, None, :, None], axis=2), atol=1e-7)


@given(seed=seeds, lam=st.floats(0.01, 100), lengths=lengths_of)
def test_a_key_bias_multiplies_by_a_power_and_renormalises(seed, lam, lengths):
    """P · λ^M, renormalised: CoF's reweighting."""
    q, k, v, rng = draw(seed, GQA)
    weight = rng.random((2, 1, 9)).astype(np.float32)
    mask = causal(lengths)
    got = jitted_rows(q, k, mask, scale=SCALE, key_bias=np.float32(np.log(lam)) * weight)
    _, probs = dense(q, k, v, np.asarray(mask.visible()))
    probs = probs * np.float64(lam) ** weight[:, :, None, :]
    valid = np.arange(9) < np.array(lengths)[:, None]
    expected = (probs / probs.sum(axis=-1, keepdims=True)).swapaxes(1, 2)[valid]
    np.testing.assert_allclose(np.asarray(got).swapaxes(1, 2)[valid], expected, atol=5e-6)


@given(seed=seeds, hidden=st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True))
def test_a_zero_weight_is_a_mask(seed, hidden):
    """λ = 0 is the bias MASKED: those keys get no weight at all, and nothing becomes NaN."""
    q, k, v, _ = draw(seed, GQA)
    bias = np.zeros((2, 1, 9), np.float32)
    bias[:, :, hidden] = MASKED
    mask = causal([9, 9])
    visible = np.array(mask.visible())
    visible[:, :, hidden] = False
    expected, probs = dense(q, k, v, visible)
    rows = jitted_rows(q, k, mask, scale=SCALE, key_bias=bias)
    assert (np.asarray(rows)[..., hidden] == 0).all()
    np.testing.assert_allclose(rows, probs, atol=TOLERANCE)
    np.testing.assert_allclose(jitted(q, k, v, mask, scale=SCALE, key_bias=bias), expected, atol=TOLERANCE)


@given(seed=seeds, lengths=lengths_of)
def test_padding_does_not_reach_valid_rows(seed, lengths):
    q, k, v, rng = draw(seed, GQA)
    padding = (np.arange(9) >= np.array(lengths)[:, None])[:, :, None, None]
    noise = rng.standard_normal(k.shape).astype(np.float32) * 100
    mask = causal(lengths)
    clean = jitted(q, k, v, mask, scale=SCALE)
    dirty = jitted(q, jnp.where(padding, noise, k), jnp.where(padding, noise, v), mask, scale=SCALE)
    np.testing.assert_array_equal(np.asarray(clean)[~padding[..., 0, 0]], np.asarray(dirty)[~padding[..., 0, 0]])


@given(seed=seeds, cut=st.integers(2, 6))
def test_segments_are_separate_sequences_behind_a_shared_prefix(seed, cut):
    """Three prefix tokens, then two questions side by side: each sees the prefix and itself."""
    q, k, v, _ = draw(seed, GQA)
    segment = np.array([[0] * 3 + [1] * (cut - 1) + [2] * (7 - cut)] * 2, np.int32)
    order = np.concatenate([np.arange(3), 3 + np.arange(cut - 1), 3 + np.arange(7 - cut)]).astype(np.int32)
    order = np.stack([order, order])
    out = jitted(q, k, v, Mask(order, order, segment, segment), scale=SCALE)
    for s in (1, 2):
        own = np.flatnonzero((segment[0] == 0) | (segment[0] == s))
        expected, _ = dense(q[:, own], k[:, own], v[:, own], np.tril(np.ones((len(own),) * 2, bool))[None])
        np.testing.assert_allclose(np.asarray(out)[:, own], expected, atol=TOLERANCE)


# ---- the key bias through kernels that have none ----


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@given(seed=seeds, size=st.floats(0.1, 8))
def test_a_widened_bias_is_right_to_sixteen_bits(dtype, seed, size):
    """One bf16 term would be 0.4 % off; two leave |bias|·2⁻¹⁶ on a score, so P is right to e^(2·|bias|·2⁻¹⁶)."""
    q, k, v, rng = draw(seed, GQA, dtype)
    bias = jnp.asarray(rng.uniform(-size, size, (2, 1, 9)), jnp.float32)
    wide_q, wide_k, wide_v = attention._widen(q, k, v, bias, SCALE)
    assert wide_q.shape[-1] == wide_k.shape[-1] == wide_v.shape[-1] == 16
    rows = attention_rows(wide_q, wide_k, None, scale=SCALE)
    expected = attention_rows(q, k, None, scale=SCALE, key_bias=bias)
    bound = np.expm1(2 * size * 2**-16) + 1e-5
    np.testing.assert_allclose(rows, expected, rtol=bound)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_widened_mask_stays_finite(dtype):
    """MASKED overflows f16: the two terms would be −inf and +inf."""
    q, k, v, _ = draw(0, GQA, dtype)
    bias = jnp.zeros((2, 1, 9)).at[:, :, 4:].set(MASKED)
    wide_q, wide_k, _ = attention._widen(q, k, v, bias, SCALE)
    rows = attention_rows(wide_q, wide_k, None, scale=SCALE)
    np.testing.assert_allclose(rows, attention_rows(q, k, None, scale=SCALE, key_bias=bias), atol=1e-5)
    assert (np.asarray(rows)[..., 4:] == 0).all()


# ---- backends ----

LONG = (1, 150, 150, 4, 2, 8)
"""More queries than one chunk of `xla_chunked` or one block of splash, and no multiple of either."""


@functools.partial(jax.jit, static_argnames="backend")
def value_and_gradients(q, k, v, mask, bias, weight, backend):
    def loss(q, k, v, bias):
        out = attend(q, k, v, mask, scale=SCALE, key_bias=bias, backend=backend)
        return jnp.sum(out * weight), out

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, bias)


@pytest.mark.parametrize("visibility", ["full", "segments"])
def test_chunked_equals_xla_with_its_gradients(visibility):
    q, k, v, rng = draw(1, LONG)
    bias = jnp.asarray(rng.standard_normal((1, 4, 150)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    order = causal([140], 150).q_order
    segment = jnp.asarray(rng.integers(0, 3, (1, 150)), jnp.int32)
    mask = {
        "full": None,
        "segments": Mask(order, order, segment, segment),
    }[visibility]
    valid = 140 if mask is not None else 150
    weight = weight * (jnp.arange(150) < valid)[:, None, None]
    one, two = (value_and_gradients(q, k, v, mask, bias, weight, b) for b in ("xla", "xla_chunked"))
    np.testing.assert_allclose(one[0][1][:, :valid], two[0][1][:, :valid], atol=TOLERANCE)
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="splash runs on a TPU, interpreted on a CPU")
@pytest.mark.parametrize("full", [False, True], ids=["causal-with-bias", "full"])
def test_splash_equals_xla(full):
    """Interpreted on a CPU: the logic, not the speed."""
    q, k, v, rng = draw(2, LONG)
    mask = None if full else causal([140], 150)
    bias = jnp.asarray(rng.standard_normal((1, 1, 150)), jnp.float32) if not full else None
    one, two = (jitted(q, k, v, mask, scale=SCALE, key_bias=bias, backend=b) for b in ("xla", "splash"))
    valid = 150 if full else 140
    np.testing.assert_allclose(one[:, :valid], two[:, :valid], atol=1e-5)


REFUSED = {
    "cudnn on a CPU": ("cudnn", GQA, {}, "CUDA"),
    "an unknown name": ("flash", GQA, {}, "unknown name"),
    "splash with segments": ("splash", GQA, {"segments": True}, "neither causal nor full"),
    "splash with a bias by head": ("splash", GQA, {"heads": 4}, "differs by head"),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="states what a CPU cannot serve")
@pytest.mark.parametrize("name", REFUSED)
def test_a_backend_that_cannot_serve_says_so(name):
    backend, shape, request, reason = REFUSED[name]
    q, k, v, _ = draw(0, shape)
    mask = causal([9, 9])
    if request.get("segments"):
        mask = Mask(mask.q_order, mask.k_order, jnp.ones((2, 9), jnp.int32), jnp.ones((2, 9), jnp.int32))
    bias = jnp.zeros((2, request["heads"], 9)) if "heads" in request else None
    with pytest.raises(BackendError, match=reason):
        attend(q, k, v, mask, scale=SCALE, key_bias=bias, backend=backend)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("visibility", ["causal", "full", "cache"])
def test_cudnn_equals_xla(visibility, with_bias, dtype):
    shape = (2, 96, 128 if visibility == "cache" else 96, 4, 2, 64)
    q, k, v, rng = draw(4, shape, dtype)
    order = causal([90, 60], 96).q_order
    mask = {
        "causal": Mask(order, order, causal=True),
        "full": None,
        "cache": Mask(order + 20, causal([116, 80], 128).k_order),
    }[visibility]
    bias = jnp.asarray(rng.uniform(-3, 3, (2, 1, shape[2])), jnp.float32) if with_bias else None
    bias = bias if bias is None else bias.at[:, :, 5:9].set(MASKED)
    one, two = (
        np.asarray(attend(q, k, v, mask, scale=64**-0.5, key_bias=bias, backend=b), np.float32)
        for b in ("xla", "cudnn")
    )
    valid = slice(None) if visibility == "full" else slice(0, 60)
    np.testing.assert_allclose(one[:, valid], two[:, valid], atol=2e-2)
