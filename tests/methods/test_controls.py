"""Each control differs from the method that it controls for in one thing, and in that thing as it says."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small import cells_from
from tiny import tiny_llava

import jaxvqa
from jaxvqa import methods
from jaxvqa.engine import Engine
from jaxvqa.errors import UserError
from jaxvqa.geometry import covers, for_pad
from jaxvqa.methods.cof import reweight
from jaxvqa.methods.controls import (
    Blind,
    MaskReweight,
    OtherMap,
    RandomCrop,
    RivalCrop,
    TruthCrop,
    TruthMap,
    side_around,
    square_around,
)
from jaxvqa.methods.focus import Focus
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import MAPS, Vicrop
from jaxvqa.requests import Gradient, Reading, Reply, Row
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps
from tests.methods.driven import FACTS, PICTURE, SIZE, drive, picture, sample_of

GRID = (24, 24)
VICROP = methods.bind(Vicrop(), FACTS)
VANILLA = methods.bind(Vanilla(), FACTS)
FLAT = np.ones(GRID, np.float32)


def spike(row, column):
    grid = np.full(GRID, 0.01, np.float32)
    grid[row, column] = 1.0
    return grid


def searched(method, sample, question_map, size=SIZE):
    """`drive` through ViCrop's search, against made-up maps."""
    view = for_pad(*size, 336, GRID)
    return drive(method, sample, [Reading(question_map, (view,)), Reading(FLAT, (view,))], Reply("42", (1,)))


KINDS = [*MAPS, *(f"{name}_high" for name in MAPS)]


def of_kind(maps, sample, question_map):
    """ViCrop with other maps, in tiles of 350 x 250 where they are "_high", and the results of its search."""
    like = methods.bind(Vicrop(maps, tile=300), FACTS)
    rows, columns, size = like.split(sample.image.size)
    kind, view = maps.removesuffix("_high"), for_pad(*size, 336, GRID)
    found = question_map if kind != "pure_grad" else np.kron(question_map, np.ones((14, 14), np.float32))
    one = [Reading(found, (view,))] + [Reading(np.ones_like(found), (view,))] * (kind != "grad_att")
    return like, one * (rows * columns)


def box_in(size):
    """Boxes of 20 to 150 pixels."""
    return st.tuples(
        st.integers(0, size[0] - 150), st.integers(0, size[1] - 150), st.integers(20, 150), st.integers(20, 150)
    ).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


boxes = box_in(SIZE)


# ---- blind ----


@pytest.mark.parametrize("question", ["What?", "<image>\nWhat?"])
def test_blind_asks_vanillas_question_with_its_ending_and_no_image(question):
    (asked,), answer = drive(Blind(VANILLA), sample_of(question=question), Reply("42", ()))
    (seeing,), _ = drive(VANILLA, sample_of(), Reply("42", ()))
    assert asked.images == () and answer.text == "42"
    assert asked.prompt.text == seeing.prompt.text.replace("<image>\n", "")
    assert asked.max_new_tokens == seeing.max_new_tokens


# ---- random crop ----


@given(seed=st.integers(0, 999), width=st.sampled_from([400, 672, 1000]), height=st.sampled_from([336, 672, 900]))
def test_a_random_crop_has_vicrops_size_and_lies_inside(seed, width, height):
    grid = np.random.default_rng(seed).random(GRID).astype(np.float32)
    sample = sample_of(picture((width, height)), id=str(seed))
    theirs = searched(VICROP, sample, grid, (width, height))[1].boxes[0]
    mine = searched(RandomCrop(VICROP), sample, grid, (width, height))[1].boxes[0]
    np.testing.assert_allclose(mine[2:] - mine[:2], theirs[2:] - theirs[:2], atol=1e-3)
    assert (mine >= 0).all() and mine[2] <= width + 1e-3 and mine[3] <= height + 1e-3
    np.testing.assert_array_equal(mine, searched(RandomCrop(VICROP), sample, grid, (width, height))[1].boxes[0])


def test_random_crops_differ_between_samples_and_seeds():
    found = {
        tuple(searched(RandomCrop(VICROP, seed), sample_of(id=name), spike(3, 3))[1].boxes[0])
        for name in "ab"
        for seed in (0, 1)
    }
    assert len(found) == 4


@pytest.mark.parametrize("maps", KINDS)
def test_a_random_crop_has_the_size_of_every_kind_of_maps_crop(maps):
    sample = sample_of()
    like, results = of_kind(maps, sample, spike(12, 20))
    (search, _), theirs = drive(like, sample, results, Reply("42", ()))
    (asked, final), mine = drive(RandomCrop(like), sample, results, Reply("42", ()))
    assert [request.prompt for request in asked] == [request.prompt for request in search]
    width, height = np.ptp(theirs.boxes.reshape(2, 2), axis=0)
    np.testing.assert_allclose(np.ptp(mine.boxes.reshape(2, 2), axis=0), (width, height), atol=1e-3)
    assert (mine.boxes != theirs.boxes).any() and final.images[0] is PICTURE


# ---- crops of the ground truth and of a rival ----


@given(
    x=st.floats(0, 600), y=st.floats(0, 400), w=st.floats(1, 300), h=st.floats(1, 300), base=st.sampled_from([100, 336])
)
def test_the_square_around_a_box_holds_it_and_stays_in_the_image(x, y, w, h, base):
    box = (x, y, min(x + w, 700), min(y + h, 500))
    side = side_around(box, base)
    x1, y1, x2, y2 = square_around(box, side, SIZE)
    assert 0 <= x1 <= box[0] + 1e-6 and 0 <= y1 <= box[1] + 1e-6
    assert box[2] <= x2 + 1e-6 <= 700 + 2e-6 and box[3] <= y2 + 1e-6 <= 500 + 2e-6
    assert x2 - x1 == pytest.approx(max(base, box[2] - x, box[3] - y))


@given(several=st.lists(boxes, min_size=1, max_size=3))
def test_the_truth_crop_holds_all_boxes_and_is_shown_after_the_image(several):
    (asked,), answer = drive(TruthCrop(VICROP), sample_of(boxes=tuple(several)), Reply("42", ()))
    x1, y1, x2, y2 = answer.boxes[0]
    assert all(x1 <= b[0] and y1 <= b[1] and x2 >= b[2] and y2 >= b[3] for b in several)
    whole, crop = asked.images
    assert whole is PICTURE and crop.size == (round(x2) - round(x1), round(y2) - round(y1))
    assert asked.prompt == VICROP.prompt("What?", 2) and asked.max_new_tokens == VICROP.max_new_tokens


def test_the_truth_crop_alone_is_shown_to_vanilla():
    further = picture((40, 30))
    sample = sample_of((PICTURE, further), boxes=((100, 100, 150, 150),))
    (asked,), answer = drive(TruthCrop(VICROP, "crop", VANILLA), sample, Reply("42", ()))
    assert [image.size for image in asked.images] == [(336, 336), (40, 30)] and asked.images[1] is further
    np.testing.assert_array_equal(asked.images[0], np.asarray(PICTURE)[:336, :336])
    (plain,), _ = drive(VANILLA, sample, Reply("42", ()))
    assert asked.prompt == plain.prompt and answer.boxes.tolist() == [[0, 0, 336, 336]]


@given(target=boxes, rivals=st.lists(boxes, min_size=1, max_size=5), base=st.sampled_from([60, 120]), id=st.text("ab"))
def test_a_rivals_crop_has_the_truth_crops_size_and_shows_less_than_half_of_the_target(target, rivals, base, id):
    vicrop = Vicrop(layer=14, base=base)
    sample = sample_of(id=id, boxes=(target,), rivals=tuple(rivals))
    (expected,), truth = drive(TruthCrop(vicrop), sample, Reply("42", ()))
    try:
        (asked,), answer = drive(RivalCrop(vicrop), sample, Reply("42", ()))
    except UserError as error:
        assert "leaves the targets out" in str(error)
        side = side_around(target, base)
        assert all(covers(square_around(rival, side, SIZE), target) for rival in rivals)
        return
    assert asked.prompt == expected.prompt and asked.images[0] is PICTURE
    mine, theirs = answer.boxes[0], truth.boxes[0]
    np.testing.assert_allclose(mine[2:] - mine[:2], theirs[2:] - theirs[:2], atol=1e-3)
    centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in rivals]
    assert any(mine[0] <= x <= mine[2] and mine[1] <= y <= mine[3] for x, y in centres)
    shown = np.zeros((SIZE[1], SIZE[0]), bool)
    shown[round(mine[1]) : round(mine[3]), round(mine[0]) : round(mine[2])] = True
    edge = 2 * (base + 150) / ((target[2] - target[0]) * (target[3] - target[1]))  # a pixel of rounding per side
    assert shown[target[1] : target[3], target[0] : target[2]].mean() < 0.5 + edge


def test_the_samples_id_picks_the_rival():
    rivals = ((500, 50, 560, 110), (50, 350, 110, 410), (500, 350, 560, 410))
    method = RivalCrop(Vicrop(layer=14, base=100))
    samples = [sample_of(id=str(n), boxes=((50, 50, 110, 110),), rivals=rivals) for n in range(30)]
    found = [tuple(drive(method, sample, Reply("", ()))[1].boxes[0]) for sample in samples]
    assert set(found) == {square_around(rival, 100, SIZE) for rival in rivals}
    assert found == [tuple(drive(method, sample, Reply("", ()))[1].boxes[0]) for sample in samples]


@pytest.mark.parametrize(("window", "held"), [((0, 0, 10, 10), True), ((0, 0, 9, 10), False), ((30, 0, 40, 9), False)])
def test_half_of_a_box_is_half_of_its_area(window, held):
    assert covers(window, (5, 0, 15, 10)) is held


# ---- another question's map ----


def test_the_other_map_is_that_of_the_other_question_and_the_answer_that_of_the_real_one():
    sample = sample_of(question="What is on the red plate?", other="Where is the dog?")
    (search, final), answer = searched(OtherMap(VICROP), sample, spike(12, 20))
    assert [request.prompt for request in search] == [
        VICROP.prompt("Where is the dog?", 1),
        VICROP.prompt(jaxvqa.prompts.GENERAL_QUESTION, 1),
    ]
    assert final.prompt == VICROP.prompt(sample.question, 2)
    _, theirs = searched(VICROP, sample, spike(12, 20))
    np.testing.assert_array_equal(answer.boxes, theirs.boxes)
    np.testing.assert_array_equal(answer.grid, spike(12, 20))


@pytest.mark.parametrize("maps", KINDS)
def test_the_other_map_is_of_every_kind_and_of_the_other_question(maps):
    """Options are the real question's, and in the last prompt alone."""
    sample = sample_of(question="What is on the red plate?", other="Where is the dog?", options=("an A", "a B"))
    like, results = of_kind(maps, sample, spike(12, 20))
    (search, final), answer = drive(OtherMap(like), sample, results, Reply("42", ()))
    times = len(search) // like.split(PICTURE.size)[0] // like.split(PICTURE.size)[1]
    texts = ["Where is the dog?", jaxvqa.prompts.GENERAL_QUESTION][:times]
    assert [request.prompt.text for request in search[:times]] == [like.prompt(text, 1).text for text in texts]
    assert times == (1 if "grad_att" in maps else 2)
    assert all(isinstance(request, Gradient) == ("grad" in maps) for request in search)
    assert "red plate?\n(A) an A\n(B) a B\n" in final.prompt.text
    (_, theirs), plain = drive(like, sample, results, Reply("42", ()))
    np.testing.assert_array_equal(answer.boxes, plain.boxes)
    np.testing.assert_array_equal(answer.grid, plain.grid)
    assert final.prompt == theirs.prompt


# ---- reweighting ----


def bound(facts=FACTS, **options):
    return methods.bind(MaskReweight(**options), facts)


def masks(sample, facts=FACTS, **options):
    (asked,), answer = drive(bound(facts, **options), sample, Reply("42", ()))
    mask, strengths = asked.args
    np.testing.assert_array_equal(mask, answer.grid)
    return mask, strengths


def test_the_question_is_vanillas_and_every_layer_is_reweighted():
    sample = sample_of(boxes=((100, 100, 150, 150),))
    (asked,), answer = drive(bound(), sample, Reply("42", ()))
    (plain,), _ = drive(VANILLA, sample, Reply("42", ()))
    assert (asked.images, asked.prompt, asked.max_new_tokens) == (plain.images, plain.prompt, plain.max_new_tokens)
    assert asked.taps is reweight and answer.text == "42"
    np.testing.assert_array_equal(asked.args[1], np.full((32, 1), 2.0))
    np.testing.assert_array_equal(masks(sample, layers=(1, 3), lam=4.5)[1], np.float32([[1], [4.5], [1], [4.5]]))


def test_the_truth_mask_is_the_tokens_that_touch_a_box():
    """700 × 500 in a square of 700: 29.17 px to a token, 100 px of padding above."""
    mask, _ = masks(sample_of(boxes=((30, 0, 58, 20), (200, 400, 240, 401))))
    expected = np.zeros(GRID)
    expected[3:5, 1] = 1  # y 100..120 in the square; x 30..58
    expected[17, 6:9] = 1  # y 500..501; x 200..240
    np.testing.assert_array_equal(mask, expected)
    everything, _ = masks(sample_of(), mask="all")
    np.testing.assert_array_equal(everything, np.ones(GRID))


def test_the_mask_follows_what_the_encoder_sees():
    """Centre-cropped, the middle 500 pixels are the whole grid: 20.83 px to a token, from x = 100 on."""
    mask, _ = masks(sample_of(boxes=((100, 0, 120, 20),)), facts=FACTS._replace(view="crop"))
    assert np.argwhere(mask).tolist() == [[0, 0]]


@given(several=st.lists(boxes, min_size=1, max_size=3), id=st.text("abc", min_size=1))
def test_a_random_mask_has_as_many_tokens_as_the_truth_and_none_in_padding(several, id):
    sample = sample_of(id=id, boxes=tuple(several))
    truth, _ = masks(sample)
    mask, _ = masks(sample, mask="random")
    assert mask.sum() == truth.sum() > 0
    assert (mask <= for_pad(*SIZE, 336, GRID).valid()).all()
    rows = slice(*for_pad(*SIZE, 336, GRID).valid_ranges()[0])
    moves = itertools.product(range(rows.stop - rows.start), range(GRID[1]))
    assert any((np.roll(truth[rows], move, (0, 1)) == mask[rows]).all() for move in moves), "the same shape"
    np.testing.assert_array_equal(mask, masks(sample, mask="random")[0])


def test_random_masks_reach_the_whole_image():
    mean = np.mean([masks(sample_of(id=str(n), boxes=((0, 0, 90, 90),)), mask="random")[0] for n in range(300)], axis=0)
    valid = for_pad(*SIZE, 336, GRID).valid()
    assert (mean[valid] > 0).all() and mean[valid].max() < 5 * mean[valid].mean()


def edit_of(mask, strengths, start, keys):
    """The one edit that `reweight` makes for a prompt of `keys` tokens whose image begins at `start`."""
    row = Row(
        cells_from([start, 90], mask.shape),
        jnp.int32(keys),
        jnp.zeros(1, int),
        jnp.ones(1, bool),
        None,
        None,
        mask.shape,
        keys,
    )
    (edit,) = reweight(row, jnp.asarray(mask), jnp.asarray(strengths, jnp.float32)[:, None]).edits
    return edit


@given(
    mask=arrays(np.float32, (2, 3), elements=st.sampled_from([0.0, 1.0])),
    strengths=st.lists(st.sampled_from([0.5, 1.0, 2.0, 22.0]), min_size=3, max_size=3),
    start=st.integers(0, 5),
)
def test_the_edit_is_log_lambda_on_the_first_images_keys_in_each_layer(mask, strengths, start):
    edit = edit_of(mask, strengths, start, 12)
    expected = np.zeros((3, 1, 12))
    expected[:, 0, start : start + 6] = np.log(strengths)[:, None] * mask.reshape(-1)
    np.testing.assert_allclose(edit.tap.key_bias, expected, atol=1e-6)
    assert (edit.start, edit.stop) == (0, 3)


# ---- what a sample or an option lacks ----


@pytest.mark.parametrize(
    ("method", "truth", "message"),
    [
        (TruthCrop(VICROP), {}, "truth_crop: sample '7' has no ground-truth box"),
        (RivalCrop(VICROP), {}, "rival_crop: sample '7' has no ground-truth box"),
        (RivalCrop(VICROP), {"boxes": ((1, 1, 9, 9),)}, "rival_crop: sample '7' has no rivals"),
        (OtherMap(VICROP), {"boxes": ((1, 1, 9, 9),)}, "other_map: sample '7' has no other question"),
        (bound(), {}, "mask_reweight: sample '7' has no ground-truth box"),
        (bound(mask="random"), {}, "mask_reweight: sample '7' has no ground-truth box"),
    ],
)
def test_a_sample_without_what_a_control_needs_is_refused(method, truth, message):
    with pytest.raises(UserError, match=message):
        next(method(sample_of(**truth)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "ones"}, "mask='ones'; expected one of truth, random, all"),
        ({"lam": -1.0}, "lam=-1.0; expected 0 or more"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"lam": float("inf")}, "lam=inf"),
        ({"layers": (3, 32)}, "llava-1.5-7b has layers 0 to 31"),
        ({"layers": ()}, "llava-1.5-7b has layers 0 to 31"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        bound(**options)
    with pytest.raises(UserError, match="truth_crop: images='one'; expected one of both, crop"):
        TruthCrop(images="one")


def test_a_control_is_bound_as_the_method_that_it_controls_for(monkeypatch):
    monkeypatch.setitem(methods.PRESETS, ("vicrop", FACTS.name), {"layer": 9})
    for name in ("random_crop", "rival_crop", "other_map", "truth_crop"):
        like = methods.bind(methods.get(name)(), FACTS).like
        assert (like.layer, like.base) == (9, 336)
    assert methods.bind(TruthCrop(images="crop"), FACTS).alone.template == "vicuna_v1"
    assert methods.bind(Blind(), FACTS).like.template == "vicuna_v1"
    assert bound(like=Vanilla(template="vicrop_hf")).like.template == "vicrop_hf"


# ---- through the engine ----


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("controls") / "tiny", text_layers=3, vision_layers=2, feature_layer=-1)
    return jaxvqa.load(folder, dtype="float32")


def replies(vlm, samples, method):
    engine = Engine(vlm, batch_size=2, lengths=(16, 192))
    answers = list(engine.run(samples, method))
    for answer in answers:
        if answer.error is not None:
            raise answer.error
        json.dumps(answer.record())
    return [answer.text for answer in answers], engine


def test_reweighting_through_the_engine(vlm):
    """λ = 1 on all tokens gives vanilla's answers, a large λ others; neither is a second pass."""
    like = Vanilla(max_new_tokens=6)
    samples = [sample_of(picture((60, 40), n), id=str(n), boxes=((3, 3, 30, 30),)) for n in range(4)]
    plain, _ = replies(vlm, samples, like)
    assert replies(vlm, samples, MaskReweight(like, "all", lam=1.0))[0] == plain
    for mask in ("truth", "random", "all"):
        texts, engine = replies(vlm, samples, MaskReweight(like, mask, lam=1e6))
        assert texts != plain and engine.stats.rows["generate"] == len(samples)


def test_a_factor_of_one_changes_no_bit_of_the_model_and_two_doubles_the_weights(vlm):
    """Rows of the first layer, whose input is the same, are those of vanilla times λ^M, renormalised."""
    encoded = vlm.encode(PICTURE, "What?")
    start, length = encoded.tokens.image_spans[0]
    keys, mask = len(encoded.tokens.ids), np.float32(np.arange(length) % 3 == 0).reshape(4, 4)
    spec = ReadSpec((0,), frozenset({"rows"}), heads="all")

    def run(mask, strength):
        edit = edit_of(mask, [strength] * 3, start, keys)
        taps = Taps((Edit(Tap(key_bias=edit.tap.key_bias[:, None]), edit.start, edit.stop),))
        return vlm.prefill(encoded, taps=taps, spec=spec)

    plain, same, double = vlm.prefill(encoded, spec=spec), run(np.ones_like(mask), 1.0), run(mask, 2.0)
    assert np.asarray(same.logits).tobytes() == np.asarray(plain.logits).tobytes()
    before, after = np.asarray(plain.readouts.rows)[0, 0, :, 0], np.asarray(double.readouts.rows)[0, 0, :, 0]
    factor = np.ones(keys)
    factor[start : start + length] = 2 ** mask.reshape(-1)
    expected = before * factor
    np.testing.assert_allclose(after, expected / expected.sum(-1, keepdims=True), atol=1e-5)


def test_blind_answers_alike_whatever_the_image_and_encodes_none(vlm):
    samples = [sample_of(picture((60, 40), n), id=str(n)) for n in range(3)]
    texts, engine = replies(vlm, samples, Blind(Vanilla(max_new_tokens=6)))
    assert len(set(texts)) == 1 and engine.stats.rows["images"] == 0
    assert len(set(replies(vlm, samples, Vanilla(max_new_tokens=6))[0])) > 1


def test_the_ground_truths_map_leads_focus_to_the_boxes_in_the_order_of_its_targets():
    sample = sample_of(question="What is on the cup and the hat?", boxes=((30, 40, 60, 70), (300, 200, 330, 230)))
    like = Focus(targets=("cup", "hat"), n_steps=1, overrun=False)
    asked, answer = drive(methods.bind(TruthMap(like), FACTS), sample, Reply("42", (1,)))
    assert answer.text == "42" and len(asked) == 1, "no pass for a map, no region verified"
    assert len(answer.boxes) == 2
    for box, truth in zip(answer.boxes, sample.boxes, strict=True):
        assert covers(box, truth)
    with pytest.raises(UserError, match="no ground-truth box"):
        drive(methods.bind(TruthMap(like), FACTS), sample_of())
