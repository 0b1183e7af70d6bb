"""What a BLIP learns from Specks: dense targets for its image tokens, then texts that match a view or do not.

The hard negatives are conjunctions: the colour is there, the shape is there, on different plates. A row of a batch is
one view with many short texts, each a segment of its own, so that the image's keys and values are made once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import register_dataclass
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxvqa import sharding
from jaxvqa.attention import NEVER, Mask, attention_rows
from jaxvqa.matcher import clean
from jaxvqa.models import blip_itm
from jaxvqa.models.blip_itm import BlipItm, BlipItmConfig
from jaxvqa.specks.glyphs import CHARACTERS
from jaxvqa.specks.questions import DESCRIBE, GONE, PLURALS, SHORT, THERE, YES_NO, Question, caption, questions
from jaxvqa.specks.scenes import COLORS, SHAPES, Box, Scene, scene
from jaxvqa.training.specks import Cells, target_cells
from jaxvqa.typing import Array, Bool, Float, Int
from jaxvqa.vision import clip
from jaxvqa.vision.blip import BlipVision
from jaxvqa.vision.clip import Clip, ClipConfig

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = ("match", "conjunction", "absent", "partial", "pair", "caption")
_SHARE = {"color": 1.0, "shape": 1.0, "character": 0.5}
_CLASSES = {"color": (*COLORS, "nothing"), "shape": (*SHAPES, "nothing"), "character": tuple(CHARACTERS)}

ONE = (
    "the {}",
    "a {}",
    "{}",
    "Is there a {} in the image?",
    "What character is on the {}?",
    "Where is the {}?",
)
"""Texts about one plate, of the methods' captions and of the world's questions."""
TWO = (
    "the {} and the {}",
    "What characters are on the {} and the {}?",
    "Is the {} left or right of the {}?",
    "Is the {} above or below the {}?",
)
COLOR = ("a {} plate", "the {} plate", "What shape is the {} plate?", "How many {} plates are there?")
SHAPE = ("a {}", "the {}", "What color is the {}?", "Is there a {} in the image?")


# ---- words -----------------------------------------------------------------------------------------------------------


def make_tokenizer(scenes: int = 60) -> Tokenizer:
    """BERT's WordPiece over the words of the world's texts; any other word is spelled."""
    texts = [*ONE, *TWO, *COLOR, *SHAPE, *DESCRIBE, SHORT, YES_NO, "nothing", *COLORS, *SHAPES, *PLURALS.values()]
    for index in range(scenes):
        texts += [q.text for q in questions(scene(0, index), np.random.default_rng((0, index)))]
    words = {word for text in texts for word in re.findall(r"[a-z]+|[?,]", text.lower())}
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = [*SPECIAL, *letters, *(f"##{c}" for c in letters), *sorted(words - {*letters})]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing((SEP, ids[SEP]), (CLS, ids[CLS]))
    return tokenizer


def class_words(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Token ids of the words that image tokens are scored against: color [9], shape [5], character [10]."""
    ids = {name: [tokenizer.token_to_id(word.lower()) for word in words] for name, words in _CLASSES.items()}
    assert all(None not in found for found in ids.values()), f"not one token each: {ids}"
    return {name: np.array(found, np.int32) for name, found in ids.items()}


# ---- parameters ------------------------------------------------------------------------------------------------------


def initialise(config: BlipItmConfig, key: Array) -> BlipItm:
    """Random parameters at the scale 1/sqrt(width), which short training needs.

    Heads start as matching heads: cross-attention looks for image tokens that are like the text token and copies them,
    which finds the red cells for "red" as soon as image tokens have the directions of their words (`dense_loss`).
    Needs image and text of one width.
    """
    D, keys = config.text.width, jax.random.split(key, 3)
    specs = sharding.tree_map_specs(
        lambda s: replace(s, scale=s.scale * D**-0.5 / 0.02) if s.init == "normal" else s, blip_itm.specs(config)
    )
    params = sharding.init(specs, keys[0])
    layers, vision = params.text.layers, params.vision
    rows, cols = config.grid
    cells = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(cols), indexing="ij"), -1).reshape(-1, 2)
    # Neighbouring cells start with similar positions: waves of random direction and a length of some cells.
    frequency, phase = jax.random.split(keys[1])
    angles = cells @ (jax.random.normal(frequency, (2, config.vision.width)) / 5.0)
    waves = 2**0.5 * jnp.cos(angles + jax.random.uniform(phase, (config.vision.width,), maxval=2 * jnp.pi))
    return replace(
        params,
        vision=replace(vision, position_embed=vision.position_embed.at[:, 1:].set(0.7 * waves)),
        text=replace(
            params.text,
            position_embed=0.2 * params.text.position_embed,
            layers=replace(layers, attention=_copying(layers.attention), cross=_copying(layers.cross, match=True)),
        ),
    )


def _copying(w: blip_itm.Attention, match: bool = False) -> blip_itm.Attention:
    """Heads that hand on what they read; with `match`, they read what is like the query."""
    w = replace(w, o_proj=0.5 * w.v_proj.transpose(0, 2, 3, 1))
    # Two tokens of one direction then score about 13 before the softmax, two at right angles 0.
    return replace(w, q_proj=1.3 * w.q_proj, k_proj=1.3 * w.q_proj) if match else w


def from_clip(tower: Clip, c: ClipConfig, pixels: Float[Array, "M E E 3"]) -> BlipVision:
    """A BLIP tower that begins as a CLIP one, trained or not.

    CLIP's norm before the blocks has no place in BLIP. Its gain and its mean deviation over the tokens of `pixels` go
    into the embeddings; that tokens deviate differently is lost. BLIP's norm after the blocks starts neutral.
    """
    x = clip.embed_patches(tower.patch_embed, c, pixels) + tower.position_embed[1:]
    gain = tower.pre_norm.scale * jnp.mean(jax.lax.rsqrt(jnp.var(x, axis=-1) + c.norm_eps))

    def centred(w):
        return (w - jnp.mean(w, axis=-1, keepdims=True)) * gain

    position = centred(tower.position_embed) + tower.pre_norm.bias
    first = clip.layer_norm(tower.class_embed + tower.position_embed[0], tower.pre_norm, c.norm_eps)
    return BlipVision(
        patch_embed=centred(tower.patch_embed),
        patch_bias=jnp.zeros(c.width),
        class_embed=(first - position[0])[None, None],
        position_embed=position[None],
        layers=tower.layers,
        post_norm=clip.LayerNorm(jnp.ones(c.width), jnp.zeros(c.width)),
    )


# ---- dense targets ---------------------------------------------------------------------------------------------------


def dense_loss(
    params: BlipItm,
    image: Float[Array, "M S D"],
    target: Cells,
    words: dict[str, np.ndarray],
    sharpness: float = 20.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted cross-entropies of what each image token shows, by its cosine with the words, and accuracy sums."""
    unit = _unit(image[:, 1:])
    loss, metrics = jnp.float32(0), {}
    for name, ids in words.items():
        label = getattr(target, name)
        weight = jnp.where(label >= 0, target.ink if name == "character" else target.weight, 0)
        logits = sharpness * unit @ _unit(params.text.embed[ids]).T
        cost = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
        loss += _SHARE[name] * jnp.sum(weight * cost) / (jnp.sum(weight) + 1.0)
        solid = weight * ((label < len(ids) - 1) | (name == "character"))
        metrics |= {f"cell_{name}": jnp.sum(solid * (logits.argmax(-1) == label)), f"cell_{name}#": jnp.sum(solid)}
    return loss, metrics


def _unit(x):
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


# ---- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A text about a view, whether it matches, and which image tokens show what it names."""

    text: str
    match: bool
    kind: str
    cells: Bool[np.ndarray, "P"] | None = None


def texts(rng: np.random.Generator, scene: Scene, view: Box, count: int = 16, grid: int = 16) -> list[Text]:
    """Texts of the kinds that the view allows, half of which match (none where nothing is seen), in random order."""
    seen = [p for p in scene.plates if p.visible(view) > THERE]
    unclear = [p for p in scene.plates if GONE <= p.visible(view) <= THERE]
    sure = {p.name for p in seen} | {p.name for p in unclear}
    every = [f"{c} {s}" for c in COLORS for s in SHAPES]
    colors, shapes = {p.color for p in seen}, {p.shape for p in seen}
    near = [n for n in every if n not in sure and n.split()[0] in colors and n.split()[1] in shapes]
    far = [n for n in every if n not in sure and n not in near]

    def pick(items):
        return items[int(rng.integers(len(items)))]

    def where(plates):
        return target_cells(Question("match", "", "", "Yes", tuple(plates)), view, grid)

    def one(name, kind):
        plates = [p for p in seen if p.name == name]
        return Text(pick(ONE).format(name), bool(plates), kind, where(plates))

    def partial(match):
        attribute, forms, words = pick([("color", COLOR, COLORS), ("shape", SHAPE, SHAPES)])
        there = {getattr(p, attribute) for p in seen}
        gone = sorted(set(words) - there - {getattr(p, attribute) for p in unclear})
        if not (there if match else gone):
            return None
        word = pick(sorted(there) if match else gone)
        plates = [p for p in seen if getattr(p, attribute) == word]
        return Text(pick(forms).format(word), match, "partial", where(plates))

    def pair(match):
        if len({p.name for p in seen}) < 2 or not (match or near):
            return None
        a = pick(seen)
        others = [p.name for p in seen if p.name != a.name] if match else near
        names = [a.name, pick(others)]
        plates = [p for p in seen if p.name in names] if match else []
        return Text(pick(TWO).format(*(names if rng.random() < 0.5 else names[::-1])), match, "pair", where(plates))

    def described(match):
        if not 0 < len(seen) <= 3 or not (match or near):
            return None
        text = caption(scene.plates, view)
        return Text(text if match else text.replace(pick(seen).name, pick(near), 1), match, "caption", None)

    found: list[Text] = []
    for _ in range(3 * count):
        match, form = bool(seen) and len(found) % 2 == 0, rng.random()
        if form < 0.12:
            made = partial(match)
        elif form < 0.24:
            made = pair(match)
        elif form < 0.3:
            made = described(match)
        elif match:
            made = one(pick(seen).name, "match")
        else:
            kind = "conjunction" if near and (not far or rng.random() < 0.85) else "absent"
            made = one(pick(near if kind == "conjunction" else far), kind)
        found += [made] if made is not None else []
        if len(found) == count:
            break
    return [found[i] for i in rng.permutation(len(found))]


@register_dataclass
@dataclass(frozen=True)
class Rows:
    """Packed texts; `first` are the tokens that the head reads, weight 0 where there is no text."""

    ids: Int[np.ndarray, "M T"]
    position: Int[np.ndarray, "M T"]
    segment: Int[np.ndarray, "M T"]
    """1, 2, … for the texts; 0 is padding."""
    first: Int[np.ndarray, "M Q"]
    match: Int[np.ndarray, "M Q"]
    weight: Float[np.ndarray, "M Q"]
    kind: Int[np.ndarray, "M Q"]
    look: Bool[np.ndarray, "M Q P"]


def encoder(tokenizer: Tokenizer) -> Callable[[str], tuple[int, ...]]:
    """Text -> token ids, as `Matcher.tokenise`."""
    return lru_cache(1 << 16)(lambda text: tuple(tokenizer.encode(clean(text)).ids))


def pack(
    batch: list[list[Text]], encode: Callable[[str], tuple[int, ...]], length: int, count: int, cells: int
) -> Rows:
    """One row of `length` tokens and at most `count` texts per view; texts that do not fit are left out."""
    M = len(batch)
    ids, position, segment = (np.zeros((M, length), np.int32) for _ in range(3))
    first, match, kind = (np.zeros((M, count), np.int32) for _ in range(3))
    weight, look = np.zeros((M, count), np.float32), np.zeros((M, count, cells), bool)
    for row, several in enumerate(batch):
        n = q = 0
        for one in several:
            tokens = encode(one.text)
            if q == count or n + len(tokens) > length:
                continue
            at = slice(n, n + len(tokens))
            ids[row, at], position[row, at], segment[row, at] = tokens, np.arange(len(tokens)), q + 1
            first[row, q], match[row, q], weight[row, q] = n, one.match, 1.0
            kind[row, q] = KINDS.index(one.kind)
            if one.match and one.cells is not None:
                look[row, q] = one.cells
            n, q = n + len(tokens), q + 1
    return Rows(ids, position, segment, first, match, weight, kind, look)


def match_loss(
    params: BlipItm,
    config: BlipItmConfig,
    image: Float[Array, "M S D"],
    rows: Rows,
    look_share: float | Float[Array, ""] = 0.0,
    backend: str = "xla",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of the packed texts, and accuracy sums by kind.

    look_share: weight of a scaffold that asks the first token's cross-attention in the last layer (mean over heads,
        share of the patches) to lie on the target of a text that matches.
    """
    at, last = rows.first, config.text.num_layers - 1
    order = jnp.where(rows.segment > 0, 0, NEVER)
    mask = Mask(jnp.zeros_like(order), order, rows.segment, rows.segment)
    x = blip_itm.embed(params, config, rows.ids, rows.position)
    x = blip_itm.run_layers(params, config, x, mask, image, 0, last, backend=backend)
    x, (q, k, _) = blip_itm.run_layer(params, config, x, mask, image, last, backend=backend)
    logits = blip_itm.score(params, jnp.take_along_axis(x, at[:, :, None], axis=1))
    cost = optax.softmax_cross_entropy_with_integer_labels(logits, rows.match)
    loss = jnp.sum(rows.weight * cost) / jnp.sum(rows.weight)

    firsts = jnp.take_along_axis(q, at[:, :, None, None], axis=1)
    probs = jnp.mean(attention_rows(firsts, k, None, scale=q.shape[-1] ** -0.5), axis=1)[..., 1:]
    share = jnp.sum(probs * rows.look, axis=-1) / (jnp.sum(probs, axis=-1) + 1e-9)
    asked = rows.look.any(axis=-1)
    looking = jnp.sum(asked * -jnp.log(share + 1e-4)) / (jnp.sum(asked) + 1e-6)

    hit = logits.argmax(-1) == rows.match
    metrics = {"look": jnp.sum(asked * share), "look#": jnp.sum(asked)}
    for number, name in enumerate(KINDS):
        mine = rows.weight * (rows.kind == number)
        metrics |= {name: jnp.sum(mine * hit), name + "#": jnp.sum(mine)}
    return loss + look_share * looking, metrics
