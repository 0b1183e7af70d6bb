"""What a LLaVA learns from Specks: dense targets for the image tokens, and packed question sequences.

Stage 1 names what each image token shows: its cosine with the decoder's own word embeddings tells colour, shape and
character of the plate in that cell, and through four matrices the numbers of the plate's box. Later stages ask
questions: one row of a batch is an image prefix (segment 0) and many questions, each a segment of its own that sees
the prefix and itself.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import register_dataclass
from tokenizers import Tokenizer

from jaxvqa import decoder, sharding
from jaxvqa.attention import NEVER
from jaxvqa.decoder import Stream
from jaxvqa.methods.targets import EXAMPLES
from jaxvqa.models import llava
from jaxvqa.models.llava import Llava, LlavaConfig
from jaxvqa.prompts import TEMPLATES
from jaxvqa.specks.glyphs import CHARACTERS
from jaxvqa.specks.questions import (
    DESCRIBE,
    GONE,
    OBJECTS,
    SHORT,
    THERE,
    YES_NO,
    Question,
    box_hundredths,
    caption,
    questions,
    read_question,
)
from jaxvqa.specks.scenes import COLORS, SHAPES, SIZE, Box, Plate, Scene
from jaxvqa.specks.tokenizer import BOS, EOS, IMAGE, STEPWISE
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps
from jaxvqa.typing import Array, Bool, Float, Int, UInt8

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
KINDS = (
    "read",
    "pair",
    "color",
    "shape",
    "presence",
    "side",
    "relation",
    "count",
    "where",
    "describe",
    "objects",
    "blind",
    "read2",
    "stepwise",
    "partial",
)
_COMPARING = ("relation", "count", "pair")
_LEGIBLE_FROM = 4.5
_LOOKS = 32
_LATER = 1 << 16  # steps of order: what precedes the images, the images, what sees them
_SHARE = {"color": 1.0, "shape": 1.0, "character": 3.0, "box": 0.12, "place": 0.3}
_PLACES = ("left", "right", "above", "below")


# ---- dense targets ---------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class Cells:
    """Per image token: classes (-1: not asked; the last colour and shape is "nothing") and weights."""

    color: Int[np.ndarray, "M P"]
    shape: Int[np.ndarray, "M P"]
    character: Int[np.ndarray, "M P"]
    box: Int[np.ndarray, "M P 4"]
    weight: Float[np.ndarray, "M P"]
    ink: Float[np.ndarray, "M P"]
    """Weight of the character: it is asked for near its strokes only, where there is something to read."""


def cells(plates: tuple[Plate, ...], view: Box, grid: int = 16, background: float = 0.04) -> tuple[np.ndarray, ...]:
    """Targets of one view. A cell belongs to the plate that covers 35 % of it, or that has 35 % of itself in it."""
    color, shape = np.full((grid, grid), len(COLORS)), np.full((grid, grid), len(SHAPES))
    character, box = np.full((grid, grid), -1), np.full((grid, grid, 4), -1)
    weight, ink = np.full((grid, grid), background), np.zeros((grid, grid))
    side = (view[2] - view[0]) / grid
    low = np.arange(grid) * side
    for plate in plates:
        if plate.visible(view) == 0:
            continue
        shared, area = _shared(plate.box, view, low, side)
        mine = shared >= 0.35 * min(side * side, area)
        weight[(shared > 0) & ~mine & (weight == background)] = 0
        if not mine.any():
            continue
        color[mine] = _COLOR_INDEX[plate.color]
        shape[mine] = _SHAPE_INDEX[plate.shape] if plate.visible(view) > THERE else -1
        if plate.legible(view, 8 * grid, _LEGIBLE_FROM):
            near = _shared(plate.character_box, view, low, side, margin=side / 4)[0] > 0
            # Tall glyphs first: the many small ones of wide views drown them otherwise.
            height = (plate.character_box[3] - plate.character_box[1]) * 8 / side
            ink[near] = min(1.0, 4 / near.sum()) * np.clip((height - 4) / 5, 0.1, 1)
            character[near] = CHARACTERS.index(plate.character)
        box[mine] = box_hundredths(plate.box, view)
        weight[mine] = min(1.0, 6 / mine.sum())
    P = grid * grid
    return (
        color.reshape(P),
        shape.reshape(P),
        character.reshape(P),
        box.reshape(P, 4),
        weight.reshape(P),
        ink.reshape(P),
    )


def _shared(box: Box, view: Box, low: np.ndarray, side: float, margin: float = 0.0) -> tuple[np.ndarray, float]:
    """Area that each cell of the view shares with a box, widened by `margin`, and the box's own area."""
    x1, y1, x2, y2 = (box[i] - view[i % 2] + (margin if i > 1 else -margin) for i in range(4))
    wide = np.clip(np.minimum(x2, low + side) - np.maximum(x1, low), 0, None)
    high = np.clip(np.minimum(y2, low + side) - np.maximum(y1, low), 0, None)
    return high[:, None] * wide[None, :], (x2 - x1) * (y2 - y1)


_COLOR_INDEX = {name: i for i, name in enumerate(COLORS)}
_SHAPE_INDEX = {name: i for i, name in enumerate(SHAPES)}


@register_dataclass
@dataclass(frozen=True)
class Words:
    """Token ids of the words that image tokens are scored against."""

    color: Int[np.ndarray, "9"]
    shape: Int[np.ndarray, "5"]
    character: Int[np.ndarray, "10"]
    number: Int[np.ndarray, "100"]
    place: Int[np.ndarray, "2 2"]
    """left, right; above, below."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Words":
        def ids(words):
            found = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
            assert all(len(i) == 1 for i in found), f"not one token each: {words}"
            return np.array(found, np.int32)[:, 0]

        spaced = [
            [f" {w}" for w in group] for group in ((*COLORS, "nothing"), (*SHAPES, "nothing"), CHARACTERS, _PLACES)
        ]
        color, shape, character, place = map(ids, spaced)
        return cls(color, shape, character, ids([f"{n:02d}" for n in range(100)]), place.reshape(2, 2))


@register_dataclass
@dataclass(frozen=True)
class Trained:
    """The model and the four matrices that turn an image token into the numbers of its plate's box (dropped later)."""

    model: Llava
    heads: Float[Array, "4 D D"]


def initialise(config: LlavaConfig, words: Words, key: Array) -> Trained:
    """Random parameters at the scale 1/sqrt(width), which short training needs.

    What is ordered starts ordered: neighbouring positions of the tower, and the words of neighbouring numbers, are
    similar. And most heads of the decoder start as matching heads (`_matching`).
    """
    D, keys = config.decoder.width, jax.random.split(key, 5)
    scale = D**-0.5 / 0.02
    specs = sharding.tree_map_specs(
        lambda s: replace(s, scale=s.scale * scale) if s.init == "normal" else s, llava.specs(config)
    )
    model = sharding.init(specs, keys[0])
    rows, cols = config.grid
    cells = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(cols), indexing="ij"), -1).reshape(-1, 2)
    position = model.vision.position_embed.at[1:].set(0.7 * _waves(keys[1], cells, 2.5, config.vision.width))
    numbers = _waves(keys[2], jnp.arange(100)[:, None], 6.0, D) * D**-0.5
    model = replace(
        model,
        vision=replace(model.vision, position_embed=position),
        decoder=replace(
            model.decoder,
            embed=model.decoder.embed.at[words.number].set(numbers),
            layers=_matching(model.decoder.layers),
        ),
    )
    return Trained(model, jax.random.orthogonal(keys[3], D, (4,)))


def _matching(layers: decoder.Layer) -> decoder.Layer:
    """All heads but the last of each layer attend to what is like the query, and copy it.

    Stage 1 gives an image token the direction of its words, so the word "cross" finds the crosses from the start; from
    random projections, training took longer to find this than it had. The matching uses the slow rotary frequencies.
    """
    H = layers.q_proj.shape[-1]
    slow = jnp.where(jnp.arange(H) % (H // 2) >= H // 4, 1.6, 0.0)
    matched = (jnp.arange(layers.q_proj.shape[2]) < layers.q_proj.shape[2] - 1)[:, None]
    both = layers.q_proj * slow
    copied = 0.5 * layers.v_proj.transpose(0, 2, 3, 1)
    return replace(
        layers,
        q_proj=jnp.where(matched, both, layers.q_proj),
        k_proj=jnp.where(matched, both, layers.k_proj),
        o_proj=jnp.where(matched[..., None], copied, layers.o_proj),
    )


def hand_over(trained: Trained, words: Words) -> Trained:
    """Let the last head of the last four layers of the decoder match as the others do, and copy a number of the box.

    Their values and outputs are the four matrices of stage 1, within the directions that the numbers' words span.
    """
    layers = trained.model.decoder.layers
    H = layers.v_proj.shape[-1]
    span = jnp.linalg.svd(trained.model.decoder.embed[words.number], full_matrices=False)[2][:H].T  # [D, H]
    at = jnp.arange(4) + len(layers.q_proj) - 4
    both = layers.q_proj[at, :, 0]
    layers = replace(
        layers,
        q_proj=layers.q_proj.at[at, :, -1].set(both),
        k_proj=layers.k_proj.at[at, :, -1].set(both),
        v_proj=layers.v_proj.at[at, :, -1].set(trained.heads @ span),
        o_proj=layers.o_proj.at[at, -1].set(0.5 * span.T),
    )
    return replace(trained, model=replace(trained.model, decoder=replace(trained.model.decoder, layers=layers)))


def _waves(key: Array, points: Int[Array, "M C"], reach: float, width: int) -> Float[Array, "M D"]:
    """Random waves over points: unit variance, and correlated over distances of about `reach`."""
    frequency, phase = jax.random.split(key)
    # Reaches from `reach` to four times as far.
    spread = reach * 4 ** jnp.linspace(0, 1, width)
    angles = points @ (jax.random.normal(frequency, (points.shape[1], width)) / spread)
    return 2**0.5 * jnp.cos(angles + jax.random.uniform(phase, (width,), maxval=2 * jnp.pi))


def normalise(images: UInt8[Array | np.ndarray, "*M E E 3"]) -> Float[Array, "*M E E 3"]:
    """Pixels as CLIP's processor gives them."""
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


def dense_loss(
    trained: Trained, features: Float[Array, "M P D"], target: Cells, words: Words, sharpness: float = 20.0
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted cross-entropies of what each image token shows and where, and accuracy sums."""
    embed = trained.model.decoder.embed
    length = jnp.linalg.norm(features, axis=-1, keepdims=True)
    unit = features / (length + 1e-6)

    def scores(x, ids):
        table = embed[ids]
        table = table / (jnp.linalg.norm(table, axis=-1, keepdims=True) + 1e-6)
        return sharpness * x @ table.T

    loss, metrics = 1e-2 * jnp.mean(jnp.square(length - 1)), {}
    for name in ("color", "shape", "character"):
        label, ids = getattr(target, name), getattr(words, name)
        weight = jnp.where(label >= 0, target.ink if name == "character" else target.weight, 0)
        logits = scores(unit, ids)
        cost = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
        loss += _SHARE[name] * jnp.sum(weight * cost) / (jnp.sum(weight) + 1.0)
        last = len(ids) - 1
        hit, solid = logits.argmax(-1) == label, (label >= 0) & ((label < last) | (name == "character"))
        metrics |= {f"cell_{name}": jnp.sum(weight * solid * hit), f"cell_{name}#": jnp.sum(weight * solid)}
    solid = target.box[..., 0] >= 0
    weight = jnp.where(solid, target.weight, 0)
    for i in range(4):
        spot = features @ trained.heads[i]
        logits = scores(spot / (jnp.linalg.norm(spot, axis=-1, keepdims=True) + 1e-6), words.number)
        cost = optax.softmax_cross_entropy(logits, _blurred(target.box[..., i]))
        loss += _SHARE["box"] * jnp.sum(weight * cost) / (jnp.sum(weight) + 1.0)
        miss = jnp.abs(logits.argmax(-1) - target.box[..., i])
        metrics["cell_box"] = metrics.get("cell_box", 0) + jnp.sum(weight * (miss <= 2)) / 4
    for axis in (0, 1):
        # The two words of an axis are its ends: half way between them is the middle of the view.
        right = jax.nn.sigmoid(0.08 * ((target.box[..., axis] + target.box[..., axis + 2]) / 2 - 50))
        ends = optax.softmax_cross_entropy(scores(unit, words.place[axis]), jnp.stack([1 - right, right], -1))
        loss += _SHARE["place"] * jnp.sum(weight * ends) / (jnp.sum(weight) + 1.0)
    return loss, metrics | {"cell_box#": jnp.sum(weight)}


def _blurred(number: Int[Array | np.ndarray, "*B"]) -> Float[Array, "*B 100"]:
    """A distribution over the numbers 0..99 around this one: a neighbour is nearly as good an edge of a box."""
    near = jnp.exp(-0.5 * jnp.square((jnp.arange(100) - number[..., None]) / 1.5))
    return near / (near.sum(-1, keepdims=True) + 1e-9)


# ---- packed questions ------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class Packed:
    """Packed rows. `at` are the tokens that predict, `target` what follows them; kind -1 is not measured."""

    ids: Int[np.ndarray, "B T"]
    position: Int[np.ndarray, "B T"]
    order: Int[np.ndarray, "B T"]
    segment: Int[np.ndarray, "B T"]
    patch: Int[np.ndarray, "B T"]
    """Which of the row's image tokens; -1 is text."""
    bias: Float[np.ndarray, "B T"]
    """Added to the attention scores of a key."""
    last: Int[np.ndarray, "B Q"]
    """Tokens that should look at a target: the last of a question's prompt, and those that predict its box."""
    look: Bool[np.ndarray, "B Q T"]
    """The image tokens of that target; none where there is no such question."""
    boxing: Bool[np.ndarray, "B Q"]
    """Which of `last` predict a box."""
    at: Int[np.ndarray, "B R"]
    target: Int[np.ndarray, "B R"]
    weight: Float[np.ndarray, "B R"]
    kind: Int[np.ndarray, "B R"]


@dataclass(frozen=True)
class Ask:
    """A prompt's text after the shared prefix, the answer, its kind, and how much the answer's tokens weigh."""

    prompt: str
    answer: str
    kind: str
    weight: float = 1.0
    cells: np.ndarray | None = None
    """Which of the row's image tokens show what is asked about, if any."""


Row = tuple[list[str | None], list[Ask]]
"""What the questions of a row share (None is an image), and the questions."""


class Packer:
    """Tokenises prefixes and questions and packs as many as fit into rows of `length` tokens."""

    def __init__(self, tokenizer: Tokenizer, image_tokens: int, length: int, prompt_weight: float = 0.05):
        self.image_tokens, self.length, self.prompt_weight = image_tokens, length, prompt_weight
        self.encode = lru_cache(1 << 16)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids))
        self.bos, self.eos, self.image = (int(tokenizer.token_to_id(t) or 0) for t in (BOS, EOS, IMAGE))
        numbers = Words.of(tokenizer).number
        self.numbers = frozenset(numbers.tolist())

    def row(
        self,
        prefix: list[str | None],
        asks: list[Ask],
        keep: np.ndarray | None = None,
        hide: np.random.Generator | None = None,
    ) -> dict[str, np.ndarray]:
        """One row; None in `prefix` is an image. Questions that do not fit are left out.

        keep: for each image token how many of its kind it stands for, 0 where it is left out; the others keep the
            positions that they have among all, and their keys a bias of log(keep). Default: all tokens.
        hide: draws the questions, six in ten of those about one plate, whose tokens do not see the images: only the
            last token of the prompt and the answer do. So the last token learns to look for itself, as relative
            attention expects of it, and not only to ask the tokens of the target's name what they saw.
        """
        P, T = self.image_tokens, self.length
        shared, images = [self.bos], 0
        for chunk in prefix:
            shared += [self.image] * P if chunk is None else self.encode(chunk)
            images += chunk is None
        shared = np.array(shared, np.int32)
        where, end = np.arange(len(shared)), len(shared)
        if keep is not None and images:
            kept = np.ones(end, bool)
            kept[shared == self.image] = keep > 0
            where = where[kept]
        ids, order, segment = np.zeros(T, np.int32), np.full(T, NEVER, np.int32), np.zeros(T, np.int32)
        target, weight, kind = np.zeros(T, np.int32), np.zeros(T, np.float32), np.full(T, -1, np.int32)
        patch, position = np.full(T, -1, np.int32), np.zeros(T, np.int32)
        last, look, boxing = np.zeros(_LOOKS, np.int32), np.zeros((_LOOKS, T), bool), np.zeros(_LOOKS, bool)
        looks, n = 0, len(where)
        assert n < T, f"a prefix of {n} tokens does not fit into {T}"
        ids[:n], position[:n] = shared[where], where
        first_image = int(np.argmax(shared == self.image)) if images else end
        order[:n] = np.where(where < first_image, where, _LATER + where)
        is_image = shared == self.image
        patch[:n] = np.where(is_image, np.cumsum(is_image) - 1, -1)[where]
        bias = np.zeros(T, np.float32)
        if keep is not None:
            bias = np.where(patch >= 0, np.log(np.maximum(keep, 1.0))[np.maximum(patch, 0)], 0).astype(np.float32)
        for number, ask in enumerate(asks, 1):
            prompt, answer = self.encode(ask.prompt), (*self.encode(" " + ask.answer), self.eos)
            tokens = (*prompt, *answer)
            if n + len(tokens) > T:
                continue
            at = slice(n, n + len(tokens))
            ids[at], segment[at] = tokens, number
            position[at] = end + np.arange(len(tokens))
            order[at] = 2 * _LATER + position[at]
            first = n + len(prompt) - 1
            if hide is not None and ask.kind not in _COMPARING and hide.random() < 0.6:
                order[n:first] = first_image + np.arange(len(prompt) - 1)
            if ask.cells is not None:
                boxed = [i for i, token in enumerate(answer) if ask.kind == "where" and token in self.numbers]
                for i in (0, *boxed)[: _LOOKS - looks]:
                    last[looks], look[looks] = first + i, (patch >= 0) & ask.cells[np.maximum(patch, 0)]
                    boxing[looks] = i > 0
                    looks += 1
            target[n : n + len(tokens) - 1] = tokens[1:]
            weight[n:first] = self.prompt_weight
            for i, token in enumerate(answer):
                known = ask.kind == "where" and token not in self.numbers
                weight[first + i] = ask.weight * (0.05 if known or token == self.eos else 1.0)
                if ask.kind == "where":
                    measured = token in self.numbers
                elif ask.kind in ("describe", "objects", "pair"):
                    measured = token != self.eos
                else:
                    measured = i == (len(answer) - 2 if ask.kind == "stepwise" else 0)
                if measured:
                    kind[first + i] = KINDS.index(ask.kind)
            n += len(tokens)
        return {
            "ids": ids,
            "position": position,
            "order": order,
            "segment": segment,
            "patch": patch,
            "bias": bias,
            "last": last,
            "look": look,
            "boxing": boxing,
            "target": target,
            "weight": weight,
            "kind": kind,
        }

    def stack(self, rows: list[dict[str, np.ndarray]], predictions: int) -> Packed:
        """Rows as one batch, with room for `predictions` weighted tokens each."""
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        at = np.argsort(columns["weight"] == 0, axis=1, kind="stable")[:, :predictions].astype(np.int32)
        for name in ("target", "weight", "kind"):
            columns[name] = np.take_along_axis(columns[name], at, axis=1)
        return Packed(at=at, **columns)


def answer_loss(
    trained: Trained,
    config: LlavaConfig,
    features: Float[Array, "B I P D"],
    rows: Packed,
    words: Words,
    look_share: float | Float[Array, ""] = 0.0,
    look_layer: int = 3,
    backend: str = "xla",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted next-token loss over the packed rows, and accuracy sums by kind (a box number may be off by two).

    The target of a box number is spread over its neighbours (`_blurred`).

    look_share: weight of a scaffold that asks the attention of `rows.last` in `look_layer` (mean over heads, share of
        the image) to lie on the target.
    """
    model, c = trained.model, config.decoder
    features = features.reshape(features.shape[0], -1, features.shape[-1])
    hidden = llava.embed(model, config, rows.ids, features, rows.patch)
    stream = Stream(hidden, rows.position, rows.order, rows.segment)
    taps = Taps((Edit(Tap(key_bias=rows.bias[None, :, None]), 0, c.num_layers),), rows=rows.last)
    spec = ReadSpec(layers=(look_layer,), read=frozenset({"rows"}))
    hidden, _, readouts, _ = decoder.run(model.decoder, c, stream, taps=taps, spec=spec, backend=backend)
    attention = readouts.rows[0]
    on_target = jnp.sum(attention * rows.look, axis=-1)
    on_images = jnp.sum(attention * (rows.patch >= 0)[:, None], axis=-1) + 1e-9
    asked, away = rows.look.any(axis=-1), -jnp.log(on_target / on_images + 1e-4)
    looks = {"look": asked & ~rows.boxing, "look_box": asked & rows.boxing}
    looking = sum(jnp.sum(which * away) / (jnp.sum(which) + 1e-6) for which in looks.values())
    hidden = jnp.take_along_axis(hidden, rows.at[:, :, None], axis=1)
    logits = decoder.finish(model.decoder, c, hidden)
    value = jnp.full(c.vocab_size, -100).at[words.number].set(jnp.arange(100))
    number, guess = value[rows.target], logits.argmax(-1)
    exact = jnp.take_along_axis(logits, rows.target[..., None], axis=-1)[..., 0]
    blurred = jnp.sum(_blurred(number) * logits[..., words.number], axis=-1)
    cost = jax.nn.logsumexp(logits, axis=-1) - jnp.where(number >= 0, blurred, exact)
    loss = jnp.sum(rows.weight * cost) / jnp.sum(rows.weight)
    near = (number >= 0) & (jnp.abs(value[guess] - number) <= 2)
    hit = (guess == rows.target) | near
    metrics = {}
    for name, which in looks.items():
        metrics |= {name: jnp.sum(which * on_target / on_images), name + "#": jnp.sum(which)}
    for number, name in enumerate(KINDS):
        mine = rows.kind == number
        metrics |= {name: jnp.sum(mine & hit), name + "#": jnp.sum(mine)}
    return loss + look_share * looking, metrics


# ---- the curriculum --------------------------------------------------------------------------------------------------

VICUNA, VICROP = TEMPLATES["vicuna_v1"], TEMPLATES["vicrop_hf"]


def target_cells(question: Question, view: Box, grid: int = 16) -> np.ndarray | None:
    """Which image tokens of the view show the targets of a question, bool [P]; None if there are none.

    A relation has none: looking at two plates at once says nothing of their order.
    """
    if question.kind == "relation":
        return None
    side = (view[2] - view[0]) / grid
    mine = np.zeros((grid, grid), bool)
    for plate in question.targets:
        shared, area = _shared(plate.box, view, np.arange(grid) * side, side)
        mine |= shared >= 0.35 * min(side * side, area)
    return mine.reshape(-1) if mine.any() else None


def phrase(template, question: Question, rng: np.random.Generator, terse: float = 0.0) -> str:
    """The text of a question in a template, after the image(s), with one of the endings that it may have.

    terse: how often the ending is left out where the question itself says what is asked.
    """
    text, ending = question.text, question.ending
    if ending in (SHORT, YES_NO) and rng.random() < terse:
        return turn(template, text)
    if ending == SHORT and template is VICUNA and rng.random() < 0.4:
        ending = ""
    if ending == YES_NO and rng.random() < 0.3:
        ending = SHORT if rng.random() < 0.5 or template is VICROP else ""
    joint = " " if template is VICROP or ending == YES_NO else "\n"
    return turn(template, text + (joint + ending if ending else ""))


def turn(template, text: str) -> str:
    """What follows the image(s) in a template."""
    if template.images_first:
        return f"{template.image_break}{template.user}{text}{template.assistant}"
    return f"{template.image_break}{text}{template.assistant}"


def head(template) -> str:
    """What precedes the first image."""
    return template.system + ("" if template.images_first else template.user)


def neutral(template) -> Ask:
    """The general question with the short ending, as relative attention uses it."""
    return Ask(turn(template, f"{DESCRIBE[0]}{template.ending_break}{SHORT}"), "plates", "blind", 0.05)


_WEIGHTS = {"describe": 0.3, "objects": 0.1, "where": 0.5}


def single(rng: np.random.Generator, scene: Scene, view: Box, terse: float = 0.0) -> Row:
    """Prefix and questions about one view; one row in 24 has no image, and answers that cannot be known."""
    template = VICUNA if rng.random() < 0.5 else VICROP
    asked = list({q.text: q for _ in range(2) for q in questions(scene, rng, view)}.values())
    if rng.random() < terse:
        asked = [q for q in asked if q.kind != "describe"]
    text_only = rng.random() < 1 / 24
    if text_only:
        template = VICUNA
        extra = [q for _ in range(3) for q in questions(scene, rng, view, ("objects",))]
        asks = [Ask(_bare(q), q.answer, "objects", _WEIGHTS["objects"]) for q in extra]
        blind = [q for q in asked if q.kind in ("read", "pair", "color", "shape", "presence", "relation", "count")][:5]
        asks += [Ask(f"{q.text}\n{SHORT}{VICUNA.assistant}", q.answer, "blind", 0.3) for q in blind]
        return [head(VICUNA)], asks
    asks = [
        Ask(
            phrase(template, q, rng, terse),
            q.answer,
            q.kind,
            _WEIGHTS.get(q.kind, 1.0) * (1 if _answerable(q, view) else 0.1),
            target_cells(q, view),
        )
        for q in asked
        if q.kind != "objects"
    ]
    asks += [Ask(phrase(template, q, rng, terse), q.answer, "partial") for q in _partial_presence(rng, scene, view)]
    asks += [
        Ask(phrase(template, q, rng, terse), q.answer, "side", 1.0, target_cells(q, view))
        for q in _side(rng, scene, view)
    ]
    asks = [asks[i] for i in rng.permutation(len(asks))]
    if rng.random() < 0.15:
        asks.insert(0, neutral(template))
    return [head(template), None], asks


def _partial_presence(rng: np.random.Generator, scene: Scene, view: Box) -> list[Question]:
    """Presence of a colour, a shape or a character alone, which is learned before that of two in one plate."""
    found = []
    legible = {p.character for p in scene.plates if p.legible(view) and p.visible(view) > THERE}
    gone = set(CHARACTERS) - {p.character for p in scene.plates if p.visible(view) >= GONE}
    if legible and gone:
        pick = sorted(legible if rng.random() < 0.5 else gone)
        word = pick[int(rng.integers(len(pick)))]
        ask = f"Is there a plate with the {word} in the image?"
        found.append(Question("presence", ask, YES_NO, "Yes" if word in legible else "No"))
    for attribute, words in (("color", COLORS), ("shape", SHAPES)):
        there = {getattr(p, attribute) for p in scene.plates if p.visible(view) > THERE}
        gone = set(words) - {getattr(p, attribute) for p in scene.plates if p.visible(view) >= GONE}
        pick = sorted(there if there and (rng.random() < 0.5 or not gone) else gone)
        if pick:
            word = pick[int(rng.integers(len(pick)))]
            name = word if attribute == "shape" else f"{word} plate"
            found.append(
                Question("presence", f"Is there a {name} in the image?", YES_NO, "Yes" if word in there else "No")
            )
    return found


def _side(rng: np.random.Generator, scene: Scene, view: Box) -> list[Question]:
    """In which half of the view a plate lies, which is learned before where it lies beside another."""
    seen = [p for p in scene.plates if p.visible(view) > THERE]
    if not seen:
        return []
    plate, axis = seen[int(rng.integers(len(seen)))], int(rng.integers(2))
    words, middle = (("left", "right"), ("above", "below"))[axis], (view[axis] + view[axis + 2]) / 2
    ask = ("on the left or right", "above or below the middle")[axis]
    answer = words[int(plate.center[axis] > middle)]
    return [Question("side", f"Is the {plate.name} {ask} of the image?", SHORT, answer, (plate,))]


def double(rng: np.random.Generator, scene: Scene, crop: Box) -> Row:
    """Questions about the whole scene, then a crop of it (ViCrop's form; in a quarter of the rows in vicuna_v1)."""
    template = VICROP if rng.random() < 0.75 else VICUNA
    reads = [(q, "read2" if weight == 1 else "blind", weight, 1) for q, weight in _reads(rng, scene, crop)]
    reads += [(q, "pair", 1.0, 1) for q in questions(scene, rng, crop, ("pair",))]
    others = [(q, q.kind, _WEIGHTS.get(q.kind, 1.0), 0) for q in _others(rng, scene)]
    asks = []
    for q, kind, weight, image in reads + others:
        mine = target_cells(q, (scene.box, crop)[image])
        both = None if mine is None else np.concatenate([mine & (image == 0), mine & (image == 1)])
        asks.append(Ask(phrase(template, q, rng), q.answer, kind, weight, both))
    asks.insert(len(reads), neutral(template))
    between = [None] if template.images_first else [template.image_break, None]
    return [head(template), None, *between], asks


def stepwise(rng: np.random.Generator, scene: Scene, crop: Box) -> Row:
    """Questions about a crop, then the whole scene, answered in three steps (HiPerson's form)."""
    middle, last = STEPWISE
    x, y = (int(3 * (crop[i] + crop[i + 2]) / 2 / SIZE) for i in range(2))
    place = f"{('top', 'middle', 'bottom')[y]} {('left', 'center', 'right')[x]}"
    steps = f"1) {caption(scene.plates, crop)} 2) It lies in the {place} of the image. 3) Answer:"
    asked = _reads(rng, scene, crop) + [(q, 1.0) for q in _others(rng, scene) if q.kind != "where"]
    asks = [Ask(f"{last}{q.text}{VICUNA.assistant}", f"{steps} {q.answer}", "stepwise", 0.3 * w) for q, w in asked]
    return [head(VICUNA), None, middle, None], asks


def _reads(rng, scene, crop) -> list[tuple[Question, float]]:
    """What to read in a crop, with weights: three in ten of the crops are also asked for a plate that they miss."""
    legible = [p for p in scene.plates if p.legible(crop) and p.visible(crop) > THERE]
    missed = [p for p in scene.plates if p.visible(crop) < GONE]
    reads = [(read_question(legible[i]), 1.0) for i in rng.permutation(len(legible))[:3]]
    if missed and (rng.random() < 0.3 or not reads):
        reads.append((read_question(missed[int(rng.integers(len(missed)))]), 0.1))
    return reads


def _others(rng, scene) -> list[Question]:
    return questions(scene, rng, scene.box, ("color", "shape", "presence", "relation", "count", "where"))


def few_shot(rng: np.random.Generator, scene: Scene) -> Row:
    """Target extraction after a conversation of examples, as FOCUS asks for it."""
    text = head(VICUNA)
    for question, answer in zip(EXAMPLES.question_list, EXAMPLES.response_list, strict=True):
        text += f"{EXAMPLES.asked(question)}{VICUNA.assistant} {answer}{VICUNA.answer_end}{VICUNA.user}"
    asks = [q for _ in range(6) for q in questions(scene, rng, None, ("objects",))]
    return [text], [Ask(_bare(q), q.answer, "objects", _WEIGHTS["objects"]) for q in asks]


def _bare(question: Question) -> str:
    return f"{question.text}\n{OBJECTS}{VICUNA.assistant}"


def _answerable(question: Question, view: Box) -> bool:
    return question.kind != "read" or question.targets[0].legible(view)
