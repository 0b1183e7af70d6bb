import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvqa.training.optimizer import apply, optimizer, warmup_linear
from tests.training.small import CONFIG, WORDS, initialised


def test_the_rate_rises_to_its_peak_and_falls_to_the_floor():
    rates = [float(warmup_linear(jnp.float32(p), 2.0, 0.1)) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.02, 0.04])


@pytest.mark.slow
def test_muon_updates_of_block_matrices_are_orthogonal_and_of_adam_size():
    params = initialised()
    tx = optimizer(params, weight_decay=0.0)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    q = np.asarray(updates.model.decoder.layers.q_proj[0]).reshape(CONFIG.decoder.width, -1)
    low, high = np.quantile(np.linalg.svd(q, compute_uv=False), [0.1, 0.9])
    assert high / low < 2.5  # 10 or so for the gradient itself
    assert 0.1 < np.sqrt(np.mean(q**2)) < 0.4
    adam = np.abs(np.asarray(updates.model.decoder.embed))
    assert 0.5 < np.median(adam) < 2


def test_rates_are_chosen_by_path():
    params = initialised()
    ones = jax.tree.map(jnp.ones_like, params)
    moved = apply(params, ones, lambda path: 1.0 if "vision" in path else 0.0)
    assert np.all(np.asarray(moved.model.vision.class_embed - params.model.vision.class_embed) > 0.9)
    np.testing.assert_array_equal(moved.model.decoder.embed, params.model.decoder.embed)
    assert WORDS.number.shape == (100,)
