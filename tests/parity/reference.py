"""The reference of the parity tests: tiny random models of HF transformers (torch, CPU, f32, eager attention)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import IMAGE_TOKEN_ID, PAD_TOKEN_ID, VOCABULARY, write_processor, write_tokenizer

from jaxvqa import decoder

IMAGE_SIZE, PATCH_SIZE = 56, 14
SIZES = ((90, 60), (64, 100), (200, 41), (56, 56), (30, 77))
"""Width and height of the test images, in the order in which the prompts use them."""
TOLERANCE = 1e-4
"""Of hidden states and logits of unit size: f32 rounding through a few blocks, with other summation orders."""
ROWS_TOLERANCE = 1e-5
"""Of attention probabilities."""


@dataclass(frozen=True)
class Reference:
    """What HF computes for right-padded prompts: NumPy arrays, f32."""

    hidden: np.ndarray
    """[L, B, T, D], after each block; the last one after the final norm, as HF returns it."""
    logits: np.ndarray
    """[B, T, V]."""
    attentions: np.ndarray | None = None
    """[L, B, N, T, T]."""
    features: np.ndarray | None = None
    """[M, P, D], after the projector."""


def randomise(model: Any, seed: int = 0) -> None:
    """Weights that keep activations near unit size, with norms and biases that differ from their neutral values.

    HF's own initialisation (std 0.02) leaves the residual stream so small that a wrong block would hardly show.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / np.sqrt(np.prod(p.shape[1:])))
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise)


def save_llava(folder: Path, *, num_kv_heads=4, head_dim=8, tied=False, select="default", feature_layer=-2, seed=0):
    """A tiny LLaVA, saved by HF itself, with tokenizer and image processor; returns the model."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.set_num_threads(1)
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=num_kv_heads, head_dim=head_dim, max_position_embeddings=2048, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=PAD_TOKEN_ID,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN_ID, vision_feature_layer=feature_layer,
        vision_feature_select_strategy=select, image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2 + (select == "full"),
        tie_word_embeddings=tied,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    write_processor(folder, IMAGE_SIZE, PATCH_SIZE, select)
    return model


def run(model: Any, ids: np.ndarray, lengths: np.ndarray, *, side="right", attentions=False, **inputs) -> Reference:
    """HF's forward pass over right-padded `ids` [B, T], padded on `side` for HF; the result is right-padded again."""
    import torch

    ids, mask = pad(ids, lengths, side)
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
            output_attentions=attentions,
            **inputs,
        )

    def unpad(x):
        rows = [x[:, b] if side == "right" else np.roll(x[:, b], n, axis=1) for b, n in enumerate(lengths)]
        return np.stack(rows, axis=1)

    return Reference(
        unpad(np.stack([h.numpy() for h in out.hidden_states[1:]])),
        unpad(out.logits.numpy()[None])[0],
        np.stack([a.numpy() for a in out.attentions]) if attentions else None,
        np.stack([f.numpy() for f in out.image_hidden_states]) if "pixel_values" in inputs else None,
    )


def pad(ids: np.ndarray, lengths: np.ndarray, side: str):
    """Right-padded ids as torch ids and attention mask, padded on `side`."""
    import torch

    valid = np.arange(ids.shape[1]) < lengths[:, None]
    ids = np.where(valid, ids, PAD_TOKEN_ID)
    if side == "left":
        ids, valid = (np.stack([np.roll(r, -n) for r, n in zip(x, lengths, strict=True)]) for x in (ids, valid))
    return torch.tensor(ids), torch.tensor(valid.astype(np.int64))


def prompts(image_tokens: int, lengths: tuple[int, ...], images: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Right-padded random prompts [B, max(lengths)]: BOS, text, and `images[b]` blocks of image tokens between text."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, (length, count) in enumerate(zip(lengths, images, strict=True)):
        ids[row, :length] = rng.integers(3, IMAGE_TOKEN_ID, length)
        ids[row, 0] = 1
        for i in range(count):
            start = 20 + 7 * row + i * (image_tokens + 45)
            ids[row, start : start + image_tokens] = IMAGE_TOKEN_ID
    return ids


def pictures(seed: int = 0, sizes: Sequence[tuple[int, int]] = SIZES):
    """One smooth and noisy RGB image per size (W, H), unlike each other."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for size in sizes
    ]


def finished(params: Any, config: Any, hidden: Any) -> tuple[Any, Any]:
    """Hidden states of all layers [L, B, T, D], the last normalised, as HF returns them; and the logits [B, T, V]."""
    last = decoder.rms_norm(hidden[-1], params.decoder.norm, config.decoder.norm_eps)
    return hidden.at[-1].set(last), decoder.finish(params.decoder, config.decoder, hidden[-1])


def compare(theirs: Reference, lengths: np.ndarray, at: np.ndarray, hidden, logits, rows) -> dict[str, float]:
    """Largest absolute difference of hidden states, logits and rows `at` [B, R] of attentions, over valid tokens."""
    valid, found = np.arange(logits.shape[1]) < np.asarray(lengths)[:, None], {}
    for i, (a, b) in enumerate(zip(hidden, theirs.hidden, strict=True)):
        found[f"hidden {i}"] = float(np.abs(a - b)[valid].max())
    found["logits"] = float(np.abs(logits - theirs.logits)[valid].max())
    if theirs.attentions is not None:
        expected = np.take_along_axis(theirs.attentions, at[None, :, None, :, None], axis=3)
        found["rows"] = float(np.abs(rows - expected).max())
    return found


def assert_parity(found: dict[str, float]) -> None:
    wrong = {k: d for k, d in found.items() if not d <= (ROWS_TOLERANCE if k in ("rows", "cross") else TOLERANCE)}
    assert not wrong, f"{wrong} of {found}"


def forced(family: Any, params: Any, config: Any, ids: Any, start: Any, cache: Any, count: int) -> tuple[Any, Any]:
    """Logits [B, count, V] of the tokens of `ids` from `start` [B] on, run on a cache one by one, and all at once."""
    tokens = jnp.take_along_axis(ids, start[:, None] + jnp.arange(count), axis=1)
    together = family.extend(params, config, tokens, jnp.full_like(start, count), cache)

    def step(cache, token):
        out = family.extend(params, config, token[:, None], jnp.ones_like(start), cache)
        return out.cache, out.logits

    steps = jax.lax.scan(step, cache, tokens.T)[1].swapaxes(0, 1)
    return steps, decoder.finish(params.decoder, config.decoder, together.hidden)


def assert_forced(got: tuple[Any, Any], logits: np.ndarray, lengths: Any, measured: Any, name: str) -> None:
    """The logits of `forced`, of the last tokens of prompts, against those of HF's one full forward pass."""
    count = got[0].shape[1]
    at = np.asarray(lengths)[:, None] - count + np.arange(count)
    expected = np.take_along_axis(logits, at[:, :, None], axis=1)
    for how, ours in zip(("step by step", "at once"), got, strict=True):
        measured(f"{name}, {how}", d := np.abs(np.asarray(ours) - expected).max())
        assert d <= TOLERANCE
