"""`Matcher`: an image-text matching model, ready to use; every computation is a pure, jitted function."""

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.tree_util import register_dataclass

from jaxvqa import geometry
from jaxvqa.attention import BACKENDS
from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry
from jaxvqa.images import open_image
from jaxvqa.models import blip_itm
from jaxvqa.models.blip_itm import MATCH, BlipItm, BlipItmConfig
from jaxvqa.sharding import BATCH, constrain
from jaxvqa.typing import Array, Float, Int
from jaxvqa.vision.inputs import ImageInput

MAX_WORDS, MAX_TOKENS = 50, 35
"""Of a text, as LAVIS processes captions; the tokens include the first and the last one."""
ENCODER_TOKEN = 30523
"""[ENC], the last of BLIP's published vocabulary: BERT's 30522 tokens, [DEC], [ENC]."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One image and one text, on the host."""

    ids: np.ndarray
    """i32 [T]."""
    pixels: np.ndarray
    """f32 [E, E, 3], normalised."""
    geometry: Geometry


@register_dataclass
@dataclass(frozen=True)
class Pairs:
    """A batch of images and right-padded texts, for the device."""

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    pixels: Float[Array, "B E E 3"]


def collate(rows: Sequence[Pair], *, length: int | None = None) -> Pairs:
    """A batch of pairs, the texts padded to `length` tokens (default: the longest's)."""
    lengths = np.array([len(row.ids) for row in rows], np.int32)
    length = int(lengths.max()) if length is None else length
    if lengths.max() > length:
        raise UserError(f"a text of {lengths.max()} tokens does not fit a batch of length {length}")
    ids = np.stack([np.pad(row.ids, (0, length - len(row.ids))) for row in rows])
    return Pairs(ids, lengths, np.stack([row.pixels for row in rows]))


def clean(text: str) -> str:
    """A text as LAVIS's caption processor leaves it: lower case, . ! " ( ) * # : ; ~ as spaces, at most 50 words.

    >>> clean('What is on the "Red" square?  (see: left)')
    'what is on the red square? see left'
    """
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:MAX_WORDS])


class Matcher(nnx.Module):
    """An image-text matching model; made by `load_matcher`.

    first_token: id that takes the place of each text's first token. None leaves it ([CLS]), as transformers does; LAVIS
        puts [ENC] there, 30523 for the published BLIP models.
    attention: name of an attention backend (`jaxvqa.attention`).
    """

    def __init__(
        self,
        config: BlipItmConfig,
        params: BlipItm,
        tokenizer: Any,
        image_processor: Any,
        *,
        name: str,
        first_token: int | None = None,
        attention: str = "auto",
        mesh: Mesh | None = None,
    ):
        if attention not in (*BACKENDS, "auto"):
            raise UserError(f"attention backend {attention!r}: expected one of {', '.join(BACKENDS)}, auto")
        if first_token is not None and not 0 <= first_token < config.text.vocab_size:
            raise UserError(f"first_token {first_token}: the vocabulary has {config.text.vocab_size} tokens")
        side = config.vision.image_size
        if (size := dict(image_processor.size)) != {"height": side, "width": side}:
            raise UserError(f"preprocessor_config.json makes images of {size}; the vision tower needs {side}x{side}")
        self.config, self.params = config, nnx.data(params)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.name, self.first_token, self.attention, self.mesh = name, first_token, attention, mesh

    def preprocess(self, image: Any) -> tuple[np.ndarray, Geometry]:
        """Pixels for the encoder, f32 [E, E, 3] (squashed, whatever the image's shape), and where each patch looks."""
        image = open_image(image)
        pixels = self.image_processor(images=[image], return_tensors="np")["pixel_values"][0]
        width, height = image.size
        place = geometry.for_squash(width, height, self.config.vision.image_size, self.config.grid)
        return np.ascontiguousarray(pixels.transpose(1, 2, 0), np.float32), place

    def process(self, image: Any, bucket: int | None = None, setup: str | None = None) -> ImageInput:
        """The same, as the engine takes it; all images are made ready in one way, and of one size."""
        pixels, place = self.preprocess(image)
        cells = place.grid[0] * place.grid[1]
        return ImageInput(pixels, place, np.arange(1, cells + 1, dtype=np.int32), cells + 1, cells + 1)

    def tokenise(self, text: str) -> np.ndarray:
        """Token ids i32 of a text (see `clean`); what exceeds 35 tokens is cut off before the last one ([SEP]), with a
        warning."""
        limit = min(MAX_TOKENS, self.config.text.max_length)
        ids = np.array(self.tokenizer(clean(text))["input_ids"], np.int32)
        if len(ids) > limit:
            warnings.warn(f"{self.name} reads {limit} of the {len(ids)} tokens of {text!r}", stacklevel=2)
            ids = np.append(ids[: limit - 1], ids[-1])
        if self.first_token is not None:
            ids[0] = self.first_token
        return ids

    def encode(self, image: Any, text: str) -> Pair:
        """An image (what `images.open_image` accepts) and a text, ready for `collate`."""
        return Pair(self.tokenise(text), *self.preprocess(image))

    def match_logits(self, pairs: Pairs | Pair) -> Float[Array, "B 2"]:
        """Logits f32 of "no match" and "match"."""
        with self.on_mesh():
            return _match(self.params, self.config, self._batch(pairs), self.attention)

    def probability(self, pairs: Pairs | Pair) -> Float[Array, "B"]:
        """Probability of "match"."""
        return jax.nn.softmax(self.match_logits(pairs), axis=-1)[:, MATCH]

    def gradcam(self, pairs: Pairs | Pair, layer: int = -1, *, relu: str = "sum") -> Float[Array, "B T h w"]:
        """Maps f32 of what speaks for a match, one per text token; see `blip_itm.gradcam`."""
        layer = blip_itm.layer_index(self.config, layer)
        with self.on_mesh():
            return _gradcam(self.params, self.config, self._batch(pairs), layer, relu, self.attention)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Context in which this model's arrays live on its mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _batch(self, pairs: Pairs | Pair) -> Pairs:
        return collate([pairs]) if isinstance(pairs, Pair) else pairs


@functools.partial(jax.jit, static_argnums=3)
def _match(params, config, pairs: Pairs, backend: str):
    pairs = jax.tree.map(lambda x: constrain(x, BATCH), pairs)
    image = blip_itm.encode_images(params, config, pairs.pixels, backend=backend)
    return blip_itm.match(params, config, pairs.ids, pairs.lengths, image, backend=backend)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _gradcam(params, config, pairs: Pairs, layer: int, relu: str, backend: str):
    pairs = jax.tree.map(lambda x: constrain(x, BATCH), pairs)
    image = blip_itm.encode_images(params, config, pairs.pixels, backend=backend)
    return blip_itm.gradcam(params, config, pairs.ids, pairs.lengths, image, layer, relu=relu, backend=backend)


def load_matcher(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    attention: str = "auto",
    first_token: int | None = None,
) -> Matcher:
    """Load an image-text matching model: a Hugging Face folder or hub id of a `BlipForImageTextRetrieval`.

    dtype: "bfloat16", "float16" or "float32" (default: float32 on CPU, bfloat16 elsewhere).
    Raises `JaxVQAError` for a source that is missing, incomplete, of another architecture, or not safetensors.
    """
    # transformers would advise to install torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from jaxvqa.convert import load

    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config, params, folder = load(source, revision=revision, dtype=dtype, mesh=mesh, offline=offline)
    if not isinstance(config, BlipItmConfig):
        raise UserError(f"{source}: a model that answers, not one that matches; use jaxvqa.load")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    name = local.name if (local := Path(source).expanduser()).exists() else str(source)
    return Matcher(
        config,
        params,
        tokenizer,
        image_processor,
        name=name,
        first_token=first_token,
        attention=attention,
        mesh=mesh,
    )


@functools.cache
def matcher_of_method(source: str, mesh: Mesh | None = None, offline: bool = False) -> Matcher:
    """`load_matcher` for a method's option, once per process; BLIP's published models get [ENC], as LAVIS gives it."""
    matcher = load_matcher(source, mesh=mesh, offline=offline)
    if matcher.config.text.vocab_size == ENCODER_TOKEN + 1:
        matcher.first_token = ENCODER_TOKEN
    return matcher
