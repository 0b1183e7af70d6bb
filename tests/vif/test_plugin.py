"""VIF in a decoder, in prefill and in decoding, against the dense float64 reference with rewritten probabilities."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, cells_from, dense, parameters

from jaxvqa import decoder, vif
from jaxvqa.decoder import right_padded
from jaxvqa.errors import JaxVQAError
from jaxvqa.requests import Row
from jaxvqa.vif import generator
from jaxvqa.vif.generator import GeneratorConfig
from jaxvqa.vif.plugin import Flow, begin, end, layer_pairs, make_maps
from tests.vif import reference

B, T, GRID = 2, 16, (2, 2)
P = GRID[0] * GRID[1]
LENGTHS = np.array([16, 13], np.int32)
VALID = np.arange(T) < LENGTHS[:, None]
STARTS = {1: [[2], [5]], 2: [[2, 8], [1, 5]], 0: [[], []]}
"""Of images, by how many there are: text before, between (but in the second row) and behind them."""
PAIRS = ((0, 2), (1, 3))
C = GeneratorConfig.of(CONFIG.width, latent_width=8, num_heads=2, mlp_width=12, num_layers=2, num_slots=3)
TOLERANCE = 1e-4
"""f32 through four blocks with states of size 10, against float64."""


@pytest.fixture(scope="module")
def params():
    return parameters()


@pytest.fixture(scope="module")
def trained():
    return parameters(generator.specs(C), seed=1)


def states(seed=0, length=T):
    return np.random.default_rng(seed).standard_normal((B, length, CONFIG.width)).astype(np.float32)


def carry(images, *seeds, lengths=LENGTHS, starts=None, keys=T):
    starts = np.array(STARTS[images] if starts is None else starts, np.int32).reshape(len(lengths), images)
    last = jnp.zeros((len(lengths), 1), jnp.int32)
    shapes = jnp.broadcast_to(jnp.array(GRID), (*starts.shape, 2))
    row = Row(cells_from(starts, GRID), jnp.asarray(lengths), last, last == 0, None, None, GRID, keys, shapes=shapes)
    return jax.vmap(begin)(row, *seeds)


@functools.partial(jax.jit, static_argnames=("capacity", "remat"))
def run(params, x, lengths, plugins, capacity=None, remat=False):
    stream = right_padded(x, lengths)
    return decoder.run(params, CONFIG, stream, plugins=plugins, capacity=capacity, remat=remat, backend="xla")


@jax.jit
def extend(params, x, cache, plugins):
    stream = right_padded(x, jnp.full(len(x), x.shape[1], jnp.int32), cache.length)
    return decoder.run(params, CONFIG, stream, cache=cache, plugins=plugins, backend="xla")


def expected(params, trained, x, starts, prompt, *, c=C, alpha=0.5, decode=True):
    """Hidden states [T, D] of one sample without padding, of which `prompt` tokens are the prompt; maps by pair."""
    length = x.shape[1]
    text = np.ones(length, bool)
    for start in starts:
        text[start : start + P] = False
    question = text & (np.arange(length) < prompt)
    before = dense(params, x, [length])
    maps = {}
    for middle, deep in PAIRS:
        h = before.hidden[middle][0]
        maps[deep] = [reference.generated(trained, c, h[start : start + P], h[question], GRID) for start in starts]

    def change(layer, probs):
        if layer not in maps:
            return probs
        rows = text if decode else question
        return reference.injected(probs[0], maps[layer], starts, rows, alpha)[None]

    return dense(params, x, [length], change=change).hidden[-1][0], maps


@pytest.mark.parametrize("images", [1, 2])
def test_maps_of_middle_layers_are_mixed_into_deep_layers(params, trained, images):
    x = states()
    plugin = replace(vif.plugin(trained, C, PAIRS, alpha=0.6), carry=carry(images))
    hidden, _, _, (after,) = run(params, x, LENGTHS, (plugin,))
    for b, length in enumerate(LENGTHS):
        theirs, maps = expected(params, trained, x[b : b + 1, :length], STARTS[images][b], length, alpha=0.6)
        np.testing.assert_allclose(hidden[b, :length], theirs, atol=TOLERANCE)
        for ours, deep in zip(after.carry.maps, (2, 3), strict=True):
            np.testing.assert_allclose(ours[b], np.reshape(maps[deep], (images, P)), atol=1e-5)
        mean = np.mean([maps[2], maps[3]], axis=0)
        given = jax.vmap(end)(after.carry)[b]
        np.testing.assert_allclose(given, mean, atol=1e-5)
    off = run(params, x, LENGTHS, ())[0]
    assert np.abs(hidden - off)[VALID].max() > 0.1


@pytest.mark.parametrize("decode", [True, False], ids=["injected", "released"])
def test_generated_tokens_are_injected_with_the_prompts_maps_or_not_at_all(params, trained, decode):
    x, new = states(), states(1, 2)
    plugin = replace(vif.plugin(trained, C, PAIRS, decode=decode), carry=carry(2))
    _, cache, _, after = run(params, x, LENGTHS, (plugin,), capacity=T + 2)
    got = []
    for t in range(2):
        hidden, cache, _, after = extend(params, new[:, t : t + 1], cache, after)
        got.append(hidden[:, 0])
    assert cache.k.shape[0] == CONFIG.num_layers and int(cache.filled) == T + 2
    np.testing.assert_array_equal(cache.length, LENGTHS + 2)
    np.testing.assert_array_equal((cache.order < 2**30).sum(1), LENGTHS + 2)
    for b, length in enumerate(LENGTHS):
        own = np.concatenate([x[b, :length], new[b]])[None]
        theirs, _ = expected(params, trained, own, STARTS[2][b], length, decode=decode)
        for t in range(2):
            np.testing.assert_allclose(got[t][b], theirs[length + t], atol=TOLERANCE)


def test_alpha_zero_and_a_prompt_without_an_image_are_the_plain_model(params, trained):
    x = states()
    plain = run(params, x, LENGTHS, ())[0]
    for images, alpha in ((2, 0.0), (0, 0.5)):
        plugin = replace(vif.plugin(trained, C, PAIRS, alpha=alpha), carry=carry(images))
        hidden, cache, _, after = run(params, x, LENGTHS, (plugin,), capacity=T + 1)
        np.testing.assert_allclose(hidden, plain, atol=0 if not images else 1e-5)
        assert after[0].carry.cells.shape == (B, images, P)
        assert jax.vmap(end)(after[0].carry).shape == (B, images, *GRID)
        extend(params, states(1, 1), cache, after)


def test_a_batch_may_mix_samples_with_an_image_and_without(params, trained):
    """As in training: the row without is that of the plain model, the other that of itself alone."""
    x, cells = states(), np.full((B, 1, P), -1, np.int32)
    cells[0, 0] = 2 + np.arange(P)
    rows = VALID.copy()
    rows[0, cells[0, 0]] = False
    text = np.full((B, T), -1, np.int32)
    for b in range(B):
        text[b, : rows[b].sum()] = np.flatnonzero(rows[b])
    shapes = jnp.broadcast_to(jnp.array(GRID), (*cells.shape[:2], 2))
    flow = Flow(jnp.asarray(cells), shapes, jnp.asarray(text), jnp.asarray(rows), None, GRID)
    plugin = vif.plugin(trained, C, PAIRS)
    mixed = run(params, x, LENGTHS, (replace(plugin, carry=flow),))[0]
    whole = run(params, x, LENGTHS, (replace(plugin, carry=carry(1)),))[0]
    plain = run(params, x, LENGTHS, ())[0]
    np.testing.assert_allclose(mixed[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1, : LENGTHS[1]], plain[1, : LENGTHS[1]], atol=1e-5)


def test_a_batch_of_two_is_two_batches_of_one_whatever_the_padding(params, trained):
    x, plugin = states(), vif.plugin(trained, C, PAIRS)
    both, _, _, (after,) = run(params, x, LENGTHS, (replace(plugin, carry=carry(2)),))
    for b, length in enumerate(LENGTHS):
        own = carry(2, lengths=LENGTHS[b : b + 1], starts=STARTS[2][b], keys=int(length))
        alone, _, _, (single,) = run(params, x[b : b + 1, :length], LENGTHS[b : b + 1], (replace(plugin, carry=own),))
        np.testing.assert_allclose(alone[0], both[b, :length], atol=1e-5)
        for one, two in zip(single.carry.maps, after.carry.maps, strict=True):
            np.testing.assert_allclose(one[0], two[b], atol=1e-6)


def test_compiled_and_not_compiled_agree(params, trained):
    plugin = replace(vif.plugin(trained, C, PAIRS), carry=carry(1))
    given = params, jnp.asarray(states()), jnp.asarray(LENGTHS), (plugin,)
    np.testing.assert_allclose(run.__wrapped__(*given)[0], run(*given)[0], atol=1e-5)


# ---- sampling ----


def test_sampled_maps_are_the_seeds_own_and_differ_by_pair_image_and_row(trained):
    """The same states everywhere, so that maps can differ by their keys only."""
    hidden = jnp.ones((B, T, CONFIG.width))
    injection = vif.plugin(trained, C, PAIRS).params
    maps = jax.jit(lambda flow: jnp.stack([make_maps(injection, hidden, flow, n) for n in range(4)]))
    same = [[2, 8], [2, 8]]

    def drawn(*seeds):
        return np.asarray(maps(carry(2, *seeds, lengths=np.array([T, T], np.int32), starts=same)))

    mean, one = drawn(), drawn(jnp.array([7, 8], jnp.int32))
    assert np.ptp(mean.reshape(16, P), axis=0).max() < 1e-6
    assert len(np.unique(one.reshape(16, P).round(5), axis=0)) == 16  # 4 pairs, 2 rows, 2 images
    np.testing.assert_array_equal(drawn(jnp.array([7, 8], jnp.int32)), one)
    np.testing.assert_allclose(drawn(jnp.array([8, 7], jnp.int32)), one[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(one.sum(-1), 1, atol=1e-6)


# ---- gradients ----


@pytest.mark.slow
def test_gradients_reach_the_generator_from_the_deep_layers_with_and_without_remat(params, trained):
    """Under the release's re-entrant checkpointing no parameter of the generator got any."""
    x, plugin = states(), vif.plugin(trained, C, PAIRS)

    @functools.partial(jax.jit, static_argnames="remat")
    @jax.grad
    def gradient(weights, remat):
        changed = replace(plugin, params=replace(plugin.params, generator=weights), carry=carry(1))
        return jnp.where(VALID[:, :, None], run(params, x, LENGTHS, (changed,), remat=remat)[0], 0).sum()

    plain, again = gradient(trained, remat=False), gradient(trained, remat=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, again)
    prior = [plain.prior.encoder.layers.vision, plain.prior.mean.kernel, plain.prior.slots.queries]
    for leaf in jax.tree.leaves((prior, plain.renderer.centre, plain.renderer.spread)):
        assert np.isfinite(leaf).all()
    assert all(
        np.abs(x.kernel).max() > 1e-5 for x in (plain.renderer.centre, plain.prior.mean, plain.prior.encoder.text_in)
    )


# ---- layers ----


def test_the_papers_pairs_and_those_of_other_depths():
    assert layer_pairs(32) == ((11, 25), (13, 27), (15, 29), (17, 31))
    assert layer_pairs(40) == ((14, 31), (16, 34), (19, 36), (21, 39))
    assert layer_pairs(6) == ((2, 4), (3, 5))
    for depth in range(2, 65):
        pairs = layer_pairs(depth)
        assert all(0 <= middle < deep < depth for middle, deep in pairs) and pairs[-1][1] == depth - 1
        assert len({deep for _, deep in pairs}) == len(pairs) == (4 if depth >= 16 else len(pairs))


def test_two_pairs_may_read_the_same_layer(params, trained):
    plugin = replace(vif.plugin(trained, C, ((1, 3), (1, 2))), carry=carry(1))
    assert plugin.cuts == (2,)
    _, _, _, (after,) = run(params, states(), LENGTHS, (plugin,))
    np.testing.assert_array_equal(*after.carry.maps)


@pytest.mark.parametrize("pairs", [(), ((2, 2),), ((0, 3), (1, 3)), ((-1, 3),)])
def test_layers_that_cannot_be_paired_are_refused(trained, pairs):
    with pytest.raises(JaxVQAError, match="middle < deep"):
        vif.plugin(trained, C, pairs)


def test_a_generator_for_another_width_is_refused(params):
    other = replace(C, width=8)
    plugin = vif.plugin(parameters(generator.specs(other)), other, PAIRS)
    with pytest.raises(JaxVQAError, match="states of width 8, the model's have 16"):
        run(params, states(), LENGTHS, (replace(plugin, carry=carry(1)),))
