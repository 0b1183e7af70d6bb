"""Keys and values of a prompt's beginning, computed once: what is shared, what it saves, and that nothing shows it."""

import gc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import collected
from PIL import Image
from tiny import tiny_llava

import jaxvqa
from jaxvqa import handlers
from jaxvqa.engine import Engine
from jaxvqa.handlers import IMAGES, PREFIXES
from jaxvqa.methods.vicrop import Vicrop
from jaxvqa.prompts import render
from jaxvqa.requests import Answer, Generate, Read, Sample, Score, YesNo
from jaxvqa.taps import Edit, Plugin, ReadSpec, Tap, Taps

CUTS = (16, 32, 48, 64, 128, 192, 256)
"""Lengths at which prompts of the tiny model are cut (an image is 16 tokens); by `WHOLE` none is."""
WHOLE = (192, 256)
NEW = 6
EXACT = 1e-5
"""f32 rounding between a prompt at once and in two parts."""
ROWS = ReadSpec(layers=(1,), read=frozenset({"rows"}))
TO_THE_END = replace(ROWS, stop=4)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("prefix") / "tiny", text_layers=4, vision_layers=1, feature_layer=-1)
    return jaxvqa.load(folder, dtype="float32")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 60, 3), np.uint8))


def prompt(question: str, num_images: int | None = None, template: str = "vicrop_hf"):
    return render(template, question, num_images=num_images)


def wanted_attention(row):
    """Attention of the wanted rows to each image and to the wanted rows themselves, and where they lie."""
    rows = jnp.where(row.wanted[:, None], row.readouts.rows[0], 0)
    images = [row.on_image(rows, image) for image in range(len(row.cells))]
    return images, jnp.take(rows, row.rows, axis=1), row.rows, row.length


def attention_and_logits(row):
    return wanted_attention(row), row.logits


def every_kind(sample):
    p = prompt(sample.question, len(sample.images))
    return [
        Read(sample.images, p, ROWS, reduce=wanted_attention),
        Generate(sample.images, p, max_new_tokens=NEW),
        Score(sample.images, p, ("red", "a blue plate")),
        YesNo(sample.images, p),
    ]


def bits(results) -> list[bytes]:
    values = [getattr(result, "ids", getattr(result, "value", result)) for result in results]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(values)]


PROMPTS = {
    "one image first": (1, lambda n: prompt("What is it?", n)),
    "the same image twice": (-2, lambda n: prompt("What is it?", n)),
    "three images": (3, lambda n: prompt("What is it?", n)),
    "a system text before": (1, lambda n: prompt("What is it?", n, "vicuna_v1")),
    "text between images": (2, lambda n: prompt("<image> is red, is <image> red? Say: is it?", n, "vicuna_v1")),
}


def both_ways(vlm, images, *requests) -> list[tuple]:
    """Results in two parts beside those at once."""
    found = []
    for lengths in (CUTS, WHOLE):
        engine = Engine(vlm, batch_size=2, lengths=lengths)
        found += collected(engine, [Sample(images, "?")], lambda sample: list(requests))
        assert bool(engine.stats.rows["prefix"]) == (lengths == CUTS)
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_in_two_parts_shows_what_it_shows_at_once(vlm, case):
    """Logits, and the attention of the question's tokens to images and text, wherever the cut lies."""
    count, text = PROMPTS[case]
    images = tuple(picture(n) for n in range(count)) if count > 0 else (picture(0),) * -count
    prompt = text(len(images))
    [(parts, whole)] = both_ways(
        vlm, images, Read(images, prompt, TO_THE_END, rows="is it", reduce=attention_and_logits)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=EXACT), parts.value, whole.value)


def test_every_kind_of_request_gets_in_two_parts_what_it_gets_at_once(vlm):
    image, p = picture(0), prompt("What is it?")
    spec = ReadSpec(layers=(0, 2), read=frozenset({"rows", "values"}), heads="all", stop=3)
    inside, scores, confidence, reply = both_ways(
        vlm,
        (image,),
        Read(image, p, spec),
        Score(image, p, ("red", "a blue plate")),
        YesNo(image, p),
        Generate(image, p, max_new_tokens=NEW),
    )
    (parts, whole), length = (reading.value for reading in inside), len(vlm.tokenise(p, 1).ids)
    np.testing.assert_allclose(parts.rows[..., :length], whole.rows[..., :length], atol=EXACT)
    np.testing.assert_allclose(parts.values[:, :length], whole.values[:, :length], atol=EXACT)
    assert (parts.rows[..., length:] == 0).all()
    np.testing.assert_allclose(*scores, atol=EXACT)
    np.testing.assert_allclose(*confidence, atol=EXACT)
    assert reply[0].ids == reply[1].ids


def test_bits_are_the_same_alone_and_in_company_computed_and_found(vlm):
    """Alone; among others about the same and other images; from the cache; with none, where all is computed anew."""
    probe = Sample(picture(0), "What character is on the plate?", id="probe")
    others = [Sample(picture(n % 3), f"Is it {'very ' * n}red?", id=f"other {n}") for n in range(1, 7)]
    engine = Engine(vlm, batch_size=4, lengths=CUTS)
    alone = bits(collected(engine, [probe], every_kind)[0])
    computed = engine.stats.rows["prefix"]
    assert bits(collected(engine, [probe], every_kind)[0]) == alone, "found"
    assert engine.stats.rows["prefix"] == computed == 2, "one of two layers for the reading, one of all"
    for options in ({}, {"prefix_cache_bytes": 0}, {"prefix_cache_bytes": 20_000, "feature_bytes": 0}):
        crowd = Engine(vlm, batch_size=4, lengths=CUTS, **options)
        for _ in range(2):
            assert bits(collected(crowd, [*others[:3], probe, *others[3:]], every_kind)[3]) == alone, options


def test_several_questions_about_one_image_compute_its_prefix_once(vlm):
    """And count, logically, what each would have cost by itself."""
    samples = [Sample(picture(0), f"Is it {'very ' * n}red?", id=str(n)) for n in range(8)]
    method, costs, flops = jaxvqa.methods.Vanilla(template="vicrop_hf", max_new_tokens=NEW), {}, {}
    for lengths in (CUTS, WHOLE):
        engine = Engine(vlm, batch_size=4, lengths=lengths)
        found = list(engine.run(samples, method))
        costs[lengths] = [(answer.cost, answer.forward_passes) for answer in found]
        flops[lengths] = engine.stats.flops
        assert engine.stats.rows["prefix"] == (lengths == CUTS) and engine.stats.rows["generate"] == 8
    assert costs[CUTS] == costs[WHOLE]
    assert all(cost.images == 1 for cost, _ in costs[CUTS])
    assert flops[CUTS] < 0.7 * flops[WHOLE]


def test_vicrops_two_readings_of_an_image_share_it(vlm):
    samples = [Sample(picture(n), "What is it?", id=str(n)) for n in range(4)]
    costs, flops = {}, {}
    for lengths in (CUTS, WHOLE):
        engine = Engine(vlm, batch_size=4, lengths=lengths)
        found = list(engine.run(samples, Vicrop(base=30, max_new_tokens=NEW)))
        costs[lengths] = [(answer.cost, answer.forward_passes, answer.text) for answer in found]
        flops[lengths] = engine.stats.flops
        rows = engine.stats.rows
        assert (rows["read"], rows["generate"]) == (8, 4)
    assert costs[CUTS] == costs[WHOLE], "passes, FLOPs and answers are those of whole prompts"
    assert costs[CUTS][0][1].total == 3
    assert flops[CUTS] < flops[WHOLE]


def prepared(vlm, request):
    return handlers.HANDLERS[type(request)].prepare(Engine(vlm, lengths=CUTS), request, (0, 0))


def prefixes(vlm, *requests) -> int:
    """How many prefixes requests need between them."""
    return len({name for request in requests for name in prepared(vlm, request).data.prefix})


def test_only_the_same_tokens_images_and_layers_share_a_prefix(vlm):
    def ask(*images, text="What is it?", template="vicrop_hf"):
        return Generate(images, prompt(text, len(images), template), max_new_tokens=NEW)

    one, other = picture(1), picture(2)
    again = picture(1)  # another object with the same pixels
    assert prefixes(vlm, ask(one), ask(again), ask(one, text="Is it red?")) == 1
    assert prefixes(vlm, ask(one), ask(other)) == 2
    assert prefixes(vlm, ask(one, other), ask(other, one)) == 2
    assert prefixes(vlm, ask(one), ask(one, template="llava_v1"), ask(one, template="vicuna_v1")) == 3
    reads = [Read(one, prompt("What is it?"), replace(ROWS, stop=stop)) for stop in (2, 2, 3, 4)]
    assert prefixes(vlm, *reads, ask(one)) == 3, "the reading of all layers has the answer's"


def far(row):
    return Taps((Edit(Tap(key_bias=jnp.zeros((1, 1, row.keys))), start=0, stop=1),))


def same(params, cut, stream, carry):
    return stream, carry, ()


def test_where_a_prefix_would_not_do_the_whole_prompt_runs(vlm):
    asked = (picture(0), prompt("What is it?"))
    whole = [
        Generate(*asked, max_new_tokens=NEW, taps=far),
        Generate(*asked, max_new_tokens=NEW, plugin=Plugin(same, cuts=(1,))),
        Read(*asked, ReadSpec(layers=(1,), read=frozenset({"hidden"}))),
        Read(*asked, ReadSpec(layers=(1,), read=frozenset({"keys"}))),
        Read(*asked, ROWS, rows=(3,)),
        Read(*asked, replace(ROWS, stop=2), keep=True),
        Generate((), prompt("What is it?", 0), max_new_tokens=NEW),
    ]
    for request in whole:
        work = prepared(vlm, request)
        assert work.key.start == 0 and not work.data.prefix
        assert all(need.key[0] is IMAGES for need in work.needs.values())


def test_a_prompt_is_cut_before_the_rows_that_are_wanted(vlm):
    """Of two images only the first lies before the first word of the question; the last token asks for no such cut."""
    images = (picture(0), picture(1))
    for question, rows, start in (
        ("<image> and <image> alike?", "question", 16),
        ("<image><image> alike?", "question", 32),
        ("<image> and <image> alike?", "last", 32),
    ):
        assert prepared(vlm, Read(images, prompt(question), ROWS, rows=rows)).key.start == start


def test_a_prompt_may_be_cut_inside_an_image(vlm):
    work = prepared(vlm, Generate((picture(0),) * 3, prompt("What?", 3)))
    assert work.key.start == 48 and (work.data.tokens.ids[48:50] == vlm.config.image_token_id).tolist() == [True, False]


def test_an_attention_that_knows_no_cache_runs_the_whole_prompt(vlm, monkeypatch):
    for backend, start in (("auto", 16), ("splash", 0)):
        monkeypatch.setattr(vlm, "attention", backend)
        assert prepared(vlm, Generate(picture(0), prompt("What is it?"))).key.start == start


def test_an_error_in_a_prefix_reaches_those_who_need_it_and_no_one_else(vlm, monkeypatch):
    """Two samples share the failing image; a reading of it that runs at once, and other images, are answered."""
    launch, bad = type(PREFIXES).launch, picture(5)

    def faulty(self, engine, works, size):
        collect, [name] = launch(self, engine, works, size), [engine.preprocessed("tiny", bad).name]
        return lambda: [
            ValueError("spoilt") if name in work.needs else got for work, got in zip(works, collect(), strict=True)
        ]

    monkeypatch.setattr(type(PREFIXES), "launch", faulty)

    def method(sample):
        hidden = ReadSpec(layers=(0,), read=frozenset({"hidden"}))
        yield Read(sample.image, prompt("What?"), hidden)
        try:
            yield [Generate(sample.image, prompt("What?"), max_new_tokens=NEW), YesNo(sample.image, prompt("Is it?"))]
        except ValueError as error:
            return Answer(str(error))
        return Answer("fine")

    samples = [Sample(image, "?") for image in (picture(0), bad, picture(1), bad)]
    engine = Engine(vlm, batch_size=4, lengths=CUTS)
    assert [answer.text for answer in engine.run(samples, method)] == ["fine", "spoilt", "fine", "spoilt"]
    assert engine.stats.rows["generate"] == 2 and len(engine.shared[PREFIXES].items) == 2


def test_an_image_that_cannot_be_encoded_fails_through_its_prefix(vlm, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no features")

    monkeypatch.setattr(handlers, "_encode", broken)
    samples = [Sample(picture(n), "?") for n in range(2)]
    found = list(Engine(vlm, batch_size=2, lengths=CUTS).run(samples, "vicrop", base=30))
    assert [str(answer.error) for answer in found] == ["no features"] * 2


def test_prefixes_are_let_go_of_and_never_pile_up(vlm, monkeypatch):
    """With memory for one, at most the batches on the device and those in use live; after the run, what is cached."""
    launch, alive = type(PREFIXES).launch, []

    def watched(self, engine, works, size):
        collect = launch(self, engine, works, size)
        alive.append(len(engine.prefixes))
        return collect

    monkeypatch.setattr(type(PREFIXES), "launch", watched)
    samples = [Sample(picture(n), "Is it red?", id=str(n)) for n in range(12)]
    method, peak, texts = jaxvqa.methods.Vanilla(template="vicrop_hf", max_new_tokens=NEW), {}, {}
    for name, limit in (("none", 0), ("one", 20_000), ("many", 1 << 30)):
        alive.clear()
        engine = Engine(vlm, batch_size=2, lengths=CUTS, prefix_cache_bytes=limit)
        gc.disable()
        try:
            texts[name] = [answer.text for answer in engine.run(samples, method)]
            cached = engine.shared[PREFIXES]
            assert len(engine.prefixes) == len(cached.items), "no reference is left to what is not cached"
        finally:
            gc.enable()
        assert cached.bytes <= limit
        peak[name] = max(alive)
    assert texts["none"] == texts["one"] == texts["many"]
    assert peak["many"] == 12 and peak["none"] == 2 and peak["one"] <= 5


def test_of_a_prefixs_last_layer_only_keys_and_values_are_computed(vlm):
    """Attention and MLP of that layer serve no one: XLA leaves them out, and the engine does not count them."""
    ids, d = np.full((1, 64), 7, np.int32), vlm.config.decoder

    def flops(layers):
        lowered = handlers._prefix.lower(vlm.params, vlm.config, ids, -ids, None, ((),), layers=layers, backend="xla")
        return lowered.compile().cost_analysis()["flops"]

    one_layer = handlers._prefill_flops(vlm, 64, 1)
    keys_and_values = 2 * 64 * d.width * 2 * d.num_kv_heads * d.head_dim
    assert keys_and_values < flops(1) < 1.3 * keys_and_values < 0.3 * one_layer
    engine = Engine(vlm, lengths=CUTS)
    _, work = PREFIXES.work("tiny", engine.default, handlers.Begun(ids[0], -ids[0], None, 0, 0), 2, ())
    assert work.padded_flops == one_layer + keys_and_values and work.flops == 0
