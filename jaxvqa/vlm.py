"""`VLM`: a model with its parameters, tokenizer and image processor; every computation is a pure, jitted function."""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.tree_util import register_dataclass
from PIL import Image

from jaxvqa import decoding
from jaxvqa.attention import BACKENDS
from jaxvqa.decoding import Decoded, Output
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.geometry import Geometry
from jaxvqa.images import open_image
from jaxvqa.methods import Facts
from jaxvqa.models import family_of, fingerprint
from jaxvqa.models.qformer import Asked
from jaxvqa.prompts import (
    MARKER,
    TEMPLATES,
    ImageSlot,
    Prompt,
    Template,
    Tokens,
    as_template,
    from_chat_template,
    render,
    tokenise,
)
from jaxvqa.sharding import BATCH, constrain
from jaxvqa.taps import Plugin, ReadSpec, Taps
from jaxvqa.typing import Array, Int
from jaxvqa.vision.inputs import ImageInput, size_in_buckets


@dataclass(frozen=True, eq=False)
class Encoded:
    """One prompt with its images, on the host."""

    tokens: Tokens
    images: tuple[ImageInput, ...]
    slots: Int[np.ndarray, "T"]
    """Which row of the images' features, side by side, each token is; -1 for text."""
    positions: Int[np.ndarray, "T 3"] | None
    """Of multimodal rotary embeddings; None counts from 0."""
    asked: Int[np.ndarray, "A"] | None = None
    """The text in the ids of the Q-Former's tokenizer, of models whose image tokens depend on it (`VLM.ask`)."""

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        """Where the tokens of each image look."""
        return tuple(image.geometry for image in self.images)


@register_dataclass
@dataclass(frozen=True)
class Inputs:
    """A batch of right-padded prompts, for the device."""

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    images: Any
    """Arrays [B, I, ...] of `ImageInput`; None where no row has an image. Rows with fewer are filled with zeros."""
    slots: Int[Array, "B T"] | None
    positions: Int[Array, "B T 3"] | None
    asked: Asked | None = None


def collate(rows: Sequence[Encoded], *, length: int | None = None, images: int | None = None) -> Inputs:
    """A batch of prompts, padded to `length` tokens and `images` images (default: the longest row's).

    Raises UserError for prompts that are longer, and for images that were made ready for different buckets.
    """
    lengths = np.array([len(row.tokens.ids) for row in rows], np.int32)
    length = int(lengths.max()) if length is None else length
    images = max(len(row.images) for row in rows) if images is None else images
    if lengths.max() > length:
        raise UserError(f"a prompt of {lengths.max()} tokens does not fit a batch of length {length}")

    def padded(values, fill=0):
        return np.stack(
            [np.pad(x, ((0, length - len(x)), *[(0, 0)] * (x.ndim - 1)), constant_values=fill) for x in values]
        )

    arrays, slots = None, None
    given = [image for row in rows for image in row.images]
    if given:
        if len(capacities := {image.capacity for image in given}) > 1:
            raise UserError(
                f"images of different buckets {sorted(capacities)} in one batch: encode all with bucket=, the largest"
            )
        empty = jax.tree.map(np.zeros_like, given[0].arrays)
        filled = [[*(image.arrays for image in row.images), *[empty] * images][:images] for row in rows]
        arrays = jax.tree.map(lambda *x: np.stack(x).reshape(len(rows), images, *x[0].shape), *chain(*filled))
        slots = padded([row.slots for row in rows], -1)
    positions = None if rows[0].positions is None else padded([row.positions for row in rows])
    asked = None
    if any(row.asked is not None for row in rows):
        asked = texts([np.zeros(0, np.int32) if row.asked is None else row.asked for row in rows])
    return Inputs(padded([row.tokens.ids for row in rows]), lengths, arrays, slots, positions, asked)


def texts(rows: Sequence[Int[np.ndarray, "_"]], length: int | None = None) -> Asked:
    """Texts for a Q-Former, right-padded to `length` tokens (default: the longest's)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    length = int(lengths.max()) if length is None else length
    return Asked(np.stack([np.pad(row, (0, length - len(row))) for row in rows]), lengths)


def queried(asked: Asked | None, taps: Taps, spec: ReadSpec, read: frozenset[str] = frozenset({"rows"})) -> dict:
    """Keyword arguments of a family's `prefill` for the queries through which it sees images; none without them.

    read: what is read of the cross-attentions `spec.cross`. Raises UserError for edits and readouts of queries that a
    model, or a prompt without images, has not.
    """
    if asked is None:
        if taps.cross_bias is not None or spec.cross:
            raise UserError(
                "ReadSpec.cross and Taps.cross_bias are of prompts whose images are seen through queries (InstructBLIP)"
            )
        return {}
    cross = ReadSpec(spec.cross, read, spec.heads) if spec.cross else ReadSpec()
    return dict(asked=asked, bias=taps.cross_bias, cross=cross)


def slots_of(tokens: Tokens, images: Sequence[ImageInput]) -> Int[np.ndarray, "T"]:
    """Which row of the images' features, side by side, each token of a prompt is; -1 for text.

    images: the prompt's first; their features all have as many rows as those of the largest.
    """
    slots, rows = np.full(len(tokens.ids), -1, np.int32), max((image.capacity for image in images), default=0)
    for number, ((at, count), image) in enumerate(zip(tokens.image_spans, images, strict=False)):
        slots[at : at + count] = number * (rows if image.stride is None else image.stride) + np.arange(count)
    return slots


class VLM(nnx.Module):
    """A vision-language model, ready to use; made by `load`.

    image_setup: how images are made ready, one of the family's `SETUPS` (None: the first): "pad" (to a square with the
        mean colour, the original LLaVA-1.5) or "hf" (what the checkpoint's image processor does by itself).
    image_buckets: sizes to which images are padded, ascending, in the family's unit (None: its `default_buckets`).
    attention: name of an attention backend (`jaxvqa.attention`).
    qformer_tokenizer: of a model with a Q-Former, which reads the prompt, too.
    template: the prompt template that the model was trained with, or its name (None: that of `image_setup`).
    """

    def __init__(
        self,
        config: Any,
        params: Any,
        tokenizer: Any,
        image_processor: Any,
        *,
        name: str,
        image_setup: str | None = None,
        image_buckets: tuple[int, ...] | None = None,
        attention: str = "auto",
        eos_ids: tuple[int, ...] = (),
        mesh: Mesh | None = None,
        qformer_tokenizer: Any = None,
        template: str | Template | None = None,
    ):
        family = family_of(config)
        image_setup = next(iter(family.SETUPS)) if image_setup is None else image_setup
        if image_setup not in family.SETUPS:
            raise UserError(f"image_setup {image_setup!r}: expected one of {', '.join(family.SETUPS)}")
        if attention not in (*BACKENDS, "auto"):
            raise UserError(f"attention backend {attention!r}: expected one of {', '.join(BACKENDS)}, auto")
        self.config, self.params = config, nnx.data(params)
        if hasattr(family, "ask") and qformer_tokenizer is None:
            raise JaxVQAError(f"{name}: a model with a Q-Former needs qformer_tokenizer, the tokenizer of that")
        self.tokenizer, self.image_processor, self.qformer_tokenizer = tokenizer, image_processor, qformer_tokenizer
        self.name, self.image_setup, self.attention, self.mesh = name, image_setup, attention, mesh
        self.eos_ids = eos_ids or (tokenizer.eos_token_id,)
        self.template = as_template(template or family.SETUPS[image_setup])
        family.check_processor(config, image_processor)
        self.image_buckets = image_buckets or family.default_buckets(config, image_processor)
        if any(a >= b for a, b in pairwise((0, *self.image_buckets))):
            raise UserError(f"image_buckets are {self.image_buckets}; expected numbers that ascend")

    @property
    def facts(self) -> Facts:
        """What methods may know of this model."""
        config, family, processor = self.config, family_of(self.config), self.image_processor
        side, buckets = config.vision.image_size, family.default_buckets(config, processor)
        view = family.geometry_of(config, processor, (side, side), buckets, self.image_setup)
        template, said = self.template, fingerprint(config)
        return Facts(
            self.name,
            config.decoder.num_layers,
            side,
            config.grid,
            template.name if template in TEMPLATES.values() else template,
            _Place(self),
            view.mode in ("tiles", "native"),
            said,
            family=family.__name__.rpartition(".")[2],
            queries=hasattr(family, "ask"),
        )

    @property
    def max_length(self) -> int:
        """Tokens of the context: prompt and answer."""
        return self.config.decoder.max_length

    def reply_ids(self, text: str) -> list[int]:
        """Tokens of `text` as a reply (with the space that the template puts before it), and the end of text."""
        encode, template = functools.partial(self.tokenizer.encode, add_special_tokens=False), self.template
        asked = template.assistant.lstrip() + template.answer_open
        before, whole = encode(asked), encode(f"{asked}{'' if template.answer_open else template.answer_start}{text}")
        ids = whole[len(before) :] if whole[: len(before)] == before else encode(text)
        return [*ids, self.eos_ids[0]]

    def process(self, image: Image.Image, bucket: int | None = None, setup: str | None = None) -> ImageInput:
        """An image as the encoder takes it, and where its tokens look.

        bucket: what to pad it to, in the unit of `image_buckets` (None: the smallest of these that holds it).
        setup: None is `image_setup`; see `setup_of`.
        """
        buckets, setup = self.image_buckets if bucket is None else (bucket,), setup or self.image_setup
        return family_of(self.config).process(self.config, self.image_processor, image, buckets, setup)

    def size_of(self, size: tuple[int, int], num_images: int = 1) -> int:
        """How large an image of `size` (W, H) is in the unit of `image_buckets`, in a prompt of so many images.

        `vision.inputs.buckets_for` chooses buckets for such sizes. Raises UserError where no bucket holds the image.
        """
        family, setup = family_of(self.config), self.setup_of(num_images)
        return size_in_buckets(
            lambda buckets: family.geometry_of(self.config, self.image_processor, size, buckets, setup),
            self.image_buckets[-1],
        )

    def setup_of(self, num_images: int) -> str:
        """How the images of a prompt are made ready: some families see several at once otherwise than one alone."""
        return getattr(family_of(self.config), "SEVERAL", self.image_setup) if num_images > 1 else self.image_setup

    def tokenise(self, prompt: Prompt | str, image_tokens: int | Sequence[int]) -> Tokens:
        """Token ids and spans of a prompt. Raises UserError where it does not fit the images or the context.

        image_tokens: of each image (`ImageInput.tokens`); a number says how many images of the nominal size there are.
        """
        counts = [self.config.image_tokens] * image_tokens if isinstance(image_tokens, int) else list(image_tokens)
        num_images = len(counts)
        if isinstance(prompt, str):
            prompt = self._prompt(prompt, num_images)
        if prompt.num_images != num_images:
            raise UserError(f"the prompt has {prompt.num_images} image places, {num_images} images were given")
        tokens = tokenise(self.tokenizer, prompt, self.config.image_token_id, counts)
        if len(tokens.ids) > self.max_length:
            raise UserError(
                f"the prompt has {len(tokens.ids)} tokens, the context of {self.name} {self.max_length}; "
                f"shorten the question or give fewer images"
            )
        return tokens

    def ask(self, tokens: Tokens) -> Int[np.ndarray, "A"] | None:
        """What the Q-Former reads of a prompt with images: its text. None for models without one, and without images.

        Raises UserError for a text that is too long for it.
        """
        if self.qformer_tokenizer is None or not tokens.image_spans:
            return None
        text = tokens.text.replace(MARKER, "")
        return family_of(self.config).ask(self.config, self.qformer_tokenizer, text)

    def _prompt(self, text: str, num_images: int) -> Prompt:
        """A text with image markers is the whole prompt; one without is a question for the model's own template."""
        template = self.template
        if MARKER not in text:
            return render(template, text, num_images=num_images)
        first, *rest = text.split(MARKER)
        chunks: list[str | ImageSlot] = [first]
        for i, piece in enumerate(rest):
            chunks += [template.image_open, ImageSlot(i), template.image_close, piece]
        chunks = [chunk for chunk in chunks if chunk != ""]
        roles = tuple("user" if isinstance(chunk, str) else "image" for chunk in chunks)
        return Prompt(tuple(chunks), roles, template.joined, template.images_outside)

    def positions(self, tokens: Tokens, geometries: Sequence[Geometry]) -> Int[np.ndarray, "T 3"] | None:
        """Positions of multimodal rotary embeddings; None for a model without them, which counts from 0."""
        if self.config.decoder.mrope is None:
            return None
        return family_of(self.config).positions(self.config, tokens.ids, geometries)

    def encode(self, images: Any, prompt: Prompt | str, bucket: int | None = None) -> Encoded:
        """A prompt and its images, ready for `collate` or `prefill`.

        images: a list of what `images.open_image` accepts (a single one is taken as a list).
        prompt: a rendered prompt; or its text with one `<image>` per image; or just a question.
        bucket: as in `process`; prompts of one batch need the same.
        """
        images = [images] if not isinstance(images, (list, tuple)) else images
        setup = self.setup_of(len(images))
        made = tuple(self.process(open_image(image), bucket, setup) for image in images)
        tokens = self.tokenise(prompt, [image.tokens for image in made])
        positions = self.positions(tokens, [image.geometry for image in made])
        return Encoded(tokens, made, slots_of(tokens, made), positions, self.ask(tokens))

    def prefill(
        self,
        inputs: Inputs | Encoded,
        *,
        taps: Taps = Taps(),
        spec: ReadSpec = ReadSpec(),
        plugins: tuple[Plugin, ...] = (),
        max_new_tokens: int = 64,
    ) -> Output:
        """Run prompts: logits at the last token, readouts, and a cache with room for `max_new_tokens`."""
        inputs = collate([inputs]) if isinstance(inputs, Encoded) else inputs
        capacity = inputs.ids.shape[1] + max_new_tokens
        with self.on_mesh():
            return _prefill(self.params, self.config, inputs, taps, spec, plugins, capacity, self.attention)

    def decode(
        self,
        output: Output,
        *,
        max_new_tokens: int = 64,
        key: Array | None = None,
        temperature: float = 1.0,
        stop: tuple[str, ...] = (),
        taps: Taps = Taps(),
    ) -> list[str]:
        """The replies: greedy, or sampled at `temperature` with `key`. A reply ends before the first stop string.

        taps: edits of every generated token's pass; those of `prefill` hold for the prompt only.
        Raises UserError if the cache has no room for `max_new_tokens`, `JaxVQAError` for logits that are not finite.
        """
        room = 0 if output.cache is None else output.cache.capacity - int(output.cache.filled) + 1
        if max_new_tokens > room:
            raise UserError(f"decode of {max_new_tokens} tokens: the cache has room for {room}; give prefill the same")
        keys = None if key is None else jax.random.split(key, output.logits.shape[0])
        with self.on_mesh():
            out = _decode(
                self.params, self.config, output, keys, temperature, taps, max_new_tokens, self.eos_ids, self.attention
            )
        if not (finite := np.asarray(out.finite)).all():
            raise JaxVQAError(f"{self.name}: logits of rows {np.flatnonzero(~finite).tolist()} are not finite")
        counts, ids = np.asarray(out.count), np.asarray(out.ids)
        return [self.text(row[:count], stop) for row, count in zip(ids, counts, strict=True)]

    def text(self, ids: Sequence[int] | np.ndarray, stop: tuple[str, ...] = ()) -> str:
        """Generated ids as text, special tokens and surrounding space removed, cut before the first stop string."""
        text = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        ends = [text.find(s) for s in stop if s in text]
        return text[: min(ends, default=len(text))].strip()

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Context in which this model's arrays live on its mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _prefill(params, config, inputs: Inputs, taps, spec, plugins, capacity: int, backend: str) -> Output:
    family, features = family_of(config), None
    inputs = jax.tree.map(lambda x: constrain(x, BATCH), inputs)
    if inputs.images is not None:
        images = jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), inputs.images)
        features = family.encode_images(params, config, images, backend=backend)
        features = features.reshape(len(inputs.ids), -1, features.shape[-1])
    return family.prefill(
        params,
        config,
        inputs.ids,
        inputs.lengths,
        features,
        inputs.slots,
        inputs.positions,
        capacity=capacity,
        taps=taps,
        spec=spec,
        plugins=plugins,
        backend=backend,
        **queried(inputs.asked, taps, spec),
    )


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _decode(params, config, output, keys, temperature, taps, max_new_tokens, eos_ids, backend) -> Decoded:
    return decoding.decode(
        params.decoder,
        config.decoder,
        output,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        keys=keys,
        temperature=temperature,
        taps=taps,
        backend=backend,
    )


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    attention: str = "auto",
    image_setup: str | None = None,
    image_buckets: tuple[int, ...] | None = None,
    template: str | Template | None = None,
    **kwargs: Any,
) -> VLM:
    """Load a model: a Hugging Face folder or hub id, a folder written by `jaxvqa convert`, or an adapter folder.

    dtype: "bfloat16", "float16" or "float32" (default: float32 on CPU, bfloat16 elsewhere).
    mesh: a mesh of `jaxvqa.sharding.make_mesh`; each process then reads its own shards only.
    attention, image_setup, image_buckets: as in `VLM`.
    template: as in `VLM`; None is the checkpoint's own chat template, and for LLaVA-1.5, InstructBLIP and checkpoints
        whose chat template shows no images that of `image_setup`.
    Further arguments go to `jaxvqa.convert.load` (`vision_tower`, `base`).
    Raises `JaxVQAError` for a source that is missing, incomplete, of another architecture, or not safetensors.
    """
    # transformers would advise to install torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from jaxvqa.convert import load as load_weights

    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config, params, folder = load_weights(source, revision=revision, dtype=dtype, mesh=mesh, offline=offline, **kwargs)
    if not hasattr(config, "decoder"):
        raise UserError(
            f"{source}: a model that matches images and texts, and answers nothing; use jaxvqa.load_matcher"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    second = None
    if hasattr(family_of(config), "ask"):
        if not (folder / "qformer_tokenizer").is_dir():
            raise JaxVQAError(f"{source}: no folder qformer_tokenizer, the tokenizer of what its Q-Former reads")
        second = AutoTokenizer.from_pretrained(folder / "qformer_tokenizer", local_files_only=True)
    vlm = VLM(
        config,
        params,
        tokenizer,
        image_processor,
        name=local.name if (local := Path(source).expanduser()).exists() else str(source),
        image_setup=image_setup,
        image_buckets=image_buckets,
        attention=attention,
        eos_ids=_eos_ids(folder, tokenizer),
        mesh=mesh,
        qformer_tokenizer=second,
        template=template,
    )
    if template is None and family_of(config).__name__.rpartition(".")[2] not in AS_PUBLISHED:
        vlm.template = _own_template(vlm, folder)
    return vlm


AS_PUBLISHED = ("llava", "instructblip")
"""Families whose published results were made with templates other than the chat templates of their checkpoints."""


def _own_template(vlm: VLM, folder: Path) -> Template:
    """What the checkpoint's chat template says; the family's template where it has none, or none that shows images."""
    chat = _chat_template(folder, vlm.tokenizer)
    if not chat:
        return vlm.template
    try:
        own = from_chat_template(vlm.tokenizer, chat, vlm.config.image_token_id, vlm.template)
    except JaxVQAError as error:
        raise JaxVQAError(
            f"{folder}: {error}; give load template= (--chat-template): one of {', '.join(TEMPLATES)}, or a "
            f"jaxvqa.prompts.Template"
        ) from error
    if own is None:
        warnings.warn(
            f"{vlm.name}: its chat template shows no images; it is asked in the template {vlm.template.name!r}",
            stacklevel=3,
        )
    return own or vlm.template


def _chat_template(folder: Path, tokenizer: Any) -> str | None:
    """The processor's, where older folders have one of its own, else the tokenizer's."""
    files = (folder / "processor_config.json", folder / "chat_template.json")
    found = [json.loads(file.read_text()).get("chat_template") for file in files if file.exists()]
    said = next(filter(None, found), tokenizer.chat_template)
    return said.get("default") if isinstance(said, dict) else said


def _eos_ids(folder: Path, tokenizer) -> tuple[int, ...]:
    """Ids that end a reply: the generation config's, else the tokenizer's."""
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    ids = tokenizer.eos_token_id if ids is None else ids
    return tuple(ids) if isinstance(ids, list) else (ids,)


@dataclass(frozen=True, eq=False, repr=False)
class _Place:
    """Where the image tokens of an image of `size` (W, H) look, in a prompt of so many images."""

    vlm: VLM

    def __call__(self, size: tuple[int, int], num_images: int = 1) -> Geometry:
        vlm, setup = self.vlm, self.vlm.setup_of(num_images)
        return family_of(vlm.config).geometry_of(vlm.config, vlm.image_processor, size, vlm.image_buckets, setup)

    def __repr__(self):
        return self.vlm.image_setup
