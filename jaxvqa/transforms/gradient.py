"""Maps from gradients: attention weighted by its gradient (HiPerson Eq. 3-4, LAVIS, ViCrop), and pixel gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxvqa.errors import UserError
from jaxvqa.geometry import Geometry
from jaxvqa.transforms.blur import average_pool
from jaxvqa.transforms.normalise import TINY, ratio
from jaxvqa.transforms.relative_attention import relative_attention
from jaxvqa.typing import Array, Bool, Float, Int

MAX = jnp.finfo(jnp.float32).max


def attention_gradient(
    head_gradient: Float[Array | np.ndarray, "*B R N H"], values: Float[Array | np.ndarray, "*B S K H"]
) -> Float[Array, "*B N R S"]:
    """∂y/∂A of a scalar y, from its gradient to the head outputs (`taps.Tap.perturb`), exactly, in float32.

    A row of head n gives out = Σ_s A[s]·V[s], so ∂y/∂A[s] = ⟨∂y/∂out, V[s]⟩. Head n reads value head n // (N / K).
    The gradient is that of probabilities which nothing renormalises, and is not zero at keys that the row does not see:
    multiply it by the attention before use, as `gradient_map` does.
    """
    *_, R, N, H = head_gradient.shape
    S, K = values.shape[-3:-1]
    grouped = head_gradient.astype(jnp.float32).reshape(*head_gradient.shape[:-2], K, N // K, H)
    product = jnp.einsum("...RKGH,...SKH->...KGRS", grouped, values.astype(jnp.float32), precision="highest")
    return product.reshape(*product.shape[:-4], N, R, S)


def gradient_map(
    attention: Float[Array | np.ndarray, "*B N R h w"],
    gradient: Float[Array | np.ndarray, "*B N R h w"],
    rows: Bool[Array | np.ndarray, "*B R"] | None = None,
    *,
    relu: str = "sum",
) -> Float[Array, "*B h w"]:
    """∂y/∂A ⊙ A over the image, from all heads and the mean over rows: float32 [.., h, w], >= 0.

    attention, gradient: N heads, R query rows, probabilities and ∂y/∂A on the token grid.
    rows: which rows count (default all); no row gives zeros.
    relu: "sum" is ReLU(Σ_heads ∇A ⊙ A) (HiPerson Eq. 4); "grad" is mean_heads(ReLU(∇A) ⊙ A) (LAVIS, ViCrop's grad_att).
    """
    if relu not in ("sum", "grad"):
        raise UserError(f"gradient_map: relu={relu!r}; expected 'sum' or 'grad'")
    attention, gradient = attention.astype(jnp.float32), gradient.astype(jnp.float32)
    heads, count = attention.shape[-4:-2]
    product = attention * (jax.nn.relu(gradient) if relu == "grad" else gradient)
    # Means, because sums of finite numbers may overflow.
    maps = jax.nn.relu((product / heads).sum(-4))
    weights = jnp.full(count, 1 / count) if rows is None else rows / jnp.maximum(rows.sum(-1, keepdims=True), 1)
    mean = (jnp.minimum(maps, MAX) * weights[..., None, None]).sum(-3)
    return jnp.minimum(mean * heads if relu == "sum" else mean, MAX)


def match_layer(layer: int, num_layers: int, rows: str) -> int:
    """The cross-attention layer (0-based) of an image-text matching model from which a gradient map can be taken.

    layer: negative counts from the end. Raises UserError for a layer that does not exist, and for the mean over the
    text's tokens in the last one: the matching head reads only the first row, so the gradient of all others is zero.
    """
    if not -num_layers <= layer < num_layers:
        raise UserError(f"itm_layer={layer}: the matching model has layers 0 to {num_layers - 1}")
    if layer % num_layers == num_layers - 1 and rows == "tokens_mean":
        raise UserError(
            f"itm_layer={layer} with itm_rows='tokens_mean': in the last layer only the [ENC] row has a gradient, so "
            f"the map would be zero; use itm_rows='enc', or an earlier layer (LAVIS: 6)"
        )
    return layer % num_layers


def text_rows(rows: str, lengths: Int[Array | np.ndarray, "*B"], count: int) -> Bool[Array, "*B R"]:
    """Which of `count` text rows a matching model's gradient map uses, for texts of `lengths` tokens.

    "enc": row 0, [ENC] (HiPerson). "tokens_mean": the text's own tokens, without [ENC] and the final [SEP] (LAVIS).
    """
    row = jnp.arange(count)
    if rows == "enc":
        return jnp.broadcast_to(row == 0, (*lengths.shape, count))
    if rows == "tokens_mean":
        return (row > 0) & (row < lengths[..., None] - 1)
    raise UserError(f"itm_rows={rows!r}; expected 'enc' or 'tokens_mean'")


def gradient_length(gradient: Float[Array | np.ndarray, "*B H W 3"]) -> Float[Array, "*B H W"]:
    """Euclidean length over the colours, float32: what a pixel matters to y, from ∂y/∂X.

    Squares of large or small gradients would not be finite, or zero.
    """
    gradient = gradient.astype(jnp.float32)
    top = jnp.maximum(jnp.abs(gradient).max(-1, keepdims=True), TINY)
    return jnp.minimum(top[..., 0] * jnp.sqrt(jnp.square(ratio(gradient, top)).sum(-1)), MAX)


def pixel_gradient_map(
    question: Float[Array | np.ndarray, "*B H W"],
    reference: Float[Array | np.ndarray, "*B H W"],
    mask: Bool[Array | np.ndarray, "*B H W"],
    cell: int,
) -> Float[Array, "*B h w"]:
    """ViCrop's pure_grad: how much more a pixel matters to the question, where the image has detail.

    question, reference: `gradient_length` at the encoder's pixels, under the question and under a general request.
    mask: of `high_pass_mask`. cell: side of a token's cell in pixels.

    The ratio of the lengths, times the mask, averaged over each cell: float32 [.., h, w]. Zero where the reference has
    no gradient.
    """
    return average_pool(jnp.where(mask, relative_attention(question, reference), 0.0), cell)


def high_pass(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Float[np.ndarray, "h w"]:
    """How much detail there is at each pixel of the image, or of a box of it, resized to `size` (w, h), float32 (host).

    The distance in colour (0..1 per channel) from a 3 × 3 Gaussian blur of sigma 0.8, then a 7 × 7 median (ViCrop).
    """
    from scipy import ndimage  # a dependency of JAX, slow to import

    small = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box)
    pixels = np.asarray(small, np.float32) / 255
    low = ndimage.gaussian_filter(pixels, 0.8, radius=1, mode="mirror", axes=(0, 1))
    return ndimage.median_filter(np.sqrt(np.square(pixels - low).sum(-1)), 7)


def high_pass_mask(image: Image.Image, view: Geometry) -> Bool[np.ndarray, "E E"]:
    """Pixels of the encoder's input with more than the image's median detail; see `high_pass` (host).

    view: where the encoder looks. Padding has no detail, and no part in the median. ViCrop squashes the whole image,
    wherever the encoder looks: `for_squash`.
    """
    assert isinstance(view.encoder_size, int), "a square"
    mask = np.zeros((view.encoder_size, view.encoder_size), bool)
    # Rounded first: an edge that lies on a pixel's must not reach into the next one.
    corners = np.clip(view.to_encoder(np.array([(0, 0), view.image_size])).round(6), 0, view.encoder_size)
    (x1, y1), (x2, y2) = np.floor(corners[0]).astype(int), np.ceil(corners[1]).astype(int)
    seen = np.clip(view.from_encoder(np.array([(x1, y1), (x2, y2)])), 0, view.image_size).ravel()
    detail = high_pass(image, (int(x2 - x1), int(y2 - y1)), tuple(seen.tolist()))
    mask[y1:y2, x1:x2] = detail > np.median(detail)
    return mask
