"""The bundled matcher is an ordinary HF checkpoint: transformers loads it, and scores as we do."""

import numpy as np
import pytest

from jaxvqa.bundled import SPECKS_BLIP as FOLDER
from jaxvqa.matcher import clean, collate, load_matcher
from jaxvqa.specks import COLORS, SHAPES, scene

pytestmark = [pytest.mark.parity, pytest.mark.slow]

HELD_OUT, SCENES = 978, 25
TOLERANCE = 1e-3
"""Of logits: trained weights make activations larger than the unit size of the random models."""


def test_transformers_gives_the_same_logits_from_its_own_inputs(measured):
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval

    model, report = BlipForImageTextRetrieval.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
    matcher = load_matcher(FOLDER, dtype="float32")
    images, texts = [], []
    for index in range(SCENES):
        made, rng = scene(HELD_OUT, index), np.random.default_rng((HELD_OUT, index))
        images += [made.picture] * 2
        texts += [
            f"Is there a {made.plates[0].name} in the image?",
            f"the {rng.choice([*COLORS])} {rng.choice(SHAPES)}",
        ]
    ours = np.asarray(matcher.match_logits(collate([matcher.encode(*p) for p in zip(images, texts, strict=True)])))
    inputs = tokenizer([clean(t) for t in texts], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        theirs = model(**inputs, **processor(images, return_tensors="pt")).itm_score.numpy()
    d = np.abs(ours - theirs).max()
    measured("bundled matcher: logits against transformers", d)
    assert d <= TOLERANCE
