"""Opening images whatever they are, cutting boxes out of them, and drawing heat maps and boxes on them.

Policy, so that a result can be reproduced:
* the first frame of an animation (of a PIL image, the frame it is at); transparency is composited on white; 16-bit
  grey is scaled to 8 bits (v / 257, not clipped); every other colour mode is converted to RGB as Pillow does it;
* EXIF rotation is ignored, as the original LLaVA code does, unless asked for;
* more than `max_pixels` pixels or a side more than `max_aspect` times the other is refused before decoding.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from jaxvqa.errors import UserError

MAX_PIXELS = 2**27  # 11,585 squared: four times the largest benchmark images (8K); 400 MB decoded.
MAX_ASPECT = 200
CLIP_MEAN_COLOUR = (122, 116, 104)  # int(255 * CLIP mean), the padding of LLaVA-1.5

# Raster formats only: Pillow's EPS reader, for one, starts an interpreter.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)

Source = str | PathLike | bytes | Image.Image | np.ndarray


class ImageError(UserError):
    """An image that cannot be used: which one, what is wrong with it, and what to do."""


def open_image(
    source: Source | Any,
    *,
    exif: str = "ignore",
    max_pixels: int = MAX_PIXELS,
    max_aspect: float | int = MAX_ASPECT,
) -> Image.Image:
    """Decode an image to 8-bit RGB.

    source: a path, the bytes of a file, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4], uint8 or uint16.
    exif: "ignore" leaves the pixels as stored (as LLaVA does), "apply" rotates them as the EXIF tag says.
    max_pixels, max_aspect: larger or more elongated images are refused before they are decoded.

    Raises ImageError for anything that is not a whole image within these limits.
    """
    if exif not in ("ignore", "apply"):
        raise UserError(f"exif={exif!r}; known: ignore, apply")
    source = bytes(source) if isinstance(source, bytearray) else source
    if not isinstance(source, Source):
        kind = type(source).__name__
        raise ImageError(f"an image cannot be a {kind}; expected a path, the bytes of a file, a PIL image or an array")
    name = _describe(source)
    image = _identify(source, name)
    _check_size(image.size, name, max_pixels, max_aspect)
    try:
        image.load()
        if exif == "apply":
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, name)
    except ImageError:
        raise
    except _DECODING_ERRORS as error:
        raise ImageError(f"{name}: cannot be decoded ({error}); the file is damaged or incomplete") from error


def _describe(source: Source) -> str:
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"image array {source.dtype}{list(source.shape)}"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"PIL image {source.mode} {source.width}x{source.height}"
    return str(source)


def _identify(source: Source, name: str) -> Image.Image:
    """Read the header; pixels are decoded later."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if not isinstance(source, bytes):
        path = Path(source)
        if not path.is_file():
            raise ImageError(f"{name}: no such image file; give the path of a local file")
        if path.stat().st_size == 0:
            raise ImageError(f"{name}: the file is empty")
    elif not source:
        raise ImageError("the image is empty (0 bytes)")
    Image.init()
    formats = [known for known in _FORMATS if known in Image.OPEN]
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image ({', '.join(formats)} are read)") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}; make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS as well") from error
    except _DECODING_ERRORS as error:
        raise ImageError(f"{name}: cannot be opened ({error})") from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    colour = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype not in (np.uint8, np.uint16) or not (array.ndim == 2 or colour) or 0 in array.shape:
        raise ImageError(
            f"{name}: expected uint8 or uint16 of shape [H, W], [H, W, 3] or [H, W, 4]; scale it to 0..255"
        )
    return Image.fromarray(_to_8_bits(array) if array.dtype == np.uint16 else array)


def _check_size(size: tuple[int, int], name: str, max_pixels: int, max_aspect: float | int):
    width, height = size
    if min(size) < 1:
        raise ImageError(f"{name}: {width}x{height} pixels; an image needs at least one")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} has {width * height} pixels, more than max_pixels={max_pixels}; "
            f"make it smaller or raise the limit"
        )
    if max(size) > max_aspect * min(size):
        raise ImageError(
            f"{name}: {width}x{height} is more elongated than max_aspect={max_aspect}; crop it or raise the limit"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: grey values {values.min()}..{values.max()} exceed 16 bits; scale them to 8 bits")
        return Image.fromarray(_to_8_bits(values)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no stated range; scale them to 8 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, rounded: 257 = 65535 / 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def pixel_box(box: Sequence | np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A half-open xyxy box as whole pixels of a (W, H) image: rounded as Pillow does (half to even), then clamped.

    Raises ImageError if nothing of the image is left in it.
    """
    values = [float(value) for value in box]
    if len(values) != 4 or not np.isfinite(values).all():
        raise ImageError(f"box {values} is not four finite numbers x1, y1, x2, y2")
    x1, y1, x2, y2 = (min(max(round(value), 0), size[axis % 2]) for axis, value in enumerate(values))
    if x1 >= x2 or y1 >= y2:
        raise ImageError(f"box {values} holds no pixel of the {size[0]}x{size[1]} image; expected x1 < x2, y1 < y2")
    return x1, y1, x2, y2


def crop(image: Image.Image, box: Sequence | np.ndarray) -> Image.Image:
    """The part of `image` inside a half-open xyxy pixel box (see `pixel_box`)."""
    return image.crop(pixel_box(box, image.size))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int] = CLIP_MEAN_COLOUR) -> Image.Image:
    """The image centred on a square of side max(W, H), as LLaVA-1.5 does; `geometry.for_pad` is its geometry."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


# Dark violet through magenta and orange to pale yellow, lightness rising evenly (close to matplotlib's inferno).
_HEAT = (
    np.array([0x000004, 0x280B54, 0x65156E, 0x9F2A63, 0xD44842, 0xF57D15, 0xFAC127, 0xFCFFA4], dtype=">u4")
    .view(np.uint8)
    .reshape(-1, 4)[:, 1:]
)
_BOX_COLOURS = ((0, 229, 255), (118, 255, 3), (255, 64, 129), (255, 255, 255))


def colour_map(heat: np.ndarray) -> np.ndarray:
    """Values in 0..1 [...] to colours, uint8 [..., 3]."""
    anchors = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(heat, anchors, channel) for channel in _HEAT.T], axis=-1).round().astype(np.uint8)


def overlay(
    image: Image.Image,
    heatmap: np.ndarray | None = None,
    boxes: Sequence | np.ndarray = (),
    *,
    opacity: float | int = 0.4,
) -> Image.Image:
    """`image` with a heat map blended over it and boxes outlined; a new RGB image of the same size.

    heatmap: [H', W'] in image coordinates (any resolution, it is stretched over the image), scaled to its own range.
    boxes: xyxy in pixels of `image`, coloured in turn.
    """
    image = image.convert("RGB")
    if heatmap is not None:
        heat = np.asarray(heatmap, np.float32)
        if heat.ndim != 2 or not heat.size or not np.isfinite(heat).all():
            raise UserError(f"a heat map is a finite array [H, W]; got shape {heat.shape}")
        span = np.ptp(heat)
        heat = (heat - heat.min()) / span if span > 0 else np.zeros_like(heat)
        heat = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BILINEAR))
        image = Image.blend(image, Image.fromarray(colour_map(heat)), opacity)
    draw = ImageDraw.Draw(image)
    width = max(1, round(max(image.size) / 250))
    for number, box in enumerate(boxes):
        x1, y1, x2, y2 = pixel_box(box, image.size)
        # Pillow's corners are inclusive. The dark rim keeps the outline visible on a bright ground.
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=(0, 0, 0), width=2 * width)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=_BOX_COLOURS[number % len(_BOX_COLOURS)], width=width)
    return image
