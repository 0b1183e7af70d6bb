"""InternVL against HF transformers: pixels, every vision block, projector, every layer, logits, decoding, gradients.

If a case fails here and nowhere else, look at the first quantity in the report: all after it is only a consequence.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import TOLERANCE, assert_parity
from tiny_internvl import IMAGE_TOKEN_ID, tiny_internvl

from jaxvqa import convert
from jaxvqa.models import internvl
from jaxvqa.prompts import render
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps
from jaxvqa.transforms.gradient import attention_gradient
from jaxvqa.vision import intern

pytestmark = pytest.mark.parity

CASES = {
    # The tower of the small models; grouped queries with a free head size; an odd depth.
    "qwen3": dict(vision_layers=3),
    # The tower of the large ones, a grid of 3 × 3 tokens, an inner feature layer; no groups, one head for both.
    "qwen2-rms-tied": dict(
        text="qwen2", norm="rms_norm", tied=True, num_kv_heads=4, head_dim=8, feature_layer=-2, image_size=42
    ),
}
# Width and height of each row's images: two grids of tiles in a row, a strip, and a row of text alone.
SIZES = (((90, 60), (30, 77)), ((200, 41),), ())
LENGTHS = np.array([576, 541, 523], np.int32)
"""Above 500 tokens: near position 0 rotations are the identity, so short prompts hide faults of rotary embeddings."""
BUCKET = 13
FORCED = 32
ROWS = np.array([[575, 500, 300, 41], [540, 333, 60, 2], [522, 522, 100, 17]], np.int32)
SPEC = ReadSpec(layers=(0, 1, 2), read=frozenset({"hidden", "rows"}), heads="all")


@dataclass(frozen=True, eq=False)
class Case:
    model: Any
    processor: Any
    config: internvl.InternVLConfig
    params: internvl.InternVL
    images: list
    """Per row, `ImageInput`s."""
    ids: np.ndarray
    pixel_values: Any
    """HF's, [tiles of all rows, 3, E, E]."""

    @functools.cached_property
    def reference(self) -> reference.Reference:
        return reference.run(self.model, self.ids, LENGTHS, attentions=True, pixel_values=self.pixel_values)

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """Ours, f32 [B, I, t, E, E, 3]; missing images are zeros."""
        out = np.zeros((len(SIZES), 2, *self.images[0][0].arrays.shape), np.float32)
        for row, images in enumerate(self.images):
            for i, image in enumerate(images):
                out[row, i] = image.arrays
        return out

    @functools.cached_property
    def slots(self) -> np.ndarray:
        out = np.full(self.ids.shape, -1, np.int32)
        for row, images in enumerate(self.images):
            rows = [i * image.capacity + np.arange(image.tokens) for i, image in enumerate(images)]
            out[row, self.ids[row] == IMAGE_TOKEN_ID] = np.concatenate([np.zeros(0, int), *rows])
        return out


def prompts(images):
    """Right-padded random ids [B, T] with each image's tokens between text."""
    rng = np.random.default_rng(0)
    ids = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, (length, inputs) in enumerate(zip(LENGTHS, images, strict=True)):
        ids[row, :length] = rng.integers(1, IMAGE_TOKEN_ID - 4, length)
        at = 20 + 7 * row
        for image in inputs:
            ids[row, at : at + image.tokens] = IMAGE_TOKEN_ID
            at += image.tokens + 45
    return ids


@pytest.fixture(scope="session")
def case_of(tmp_path_factory):
    """case_of(name): a model, loaded by both sides from one folder, with its inputs; made once."""

    @functools.cache
    def make(name: str) -> Case:
        import torch
        from transformers import AutoImageProcessor, InternVLForConditionalGeneration

        folder = tiny_internvl(tmp_path_factory.mktemp(name), **CASES[name], seed=list(CASES).index(name))
        torch.set_num_threads(1)
        model = InternVLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
        config, params, _ = convert.load(folder, dtype="float32")
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        pictures = [reference.pictures(i, row) for i, row in enumerate(SIZES)]
        images = [[internvl.process(config, processor, p, (BUCKET,)) for p in row] for row in pictures]
        theirs = [
            processor(p, crop_to_patches=True, return_tensors="pt")["pixel_values"] for row in pictures for p in row
        ]
        return Case(model, processor, config, params, images, prompts(images), torch.cat(theirs))

    return make


@pytest.fixture(params=CASES)
def case(request, case_of) -> Case:
    return case_of(request.param)


@jax.jit
def tower(params, config, tiles):
    """The tower's hidden states [L + 1, t, P, D]: of the embedding and of every block."""
    return jnp.stack([intern.encode(params, config, tiles, stop=i) for i in range(config.num_layers + 1)])


@jax.jit
def encode(params, config, pixels):
    """Image tokens of each row side by side, [B, S, D]."""
    features = internvl.encode_images(params, config, jax.lax.collapse(pixels, 0, 2))
    return features.reshape(len(pixels), -1, features.shape[-1])


@jax.jit
def ours(params, config, ids, features, slots):
    """Hidden states (the last normalised), logits [B, T, V], rows [L, B, N, R, T], logits of the last tokens."""
    taps = Taps(rows=jnp.asarray(ROWS))
    out = internvl.prefill(params, config, ids, jnp.asarray(LENGTHS), features, slots, taps=taps, spec=SPEC)
    hidden, logits = reference.finished(params, config, out.readouts.hidden)
    return hidden, logits, out.readouts.rows, out.logits


def deviations(case: Case, theirs: reference.Reference, features) -> dict[str, float]:
    """Largest absolute difference of every checked array, over valid tokens."""
    got = ours(case.params, case.config, case.ids, features, case.slots)
    hidden, logits, rows, last_logits = map(np.asarray, got)
    tokens = np.concatenate([np.asarray(f)[s[s >= 0]] for f, s in zip(features, case.slots, strict=True)])
    found = {"projector": np.abs(tokens - theirs.features.reshape(tokens.shape)).max()}
    found |= reference.compare(theirs, LENGTHS, ROWS, hidden, logits, rows)
    last = np.take_along_axis(theirs.logits, LENGTHS[:, None, None] - 1, axis=1)[:, 0]
    return found | {"last logits": np.abs(last_logits - last).max()}


def test_pixels_match_the_hf_processor(case):
    given = [image for row in case.images for image in row]
    tiles = np.concatenate([i.arrays[: i.tokens // case.config.image_tokens] for i in given])
    np.testing.assert_array_equal(tiles, case.pixel_values.numpy().transpose(0, 2, 3, 1))


def test_every_vision_block_matches_hf(case, request, measured):
    import torch

    tiles = case.pixel_values.numpy().transpose(0, 2, 3, 1)
    with torch.no_grad():
        out = case.model.model.vision_tower(case.pixel_values, output_hidden_states=True)
    found = np.asarray(tower(case.params.vision, case.config.vision, tiles))
    assert len(found) == len(out.hidden_states) == case.config.vision.num_layers + 1
    for i, (a, b) in enumerate(zip(found, out.hidden_states, strict=True)):
        measured(f"parity internvl {request.node.callspec.id}: vision {i}", d := np.abs(a - b.numpy()).max())
        assert d <= TOLERANCE
        assert b.abs().max() > 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_layer_and_the_logits_match_hf(case, side, request, measured):
    theirs = case.reference
    if side == "left":
        theirs = reference.run(case.model, case.ids, LENGTHS, side="left", pixel_values=case.pixel_values)
    found = deviations(case, theirs, encode(case.params, case.config, case.pixels))
    for name, d in found.items():
        measured(f"parity internvl {request.node.callspec.id}: {name}", d)
    assert_parity(found)


def tiles_swapped(case, monkeypatch):
    return case.params, case.pixels[:, :, [1, 0, *range(2, BUCKET)]]


def shuffle_transposed(case, monkeypatch):
    plain = internvl.pixel_shuffle

    def transposed(x, grid, s):
        tokens = plain(x, grid, s)
        h, w = grid[0] // s, grid[1] // s
        return tokens.reshape(len(x), h, w, -1).swapaxes(1, 2).reshape(tokens.shape)

    monkeypatch.setattr(internvl, "pixel_shuffle", transposed)
    return case.params, case.pixels


def scale_dropped(case, monkeypatch):
    layers = case.params.vision.layers
    plain = replace(layers, scale1=jnp.ones_like(layers.scale1), scale2=jnp.ones_like(layers.scale2))
    return replace(case.params, vision=replace(case.params.vision, layers=plain)), case.pixels


@pytest.mark.parametrize("mutate", [tiles_swapped, shuffle_transposed, scale_dropped])
def test_a_mutation_breaks_parity(case_of, mutate, monkeypatch, measured):
    """The three classic faults of a port; a parity test that survives one of them proves nothing."""
    case = case_of("qwen3")
    params, pixels = mutate(case, monkeypatch)
    features = jax.jit(lambda *args: encode.__wrapped__(*args))(params, case.config, pixels)  # traced anew
    found = deviations(case, case.reference, features)
    for quantity in ("projector", "hidden 0", "hidden 2", "logits", "rows"):
        measured(f"mutation internvl {mutate.__name__}: {quantity}", found[quantity])
        with pytest.raises(AssertionError):
            assert_parity({quantity: found[quantity]})


@jax.jit
def forced(params, config, ids, features, slots):
    """Logits [B, FORCED, V] of the last FORCED tokens, run on a cache one by one, and all at once."""
    lengths = jnp.asarray(LENGTHS)
    start = lengths - FORCED
    out = internvl.prefill(params, config, ids, start, features, slots, capacity=ids.shape[1] + FORCED)
    return reference.forced(internvl, params, config, ids, start, out.cache, FORCED)


def test_teacher_forced_tokens_on_a_cache_match_hf(case, request, measured):
    """Prefill and further tokens, each row from its own length, against HF's one full forward pass."""
    features = encode(case.params, case.config, case.pixels)
    got = forced(case.params, case.config, case.ids, features, case.slots)
    name = f"teacher-forced internvl {request.node.callspec.id}"
    reference.assert_forced(got, case.reference.logits, LENGTHS, measured, name)


@jax.jit
def gradients(params, config, ids, pixels, slots):
    """∂y/∂A [L, N, T] of the last token's attention, and ∂y/∂X [1, I, t, E, E, 3], y = log p(top) of one prompt."""
    lengths = jnp.array([ids.shape[1]])
    d = config.decoder
    spec = ReadSpec(tuple(range(d.num_layers)), frozenset({"values"}))

    def top(perturb, pixels):
        taps = Taps((Edit(Tap(perturb=perturb), 0, d.num_layers),))
        features = encode(params, config, pixels)
        out = internvl.prefill(params, config, ids, lengths, features, slots, taps=taps, spec=spec)
        return jax.nn.log_softmax(out.logits).max(), out.readouts.values

    zero = jnp.zeros((d.num_layers, 1, 1, d.num_heads, d.head_dim))
    (slopes, to_pixels), values = jax.grad(top, argnums=(0, 1), has_aux=True)(zero, pixels)
    return attention_gradient(slopes[:, 0], values[:, 0])[:, :, 0], to_pixels


def test_gradients_match_torch_autograd(case, request, measured):
    """Of log p(top) of a prompt with a strip of tiles: to every layer's attention, and to the pixels."""
    import torch

    row, length = 1, int(LENGTHS[1])
    ids = case.ids[row : row + 1, :length]
    image = case.images[row][0]
    tiles = image.arrays[: image.tokens // case.config.image_tokens]
    pixels = torch.tensor(tiles.transpose(0, 3, 1, 2)).requires_grad_()
    out = case.model(input_ids=torch.tensor(ids, dtype=torch.long), pixel_values=pixels, output_attentions=True)
    for probs in out.attentions:
        probs.retain_grad()
    case.model.zero_grad()
    torch.log_softmax(out.logits[0, -1], dim=-1).max().backward()
    theirs = (
        np.stack([a.grad[0, :, -1].numpy() for a in out.attentions]),
        pixels.grad.numpy().transpose(0, 2, 3, 1),
    )
    attention, to_pixels = gradients(
        case.params, case.config, ids, case.pixels[row : row + 1], case.slots[row : row + 1, :length]
    )
    to_pixels = np.asarray(to_pixels)[0, 0]
    assert not to_pixels[len(tiles) :].any(), "padding has no part in the answer"
    for what, a, b in zip(("attention", "pixels"), (attention, to_pixels[: len(tiles)]), theirs, strict=True):
        d = np.abs(a - b).max() / np.abs(b).max()
        measured(f"gradient internvl {request.node.callspec.id} to {what}", d)
        assert d <= TOLERANCE and np.abs(b).max() > 1e-3


def test_prompts_have_the_ids_of_hf(case_of, tmp_path, monkeypatch):
    """One image, two, and a further turn, by HF's processor with its chat template."""
    from transformers import InternVLProcessor, ProcessorMixin

    import jaxvqa

    case = case_of("qwen3")
    vlm = jaxvqa.load(tiny_internvl(tmp_path), dtype="float32", offline=True)
    # The processor wants a video processor, which needs torchvision; images do not.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda self, name, given: type(given))
    theirs = InternVLProcessor(
        case.processor, vlm.tokenizer, image_seq_length=vlm.config.image_tokens,
        chat_template=vlm.tokenizer.chat_template,
    )  # fmt: skip
    ask = "What is on the plate?"
    for sizes, turns in (
        (((90, 60),), [ask]),
        (((28, 28), (200, 41)), [ask]),
        (((60, 90),), [ask, "Yes.", "Is it red?"]),
    ):
        pictures = reference.pictures(sizes=sizes)
        chat = [
            dict(role="assistant" if i % 2 else "user", content=[dict(type="text", text=turn)])
            for i, turn in enumerate(turns)
        ]
        chat[0]["content"] = [dict(type="image", image=p) for p in pictures] + chat[0]["content"]
        expected = theirs.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
        )["input_ids"][0]
        encoded = vlm.encode(pictures, render("internvl", turns, num_images=len(pictures)))
        np.testing.assert_array_equal(encoded.tokens.ids, expected)
        assert (encoded.tokens.ids == IMAGE_TOKEN_ID).sum() == sum(i.tokens for i in encoded.images)
