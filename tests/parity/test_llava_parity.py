"""LLaVA against HF transformers: every layer, the logits, the decode path, attention rows and generated text.

Folders are written by HF's `save_pretrained` and read by `jaxvqa.load`, images pass each side's own preprocessing. If
a case fails here and nowhere else, look at the first layer in the report: everything above it is only a consequence.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import Reference, assert_parity
from small import side_by_side
from tiny import VOCABULARY

import jaxvqa
from jaxvqa import decoding
from jaxvqa.models import llava
from jaxvqa.taps import ReadSpec, Taps

pytestmark = pytest.mark.parity

CASES = {
    "mha": {},
    "gqa-tied": dict(num_kv_heads=2, head_dim=12, tied=True),
    "select-full": dict(select="full"),
    "feature-layer": dict(feature_layer=1, num_kv_heads=1),
    "feature-layers": dict(feature_layer=[-1, 2]),
}
LENGTHS, IMAGES = (576, 541, 523), (2, 2, 1)
"""Above 500 tokens: near position 0 rotations are the identity, so short prompts hide faults of rotary embeddings."""
FORCED = 64
NEW_TOKENS = 24
TIE = 1e-3
"""Greedy choices may differ where HF's two best logits are closer than this."""


@dataclass(frozen=True, eq=False)
class Case:
    model: Any
    vlm: jaxvqa.VLM
    ids: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray
    """Ours, f32 [B, I, E, E, 3]."""
    pixel_values: Any
    """HF's, [M, 3, E, E]."""

    @functools.cached_property
    def reference(self) -> Reference:
        return reference.run(self.model, self.ids, self.lengths, attentions=True, pixel_values=self.pixel_values)


@pytest.fixture(scope="session")
def case_of(tmp_path_factory):
    """case_of(name): a saved and loaded model with its inputs, made once."""

    @functools.cache
    def make(name: str) -> Case:
        from transformers import AutoImageProcessor

        folder = tmp_path_factory.mktemp(name)
        model = reference.save_llava(folder, **CASES[name], seed=list(CASES).index(name))
        vlm = jaxvqa.load(folder, dtype="float32", image_setup="hf", offline=True)
        images = iter(reference.pictures())
        side = reference.IMAGE_SIZE
        pixels = np.zeros((len(IMAGES), max(IMAGES), side, side, 3), np.float32)
        theirs = []
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        for row, count in enumerate(IMAGES):
            for i in range(count):
                image = next(images)
                pixels[row, i] = vlm.process(image).arrays
                theirs.append(processor(image, return_tensors="pt")["pixel_values"])
        ids = reference.prompts(vlm.config.image_tokens, LENGTHS, IMAGES)
        import torch

        return Case(model, vlm, ids, np.array(LENGTHS, np.int32), pixels, torch.cat(theirs))

    return make


@pytest.fixture(params=CASES)
def case(request, case_of) -> Case:
    return case_of(request.param)


ROWS = np.array([[575, 500, 300, 41], [540, 333, 60, 2], [522, 522, 100, 17]], np.int32)
SPEC = ReadSpec(layers=(0, 1, 2), read=frozenset({"hidden", "rows"}), heads="all")


@functools.partial(jax.jit, static_argnames="swap_images")
def ours(params, config, ids, lengths, pixels, *, swap_images=False):
    """Hidden states (the last normalised), logits [B, T, V], rows [L, B, N, R, T], features [B, I, P, D], last ones."""
    features = llava.encode_images(params, config, jax.lax.collapse(pixels, 0, 2))
    features = features.reshape(*pixels.shape[:2], *features.shape[1:])
    features = features[:, ::-1] if swap_images else features
    images = side_by_side(features, ids, config.image_token_id)
    out = llava.prefill(params, config, ids, lengths, *images, taps=Taps(rows=jnp.asarray(ROWS)), spec=SPEC)
    hidden, logits = reference.finished(params, config, out.readouts.hidden)
    return hidden, logits, out.readouts.rows, features, out.logits


def deviations(case: Case, theirs: Reference, config=None, **mutation) -> dict[str, float]:
    """Largest absolute difference of every checked array, over valid tokens."""
    got = ours(case.vlm.params, config or case.vlm.config, case.ids, case.lengths, case.pixels, **mutation)
    hidden, logits, rows, features, last_logits = map(np.asarray, got)
    real = np.arange(max(IMAGES)) < np.array(IMAGES)[:, None]
    found = {}
    if features[real].size == theirs.features.size:
        found["projector"] = np.abs(features[real].ravel() - theirs.features.ravel()).max()
    found |= reference.compare(theirs, case.lengths, ROWS, hidden, logits, rows)
    last = np.take_along_axis(theirs.logits, case.lengths[:, None, None] - 1, axis=1)[:, 0]
    return found | {"last logits": np.abs(last_logits - last).max()}


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_layer_and_the_logits_match_hf(case, side, request, measured):
    theirs = case.reference
    if side == "left":
        theirs = reference.run(case.model, case.ids, case.lengths, side="left", pixel_values=case.pixel_values)
    found = deviations(case, theirs)
    for name, d in found.items():
        measured(f"parity {request.node.callspec.id}: {name}", d)
    assert_parity(found)


MUTATIONS = {
    "rope base": lambda c: dict(config=replace(c, decoder=replace(c.decoder, rope_theta=20000.0))),
    "wrong feature layer": lambda c: dict(config=replace(c, feature_layers=(-1,))),
    "swapped image order": lambda c: dict(swap_images=True),
    "missing CLS drop": lambda c: dict(config=replace(c, select="full")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_parity(case_of, name, measured):
    """The four classic faults of a port; a parity test that survives one of them proves nothing."""
    case = case_of("mha")
    found = deviations(case, case.reference, **MUTATIONS[name](case.vlm.config))
    for quantity in ("hidden 0", "hidden 2", "logits", "rows"):
        measured(f"mutation {name}: {quantity}", found[quantity])
        with pytest.raises(AssertionError):
            assert_parity({quantity: found[quantity]})


@jax.jit
def forced(params, config, ids, lengths, features):
    """Logits [B, FORCED, V] of the last FORCED tokens, run on a cache one by one, and all at once."""
    start = lengths - FORCED
    out = llava.prefill(
        params, config, ids, start, *side_by_side(features, ids, config.image_token_id), capacity=ids.shape[1] + FORCED
    )
    return reference.forced(llava, params, config, ids, start, out.cache, FORCED)


def test_teacher_forced_tokens_on_a_cache_match_hf(case, request, measured):
    """Prefill and 64 further tokens per row, each row from its own length, against HF's one full forward pass."""
    got = forced(case.vlm.params, case.vlm.config, case.ids, case.lengths, features_of(case))
    name = f"teacher-forced {request.node.callspec.id}"
    reference.assert_forced(got, case.reference.logits, case.lengths, measured, name)


def features_of(case):
    """Image tokens [B, I, P, D], from the program of the other tests."""
    return ours(case.vlm.params, case.vlm.config, case.ids, case.lengths, case.pixels)[3]


@functools.partial(jax.jit, static_argnames="eos")
def generate(params, config, ids, lengths, features, eos):
    images = side_by_side(features, ids, config.image_token_id)
    out = llava.prefill(params, config, ids, lengths, *images, capacity=ids.shape[1] + NEW_TOKENS)
    return decoding.decode(params.decoder, config.decoder, out, max_new_tokens=NEW_TOKENS, eos_ids=eos)


def test_greedy_text_matches_hf_but_for_ties(case_of, measured):
    """After a tie the two texts are different texts, so the rest of that row is not compared."""
    compared = ties = 0
    for name in ("mha", "gqa-tied", "select-full"):
        c = case_of(name)
        ids, mask = reference.pad(c.ids, c.lengths, "left")
        theirs = c.model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=c.pixel_values, max_new_tokens=NEW_TOKENS,
            do_sample=False, eos_token_id=VOCABULARY, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        logits = np.stack([x.numpy() for x in theirs.logits], axis=1)
        tokens = theirs.sequences[:, ids.shape[1] :].numpy()
        # A token in the middle of the first row's text ends texts, so that rows have answers of different lengths.
        eos = int(tokens[0, NEW_TOKENS // 2])
        result = generate(c.vlm.params, c.vlm.config, c.ids, c.lengths, features_of(c), (eos,))
        for row, count in enumerate(np.asarray(result.count)):
            ends = np.flatnonzero(tokens[row] == eos)
            expected = tokens[row, : ends[0] + 1 if len(ends) else NEW_TOKENS]
            different = np.flatnonzero(np.asarray(result.ids)[row, : len(expected)] != expected)
            if len(different):
                at = different[0]
                best = np.sort(logits[row, at])[-2:]
                assert best[1] - best[0] < TIE, f"{name}, row {row}, token {at}: {result.ids[row]} {expected}"
                ties += 1
                compared += at + 1
            else:
                assert count == len(expected)
                compared += count
    measured("greedy: tokens compared", compared)
    measured("greedy: ties", ties)
    assert compared > 100 and ties <= 0.02 * compared


def test_pixels_match_the_hf_processor(case_of):
    """The centre-crop setup; the padded one against HF's own padding."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    c = case_of("mha")
    ours = np.concatenate([p[:n] for p, n in zip(c.pixels, IMAGES, strict=True)])
    np.testing.assert_array_equal(ours, c.pixel_values.numpy().transpose(0, 2, 3, 1))
    processor = c.vlm.image_processor
    padded = jaxvqa.VLM(c.vlm.config, c.vlm.params, c.vlm.tokenizer, processor, name="padded", image_setup="pad")
    theirs = LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size=dict(processor.size), crop_size=dict(processor.crop_size),
        image_mean=processor.image_mean, image_std=processor.image_std,
    )  # fmt: skip
    for image in reference.pictures():
        expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(padded.process(image).arrays, expected, atol=1e-5)
