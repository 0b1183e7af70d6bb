"""Importance maps of VIF against float64 NumPy, finite differences, and by their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batched import assert_batched
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxvqa.errors import JaxVQAError
from jaxvqa.transforms.gaussian_mixture import gaussian_mixture as not_compiled

gaussian_mixture = jax.jit(not_compiled, static_argnames=("grid", "map_norm", "temperature"))

GRIDS = [(5, 8), (1, 4), (1, 1), (24, 24)]
NORMS = ["sum", "softmax"]
finite = st.floats(width=32, allow_infinity=False, allow_nan=False)
inside, wide = st.floats(0, 1, width=32), st.floats(0.0625, 2, width=32)


def mixtures(n=3, centre=inside, spread=wide, batch=()):
    weight = arrays(np.float32, (*batch, n), elements=st.floats(0.125, 1, width=32))
    return st.tuples(
        arrays(np.float32, (*batch, n, 2), elements=centre),
        arrays(np.float32, (*batch, n), elements=spread),
        weight.map(lambda w: w / w.sum(-1, keepdims=True)),
    )


def reference(centres, spreads, weights, grid, map_norm="sum", temperature=1.0):
    """VIF eq. 3-4, cell by cell in float64, without the epsilon."""
    h = np.zeros(grid)
    ys, xs = (np.linspace(0, 1, size) for size in grid)
    for row, column in np.ndindex(*grid):
        for (x, y), s, weight in zip(np.float64(centres), np.float64(spreads), np.float64(weights), strict=True):
            distance = (xs[column] - x) ** 2 + (ys[row] - y) ** 2
            h[row, column] += weight * np.exp(-distance / (2 * s**2))
    h = h if map_norm == "sum" else np.exp(h / temperature)
    return h / h.sum()


@given(mixtures(), st.sampled_from(GRIDS[:3]), st.sampled_from(NORMS), st.sampled_from([1.0, 0.25]))
def test_it_is_the_normalised_sum_of_the_components(mixture, grid, norm, temperature):
    ours = gaussian_mixture(*mixture, grid, map_norm=norm, temperature=temperature)
    assert ours.dtype == jnp.float32 and ours.shape == grid
    # Exponents reach 1 / (2 · 0.05²) · 2 = 400: float32 resolves them to 3e-5.
    np.testing.assert_allclose(ours, reference(*mixture, grid, norm, temperature), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("spread", "norm", "entropy", "peak"),
    [
        (0.035, "softmax", 6.3532, 2.693),
        (0.1, "softmax", 6.3373, 2.526),
        (0.2, "softmax", 6.3166, 2.091),
        (0.5, "softmax", 6.3439, 1.316),
        (0.035, "sum", 2.4039, 141.46),
        (0.1, "sum", 4.5037, 17.33),
        (0.2, "sum", 5.8002, 4.415),
        (0.5, "sum", 6.3314, 1.403),
    ],
)
def test_map_of_one_gaussian(spread, norm, entropy, peak):
    """VIF, analytic test values: map of one Gaussian centred on grid point 11/23 in both axes, entropy in nats."""
    one = np.full((1, 2), 11 / 23, np.float32), np.float32([spread]), np.float32([1])
    ours = np.asarray(gaussian_mixture(*one, (24, 24), map_norm=norm), np.float64)
    assert -(ours * np.log(np.maximum(ours, 1e-300))).sum() == pytest.approx(entropy, abs=6e-5)
    assert ours.max() * 576 == pytest.approx(peak, abs=6e-4 if peak < 10 else 6e-3)  # digits given
    assert np.unravel_index(ours.argmax(), ours.shape) == (11, 11)


def test_map_of_the_released_initialisation():
    """VIF, analytic test values: all centres 0.5, s = softplus(0) + 0.035, softmax."""
    spread = float(jax.nn.softplus(0.0)) + 0.035
    assert spread == pytest.approx(0.728147, abs=1e-6)
    same = np.full((16, 2), 0.5, np.float32), np.full(16, spread, np.float32), np.full(16, 1 / 16, np.float32)
    ours = np.asarray(gaussian_mixture(*same, (24, 24), map_norm="softmax"))
    assert ours.min() * 576 == pytest.approx(0.796372, abs=1e-5)
    assert ours.max() * 576 == pytest.approx(1.158780, abs=1e-5)


def test_x_runs_along_columns_and_y_along_rows():
    corner = np.float32([[1, 0]]), np.float32([0.1]), np.float32([1])
    ours = np.asarray(gaussian_mixture(*corner, (5, 8)))
    assert np.unravel_index(ours.argmax(), ours.shape) == (0, 7)


@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from(NORMS))
def test_a_map_moves_with_its_centres(dx, dy, norm):
    """Components that fade before the border: moved by whole cells, the map is rolled."""
    centres = np.float32([[4, 5], [6, 4]]) / 23
    spreads, weights = np.float32([0.03, 0.025]), np.float32([0.3, 0.7])
    moved = centres + np.float32([dx, dy]) / 23
    here, there = (np.asarray(gaussian_mixture(c, spreads, weights, (24, 24), map_norm=norm)) for c in (centres, moved))
    np.testing.assert_allclose(there, np.roll(here, (dy, dx), (0, 1)), atol=2e-6)


@given(mixtures(centre=finite, spread=finite), st.sampled_from(GRIDS[:3]), st.sampled_from(NORMS))
def test_it_is_a_distribution_for_every_finite_component(mixture, grid, norm):
    ours = np.asarray(gaussian_mixture(*mixture, grid, map_norm=norm))
    assert np.isfinite(ours).all() and (ours >= 0).all()
    assert ours.sum() == pytest.approx(1, abs=1e-5)


def test_components_that_no_cell_sees_still_give_a_distribution():
    """Half a cell away at 14 spreads the densities underflow; four cells are equally near, and share the map."""
    between = np.float32([[0.5, 0.5]]), np.float32([0.035]), np.float32([1])
    np.testing.assert_allclose(gaussian_mixture(*between, (2, 2)), np.full((2, 2), 0.25), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_component_of_weight_zero_and_a_component_given_twice_change_nothing(norm):
    """One component by itself, with one of no weight beside it, and split into two halves."""
    one = np.float32([[0.2, 0.7]]), np.float32([0.2]), np.float32([1])
    alone = gaussian_mixture(*one, (5, 8), map_norm=norm)
    beside = np.float32([[0.2, 0.7], [0.9, 0.1]]), np.float32([0.2, 0.5]), np.float32([1, 0])
    np.testing.assert_allclose(gaussian_mixture(*beside, (5, 8), map_norm=norm), alone, rtol=1e-5)
    halves = np.float32([[0.2, 0.7], [0.2, 0.7]]), np.float32([0.2, 0.2]), np.float32([0.5, 0.5])
    np.testing.assert_allclose(gaussian_mixture(*halves, (5, 8), map_norm=norm), alone, rtol=1e-5)


@given(mixtures(), st.permutations(range(3)))
def test_the_order_of_the_components_does_not_matter(mixture, order):
    shuffled = [x[order] for x in mixture]
    np.testing.assert_allclose(
        gaussian_mixture(*shuffled, (5, 8)), gaussian_mixture(*mixture, (5, 8)), rtol=1e-5, atol=1e-9
    )


def on_small_grid(*mixture):
    return not_compiled(*mixture, (5, 8))


@given(mixtures(batch=(3,)), st.permutations(range(3)))
def test_mixtures_of_a_batch_do_not_mix(mixture, order):
    assert_batched(on_small_grid, *mixture, order=order, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_that_of_finite_differences(norm):
    rng = np.random.default_rng(0)
    mixture = rng.random((3, 2)), 0.2 + rng.random(3), np.array([0.2, 0.3, 0.5])
    weigh = rng.standard_normal((5, 8))
    single = [np.float32(x) for x in mixture]
    grads = jax.jit(jax.grad(lambda m: (gaussian_mixture(*m, (5, 8), map_norm=norm) * weigh).sum()))(single)
    for i, ours in enumerate(grads):
        for at in np.ndindex(ours.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [np.array(x) for x in mixture]
                moved[i][at] += step
                h = reference(*moved, (5, 8), norm)
                values.append((h * weigh).sum())
            assert ours[at] == pytest.approx((values[0] - values[1]) / 2e-5, abs=2e-5)


def test_gradients_are_finite_where_a_component_is_far_narrow_or_without_weight():
    mixture = np.float32([[5, -3], [0.5, 0.5]]), np.float32([0.01, 1e-6]), np.float32([1, 0])
    grads = jax.jit(jax.grad(lambda m: (gaussian_mixture(*m, (5, 8)) * jnp.arange(8)).sum()))(mixture)
    assert all(np.isfinite(g).all() for g in grads)


def test_half_precision_components_are_rendered_in_float32():
    rng = np.random.default_rng(0)
    mixture = rng.random((3, 2)), 0.1 + rng.random(3), np.array([0.2, 0.3, 0.5])
    rounded = [x.astype(jnp.bfloat16) for x in mixture]
    ours = gaussian_mixture(*map(jnp.asarray, rounded), (5, 8))
    np.testing.assert_array_equal(ours, gaussian_mixture(*[x.astype(np.float32) for x in rounded], (5, 8)))
    # bf16 keeps 8 bits of the parameters: the map is within 5 % of its own largest value.
    exact = reference(*mixture, (5, 8))
    assert np.abs(ours - exact).max() < 0.05 * exact.max()


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(JaxVQAError, match=r"map_norm='max'; expected 'sum' or 'softmax'"):
        gaussian_mixture(np.zeros((1, 2), np.float32), np.ones(1, np.float32), np.ones(1, np.float32), (2, 2),
                         map_norm="max")  # fmt: skip
