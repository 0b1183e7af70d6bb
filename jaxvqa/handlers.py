"""How each kind of request is served: made ready on the host, run on the device as one batch, read back.

A handler has `prepare(engine, request, seed) -> Work` and `launch(engine, works, size) -> collect`, where `collect()`
waits for the device and returns one result, or one exception, per work. Works of equal `key` share a batch: the key
holds the handler, the model, the bucket and everything static. Adding a kind of request is adding a handler.

The programs are jitted functions of (parameters, config, batch); they are compiled once per key and batch size.

A prompt with images runs in two parts. Its *prefix*, as many tokens as the longest of the engine's `lengths` that ends
neither behind the last image nor behind the first wanted row, gives keys and values that every prompt with this
beginning shares; the rest is appended to them. A prefix has no padding, so a token's slot in the cache is its position
in the prompt. How a prompt is cut depends on its request alone, so a result has the same bits with and without company.
Where rows of the prefix may change with the request (taps, plugins), or more of them is wanted than a cache holds
(hidden states, keys before rope, `Read.keep`), where image tokens depend on the whole text (InstructBLIP), and without
images, the whole prompt runs at once.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from jaxvqa import decoding
from jaxvqa.attention import NEVER
from jaxvqa.decoder import Cache
from jaxvqa.decoding import Decoded, Output
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.geometry import Geometry
from jaxvqa.matcher import Matcher
from jaxvqa.models import family_of
from jaxvqa.models.qformer import Asked
from jaxvqa.prompts import Tokens
from jaxvqa.requests import Call, Continue, Generate, Gradient, Read, Reading, Reply, Request, Row, Score, YesNo
from jaxvqa.sharding import CACHE_LBSKH, constrain
from jaxvqa.taps import Readouts, ReadSpec, Taps
from jaxvqa.typing import Array, Bool, Float, Int
from jaxvqa.vision.inputs import ImageInput
from jaxvqa.vlm import VLM, queried, slots_of, texts

if TYPE_CHECKING:
    from jaxvqa.engine import Engine

LENGTHS = (*range(64, 1024, 64), *range(1024, 2048, 128), *range(2048, 4096, 256), *range(4096, 32769, 1024))
"""Token lengths to which prompts are padded, and at which they are cut."""
REST = tuple(sorted(size for n in range(5, 21) for size in (2**n, 3 * 2 ** (n - 1))))
"""Token lengths to which what follows a prefix is padded: 32, 48, 64, 96, 128, ..."""
SHORT = tuple(2**n for n in range(16))
"""Sizes to which small axes are padded: wanted rows, options, tokens of an option or a further turn."""


@dataclass(eq=False)
class Work:
    """A request made ready."""

    key: Any
    """A tuple; works of one key share a batch. Begins with the handler."""
    data: Any
    text: str = ""
    """The prompt, for the log."""
    needs: "dict[Hashable, Work]" = field(default_factory=dict)
    """By content: what must be computed first, once for all who need it."""
    got: dict[Hashable, Any] = field(default_factory=dict)
    """The results of `needs`."""
    flops: int = 0
    """Logical: of this row alone, without padding and before the first generated token. A prefix has none: its FLOPs
    are in those of every request that shares it."""
    padded_flops: int = 0
    """Of this row as it runs."""
    cost: Callable[[Any], tuple[int, int]] = lambda result: (0, 0)
    """Of a result: (generated tokens, FLOPs)."""
    apart: bool = False
    """Whether its passes count apart: those of a matching model are none of a model that answers."""


class Handler(Protocol):
    """Serves one kind of request."""

    name: str
    """In statistics, costs and warnings."""

    def prepare(self, engine: "Engine", request: Any, seed: tuple[int, int]) -> Work:
        """Make a request ready; `seed` is the hash of the sample's id and the request's number. Raises UserError."""
        ...

    def launch(self, engine: "Engine", works: list[Work], size: int) -> Callable[[], list[Any]]:
        """Start works of one key in a batch of `size` rows; what is returned waits, and gives a result for each."""
        ...


def bucket(size: int, sizes: Sequence[int], what: str) -> int:
    """The smallest of `sizes` (ascending) that holds `size`."""
    for candidate in sizes:
        if size <= candidate:
            return candidate
    raise UserError(f"{what} has {size} tokens, more than the longest bucket ({sizes[-1]}): shorten it")


def padded(rows: Sequence[Any], size: int) -> list[Any]:
    """`rows` and, behind them, copies of the last one: real values, so that padding can fail in no way of its own."""
    return [*rows, *repeat(rows[-1], size - len(rows))]


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of arrays, stacked leaf by leaf on the host."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def shapes(args: tuple[Any, ...]) -> tuple:
    """What a program's compilation depends on in its array arguments."""
    return jax.tree.structure(args), *((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(args))


def arrays(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a reduction as NumPy arrays of 32 bits at most."""
    return jax.tree.map(lambda x: np.asarray(x, jnp.result_type(x)), args)


def right_pad(values: Sequence[int] | np.ndarray | None, length: int, fill: int = 0) -> np.ndarray:
    """Values i32 of tokens, with `fill` behind them to `length`."""
    values = np.asarray(values, np.int32)
    ends = ((0, length - len(values)), *((0, 0),) * (values.ndim - 1))
    return np.pad(values, ends, constant_values=fill)


# --- programs ---------------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True, eq=False)
class Kept:
    """One row of a cache (S slots, of which the first tokens are valid), and hidden states where it stopped."""

    k: Float[Array, "L S K H"]
    v: Float[Array, "L S K H"]
    order: Int[Array, "S"]
    shift: Int[Array, ""] | None
    """Of multimodal positions (`Cache.shift`)."""
    hidden: Float[Array, "T D"] | None

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@register_dataclass
@dataclass(frozen=True)
class Batch:
    """Prompts of one bucket, on their way to the device: what follows the prefix, where there is one."""

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    slots: Int[Array, "B T"]
    """Which row of the images' features, side by side, each token is; -1 for text."""
    positions: Int[Array, "B T 3"] | None
    """Of multimodal rotary embeddings."""
    features: tuple[tuple[Float[Array, "P D"], ...], ...]
    """[B][I]: one array per image, as it lies on the device."""
    prefix: tuple[Kept, ...]
    """[B], or empty: the whole prompt is in `ids`."""
    cells: Int[Array, "B I C"]
    """Positions in the prompt, as are `rows`; -1 for padding."""
    shapes: Int[Array, "B I 2"]
    rows: Int[Array, "B R"]
    wanted: Bool[Array, "B R"]
    asked: Asked | None
    """The texts, of models whose image tokens depend on them."""
    queries: Int[Array, "B I Q"] | None
    """Positions in the prompt of those tokens."""
    grid: tuple[int, int] = field(metadata={"static": True})
    """Token rows and columns of an image (`Row.grid`)."""


def split(tree):
    """Arrays from the host, batch first, laid out over the mesh's batch axes (the identity without a mesh)."""
    return jax.tree.map(lambda x: constrain(x, ("batch", *(None,) * (x.ndim - 1))), tree)


def _with_rows(features: Float[Array, "P D"], rows: int) -> Float[Array, "S D"]:
    """An image's features with as many rows as those of the largest image of its prompt."""
    return features if len(features) == rows else _padded(features, rows=rows)


@partial(jax.jit, static_argnames=("rows",))
def _padded(features, *, rows) -> Float[Array, "S D"]:
    return jnp.pad(features, ((0, rows - len(features)), (0, 0)))


@partial(jax.jit, static_argnames=("backend",))
def _encode(params, config, images: Any, *, backend) -> tuple[Float[Array, "P D"], ...]:
    features = constrain(family_of(config).encode_images(params, config, images, backend=backend), (None, None, None))
    return tuple(features[i] for i in range(len(features)))


@partial(jax.jit, static_argnames=("capacity", "spec", "build", "reduce", "backend"))
def _prefill(params, config, batch, plugins, taps_args, reduce_args, *, capacity, spec, build, reduce, backend):
    """Run prompts. Returns the output, the edits for decoding, the reduced readouts, and whether each row is finite."""
    row, run = laid_out(config, batch, capacity)
    taps_args, reduce_args = split((taps_args, reduce_args))
    taps = Taps() if build is None else _batch_second(jax.vmap(build)(row, *taps_args))
    plugins = tuple(replace(p, carry=jax.vmap(p.begin)(row, *taps_args)) if p.begin else p for p in plugins)
    out = run(params, taps=taps, spec=spec, plugins=plugins, backend=backend)
    value = None if reduce is None else jax.vmap(reduce)(seen(row, out), *reduce_args)
    if plugins and plugins[0].end:
        value = jax.vmap(plugins[0].end)(out.plugins[0].carry)
    # A pass that stopped early has no logits; of any other, bad hidden states show there.
    finite = jnp.isfinite(out.logits).all(axis=1) if out.logits.shape[1] else jnp.isfinite(out.hidden).all(axis=(1, 2))
    return out, taps.edits, value, finite


def laid_out(config, batch: Batch, capacity: int | None = None) -> tuple[Row, Callable[..., Output]]:
    """A batch over the mesh: its rows before the pass, and the program `run(params, features, taps=, spec=, ...)`.

    features: of the images, [B, S, D], those of a row side by side, where the batch has none.
    """
    images, prefix = _images(batch.features), batch.prefix
    batch = replace(batch, features=(), prefix=())
    batch, images = split((batch, images))
    start = prefix[0].k.shape[1] if prefix else 0
    keys = start + batch.ids.shape[1]
    lengths = start + batch.lengths
    row = Row(
        batch.cells, lengths, batch.rows, batch.wanted, None, None, batch.grid, keys,
        shapes=batch.shapes, queries=batch.queries,
    )  # fmt: skip

    def run(params, features=images, *, taps: Taps, spec: ReadSpec, **kwargs) -> Output:
        kwargs = queried(batch.asked, taps, spec) | kwargs
        program = partial(family_of(config).prefill, capacity=capacity)
        if prefix:
            cache = _restack(prefix, jnp.full_like(batch.lengths, start), keys if capacity is None else capacity)
            program = partial(family_of(config).extend, cache=cache)
        images = dict(features=features, slots=batch.slots, positions=batch.positions)
        out = program(
            params, config, batch.ids, batch.lengths, **images,
            taps=replace(taps, rows=batch.rows - start), spec=spec, **kwargs,
        )  # fmt: skip
        if prefix and "values" in spec.read:
            values = jnp.stack([out.cache.v[layer, :, :keys] for layer in spec.layers])
            out = replace(out, readouts=replace(out.readouts, values=values))
        return out

    return row, run


def seen(row: Row, out: Output) -> Row:
    """Rows after the pass, as reductions see them under vmap: the batch first in every leaf."""
    readouts, logits = split((jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), out.readouts), out.logits))
    return replace(row, readouts=readouts, logits=logits)


def _images(features) -> Float[Array, "B S D"] | None:
    return jnp.stack([jnp.concatenate(row) for row in features]) if features[0] else None


def _batch_second(taps: Taps) -> Taps:
    """Edits that a vmapped builder made have the batch first; a tap wants its layers first (`taps.Tap`)."""

    def swap(x):
        return None if x is None else jnp.moveaxis(x, 0, 1)

    def one(edit):
        tap, mix = edit.tap, edit.tap.mix
        mix = None if mix is None else replace(mix, alpha=swap(mix.alpha), maps=swap(mix.maps))
        return replace(edit, tap=replace(tap, key_bias=swap(tap.key_bias), perturb=swap(tap.perturb), mix=mix))

    return replace(taps, edits=tuple(one(edit) for edit in taps.edits))


def _while_decoding(edits) -> Taps:
    """The edits that hold for generated tokens too: every row mixes, and nothing is perturbed."""

    def one(edit):
        mix = None if edit.tap.mix is None else replace(edit.tap.mix, rows=None)
        return replace(edit, tap=replace(edit.tap, mix=mix, perturb=None))

    return Taps(tuple(one(edit) for edit in edits))


@partial(jax.jit, static_argnames=("max_new_tokens", "eos_ids", "sampled", "backend"), donate_argnames=("cache",))
def _decode(
    params, config, cache, logits, plugins, edits, seeds, temperature, *, max_new_tokens, eos_ids, sampled, backend
) -> Decoded:
    """Generate. `seeds` int [B, 3]: the engine's seed, the sample's hash and the request's number make a row's key."""
    keys = None
    if sampled:
        make = jax.vmap(lambda seed: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), seed[2]))
        keys = make(split(seeds))
    return decoding.decode(
        params.decoder,
        config.decoder,
        Output(logits, None, cache, Readouts(), plugins),
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        keys=keys,
        temperature=temperature,
        taps=_while_decoding(edits),
        backend=backend,
    )


@partial(jax.jit, static_argnames=("backend",))
def _score(params, config, output, ids, lengths, *, backend) -> Float[Array, "B C"]:
    ids, lengths = split((ids, lengths))
    return decoding.score_options(params.decoder, config.decoder, output, ids, lengths, backend=backend)


@partial(jax.jit, static_argnames=("yes", "no"))
def _yes_no(logits, *, yes, no) -> Float[Array, "B"]:
    return decoding.yes_no_confidence(logits, yes, no)


@jax.jit
def _unstack(cache: Cache, hidden) -> tuple[Kept, ...]:
    k, v = (constrain(x, (None, None, None, "kv_heads", None)) for x in (cache.k, cache.v))
    order, shift, hidden = (
        None if x is None else constrain(x, (None,) * x.ndim) for x in (cache.order, cache.shift, hidden)
    )
    return tuple(
        Kept(k[:, i], v[:, i], *(None if x is None else x[i] for x in (order, shift, hidden)))
        for i in range(len(cache.order))
    )


def _restack(kept: Sequence[Kept], lengths: Int[Array, "B"], capacity: int) -> Cache:
    """Kept rows as one cache with room for `capacity` slots; tokens from `lengths` on are forgotten."""
    k, v = (
        constrain(jnp.stack(rows, axis=1), CACHE_LBSKH) for rows in zip(*((row.k, row.v) for row in kept), strict=True)
    )
    order = split(jnp.stack([row.order for row in kept]))
    order = jnp.where(order < lengths[:, None], order, NEVER)
    slots = order.shape[1]
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, capacity - slots), (0, 0), (0, 0))) for x in (k, v))
    order = jnp.pad(order, ((0, 0), (0, capacity - slots)), constant_values=NEVER)
    shifts = [row.shift for row in kept if row.shift is not None]
    shift = split(jnp.stack(shifts)) if shifts else None
    return Cache(k, v, order, jnp.int32(slots), lengths, shift)


@partial(jax.jit, static_argnames=("layers", "backend"))
def _prefix(params, config, ids, slots, positions, features, *, layers, backend) -> tuple[Kept, ...]:
    """Keys and values of the first `layers` layers for prompts' beginnings without padding."""
    ids, slots, positions, images = split((ids, slots, positions, _images(features)))
    lengths = jnp.full_like(ids[:, 0], ids.shape[1])
    # Reading the last layer takes it out of the scan; as only its keys and values are used, XLA drops the rest of it.
    spec = ReadSpec((layers - 1,), frozenset({"values"}), stop=layers)
    out = family_of(config).prefill(
        params, config, ids, lengths, images, slots, positions, capacity=ids.shape[1], spec=spec, backend=backend
    )
    return _unstack(out.cache, None)


@partial(jax.jit, static_argnames=("capacity", "backend"))
def _extend(params, config, kept, cached, ids, lengths, *, capacity, backend) -> Output:
    """Append tokens to kept rows, of which the first `cached` tokens hold."""
    cached, ids, lengths = split((cached, ids, lengths))
    cache = _restack(kept, cached, capacity)
    return decoding.extend(params.decoder, config.decoder, ids, lengths, cache, backend=backend)


@partial(jax.jit, static_argnames=("layer", "capacity", "backend"))
def _resume(params, config, kept, lengths, positions, *, layer, capacity, backend) -> Output:
    """Run the layers from `layer` on over kept hidden states, and join the two caches."""
    lengths, positions, hidden = split((lengths, positions, jnp.stack([row.hidden for row in kept])))
    below = _restack(kept, lengths, capacity)
    spec = ReadSpec(start=layer)
    out = family_of(config).resume(params, config, hidden, lengths, spec, positions, capacity=capacity, backend=backend)
    cache = replace(out.cache, k=jnp.concatenate([below.k, out.cache.k]), v=jnp.concatenate([below.v, out.cache.v]))
    return replace(out, cache=cache)


# --- handlers ---------------------------------------------------------------------------------------------------------


class Images:
    """Features of one image; not a request, but what requests need."""

    name = "images"

    def work(self, model: str, vlm: VLM | Matcher, images: Any) -> Work:
        flops = family_of(vlm.config).image_flops(vlm.config, images)
        return Work((self, model, shapes((images,))), images, flops=flops, padded_flops=flops)

    def launch(self, engine, works, size):
        vlm = engine.models[works[0].key[1]]
        images = stacked(padded([work.data for work in works], size))
        with vlm.on_mesh():
            features = _encode(vlm.params, vlm.config, images, backend=vlm.attention)
        return lambda: list(jax.block_until_ready(features)[: len(works)])


IMAGES = Images()


class Prefixes:
    """Keys and values of the beginning of a prompt; not a request, but what requests with that beginning need."""

    name = "prefix"

    def work(
        self, model: str, vlm: VLM, begun: "Begun", layers: int | None, images: Sequence[tuple[Hashable, Work]]
    ) -> tuple[Hashable, Work]:
        """The name by which it is shared, and the work of the first layers (None: all).

        begun: the tokens. images: names and works of the images in them, in order.
        """
        config, names, ids = vlm.config.decoder, tuple(name for name, _ in images), begun.ids
        depth: int = config.num_layers if layers is None else layers
        key = (self, model, len(ids), begun.images, begun.rows, depth)
        # Of the last layer only keys and values are computed.
        flops = _prefill_flops(vlm, len(ids), depth - 1)
        flops += 4 * len(ids) * config.width * config.num_kv_heads * config.head_dim
        return (*key, ids.tobytes(), names), Work(key, (begun, names), needs=dict(images), padded_flops=flops)

    def launch(self, engine, works, size):
        _, model, _, _, room, layers = works[0].key
        (_, vlm), rows = engine.model(model), padded(works, size)
        ids, slots, positions = stacked([(b.ids, b.slots, b.positions) for b, _ in (work.data for work in rows)])
        with vlm.on_mesh():
            features = tuple(tuple(_with_rows(work.got[name], room) for name in work.data[1]) for work in rows)
            kept = _prefix(
                vlm.params, vlm.config, ids, slots, positions, features, layers=layers, backend=vlm.attention
            )[: len(works)]
        engine.prefixes.update(kept)
        return lambda: list(jax.block_until_ready(kept))


PREFIXES = Prefixes()


class Begun(NamedTuple):
    """Tokens of a prompt, or of its beginning, and what they are."""

    ids: np.ndarray
    slots: np.ndarray
    positions: np.ndarray | None
    images: int
    rows: int
    """Of the features of each image: all have the bucket of the largest, so programs differ by that alone."""

    @classmethod
    def of(cls, tokens: Tokens, images: Sequence[ImageInput], positions: np.ndarray | None) -> "Begun":
        """Tokens that see these images, the prompt's first."""
        rows = max((image.capacity for image in images), default=0)
        return cls(tokens.ids, slots_of(tokens, images), positions, len(images), rows)

    def part(self, start: int, stop: int | None = None) -> "Begun":
        """Some of the tokens."""
        at, positions = slice(start, stop), self.positions
        return self._replace(
            ids=self.ids[at], slots=self.slots[at], positions=None if positions is None else positions[at]
        )


class Key(NamedTuple):
    """What prompts share that run in one batch."""

    handler: Any
    model: str
    length: int
    """Tokens, padding included."""
    start: int
    """Tokens of the prefix, which the others follow; 0 without one."""
    images: int
    room: int
    """Rows of the features of each image."""
    grid: tuple[int, int]
    """Token rows and columns of an image (`Row.grid`)."""
    rows: int
    asked: int
    """Tokens of the text for the Q-Former, padding included; 0 without one."""
    static: Any
    args: tuple


@dataclass(frozen=True, eq=False)
class Prompted:
    """The data of a work with a prompt."""

    tokens: Tokens
    whole: Begun
    images: tuple[ImageInput, ...]
    features: tuple[Hashable, ...]
    """Names of the images' features, in prompt order."""
    prefix: tuple[Hashable, ...]
    """Name of the prefix, where there is one."""
    rows: np.ndarray
    wanted: np.ndarray
    args: tuple[Any, ...]
    seed: tuple[int, int]
    asked: np.ndarray | None = None
    """The text in the Q-Former's ids, where image tokens depend on it."""
    extra: Any = None
    """What the handler itself wants to remember."""

    @property
    def length(self) -> int:
        return len(self.tokens.ids)

    @property
    def image_tokens(self) -> tuple[int, ...]:
        return tuple(image.tokens for image in self.images)

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        return tuple(image.geometry for image in self.images)


class PromptHandler:
    """What requests with images and a prompt have in common."""

    name: str

    def work(
        self,
        engine,
        request,
        seed,
        static: Hashable,
        *,
        which: str | tuple[int, ...] = "last",
        args=(),
        room=0,
        layers=None,
        shares=True,
        extra=None,
    ) -> Work:
        """Make a prompt ready.

        static: what else the program depends on. which: the wanted rows (`Read.rows`). room: tokens that the answer may
        have. layers: how many run (None: all, and logits). shares: whether a prefix's keys and values would do.
        """
        model, vlm = engine.model(request.model)
        setup = vlm.setup_of(len(request.images))
        images = [engine.preprocessed(model, image, setup) for image in request.images]
        inputs = tuple(image.input for image in images)
        tokens = vlm.tokenise(request.prompt, [image.tokens for image in inputs])
        length = _bucket_of(engine, vlm, len(tokens.ids), room)
        positions = vlm.positions(tokens, [image.geometry for image in inputs])
        whole = Begun.of(tokens, inputs, positions)
        grid = _grid(vlm.config.grid, inputs)
        rows = wanted_rows(which, tokens)
        if not len(rows):
            raise UserError(f"rows={which!r} names no token of text in the prompt {tokens.text!r}; name a phrase of it")
        asked = vlm.ask(tokens)
        start = _cut(engine, vlm, tokens, rows) if shares and asked is None else 0
        wanted = np.arange(bucket(len(rows), SHORT, "the wanted rows")) < len(rows)
        rows = np.pad(rows, (0, len(wanted) - len(rows)), mode="edge").astype(np.int32)
        args = arrays(args)
        names = tuple(image.name for image in images)
        needs, prefix = {image.name: IMAGES.work(model, vlm, image.input.arrays) for image in images}, ()
        if start:
            length = start + min(bucket(len(tokens.ids) - start, REST, "the prompt"), vlm.max_length - start)
            seen = sum(at < start for at, _ in tokens.image_spans)
            begun = Begun.of(tokens, inputs[:seen], positions).part(0, start)
            name, work = PREFIXES.work(model, vlm, begun, layers, [(name, needs[name]) for name in names[:seen]])
            needs[name], prefix = work, (name,)
        flops = _prefill_flops(vlm, len(tokens.ids), layers)
        padded_flops, heard = _prefill_flops(vlm, length - start, layers, start), 0
        if asked is not None:
            heard = min(bucket(len(asked), REST, "the prompt"), vlm.config.qformer.max_length)
            query_flops = partial(family_of(vlm.config).query_flops, vlm.config)
            flops += len(images) * query_flops(len(asked))
            padded_flops += len(images) * query_flops(heard)
        return Work(
            key=Key(self, model, length, start, whole.images, whole.rows, grid, len(rows), heard, static, shapes(args)),
            data=Prompted(tokens, whole, inputs, names, prefix, rows, wanted, args, seed, asked, extra),
            text=tokens.text,
            needs=needs,
            flops=flops,
            padded_flops=padded_flops,
            cost=lambda result: (0, flops),
        )

    def batch(self, vlm: VLM, works: list[Work], size: int) -> Batch:
        """Prompts of one key as a batch of `size` rows."""
        key, works = works[0].key, padded(works, size)
        rows, start = [work.data for work in works], key.start
        width = key.length - start
        rest = [row.whole.part(start) for row in rows]
        return Batch(
            ids=np.stack([right_pad(part.ids, width) for part in rest]),
            lengths=np.array([len(part.ids) for part in rest], np.int32),
            slots=np.stack([right_pad(part.slots, width, -1) for part in rest]),
            positions=None
            if rest[0].positions is None
            else np.stack([right_pad(part.positions, width) for part in rest]),
            features=tuple(
                tuple(_with_rows(work.got[name], key.room) for name in work.data.features) for work in works
            ),
            prefix=tuple(work.got[name] for work in works for name in work.data.prefix),
            cells=np.stack([_cells(row, key.grid[0] * key.grid[1]) for row in rows]),
            grid=key.grid,
            shapes=np.array([[g.grid for g in row.geometries] for row in rows], np.int32).reshape(len(rows), -1, 2),
            rows=np.stack([row.rows for row in rows]),
            wanted=np.stack([row.wanted for row in rows]),
            asked=texts([row.asked for row in rows], key.asked) if key.asked else None,
            queries=np.stack([_queries(row) for row in rows]) if key.asked else None,
        )

    def prefill(self, engine, works, size, *, capacity=None, spec=ReadSpec(), build=None, reduce=None, plugins=()):
        """Run a batch of prompts, padded to `size` rows; see `_prefill`."""
        _, vlm = engine.model(works[0].key.model)
        args = stacked([work.data.args for work in padded(works, size)])
        with vlm.on_mesh():
            batch = self.batch(vlm, works, size)
            result = _prefill(
                vlm.params, vlm.config, batch, plugins, () if reduce else args, args if reduce else (),
                capacity=capacity, spec=spec, build=build, reduce=reduce, backend=vlm.attention,
            )  # fmt: skip
        return vlm, result


def _grid(nominal: tuple[int, int], images: Sequence[ImageInput]) -> tuple[int, int]:
    """Token rows and columns of a prompt's images as its program sees them; (1, C) where they vary."""
    cells = max((image.geometry.capacity or len(image.cells) for image in images), default=0)
    return (1, cells) if any(image.geometry.capacity is not None for image in images) else nominal


def _cells(row: Prompted, count: int) -> Int[np.ndarray, "I C"]:
    """Positions in the prompt of the cells of each image, -1 behind them."""
    spans = zip(row.tokens.image_spans, row.images, strict=True)
    found = [right_pad(at + image.cells, count, -1) for (at, _), image in spans]
    return np.stack(found) if found else np.zeros((0, count), np.int32)


def _queries(row: Prompted) -> Int[np.ndarray, "I Q"]:
    """Positions in the prompt of the tokens of each image."""
    return np.stack([at + np.arange(count, dtype=np.int32) for at, count in row.tokens.image_spans])


@dataclass(frozen=True)
class Sampling:
    """The static part of how an answer is generated."""

    max_new_tokens: int
    sampled: bool
    temperature: float
    keep: bool

    @classmethod
    def of(cls, request: Generate | Continue) -> "Sampling":
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}; expected at least 1")
        if request.temperature < 0:
            raise UserError(f"temperature is {request.temperature}; expected 0 (greedy) or more")
        return cls(request.max_new_tokens, request.temperature > 0, request.temperature, request.keep)


def _generate(
    engine, model: str, size: int, output: Output, edits, sampling: Sampling, rows: "list[_Said]", value: Any = None
):
    """Decode after `output`; `rows` says what each row has already said, `value` is for the replies."""
    _, vlm = engine.model(model)
    seeds = np.array(padded([(engine.seed, *row.seed) for row in rows], size), np.uint32)
    with vlm.on_mesh():
        decoded = _decode(
            vlm.params, vlm.config, output.cache, output.logits, output.plugins, edits, seeds,
            np.float32(sampling.temperature or 1.0),
            max_new_tokens=sampling.max_new_tokens, eos_ids=vlm.eos_ids, sampled=sampling.sampled,
            backend=vlm.attention,
        )  # fmt: skip
        kept = _unstack(decoded.cache, None) if sampling.keep else repeat(None)
    answer = decoded.ids, decoded.count, decoded.finite, value

    def collect():
        ids, count, finite, values = jax.device_get(answer)
        values = [jax.tree.map(lambda x, i=i: x[i], values) for i in range(len(rows))]
        engine.stats.flops += size * _decode_flops(vlm, max(len(row.ids) for row in rows), int(count.max()) - 1)
        return [
            _reply(model, vlm, row, ids[i, : count[i]].tolist(), mine, value) if finite[i] else not_finite(vlm)
            for i, (row, mine, value) in enumerate(zip(rows, kept, values, strict=False))
        ]

    return collect


@dataclass(frozen=True, eq=False)
class _Said:
    """One row on its way into decoding: its tokens so far, its seed and the strings that end its answer."""

    ids: np.ndarray
    image_tokens: tuple[int, ...]
    """Of each image."""
    seed: tuple[int, int]
    stop: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class State:
    """Where a `Continue` goes on: the tokens so far, and the cache of all but perhaps the last of them."""

    model: str
    ids: np.ndarray
    image_tokens: tuple[int, ...]
    """Of each image."""
    kept: Kept
    cached: int
    layer: int | None = None
    """Where a reading stopped."""
    positions: np.ndarray | None = None
    """Of its tokens, where they are not counted from 0."""

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes


class Anew(NamedTuple):
    """In place of a `State` where image tokens depend on the whole text: all of a further turn's prompt has to run."""

    model: str
    images: tuple[Any, ...]


def _reply(model: str, vlm: VLM, row: _Said, ids: list[int], kept: Kept | None, value: Any = None) -> Reply:
    """A row's generated tokens as a reply, cut at the end of text and before the first stop string."""
    count, cached = len(ids), len(row.ids) + len(ids) - 1
    ids = ids[:-1] if ids[-1] in vlm.eos_ids else ids
    text, ids = vlm.text(ids, row.stop), _before_stop(vlm, ids, row.stop)
    if kept is None:
        return Reply(text, tuple(ids), count, value=value)
    said = np.concatenate([row.ids, np.array(ids, np.int32)])
    return Reply(text, tuple(ids), count, State(model, said, row.image_tokens, kept, min(cached, len(said))))


def _before_stop(vlm: VLM, ids: list[int], stop: tuple[str, ...]) -> list[int]:
    """The tokens that end before the first stop string; the text is searched as decoded, space around it included."""

    def decoded(size: int) -> str:
        return vlm.tokenizer.decode(ids[:size], skip_special_tokens=True)

    whole = decoded(len(ids)) if stop else ""
    cut = min((whole.find(s) for s in stop if s in whole), default=None)
    if cut is None:
        return ids
    return ids[: max((size for size in range(len(ids)) if len(decoded(size)) <= cut), default=0)]


class GenerateHandler(PromptHandler):
    name = "generate"

    def prepare(self, engine, request: Generate, seed) -> Work:
        sampling, room = Sampling.of(request), request.max_new_tokens
        if request.keep and (request.taps or request.plugin):
            raise UserError("keep=True does not go with taps or a plugin: a further turn would run without them")
        static = (sampling, request.taps, _Same(request.plugin))
        shares = request.taps is None and request.plugin is None
        extra = request.stop, request.images
        work = self.work(engine, request, seed, static, args=request.args, room=room, shares=shares, extra=extra)
        return _answering(work, engine.model(request.model)[1], work.data.length)

    def launch(self, engine, works, size):
        key = works[0].key
        sampling, build, plugin = key.static
        plugins = () if plugin.value is None else (plugin.value,)
        capacity = key.length + sampling.max_new_tokens
        _, (out, edits, value, _) = self.prefill(engine, works, size, capacity=capacity, build=build, plugins=plugins)
        rows = [_Said(d.tokens.ids, d.image_tokens, d.seed, d.extra[0]) for d in (work.data for work in works)]
        if not (sampling.keep and key.asked):
            return _generate(engine, key.model, size, out, edits, sampling, rows, value)
        collect = _generate(engine, key.model, size, out, edits, replace(sampling, keep=False), rows, value)
        states = [Anew(key.model, work.data.extra[1]) for work in works]
        return lambda: [
            replace(reply, state=state) if isinstance(reply, Reply) else reply
            for reply, state in zip(collect(), states, strict=True)
        ]


def _answering(work: Work, vlm: VLM, length: int) -> Work:
    """The work with the cost of an answer after `length` tokens: a step per token, the first being prefill's."""

    def cost(reply):
        return reply.generated, work.flops + _decode_flops(vlm, length, reply.generated - 1)

    work.cost = cost
    return work


@dataclass(frozen=True, eq=False)
class _Same:
    """Something compared by identity: only works with the very same plugin or function share a batch."""

    value: Any

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self):
        return id(self.value)


class ReadHandler(PromptHandler):
    name = "read"

    def prepare(self, engine, request: Read, seed) -> Work:
        num_layers, spec = engine.model(request.model)[1].config.decoder.num_layers, request.spec
        if outside := [layer for layer in spec.layers if not 0 <= layer < num_layers]:
            raise UserError(f"cannot read layers {outside}: the model has layers 0 to {num_layers - 1}")
        if spec.layers and spec.stop is None:
            spec = replace(spec, stop=spec.layers[-1] + 1)
        rows = "rows" in spec.read
        spec = replace(spec, cross=cross_layers(engine.model(request.model)[1], request, spec.cross, rows))
        if request.keep and spec.stop in (None, num_layers):
            raise UserError(f"nothing is left to continue: the reading runs all {num_layers} layers; lower spec.stop")
        layers = None if spec.stop == num_layers else spec.stop
        static = (spec, request.reduce, request.keep)
        shares = spec.read <= {"rows", "values"} and not spec.start and not request.keep
        return self.work(
            engine, request, seed, static, which=request.rows, args=request.args, layers=layers, shares=shares
        )

    def launch(self, engine, works, size):
        key = works[0].key
        spec, reduce, keep = key.static
        capacity = key.length if keep else None
        vlm, (out, _, value, finite) = self.prefill(engine, works, size, capacity=capacity, spec=spec, reduce=reduce)
        value, axis = (out.readouts, 1) if reduce is None else (value, 0)
        with vlm.on_mesh():
            kept = _unstack(out.cache, out.hidden) if keep else repeat(None)

        def collect():
            values, fine = jax.device_get((value, finite))

            def reading(i, data, row):
                state = row and State(
                    key.model, data.tokens.ids, data.image_tokens, row, data.length, spec.stop, data.whole.positions
                )
                return Reading(jax.tree.map(lambda x: np.take(x, i, axis), values), data.geometries, state)

            return [
                reading(i, work.data, row) if fine[i] else not_finite(vlm)
                for i, (work, row) in enumerate(zip(works, kept, strict=False))
            ]

        return collect


def cross_layers(
    vlm: VLM, request: Read | Gradient, asked: tuple[int, ...] | None, rows: bool
) -> tuple[int, ...] | None:
    """Which cross-attentions are read: those asked for or, beside attention rows, the model's own choice."""
    if not hasattr(vlm.config, "qformer") or not request.images:
        if asked:
            raise UserError(f"cross={asked}: {vlm.name} sees no image of this request through queries; leave it out")
        return None
    count = len(vlm.config.qformer.cross_layers)
    if outside := [layer for layer in asked or () if not 0 <= layer < count]:
        raise UserError(f"cannot read cross-attentions {outside}: the Q-Former has {count}, 0 to {count - 1}")
    return (vlm.config.looking,) if asked is None and rows else asked


def wanted_rows(which: str | tuple[int, ...], tokens: Tokens) -> np.ndarray:
    """Token positions that `Read.rows` names."""
    if which == "last":
        return np.array([tokens.last])
    if which == "question":
        return tokens.indices("user")
    if isinstance(which, str):
        return tokens.span(which)
    rows = np.asarray(which, int)
    if not rows.size or rows.min() < 0 or rows.max() > tokens.last:
        raise UserError(f"rows {list(which)} are not positions of a prompt of {len(tokens.ids)} tokens")
    return rows


class ScoreHandler(PromptHandler):
    name = "score"

    def prepare(self, engine, request: Score, seed) -> Work:
        if not request.options:
            raise UserError("nothing to score: give at least one option")
        _, vlm = engine.model(request.model)
        replies = [vlm.reply_ids(option) for option in request.options]
        longest, total = max(map(len, replies)), sum(map(len, replies))
        count, width = bucket(len(replies), SHORT, "the list of options"), bucket(longest, SHORT, "an option")
        lengths = np.array([*map(len, replies), *repeat(0, count - len(replies))], np.int32)
        ids = np.stack([right_pad(reply, width) for reply in [*replies, *repeat((), count - len(replies))]])
        work = self.work(engine, request, seed, (count, width), room=longest, extra=(ids, lengths, len(replies)))
        flops, slots = partial(family_of(vlm.config).flops, vlm.config), count * width
        work.flops += flops(total, work.data.length + longest, logits=total)
        work.padded_flops += flops(slots, work.key.length + slots, logits=slots)
        work.cost = lambda scores: (0, work.flops)
        return work

    def launch(self, engine, works, size):
        key = works[0].key
        count, width = key.static
        vlm, (out, _, _, finite) = self.prefill(engine, works, size, capacity=key.length + count * width)
        ids, lengths, _ = stacked(padded([work.data.extra for work in works], size))
        with vlm.on_mesh():
            scores = _score(vlm.params, vlm.config, out, ids, lengths, backend=vlm.attention)

        def collect():
            values, fine = jax.device_get((scores, finite))
            return [values[i, : work.data.extra[2]] if fine[i] else not_finite(vlm) for i, work in enumerate(works)]

        return collect


class YesNoHandler(PromptHandler):
    name = "yes_no"

    def prepare(self, engine, request: YesNo, seed) -> Work:
        _, vlm = engine.model(request.model)
        yes, no = (vlm.reply_ids(word)[0] for word in ("Yes", "No"))
        if yes == no:
            raise JaxVQAError(
                f"{vlm.name}: its tokenizer ({type(vlm.tokenizer).__name__}) begins Yes and No with the same token "
                f"{yes}, so one token says nothing; compare them with Score"
            )
        return self.work(engine, request, seed, (yes, no))

    def launch(self, engine, works, size):
        vlm, (out, _, _, finite) = self.prefill(engine, works, size)
        yes, no = works[0].key.static
        with vlm.on_mesh():
            confidence = _yes_no(out.logits, yes=yes, no=no)

        def collect():
            values, fine = jax.device_get((confidence, finite))
            return [float(values[i]) if fine[i] else not_finite(vlm) for i in range(len(works))]

        return collect


class ContinueHandler:
    name = "continue"

    def prepare(self, engine, request: Continue, seed) -> Work:
        state, sampling = request.of.state, Sampling.of(request)
        if state is None:
            raise UserError("cannot continue: the earlier request did not say keep=True")
        if request.model not in (None, state.model):
            raise UserError(f"cannot continue on model {request.model!r}: the earlier request ran on {state.model!r}")
        if isinstance(state, Anew):
            if request.prompt is None:
                raise UserError("a reply is continued by a prompt: the whole conversation")
            whole = Generate(
                state.images, request.prompt, request.max_new_tokens, request.temperature, request.stop, request.keep,
                model=state.model, passes=request.passes,
            )  # fmt: skip
            return HANDLERS[Generate].prepare(engine, whole, seed)
        if (state.layer is None) != (request.prompt is not None):
            raise UserError("a reply is continued by a prompt (the whole conversation), a reading by none (its own)")
        (_, vlm), slots = engine.model(state.model), state.kept.k.shape[1]
        if request.prompt is None:
            if 0 < (last := len(getattr(vlm.config.vision, "deepstack", ()))) >= state.layer:
                raise UserError(
                    f"cannot go on from layer {state.layer}: image features enter {vlm.name} before layers 1 to "
                    f"{last}, and are gone by then; read with stop={last + 1} or above"
                )
            text, ids, common, width = "", state.ids, len(state.ids), 0
            _bucket_of(engine, vlm, len(ids), request.max_new_tokens)
            flops, padded_flops = (
                _prefill_flops(vlm, n, None) - _prefill_flops(vlm, n, state.layer) for n in (len(ids), slots)
            )
        else:
            tokens = vlm.tokenise(request.prompt, state.image_tokens)
            text, ids = tokens.text, tokens.ids
            _bucket_of(engine, vlm, len(ids), request.max_new_tokens)
            common = _common(state.ids[: state.cached], ids)
            if (ids[common:] == vlm.config.image_token_id).any():
                raise UserError("the prompt does not begin as the conversation that it continues; ask it with Generate")
            width = bucket(len(ids) - common, SHORT, "a further turn")
            flops, padded_flops = (
                family_of(vlm.config).flops(vlm.config, new, at + (new + 1) // 2)
                for new, at in ((len(ids) - common, common), (width, slots))
            )
        work = Work(
            key=(self, state.model, slots, width, state.layer, sampling),
            data=(state, ids, common, _Said(ids, state.image_tokens, seed, request.stop)),
            text=text,
            flops=flops,
            padded_flops=padded_flops,
        )
        return _answering(work, vlm, len(ids))

    def launch(self, engine, works, size):
        _, model, slots, width, layer, sampling = works[0].key
        (_, vlm), rows = engine.model(model), padded([work.data for work in works], size)
        kept = tuple(state.kept for state, *_ in rows)
        common = np.array([common for _, _, common, _ in rows], np.int32)
        static = dict(capacity=slots + width + sampling.max_new_tokens, backend=vlm.attention)
        with vlm.on_mesh():
            if width:
                new = np.stack([right_pad(ids[start:], width) for _, ids, start, _ in rows])
                lengths = np.array([len(ids) - start for _, ids, start, _ in rows], np.int32)
                out = _extend(vlm.params, vlm.config, kept, common, new, lengths, **static)
            else:
                places = [state.positions for state, *_ in rows]
                positions = None if places[0] is None else np.stack([right_pad(p, slots) for p in places])
                out = _resume(vlm.params, vlm.config, kept, common, positions, layer=layer, **static)
        return _generate(engine, model, size, out, (), sampling, [work.data[3] for work in works])


def _common(cached: np.ndarray, ids: np.ndarray) -> int:
    """Tokens of `ids` that the cache holds already; at least the last one is left to run."""
    size = min(len(cached), len(ids) - 1)
    differ = np.flatnonzero(cached[:size] != ids[:size])
    return int(differ[0]) if len(differ) else size


class CallHandler:
    """The user's functions, on the host, one after the other."""

    name = "call"

    def prepare(self, engine, request: Call, seed) -> Work:
        name = getattr(request.function, "__name__", type(request.function).__name__)
        return Work((self, _Same(request.function)), request.args, text=name)

    def launch(self, engine, works, size):
        function = works[0].key[1].value

        def call(args):
            try:
                return function(*args)
            except Exception as error:
                return error

        return lambda: [call(work.data) for work in works]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _bucket_of(engine, vlm: VLM, count: int, room: int) -> int:
    """The padded length of a prompt of `count` tokens; UserError if it and the answer do not fit the context."""
    if count + room > vlm.max_length:
        raise UserError(
            f"the prompt has {count} tokens and the answer may have {room}; together they exceed the context length "
            f"{vlm.max_length} of {vlm.name}: shorten the question, give fewer images or lower max_new_tokens"
        )
    return min(bucket(count, engine.lengths, "the prompt"), vlm.max_length)


def _cut(engine, vlm: VLM, tokens: Tokens, rows: np.ndarray) -> int:
    """Tokens of the prefix: the longest of the engine's lengths that reaches neither past the last image nor to `rows`.

    0 without such a length. Then, and under "splash", which attends to no cache, the whole prompt runs at once.
    """
    if not tokens.image_spans or vlm.attention == "splash":
        return 0
    limit = min(sum(tokens.image_spans[-1]), rows.min())
    return max((length for length in engine.lengths if length <= limit), default=0)


def not_finite(model: VLM | Matcher, what: str = "the logits") -> JaxVQAError:
    """The error for a row whose numbers are NaN or infinite."""
    return JaxVQAError(f"{model.name}: {what} are not finite; check the weights, or load them with dtype='float32'")


def _prefill_flops(vlm: VLM, tokens: int, layers: int | None, start: int = 0) -> int:
    """FLOPs of a causal prefill after `start` tokens, of the first `layers` layers (None: all, and a row of logits)."""
    config, flops, keys = vlm.config, family_of(vlm.config).flops, start + (tokens + 1) // 2
    if layers is None:
        return flops(config, tokens, keys)
    part = replace(config, decoder=replace(config.decoder, num_layers=layers))
    return flops(part, tokens, keys, logits=0)


def _decode_flops(vlm: VLM, length: int, tokens: int) -> int:
    """FLOPs of `tokens` decode steps after `length` tokens."""
    return family_of(vlm.config).flops(vlm.config, tokens, length + tokens // 2, logits=tokens)


HANDLERS: dict[type[Request], Handler] = {
    Generate: GenerateHandler(),
    Read: ReadHandler(),
    Score: ScoreHandler(),
    YesNo: YesNoHandler(),
    Continue: ContinueHandler(),
    Call: CallHandler(),
}
"""By kind of request; `engine.SERVED` are all."""
