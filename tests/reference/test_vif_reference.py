"""VIF end to end against its reference on transformers: maps made by a generator of random weights, and answers."""

import numpy as np
import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
from agreement import Agreement, answers, both, tiny_samples
from tiny import tiny_llava
from vif_reference import generate_map, vif

import jaxvqa.vif
from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.specks.strata import samples
from jaxvqa.vif import GeneratorConfig, Trained, generator

pytestmark = pytest.mark.parity


def random_generator(config, seed=0):
    """Weights that keep activations near unit size, so that every part of the generator shows in the map."""
    rng, shapes = np.random.default_rng(seed), jaxvqa.vif.initialise(config, jax.random.key(0))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = rng.standard_normal(leaf.shape)
        if "norm" in name:
            return np.float32(("scale" in name) + 0.1 * noise)
        if "queries" in name:
            return np.float32(noise)
        if "bias" in name:
            return np.float32(0.1 * noise - (1.5 if ".spread" in name else 0))
        return np.float32(noise / np.sqrt(config.latent_width) * (3 if ".weight" in name or ".centre" in name else 1))

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))


def weights_of(params, layers):
    """The same weights in the reference's words: matrices [out, in]."""

    def linear(p, inputs=1):
        width = int(np.prod(p.kernel.shape[:inputs]))
        return dict(weight=np.float64(p.kernel).reshape(width, -1).T, bias=np.float64(p.bias).ravel())

    def norm(p):
        return dict(weight=np.float64(p.scale), bias=np.float64(p.bias))

    def attend(p):
        return dict(q=linear(p.q), k=linear(p.k), v=linear(p.v), o=linear(p.o, inputs=2))

    def layer(p):
        out = {}
        for stream, side in (("v", p.vision), ("t", p.text)):
            out |= {f"norm{i}_{stream}": norm(getattr(side, f"norm{i}")) for i in (1, 2, 3)}
            out |= {f"self_{stream}": attend(side.self_attn), f"cross_{stream}": attend(side.cross_attn)}
            out |= {f"up_{stream}": linear(side.fc1), f"down_{stream}": linear(side.fc2)}
        return out

    e, r = params.prior.encoder, params.renderer
    return dict(
        prior=dict(
            vision_in=linear(e.vision_in),
            text_in=linear(e.text_in),
            layers=[layer(jax.tree.map(lambda x, i=i: x[i], e.layers)) for i in range(layers)],
            norm_v=norm(e.vision_norm),
        ),
        queries=np.float64(params.prior.slots.queries),
        compress=attend(params.prior.slots.attn),
        prior_mu=linear(params.prior.mean),
        prior_logvar=linear(params.prior.logvar),
        position=linear(r.centre),
        sigma=linear(r.spread),
        mixture=linear(r.weight),
    )


def compare(measured, name, folder, asked, pairs, *, alpha=0.5, norm="sum", inject_decode=True, limit=10):
    llava, vlm = both(folder)
    width = llava.model.config.text_config.hidden_size
    config = GeneratorConfig.of(width, latent_width=16, num_layers=2, num_slots=5)
    params = random_generator(config)
    trained = Trained(config, params, vlm.facts.fingerprint, vlm.name, pairs, alpha)
    weights, like = weights_of(params, 2), Vanilla("vicuna_v1", "short", limit)

    def maker(vision, text):
        return generate_map(weights, vision, text, llava.grid, norm=norm)

    options = dict(generator=trained, map_norm=norm, inject_decode=inject_decode, like=like)
    with Agreement(measured, f"VIF, {name}") as agree:
        for image, question, ours in answers(asked, vlm, "vif", **options):
            llava.margin, agree.samples = float("inf"), agree.samples + 1
            maps, text = vif(
                llava, image, question, maker, pairs=pairs, alpha=alpha, inject_decode=inject_decode, limit=limit
            )
            assert ours.forward_passes == (0, 1)
            agree.maps(np.mean([*maps.values()], axis=0).reshape(llava.grid), ours.grid)
            agree.same(text, ours.text, llava.margin)


@pytest.mark.parametrize("norm, latent", [("sum", 16), ("softmax", 24)])
def test_generator_alone(norm, latent):
    config = GeneratorConfig.of(12, latent_width=latent, num_layers=2, num_slots=5, map_norm=norm)
    params, rng = random_generator(config, seed=1), np.random.default_rng(1)
    vision, text = (jnp.asarray(rng.standard_normal((2, n, 12)), jnp.float32) for n in (12, 7))
    mask = jnp.arange(7) < jnp.array([[7], [4]])

    @jax.jit
    def heat(params):
        mean, _ = generator.prior(params, config, vision, text, mask)
        return generator.render(params.renderer, config, mean, jnp.array([[3, 4]] * len(mean)), 12).reshape(-1, 3, 4)

    ours = np.asarray(heat(params))
    for row, length in enumerate((7, 4)):
        theirs = generate_map(
            weights_of(params, 2), *map(np.float64, (vision[row], text[row, :length])), (3, 4), norm=norm
        )
        np.testing.assert_allclose(ours[row].ravel(), theirs, atol=1e-5 * np.ptp(theirs))


@pytest.fixture(scope="module")
def deeper_folder(tmp_path_factory):
    """A random LLaVA of six layers."""
    return tiny_llava(tmp_path_factory.mktemp("reference") / "deeper", text_layers=6)


@pytest.mark.parametrize(
    "pairs, options",
    [
        (((1, 3), (2, 5)), dict()),
        (((0, 4),), dict(alpha=0.9, norm="softmax")),
        (((1, 2), (3, 4)), dict(alpha=0.9, inject_decode=False)),
    ],
)
def test_random_model(deeper_folder, measured, pairs, options):
    compare(measured, f"random model, {pairs}", deeper_folder, tiny_samples(), pairs, **options)


@pytest.mark.slow
def test_bundled_model(measured):
    pairs = ((2, 4), (3, 5))
    compare(measured, "bundled model", SPECKS_LLAVA, samples("crowded", "dev", 8), pairs, alpha=0.5)
