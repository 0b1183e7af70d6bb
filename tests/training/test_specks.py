import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvqa import decoder
from jaxvqa.attention import NEVER
from jaxvqa.models import llava
from jaxvqa.prompts import render
from jaxvqa.specks import CHARACTERS, COLORS, SHAPES, crop_around, scene
from jaxvqa.specks.questions import SHORT, read_question
from jaxvqa.specks.views import view_boxes
from jaxvqa.training import specks
from jaxvqa.training.optimizer import apply, optimizer
from tests.training.small import CONFIG, TOKENIZER, WORDS, initialised

GRID = 16
PACKER = specks.Packer(TOKENIZER, GRID * GRID, 520)


def views_of(count):
    made = [scene(8, n) for n in range(count)]
    return [(s, view_boxes(s)[n % 4]) for n, s in enumerate(made)]


def cells_of(pairs):
    return specks.Cells(*map(np.stack, zip(*(specks.cells(s.plates, box, GRID) for s, box in pairs), strict=True)))


def test_cells_say_what_lies_in_them():
    made = scene(8, 0)
    plate = made.plates[0]
    view = crop_around(plate, 200)
    color, shape, character, box, weight, ink = specks.cells(made.plates, view, 16)
    x, y = ((c - v) * 16 / 200 for c, v in zip(plate.center, view, strict=False))
    cell = int(y) * 16 + int(x)
    assert list(COLORS)[color[cell]] == plate.color and SHAPES[shape[cell]] == plate.shape
    x, y = ((plate.character_box[i] + plate.character_box[i + 2]) / 2 for i in range(2))
    cell = int((y - view[1]) * 16 / 200) * 16 + int((x - view[0]) * 16 / 200)
    assert CHARACTERS[character[cell]] == plate.character and ink[cell] > 0
    assert (box[color == len(COLORS)] == -1).all() and (weight[(color == len(COLORS))] <= 0.04).all()


def test_no_character_is_asked_of_a_whole_scene():
    made = scene(8, 0)
    _, _, character, _, _, ink = specks.cells(made.plates, made.box, 16)
    assert (character == -1).all() and (ink == 0).all()


def test_a_packed_question_is_the_prompt_of_the_methods_and_sees_only_its_own():
    made = scene(8, 0)
    question = read_question(made.plates[0])
    for template, joint in ((specks.VICUNA, "\n"), (specks.VICROP, " ")):
        ask = specks.Ask(specks.turn(template, question.text + joint + SHORT), question.answer, "read")
        row = PACKER.row([specks.head(template), None], [ask, ask])
        ids, order, segment = (row[name] for name in ("ids", "order", "segment"))
        target, weight, kind = (row[name] for name in ("target", "weight", "kind"))
        valid = order < NEVER
        first = ids[valid & (segment < 2)]
        chunks = render(template, question.text, num_images=1, ending="short").chunks
        expected = [TOKENIZER.token_to_id("<s>")]
        for text in chunks_as_text(chunks):
            expected += (
                [CONFIG.image_token_id] * GRID**2
                if text is None
                else TOKENIZER.encode(text, add_special_tokens=False).ids
            )
        answer = TOKENIZER.encode(f" {question.answer}", add_special_tokens=False).ids
        assert first.tolist() == expected + answer + [TOKENIZER.token_to_id("</s>")]
        assert order[segment == 1].tolist() == order[segment == 2].tolist()
        assert row["position"][segment == 1][0] == (segment[valid] == 0).sum()
        asked = np.flatnonzero(kind >= 0)
        assert target[asked].tolist() == answer * 2 and (weight[asked] == 1).all()


def chunks_as_text(chunks):
    """Adjacent text joined, as it is tokenised; None for an image."""
    joined = []
    for chunk in chunks:
        text = chunk if isinstance(chunk, str) else None
        if joined and joined[-1] is not None and text is not None:
            joined[-1] += text
        else:
            joined.append(text)
    return joined


def test_questions_that_do_not_fit_are_left_out_whole():
    ask = specks.Ask(" word" * 100, "K", "read")
    row = PACKER.row(["prefix", None], [ask, ask, ask, specks.Ask(" a", "K", "read")])
    assert set(row["segment"][row["order"] < NEVER].tolist()) == {0, 1, 2, 4}


def test_packing_does_not_change_what_a_question_is_answered():
    params = initialised().model
    asks = [specks.Ask(f"\nWhat color is the {s}?", "red", "color") for s in SHAPES]
    features = jax.random.normal(jax.random.key(1), (1, 1, GRID**2, CONFIG.decoder.width))

    @jax.jit
    def logits(rows):
        embedded = llava.embed(params, CONFIG, rows.ids, features[:, 0], rows.patch)
        stream = decoder.Stream(embedded, rows.position, rows.order, rows.segment)
        hidden, *_ = decoder.run(params.decoder, CONFIG.decoder, stream)
        return decoder.finish(params.decoder, CONFIG.decoder, hidden)

    def rows(asks):
        return jax.tree.map(jnp.asarray, PACKER.stack([PACKER.row(["a", None], asks)], 64))

    together = rows(asks)
    packed = logits(together)[0]
    for n, ask in enumerate(asks, 1):
        alone = rows([ask])
        np.testing.assert_allclose(
            packed[together.segment[0] == n], logits(alone)[0][alone.segment[0] == 1], rtol=1e-4, atol=1e-4
        )


def test_left_out_image_tokens_keep_their_places_and_are_stood_for():
    keep = np.zeros(GRID**2)
    keep[[3, 200]] = 1.0, 7.0
    row = PACKER.row(["a", None, "b"], [specks.Ask(" c", "K", "read")], keep=keep)
    whole = PACKER.row(["a", None, "b"], [specks.Ask(" c", "K", "read")])
    mine = np.flatnonzero(row["patch"] >= 0)
    assert row["patch"][mine].tolist() == [3, 200]
    np.testing.assert_allclose(row["bias"][mine], [0, np.log(7)], rtol=1e-6)
    for name in ("position", "order"):
        assert row[name][row["segment"] == 1].tolist() == whole[name][whole["segment"] == 1].tolist()
        assert row[name][mine].tolist() == whole[name][np.isin(whole["patch"], [3, 200])].tolist()


def test_a_hidden_question_sees_the_images_from_its_last_token_on():
    asks = [specks.Ask(" is it red:", "K", "read")] * 10
    row = PACKER.row(["a", None, "b"], asks, hide=np.random.default_rng(0))
    image = row["order"][row["patch"] >= 0].min()
    hidden = 0
    for n in range(1, 11):
        order = row["order"][row["segment"] == n]
        assert (np.diff(order) > 0).all() and (order[-3:] > image).all()  # the last prompt token, the answer, its end
        assert (order[:-3] < image).all() or (order[:-3] > image).all()
        hidden += order[0] < image
    assert 3 <= hidden <= 9


def test_a_question_knows_which_image_tokens_show_its_target():
    made = scene(8, 0)
    question = read_question(made.plates[0])
    mine = specks.target_cells(question, made.box)
    color = specks.cells(made.plates, made.box, GRID)[0]
    assert mine.any() and {list(COLORS)[c] for c in color[mine]} == {made.plates[0].color}
    ask = specks.Ask(specks.turn(specks.VICROP, question.text), "K", "read", cells=mine)
    row = PACKER.row(["", None], [ask])
    assert row["patch"][row["look"][0]].tolist() == np.flatnonzero(mine).tolist()
    assert row["target"][row["last"][0]] == TOKENIZER.encode(" K", add_special_tokens=False).ids[0]


def test_what_is_visible_decides_how_a_missed_plate_weighs():
    rng, made = np.random.default_rng(0), scene(8, 1)
    crop = crop_around(made.plates[0], 150)
    found = [
        ask for _ in range(40) for ask in specks.double(rng, made, crop)[1] if ask.prompt.find("What character") > 0
    ]
    assert {a.weight for a in found if a.kind == "read2"} == {1.0}
    assert {a.weight for a in found if a.kind == "blind"} == {0.1}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "single", "double", "stepwise", "few_shot"])
def test_three_steps_of_each_form_lower_its_loss(form):
    params, pairs = initialised(), views_of(4)
    images = np.stack([s.view(box) for s, box in pairs])
    target, rows = cells_of(pairs), None
    if form != "dense":
        make = getattr(specks, form)
        made = [
            make(np.random.default_rng(n), s, *([] if form == "few_shot" else [box]))
            for n, (s, box) in enumerate(pairs)
        ]
        packer = specks.Packer(TOKENIZER, GRID * GRID, 768)
        rows = packer.stack([packer.row(*row) for row in made], 300)
        rows = jax.tree.map(jnp.asarray, rows)
    tx = optimizer(params)

    def loss_of(trained):
        features = llava.encode_images(trained.model, CONFIG, specks.normalise(images))
        if rows is None:
            return specks.dense_loss(trained, features, target, WORDS)
        both = jnp.stack([features, features], 1)
        return specks.answer_loss(trained, CONFIG, both, rows, WORDS, 0.1, 1)

    @jax.jit
    def step(params, opt_state):
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return apply(params, updates, lambda path: 3e-3), opt_state, loss, metrics

    opt_state, losses = tx.init(params), []
    for _ in range(3):
        params, opt_state, loss, metrics = step(params, opt_state)
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0], losses
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(metrics))
