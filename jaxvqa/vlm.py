"""`VLM`: a model with its parameters, tokenizer and image processor; every computation is a pure, jitted function."""

import contextlib
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
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
from jaxvqa.images import open_image, pad_to_square
from jaxvqa.methods import Facts
from jaxvqa.models import family_of, fingerprint
from jaxvqa.prompts import MARKER, TEMPLATES, ImageSlot, Prompt, Tokens, render, tokenise
from jaxvqa.sharding import BATCH, constrain
from jaxvqa.taps import Plugin, ReadSpec, Taps
from jaxvqa.typing import Array, Float, Int

# Preprocessing -> the prompt template with which its published results were made (spec of LLaVA-1.5's two setups).
TEMPLATE_OF_SETUP = {"pad": "vicuna_v1", "hf": "vicrop_hf"}


@dataclass(frozen=True, eq=False)
class Encoded:
    """One prompt with its images, on the host."""

    tokens: Tokens
    pixels: np.ndarray
    """f32 [I, E, E, 3], normalised."""
    geometries: tuple[Geometry, ...]


@register_dataclass
@dataclass(frozen=True)
class Inputs:
    """A batch of right-padded prompts, for the device."""

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    pixels: Float[Array, "B I E E 3"] | None
    """None where no row has an image; rows with fewer images are filled with zeros."""


def collate(rows: Sequence[Encoded], *, length: int | None = None, images: int | None = None) -> Inputs:
    """A batch of prompts, padded to `length` tokens and `images` images (default: the longest row's)."""
    lengths = np.array([len(row.tokens.ids) for row in rows], np.int32)
    length = int(lengths.max()) if length is None else length
    images = max(len(row.pixels) for row in rows) if images is None else images
    if lengths.max() > length:
        raise UserError(f"a prompt of {lengths.max()} tokens does not fit a batch of length {length}")
    ids = np.stack([np.pad(row.tokens.ids, (0, length - len(row.tokens.ids))) for row in rows])
    pixels = None
    if images:
        missing = ((0, 0),) * 3
        pixels = np.stack([np.pad(row.pixels, ((0, images - len(row.pixels)), *missing)) for row in rows])
    return Inputs(ids, lengths, pixels)


class VLM(nnx.Module):
    """A vision-language model, ready to use; made by `load`.

    image_setup: "pad" (to a square with the mean colour, the original LLaVA-1.5) or "hf" (what the checkpoint's image
        processor does by itself: a centre crop, for LLaVA-1.5).
    attention: name of an attention backend (`jaxvqa.attention`).
    """

    def __init__(
        self,
        config: Any,
        params: Any,
        tokenizer: Any,
        image_processor: Any,
        *,
        name: str,
        image_setup: str = "pad",
        attention: str = "auto",
        eos_ids: tuple[int, ...] = (),
        mesh: Mesh | None = None,
    ):
        if image_setup not in TEMPLATE_OF_SETUP:
            raise UserError(f"image_setup {image_setup!r}: expected one of {', '.join(TEMPLATE_OF_SETUP)}")
        if attention not in (*BACKENDS, "auto"):
            raise UserError(f"attention backend {attention!r}: expected one of {', '.join(BACKENDS)}, auto")
        self.config, self.params = config, nnx.data(params)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.name, self.image_setup, self.attention, self.mesh = name, image_setup, attention, mesh
        self.eos_ids = eos_ids or (tokenizer.eos_token_id,)
        _check_processor(image_processor, config.vision.image_size)

    @property
    def facts(self) -> Facts:
        """What methods may know of this model."""
        config = self.config
        template = TEMPLATE_OF_SETUP[self.image_setup]
        view = "pad" if self.image_setup == "pad" else "crop" if self.image_processor.do_center_crop else "squash"
        depth, side, said = config.decoder.num_layers, config.vision.image_size, fingerprint(config)
        return Facts(self.name, depth, side, config.grid, template, view, said)

    @property
    def max_length(self) -> int:
        """Tokens of the context: prompt and answer."""
        return self.config.decoder.max_length

    def reply_ids(self, text: str) -> list[int]:
        """Tokens of `text` as a reply (after "ASSISTANT:", with the space that precedes it), and the end of text."""
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        before, whole = encode("ASSISTANT:"), encode(f"ASSISTANT: {text}")
        ids = whole[len(before) :] if whole[: len(before)] == before else encode(text)
        return [*ids, self.eos_ids[0]]

    def preprocess(self, image: Image.Image) -> tuple[np.ndarray, Geometry]:
        """Pixels for the encoder, f32 [E, E, 3], and where each image token looks."""
        processor = self.image_processor
        red, green, blue = (int(255 * mean) for mean in processor.image_mean)
        image_in = pad_to_square(image, (red, green, blue)) if self.image_setup == "pad" else image
        pixels = processor(images=[image_in], return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels.transpose(1, 2, 0), np.float32), self.facts.geometry(image.size)

    def tokenise(self, prompt: Prompt | str, num_images: int) -> Tokens:
        """Token ids and spans of a prompt. Raises UserError where it does not fit the images or the context."""
        if isinstance(prompt, str):
            prompt = self._prompt(prompt, num_images)
        if prompt.num_images != num_images:
            raise UserError(f"the prompt has {prompt.num_images} image places, {num_images} images were given")
        tokens = tokenise(self.tokenizer, prompt, self.config.image_token_id, self.config.image_tokens)
        if len(tokens.ids) > self.max_length:
            raise UserError(
                f"the prompt has {len(tokens.ids)} tokens, the context of {self.name} {self.max_length}; "
                f"shorten the question or give fewer images"
            )
        return tokens

    def _prompt(self, text: str, num_images: int) -> Prompt:
        """A text with image markers is the whole prompt; one without is a question for the model's own template."""
        if MARKER not in text:
            return render(self.facts.template, text, num_images=num_images)
        first, *rest = text.split(MARKER)
        chunks: list[str | ImageSlot] = [first]
        for i, piece in enumerate(rest):
            chunks += [ImageSlot(i), piece]
        chunks = [chunk for chunk in chunks if chunk != ""]
        roles = tuple("user" if isinstance(chunk, str) else "image" for chunk in chunks)
        return Prompt(tuple(chunks), roles, joined=TEMPLATES[self.facts.template].joined)

    def encode(self, images: Any, prompt: Prompt | str) -> Encoded:
        """A prompt and its images, ready for `collate` or `prefill`.

        images: a list of what `images.open_image` accepts (a single one is taken as a list).
        prompt: a rendered prompt; or its text with one `<image>` per image; or just a question.
        """
        images = [images] if not isinstance(images, (list, tuple)) else images
        tokens = self.tokenise(prompt, len(images))
        pairs = [self.preprocess(open_image(image)) for image in images]
        side = self.config.vision.image_size
        pixels = np.stack([p for p, _ in pairs]) if pairs else np.zeros((0, side, side, 3), np.float32)
        return Encoded(tokens, pixels, tuple(g for _, g in pairs))

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
    if inputs.pixels is not None:
        rows, images = inputs.pixels.shape[:2]
        features = family.encode_images(params, config, jax.lax.collapse(inputs.pixels, 0, 2), backend=backend)
        features = features.reshape(rows, images, *features.shape[1:])
    return family.prefill(
        params,
        config,
        inputs.ids,
        inputs.lengths,
        features,
        capacity=capacity,
        taps=taps,
        spec=spec,
        plugins=plugins,
        backend=backend,
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
    image_setup: str = "pad",
    **kwargs: Any,
) -> VLM:
    """Load a model: a Hugging Face folder or hub id, a folder written by `jaxvqa convert`, or an adapter folder.

    dtype: "bfloat16", "float16" or "float32" (default: float32 on CPU, bfloat16 elsewhere).
    mesh: a mesh of `jaxvqa.sharding.make_mesh`; each process then reads its own shards only.
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
    return VLM(
        config,
        params,
        tokenizer,
        image_processor,
        name=local.name if (local := Path(source).expanduser()).exists() else str(source),
        image_setup=image_setup,
        attention=attention,
        eos_ids=_eos_ids(folder, tokenizer),
        mesh=mesh,
    )


def _eos_ids(folder: Path, tokenizer) -> tuple[int, ...]:
    """Ids that end a reply: the generation config's, else the tokenizer's."""
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    ids = tokenizer.eos_token_id if ids is None else ids
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _check_processor(processor, side: int):
    """The processor must show the encoder whole squares of its side: with another size, cells and pixels would part."""
    sizes = [dict(processor.size)] + ([dict(processor.crop_size)] if processor.do_center_crop else [])
    found = {size.get(name, size.get("shortest_edge")) for size in sizes for name in ("height", "width")}
    if found != {side}:
        raise JaxVQAError(f"preprocessor_config.json makes images of {sizes}; the vision tower needs {side}x{side}")
    if not processor.do_center_crop and "shortest_edge" in processor.size:
        raise JaxVQAError("preprocessor_config.json resizes the shortest edge without do_center_crop: no square image")
