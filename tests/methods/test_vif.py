"""VIF answers in one pass, with a map that its generator makes of the question's own states."""

import functools
import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from small import parameters
from tiny import tiny_llava

import jaxvqa
from jaxvqa import methods, vif
from jaxvqa.engine import Engine
from jaxvqa.errors import UserError
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vif import Vif
from jaxvqa.prompts import render
from jaxvqa.requests import Reply, Sample
from jaxvqa.taps import ReadSpec
from jaxvqa.vif.generator import GeneratorConfig, specs
from tests.methods.driven import FACTS, drive, picture, sample_of
from tests.vif import reference

PAIRS = ((0, 2), (1, 3))
NEW = 5
OURS = FACTS._replace(fingerprint="f" * 64)
CONFIG = GeneratorConfig.of(32, latent_width=8, num_heads=2, mlp_width=8, num_layers=1, num_slots=2)


@functools.cache
def trained(backbone=OURS.fingerprint, num_layers=32):
    pairs = PAIRS if num_layers == 4 else vif.layer_pairs(num_layers)
    return vif.Trained(CONFIG, parameters(specs(CONFIG)), backbone, "llava", pairs, 0.4)


def bound(facts=OURS, **options):
    return methods.bind(Vif(**{"generator": trained()} | options), facts)


# ---- by hand ----


def test_it_asks_once_and_gives_the_map_in_image_coordinates():
    """480 x 240 in a square of 24 x 24 cells: the image lies in rows 6 to 17."""
    maps = np.zeros((1, 24, 24), np.float32)
    maps[0, 6:18, 12:] = 1 / 144
    method = bound()
    (asked,), answer = drive(method, sample_of(picture((480, 240))), Reply("42", (), value=maps))
    assert asked.plugin is method.plugin and asked.args == () and asked.taps is None
    assert asked.prompt.text.startswith("A chat between a curious user") and "<image>" in asked.prompt.text
    assert answer.text == "42"
    np.testing.assert_array_equal(answer.grid, maps[0])
    assert answer.heatmap.shape == (240, 480)
    left, right = answer.heatmap[:, :200], answer.heatmap[:, 280:]
    assert left.max() == 0 and right.min() == right.max() > 0


def test_a_question_without_an_image_has_no_map():
    _, answer = drive(bound(), Sample((), "What?"), Reply("42", (), value=np.zeros((0, 24, 24))))
    assert answer.text == "42" and answer.grid is None and answer.heatmap is None


def test_what_is_left_open_is_what_the_generator_was_trained_with():
    method = bound()
    assert (method.alpha, method.extract, method.inject) == (0.4, (11, 13, 15, 17), (25, 27, 29, 31))
    assert (method.map_norm, method.text_self_mask, method.sample, method.inject_decode) == ("sum", True, False, True)
    injection = method.plugin.params
    assert injection.config == CONFIG and injection.decode and injection.alpha == jnp.float32(0.4)
    assert injection.pairs == vif.layer_pairs(32) and method.plugin.cuts == (12, 14, 16, 18)


def test_the_released_preset_is_the_code_as_published_and_yields_to_what_is_given():
    method = bound(preset="released", inject_decode=True, alpha=0.2, extract=(9,), inject=(30,))
    assert (method.map_norm, method.text_self_mask, method.sample, method.inject_decode) == (
        "softmax",
        False,
        True,
        True,
    )
    assert method.plugin.params.config == replace(CONFIG, map_norm="softmax", text_self_mask=False)
    assert method.plugin.params.pairs == ((9, 30),) and method.alpha == 0.2


def test_a_sampled_map_depends_on_the_samples_id_and_the_seed():
    def seed_of(id="7", **options):
        asked = next(bound(sample=True, **options)(sample_of(id=id)))
        (seed,) = asked.args
        assert seed.dtype == np.int32
        return int(seed)

    assert seed_of() == seed_of() and len({seed_of(), seed_of("8"), seed_of(seed=1)}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": None}, r"vif needs a generator trained for llava-1.5-7b, .* give its folder"),
        ({"generator": "nowhere"}, "nowhere: no VIF generator"),
        ({"inject": (25, 27, 29, 32)}, "llava-1.5-7b has layers 0 to 31"),
        ({"inject": (25, 27)}, "as many of one as of the other"),
        ({"alpha": 1.5}, "alpha=1.5; expected 0 to 1"),
        ({"map_norm": "max"}, "map_norm='max'; expected one of sum, softmax"),
        ({"preset": "paper"}, "preset='paper'; expected one of default, released"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        bound(**options)


def test_a_generator_of_another_model_is_refused():
    message = r"trained for another model \(llava, configuration 000000000000\), not for llava-1.5-7b \(ffffffffffff\)"
    with pytest.raises(UserError, match=message):
        bound(generator=trained("0" * 64))


def test_a_generator_is_loaded_from_its_folder_and_recorded_without_its_arrays(tmp_path):
    method = bound(generator=str(vif.save(trained(), tmp_path / "generator")))
    assert method.generator.config == CONFIG and method.generator.params.posterior is None
    assert len(repr(methods.method_options(method)["generator"])) < 600


# ---- on a model ----

PICTURES = [picture((60, 40), n) for n in range(3)]
SAMPLES = [
    sample_of(PICTURES[0], "What is red?", "0"),
    sample_of(PICTURES[1], "Where does the small blue sign stand?", "1"),
]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("tiny") / "tiny", text_layers=4, vision_layers=2, feature_layer=-1)
    return jaxvqa.load(folder, dtype="float32")


def answers(vlm, samples, batch_size=2, **options):
    own = trained(vlm.facts.fingerprint, 4)
    method = Vif(**{"generator": own, "like": Vanilla("vicuna_v1", max_new_tokens=NEW)} | options)
    given = list(Engine(vlm, batch_size=batch_size, lengths=(192, 256)).run(samples, method))
    assert all(answer.error is None for answer in given), given[0].error
    return given


def maps_of(vlm, sample, image=0):
    """The mean of the maps of both pairs, by the reference, from states that the plain model gives."""
    prompt = render("vicuna_v1", sample.question, num_images=len(sample.images), ending="short")
    encoded = vlm.encode(list(sample.images), prompt)
    hidden = vlm.prefill(encoded, spec=ReadSpec((0, 1), frozenset({"hidden"}))).readouts.hidden[:, 0]
    text = np.ones(hidden.shape[1], bool)
    for start, count in encoded.tokens.image_spans:
        text[start : start + count] = False
    start, count = encoded.tokens.image_spans[image]
    h = np.asarray(hidden)
    own = trained(vlm.facts.fingerprint, 4).params
    return np.mean([reference.generated(own, CONFIG, x[start : start + count], x[text], (4, 4)) for x in h], axis=0)


@pytest.mark.slow
def test_alpha_zero_is_the_plain_model_in_one_pass_and_alpha_one_is_not(vlm):
    vanilla = Vanilla("vicuna_v1", max_new_tokens=NEW)
    plain = [a.text for a in Engine(vlm, batch_size=2, lengths=(192, 256)).run(SAMPLES, vanilla)]
    off, on = answers(vlm, SAMPLES, alpha=0.0), answers(vlm, SAMPLES, alpha=1.0)
    assert [a.text for a in off] == plain != [a.text for a in on]
    assert on[0].forward_passes == (0, 1) and on[0].cost.images == 1 and json.dumps(on[0].record())


@pytest.mark.slow
def test_the_map_is_the_references_and_a_row_does_not_depend_on_its_companions(vlm):
    both = answers(vlm, SAMPLES)
    for sample, answer in zip(SAMPLES, both, strict=True):
        np.testing.assert_allclose(answer.grid, maps_of(vlm, sample), atol=1e-5)
        assert answer.heatmap.shape == (40, 60)
    alone = [a for sample in SAMPLES for a in answers(vlm, [sample], batch_size=1)]
    assert [a.text for a in alone] == [a.text for a in both]
    for one, two in zip(alone, both, strict=True):
        np.testing.assert_allclose(one.grid, two.grid, atol=1e-6)


@pytest.mark.slow
def test_samples_with_two_images_and_with_none_stand_beside_one_with_one(vlm):
    """The map is the first image's; a question without an image gets the plain model's answer."""
    two, none = Sample(PICTURES[:2], "Which is red?", "2"), Sample((), "What is red?", "3")
    mixed = answers(vlm, [SAMPLES[0], two, none, SAMPLES[1]])
    np.testing.assert_allclose(mixed[1].grid, maps_of(vlm, two), atol=1e-5)
    (plain,) = Engine(vlm, batch_size=2, lengths=(192, 256)).run([none], Vanilla("vicuna_v1", max_new_tokens=NEW))
    assert mixed[2].text == plain.text and mixed[2].grid is None
    assert [a.text for a in answers(vlm, SAMPLES)] == [mixed[0].text, mixed[3].text]


@pytest.mark.slow
def test_the_released_code_samples_and_is_reproducible_by_the_samples_id(vlm):
    same = [SAMPLES[0], replace(SAMPLES[0], id="9")]
    one, other = answers(vlm, same, preset="released", map_norm="sum")
    assert np.abs(one.grid - other.grid).max() > 1e-4
    other_again, one_again = answers(vlm, same[::-1], preset="released", map_norm="sum")
    np.testing.assert_array_equal(one_again.grid, one.grid)
    np.testing.assert_array_equal(other_again.grid, other.grid)
