"""Qwen3-VL against HF transformers: the tower block by block, DeepStack, every decoder layer, positions, gradients.

The folders are those of `tiny_qwen3`, read by both sides. Rows of one batch have two images, one, and none, on
different grids. If a case fails here and nowhere else, look at the first quantity in the report.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import assert_parity
from tiny_qwen import IMAGE_PAD, VISION_END, VISION_START, WORDS
from tiny_qwen3 import tiny_qwen3

from jaxvqa.convert import load
from jaxvqa.models import qwen3_vl
from jaxvqa.prompts import render, tokenise
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps
from jaxvqa.transforms.gradient import attention_gradient
from jaxvqa.vision import qwen, qwen3

pytestmark = pytest.mark.parity

CASES = {
    "gqa": dict(patch_size=4, pixels=(12 * 8**2, 40 * 8**2)),
    # The last block of the tower is a DeepStack feature, too.
    "mha-tied": dict(
        published=False, tied=True, num_kv_heads=4, head_dim=12, sections=(2, 2, 2), text_layers=5, patch_size=6,
        vision_layers=3, deepstack=(0, 1, 2), vision_heads=1, side=9, pixels=(20 * 12**2, 40 * 12**2), shards=2,
    ),
}  # fmt: skip
CAPACITY = 40
LENGTHS, IMAGES = (576, 541, 523), (2, 1, 0)
"""Above 500 tokens: near position 0 rotations are the identity, so short prompts hide faults of rotary embeddings."""
IMAGE_AT = (20, 300)
SPLIT = 280
"""Where a prompt is cut in two: the second image of the first row lies behind."""
FORCED = 32


@dataclass(frozen=True, eq=False)
class Case:
    model: Any
    config: qwen3_vl.Qwen3VLConfig
    params: qwen3_vl.Qwen3VL
    processor: Any
    images: tuple
    """The `ImageInput` of every image, in the order of the prompts."""
    pixel_values: np.ndarray
    """HF's."""
    grids: np.ndarray
    """HF's, of patches: (1, h, w)."""
    ids: np.ndarray

    @functools.cached_property
    def arrays(self):
        """Arrays of all images, stacked."""
        return jax.tree.map(lambda *x: np.stack(x), *(image.arrays for image in self.images))

    @functools.cached_property
    def layout(self):
        """Slots [B, T] among all images' features, side by side, and positions [B, T, 3]."""
        slots, where, at = np.full(self.ids.shape, -1, np.int32), np.zeros((*self.ids.shape, 3), np.int32), 0
        for row, (length, count) in enumerate(zip(LENGTHS, IMAGES, strict=True)):
            images = self.images[at : at + count]
            named = [(at + i) * CAPACITY + np.arange(image.tokens) for i, image in enumerate(images)]
            slots[row, self.ids[row] == IMAGE_PAD] = np.concatenate([*named, np.zeros(0, int)])
            where[row, :length] = qwen3_vl.positions(self.config, self.ids[row, :length], [i.geometry for i in images])
            at += count
        return slots, where

    @functools.cached_property
    def reference(self):
        return run_hf(self, "right")


@pytest.fixture(scope="module")
def case_of(tmp_path_factory):
    """case_of(name): a tiny folder loaded by both sides, with its inputs, made once."""

    @functools.cache
    def make(name: str) -> Case:
        import torch
        from transformers import Qwen3VLForConditionalGeneration
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        torch.set_num_threads(1)
        folder = tiny_qwen3(tmp_path_factory.mktemp(name), **CASES[name], seed=list(CASES).index(name))
        model = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        config, params, _ = load(folder, dtype="float32", offline=True)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        pictures = reference.pictures()[: sum(IMAGES)]
        theirs = processor(images=pictures, return_tensors="np")
        images = tuple(qwen3_vl.process(config, processor, picture, (CAPACITY,)) for picture in pictures)
        ids = prompts([image.tokens for image in images])
        return Case(model, config, params, processor, images, theirs["pixel_values"], theirs["image_grid_thw"], ids)

    return make


@pytest.fixture(params=CASES)
def case(request, case_of) -> Case:
    return case_of(request.param)


def prompts(tokens):
    """Right-padded random prompts with images at IMAGE_AT, of so many tokens each."""
    rng, tokens = np.random.default_rng(0), iter(tokens)
    ids = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, (length, count) in enumerate(zip(LENGTHS, IMAGES, strict=True)):
        ids[row, :length] = rng.integers(3, WORDS, length)
        for at in IMAGE_AT[:count]:
            size = next(tokens)
            ids[row, at + row : at + row + size + 2] = [VISION_START, *[IMAGE_PAD] * size, VISION_END]
    return ids


def run_hf(case: Case, side: str) -> dict[str, np.ndarray]:
    """What HF computes for prompts padded on `side`, right-padded again; gradients with side="right" only."""
    import torch

    lengths = np.array(LENGTHS)
    ids, mask = reference.pad(case.ids.astype(np.int64), lengths, side)
    pixels, grids = torch.tensor(case.pixel_values), torch.tensor(case.grids)
    with torch.set_grad_enabled(side == "right"):
        out = case.model(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids,
            mm_token_type_ids=(ids == IMAGE_PAD).int(), output_hidden_states=True, output_attentions=True,
        )  # fmt: skip

    def unpad(x):
        x = x.detach().numpy()
        return x if side == "right" else np.stack([np.roll(r, n, axis=0) for r, n in zip(x, lengths, strict=True)])

    found = {f"hidden {i}": unpad(x) for i, x in enumerate(out.hidden_states[1:])} | {"logits": unpad(out.logits)}
    if side == "left":
        return found
    for probs in out.attentions:
        probs.retain_grad()
    last = torch.log_softmax(out.logits[torch.arange(len(lengths)), torch.tensor(lengths - 1)], dim=-1)
    last.max(dim=-1).values.sum().backward()
    for name, tensors in (("rows", out.attentions), ("slopes", [a.grad for a in out.attentions])):
        at = np.stack([x.detach().numpy() for x in tensors])
        rows = np.stack([at[:, b, :, n - 1] for b, n in enumerate(lengths)], axis=1)
        # What padding holds, and so the slope to it, is not the same on both sides.
        found[name] = np.where(np.arange(rows.shape[-1]) < lengths[:, None, None], rows, np.nan)
    with torch.no_grad():
        seen = case.model.model.visual(pixels, grid_thw=grids, output_hidden_states=True, return_dict=True)
    merged = torch.cat([seen.pooler_output, *seen.deepstack_features], dim=-1).numpy()
    patches = [int(h * w) for _, h, w in case.grids]
    for i, states in enumerate(seen.hidden_states):
        found[f"block {i}"] = split(states.numpy(), patches, CAPACITY * 4)
    return found | {"features": split(merged, [n // 4 for n in patches], CAPACITY)}


def split(packed, sizes, capacity):
    """[sum of sizes, D] -> [M, capacity, D], NaN behind each image."""
    parts = np.split(packed, np.cumsum(sizes)[:-1])
    return np.stack([np.pad(x, ((0, capacity - len(x)), (0, 0)), constant_values=np.nan) for x in parts])


def side_by_side(features):
    """Every row has the features of all images."""
    flat = features.reshape(1, -1, features.shape[-1])
    return jnp.broadcast_to(flat, (len(LENGTHS), *flat.shape[1:]))


@jax.jit
def ours(params, c, ids, lengths, arrays, slots, positions):
    """All quantities of `run_hf`, of right-padded prompts."""
    d, layers = c.decoder, tuple(range(c.decoder.num_layers))
    states = [qwen3.embed_patches(params.vision, arrays)]
    for i in range(c.vision.num_layers):
        states.append(
            qwen.run_blocks(params.vision.tower.blocks, c.vision, states[-1], arrays.patches, i, i + 1, "auto")
        )
    features = qwen3_vl.encode_images(params, c, arrays)
    spec = ReadSpec(layers, frozenset({"hidden", "rows", "values"}), heads="all")

    def top(perturb):
        edits = tuple(Edit(Tap(perturb=p[None]), i, i + 1) for i, p in enumerate(perturb))
        out = qwen3_vl.prefill(
            params, c, ids, lengths, side_by_side(features), slots, positions, taps=Taps(edits), spec=spec
        )
        return jax.nn.log_softmax(out.logits).max(axis=-1).sum(), out

    zero = jnp.zeros((len(layers), len(ids), 1, d.num_heads, d.head_dim))
    slopes, out = jax.grad(top, has_aux=True)(zero)
    slopes = attention_gradient(slopes, out.readouts.values)
    hidden, logits = reference.finished(params, c, out.readouts.hidden)
    found = {f"block {i}": x for i, x in enumerate(states)} | {"features": features}
    found |= {f"hidden {i}": x for i, x in enumerate(hidden)} | {"logits": logits}
    return found | {"rows": out.readouts.rows[:, :, :, 0], "slopes": slopes[:, :, :, 0]}


def deviations(
    case: Case, theirs, *, params=None, config=None, arrays=None, slots=None, positions=None
) -> dict[str, float]:
    """Largest absolute difference of every quantity, over what is no padding; gradients relative to the largest."""
    own_slots, own_positions = case.layout
    got = ours(
        params or case.params,
        config or case.config,
        case.ids,
        np.array(LENGTHS, np.int32),
        case.arrays if arrays is None else arrays,
        own_slots if slots is None else slots,
        own_positions if positions is None else positions,
    )
    valid = np.arange(case.ids.shape[1]) < np.array(LENGTHS)[:, None]
    found = {}
    for name, expected in theirs.items():
        d = np.abs(np.asarray(got[name]) - expected)
        if name == "logits" or name.startswith("hidden"):
            d = d[valid]
        found[name] = float(np.nanmax(d) / (np.nanmax(np.abs(expected)) if name == "slopes" else 1))
    return found


@pytest.mark.parametrize("side", ["right", "left"])
def test_blocks_layers_logits_rows_and_gradients_match_hf(case, side, request, measured):
    theirs = case.reference if side == "right" else run_hf(case, side)
    if side == "right":
        assert np.nanmax(np.abs(theirs["slopes"])) > 1e-3
    found = deviations(case, theirs)
    for name, d in found.items():
        measured(f"qwen3-vl {request.node.callspec.id}: {name}", d)
    assert_parity(found)


def nearest(arrays):
    """Every patch with the learned position that is nearest to it, none interpolated."""
    weights = np.eye(4, dtype=np.float32)[arrays.weights.argmax(-1)]
    return replace(arrays, weights=weights)


def without_deepstack(c):
    """All that DeepStack's mergers give is 0."""
    vision = c.params.vision
    return dict(
        params=replace(c.params, vision=replace(vision, deepstack=jax.tree.map(lambda x: 0 * x, vision.deepstack)))
    )


def runs_of_sections(c):
    return dict(config=replace(c.config, decoder=replace(c.config.decoder, mrope_interleaved=False)))


MUTATIONS = {
    "DeepStack off": (without_deepstack, "hidden 1"),
    "mrope interleaving off": (runs_of_sections, "hidden 0"),
    "position interpolation off": (lambda c: dict(arrays=nearest(c.arrays)), "block 0"),
    "mrope off": (lambda c: dict(positions=np.indices((*c.ids.shape, 3), np.int32)[1]), "hidden 0"),
    "one image for all": (lambda c: dict(slots=np.where(c.layout[0] < 0, -1, c.layout[0] % CAPACITY)), "hidden 0"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_parity(case_of, name, measured):
    """Faults that ports of this family have had; a parity test that survives one of them proves nothing."""
    case = case_of("gqa")
    mutate, first = MUTATIONS[name]
    theirs = {k: v for k, v in case.reference.items() if k in (first, "hidden 3", "logits")}
    for quantity, d in deviations(case, theirs, **mutate(case)).items():
        measured(f"qwen3-vl mutation {name}: {quantity}", d)
        with pytest.raises(AssertionError):
            assert_parity({quantity: d})


@jax.jit
def in_parts(params, c, ids, lengths, arrays, slots, positions):
    """Logits [B, FORCED, V] of the last tokens of prompts that come in parts, images in two of them."""
    features = side_by_side(qwen3_vl.encode_images(params, c, arrays))
    cut, start = jnp.full_like(lengths, SPLIT), lengths - FORCED
    first, rest = ((slots[:, part], positions[:, part]) for part in (slice(SPLIT), slice(SPLIT, None)))
    capacity = ids.shape[1] + FORCED
    out = qwen3_vl.prefill(params, c, ids[:, :SPLIT], cut, features, *first, capacity=capacity)
    out = qwen3_vl.extend(params, c, ids[:, SPLIT:], start - SPLIT, out.cache, features, *rest)
    return reference.forced(qwen3_vl, params, c, ids, start, out.cache, FORCED)


def test_prompts_in_parts_and_teacher_forced_tokens_match_hf(case, request, measured):
    """Two parts with images, then 32 tokens of text, each row from its own length, against HF's one forward pass."""
    lengths = np.array(LENGTHS, np.int32)
    got = in_parts(case.params, case.config, case.ids, lengths, case.arrays, *case.layout)
    name = f"qwen3-vl teacher-forced {request.node.callspec.id}"
    reference.assert_forced(got, case.reference["logits"], lengths, measured, name)


def test_positions_and_interpolation_are_those_of_hf(case):
    import torch
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    ids, mask = reference.pad(case.ids.astype(np.int64), np.array(LENGTHS), "right")
    grids = torch.tensor(case.grids)
    theirs, deltas = case.model.model.get_rope_index(ids, (ids == IMAGE_PAD).int(), grids, attention_mask=mask)
    _, positions = case.layout
    np.testing.assert_array_equal(positions, theirs.permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(positions.max(axis=(1, 2)) + 1 - LENGTHS, deltas[:, 0].numpy())

    corners, weights = get_vision_interpolation_indices_and_weights(
        grids, case.config.vision.side, align_corners=True, spatial_merge_size=2
    )
    real = np.arange(CAPACITY * 4) < np.array([[image.tokens * 4] for image in case.images])
    np.testing.assert_array_equal(case.arrays.corners[real], corners)
    np.testing.assert_allclose(case.arrays.weights[real], weights, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_a_rendered_question_has_the_ids_of_hf_s_chat_template(tmp_path, case_of, count, monkeypatch):
    """HF's processor demands one for videos, which needs torchvision; images never reach it."""
    from transformers import AutoTokenizer, Qwen3VLProcessor

    case, folder = case_of("gqa"), tiny_qwen3(tmp_path, **CASES["gqa"])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    theirs = Qwen3VLProcessor(case.processor, tokenizer, None, chat_template=tokenizer.chat_template)
    pictures, question = reference.pictures()[:count], "What is the character on the red plate?"
    content = [*[dict(type="image", image=picture) for picture in pictures], dict(type="text", text=question)]
    expected = theirs.apply_chat_template(
        [dict(role="user", content=content)], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    prompt = render("qwen3_vl", question, num_images=count)
    tokens = tokenise(tokenizer, prompt, IMAGE_PAD, [image.tokens for image in case.images[:count]])
    assert tokens.ids.tolist() == list(np.ravel(expected))
