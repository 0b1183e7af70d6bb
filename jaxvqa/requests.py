"""What a method may ask of the engine, what it is given, and what it returns.

A method is a generator over one `Sample`: it yields a request, or a list of them, receives the result, or a list of
them, and returns an `Answer`. It knows nothing of batches, devices or compilation.

    def look(sample):
        reply = yield Generate(sample.images, render("vicuna_v1", sample.question, num_images=len(sample.images)))
        return Answer(reply.text)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from PIL import Image

from jaxvqa.attention import CHUNK
from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry
from jaxvqa.prompts import Prompt
from jaxvqa.taps import Plugin, Readouts, ReadSpec
from jaxvqa.transforms.query_map import query_map
from jaxvqa.typing import Array, Bool, Float, Int

Box = tuple[float, float, float, float]
"""xyxy, half-open, pixels."""


@dataclass(frozen=True)
class Sample:
    """One question with its images. All from `boxes` on is the ground truth: only controls may look at it."""

    images: tuple[Any, ...]
    """What `images.open_image` accepts, one or several; a method receives them opened (RGB)."""
    question: str
    id: str = ""
    """Names the sample in records and seeds its random keys; its place in the run where empty."""
    options: tuple[str, ...] = ()
    """The options of a multiple choice."""
    boxes: tuple[Box, ...] = ()
    """Boxes of all that is asked for, xyxy in pixels of the first image."""
    rivals: tuple[Box, ...] = ()
    """Boxes of things that share an attribute with what is asked for."""
    other: str | None = None
    """Another question about the same images."""
    answer: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "images", as_tuple(self.images))
        for name in ("options", "boxes", "rivals"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "id", "" if self.id is None else str(self.id))

    @property
    def image(self) -> Any:
        """The first image; UserError where there is none."""
        if not self.images:
            raise UserError(f"sample {self.id!r} has no image, and what was asked of it needs one")
        return self.images[0]

    def random(self, seed: int) -> np.random.Generator:
        """Random numbers that depend on the sample's id and the seed alone."""
        digest = blake2b(f"{seed}/{self.id}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest))

    @property
    def box(self) -> Box | None:
        """The box around all `boxes`; None without any."""
        if not self.boxes:
            return None
        x1, y1, x2, y2 = zip(*self.boxes, strict=True)
        return min(x1), min(y1), max(x2), max(y2)


@register_dataclass
@dataclass(frozen=True)
class Row:
    """What a reduction (`Read.reduce`) or a builder of taps (`Generate.taps`) sees of its sample, on the device."""

    cells: Int[Array, "I C"]
    """Position in the prompt of each cell of each image, row by row of its geometry's grid; -1 for padding."""
    length: Int[Array, ""]
    """Tokens of the prompt."""
    rows: Int[Array, "R"]
    """Positions of the wanted rows; the count is padded by repeating the last."""
    wanted: Bool[Array, "R"]
    """Which of `rows` were asked for, which are padding."""
    readouts: Readouts | None
    """Leaves without the batch axis: rows [C, R, S] or [C, N, R, S], values and keys [C, S, K, H], hidden [C, T, D].
    None before the forward pass (for a builder of taps)."""
    logits: Float[Array, "V"] | None
    """After the last token; None before the forward pass."""
    grid: tuple[int, int] = field(metadata={"static": True})
    """Token rows and columns of an image; (1, C) where they vary, and the cells are padded to C."""
    keys: int = field(metadata={"static": True})
    """Length S of a key axis that covers the prompt and the answer."""
    gradient: Float[Array, "..."] | None = None
    """What `Gradient` asked for: ∂y/∂A [C, N, R, S] beside `readouts.rows`, or ∂y/∂X [I, E, E, 3]; otherwise None."""
    shapes: Int[Array, "I 2"] | None = None
    """Rows and columns of each image's grid; None of a matching model."""
    queries: Int[Array, "I Q"] | None = None
    """Of a model that sees an image through queries (InstructBLIP): the position of each of their tokens. `cells` is
    empty then, and `readouts.cross` [C, I, *N, Q, 1 + h·w] says where they look."""
    cross_gradient: Float[Array, "C I N Q S"] | None = None
    """What `Gradient` asked for: ∂y/∂A beside `readouts.cross`; otherwise None."""

    def on_image(self, x: Float[Array, "*A S"], image: int = 0) -> Float[Array, "*A h w"]:
        """The part of a key axis (the last) that lies on one image, on `grid`; 0 at padding.

        Through queries, it is what falls on these, carried on by `readouts.cross`, the mean over heads and layers.
        `Geometry.on_grid` gives it the image's own shape. Raises UserError where the request has no such image, and
        where nothing was read that leads from queries to cells.
        """
        if self.queries is not None:
            rows = self.on_queries(x, image)
            if self.readouts is None or (cross := self.readouts.cross) is None:
                raise UserError(
                    "this model sees an image through queries, and no token of it shows a cell: only attention rows "
                    "can be laid on the image, read together with ReadSpec.cross"
                )
            seen = cross[:, image].mean(tuple(range(cross.ndim - 3)))
            return query_map(rows, jnp.broadcast_to(seen, (*rows.shape[:-1], *seen.shape)))
        self._check(image)
        at = self.cells[image]
        cells = jnp.take(x, jnp.maximum(at, 0), axis=-1)
        return jnp.where(at >= 0, cells, 0).reshape(*x.shape[:-1], *self.grid)

    def on_queries(self, x: Float[Array, "*A S"], image: int = 0) -> Float[Array, "*A Q"]:
        """The part of a key axis (the last) that lies on the queries of one image. UserError where there are none."""
        self._check(image)
        if self.queries is None:
            raise UserError("this model sees an image by its cells, not through queries")
        return jnp.take(x, self.queries[image], axis=-1)

    def on_cross(self, cells: Float[Array | np.ndarray, "#N h w"], image: int = 0) -> Float[Array, "I #N S"]:
        """An edit of one image's cells as `Taps.cross_bias`: zero at the class token and for the other images."""
        self._check(image)
        keys = jnp.pad(cells.reshape(len(cells), -1), ((0, 0), (1, 0)))
        return jnp.where((jnp.arange(len(self.cells)) == image)[:, None, None], keys, 0)

    def on_keys(self, cells: Float[Array | np.ndarray, "*A h w"], image: int = 0) -> Float[Array, "*A S"]:
        """The inverse of `on_image`: an edit of one image's cells as one of all keys, zero elsewhere.

        Raises UserError for a model that sees it through queries; see `on_cross`.
        """
        if self.queries is not None:
            raise UserError("this model sees an image through queries, and no key is a cell: edit Taps.cross_bias")
        flat, cell = cells.reshape(*cells.shape[:-2], -1), cell_of_keys(self.cells[image], self.keys)
        return jnp.where(cell >= 0, jnp.take(flat, jnp.maximum(cell, 0), axis=-1), 0)

    def _check(self, image: int) -> None:
        if not 0 <= image < len(self.cells):
            raise UserError(f"cannot look at image {image} of a request with {len(self.cells)} images")


def cell_of_keys(cells: Int[Array, "C"], keys: int) -> Int[Array, "S"]:
    """Which of an image's cells (their positions, -1 for padding) lies at each of S = `keys` positions; -1 for none."""
    short = -len(cells) % CHUNK
    numbers = jnp.arange(1, len(cells) + 1 + short).reshape(-1, CHUNK)
    parts = jnp.pad(cells, (0, short), constant_values=-1).reshape(-1, CHUNK)

    # Sums over chunks: a mesh that splits the batch would not know how to split a scatter.
    def part(both):
        at, number = both
        return jnp.where(at[:, None] == jnp.arange(keys), number[:, None], 0).sum(0)

    return jax.lax.map(part, (parts, numbers)).sum(0) - 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question to a model. Positional fields are `images` and `prompt`; `model` names one of the engine's models."""

    passes: int = 1
    """Logical forward passes, as the papers count them: one call of `generate` or `forward` is one."""

    model: str | None = None
    """None is the engine's first of the kind that serves the request."""


@dataclass(frozen=True)
class _Prompted(Request):
    images: tuple[Image.Image, ...]
    """One image or several, in prompt order."""
    prompt: Prompt | str
    """Rendered prompt (`prompts.render`), or its text with one `<image>` per image."""

    def __post_init__(self):
        object.__setattr__(self, "images", as_tuple(self.images))


@dataclass(frozen=True)
class Generate(_Prompted):
    """Answer a prompt. Result: `Reply`."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy; above, sampled with a key made of sample id and request index."""
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these strings."""
    keep: bool = False
    """Keep the cache, so that `Continue` can go on from this reply."""
    taps: Callable | None = None
    """Module-level function `taps(row, *args) -> Taps` of this sample alone (no batch axis), run on the device."""
    args: tuple[Any, ...] = ()
    """Arrays for `taps` and for the plugin's `begin`."""
    plugin: Plugin | None = None


@dataclass(frozen=True)
class Read(_Prompted):
    """Read from inside one forward pass; layers above the highest that is read are not run. Result: `Reading`."""

    spec: ReadSpec
    rows: str | tuple[int, ...] = "last"
    """Query rows: "last" (the last prompt token), "question" (all tokens of the user's text), any other string (a
    phrase of the prompt: its tokens) or token positions."""
    reduce: Callable | None = None
    """Module-level function `reduce(row: Row, *args) -> arrays`, run on the device; None returns the `Readouts`."""
    args: tuple[Any, ...] = ()
    """Arrays for `reduce`."""
    keep: bool = False
    """Keep what was computed, so that `Continue` can go on from the layer where this pass stopped."""


@dataclass(frozen=True)
class Score(_Prompted):
    """Score each option as the reply: mean log-likelihood over its tokens and the end of text. Result: f32 [C]."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class YesNo(_Prompted):
    """Confidence c = tanh((l_yes − l_no) / 2) in [−1, 1] from one forward pass. Result: float."""


@dataclass(frozen=True)
class Continue(Request):
    """A further turn after a kept `Reply`, or on from the layer at which a kept `Reading` stopped. Result: `Reply`.

    After a reply, `prompt` is the whole conversation with the new question at its end (`prompts.render` of question,
    answer, question); only what the cache does not hold yet is run, so the result is that of the whole prompt. Where
    image tokens depend on all of the text (InstructBLIP) that is run anew. On from a reading there is no prompt: its
    own goes through the remaining layers, and is answered.
    """

    of: "Reply | Reading"
    prompt: Prompt | str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    keep: bool = False


@dataclass(frozen=True)
class Call(Request):
    """Call a function of the user's (a detector, a judge) with `args`. Result: what it returns."""

    passes: int = field(default=0, kw_only=True)

    function: Callable
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gradient(_Prompted):
    """Gradient of a scalar y of one forward pass. Result: `Reading`, whose value without a reduction is the gradient.

    of="top": y is the log-probability of the most likely next token after the prompt (ViCrop), on a model that answers.

        wrt="attention"  A, the attention probabilities of the wanted rows at `layers`, as `Read` gives them with all
                         heads, and ∂y/∂A, both [C, N, R, S]: exact, of probabilities that nothing renormalises, so not
                         zero at keys that a row does not see (`transforms.gradient.gradient_map` multiplies it by A).
                         Of a model that sees images through queries a reduction gets that of `cross`, too.
        wrt="pixels"     ∂y/∂X [I, E, E, 3] of the encoder's normalised pixels, through the vision tower; no `layers`.

    of="match": y is the logit of "match", before the softmax, on a matching model (`jaxvqa.Matcher`). `prompt` is the
    plain text, and there is one image. Only wrt="attention" at one layer, negative from the end: A and ∂y/∂A of the
    text's cross-attention are [1, N, T, h·w], without the class token's column, for all T rows of the padded text. The
    reduction's `Row` speaks of the text: `length` is its tokens, the first and the last one included, `rows` are
    0..T−1, `wanted` those below `length`, `keys` is h·w, `logits` are those of "no match" and "match".

    One forward pass; the backward pass counts in FLOPs as two more of the layers that it goes through.
    """

    wrt: str = "attention"
    """"attention" or "pixels"."""
    layers: tuple[int, ...] = ()
    """Layers (0-based, ascending) whose attention is differentiated."""
    rows: str | tuple[int, ...] = "last"
    """Query rows, as in `Read`; of="match" gives all, whatever this says."""
    cross: tuple[int, ...] | None = None
    """Cross-attentions that are differentiated besides, of all queries; as in `ReadSpec.cross`."""
    of: str = "top"
    """"top" or "match"."""
    reduce: Callable | None = None
    """Module-level function `reduce(row: Row, *args) -> arrays`, run on the device."""
    args: tuple[Any, ...] = ()
    """Arrays for `reduce`."""


@dataclass(frozen=True)
class Match(_Prompted):
    """How well a text matches an image, by a matching model (`jaxvqa.Matcher`). Result: float, a probability.

    One image; `prompt` is the plain text.
    """


@dataclass(frozen=True)
class Embed(_Prompted):
    """Embedding of an image or a text. Result: f32 [D], of length 1."""


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    ids: tuple[int, ...]
    """Generated tokens, without the end of text and what a stop string cut."""
    generated: int = field(default=0, repr=False, compare=False)
    """How many tokens were generated: those, too."""
    state: Any = field(default=None, repr=False, compare=False)
    """The engine's own, where the request said `keep`."""
    value: Any = field(default=None, repr=False, compare=False)
    """What the plugin's `end` gave, as NumPy arrays."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read, as NumPy arrays."""

    value: Any
    """What the reduction returned, or `Readouts` without the batch axis."""
    geometries: tuple[Geometry, ...]
    """One per image of the request."""
    state: Any = field(default=None, repr=False)


class Passes(NamedTuple):
    """Logical forward passes of one sample, those of matching models left out; `Cost.passes` counts them, too.

    The final answer is what the method's last yield asked for and, where that goes on from a reply, the reply.
    """

    search: int = 0
    final: int = 0

    @property
    def total(self) -> int:
        return self.search + self.final


NO_PASSES = Passes()


@dataclass(frozen=True)
class Cost:
    """What one sample cost, counted by the engine: logical, as if its requests had been run one by one.

    Only an image's encoding is shared: it counts once per sample, which is how every implementation runs it.
    """

    passes: dict[str, int] = field(default_factory=dict)
    """Forward passes by what served them: "generate", "read", "gradient", "match", "match_gradient", ..."""
    images: int = 0
    """Image encodings, but for those inside gradients to pixels."""
    tokens: int = 0
    """Generated tokens, each reply's end of text included."""
    flops: int = 0
    """Analytic floating-point operations."""


class Asked(NamedTuple):
    """One request of a sample's log: its kind, its prompt and what came back, in short."""

    kind: str
    prompt: str
    result: str


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method returns. The engine fills in everything from `forward_passes` on."""

    text: str
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """[n, 4] xyxy, half-open, in pixels of the first image as given."""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """f32 [n], how sure the method is of each box, in [-1, 1]: NaN where it did not ask; empty where it never does."""
    heatmap: np.ndarray | None = None
    """f32 [H', W'] in image coordinates: it covers the whole first image, at any resolution of the same shape."""
    grid: np.ndarray | None = None
    """f32 [h, w]: the heat map on the token grid."""
    reasoning: str = ""
    """The whole reply, where the text is only a part of it."""
    status: str = "ok"
    """"ok", "error", or what a method has to say of its search (for example "nothing found")."""

    forward_passes: Passes = NO_PASSES
    cost: Cost = field(default_factory=Cost)
    log: tuple[Asked, ...] = ()
    seconds: float = 0.0
    """From the sample's start to its answer; in a batch its neighbours' work is in it."""
    sample: str = ""
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    """The full configuration of the method, presets resolved."""
    model: str = ""
    image_setup: str = ""
    error: Exception | None = None

    def __post_init__(self):
        object.__setattr__(self, "boxes", np.asarray(self.boxes, np.float32).reshape(-1, 4))

    def record(self) -> dict[str, Any]:
        """Everything but the maps, ready for JSON."""
        skipped = ("heatmap", "grid", "boxes", "scores", "forward_passes", "cost", "log", "error", "options")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return plain | {
            "boxes": self.boxes.tolist(),
            "scores": [None if np.isnan(score) else float(score) for score in self.scores],
            "forward_passes": self.forward_passes._asdict(),
            "cost": {f.name: getattr(self.cost, f.name) for f in fields(self.cost)},
            "options": {name: _plain(value) for name, value in self.options.items()},
            "log": [entry._asdict() for entry in self.log],
            "error": None if self.error is None else f"{type(self.error).__name__}: {self.error}",
        }


def as_tuple(images: Any) -> tuple[Any, ...]:
    """One image (a PIL image, an array, a path, bytes) or a sequence of them, as a tuple. UserError for None."""
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray)):
        return tuple(images)
    if images is None:
        raise UserError("no image: expected a path, bytes, a PIL image, an array, or a list of them")
    return (images,)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, dict, type(None))) else repr(value)
