"""`Gradient` of a tiny random LLaVA: exact, batched by the engine's rules, counted, and refused where it cannot be."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import causal, dense
from tiny import tiny_llava

import jaxvqa
from jaxvqa import gradients, handlers
from jaxvqa.engine import Engine
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.models import llava
from jaxvqa.prompts import render
from jaxvqa.requests import Answer, Generate, Gradient, Passes, Read, Sample
from jaxvqa.taps import ReadSpec

CUT, WHOLE = (16, 128, 192), (128, 192)
"""Token lengths that cut a prompt inside its image (16 tokens from 1 on), and that leave it whole."""
EXACT = 1e-5
"""f32 rounding between programs of different shapes."""
LAYERS = (0, 2)
NUM_LAYERS = 3


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny_llava(
        tmp_path_factory.mktemp("gradient") / "tiny", text_layers=NUM_LAYERS, vision_layers=2, feature_layer=-1,
        num_kv_heads=2,
    )  # fmt: skip
    return jaxvqa.load(folder, dtype="float32")


def pixels_of(encoded):
    return np.stack([image.arrays for image in encoded.images])


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def prompt(question: str, num_images: int = 1):
    return render("vicrop_hf", question, num_images=num_images)


def everything(row):
    return row.gradient, row.readouts.rows, row.rows, row.wanted, row.length


def of_attention(sample, layers=LAYERS, rows="question", reduce=everything, **options):
    p = prompt(sample.question, len(sample.images))
    return Gradient(sample.images, p, layers=layers, rows=rows, reduce=reduce, **options)


def of_pixels(sample, **options):
    return Gradient(sample.images, prompt(sample.question, len(sample.images)), wrt="pixels", **options)


def collected(vlm, samples, requests, lengths=CUT, batch_size=2, **options) -> list:
    """What the engine answers to the requests that `requests(sample)` makes, per sample."""
    results, found = {}, []

    def method(sample):
        results[sample.id] = yield requests(sample)
        return Answer("done")

    engine = Engine(vlm, batch_size=batch_size, lengths=lengths, **options)
    for answer in engine.run(samples, method):
        if answer.error is not None:
            raise answer.error
        found.append(results[answer.sample])
    return found


SAMPLE = Sample((picture(0), picture(1)), "Is it red? What is on the plate?", id="probe")


@pytest.fixture(scope="module")
def found(vlm):
    """The gradient of SAMPLE, beside a shared prefix."""
    return collected(vlm, [SAMPLE], of_attention)[0].value


def top(logits: np.ndarray) -> int:
    return int(logits.argmax())


def log_probability(logits: np.ndarray, token: int) -> float:
    logits = logits.astype(np.float64)
    return logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_the_gradient_to_attention_is_that_of_a_dense_model_whose_probabilities_are_moved(vlm, found):
    """Central differences of a float64 model in NumPy, along random directions in every layer."""
    gradient, probs, rows, wanted, length = found
    encoded = vlm.encode(list(SAMPLE.images), prompt(SAMPLE.question, 2))
    ids = jnp.asarray(encoded.tokens.ids)[None]
    features = llava.encode_images(vlm.params, vlm.config, jnp.asarray(pixels_of(encoded)))
    features = features.reshape(1, -1, features.shape[-1])
    x = np.asarray(llava.embed(vlm.params, vlm.config, ids, features, jnp.asarray(encoded.slots)[None]))
    count = len(ids[0])
    assert length == count and rows[wanted].tolist() == encoded.tokens.span(SAMPLE.question).tolist()

    def run(layer, move):
        def change(i, p):
            p = p.copy()
            p[0][:, rows[wanted]] += move * (i == layer)
            return p

        return dense(vlm.params.decoder, x, [count], vlm.config.decoder, change)

    plain = run(0, 0.0)
    token, rng = top(plain.logits[0, -1]), np.random.default_rng(0)
    seen = causal([count], count)[0][rows[wanted]]
    for c, layer in enumerate(LAYERS):
        inside = probs[c][:, wanted, :count]
        np.testing.assert_allclose(inside, plain.probs[layer][0][:, rows[wanted]], atol=EXACT)
        slopes = gradient[c][:, wanted, :count].astype(np.float64)
        for _ in range(3):
            direction = rng.standard_normal(slopes.shape) * seen
            ends = (run(layer, sign * 1e-4 * direction).logits[0, -1] for sign in (1, -1))
            high, low = (log_probability(logits, token) for logits in ends)
            numeric = (high - low) / 2e-4
            assert abs((slopes * direction).sum() - numeric) <= 1e-4 * (1 + abs(numeric))
    assert np.abs(gradient[:, :, wanted, :count]).max() > 1e-3


@pytest.mark.parametrize("backend", ["xla", "xla_chunked"])
@pytest.mark.parametrize("lengths", [CUT, WHOLE], ids=["beside a prefix", "whole"])
def test_it_is_the_same_under_every_backend_at_once_and_in_two_parts(vlm, found, lengths, backend, monkeypatch):
    monkeypatch.setattr(vlm, "attention", backend)
    value = collected(vlm, [SAMPLE], of_attention, lengths)[0].value
    gradient, probs, *_, count = found
    np.testing.assert_allclose(value[0][..., :count], gradient[..., :count], atol=EXACT)
    np.testing.assert_allclose(value[1][..., :count], probs[..., :count], atol=EXACT)


def test_padded_rows_are_copies_of_the_last(found):
    gradient, probs, rows, wanted, _ = found
    assert not wanted[-1], "the test needs padding"
    last = wanted.sum() - 1
    for array in (gradient, probs):
        np.testing.assert_array_equal(
            array[:, :, last + 1 :], np.broadcast_to(array[:, :, [last]], array[:, :, last + 1 :].shape)
        )
    assert (rows[~wanted] == rows[last]).all()


def test_the_rows_may_lie_inside_the_image(vlm):
    """Then nothing of the prompt can be shared, and what follows them depends on them."""
    whole = collected(vlm, [SAMPLE], lambda s: of_attention(s, rows=(3, 9)), CUT)[0].value
    again = collected(vlm, [SAMPLE], lambda s: of_attention(s, rows=(3, 9)), WHOLE)[0].value
    np.testing.assert_array_equal(whole[0], again[0])
    assert np.abs(whole[0][..., :3]).max() > 1e-6


def test_without_a_reduction_the_value_is_the_gradient(vlm, found):
    reading = collected(vlm, [SAMPLE], lambda s: of_attention(s, reduce=None))[0]
    np.testing.assert_allclose(reading.value, found[0], atol=EXACT)
    assert len(reading.geometries) == 2


def with_arguments(row, weight):
    return row.on_image(row.gradient, 1) * weight, row.logits


def test_a_reduction_sees_its_arguments_and_the_cells_of_an_image(vlm, found):
    def request(sample):
        return of_attention(sample, reduce=with_arguments, args=(np.float32(2),))

    grid, logits = collected(vlm, [SAMPLE], request)[0].value
    encoded = vlm.encode(list(SAMPLE.images), prompt(SAMPLE.question, 2))
    start, size = encoded.tokens.image_spans[1]
    expected = 2 * found[0][..., start : start + size]
    np.testing.assert_allclose(grid, expected.reshape(*expected.shape[:-1], 4, 4), atol=EXACT)
    np.testing.assert_allclose(logits, vlm.prefill(encoded).logits[0], atol=EXACT)


def test_the_gradient_to_pixels_is_what_moving_them_does(vlm):
    """Central differences of the plain model, along random directions in each image."""
    gradient = collected(vlm, [SAMPLE], of_pixels)[0].value
    encoded = vlm.encode(list(SAMPLE.images), prompt(SAMPLE.question, 2))
    pixels = pixels_of(encoded)
    assert gradient.shape == pixels.shape
    token, rng = top(np.asarray(vlm.prefill(encoded).logits[0])), np.random.default_rng(1)
    for image in (0, 1, 1):
        direction = np.zeros_like(gradient)
        direction[image] = rng.standard_normal(gradient[image].shape) + gradient[image] / np.abs(gradient[image]).mean()
        inputs = jaxvqa.collate([encoded])
        ends = [replace(inputs, images=(pixels + step * direction)[None]) for step in (1e-3, -1e-3)]
        high, low = (log_probability(np.asarray(vlm.prefill(end).logits[0]), token) for end in ends)
        np.testing.assert_allclose((gradient * direction).sum(), (high - low) / 2e-3, rtol=2e-2)


def on_first_image(row):
    return row.on_image(row.gradient * row.readouts.rows)


def many(sample):
    """Both gradients, and requests that share their image's features and prefix."""
    return [
        of_attention(sample, (1,), "last", on_first_image),
        of_pixels(sample),
        Generate(sample.images, prompt(sample.question, len(sample.images)), max_new_tokens=2),
    ]


def bits(results) -> list[bytes]:
    values = [getattr(result, "ids", getattr(result, "value", result)) for result in results]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(values)]


def test_a_rows_bits_do_not_depend_on_its_companions_or_position(vlm):
    """No companion's gradient leaks into a row: other images, questions and lengths beside it change no bit."""
    probe = Sample(picture(0), "What character is on the plate?", id="probe")
    others = [Sample(picture(n, (50 + 9 * n, 80)), f"Is it {'very ' * n}red?", id=f"other {n}") for n in range(1, 4)]
    alone = bits(collected(vlm, [probe], many)[0])
    for place in (0, 1, 3):
        samples = [*others[:place], probe, *others[place:]]
        assert bits(collected(vlm, samples, many)[place]) == alone, f"position {place}"


def test_no_compilation_in_a_second_pass_over_samples_of_mixed_sizes(vlm):
    sizes, heard = [(56, 56), (90, 60), (200, 31), (17, 120)], []

    def samples(seed):
        for n in range(6):
            yield Sample(picture(seed + n, sizes[n % 4]), f"What is {'so ' * n}red?", id=str(n))

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            heard.append(event)

    collected(vlm, list(samples(0)), many)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x - 17)(np.zeros(3))
        assert heard, "the listener hears compilations"
        heard.clear()
        collected(vlm, list(samples(50)), many)
        assert not heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_images_and_prefixes_are_shared_with_other_requests(vlm):
    sample, p = Sample(picture(0), "What is it?"), prompt("What is it?")
    engine = Engine(vlm, batch_size=2, lengths=CUT)

    def method(sample):
        last = ReadSpec((NUM_LAYERS - 1,), frozenset({"rows"}))
        yield [of_attention(sample, (1,), "last", None), of_attention(sample, (2,), "last", None)]
        yield [Read(sample.image, p, last), Generate(sample.image, p, max_new_tokens=2)]
        return Answer("x")

    next(engine.run([sample], method))
    assert (engine.stats.rows["images"], engine.stats.rows["prefix"], engine.stats.rows["gradient"]) == (1, 1, 2)


def test_passes_and_flops_are_counted(vlm):
    """The backward pass counts twice the forward one, from the lowest layer that is asked for on."""
    costs = {}

    def method(sample):
        request = of_pixels(sample) if sample.id == "pixels" else of_attention(sample, (int(sample.id), 2), reduce=None)
        yield request
        return Answer("x")

    samples = [Sample(picture(0), "What is it?", id=name) for name in ("0", "1", "pixels")]
    for answer in Engine(vlm, batch_size=2, lengths=CUT).run(samples, method):
        assert answer.error is None and answer.forward_passes == Passes(0, 1)
        assert answer.cost.passes == {"gradient": 1} and answer.cost.tokens == 0
        costs[answer.sample] = answer.cost
    config, count = vlm.config, len(vlm.tokenise(prompt("What is it?"), 1).ids)

    def flops(layers):
        part = replace(config, decoder=replace(config.decoder, num_layers=layers))
        return llava.flops(part, count, (count + 1) // 2)

    image = llava.image_flops(config)
    assert costs["0"].flops == image + 3 * flops(3)
    assert costs["1"].flops == image + flops(3) + 2 * flops(2)
    assert costs["pixels"].flops == 3 * (image + flops(3))
    assert (costs["0"].images, costs["pixels"].images) == (1, 0), "its encodings are part of the gradient's pass"


def compiled(vlm, layer: int, length: int, start: int = 0, backend: str = "xla_chunked"):
    """The program of one row of `length` tokens behind a prefix of `start`."""
    d = vlm.config.decoder

    def shaped(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = shaped(d.num_layers, start, d.num_kv_heads, d.head_dim, dtype=jnp.float32)
    prefix = (handlers.Kept(cache, cache, shaped(start), None, None),) if start else ()
    features, at = ((shaped(16, d.width, dtype=jnp.float32),),), shaped(1, 1)
    ids, cells = shaped(1, length), shaped(1, 1, 16)
    batch = handlers.Batch(
        ids=ids, lengths=shaped(1), slots=ids, positions=None, features=features, prefix=prefix, cells=cells,
        shapes=shaped(1, 1, 2), rows=at, wanted=shaped(1, 1, dtype=jnp.bool_), asked=None, queries=None, grid=(4, 4),
    )  # fmt: skip
    spec = ReadSpec((layer,), frozenset({"rows", "values"}), heads="all")
    program = gradients._gradient.lower(
        vlm.params, vlm.config, batch, None, (), spec=spec, reduce=None, backend=backend
    )
    return program.compile()


def maps(program, queries: int, keys: int) -> list[tuple[int, ...]]:
    """Shapes of its arrays with an axis of queries and another one of keys."""
    found = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program.as_text())
    shapes = {tuple(map(int, shape.split(","))) for shape in found}
    return [s for s in shapes if queries in s and keys in (*s[: s.index(queries)], *s[s.index(queries) + 1 :])]


@pytest.mark.parametrize("start", [0, 256], ids=["whole", "beside a prefix"])
def test_the_program_holds_no_map_of_all_tokens_by_all(vlm, start):
    """512 tokens in chunks of 128, forward and backward."""
    chunked = compiled(vlm, 1, 512, start)
    assert maps(chunked, 128, 512 + start) and not maps(chunked, 512, 512 + start)
    assert maps(compiled(vlm, 1, 512, start, "xla"), 512, 512 + start), "plain attention does"


def test_layers_below_the_lowest_are_not_differentiated(vlm):
    """Of the last layer nothing lies above: its backward pass is that of one layer, whatever the model's depth."""
    first, last = (compiled(vlm, layer, 128).cost_analysis()["flops"] for layer in (0, 2))
    assert last < 0.8 * first


def test_gradients_that_are_not_finite_are_an_error_not_a_map(vlm):
    params = vlm.params
    try:
        vlm.params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
        for request in (of_attention, of_pixels):
            with pytest.raises(JaxVQAError, match="tiny: the logits or their gradient are not finite; check the wei"):
                collected(vlm, [SAMPLE], request)
    finally:
        vlm.params = params


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(wrt="keys"), "wrt='keys'; expected one of attention, pixels"),
        (dict(of="answer"), "of='answer'; expected one of top, match"),
        (dict(layers=()), "no layers; name at least one"),
        (dict(layers=(0, 3)), r"layers \[3\]: the model has layers 0 to 2"),
        (dict(layers=(-1,)), r"layers \[-1\]: the model has layers 0 to 2"),
        (dict(layers=(2, 1)), "must be distinct and ascending"),
        (dict(wrt="pixels"), r"found layers=\(1,\), 1 images; expected \(\)"),
        (dict(wrt="pixels", layers=(), images=(), prompt="What?"), r"found layers=\(\), 0 images"),
        (dict(rows="zebra"), "'zebra' .* is not in the prompt"),
        (dict(model="big"), "unknown model 'big'"),
        (dict(of="match"), "no image-text matching model; give it one: models={'matcher': jaxvqa.load_matcher"),
        (dict(of="match", model="matcher"), "no image-text matching model; give it one"),
        (dict(of="match", model="tiny"), r"model 'tiny' \(tiny\) answers, and matches nothing"),
    ],
)
def test_a_wrong_request_is_refused_in_one_clear_line(vlm, change, match):
    request = replace(Gradient(picture(0), prompt("What?"), layers=(1,)), **change)
    with pytest.raises(JaxVQAError, match=match) as raised:
        collected(vlm, [Sample(picture(0), "What?")], lambda sample: request)
    assert "\n" not in str(raised.value) and isinstance(raised.value, (UserError, JaxVQAError))
