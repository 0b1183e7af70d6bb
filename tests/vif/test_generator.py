"""VIF's generator against an independent reference, its size and initialisation, and where gradients go."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from small import parameters

from jaxvqa import sharding
from jaxvqa.errors import JaxVQAError
from jaxvqa.vif import generator
from jaxvqa.vif.generator import GeneratorConfig, initialise
from tests.vif import reference

GRID, Q = (2, 3), 5
P = GRID[0] * GRID[1]
TINY = dict(latent_width=8, num_heads=2, mlp_width=12, num_layers=2, num_slots=3)
CONFIGS = {
    "default": GeneratorConfig.of(6, **TINY),
    "released": GeneratorConfig.of(6, "released", **TINY),
    "separate": GeneratorConfig.of(6, **TINY | {"num_layers": 1, "share_slots": False}),
}
TOLERANCE = 2e-5
"""f32 through two layers, against float64; maps are at most 1."""
seeds = st.integers(0, 2**31 - 1)


@functools.cache
def weights(name):
    return parameters(generator.specs(CONFIGS[name]))


def batch(rng, lengths=(5, 3)):
    """Image and text states of two samples, and which text is no padding; what lies in the padding is wild."""
    vision, text = (rng.standard_normal((2, size, 6)).astype(np.float32) for size in (P, Q))
    mask = np.arange(Q) < np.array(lengths)[:, None]
    text[~mask] = 1e3 * rng.standard_normal((int((~mask).sum()), 6))
    return jnp.asarray(vision), jnp.asarray(text), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames=("c", "which"))
def gaussian(params, c, vision, text, mask, which="prior"):
    return getattr(generator, which)(params, c, vision, text, mask)


def drawn(renderer, c, z, grid=GRID):
    """Maps [B, h, w]."""
    maps = generator.render(renderer, c, z, jnp.broadcast_to(jnp.array(grid), (len(z), 2)), grid[0] * grid[1])
    return maps.reshape(len(z), *grid)


@functools.partial(jax.jit, static_argnames=("c",))
def importance(params, c, vision, text, mask, keys=None):
    z = generator.latent(*generator.prior(params, c, vision, text, mask), keys)
    return drawn(params.renderer, c, z)


@pytest.mark.parametrize("which", ["prior", "posterior"])
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4)
@given(seed=seeds)
def test_a_branch_is_that_of_the_reference(name, which, seed):
    c, params = CONFIGS[name], weights(name)
    vision, text, mask = batch(np.random.default_rng(seed))
    ours = gaussian(params, c, vision, text, mask, which)
    p = reference.plain(params)
    w, own = getattr(p, which), p.posterior.slots if which == "posterior" else None
    for i in range(2):
        size = mask[i].sum()
        theirs = reference.branch(w, own or p.prior.slots, c, vision[i], text[i, :size], Q - size)
        for got, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got[i], expected, atol=1e-4)  # of values up to 5


@pytest.mark.parametrize("name", ["default", "released"])
@settings(max_examples=4)
@given(seed=seeds)
def test_a_map_is_that_of_the_reference(name, seed):
    c, params = CONFIGS[name], weights(name)
    vision, text, mask = batch(np.random.default_rng(seed))
    ours = np.asarray(importance(params, c, vision, text, mask))
    for i in range(2):
        size = mask[i].sum()
        theirs = reference.generated(params, c, vision[i], text[i, :size], GRID, Q - size)
        np.testing.assert_allclose(ours[i], theirs, atol=TOLERANCE)
    np.testing.assert_allclose(ours.sum((1, 2)), 1, atol=1e-6)


@given(seed=seeds)
def test_a_row_depends_neither_on_its_padding_nor_on_its_companions(seed):
    c, params = CONFIGS["default"], weights("default")
    vision, text, mask = batch(np.random.default_rng(seed))
    both = np.asarray(importance(params, c, vision, text, mask))
    for i in range(2):
        size = mask[i].sum()
        alone = importance(params, c, vision[i : i + 1], text[i : i + 1, :size], mask[i : i + 1, :size])
        np.testing.assert_allclose(alone[0], both[i], atol=1e-6)


def test_without_the_text_mask_the_padding_takes_part_as_in_the_release():
    vision, text, mask = batch(np.random.default_rng(0))
    both = importance(weights("released"), CONFIGS["released"], vision, text, mask)
    alone = importance(weights("released"), CONFIGS["released"], vision[1:], text[1:, :3], mask[1:, :3])
    assert np.abs(alone[0] - both[1]).max() > 1e-3


def test_compiled_and_not_compiled_agree():
    given_ = weights("default"), CONFIGS["default"], *batch(np.random.default_rng(1))
    np.testing.assert_allclose(importance.__wrapped__(*given_), importance(*given_), atol=1e-6)


@pytest.mark.parametrize("name", ["default", "released"])
def test_half_precision_stays_near(name):
    """bf16 keeps 8 bits: the map is within 3 % of its own largest value."""
    c, params = CONFIGS[name], initialise(CONFIGS[name], jax.random.key(0))
    vision, text, mask = batch(np.random.default_rng(2))
    exact = np.asarray(importance(params, c, vision, text, mask))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ours = importance(rounded, c, jnp.asarray(vision, jnp.bfloat16), jnp.asarray(text, jnp.bfloat16), mask)
    assert ours.dtype == jnp.float32
    assert np.abs(ours - exact).max() < 0.03 * exact.max()


# ---- the latent ----


def test_a_sampled_latent_is_the_mean_and_scaled_noise_of_the_rows_own_key():
    rng = np.random.default_rng(0)
    mean, logvar = (jnp.asarray(rng.standard_normal((3, 4, 8)), jnp.float32) for _ in range(2))
    keys = jax.random.split(jax.random.key(1), 3)
    z = generator.latent(mean, logvar, keys)
    for i in range(3):
        noise = jax.random.normal(keys[i], (4, 8))
        np.testing.assert_allclose(z[i], mean[i] + np.exp(logvar[i] / 2) * noise, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(generator.latent(mean[i : i + 1], logvar[i : i + 1], keys[i : i + 1])[0], z[i])
    np.testing.assert_array_equal(generator.latent(mean, logvar), mean)


def test_log_variances_are_clamped():
    params = weights("default")
    wide = replace(params.prior.logvar, bias=jnp.full(8, 100.0).at[:4].set(-100.0))
    params = replace(params, prior=replace(params.prior, logvar=wide))
    _, logvar = gaussian(params, CONFIGS["default"], *batch(np.random.default_rng(0)))
    np.testing.assert_array_equal(logvar, np.broadcast_to(np.repeat([-5.0, 5.0], 4), logvar.shape))


# ---- size and initialisation ----


@pytest.mark.parametrize("D", [8, 4096])
def test_the_parameters_are_counted_by_the_papers_formula(D):
    """Per layer 4 attentions of 4D² + 4D, 2 MLPs of 8D² + 5D, 6 norms of 2D."""
    layer = 4 * (4 * D**2 + 4 * D) + 2 * (8 * D**2 + 5 * D) + 6 * 2 * D
    encoder = 3 * layer + 2 * (D**2 + D) + 2 * 2 * D
    slots, heads, renderer = 16 * D + 4 * D**2 + 4 * D, 2 * (D**2 + D), (2 + 1 + 1) * (D + 1)
    c = GeneratorConfig.of(D)
    assert sharding.count(generator.specs(c).prior.encoder.layers) == 3 * layer
    assert sharding.count(generator.specs(c).prior.encoder) == encoder
    assert sharding.count(generator.specs(c)) == 2 * encoder + slots + 2 * heads + renderer
    assert sharding.count(generator.specs(c, posterior=False)) == encoder + slots + heads + renderer
    separate = replace(c, share_slots=False)
    assert sharding.count(generator.specs(separate)) == 2 * (encoder + slots + heads) + renderer
    if D == 4096:  # VIF on LLaVA-1.5-7B
        assert (round(layer / 1e6, 1), round(encoder / 1e9, 3)) == (537.0, 1.645)
        assert round(sharding.count(generator.specs(c)) / 1e9, 3) == 3.424
        assert round(sharding.count(generator.specs(c, posterior=False)) / 1e9, 3) == 1.745


def test_the_paper_s_generator_splits_over_a_mesh():
    mesh = AbstractMesh((2, 4, 4), ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3)
    placed = sharding.shardings(generator.specs(GeneratorConfig.of(4096)), mesh)
    assert placed.prior.encoder.layers.vision.self_attn.q.kernel.spec == PartitionSpec(None, "fsdp", "tensor", None)


@pytest.mark.parametrize(("init", "spread"), [("intended", 0.161928), ("released", 0.728147)])
def test_the_renderer_begins_with_the_spreads_of_its_initialisation(init, spread):
    c = GeneratorConfig.of(6, **TINY, init=init)
    params = initialise(c, jax.random.key(0))
    centres, spreads, weights = generator.components(params.renderer, c, jnp.zeros((1, 3, 8)))
    np.testing.assert_allclose(spreads, spread, atol=1e-6)
    np.testing.assert_allclose(weights, 1 / 3, atol=1e-6)
    middle = np.abs(np.asarray(centres) - 0.5)
    assert (middle == 0).all() if init == "released" else (middle > 0).all() and (middle < 0.2311).all()  # σ(±1)
    (std,) = {round(float(x.kernel.std()), 2) for x in (params.prior.encoder.vision_in, params.prior.mean)}
    assert std == 0.02 and 0.5 < float(params.prior.slots.queries.std()) < 1.5


def test_the_released_initialisation_gives_a_flat_map():
    c = GeneratorConfig.of(6, "released", **TINY)
    ours = drawn(initialise(c, jax.random.key(0)).renderer, c, jnp.zeros((1, 3, 8)), (24, 24))
    assert ours.min() * 576 == pytest.approx(0.796372, abs=1e-5)
    assert ours.max() * 576 == pytest.approx(1.158780, abs=1e-5)


# ---- gradients ----


def parts(tree, c):
    """Parameters by path, those that are stacked by layer."""
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        found |= {f"{name}[{i}]": x[i] for i in range(c.num_layers)} if ".layers." in name else {name: x}
    # A softmax does not change with what is the same for all keys, or all slots: their gradient is rounding.
    return {name: x for name, x in found.items() if ".k.bias" not in name and name != "renderer.weight.bias"}


def unread(name, c):
    """The last layer's text stream ends in nothing but the keys and values of the image's attention to it."""
    last = name.endswith(f"[{c.num_layers - 1}]")
    behind = ("text.norm2", "text.cross_attn", "text.norm3", "text.fc1", "text.fc2")
    return ".text_norm." in name or (last and any(part in name for part in behind))


def assert_reached(loss, params, c, beside):
    """The gradient reaches all parameters but the unread ones and those that begin like one of `beside`."""
    found = {name for name, g in parts(jax.jit(jax.grad(loss))(params), c).items() if np.abs(g).max() > 0}
    assert found == {name for name in parts(params, c) if not unread(name, c) and not name.startswith(beside)}


@pytest.mark.parametrize("name", ["default", "released", "separate"])
def test_the_gradient_of_the_posteriors_map_reaches_all_but_the_last_text_stream(name):
    c, params = CONFIGS[name], weights(name)
    states, keys = batch(np.random.default_rng(0)), jax.random.split(jax.random.key(0), 2)
    weigh = np.random.default_rng(1).standard_normal((2, *GRID))

    def loss(params):
        z = generator.latent(*generator.posterior(params, c, *states), keys)
        return (weigh * drawn(params.renderer, c, z)).sum()

    prior = ("prior.",) if not c.share_slots else ("prior.encoder", "prior.mean", "prior.logvar")
    assert_reached(loss, params, c, beside=prior)


def test_the_prior_is_reached_through_its_distance_to_the_posterior():
    c, params = CONFIGS["default"], weights("default")
    states = batch(np.random.default_rng(0))

    def distance(params):
        (m, lv), (mean, logvar) = generator.posterior(params, c, *states), generator.prior(params, c, *states)
        return (logvar - lv + (jnp.exp(lv) + (m - mean) ** 2) / jnp.exp(logvar) - 1).sum() / 2

    assert_reached(distance, params, c, beside=("renderer",))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "latent_width 6 does not split over 4 heads"),
        ({"map_norm": "max", "num_heads": 2}, "map_norm='max'; expected one of sum, softmax"),
        ({"init": "zero", "num_heads": 2}, "init='zero'; expected one of intended, released"),
        ({"num_slots": 0, "num_heads": 2}, "0 slots; expected at least 1"),
    ],
)
def test_sizes_and_options_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(JaxVQAError, match=message):
        GeneratorConfig.of(6, **changes)


def test_an_unknown_preset_and_a_missing_posterior_are_refused():
    with pytest.raises(JaxVQAError, match="preset 'paper'; expected one of default, released"):
        GeneratorConfig.of(6, "paper")
    with pytest.raises(JaxVQAError, match="loaded without its posterior"):
        generator.posterior(
            replace(weights("default"), posterior=None), CONFIGS["default"], *batch(np.random.default_rng(0))
        )
