"""Methods on a model that sees an image through queries: what they ask of it, and the maps that they make of it.

The reference is the model itself, put to work without an engine (HF has judged it: `parity/test_instructblip_parity`),
and a few matrix products in NumPy.
"""

import functools
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import collected
from tiny_instructblip import tiny_instructblip

import jaxvqa
from jaxvqa import methods
from jaxvqa.convert.files import copy_processor
from jaxvqa.engine import Engine
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.handlers import HANDLERS, Kept, State, cross_layers
from jaxvqa.methods import Facts
from jaxvqa.methods.cof import Cof, reweight
from jaxvqa.methods.hiperson import OBSERVE, RELATE, HiPerson
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import Vicrop
from jaxvqa.models import instructblip
from jaxvqa.prompts import GENERAL_QUESTION, render
from jaxvqa.requests import Continue, Generate, Gradient, Read, Reading, Reply, Row, Sample
from jaxvqa.taps import Edit, Readouts, ReadSpec, Tap, Taps
from jaxvqa.transforms import log_reweight
from jaxvqa.vlm import collate, texts
from tests.methods.driven import drive, picture

QUESTION = "Is the small sign at the left of the tree red or blue now, please?"
"""As many tokens as the general question has, or a bucket's more: all run in the same programs."""
NEW, LENGTH, SIZES = 8, 96, (96, 192)
LAYER, CROSS = 1, 1
"""The 15th of 32 decoder layers at the depth of 2, the third of six cross-attentions at that of 3."""
VANILLA = Vanilla(ending="open", max_new_tokens=NEW)
BLIP = Facts("instructblip-vicuna-7b", 32, 224, (16, 16), "instructblip", "squash", family="instructblip", queries=True)
TOLERANCE = 1e-4
"""Relative, of maps: f32 rounding of attentions and their gradients, in other batches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of 160 tokens, not 40: the general question alone has 51 of this tokenizer's."""
    tiny = dict(qformer_layers=3, every=1, text_layers=2, question_tokens=160, seed=2)
    return tiny_instructblip(tmp_path_factory.mktemp("tiny"), **tiny)


@pytest.fixture(scope="module")
def vlm(folder):
    return jaxvqa.load(folder, dtype="float32")


@pytest.fixture
def engine(vlm):
    return Engine(vlm, batch_size=2, lengths=SIZES)


@pytest.fixture(scope="module")
def samples():
    return [Sample(picture((60 + 8 * n, 40), n), QUESTION, id=str(n)) for n in range(2)]


def answered(engine, samples, method, **options):
    answers = list(engine.run(samples, method, **options))
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    return answers


def asked(question, num_images=1):
    return render("instructblip", question, num_images=num_images, ending="open")


@functools.partial(jax.jit, static_argnums=1)
def looks(params, config, inputs, bias):
    """Of a prompt with one image: logits; attentions [N, rows, keys], of the decoder and of the queries; gradients."""
    d, q, read = config.decoder, config.qformer, frozenset({"rows", "values"})
    images = instructblip.encode_images(params, config, inputs.images[:, 0])

    def top(x):
        out = instructblip.prefill(
            params, config, inputs.ids, inputs.lengths, images, inputs.slots, asked=inputs.asked, bias=bias,
            perturb=x[1], cross=ReadSpec((CROSS,), read, "all"),
            taps=Taps((Edit(Tap(perturb=x[0]), LAYER, LAYER + 1),), jnp.arange(LENGTH)[None]),
            spec=ReadSpec((LAYER,), read, "all"),
        )  # fmt: skip
        return jax.nn.log_softmax(out.logits).max(), out

    own = jnp.zeros((1, 1, LENGTH, d.num_heads, d.head_dim))
    (own, cross), out = jax.grad(top, has_aux=True)(
        (own, jnp.zeros((1, 1, 1, q.num_queries, q.num_heads, q.width // q.num_heads)))
    )
    seen = out.readouts
    own, cross = (
        jnp.einsum("tnh,snh->nts", own[0, 0], seen.values[0, 0]),
        jnp.einsum("tnh,snh->nts", cross[0, 0, 0], seen.cross_values[0, 0, 0]),
    )
    return out.logits[0], seen.rows[0, 0], seen.cross[0, 0, 0], own, cross


def looked(vlm, image, question, bias=None):
    """A prompt's tokens, and its `looks` in NumPy."""
    encoded = vlm.encode([image], asked(question))
    inputs = replace(collate([encoded], length=LENGTH), asked=texts([encoded.asked], 64))
    bias = np.zeros((1, 1, 1, vlm.config.image_states), np.float32) if bias is None else bias
    return encoded.tokens, *(np.asarray(x) for x in looks(vlm.params, vlm.config, inputs, bias))


def over_cells(vlm, tokens, rows, cross):
    """What lies on the queries, a part of [S], carried on to the cells by a matrix [Q, 1 + 9]."""
    at, count = tokens.image_spans[0]
    return (rows[at : at + count] @ cross[:, 1:]).reshape(vlm.config.grid)


# ---- maps ----


def test_rel_att_is_the_ratio_of_attentions_that_went_through_the_queries(vlm, engine, samples):
    def one(image, question):
        tokens, _, rows, cross, _, _ = looked(vlm, image, question)
        return over_cells(vlm, tokens, rows[:, tokens.last].mean(0), cross.mean(0))

    for sample, answer in zip(samples, answered(engine, samples, "vicrop", max_new_tokens=NEW), strict=True):
        (image,) = sample.images
        np.testing.assert_allclose(answer.grid, one(image, QUESTION) / one(image, GENERAL_QUESTION), rtol=TOLERANCE)
        assert answer.options["layer"] == LAYER and answer.options["template"] == "instructblip"
        assert answer.forward_passes == (2, 1) and np.ptp(answer.grid) > 1e-3


def test_grad_att_weights_both_attentions_by_their_gradients(vlm, engine, samples):
    options = dict(maps="grad_att", max_new_tokens=NEW)
    for sample, answer in zip(samples, answered(engine, samples, "vicrop", **options), strict=True):
        tokens, _, rows, cross, own, back = looked(vlm, sample.images[0], QUESTION)
        here = (rows * np.maximum(own, 0)).mean(0)[tokens.last]
        expected = over_cells(vlm, tokens, here, (cross * np.maximum(back, 0)).mean(0))
        np.testing.assert_allclose(answer.grid, expected, rtol=1e-3, atol=TOLERANCE * expected.max())
        assert expected.max() > 0


def test_the_gradient_to_the_pixels_goes_through_the_queries(vlm, engine, samples):
    (image,) = samples[0].images
    inputs = jax.tree.map(jnp.asarray, collate([vlm.encode([image], asked(QUESTION))]))

    def top(pixels):
        images = instructblip.encode_images(vlm.params, vlm.config, pixels)
        out = instructblip.prefill(
            vlm.params, vlm.config, inputs.ids, inputs.lengths, images, inputs.slots, asked=inputs.asked
        )
        return jax.nn.log_softmax(out.logits).max()

    expected = np.asarray(jax.jit(jax.grad(top))(inputs.images[:, 0]))
    (reading,) = collected(engine, samples[:1], lambda s: Gradient(s.images, asked(QUESTION), wrt="pixels"))
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(reading.value, expected, atol=1e-4 * np.abs(expected).max())


def test_hipersons_attention_goes_through_the_queries_too(vlm, engine, samples):
    how = HiPerson(maps="rel", prompt="vicrop", q_ref=GENERAL_QUESTION, max_new_tokens=NEW)

    def one(image, question):
        tokens, _, rows, cross, _, _ = looked(vlm, image, question)
        return over_cells(vlm, tokens, rows[:, tokens.indices("user")].mean((0, 1)), cross.mean(0))

    for sample, answer in zip(samples, answered(engine, samples, how), strict=True):
        (image,) = sample.images
        ratio = one(image, QUESTION) / (one(image, GENERAL_QUESTION) + 1e-8)
        np.testing.assert_allclose(answer.grid, (ratio - ratio.min()) / np.ptp(ratio), atol=1e-3)


# ---- answers ----


def test_vanilla_sees_one_image_and_two_and_a_batch_is_its_rows(vlm, engine, samples):
    pairs = [replace(s, images=(picture((40, 40), 9), *s.images)) for s in samples]
    one, two = (answered(engine, given, VANILLA) for given in (samples, pairs))
    _, logits, *_ = looked(vlm, samples[0].images[0], QUESTION)
    (reply,) = collected(engine, samples[:1], lambda s: Generate(s.images, asked(QUESTION), max_new_tokens=NEW))
    assert reply.ids[0] == logits.argmax() and reply.text == one[0].text
    for sample, answer in zip(pairs, two, strict=True):
        inputs = vlm.encode(list(sample.images), asked(QUESTION, 2))
        assert [answer.text] == vlm.decode(vlm.prefill(inputs, max_new_tokens=NEW), max_new_tokens=NEW)
    c = vlm.config
    heard = len(vlm.encode(list(pairs[0].images), asked(QUESTION, 2)).asked)
    assert instructblip.query_flops(c, heard) < two[0].cost.flops - one[0].cost.flops


def test_no_compilation_in_a_second_pass(vlm, samples):
    others = [
        Sample(picture((90, 50 + n), 20 + n), QUESTION.replace("red", "not red"), id=f"other {n}") for n in (0, 1)
    ]
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def run(given):
        answered(Engine(vlm, batch_size=2, lengths=SIZES), given, "vicrop", max_new_tokens=NEW)

    run(samples)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(others)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_cof_biases_the_cross_attentions_and_nothing_else(vlm, engine, samples):
    sample, box = samples[0], (20.0, 0.0, 40.0, 13.0)
    how = Cof(lam=1e4, alpha=1.0, raster="cover", like=VANILLA, box_source=lambda image, stem: [box])
    (_, second), _ = drive(methods.bind(how, vlm.facts), sample, [box], Reply("", ()))
    mask, _ = second.args
    assert second.taps is reweight and mask.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    (reply,) = collected(engine, [sample], lambda s: second)
    assert answered(engine, [sample], how)[0].text == reply.text

    bias = np.zeros((1, 1, 1, 10), np.float32)
    bias[..., 1:] = np.asarray(log_reweight(mask, 1e4)).ravel()
    plain, biased = (looked(vlm, sample.images[0], QUESTION, b)[1] for b in (None, bias))
    assert np.abs(biased - plain).max() > 1e-2 and reply.ids[0] == biased.argmax()
    out = vlm.prefill(vlm.encode(sample.images, asked(QUESTION)), taps=Taps(cross_bias=bias), max_new_tokens=NEW)
    np.testing.assert_allclose(np.asarray(out.logits[0]), biased, atol=TOLERANCE)
    assert vlm.decode(out, max_new_tokens=NEW) == [reply.text]


def test_a_further_turn_is_the_whole_conversation_anew(engine, samples):
    """What the Q-Former reads is longer then, so that the images' tokens are others."""
    (said,) = collected(engine, samples[:1], lambda s: Generate(s.images, asked("Is it?"), max_new_tokens=2, keep=True))
    whole = asked(["Is it?", "a cat", QUESTION])
    further, plain = (
        collected(engine, samples[:1], make)[0]
        for make in (
            lambda s: Continue(of=said, prompt=whole, max_new_tokens=NEW),
            lambda s: Generate(s.images, whole, max_new_tokens=NEW),
        )
    )
    assert further == plain
    with pytest.raises(UserError, match="the whole conversation"):
        collected(engine, samples[:1], lambda s: Continue(of=said))


def test_a_reading_that_stopped_goes_on(engine, samples):
    spec = ReadSpec((0,), frozenset({"hidden"}), stop=1)
    (reading,) = collected(engine, samples[:1], lambda s: Read(s.images, asked(QUESTION), spec, keep=True))
    (on,) = collected(engine, samples[:1], lambda s: Continue(of=reading, max_new_tokens=NEW))
    (plain,) = collected(engine, samples[:1], lambda s: Generate(s.images, asked(QUESTION), max_new_tokens=NEW))
    assert on == plain


# ---- what is asked, and what is refused ----


def test_the_papers_settings_are_those_of_this_family():
    vicrop, cof = methods.bind(Vicrop(), BLIP), methods.bind(Cof(), BLIP)
    assert (vicrop.layer, vicrop.base) == (15, 224)
    assert vicrop.prompt("What?", 2).text == "<image><image>Question: What? Short answer:"
    assert (cof.lam, cof.alpha) == (22.0, 1.0)
    (first, second), answer = drive(cof, Sample(picture(), "What?"), Reply("", ()), Reply("42", ()))
    assert second.prompt.text == "<image>Question: What? Short answer:"
    assert first.prompt.text.startswith("<image>Question: What?\nAccording to") and answer.grid.all()


def test_all_images_stand_before_the_text_in_the_order_in_which_it_speaks_of_them():
    bound = methods.bind(HiPerson(), BLIP)
    sample = Sample(picture(), "What?")
    images, turn = bound.views(sample, (0, 0, 100, 100))
    assert turn == f"{OBSERVE}\n{RELATE}\nWhat?" and images[0].size == (100, 100) and images[1] is sample.image


def row(**fields):
    """One image of 2 x 2 cells, seen by the queries at positions 1 and 2."""
    at = dict(length=jnp.int32(4), rows=jnp.array([3]), wanted=jnp.ones(1, bool), logits=None)
    return Row(jnp.zeros((1, 0), int), **at, grid=(2, 2), keys=4, queries=jnp.array([[1, 2]]), **fields)


def test_cells_are_reached_through_what_was_read_of_the_queries_and_not_otherwise():
    cross = jnp.arange(10.0).reshape(1, 1, 2, 5)
    on = row(readouts=Readouts(cross=cross)).on_image(jnp.array([9.0, 1, 2, 9]))
    np.testing.assert_allclose(on, [[13, 16], [19, 22]])
    bias = row(readouts=None).on_cross(jnp.arange(4.0).reshape(1, 2, 2))
    np.testing.assert_array_equal(bias, [[[0, 0, 1, 2, 3]]])
    for fault in (lambda: row(readouts=Readouts()).on_image(jnp.ones(4)), lambda: row(readouts=None).on_keys(cross)):
        with pytest.raises(UserError, match="through queries"):
            fault()


def test_what_a_model_cannot_do_is_refused(vlm):
    with pytest.raises(UserError, match="leave it out"):
        methods.bind(Cof(layers=(0,)), BLIP)
    request, blind = (Read(images, "?", ReadSpec()) for images in (picture(), ()))
    with pytest.raises(UserError, match="sees no image of this request through queries"):
        cross_layers(vlm, blind, (0,), True)
    assert cross_layers(vlm, blind, None, True) is None and cross_layers(vlm, request, None, True) == (CROSS,)
    with pytest.raises(UserError, match="the Q-Former has 3"):
        cross_layers(vlm, request, (3,), True)
    cache = jnp.zeros((2, 8, 1, 2))
    state = State("another", np.zeros(4, np.int32), (), Kept(cache, cache, jnp.arange(8), None, None), 4, layer=2)
    another = SimpleNamespace(config=SimpleNamespace(vision=SimpleNamespace(deepstack=(1, 2))), name="another")
    engine = SimpleNamespace(model=lambda name: (name, another))
    with pytest.raises(UserError, match="image features enter another before layers 1 to 2"):
        HANDLERS[Continue].prepare(engine, Continue(of=Reading(None, (), state)), (0, 0))


def test_a_copied_folder_has_both_tokenizers_and_one_without_is_refused(folder, tmp_path):
    (source := tmp_path / "source").mkdir()
    shutil.copytree(folder, source, dirs_exist_ok=True)
    (source / "video_preprocessor_config.json").write_text("{}")
    (out := tmp_path / "out").mkdir()
    copy_processor(source, out)
    assert (out / "qformer_tokenizer" / "tokenizer.json").exists() and (out / "video_preprocessor_config.json").exists()
    shutil.rmtree(source / "qformer_tokenizer")
    with pytest.raises(JaxVQAError, match="no folder qformer_tokenizer"):
        jaxvqa.load(source, dtype="float32")
