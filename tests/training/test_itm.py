from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa.matcher import clean
from jaxvqa.models import blip_itm
from jaxvqa.models.blip_itm import BlipItmConfig, BlipTextConfig
from jaxvqa.sharding import init
from jaxvqa.specks import COLORS, SHAPES, scene
from jaxvqa.specks.questions import GONE, THERE
from jaxvqa.specks.views import view_boxes
from jaxvqa.training import itm, specks
from jaxvqa.training.optimizer import apply, optimizer
from jaxvqa.vision import blip, clip
from jaxvqa.vision.clip import ClipConfig

TOKENIZER = itm.make_tokenizer()
ENCODE = itm.encoder(TOKENIZER)
WORDS = itm.class_words(TOKENIZER)
GRID = 16
CONFIG = BlipItmConfig(
    vision=ClipConfig(128, 8, 32, 64, 2, 2, 1e-5, "quick_gelu"),
    text=BlipTextConfig(2, 32, 64, 2, TOKENIZER.get_vocab_size(), 64, 1e-12, "gelu"),
    projection_width=8,
)


@cache
def initialised():
    return itm.initialise(CONFIG, jax.random.key(0))


@cache
def batch(views=2, length=144, count=16):
    """Images, dense targets and packed texts of whole small scenes."""
    made = [scene(8, n) for n in range(views)]
    images = np.stack([s.view(s.box) for s in made])
    cells = zip(*(specks.cells(s.plates, s.box, GRID) for s in made), strict=True)
    rows = [itm.texts(np.random.default_rng(n), s, s.box, count, GRID) for n, s in enumerate(made)]
    return images, specks.Cells(*map(np.stack, cells)), itm.pack(rows, ENCODE, length, count, GRID * GRID)


@given(index=st.integers(0, 200), view=st.integers(0, 3), kind=st.sampled_from(["small", "crowded", "whole", "dense"]))
def test_every_label_is_true_of_the_view(index, view, kind):
    made = scene(9, index, kind)
    box = view_boxes(made)[view]
    seen = [p for p in made.plates if p.visible(box) > THERE]
    maybe = {p.name for p in made.plates if p.visible(box) >= GONE}
    names = [f"{c} {s}" for c in COLORS for s in SHAPES]
    for one in itm.texts(np.random.default_rng(index), made, box):
        named = [n for n in names if n in clean(one.text)]
        if one.kind == "partial":
            (word,) = {*COLORS, *SHAPES} & {*one.text.replace("?", "").split()}
            assert one.match == any(word in (p.color, p.shape) for p in seen), one.text
        elif one.match:
            assert named and all(any(p.name == n for p in seen) for n in named), one.text
        else:
            assert any(n not in maybe for n in named), one.text
        if one.kind == "conjunction":
            color, shape = named[0].split()
            assert color in {p.color for p in seen} and shape in {p.shape for p in seen}
        if one.match and one.cells is not None:
            assert one.kind != "caption" and one.cells.any()


def test_half_of_the_texts_match_and_most_others_are_conjunctions():
    made = [scene(9, n) for n in range(40)]
    found = [t for n, s in enumerate(made) for t in itm.texts(np.random.default_rng(n), s, s.box)]
    assert abs(np.mean([t.match for t in found]) - 0.5) < 0.03
    kinds = {kind: sum(t.kind == kind for t in found) / len(found) for kind in itm.KINDS}
    assert kinds["conjunction"] > 0.25 and kinds["match"] > 0.3 and kinds["pair"] > 0.05 and kinds["partial"] > 0.05


def test_the_words_of_the_world_are_one_token_each():
    ids = [TOKENIZER.encode(word, add_special_tokens=False).ids for word in (*COLORS, *SHAPES, "crosses", "?")]
    assert all(len(i) == 1 for i in ids)
    assert TOKENIZER.encode("Zebras?").tokens == ["[CLS]", "z", "##e", "##b", "##r", "##a", "##s", "?", "[SEP]"]


def test_the_exported_tokenizer_gives_the_ids_of_training(tmp_path):
    from transformers import AutoTokenizer, BertTokenizer

    BertTokenizer(vocab=TOKENIZER.get_vocab(), model_max_length=64).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Is there a RED square in the image?", "the plate with the K, and a zebra", "4"):
        assert theirs(clean(text))["input_ids"] == list(ENCODE(text))
        assert theirs.decode(ENCODE(text), skip_special_tokens=True)


def test_packed_texts_do_not_see_each_other():
    """The loss of packed rows is the mean over their texts, each matched alone."""
    images, _, rows = batch()
    where = np.argwhere(rows.weight > 0)
    ids = [rows.ids[row, rows.segment[row] == q + 1] for row, q in where]
    lengths = np.array([len(i) for i in ids], np.int32)
    padded = np.stack([np.pad(i, (0, 24 - len(i))) for i in ids])

    @jax.jit
    def both(params, pixels, rows, padded, lengths):
        image = blip_itm.encode_images(params, CONFIG, pixels)
        alone = blip_itm.match(params, CONFIG, padded, lengths, image[where[:, 0]])
        return itm.match_loss(params, CONFIG, image, rows), alone

    (loss, metrics), alone = both(initialised(), specks.normalise(images), rows, padded, lengths)
    costs = optax.softmax_cross_entropy_with_integer_labels(alone, rows.match[*where.T])
    assert len(costs) > 20 and abs(float(loss) - float(costs.mean())) < 1e-5
    assert sum(float(metrics[kind + "#"]) for kind in itm.KINDS) == len(costs)


def test_texts_that_do_not_fit_are_left_out():
    made = scene(9, 0)
    several = itm.texts(np.random.default_rng(0), made, made.box)
    rows = itm.pack([several], ENCODE, 40, 16, GRID * GRID)
    lengths = [int((rows.segment == n).sum()) for n in range(1, 17)]
    kept = int(rows.weight.sum())
    assert 0 < kept < 16 and sum(lengths) <= 40 and all(lengths[:kept]) and not any(lengths[kept:])
    assert all(rows.ids[0, rows.first[0, :kept]] == TOKENIZER.token_to_id("[CLS]"))


def test_a_clip_tower_starts_a_blip_one_exactly_where_its_tokens_deviate_alike():
    """The norm that BLIP lacks is linear where all deviations are equal: faint patches on permuted positions."""
    c = CONFIG.vision
    tower = init(clip.specs(c), jax.random.key(1))
    rng = np.random.default_rng(0)
    one = rng.standard_normal(c.width)
    position = np.stack([rng.permutation(one) for _ in range(GRID * GRID + 1)])
    norm = clip.LayerNorm(jnp.asarray(1 + 0.1 * one, jnp.float32), jnp.asarray(0.1 * one, jnp.float32))
    tower = replace(
        tower, patch_embed=1e-3 * tower.patch_embed, position_embed=jnp.asarray(position, jnp.float32), pre_norm=norm
    )
    pixels = jnp.asarray(rng.standard_normal((2, 128, 128, 3)), jnp.float32)
    ours = blip.encode(itm.from_clip(tower, c, pixels), c, pixels, stop=c.num_layers)
    theirs = clip.encode(tower, c, pixels, (-1,))
    assert np.abs(ours - theirs).max() < 2e-3 < 0.1 * np.abs(theirs).std()


@pytest.mark.slow
def test_both_objectives_can_be_learned():
    images, cells, rows = batch()
    data = jax.tree.map(jnp.asarray, (specks.normalise(images), cells, rows))

    def loss_of(params, pixels, cells, rows):
        image = blip_itm.encode_images(params, CONFIG, pixels)
        dense, _ = itm.dense_loss(params, image, cells, WORDS)
        match, metrics = itm.match_loss(params, CONFIG, image, rows, 0.3)
        return dense + match, (dense, match, metrics["look"] / metrics["look#"])

    tx = optimizer(initialised(), ("vision", "text"))

    @jax.jit
    def step(params, state, data):
        (_, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(params, *data)
        updates, state = tx.update(grads, state, params)
        return apply(params, updates, lambda path: jnp.float32(3e-3)), state, parts

    params, state, history = initialised(), tx.init(initialised()), []
    for _ in range(40):
        params, state, parts = step(params, state, data)
        history.append([float(p) for p in parts])
    (dense, match, look), (dense_after, match_after, look_after) = history[0], history[-1]
    assert dense_after < 0.7 * dense and match_after < 0.9 * match and look_after > 2 * look
