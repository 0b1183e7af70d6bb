"""log λ·M as a key bias: against the probabilities that CoF's equation 3 writes down, through the attention core."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small import cells_from

from jaxvqa.attention import NEVER, Mask, attend, attention_rows
from jaxvqa.requests import Row
from jaxvqa.transforms.reweight import log_reweight

B, T, N, H, GRID, START = 2, 7, 4, 6, (2, 3), 1
"""Keys: a word, the 2 × 3 cells of an image, a word that two queries see but one sample lacks (padding)."""
S = START + GRID[0] * GRID[1] + 1
ORDER = np.array([[*range(S)], [*range(S - 1), NEVER]])
QUERIES = np.array([[0, 1, 2, 3, 5, 6, 7]] * B)
SEEN = ORDER[:, None, :] <= QUERIES[:, :, None]
MASK = Mask(jnp.asarray(QUERIES, jnp.int32), jnp.asarray(ORDER, jnp.int32))
ROUNDING = 2e-6
"""f32 softmax against float64."""

seeds = st.integers(0, 999)
strengths = st.sampled_from([0.0, 1e-20, 0.3, 1.0, 2.0, 4.5, 22.0])
soft = arrays(np.float32, (B, *GRID), elements=st.floats(0, 1, width=32))
hard = arrays(np.float32, (B, *GRID), elements=st.sampled_from([0.0, 1.0]))


def on_keys(cells, start, keys):
    """The bias of an image whose first cell lies at `start`."""
    grid = cells.shape[-2:]
    at = cells_from([start], grid)
    return Row(at, jnp.int32(keys), jnp.zeros(1, int), jnp.ones(1, bool), None, None, grid, keys).on_keys(cells)


def drawn(seed):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((B, n, N, H)), jnp.float32) for n in (T, S, S))


def key_bias(mask, strength):
    """[B, 1 or N, S] for a mask [B, h, w] and λ as a number or one per head."""
    bias = log_reweight(mask[:, None], np.reshape(np.float32(strength), (-1, 1, 1)))
    return on_keys(bias, START, S)


def plain_probabilities(q, k):
    """float64 [B, N, T, S]."""
    scores = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), np.asarray(k, np.float64)) / np.sqrt(H)
    weights = np.where(SEEN[:, None], np.exp(scores), 0)
    return weights / weights.sum(-1, keepdims=True)


def reweighted(probs, mask, strength):
    """Equation 3: λ^M·p, renormalised, λ a number or one per head; 0^M is 0 where M > 0."""
    strength = np.reshape(np.float64(strength), (1, -1, 1, 1))
    M = np.zeros((B, 1, 1, S))
    M[..., START : S - 1] = mask.reshape(B, 1, 1, -1)
    weights = np.where(M > 0, strength**M, 1) * probs
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


@given(soft, strengths)
def test_a_cells_weight_is_the_factor_to_the_power_of_the_mask(mask, strength):
    bias = log_reweight(mask, strength)
    assert bias.dtype == jnp.float32 and np.isfinite(bias).all()
    expected = np.where(mask > 0, np.float64(strength) ** mask, 1)
    np.testing.assert_allclose(np.exp(np.asarray(bias)), expected, rtol=1e-5, atol=1e-37)
    assert (np.asarray(bias)[mask == 0] == 0).all()


@given(seed=seeds, mask=soft, strength=st.one_of(strengths, st.tuples(*[strengths] * N)))
def test_the_bias_is_the_papers_equation_in_rows_and_outputs(seed, mask, strength):
    """For one factor and for one per head; rows sum to one, and what is masked stays masked."""
    q, k, v = drawn(seed)
    bias = key_bias(mask, strength)
    rows = np.asarray(attention_rows(q, k, MASK, scale=H**-0.5, key_bias=bias))
    expected = reweighted(plain_probabilities(q, k), mask, strength)
    np.testing.assert_allclose(rows, expected, atol=ROUNDING)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=ROUNDING)
    assert (rows[np.broadcast_to(~SEEN[:, None], rows.shape)] == 0).all()
    out = np.einsum("bnts,bsnh->btnh", expected, np.asarray(v, np.float64))
    for backend in ("xla", "xla_chunked"):
        ours = attend(q, k, v, MASK, scale=H**-0.5, key_bias=bias, backend=backend)
        np.testing.assert_allclose(ours, out, atol=20 * ROUNDING)


@given(seed=seeds, mask=soft)
def test_a_factor_of_one_and_an_empty_mask_change_no_bit(seed, mask):
    q, k, v = drawn(seed)
    plain = np.asarray(attend(q, k, v, MASK, scale=H**-0.5, backend="xla"))
    for bias in (key_bias(mask, 1.0), key_bias(np.zeros_like(mask), 22.0), key_bias(np.zeros_like(mask), 0.0)):
        ours = np.asarray(attend(q, k, v, MASK, scale=H**-0.5, key_bias=bias, backend="xla"))
        assert ours.tobytes() == plain.tobytes()


@given(seed=seeds, mask=hard, pair=st.tuples(strengths, strengths))
def test_attention_inside_the_mask_grows_with_the_factor(seed, mask, pair):
    q, k, _ = drawn(seed)
    low, high = (
        np.asarray(attention_rows(q, k, MASK, scale=H**-0.5, key_bias=key_bias(mask, strength)))
        for strength in sorted(pair)
    )
    inside = np.zeros((B, 1, 1, S), bool)
    inside[..., START : S - 1] = mask.reshape(B, 1, 1, -1) > 0
    assert (np.where(inside, high - low, 0).sum(-1) >= -ROUNDING).all()


def test_a_row_that_sees_only_hidden_keys_still_sees_nothing_that_is_masked():
    q, k, _ = drawn(0)
    first = Mask(jnp.zeros((B, T), jnp.int32), jnp.asarray(ORDER, jnp.int32))  # each row sees key 0 alone
    bias = on_keys(log_reweight(np.ones((B, 1, 1, S), np.float32), 0), 0, S)
    rows = np.asarray(attention_rows(q, k, first, scale=H**-0.5, key_bias=bias))
    np.testing.assert_array_equal(rows, np.broadcast_to(np.eye(S)[0], rows.shape))


@pytest.mark.parametrize(
    ("strength", "count", "mass"),
    [(4.5, 25, 0.154639), (2.0, 25, 0.075188), (2.0, 576, 0.947368), (4.5, 576, 0.975904)],
)
def test_the_mass_on_chosen_tokens_of_a_uniform_row(strength, count, mass):
    """λn / (λn + S − n) of the 640 keys that a row with one image of LLaVA-1.5 sees alike."""
    mask = (np.arange(576) < count).astype(np.float32).reshape(1, 24, 24)
    q, k = jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 640, 1, 8))
    row = attention_rows(q, k, None, scale=1.0, key_bias=on_keys(log_reweight(mask, strength), 35, 640)[None])
    assert float(row[0, 0, 0, 35 : 35 + count].sum()) == pytest.approx(mass, abs=1e-5)
