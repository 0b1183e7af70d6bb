"""Qwen2.5-VL and Qwen2-VL against HF transformers: patches, positions, every vision block, every layer, the logits."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image
from reference import TOLERANCE, Reference, assert_parity
from tiny_qwen import IMAGE_PAD, VISION_END, VISION_START, WORDS, tiny_qwen

from jaxvqa.convert import load
from jaxvqa.models import qwen2_5_vl
from jaxvqa.prompts import render, tokenise
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps
from jaxvqa.transforms.gradient import attention_gradient
from jaxvqa.vision import qwen

pytestmark = pytest.mark.parity

CASES = {
    "2.5": {},
    "2.5-tied-modules": dict(
        published=False, tied=True, num_heads=3, num_kv_heads=1, sections=(2, 2, 4), patch_size=8, window_size=48,
        vision_layers=3, full_layers=(0,), vision_heads=1, pixels=(2 * 256, 40 * 256), seed=1,
    ),
    "2": dict(kind="qwen2_vl", num_heads=2, num_kv_heads=2, vision_layers=2, seed=2),
}  # fmt: skip
SIZES = ((150, 90), (61, 200), (300, 33))
"""Width and height of the images, in the order in which the prompts use them: grids unlike each other."""
LENGTHS, IMAGES = (560, 541, 523), (2, 1, 0)
"""Above 500 tokens: near position 0 rotations are the identity, so short prompts hide faults of rotary embeddings."""
BUCKET = 64
FORCED = 32
CUT = 60
"""Inside the first image of every row that has one."""
ROWS = np.array([[559, 500, 200, 41], [540, 333, 60, 2], [522, 522, 100, 17]], np.int32)
SPEC = ReadSpec(layers=(0, 1, 2), read=frozenset({"hidden", "rows", "values"}), heads="all")


@dataclass(frozen=True, eq=False)
class Case:
    model: Any
    processor: Any
    config: Any
    params: Any
    images: tuple[Image.Image, ...]
    inputs: tuple[Any, ...]
    """`ImageInput` of each image."""
    ids: np.ndarray
    slots: np.ndarray
    positions: np.ndarray

    @property
    def patches(self) -> qwen.Patches:
        return jax.tree.map(lambda *x: np.stack(x), *(image.arrays for image in self.inputs))

    @functools.cached_property
    def theirs(self) -> dict[str, Any]:
        return hf_forward(self, "right")


@pytest.fixture(scope="module")
def case_of(tmp_path_factory):
    """case_of(name): a loaded model with its inputs, made once."""

    @functools.cache
    def make(name: str) -> Case:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageTextToText

        torch.set_num_threads(1)
        folder = tiny_qwen(tmp_path_factory.mktemp(name), **CASES[name])
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        config, params, _ = load(folder, dtype="float32")
        rng = np.random.default_rng(0)
        images = tuple(reference.pictures(sizes=SIZES))
        qwen2_5_vl.check_processor(config, processor)
        inputs = tuple(qwen2_5_vl.process(config, processor, image, (BUCKET,)) for image in images)
        left, ids = iter(inputs), np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
        slots, positions = np.full(ids.shape, -1, np.int32), np.zeros((*ids.shape, 3), np.int32)
        for row, (length, count) in enumerate(zip(LENGTHS, IMAGES, strict=True)):
            ids[row, :length] = rng.integers(0, WORDS, length)
            own, at = [next(left) for _ in range(count)], 50 + row
            for i, image in enumerate(own):
                ids[row, at - 1], ids[row, at + image.tokens] = VISION_START, VISION_END
                ids[row, at : at + image.tokens] = IMAGE_PAD
                slots[row, at : at + image.tokens] = i * BUCKET + np.arange(image.tokens)
                at += image.tokens + 2 + 70 * (i + 1)
            places = [image.geometry for image in own]
            positions[row, :length] = qwen2_5_vl.positions(config, ids[row, :length], places)
        return Case(model.eval(), processor, config, params, images, inputs, ids, slots, positions)

    return make


@pytest.fixture(params=CASES)
def case(request, case_of) -> Case:
    return case_of(request.param)


def hf_inputs(case: Case, side: str) -> dict[str, Any]:
    ids, mask = reference.pad(case.ids.astype(np.int64), np.array(LENGTHS), side)
    made = case.processor(list(case.images), return_tensors="pt")
    return dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == IMAGE_PAD).long(), **made)


def hf_forward(case: Case, side: str) -> dict[str, Any]:
    """What HF computes, right-padded again: blocks and features (lists by image), hidden [L, B, T, D], logits, rows."""
    import torch

    visual, blocks, merged = case.model.model.visual, [], []
    hooks = [b.register_forward_hook(lambda _, args, out: blocks.append(out)) for b in visual.blocks]
    hooks.append(visual.register_forward_hook(lambda _, args, out: merged.append(out.pooler_output)))
    inputs = hf_inputs(case, side)
    with torch.no_grad():
        out = case.model(**inputs, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    counts = inputs["image_grid_thw"].prod(1)

    def by_image(x, sizes):
        return [part.numpy() for part in torch.split(x, sizes.tolist())]

    def unpad(x, axes):
        """Rolls [.., B, T, ..] back along `axes`, counted behind B."""
        x = x.numpy()
        if side == "left":
            x = np.stack([np.roll(row, n, axis=axes) for row, n in zip(x, LENGTHS, strict=True)])
        return x

    return dict(
        blocks=[by_image(x, counts) for x in blocks],
        features=by_image(merged[0], counts // 4),
        hidden=np.stack([unpad(x, (0,)) for x in out.hidden_states[1:]]),
        logits=unpad(out.logits, (0,)),
        rows=np.stack([unpad(x, (1, 2)) for x in out.attentions]),
    )


@functools.partial(jax.jit, static_argnums=1)
def encode(params, c, patches):
    """Every block's output [L, M, P, D], and the features [M, C, D]."""
    x, states = qwen.embed_patches(params.vision.patch_embed, patches), []
    for i in range(c.vision.num_layers):
        x = qwen.run_blocks(params.vision.blocks, c.vision, x, patches, i, i + 1, "xla")
        states.append(x)
    return jnp.stack(states), qwen2_5_vl.encode_images(params, c, patches)


def by_row(features) -> np.ndarray:
    """Features [M, C, D] as the prompts have them, [B, I * C, D]."""
    features = np.asarray(features)
    rows, left = np.zeros((len(IMAGES), max(IMAGES), *features.shape[1:]), np.float32), iter(features)
    for row, count in enumerate(IMAGES):
        for i in range(count):
            rows[row, i] = next(left)
    return rows.reshape(len(IMAGES), -1, features.shape[-1])


@functools.partial(jax.jit, static_argnums=1)
def prefill(params, c, ids, features, slots, positions, perturb):
    """∂ log p(top) / ∂ perturb, and (hidden, the last one normalised; logits; rows; values)."""

    def top(perturb):
        edit = Edit(Tap(perturb=perturb), 0, c.decoder.num_layers)
        lengths = jnp.array(LENGTHS, jnp.int32)
        taps = Taps((edit,), jnp.asarray(ROWS))
        out = qwen2_5_vl.prefill(params, c, ids, lengths, features, slots, positions, taps=taps, spec=SPEC)
        return jax.nn.log_softmax(out.logits).max(axis=-1).sum(), out.readouts

    slopes, read = jax.grad(top, has_aux=True)(perturb)
    return slopes, (*reference.finished(params, c, read.hidden), read.rows, read.values)


def ours(case: Case, patches=None, positions=None, config=None) -> dict[str, Any]:
    c, slots = config or case.config, case.slots
    blocks, features = map(np.asarray, encode(case.params, c, case.patches if patches is None else patches))
    zeros = np.zeros((c.decoder.num_layers, *ROWS.shape, c.decoder.num_heads, c.decoder.head_dim), np.float32)
    placed = case.positions if positions is None else positions
    slopes, (hidden, logits, rows, values) = prefill(case.params, c, case.ids, by_row(features), slots, placed, zeros)
    counts = [image.tokens for image in case.inputs]
    return dict(
        blocks=[[x[: 4 * n] for x, n in zip(block, counts, strict=True)] for block in blocks],
        features=[x[:n] for x, n in zip(features, counts, strict=True)],
        hidden=np.asarray(hidden), logits=np.asarray(logits), rows=np.asarray(rows),
        gradient=jax.vmap(attention_gradient, 1, 0)(slopes, values),
    )  # fmt: skip


def deviations(got: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of everything, over valid tokens."""
    found = {}
    for i, (a, b) in enumerate(zip(got["blocks"], theirs["blocks"], strict=True)):
        found[f"vision block {i}"] = float(max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)))
    apart = [np.abs(x - y).max() for x, y in zip(got["features"], theirs["features"], strict=True)]
    language = Reference(theirs["hidden"], theirs["logits"], theirs["rows"])
    own = (got[name] for name in ("hidden", "logits", "rows"))
    return found | {"features": float(max(apart))} | reference.compare(language, LENGTHS, ROWS, *own)


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_block_every_layer_and_the_logits_match_hf(case, side, request, measured):
    found = deviations(ours(case), case.theirs if side == "right" else hf_forward(case, "left"))
    for name, d in found.items():
        measured(f"qwen {request.node.callspec.id}: {name}", d)
    assert_parity(found)


def count_words(case):
    T = case.ids.shape[1]
    return dict(positions=np.broadcast_to(np.arange(T, dtype=np.int32)[None, :, None], case.positions.shape))


def one_window(case):
    c, v = case.config, case.config.vision
    return dict(config=replace(c, vision=replace(v, full_layers=tuple(range(v.num_layers)))))


def swapped_rows_and_columns(case):
    patches = case.patches
    return dict(patches=replace(patches, positions=patches.positions[..., ::-1]))


def window_order_kept(case):
    patches = case.patches
    places = np.broadcast_to(np.arange(BUCKET, dtype=np.int32), patches.places.shape)
    return dict(patches=replace(patches, places=places))


def shuffled_patches(case):
    """The patches of a token in the order down, right."""
    patches = case.patches
    M, P = patches.window.shape
    pixels = patches.pixels.reshape(M, P // 4, 4, *patches.pixels.shape[2:])[:, :, [0, 2, 1, 3]]
    return dict(patches=replace(patches, pixels=pixels.reshape(patches.pixels.shape)))


def images_swapped(case):
    patches = case.patches
    return dict(patches=jax.tree.map(lambda x: x[[1, 0, 2]], patches))


MUTATIONS = {
    "multimodal rope off": (count_words, "hidden 0"),
    "window attention off": (one_window, "vision block 0"),
    "vision rope transposed": (swapped_rows_and_columns, "vision block 0"),
    "window order not undone": (window_order_kept, "features"),
    "patch order swapped": (shuffled_patches, "vision block 0"),
    "images swapped": (images_swapped, "hidden 0"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_parity(case_of, name, measured):
    """Each from where it acts to the logits; a parity test that survives one of them proves nothing."""
    case = case_of("2.5")
    mutate, first = MUTATIONS[name]
    got, theirs = ours(case, **mutate(case)), case.theirs
    if name == "images swapped":  # their blocks have other shapes
        got |= {what: theirs[what] for what in ("blocks", "features")}
    found = deviations(got, theirs)
    for what in (first, "logits"):
        measured(f"qwen mutation {name}: {what}", found[what])
        assert found[what] > 100 * TOLERANCE


def test_attention_and_its_gradient_match_torch_autograd(case_of, measured):
    """log p of the likeliest next token, to the attention of every layer and head at a few rows."""
    import torch

    case = case_of("2.5")
    out = case.model(**hf_inputs(case, "right"), output_attentions=True)
    for probs in out.attentions:
        probs.retain_grad()
    last = out.logits[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1]
    torch.log_softmax(last, dim=-1).max(dim=-1).values.sum().backward()
    theirs = np.stack([probs.grad.numpy() for probs in out.attentions], axis=1)  # [B, L, N, T, T]
    expected = np.take_along_axis(theirs, ROWS[:, None, None, :, None], axis=3)
    got = np.asarray(ours(case)["gradient"])
    seen = np.arange(got.shape[-1]) <= ROWS[:, :, None]  # torch's has no meaning above the diagonal
    d = np.abs(np.where(seen[:, None, None], got - expected, 0)).max() / np.abs(expected).max()
    measured("qwen: gradient to attention against torch, relative", d)
    assert d <= TOLERANCE and np.abs(expected).max() > 1e-3


@functools.partial(jax.jit, static_argnums=1)
def in_parts(params, c, ids, features, slots, positions):
    """Logits behind a prompt cut inside an image; and [B, FORCED, V] of the last tokens, one by one on a cache."""
    lengths = jnp.array(LENGTHS, jnp.int32)
    first, cut = ids[:, :CUT], jnp.full_like(lengths, CUT)
    out = qwen2_5_vl.prefill(
        params, c, first, cut, features, slots[:, :CUT], positions[:, :CUT], capacity=ids.shape[1] + FORCED
    )
    rest = (ids[:, CUT:], lengths - FORCED - CUT, out.cache, features, slots[:, CUT:], positions[:, CUT:])
    out = qwen2_5_vl.extend(params, c, *rest)
    return out.logits, reference.forced(qwen2_5_vl, params, c, ids, lengths - FORCED, out.cache, FORCED)


def test_teacher_forced_tokens_on_a_cache_match_hf(case_of, measured):
    """The cut prompt and 32 further tokens per row, each row from its own length, against HF's one full pass."""
    case = case_of("2.5")
    features = by_row(encode(case.params, case.config, case.patches)[1])
    behind, got = in_parts(case.params, case.config, case.ids, features, case.slots, case.positions)
    expected = np.stack([row[n - FORCED - 1] for row, n in zip(case.theirs["logits"], LENGTHS, strict=True)])
    assert np.abs(np.asarray(behind) - expected).max() <= TOLERANCE
    reference.assert_forced(got, case.theirs["logits"], LENGTHS, measured, "qwen teacher-forced")


def test_patches_are_those_of_the_hf_processor_in_the_order_of_hf_windows(case):
    """Pixels, positions, windows and the way back, for each image: exactly, padding apart."""
    import torch
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    v = case.config.vision
    side = (v.window or BUCKET) * v.patch_size * v.merge_size  # Qwen2-VL: one window
    for image, ready in zip(case.images, case.inputs, strict=True):
        made = case.processor(image, return_tensors="pt")
        order, bounds = get_vision_window_index(made["image_grid_thw"], 2, side, v.patch_size)
        n, got = 4 * ready.tokens, ready.arrays
        patches = (4 * order[:, None] + torch.arange(4)).flatten()
        frames = made["pixel_values"].reshape(n, 3, 2, v.patch_size, v.patch_size)[patches].numpy()
        np.testing.assert_array_equal(got.pixels[:n], frames[:, :, 0])
        np.testing.assert_array_equal(got.pixels[:n], frames[:, :, 1])
        at = get_vision_position_ids(made["image_grid_thw"], 2)[patches]
        np.testing.assert_array_equal(got.positions[:n], at)
        np.testing.assert_array_equal(got.window[:n], np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)) + 1)
        np.testing.assert_array_equal(got.places[: ready.tokens], torch.argsort(order))
        assert (got.window[n:] == -1).all() and not got.pixels[n:].any() and len(got.places) == BUCKET


def test_positions_match_hf(case):
    """Three axes per token, and where the next one stands."""
    inputs = hf_inputs(case, "right")
    theirs, deltas = case.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    for row, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(case.positions[row, :n], theirs[:, row, :n].T)
        assert case.positions[row, :n].max() + 1 == n + deltas[row].item()


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_have_the_ids_of_the_hf_processor_and_its_chat_template(count, case_of, tmp_path, monkeypatch):
    from transformers import AutoTokenizer
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    case, question = case_of("2.5"), "What is left of the plate?"
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen(tmp_path))
    # Its video processor would need torchvision.
    monkeypatch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    processor = Qwen2_5_VLProcessor(case.processor, tokenizer, chat_template=tokenizer.chat_template)
    content = [*[dict(type="image")] * count, dict(type="text", text=question)]
    turns: list[Any] = [dict(role="user", content=content)]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    expected = processor(text=[text], images=list(case.images[:count]))["input_ids"][0]
    prompt = render(qwen2_5_vl.SETUPS["hf"], question, num_images=count)
    tokens = [image.tokens for image in case.inputs[:count]]
    assert tokenise(tokenizer, prompt, case.config.image_token_id, tokens).ids.tolist() == expected
