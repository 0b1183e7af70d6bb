"""A matching model in the engine: `Match` and `Gradient` of a tiny random BLIP beside a tiny random LLaVA."""

import gc
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import collected
from PIL import Image
from tiny import tiny_llava
from tiny_blip import tiny_blip

import jaxvqa
from jaxvqa import matcher as matcher_module
from jaxvqa import sharding
from jaxvqa.cli import main
from jaxvqa.engine import Engine, matcher_of
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.matcher import collate
from jaxvqa.methods import fill
from jaxvqa.models import blip_itm
from jaxvqa.prompts import render
from jaxvqa.requests import Answer, Generate, Gradient, Match, Passes, Sample
from jaxvqa.transforms.gradient import gradient_map, text_rows

LENGTHS = (16, 128)
EXACT = 1e-6
"""f32 rounding between programs of different shapes."""
TEXTS = ("the red square", "What is on the small sign, left of the blue cross?", "plate")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("matching") / "tiny", text_layers=2, vision_layers=1, feature_layer=-1)
    return jaxvqa.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_blip(tmp_path_factory.mktemp("matching") / "blip")


@pytest.fixture(scope="module")
def matcher(folder):
    return jaxvqa.load_matcher(folder, dtype="float32")


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def engine_of(vlm, matcher, **options) -> Engine:
    return Engine({"tiny": vlm, "matcher": matcher}, **{"batch_size": 2, "lengths": LENGTHS} | options)


def first_row(row):
    """HiPerson's map, and what the row says of its text."""
    maps = [row.on_image(x[0]) for x in (row.readouts.rows, row.gradient)]
    rows = text_rows("enc", row.length, maps[0].shape[1])
    return gradient_map(*maps, rows), row.length, row.rows, row.wanted, row.logits


def text_mean(row, weight):
    maps = [row.on_image(x[0]) for x in (row.readouts.rows, row.gradient)]
    return weight * gradient_map(*maps, text_rows("tokens_mean", row.length, maps[0].shape[1]), relu="grad")


def many(sample):
    return [
        Match(sample.image, sample.question),
        Gradient(sample.image, sample.question, of="match", layers=(-1,), reduce=first_row, model="matcher"),
        Gradient(sample.image, sample.question, of="match", layers=(0,), reduce=text_mean, args=(np.float32(2),)),
    ]


def samples(seed=0) -> list[Sample]:
    return [Sample(picture(seed + n, (60 + 30 * n, 40)), text, id=str(n)) for n, text in enumerate(TEXTS)]


def test_the_engine_gives_what_the_matcher_gives(vlm, matcher):
    """Each pair in a batch of its own length, against one batch of the longest."""
    found = collected(engine_of(vlm, matcher), samples(), many)
    pairs = [matcher.encode(sample.image, sample.question) for sample in samples()]
    probabilities, logits = matcher.probability(collate(pairs)), matcher.match_logits(collate(pairs))
    last, first = matcher.gradcam(collate(pairs)), matcher.gradcam(collate(pairs), 0, relu="grad")
    for i, (pair, (probability, enc, mean)) in enumerate(zip(pairs, found, strict=True)):
        assert isinstance(probability, float)
        np.testing.assert_allclose(probability, probabilities[i], atol=EXACT)
        grid, length, rows, wanted, at_end = enc.value
        np.testing.assert_allclose(grid, last[i, 0], atol=EXACT)
        np.testing.assert_allclose(at_end, logits[i], atol=10 * EXACT)
        assert length == wanted.sum() == len(pair.ids) and (rows == np.arange(len(rows))).all()
        np.testing.assert_allclose(mean.value, 2 * first[i, 1 : len(pair.ids) - 1].mean(0), atol=EXACT)
        assert np.abs(grid).max() > 1e-4 and np.abs(mean.value).max() > 1e-4
        assert enc.geometries == mean.geometries == (pair.geometry,)


@partial(jax.jit, static_argnames="layer")
def match_gradient(params, config, pair, layer):
    """Encoded image, logits, probabilities and gradient of a layer."""
    image = blip_itm.encode_images(params, config, pair.pixels)
    return image, *blip_itm.match_gradient(params, config, pair.ids, pair.lengths, image, layer)


@jax.jit
def moved_logit(params, config, pair, image, layer, direction):
    """The logit of "match" when the layer's cross-attention probabilities are moved along a direction."""
    mask = blip_itm.text_mask(pair.ids, pair.lengths)
    x = blip_itm.run_layers(params, config, blip_itm.embed(params, config, pair.ids), mask, image, 0, 1)
    _, (_, _, v) = blip_itm.run_layer(params, config, x, mask, image, layer)
    moved = jnp.einsum("BNTS,BSNH->BTNH", direction, v[:, 1:])
    x, _ = blip_itm.run_layer(params, config, x, mask, image, layer, moved)
    x = blip_itm.run_layers(params, config, x, mask, image, 2)
    return blip_itm.score(params, x[:, 0])[0, blip_itm.MATCH]


def test_the_gradient_of_the_logit_is_that_of_moved_probabilities(matcher):
    """Central differences, for the second of three layers."""
    pair, params, config = collate([matcher.encode(picture(0), TEXTS[0])]), matcher.params, matcher.config
    image, logits, probs, slopes = match_gradient(params, config, pair, layer=1)
    assert (probs.sum(-1) < 1).all(), "the class token has the rest"
    direction = np.random.default_rng(0).standard_normal(slopes.shape) + 3 * np.sign(slopes)
    low, plain, high = (
        float(moved_logit(params, config, pair, image, 1, np.float32(s * direction))) for s in (-1e-3, 0, 1e-3)
    )
    np.testing.assert_allclose(logits[0, blip_itm.MATCH], plain, atol=10 * EXACT)
    np.testing.assert_allclose((slopes * direction).sum(), (high - low) / 2e-3, rtol=1e-2)


def test_without_a_reduction_the_value_is_the_gradient_over_the_patches(vlm, matcher):
    def request(sample):
        return Gradient(sample.image, sample.question, of="match", layers=(1,))

    reading = collected(engine_of(vlm, matcher), samples()[:1], request)[0]
    pair = collate([matcher.encode(picture(0), TEXTS[0])], length=8)
    *_, slopes = match_gradient(matcher.params, matcher.config, pair, layer=1)
    assert reading.value.shape == (1, 3, 8, 16)
    np.testing.assert_allclose(reading.value, slopes, atol=EXACT)
    assert not reading.value[:, :, len(matcher.tokenise(TEXTS[0])) :].any(), "padding has no gradient"


def flat(results) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves([getattr(r, "value", r) for r in results])]


def test_a_rows_bits_do_not_depend_on_its_companions_or_position(vlm, matcher):
    probe, *others = samples()
    alone = flat(collected(engine_of(vlm, matcher), [probe], many)[0])
    others += [Sample(picture(n), "the red square", id=f"other {n}") for n in (7, 8)]
    for place in (0, 2, 4):
        crowd = [*others[:place], probe, *others[place:]]
        assert flat(collected(engine_of(vlm, matcher), crowd, many)[place]) == alone, f"position {place}"


def test_no_compilation_for_other_images_and_texts(vlm, matcher):
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    collected(engine_of(vlm, matcher), samples(), many)
    other = [replace(sample, question=f"small {sample.question}") for sample in samples(20)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x - 23)(np.zeros(3))
        assert compiled, "the listener hears compilations"
        compiled.clear()
        collected(engine_of(vlm, matcher), other, many)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_text_longer_than_lavis_allows_is_cut_and_fits_the_longest_bucket(vlm, matcher):
    long = Sample(picture(0), "the small red plate " * 30)
    [probability] = collected(engine_of(vlm, matcher), [long], lambda s: Match(s.image, s.question))
    np.testing.assert_allclose(
        probability, matcher.probability(matcher.encode(long.image, long.question))[0], atol=EXACT
    )


def test_an_image_is_encoded_once_per_model_and_passes_are_counted_apart(vlm, matcher):
    """The matcher's passes are none of the model's that answers; their FLOPs are the sample's."""
    asked = render("vicrop_hf", "What?", num_images=1)

    def method(sample):
        yield [*many(sample), Match(sample.image, "plate", model="matcher")]
        reply = yield Generate(sample.image, asked, max_new_tokens=2)
        return Answer(reply.text)

    def plain(sample):
        reply = yield Generate(sample.image, asked, max_new_tokens=2)
        return Answer(reply.text)

    engine = engine_of(vlm, matcher)
    sample = samples()[1]
    answer, alone = next(engine.run([sample], method)), next(engine.run([sample], plain))
    assert answer.error is None and answer.forward_passes == Passes(search=0, final=1)
    assert answer.cost.passes == {"match": 2, "match_gradient": 2, "generate": 1}
    assert engine.stats.rows["images"] == 2 and answer.cost.images == 2, "one encoding for each model"
    assert [entry.kind for entry in answer.log] == ["Match", "Gradient", "Gradient", "Match", "Generate"]
    assert answer.log[0].prompt == sample.question and answer.model == "tiny"
    config, count, layers = matcher.config, len(matcher.tokenise(sample.question)), 3
    expected = blip_itm.image_flops(config) + blip_itm.flops(config, len(matcher.tokenise("plate")))
    expected += 3 * blip_itm.flops(config, count) + 2 * blip_itm.flops(config, count, 1)
    expected += 2 * blip_itm.flops(config, count, layers)
    assert answer.cost.flops - alone.cost.flops == expected


def test_flops_are_those_of_the_compiled_program(matcher):
    """XLA counts a scan's body once, so of one layer; wide, as softmaxes and norms are not what is counted."""
    text = replace(matcher.config.text, num_layers=1, width=256, mlp_width=1024, num_heads=4)
    vision = replace(matcher.config.vision, num_layers=1, width=192, mlp_width=768, num_heads=4)
    config = replace(matcher.config, text=text, vision=vision)
    params, ids = sharding.abstract(blip_itm.specs(config)), jax.ShapeDtypeStruct((1, 32), jnp.int32)
    image, pixels = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 17, 192), (1, 32, 32, 3)))
    lengths = jnp.array([32])
    matched = jax.jit(lambda p, i, x: blip_itm.match(p, config, i, lengths, x, backend="xla")).lower(params, ids, image)
    encoded = jax.jit(lambda p, x: blip_itm.encode_images(p, config, x, backend="xla")).lower(params, pixels)
    for lowered, flops in ((matched, blip_itm.flops(config, 32)), (encoded, blip_itm.image_flops(config))):
        assert flops < lowered.compile().cost_analysis()["flops"] < 1.1 * flops


def test_preprocessing_is_kept_while_the_image_lives(vlm, matcher, monkeypatch):
    calls, preprocess = [], type(matcher).preprocess
    monkeypatch.setattr(type(matcher), "preprocess", lambda self, image: calls.append(1) or preprocess(self, image))
    engine = engine_of(vlm, matcher)
    collected(engine, [Sample(picture(3), "plate")], many)
    assert len(calls) == 1
    gc.collect()
    assert not engine._preprocessed


@pytest.mark.parametrize(
    ("request_of", "match"),
    [
        (lambda s: Match(s.image, "plate", model="tiny"), r"model 'tiny' \(tiny\) answers, and matches nothing: Match"),
        (
            lambda s: Generate(s.image, "What?", model="matcher"),
            r"model 'matcher' \(blip\) matches images and texts, and",
        ),
        (
            lambda s: Gradient(s.image, "?", layers=(0,), model="matcher"),
            "answers nothing; it serves Match and Gradient",
        ),
        (lambda s: Match(s.image, "plate", model="big"), r"unknown model 'big' .*known: tiny, matcher"),
        (lambda s: Match((s.image, s.image), "plate"), "found 2 images; a text is matched with one"),
        (lambda s: Match((), "plate"), "found 0 images"),
        (lambda s: Match(s.image, render("vicrop_hf", "?", num_images=1)), "plain text, not a rendered prompt"),
        (lambda s: Gradient(s.image, "a", of="match", layers=(0, 1)), r"layers=\(0, 1\); expected .* one layer"),
        (lambda s: Gradient(s.image, "a", of="match"), r"layers=\(\); expected wrt='attention' and one layer"),
        (lambda s: Gradient(s.image, "a", of="match", wrt="pixels", layers=(0,)), "wrt='pixels'"),
        (lambda s: Gradient(s.image, "a", of="match", layers=(3,)), "text layer 3: the text encoder has 3 layers"),
    ],
)
def test_a_wrong_request_is_refused_in_one_clear_line(vlm, matcher, request_of, match):
    with pytest.raises(JaxVQAError, match=match) as raised:
        collected(engine_of(vlm, matcher), [Sample(picture(0), "What?")], request_of)
    assert "\n" not in str(raised.value)


def test_an_engine_needs_a_model_that_answers(matcher):
    for models, match in (({"m": matcher}, "no model that answers, but m"), ({}, "but none at all")):
        with pytest.raises(UserError, match=match):
            Engine(models)


def test_the_default_is_the_first_model_that_answers(vlm, matcher):
    engine = Engine({"matcher": matcher, "tiny": vlm}, batch_size=1)
    assert engine.default is vlm and engine.model(None)[0] == "tiny" and engine.matcher(None)[0] == "matcher"


def test_weights_that_are_not_finite_are_an_error(vlm, matcher):
    broken = jaxvqa.Matcher(
        matcher.config, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), matcher.params), matcher.tokenizer,
        matcher.image_processor, name="broken",
    )  # fmt: skip
    for n, what in ((0, "the logits"), (1, "the logits or their gradient")):
        with pytest.raises(JaxVQAError, match=f"broken: {what} are not finite"):
            collected(engine_of(vlm, broken), samples()[:1], lambda s, n=n: many(s)[n])


@dataclass(frozen=True)
class Matching:
    """A method with a matcher."""

    name: ClassVar[str] = "matching"
    matcher: str | None = None
    default: str | None = None
    max_new_tokens: int = 1

    def bind(self, facts, preset):
        return fill(self, matcher=self.default)

    def __call__(self, sample):
        probability = yield Match(sample.image, sample.question, model="matcher")
        return Answer(f"{probability:.6f}")


def test_what_a_bound_method_names_is_loaded_once_and_what_is_given_is_used(
    vlm, matcher, folder, tmp_path, monkeypatch
):
    loads, load = [], matcher_module.load_matcher
    monkeypatch.setattr(matcher_module, "load_matcher", lambda *args, **kw: loads.append(args) or load(*args, **kw))
    matcher_module.matcher_of_method.cache_clear()
    image, expected = picture(0), None
    for method in (Matching(str(folder)), Matching(default=str(folder))):
        answer = jaxvqa.ask(vlm, image, "plate", method)
        expected = f"{float(matcher.probability(matcher.encode(image, 'plate'))[0]):.6f}"
        assert answer.text == expected and answer.forward_passes == Passes()
    [many] = jaxvqa.ask_many(vlm, [Sample(image, "plate")], Matching, matcher=str(folder))
    assert many.text == expected and len(loads) == 1
    other = load(tiny_blip(tmp_path / "other", seed=1))
    given = dict(models={"matcher": other})
    assert jaxvqa.ask(vlm, image, "plate", Matching("nowhere"), **given).text != expected
    assert next(jaxvqa.ask_many({"tiny": vlm, "matcher": other}, [Sample(image, "plate")], Matching("nowhere"))).text
    assert len(loads) == 1


def test_blips_published_models_get_their_own_first_token(matcher, monkeypatch):
    """[ENC] is the last of their vocabulary; other models keep [CLS]."""
    for size, first in ((matcher.config.text.vocab_size, None), (30524, 30523)):
        config = replace(matcher.config, text=replace(matcher.config.text, vocab_size=size))
        loaded = jaxvqa.Matcher(config, matcher.params, matcher.tokenizer, matcher.image_processor, name="m")
        monkeypatch.setattr(matcher_module, "load_matcher", lambda source, loaded=loaded, **kw: loaded)
        matcher_module.matcher_of_method.cache_clear()
        assert matcher_module.matcher_of_method("m").first_token == first
    matcher_module.matcher_of_method.cache_clear()


def test_a_matcher_that_cannot_be_had_is_one_clear_error(vlm, tmp_path):
    with pytest.raises(UserError, match=r"^matching: cannot load matcher='.*gone'") as raised:
        jaxvqa.ask(vlm, picture(0), "plate", Matching(str(tmp_path / "gone")))
    assert "\n" not in str(raised.value)
    llava = tiny_llava(tmp_path / "llava", text_layers=1, vision_layers=1, feature_layer=-1)
    with pytest.raises(UserError, match="not one that matches"):
        jaxvqa.ask(vlm, picture(0), "plate", Matching(str(llava)))


def test_a_method_without_a_matcher_loads_none(vlm):
    assert matcher_of(jaxvqa.methods.Vanilla(), vlm) == {} == matcher_of(lambda sample: None, vlm)
    answers = jaxvqa.ask_many(vlm, [Sample(picture(0), "plate")], Matching())
    assert "the engine has no image-text matching model; give it one" in str(next(answers).error)


def test_the_command_line_takes_a_matcher(vlm, folder, tmp_path, capsys, monkeypatch):
    image, model = (
        tmp_path / "picture.png",
        tiny_llava(tmp_path / "model", text_layers=1, vision_layers=1, feature_layer=-1),
    )
    picture(0).save(image)
    known = {"matching": Matching, "vanilla": jaxvqa.methods.Vanilla}
    monkeypatch.setattr(jaxvqa.methods, "get", known.__getitem__)
    asked = ["ask", "--image", str(image), "--question", "plate", "--model", str(model), "--matcher", str(folder)]
    assert main([*asked, "--method", "matching"]) == 0
    assert float(capsys.readouterr().out) > 0
    assert main([*asked, "--method", "vanilla"]) == 2
    assert "unknown option 'matcher' of method vanilla" in capsys.readouterr().err
