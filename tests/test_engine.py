"""The engine's rules, on a tiny random LLaVA: what a row's result depends on, in which order, at what cost."""

import functools
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from PIL import Image
from tiny import tiny_llava

import jaxvqa
from jaxvqa import engine as engine_module
from jaxvqa import handlers
from jaxvqa.engine import Engine
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.handlers import State
from jaxvqa.prompts import GENERAL_QUESTION, render
from jaxvqa.requests import Answer, Call, Continue, Embed, Generate, Passes, Read, Reply, Sample, Score, YesNo
from jaxvqa.taps import Edit, Plugin, ReadSpec, Tap, Taps

LENGTHS = (16, 128, 192)
"""The first is where prompts are cut: the 16 tokens of an image begin at 1, so the rest begins with its last."""
ROWS = ReadSpec(layers=(1,), read=frozenset({"rows"}))
NEW = 6  # tokens of every answer here: another number would be another program
EXACT = 1e-5
"""f32 rounding between programs of different shapes."""


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("engine") / "tiny", text_layers=3, vision_layers=2, feature_layer=-1)
    return jaxvqa.load(folder, dtype="float32")


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def prompt(question: str, num_images: int = 1):
    return render("vicrop_hf", question, num_images=num_images)


def logits(row):
    return row.logits


def attention(row):
    return row.on_image(row.readouts.rows[0, 0])


def answers(vlm, samples, method, **options) -> list[Answer]:
    found = list(Engine(vlm, **{"batch_size": 4, "lengths": LENGTHS} | options).run(samples, method))
    for answer in found:
        if answer.error is not None:
            raise answer.error
    return found


def collected(vlm, samples, requests, **options) -> list:
    """What the engine answers to the requests that `requests(sample)` makes, per sample."""
    results = {}

    def method(sample):
        results[sample.id] = yield requests(sample)
        return Answer("done")

    return [results[answer.sample] for answer in answers(vlm, samples, method, **options)]


def many(sample):
    """One request of each kind that runs on the device, all through one prompt."""
    p = prompt(sample.question)
    return [
        Read(sample.image, p, ROWS, reduce=attention),
        Read(sample.image, p, ReadSpec(), reduce=logits),
        Generate(sample.image, p, max_new_tokens=NEW),
        Generate(sample.image, p, max_new_tokens=NEW, temperature=1.5),
        Score(sample.image, p, ("red", "a blue plate", "green")),
        YesNo(sample.image, p),
    ]


def flat(results) -> list:
    """Results as comparable values, bits and all."""
    out = []
    for result in results:
        value = getattr(result, "ids", getattr(result, "value", result))
        out.append(np.asarray(value).tobytes())
    return out


def test_a_rows_bits_do_not_depend_on_its_companions_or_position(vlm):
    """Alone (with padding), first among others, last among others, among other questions and images: the same bits."""
    probe = Sample(picture(0), "What character is on the plate?", id="probe")
    others = [Sample(picture(n, (50 + 9 * n, 80)), f"Is it {'very ' * n}red?", id=f"other {n}") for n in range(1, 8)]
    alone = flat(collected(vlm, [probe], many)[0])
    for place in (0, 2, 7):
        samples = [*others[:place], probe, *others[place:]]
        assert flat(collected(vlm, samples, many)[place]) == alone, f"position {place}"
    crowd = [*others[3:6], probe]
    assert flat(collected(vlm, crowd, many)[3]) == alone


def test_results_agree_across_batch_sizes(vlm):
    samples = [Sample(picture(n), "What character is on the plate?", id=str(n)) for n in range(3)]
    for one, four in zip(collected(vlm, samples, many, batch_size=1), collected(vlm, samples, many), strict=True):
        np.testing.assert_allclose(one[0].value, four[0].value, atol=EXACT)
        np.testing.assert_allclose(one[1].value, four[1].value, atol=EXACT)
        assert one[2].ids == four[2].ids
        np.testing.assert_allclose(one[4], four[4], atol=EXACT)


def test_the_engine_gives_what_the_plain_model_gives(vlm):
    sample = Sample(picture(3, (90, 60)), "What character is on the plate?")
    read, last, reply, *_ = collected(vlm, [sample], many)[0]
    out = vlm.prefill(vlm.encode(sample.image, prompt(sample.question)), spec=ROWS)
    start, length = vlm.tokenise(prompt(sample.question), 1).image_spans[0]
    rows = np.asarray(out.readouts.rows)[0, 0, 0, start : start + length].reshape(4, 4)
    np.testing.assert_allclose(read.value, rows, atol=EXACT)
    np.testing.assert_allclose(last.value, out.logits[0], atol=EXACT)
    assert reply.text == vlm.decode(out, max_new_tokens=NEW)[0]


def test_no_compilation_in_a_second_pass_over_forty_samples_of_mixed_sizes(vlm):
    """Sizes of images, lengths of questions and the number of samples in the last batch are data, not programs."""
    sizes = [(56, 56), (90, 60), (60, 90), (200, 31), (17, 120), (300, 300), (640, 480), (57, 56)]
    samples = [
        Sample(picture(n, sizes[n % 8]), f"What is {'really ' * (n % 11)}on the {n}th plate?", id=str(n))
        for n in range(40)
    ]
    engine = Engine(vlm, batch_size=4, lengths=LENGTHS)
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = [answer.text for answer in engine.run(samples, "vicrop", base=56, max_new_tokens=NEW)]
        assert compiled, "the listener hears compilations"
        compiled.clear()
        again = [answer.text for answer in engine.run(samples, "vicrop", base=56, max_new_tokens=NEW)]
        assert not compiled
        others = [replace(sample, images=(picture(100 + n, sizes[(n + 3) % 8]),)) for n, sample in enumerate(samples)]
        list(Engine(vlm, batch_size=4, lengths=LENGTHS).run(others, "vicrop", base=56, max_new_tokens=NEW))
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first == again


def test_answers_come_in_the_order_of_the_samples(vlm):
    """The first sample needs the most rounds, so it finishes last."""

    def method(sample):
        for _ in range(6 - int(sample.id)):
            yield Call(len, ("abc",))
        return Answer(sample.id)

    samples = [Sample(picture(n), "?", id=str(n)) for n in range(6)]
    assert [answer.text for answer in answers(vlm, samples, method, batch_size=2)] == list("012345")


def test_samples_are_drawn_as_needed_and_answers_given_as_they_come(vlm):
    """A generator of a million samples costs no more than those in flight."""
    drawn = []

    def source():
        for n in range(10**6):
            drawn.append(n)
            yield Sample(picture(0), "?")

    def method(sample):
        yield Call(len, ("abc",))
        return Answer("x")

    run = Engine(vlm, batch_size=2).run(source(), method)
    for _ in range(5):
        next(run)
    assert len(drawn) < 100


def test_samples_in_flight_are_limited_by_the_bytes_of_their_images(vlm):
    live, peak = set(), []

    def method(sample):
        live.add(sample.id)
        peak.append(len(live))
        yield Call(len, ("abc",))
        live.discard(sample.id)
        return Answer("x")

    samples = [Sample(picture(0, (100, 100)), "?", id=str(n)) for n in range(12)]
    answers(vlm, samples, method, in_flight_bytes=2 * 100 * 100 * 3)
    assert max(peak) == 2
    peak.clear()
    answers(vlm, samples, method)
    assert max(peak) == 12


def test_an_error_goes_to_the_generator_whose_request_it_is_and_nothing_else_stops(vlm):
    def method(sample):
        try:
            text = (yield Generate(sample.image, prompt(sample.question * (500 if sample.id == "long" else 1)))).text
        except UserError as error:
            assert "context" in str(error)
            text = "caught"
        if sample.id == "divides":
            yield Call(lambda: 1 // 0)
        return Answer(text)

    samples = [Sample(picture(n), "What?", id=name) for n, name in enumerate(("fine", "long", "divides", "last"))]
    samples.insert(2, Sample("no/such/file.png", "What?", id="no file"))
    samples.insert(3, Sample(picture(0), "  ", id="no question"))
    samples.append("not a sample")
    found = list(Engine(vlm, batch_size=2, lengths=LENGTHS).run(iter(samples), method))
    assert [answer.sample for answer in found] == ["fine", "long", "no file", "no question", "divides", "last", "6"]
    assert [answer.status for answer in found] == ["ok", "ok", "error", "error", "error", "ok", "error"]
    assert found[1].text == "caught"
    assert isinstance(found[4].error, ZeroDivisionError)
    assert "no/such/file.png" in str(found[2].error) and "empty" in str(found[3].error)
    assert found[2].record()["error"].startswith("ImageError: no/such/file.png")


@pytest.mark.parametrize(
    ("request_of", "match"),
    [
        (
            lambda s: Embed(s.image, "?"),
            "does not serve Embed requests; it serves Generate, Read, Score, YesNo, Continue, Call, Gradient, Match",
        ),
        (lambda s: 3, "does not serve int requests"),
        (lambda s: Generate(s.image, prompt("What?"), model="big"), "unknown model 'big'"),
        (lambda s: Generate(s.image, prompt("What?", 2)), "2 image places, 1 images"),
        (lambda s: Generate(s.image, prompt("What?"), max_new_tokens=0), "max_new_tokens is 0"),
        (lambda s: Generate(s.image, prompt("What?"), max_new_tokens=4000), "context length 2048 of tiny"),
        (lambda s: Generate(s.image, prompt("What?"), temperature=-1.0), "temperature is -1.0"),
        (lambda s: Read(s.image, prompt("What?"), ReadSpec((3,), frozenset({"rows"}))), "layers 0 to 2"),
        (lambda s: Read(s.image, prompt("What?"), ROWS, rows="zebra"), "'zebra' .* is not in the prompt"),
        (lambda s: Read(s.image, prompt("What?"), ROWS, rows=(7, 900)), "900.* are not positions"),
        (lambda s: Read(s.image, prompt("What?"), ROWS, rows="<image>"), "'<image>' names no token of text"),
        (lambda s: Read((), prompt("What?", 0), ROWS, reduce=attention), "image 0 of a request with 0 images"),
        (lambda s: Continue(Reply("", (), 1, State("tiny", np.zeros(1), 1, None, 1)), model="big"), "ran on 'tiny'"),
        (lambda s: Read(s.image, prompt("What?"), ReadSpec(), keep=True), "nothing is left to continue"),
        (lambda s: Generate(s.image, prompt("What?"), keep=True, taps=lean), "does not go with taps"),
        (lambda s: Score(s.image, prompt("What?"), ()), "at least one option"),
    ],
)
def test_a_wrong_request_is_refused_in_one_clear_line(vlm, request_of, match):
    def method(sample):
        yield request_of(sample)

    with pytest.raises(UserError, match=match) as raised:
        jaxvqa.ask(vlm, picture(0), "What?", method)
    assert "\n" not in str(raised.value)


def test_a_question_longer_than_the_context_is_refused(vlm):
    with pytest.raises(UserError, match="context"):
        jaxvqa.ask(vlm, picture(0), "why " * 3000)


def exhausted_above(limit: int, program):
    def run(params, config, batch, *args, **kwargs):
        if len(batch.ids) > limit:
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")
        return program(params, config, batch, *args, **kwargs)

    return run


def test_out_of_memory_halves_the_batch_and_says_so(vlm, monkeypatch):
    samples = [Sample(picture(n), "What?", id=str(n)) for n in range(5)]
    method = jaxvqa.methods.Vanilla(template="vicrop_hf", max_new_tokens=NEW)
    expected = [answer.text for answer in answers(vlm, samples, method, batch_size=2)]
    monkeypatch.setattr(handlers, "_prefill", exhausted_above(2, handlers._prefill))
    engine = Engine(vlm, batch_size=8, lengths=LENGTHS)
    with pytest.warns(UserWarning) as warned:
        found = list(engine.run(samples, method))
    assert [str(w.message) for w in warned] == [
        "out of memory: generate now runs in batches of 4, not 8",
        "out of memory: generate now runs in batches of 2, not 4",
    ]
    assert [answer.text for answer in found] == expected
    assert engine.stats.batches["generate"] == 3


def test_out_of_memory_at_one_row_is_that_rows_error(vlm, monkeypatch):
    monkeypatch.setattr(handlers, "_prefill", exhausted_above(0, handlers._prefill))
    with pytest.raises(JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        jaxvqa.ask(vlm, picture(0), "What?")


def test_two_batches_in_flight_that_run_out_of_memory_halve_the_size_once(vlm, monkeypatch):
    """Both were started at 4 rows; memory runs out only when their results are awaited."""
    generate, waiting = handlers._generate, []

    def late(engine, model, size, *args):
        collect = generate(engine, model, size, *args)

        def fail():
            waiting.append(size)
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        return fail if size > 2 else collect

    monkeypatch.setattr(handlers, "_generate", late)
    samples = [Sample(picture(n), "What?", id=str(n)) for n in range(8)]
    engine = Engine(vlm, batch_size=4, lengths=LENGTHS)
    with pytest.warns(UserWarning) as warned:
        found = list(engine.run(samples, jaxvqa.methods.Vanilla(template="vicrop_hf", max_new_tokens=NEW)))
    assert [str(w.message) for w in warned] == ["out of memory: generate now runs in batches of 2, not 4"]
    assert waiting == [4, 4] and all(answer.error is None for answer in found)


def test_no_sample_begins_while_kept_caches_exceed_their_bytes(vlm):
    """The first keeps a cache through twenty rounds, in which the others would come and go."""
    begun, meanwhile = [], {}

    def method(sample, case):
        begun.append(sample.id)
        if sample.id == "0":
            reply = yield Generate(sample.image, prompt("What?"), max_new_tokens=NEW, keep=True)
            before = len(begun)
            for _ in range(20):
                yield Call(len, (reply.text,))
            meanwhile[case] = len(begun) - before
        yield Call(len, ("abc",))
        return Answer("x")

    samples = [Sample(picture(0), "What?", id=str(n)) for n in range(9)]
    for case, limit in (("bounded", 1), ("free", 1 << 30)):
        begun.clear()
        answers(vlm, samples, functools.partial(method, case=case), batch_size=1, cache_bytes=limit)
    assert meanwhile["bounded"] == 0 < meanwhile["free"]


class Unprintable:
    def __str__(self):
        raise RuntimeError("no words")


def test_a_result_that_cannot_be_logged_is_its_own_requests_error_and_no_other(vlm):
    received = []

    def method(sample):
        received.append((sample.id, (yield Call(make, (sample.id,)))))
        return Answer("fine")

    def make(name):
        return Unprintable() if name == "1" else name

    found = list(Engine(vlm, batch_size=4).run([Sample(picture(0), "?", id=str(n)) for n in range(3)], method))
    assert [answer.text for answer in found] == ["fine", "", "fine"]
    assert received == [("0", "0"), ("2", "2")]
    assert str(found[1].error) == "no words" and found[1].cost.passes == {}


def test_shared_results_put_twice_count_once():
    shared = engine_module._Shared(1000)
    for _ in range(3):
        shared.put("image", np.zeros(100, np.uint8))
        assert shared.bytes == 100
    shared.put("other", np.zeros(950, np.uint8))
    assert list(shared.items) == ["other"] and shared.bytes == 950


@pytest.mark.parametrize("lengths", [(), (128, 64), (64, 64), (0, 64)])
def test_lengths_that_do_not_ascend_are_refused(vlm, lengths):
    with pytest.raises(UserError, match="expected at least one, ascending"):
        Engine(vlm, lengths=lengths)


def test_a_sampled_answer_depends_on_its_sample_and_request_alone(vlm):
    def method(sample):
        request = Generate(sample.image, prompt("What?"), max_new_tokens=NEW, temperature=2.0)
        first, second = yield [request, request]
        return Answer(f"{first.ids} {second.ids}")

    samples = [Sample(picture(0), "What?", id=name) for name in "abcde"]
    texts = [answer.text for answer in answers(vlm, samples, method)]
    assert [answer.text for answer in answers(vlm, samples[::-1], method)] == texts[::-1]
    assert answers(vlm, samples[3:4], method)[0].text == texts[3]
    assert len(set(texts)) == 5, "another sample, another key"
    assert all(text.split(") (")[0].strip("()") != text.split(") (")[1].strip("()") for text in texts), (
        "another request"
    )
    assert [answer.text for answer in answers(vlm, samples, method, seed=1)] != texts


def test_scores_are_the_mean_log_likelihood_of_each_reply(vlm):
    sample, options = Sample(picture(5), "What colour?"), ("red", "a dark blue", "x")
    [scores] = collected(vlm, [sample], lambda s: Score(s.image, prompt(s.question), options))
    encoded = vlm.encode(sample.image, prompt(sample.question))
    for option, score in zip(options, scores, strict=True):
        total, ids = 0.0, encoded.tokens.ids
        for token in (reply := vlm.reply_ids(option)):
            one = replace(encoded, tokens=replace(encoded.tokens, ids=ids))
            total += jax.nn.log_softmax(vlm.prefill(jaxvqa.collate([one], length=128)).logits[0])[token]
            ids = np.append(ids, np.int32(token))
        np.testing.assert_allclose(score, total / len(reply), atol=1e-4)
        assert reply[-1] == vlm.eos_ids[0]
        assert vlm.tokenizer.decode(reply[:-1]) == f" {option}"


def test_yes_no_is_the_confidence_of_the_two_words(vlm):
    sample = Sample(picture(5), "Is it red?")

    def requests(s):
        p = prompt(s.question)
        return [YesNo(s.image, p), Read(s.image, p, ReadSpec(), reduce=logits)]

    [(confidence, last)] = collected(vlm, [sample], requests)
    yes, no = (last.value[vlm.reply_ids(word)[0]] for word in ("Yes", "No"))
    np.testing.assert_allclose(confidence, np.tanh((yes - no) / 2), atol=EXACT)


def test_words_that_begin_alike_are_no_yes_and_no(vlm, monkeypatch):
    monkeypatch.setattr(type(vlm), "reply_ids", lambda self, text: [5, 6, 7])
    with pytest.raises(JaxVQAError, match=r"tiny: its tokenizer \(.*\) begins Yes and No with the same token 5"):
        collected(vlm, [Sample(picture(0), "?")], lambda s: YesNo(s.image, prompt("Is it?")))


@pytest.mark.parametrize(
    ("said", "stop", "text", "left"),
    [
        ("\nfoo", ("\n",), "", ""),
        ("foo\nbar", ("\n",), "foo", "foo"),
        ("foo\n", ("\n",), "foo", "foo"),
        (" foo\n", ("\n", "bar"), "foo", " foo"),
        ("foo bar foo", ("foo bar", "bar"), "", ""),
        ("foo", ("\n",), "foo", "foo"),
        ("", ("\n",), "", ""),
    ],
)
def test_a_stop_string_cuts_text_and_tokens_wherever_it_stands(vlm, said, stop, text, left):
    ids = vlm.tokenizer.encode(said, add_special_tokens=False)
    row = handlers._Said(np.array([1, 7], np.int32), (), (0, 0), stop)
    reply = handlers._reply("tiny", vlm, row, [*ids, vlm.eos_ids[0]], handlers.Kept(None, None, None, None, None))
    assert reply.text == text
    assert vlm.tokenizer.decode(reply.ids) == left
    assert reply.state.ids.tolist() == [1, 7, *reply.ids]
    assert reply.state.cached == min(len(ids) + 2, len(reply.ids) + 2)
    assert reply.generated == len(ids) + 1


def test_costs_count_what_a_stop_string_cut(vlm):
    def method(sample):
        full = yield Generate(sample.image, prompt("What?"), max_new_tokens=NEW)
        stop = (vlm.tokenizer.decode(full.ids[1:2]),) if sample.id == "cut" else ()
        reply = yield Generate(sample.image, prompt("What?"), max_new_tokens=NEW, stop=stop)
        return Answer(str(len(reply.ids)))

    cut, whole = answers(vlm, [Sample(picture(0), "?", id=name) for name in ("cut", "whole")], method)
    assert int(cut.text) < int(whole.text) and cut.cost == whole.cost


def test_a_further_turn_is_answered_as_the_whole_conversation(vlm):
    """And it runs only the tokens that the cache does not hold."""
    first, second, found = "What is it?", "And its colour?", {}

    def method(sample):
        reply = yield Generate(sample.image, prompt(first), max_new_tokens=NEW, keep=True)
        whole = render("vicrop_hf", [first, reply.text, second])
        again = yield Continue(reply, whole, max_new_tokens=NEW, keep=True)
        third = yield Continue(
            again, render("vicrop_hf", [first, reply.text, second, again.text, "Why?"]), max_new_tokens=NEW
        )
        found[sample.id] = [again, third, (yield Generate(sample.image, whole, max_new_tokens=NEW))]
        return Answer(third.text)

    samples = [Sample(picture(n), "?", id=str(n)) for n in range(3)]
    engine = Engine(vlm, batch_size=4, lengths=LENGTHS)
    costs = [answer.cost for answer in engine.run(samples, method)]
    for again, third, direct in found.values():
        assert again.ids == direct.ids
        assert third.ids
    assert engine.stats.rows["continue"] == 6
    assert engine.stats.rows["prefix"] == 3, "the two prompts about an image begin alike"
    assert costs[0].passes == {"generate": 2, "continue": 2}


def test_a_further_turn_counts_with_the_reply_that_it_continues(vlm):
    def method(sample):
        yield YesNo(sample.image, prompt(sample.question))
        reply = yield Generate(sample.image, prompt(sample.question), max_new_tokens=NEW, keep=True)
        said = yield Continue(reply, render("vicrop_hf", [sample.question, reply.text, "Why?"]), max_new_tokens=NEW)
        return Answer(said.text)

    (answer,) = answers(vlm, [Sample(picture(0), "What?")], method)
    assert answer.forward_passes == Passes(search=1, final=2)


def test_a_reply_with_a_stop_string_is_cut_there_and_can_be_continued(vlm):
    full, found = {}, {}

    def method(sample):
        reply = full[sample.id] = yield Generate(sample.image, prompt("What is it?"), max_new_tokens=NEW)
        mark = vlm.text(reply.ids[3:4])
        cut = yield Generate(sample.image, prompt("What is it?"), max_new_tokens=NEW, stop=(mark,), keep=True)
        whole = render("vicrop_hf", ["What is it?", cut.text, "Why?"])
        again = yield [Continue(cut, whole, max_new_tokens=NEW), Generate(sample.image, whole, max_new_tokens=NEW)]
        found[sample.id] = cut, mark, again
        return Answer(cut.text)

    answers(vlm, [Sample(picture(n), "?", id=str(n)) for n in range(2)], method)
    for name, (cut, mark, (continued, direct)) in found.items():
        assert mark and mark not in cut.text
        assert full[name].text.startswith(cut.text) and len(cut.ids) <= 3
        assert continued.ids == direct.ids


def test_a_stopped_reading_goes_on_to_the_answer_of_the_whole_pass(vlm):
    spec, found = replace(ROWS, stop=2), []

    def method(sample):
        reading = yield Read(sample.image, prompt(sample.question), spec, reduce=attention, keep=True)
        found.append((yield [
            Continue(reading, max_new_tokens=NEW), Generate(sample.image, prompt(sample.question), max_new_tokens=NEW)
        ]))  # fmt: skip
        return Answer("x")

    samples = [Sample(picture(n), f"What is {'so ' * n}red?", id=str(n)) for n in range(3)]
    found_costs = [answer.cost for answer in answers(vlm, samples, method)]
    assert all(continued.ids == direct.ids for continued, direct in found)
    plain = answers(vlm, samples, jaxvqa.methods.Vanilla(template="vicrop_hf", max_new_tokens=NEW))
    # Reading the lower layers and continuing through the upper ones costs what one pass costs.
    for both, one in zip(found_costs, plain, strict=True):
        assert both.flops > 1.5 * one.cost.flops


def test_readings_without_a_reduction_give_the_readouts(vlm):
    sample = Sample(picture(1), "What is it?")
    spec = ReadSpec(layers=(0, 1), read=frozenset({"rows", "values", "hidden"}), heads="all")
    [reading] = collected(vlm, [sample], lambda s: Read(s.image, prompt(s.question), spec, rows="What is"))
    encoded = vlm.encode(sample.image, prompt(sample.question))
    wanted = encoded.tokens.span("What is")
    out = vlm.prefill(encoded, spec=spec, taps=Taps(rows=jnp.asarray(wanted)[None]))
    count = len(encoded.tokens.ids)
    np.testing.assert_allclose(
        reading.value.rows[:, :, : len(wanted), :count], out.readouts.rows[:, 0, :, :, :count], atol=EXACT
    )
    np.testing.assert_allclose(reading.value.values[:, :count], out.readouts.values[:, 0, :count], atol=EXACT)
    np.testing.assert_allclose(reading.value.hidden[:, :count], out.readouts.hidden[:, 0, :count], atol=EXACT)


def question_rows(row, weight):
    """Weighted mean of the wanted rows' attention, and how many there are."""
    mean = jnp.where(row.wanted[:, None], row.readouts.rows[0], 0).sum(0) / row.wanted.sum()
    return row.on_image(mean * weight), row.wanted.sum()


def test_rows_of_the_question_are_those_of_the_users_words(vlm):
    samples = [Sample(picture(n), f"What {'big ' * n}thing is it?", id=str(n)) for n in range(3)]

    def read(s):
        return Read(s.image, prompt(s.question), ROWS, rows="question", reduce=question_rows, args=(2.0,))

    for sample, reading in zip(samples, collected(vlm, samples, read), strict=True):
        encoded = vlm.encode(sample.image, prompt(sample.question))
        wanted = encoded.tokens.span(sample.question)
        out = vlm.prefill(encoded, spec=ROWS, taps=Taps(rows=jnp.asarray(wanted)[None]))
        start, _ = encoded.tokens.image_spans[0]
        expected = 2 * np.asarray(out.readouts.rows)[0, 0].mean(0)[start : start + 16].reshape(4, 4)
        grid, count = reading.value
        assert count == len(wanted)
        np.testing.assert_allclose(grid, expected, atol=EXACT)


def lean(row, mask, strength):
    """A key bias log λ·M on the cells of the first image (M on the token grid)."""
    bias = jnp.zeros(row.keys).at[row.cells[0]].set(strength * mask.reshape(-1))
    return Taps((Edit(Tap(key_bias=bias[None, None]), start=0, stop=3),))


def test_edits_are_built_per_sample_and_hold_while_decoding(vlm):
    """The builder sees one row; the result is that of the same edit made by hand for the plain model."""
    rng = np.random.default_rng(0)
    samples = [Sample(picture(n), f"What {'big ' * n}thing is it?", id=str(n)) for n in range(3)]
    masks = {sample.id: rng.random((4, 4)).astype(np.float32) for sample in samples}

    def requests(sample, strength=6.0):
        args = (masks[sample.id], np.float32(strength))
        return Generate(sample.image, prompt(sample.question), max_new_tokens=NEW, taps=lean, args=args)

    plain = collected(vlm, samples, lambda s: Generate(s.image, prompt(s.question), max_new_tokens=NEW))
    zero = collected(vlm, samples, lambda s: requests(s, 0.0))
    assert [r.ids for r in zero] == [r.ids for r in plain]
    biased = collected(vlm, samples, requests)
    assert [r.ids for r in biased] != [r.ids for r in plain]
    for sample, reply in zip(samples, biased, strict=True):
        encoded = vlm.encode(sample.image, prompt(sample.question))
        ids = encoded.tokens.ids
        start, _ = encoded.tokens.image_spans[0]
        for token in reply.ids:  # teacher forcing: the edit over the whole sequence, prompt and answer
            bias = np.zeros((1, 1, 1, 128), np.float32)
            bias[..., start : start + 16] = 6.0 * masks[sample.id].reshape(-1)
            one = replace(encoded, tokens=replace(encoded.tokens, ids=ids))
            out = vlm.prefill(
                jaxvqa.collate([one], length=128), taps=Taps((Edit(Tap(key_bias=jnp.asarray(bias)), start=0, stop=3),))
            )
            assert int(out.logits[0].argmax()) == token
            ids = np.append(ids, np.int32(token))


def doubling(params, cut, stream, carry):
    return replace(stream, hidden=stream.hidden * params), carry, ()


def test_plugins_run_in_prefill_and_decode(vlm):
    sample = Sample(picture(2), "What is it?")
    texts = []
    for factor in (1.0, -3.0):
        plugin = Plugin(doubling, cuts=(1,), params=jnp.float32(factor))
        request = Generate(sample.image, prompt(sample.question), max_new_tokens=NEW, plugin=plugin)
        texts.append(collected(vlm, [sample], lambda s, request=request: request)[0].ids)
    plain = collected(vlm, [sample], lambda s: Generate(s.image, prompt(s.question), max_new_tokens=NEW))[0].ids
    assert texts[0] == plain
    assert texts[1] != plain


def test_calls_run_on_the_host_and_return_what_the_function_returns(vlm):
    def method(sample):
        size, thread = yield [Call(lambda image: image.size, (sample.image,)), Call(threading.current_thread)]
        return Answer(f"{size} {thread is threading.main_thread()}")

    assert answers(vlm, [Sample(picture(0, (70, 30)), "?")], method)[0].text == "(70, 30) True"


def test_an_image_is_encoded_once_whoever_asks_for_it(vlm):
    """Five samples with two pictures, three requests each: two encodings; none when the engine is asked again."""
    samples = [Sample(picture(n % 2), "What?", id=str(n)) for n in range(5)]
    engine = Engine(vlm, batch_size=4, lengths=LENGTHS)
    method = jaxvqa.methods.Vicrop(base=200, max_new_tokens=NEW)  # the crop is the whole image: the same picture again
    first = list(engine.run(samples, method))
    assert engine.stats.rows["images"] == 2
    assert first[0].cost.images == 1, "the crop is the image itself"
    again = list(engine.run(samples, method))
    assert engine.stats.rows["images"] == 2
    assert [a.text for a in again] == [a.text for a in first]
    forgetful = Engine(vlm, batch_size=4, lengths=LENGTHS, feature_bytes=0)
    assert [a.text for a in forgetful.run(samples, method)] == [a.text for a in first]
    assert forgetful.stats.rows["images"] > 2
    assert forgetful.shared[handlers.IMAGES].bytes == 0


def test_passes_and_costs_are_counted_by_the_engine(vlm):
    answer = answers(
        vlm, [Sample(picture(0, (300, 200)), "What is it?")], jaxvqa.methods.Vicrop(base=56, max_new_tokens=NEW)
    )[0]
    assert answer.forward_passes == Passes(search=2, final=1)
    assert answer.cost.passes == {"read": 2, "generate": 1}
    assert (answer.cost.images, answer.cost.tokens) == (2, NEW)
    family = handlers.family_of(vlm.config)
    lower = replace(vlm.config, decoder=replace(vlm.config.decoder, num_layers=2))
    expected = 2 * family.image_flops(vlm.config)
    for question, images in (("What is it?", 1), (GENERAL_QUESTION, 1), ("What is it?", 2)):
        count = len(vlm.tokenise(prompt(question, images), images).ids)
        if images == 1:
            expected += family.flops(lower, count, (count + 1) // 2, logits=0)
        else:
            expected += family.flops(vlm.config, count, (count + 1) // 2)
            expected += family.flops(vlm.config, NEW - 1, count + (NEW - 1) // 2, logits=NEW - 1)
    assert answer.cost.flops == expected
    vanilla = answers(vlm, [Sample(picture(0), "What is it?")], jaxvqa.methods.Vanilla(max_new_tokens=NEW))[0]
    assert vanilla.forward_passes == Passes(search=0, final=1)


def test_the_engines_flops_cover_those_of_scored_options(vlm):
    sample, engine = Sample(picture(0), "What?"), Engine(vlm, batch_size=1, lengths=LENGTHS)

    def method(sample):
        yield Score(sample.image, prompt("What?"), ("red", "a dark blue plate", "x"))
        return Answer("x")

    cost = next(engine.run([sample], method)).cost
    family, config, cut = handlers.family_of(vlm.config), vlm.config, LENGTHS[0]
    slots = 4 * handlers.bucket(len(vlm.reply_ids("a dark blue plate")), handlers.SHORT, "an option")
    rest = handlers.bucket(len(vlm.tokenise(prompt("What?"), 1).ids) - cut, handlers.REST, "the prompt")
    lower = replace(config, decoder=replace(config.decoder, num_layers=2))
    prefix = family.flops(lower, cut, cut // 2, logits=0) + 2 * cut * 32 * 2 * 32  # of the last layer keys and values
    prompt_flops = family.flops(config, rest, cut + rest // 2)
    options = family.flops(config, slots, cut + rest + slots, logits=slots)
    assert engine.stats.flops == family.image_flops(config) + prefix + prompt_flops + options > cost.flops


def test_several_models_answer_side_by_side(vlm, tmp_path):
    other = jaxvqa.load(tiny_llava(tmp_path / "other", seed=1, text_layers=2, vision_layers=2), dtype="float32")

    def method(sample):
        first, second = yield [
            Generate(sample.image, prompt("What?"), max_new_tokens=NEW, model=m) for m in (None, "other")
        ]
        return Answer(first.text + "|" + second.text)

    engine = Engine({"main": vlm, "other": other}, batch_size=2, lengths=LENGTHS)
    text = next(engine.run([Sample(picture(0), "What?")], method)).text
    alone = [
        jaxvqa.ask(m, picture(0), "What?", jaxvqa.methods.Vanilla(template="vicrop_hf", max_new_tokens=NEW)).text
        for m in (vlm, other)
    ]
    assert text.split("|") == alone


def test_not_finite_logits_are_an_error_not_an_answer(vlm):
    params = vlm.params
    try:
        vlm.params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
        for request_of in (
            lambda s: Generate(s.image, prompt("What?"), max_new_tokens=NEW),
            lambda s: Read(s.image, prompt("What?"), ROWS, reduce=attention),
            lambda s: YesNo(s.image, prompt("What?")),
            lambda s: Score(s.image, prompt("What?"), ("red", "blue")),
        ):

            def method(sample, request_of=request_of):
                yield request_of(sample)
                return Answer("x")

            with pytest.raises(JaxVQAError, match="not finite; check the weights"):
                jaxvqa.ask(vlm, picture(0), "What?", method)
    finally:
        vlm.params = params


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (lambda sample: None, "is no generator function"),
        ("vicropp", "unknown method 'vicropp'; did you mean vicrop"),
    ],
)
def test_what_is_no_method_is_refused(vlm, method, match):
    with pytest.raises(UserError, match=match):
        jaxvqa.ask(vlm, picture(0), "What?", method)


def test_a_method_that_returns_no_answer_is_told_what_to_return(vlm):
    def method(sample):
        yield Call(len, ("abc",))
        return 3

    with pytest.raises(UserError, match=r"returned int; expected jaxvqa.Answer"):
        jaxvqa.ask(vlm, picture(0), "What?", method)


def test_ask_many_takes_a_users_generator_and_its_options(vlm):
    def method(sample, word="?"):
        reply = yield Generate(sample.image, prompt(sample.question + word), max_new_tokens=NEW)
        return Answer(reply.text, boxes=[(0, 0, 10, 10)])

    samples = [Sample(picture(n), "What?") for n in range(3)]
    found = list(jaxvqa.ask_many(vlm, samples, method, batch_size=2, word="!"))
    assert [answer.sample for answer in found] == ["0", "1", "2"]
    assert all(answer.method == "method" and answer.options == {"word": "!"} for answer in found)
    assert found[0].boxes.shape == (1, 4)
    assert "What?!" in found[0].log[0].prompt
