"""LLaVA-OneVision and LLaVA-NeXT against HF transformers: pixels, tower, connector, assembly, decoder, gradients.

Folders are written by `tiny_onevision` and read by both sides; images pass each side's own preprocessing.
"""

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
from tiny_onevision import tiny_onevision

import jaxvqa
from jaxvqa.models import llava_onevision as family
from jaxvqa.models.common import project
from jaxvqa.prompts import render
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps
from jaxvqa.transforms.gradient import attention_gradient
from jaxvqa.vision import clip, siglip
from jaxvqa.vision.siglip import SiglipConfig
from jaxvqa.vlm import slots_of

pytestmark = pytest.mark.parity

CASES = {
    "gqa": {},
    "tied-odd": dict(
        num_kv_heads=4, tied=True, image_size=21, max_tiles=4, vision_layers=4, feature_layer=[-2, 1], layout="v5"
    ),
    "next": dict(is_next=True, text_model="llama", image_size=28, feature_layer=-2, layout="v5-modules"),
    "next-mistral": dict(is_next=True, text_model="mistral", image_size=28, num_kv_heads=1, most_tiles=2),
}
"""Tiles of 30 pixels in patches of 7 leave two pixels unseen, as SigLIP's 384 in 14 leave six."""
SIZES = ((97, 45), (64, 100), (200, 31))
IMAGES = (2, 1, 0)
"""Per row; the first row's are tiled here, though transformers' chat template would pad them: see `NESTED`."""
LENGTHS = (620, 541, 523)
FORCED = 32
LAYERS = (0, 1, 2)
ROWS = np.array([[619, 500, 300, 41], [540, 333, 60, 2], [522, 522, 100, 17]], np.int32)
SPEC = ReadSpec(layers=LAYERS, read=frozenset({"hidden", "rows"}), heads="all")


@dataclass(frozen=True, eq=False)
class Case:
    """Prompts and images of both sides."""

    model: Any
    vlm: jaxvqa.VLM
    images: list
    """Ours, `ImageInput`, in prompt order."""
    inputs: dict[str, Any]
    """HF's."""
    ids: np.ndarray
    slots: np.ndarray
    tiles: Any
    """`Tiles` of [B, I]."""

    @functools.cached_property
    def reference(self) -> Reference:
        return self.run()

    def run(self, side="right") -> Reference:
        return reference.run(
            self.model, self.ids, np.array(LENGTHS), side=side, attentions=side == "right", **self.inputs
        )


def load_hf(folder, is_next):
    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration

    torch.set_num_threads(1)
    cls = LlavaNextForConditionalGeneration if is_next else LlavaOnevisionForConditionalGeneration
    model, report = cls.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def prompts(tokens):
    """Right-padded random prompts [B, T] and, for each token, the row of the images' features, -1 for text."""
    rng = np.random.default_rng(0)
    ids = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    spans = []
    counts = iter(tokens)
    for row, (length, count) in enumerate(zip(LENGTHS, IMAGES, strict=True)):
        ids[row, :length] = rng.integers(3, reference.IMAGE_TOKEN_ID - 1, length)
        at = 20 + 7 * row
        for _ in range(count):
            n = next(counts)
            ids[row, at : at + n] = reference.IMAGE_TOKEN_ID
            spans.append((row, at, n))
            at += n + 45
    return ids, spans


@pytest.fixture(scope="session")
def case_of(tmp_path_factory):
    """case_of(name, setup): a folder, loaded by both sides, with its inputs, made once."""

    @functools.cache
    def make(name: str, setup: str = "hf") -> Case:
        import torch

        is_next = CASES[name].get("is_next", False)
        folder = tiny_onevision(tmp_path_factory.mktemp(name), seed=list(CASES).index(name), **CASES[name])
        vlm = jaxvqa.load(folder, dtype="float32", offline=True, image_setup=setup)
        pil = reference.pictures(3, SIZES)
        given = [pil[:2], pil[2:]] if setup == "pad" else pil
        theirs = vlm.image_processor(images=given, return_tensors="np")
        inputs = {key: torch.tensor(np.asarray(theirs[key])) for key in ("pixel_values", "image_sizes")}
        if not is_next:
            inputs["batch_num_images"] = torch.tensor(theirs["batch_num_images"])
        bucket = vlm.image_buckets[-1]
        tiled = replace_setup(vlm, "hf")
        images = [vlm.process(image, bucket) for image in pil[:2]] + [tiled.process(pil[2], bucket)]
        ids, spans = prompts([image.tokens for image in images])
        slots = np.full(ids.shape, -1, np.int32)
        for (row, at, n), image, place in zip(spans, images, (0, 1, 0), strict=True):
            slots[row, at : at + n] = place * image.capacity + np.arange(n)
        empty = jax.tree.map(np.zeros_like, images[0].arrays)
        trees = [image.arrays for image in images] + [empty] * 3
        order = np.array([[0, 1], [2, 3], [4, 5]])
        tiles = jax.tree.map(lambda *leaves: np.stack(leaves)[order], *trees)
        return Case(load_hf(folder, is_next), vlm, images, inputs, ids, slots, tiles)

    return make


def replace_setup(vlm, setup):
    return jaxvqa.VLM(vlm.config, vlm.params, vlm.tokenizer, vlm.image_processor, name="other", image_setup=setup)


NESTED = ("gqa", "pad")
"""Several images of one prompt, as transformers' processor takes them: padded to squares, not tiled."""
KEYS = [*((name, "hf") for name in CASES), NESTED]


@pytest.fixture(params=KEYS, ids="-".join)
def case(request, case_of) -> Case:
    return case_of(*request.param)


@jax.jit
def ours(params, config, ids, slots, tiles):
    """Hidden states (the last normalised), logits [B, T, V], rows [L, B, N, R, T], features [B, I, S, D]."""
    features = family.encode_images(params, config, jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), tiles))
    B, lengths = len(ids), jnp.asarray(LENGTHS)
    flat = features.reshape(B, -1, features.shape[-1])
    out = family.prefill(params, config, ids, lengths, flat, slots, taps=Taps(rows=jnp.asarray(ROWS)), spec=SPEC)
    hidden, logits = reference.finished(params, config, out.readouts.hidden)
    return hidden, logits, out.readouts.rows, features.reshape(B, -1, *features.shape[1:])


def deviations(case: Case, theirs: Reference, params=None, config=None, tiles=None) -> dict[str, float]:
    """Largest absolute difference of every checked array, over valid tokens."""
    got = ours(
        params or case.vlm.params,
        config or case.vlm.config,
        case.ids,
        case.slots,
        case.tiles if tiles is None else tiles,
    )
    hidden, logits, rows, features = map(np.asarray, got)
    real = [features[0, 0], features[0, 1], features[1, 0]]
    packed = np.concatenate([f[: image.tokens] for f, image in zip(real, case.images, strict=True)])
    assert packed.shape == theirs.features.shape
    found = {"features": float(np.abs(packed - theirs.features).max())}
    return found | reference.compare(theirs, np.array(LENGTHS), ROWS, hidden, logits, rows)


def test_pixels_equal_those_of_hf(case):
    for image, theirs in zip(case.images, case.inputs["pixel_values"].numpy(), strict=True):
        count = np.abs(image.arrays.pixels).max(axis=(1, 2, 3)).astype(bool).sum()
        np.testing.assert_array_equal(image.arrays.pixels[:count], theirs[:count].transpose(0, 2, 3, 1))
        assert not theirs[count:].any()


@pytest.mark.parametrize("name", CASES)
def test_every_block_of_the_tower_and_the_connector_match_hf(case_of, name, measured):
    import torch

    case = case_of(name)
    config, params = case.vlm.config, case.vlm.params
    pixels = case.images[0].arrays.pixels
    tower = siglip if isinstance(config.vision, SiglipConfig) else clip
    layers = tuple(range(config.vision.num_layers + 1))
    states = jax.jit(lambda p, x: tower.encode(p, config.vision, x, layers))(params.vision, pixels)
    inner = case.model.model
    with torch.no_grad():
        hidden = inner.vision_tower(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
        chosen = [hidden[f][:, int(tower is clip) :] for f in config.feature_layers]
        expected = inner.multi_modal_projector(torch.cat(chosen, -1)).numpy()
    found = {
        f"vision {i}": float(np.abs(a - b.numpy()).max())
        for i, (a, b) in enumerate(zip(np.split(np.asarray(states), len(layers), -1), hidden, strict=True))
    }
    given = jnp.asarray(torch.cat(chosen, -1).numpy())
    ours = project(params.projector, given, config.projector_activation)
    found["connector"] = float(np.abs(np.asarray(ours) - expected).max())
    for what, d in found.items():
        measured(f"onevision {name}: {what}", d)
    assert_parity(found)


@pytest.mark.parametrize("side", ["right", "left"])
def test_image_tokens_every_layer_and_the_logits_match_hf(case, side, request, measured):
    found = deviations(case, case.reference if side == "right" else case.run(side))
    for name, d in found.items():
        measured(f"onevision {request.node.callspec.id}: {name}", d)
    assert_parity(found)


def no_newline(case):
    return dict(params=replace(case.vlm.params, newline=jnp.zeros_like(case.vlm.params.newline)))


def swapped_tiles(case):
    pixels = case.tiles.pixels.copy()
    pixels[:, :, [1, 2]] = pixels[:, :, [2, 1]]
    return dict(tiles=replace(case.tiles, pixels=pixels))


def wrong_layer(case):
    return dict(config=replace(case.vlm.config, feature_layers=(-2,)))


def nearest(case):
    return dict(tiles=replace(case.tiles, weights=(case.tiles.weights > 0.5).astype(np.float32)))


@pytest.mark.parametrize("mutation", [no_newline, swapped_tiles, wrong_layer, nearest])
def test_a_mutation_breaks_parity(case_of, mutation, measured):
    case = case_of("gqa")
    found = deviations(case, case.reference, **mutation(case))
    for what in ("features", "hidden 0", "hidden 2", "logits", "rows"):
        measured(f"onevision mutation {mutation.__name__}: {what}", found[what])
        with pytest.raises(AssertionError):
            assert_parity({what: found[what]})


@jax.jit
def forced(params, config, ids, slots, features):
    """Logits [B, FORCED, V] of the last FORCED tokens, run on a cache one by one, and all at once."""
    start = jnp.asarray(LENGTHS) - FORCED
    features = features.reshape(len(ids), -1, features.shape[-1])
    out = family.prefill(params, config, ids, start, features, slots, capacity=ids.shape[1] + FORCED)
    return reference.forced(family, params, config, ids, start, out.cache, FORCED)


def test_teacher_forced_tokens_on_a_cache_match_hf(case, request, measured):
    features = ours(case.vlm.params, case.vlm.config, case.ids, case.slots, case.tiles)[3]
    got = forced(case.vlm.params, case.vlm.config, case.ids, case.slots, features)
    name = f"onevision teacher-forced {request.node.callspec.id}"
    reference.assert_forced(got, case.reference.logits, LENGTHS, measured, name)


@jax.jit
def slopes(params, config, ids, slots, features):
    """∂ log p(top) / ∂A of layer 1 at ROWS, [B, R, N, T], through the perturbation of its head outputs."""
    features = features.reshape(len(ids), -1, features.shape[-1])
    spec = ReadSpec(layers=(1,), read=frozenset({"values"}))

    def top(perturb):
        taps = Taps((Edit(Tap(perturb=perturb[None]), 1, 2),), jnp.asarray(ROWS))
        out = family.prefill(params, config, ids, jnp.asarray(LENGTHS), features, slots, taps=taps, spec=spec)
        return jax.nn.log_softmax(out.logits).max(axis=-1).sum(), out.readouts.values

    d = config.decoder
    gradient, values = jax.grad(top, has_aux=True)(jnp.zeros((*ROWS.shape, d.num_heads, d.head_dim)))
    return attention_gradient(gradient[:, None], values.swapaxes(0, 1))


@pytest.mark.parametrize("name", ["gqa", "next-mistral"])
def test_the_gradient_to_an_attention_matches_torch_autograd(case_of, name, measured):
    import torch

    case = case_of(name)
    features = ours(case.vlm.params, case.vlm.config, case.ids, case.slots, case.tiles)[3]
    got = np.asarray(slopes(case.vlm.params, case.vlm.config, case.ids, case.slots, features))
    ids, mask = reference.pad(case.ids, np.array(LENGTHS), "right")
    out = case.model(input_ids=ids, attention_mask=mask, output_attentions=True, **case.inputs)
    out.attentions[1].retain_grad()
    last = out.logits[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1]
    torch.log_softmax(last, -1).max(-1).values.sum().backward()
    theirs = np.take_along_axis(out.attentions[1].grad.numpy(), ROWS[:, None, :, None], axis=2)
    seen = np.arange(case.ids.shape[1]) <= ROWS[:, None, :, None]
    scale = np.abs(theirs).max()
    d = (np.abs(got.reshape(theirs.shape) - theirs) * seen).max() / scale
    measured(f"onevision gradient to attention, {name}, relative", d)
    assert d <= TOLERANCE and scale > 1e-3


LONG = ((1, 1), (1, 60), (700, 1), (3, 500), (90, 30), (61, 59))


@pytest.mark.parametrize("name", ["gqa", "next"])
def test_odd_sizes_have_the_tokens_that_hf_gives_them(case_of, name, measured):
    """Among them lines of which un-padding leaves no cell: transformers then gives them newlines, or nothing."""
    import torch

    case = case_of(name)
    vlm, inner = case.vlm, case.model.model
    bucket = vlm.image_buckets[-1]
    rng = np.random.default_rng(1)
    pil = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in LONG]
    images = [vlm.process(image, bucket) for image in pil]
    theirs = vlm.image_processor(images=pil, return_tensors="pt")
    with torch.no_grad():
        kwargs = {} if name == "next" else dict(batch_num_images=theirs["batch_num_images"])
        expected = inner.get_image_features(theirs["pixel_values"], theirs["image_sizes"], **kwargs).pooler_output
    stacked = jax.tree.map(lambda *x: np.stack(x), *(image.arrays for image in images))
    got = jax.jit(family.encode_images)(vlm.params, vlm.config, stacked)
    for image, ours, want in zip(images, got, expected, strict=True):
        assert image.tokens == len(want)
        d = np.abs(np.asarray(ours)[: image.tokens] - want.numpy()).max()
        measured(f"onevision {name}, {image.geometry.image_size}: features", d)
        assert d <= TOLERANCE
        assert not np.asarray(ours)[image.tokens :].any()


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_have_the_ids_of_hfs_chat_template(case_of, count, monkeypatch):
    """One image is tiled; two are padded, which is what transformers' processor does with them."""
    from transformers import LlavaOnevisionProcessor

    # Its video processor would need torchvision.
    monkeypatch.setattr(LlavaOnevisionProcessor, "check_argument_for_proper_class", lambda *_: None)
    vlm = case_of("gqa", "hf" if count == 1 else "pad").vlm
    processor = LlavaOnevisionProcessor(
        vlm.image_processor, vlm.tokenizer, None, num_image_tokens=16, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2", chat_template=vlm.tokenizer.chat_template,
    )  # fmt: skip
    images, question = reference.pictures(3, SIZES)[:count], "What is the character on the red plate?"
    messages = [
        dict(role="system", content=[dict(type="text", text="You are a helpful assistant.")]),
        dict(role="user", content=[*[dict(type="image")] * count, dict(type="text", text=question)]),
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    theirs = processor(text=[text], images=[images], return_tensors="np")["input_ids"][0]
    row = vlm.encode(images, render("qwen_1_5", question, num_images=count))
    assert row.tokens.ids.tolist() == theirs.tolist()
    assert (row.slots == slots_of(row.tokens, row.images)).all()
