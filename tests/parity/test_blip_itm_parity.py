"""BLIP image-text matching against HF transformers: every layer, the logits, and the gradient map against autograd.

Folders are written by HF's `save_pretrained` and read by `load_matcher`. If a case fails here and nowhere else, look at
the first layer in the report: everything after it is only a consequence.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest
import reference
from tiny_blip import VOCABULARY, write_bert_tokenizer, write_blip_processor

from jaxvqa.matcher import Matcher, Pairs, collate, load_matcher
from jaxvqa.models import blip_itm
from jaxvqa.vision import blip

pytestmark = pytest.mark.parity

CASES = {
    "narrow-vision": dict(vision=dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2), text_layers=3),
    "wide-vision": dict(
        vision=dict(hidden_size=36, num_hidden_layers=3, num_attention_heads=3, hidden_act="quick_gelu"), text_layers=2
    ),
}
TEXTS = (
    "the red square",
    "What is on the small sign, left of the blue cross?",
    "Is there a blue cross in the image",
    "plate",
)
TOLERANCE = 1e-4
"""Of hidden states and logits of unit size: f32 rounding, with other summation orders."""
GRADIENT_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Case:
    model: Any
    matcher: Matcher
    pairs: Pairs
    pixel_values: Any
    """HF's, [B, 3, E, E]."""

    @property
    def inputs(self) -> dict[str, Any]:
        import torch

        mask = np.arange(self.pairs.ids.shape[1]) < np.asarray(self.pairs.lengths)[:, None]
        ids = torch.tensor(np.asarray(self.pairs.ids)).long()
        return dict(input_ids=ids, attention_mask=torch.tensor(mask).long(), pixel_values=self.pixel_values)


@pytest.fixture(scope="session")
def case_of(tmp_path_factory):
    """case_of(name): a model saved by HF and loaded here, with one image for each text; made once."""

    @functools.cache
    def make(name: str) -> Case:
        import torch
        from transformers import AutoImageProcessor, BlipConfig, BlipForImageTextRetrieval

        torch.set_num_threads(1)
        folder, options = tmp_path_factory.mktemp(name), CASES[name]
        config = BlipConfig(
            text_config=dict(
                vocab_size=len(VOCABULARY), hidden_size=24, intermediate_size=40, num_attention_heads=3,
                num_hidden_layers=options["text_layers"], max_position_embeddings=40, bos_token_id=2, sep_token_id=3,
            ),
            vision_config=dict(intermediate_size=20, image_size=32, patch_size=8) | options["vision"],
            image_text_hidden_size=12,
        )  # fmt: skip
        model = BlipForImageTextRetrieval(config).eval()
        reference.randomise(model, seed=list(CASES).index(name))
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if n.endswith("LayerNorm.weight")):
                parameter += 1
        model.save_pretrained(folder)
        write_bert_tokenizer(folder)
        write_blip_processor(folder, 32)
        matcher = load_matcher(folder, dtype="float32", offline=True)
        images = reference.pictures()[: len(TEXTS)]
        pairs = collate([matcher.encode(*pair) for pair in zip(images, TEXTS, strict=True)])
        pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")["pixel_values"]
        return Case(model, matcher, pairs, pixels)

    return make


@pytest.fixture(params=CASES)
def case(request, case_of) -> Case:
    return case_of(request.param)


def theirs(case: Case) -> dict[str, np.ndarray]:
    """HF's image tokens by layer, text hidden states by layer, and logits."""
    import torch

    with torch.no_grad():
        image = case.model.vision_model(case.pixel_values, output_hidden_states=True)
        out = case.model(**case.inputs)
        text = case.model.text_encoder(
            input_ids=case.inputs["input_ids"],
            attention_mask=case.inputs["attention_mask"],
            encoder_hidden_states=image.last_hidden_state,
            output_hidden_states=True,
        )
    found = {f"vision {i}": x.numpy() for i, x in enumerate(image.hidden_states)}
    found |= {f"text {i}": x.numpy() for i, x in enumerate(text.hidden_states)}
    return found | {"image": image.last_hidden_state.numpy(), "logits": out.itm_score.numpy()}


@jax.jit
def ours(params, config, pairs):
    image = blip_itm.encode_images(params, config, pairs.pixels)
    x = blip_itm.embed(params, config, pairs.ids)
    mask = blip_itm.text_mask(pairs.ids, pairs.lengths)
    found = {
        f"vision {i}": blip.encode(params.vision, config.vision, pairs.pixels, stop=i)
        for i in range(config.vision.num_layers + 1)
    }
    for i in range(config.text.num_layers + 1):
        found[f"text {i}"] = blip_itm.run_layers(params, config, x, mask, image, 0, i)
    logits = blip_itm.match(params, config, pairs.ids, pairs.lengths, image)
    return found | {"image": image, "logits": logits}


def deviations(case: Case, params=None, config=None, pairs=None) -> dict[str, float]:
    """Largest absolute difference of every checked array, over valid tokens."""
    matcher, expected = case.matcher, theirs(case)
    got = ours(params or matcher.params, config or matcher.config, pairs or case.pairs)
    assert got.keys() == expected.keys()
    valid = np.arange(case.pairs.ids.shape[1]) < np.asarray(case.pairs.lengths)[:, None]
    return {
        name: float(np.abs(np.asarray(got[name]) - expected[name])[valid if name.startswith("text") else ...].max())
        for name in expected
    }


def test_every_layer_and_the_logits_match_hf(case, request, measured):
    found = deviations(case)
    for name, d in found.items():
        measured(f"parity {request.node.callspec.id}: {name}", d)
    assert not (wrong := {k: d for k, d in found.items() if not d <= TOLERANCE}), f"{wrong} of {found}"


def test_pixels_and_tokens_match_hf(case_of):
    case = case_of("wide-vision")
    np.testing.assert_array_equal(case.pairs.pixels, case.pixel_values.numpy().transpose(0, 2, 3, 1))
    logits = np.asarray(case.matcher.match_logits(case.pairs))
    assert np.abs(logits - theirs(case)["logits"]).max() <= TOLERANCE


def changed(case: Case, change) -> Any:
    """The parameters with `change` applied to the stacked text layers."""
    params = case.matcher.params
    return replace(params, text=replace(params.text, layers=change(params.text.layers)))


MUTATIONS = {
    "no cross-attention": lambda c: dict(
        params=changed(c, lambda t: replace(t, cross=replace(t.cross, o_proj=0 * t.cross.o_proj)))
    ),
    "swapped norms": lambda c: dict(
        params=changed(c, lambda t: replace(t, norm=t.cross.norm, cross=replace(t.cross, norm=t.norm)))
    ),
    "swapped keys and values": lambda c: dict(
        params=changed(c, lambda t: replace(t, cross=replace(t.cross, k_proj=t.cross.v_proj, v_proj=t.cross.k_proj)))
    ),
    "no text mask": lambda c: dict(pairs=replace(c.pairs, lengths=np.full_like(c.pairs.lengths, c.pairs.ids.shape[1]))),
    "the next image": lambda c: dict(pairs=replace(c.pairs, pixels=np.roll(c.pairs.pixels, 1, axis=0))),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_parity(case_of, name, measured):
    """Faults of a port that leave every shape as it is; a parity test that survives one of them proves nothing."""
    case = case_of("narrow-vision")
    found = deviations(case, **MUTATIONS[name](case))
    for quantity in ("text 1", "logits"):
        measured(f"mutation {name}: {quantity}", found[quantity])
        assert found[quantity] > 100 * TOLERANCE


def autograd(case: Case, layer: int, relu: str) -> np.ndarray:
    """The map by torch: eager attention, gradients of the probabilities; LAVIS's, and HiPerson's Eq. 3-4."""
    out = {}

    def keep(module, args, result):
        result[1].retain_grad()
        out["probs"] = result[1]

    cross = case.model.text_encoder.encoder.layer[layer].crossattention.self
    handle = cross.register_forward_hook(keep)
    case.model.zero_grad()
    case.model(**case.inputs).itm_score[:, 1].sum().backward()
    handle.remove()
    a, g = (x.detach().numpy()[..., 1:] for x in (out["probs"], out["probs"].grad))
    maps = np.maximum((a * g).sum(1), 0) if relu == "sum" else (a * np.maximum(g, 0)).mean(1)
    return maps.reshape(*maps.shape[:2], *case.matcher.config.grid)


@pytest.mark.parametrize("relu", ["sum", "grad"])
@pytest.mark.parametrize("layer", [-1, 0])
def test_the_gradient_map_matches_torch_autograd(case, layer, relu, request, measured):
    expected = autograd(case, layer, relu)
    found = np.asarray(case.matcher.gradcam(case.pairs, layer, relu=relu))
    valid = np.arange(case.pairs.ids.shape[1]) < np.asarray(case.pairs.lengths)[:, None]
    d = np.abs(found - expected)[valid].max()
    measured(f"gradient map {request.node.callspec.id}", d)
    assert expected[valid].max() > 1e-3 and d <= GRADIENT_TOLERANCE
    assert not found[~valid].any()
    others = found[:, 1:]
    assert not others.any() if layer == -1 else others.any()
