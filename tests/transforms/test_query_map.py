"""The product of a decoder row with the queries' attention, against NumPy and by its properties."""

import jax.numpy as jnp
import numpy as np
import pytest
from batched import assert_batched

from jaxvqa.errors import UserError
from jaxvqa.transforms.query_map import query_map

Q, SIDE = 5, 3


def attention(rng, *shape):
    """Probabilities over the last axis."""
    weights = rng.random(shape).astype(np.float32)
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    return attention(rng, 4, Q), attention(rng, 4, Q, 1 + SIDE * SIDE)


def test_it_is_the_sum_over_the_queries_without_the_class_token(maps):
    rows, cross = maps
    ours = query_map(rows, cross)
    assert ours.dtype == jnp.float32 and ours.shape == (4, SIDE, SIDE)
    for b, y, x in np.ndindex(4, SIDE, SIDE):
        expected = sum(float(rows[b, q]) * float(cross[b, q, 1 + y * SIDE + x]) for q in range(Q))
        assert float(ours[b, y, x]) == pytest.approx(expected, rel=1e-5)


def test_a_row_that_sees_one_query_gives_that_querys_map(maps):
    cross = maps[1][0]
    for q in range(Q):
        np.testing.assert_array_equal(query_map(np.eye(Q, dtype=np.float32)[q], cross).ravel(), cross[q, 1:])


def test_a_query_that_looks_at_the_class_token_alone_says_nothing():
    cross = np.zeros((Q, 1 + SIDE * SIDE), np.float32)
    cross[:, 0] = 1
    assert not np.asarray(query_map(np.full(Q, 0.2, np.float32), cross)).any()


def test_rows_of_a_batch_do_not_mix(maps):
    assert_batched(query_map, *maps, order=[2, 0, 3, 1])


def test_half_precision_is_multiplied_in_float32(maps):
    half = [jnp.asarray(m, jnp.bfloat16) for m in maps]
    np.testing.assert_allclose(query_map(*half), query_map(*[np.float32(m) for m in half]), rtol=1e-6)


def test_keys_that_are_no_square_are_refused():
    with pytest.raises(UserError, match="9 keys; expected a class token and a square"):
        query_map(np.ones(Q, np.float32), np.ones((Q, 9), np.float32))
