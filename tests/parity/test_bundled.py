"""The bundled model is an ordinary HF checkpoint: transformers loads it, and answers as we do."""

import numpy as np
import pytest

import jaxvqa
from jaxvqa.bundled import SPECKS_LLAVA as FOLDER
from jaxvqa.prompts import render
from jaxvqa.specks import scene
from jaxvqa.specks.questions import questions

pytestmark = [pytest.mark.parity, pytest.mark.slow]

QUESTIONS = 50
HELD_OUT = 977
NEW_TOKENS = 12
TIE = 1e-3
"""Margin between the two best logits below which two implementations may choose differently."""


@pytest.fixture(scope="module")
def asked():
    """50 questions about held-out scenes, of every kind that looks at an image."""
    found = []
    for index in range(QUESTIONS):
        one = scene(HELD_OUT, index)
        rng = np.random.default_rng((HELD_OUT, index))
        kinds = ("read", "color", "shape", "presence", "relation", "count", "where")
        question = questions(one, rng, kinds=(kinds[index % len(kinds)], "presence"))[0]
        found.append((one.picture, f"{question.text} {question.ending}".strip()))
    return found


def test_transformers_gives_the_same_answers(asked, measured):
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model.eval()
    tokenizer = AutoProcessor.from_pretrained(FOLDER).tokenizer
    vlm = jaxvqa.load(FOLDER, dtype="float32")
    rows = [vlm.encode(image, render("vicrop_hf", text, ending="open")) for image, text in asked]
    ours = vlm.decode(vlm.prefill(jaxvqa.collate(rows)), max_new_tokens=NEW_TOKENS)

    different = ties = 0
    for row, mine in zip(rows, ours, strict=True):
        out = model.generate(
            input_ids=torch.tensor(row.tokens.ids)[None].long(),
            attention_mask=torch.ones(1, len(row.tokens.ids), dtype=torch.long),
            pixel_values=torch.tensor(row.images[0].arrays.transpose(2, 0, 1))[None],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        theirs = tokenizer.decode(out.sequences[0, len(row.tokens.ids) :], skip_special_tokens=True).strip()
        if mine != theirs:
            top = torch.stack(out.logits)[:, 0].topk(2).values
            tie = bool((top[:, 0] - top[:, 1]).min() < TIE)
            ties, different = ties + tie, different + (not tie)
    measured("bundled model: answers that differ from transformers, of 50", different)
    measured("bundled model: answers that differ at a tie, of 50", ties)
    assert different == 0
    assert ties <= 0.02 * QUESTIONS


def test_transformers_own_processor_makes_the_same_prompt_and_pixels(asked):
    from transformers import AutoImageProcessor, AutoTokenizer

    vlm = jaxvqa.load(FOLDER, image_setup="hf")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
    for image, text in asked[:5]:
        row = vlm.encode(image, render("vicrop_hf", text, ending="open"))
        marker = tokenizer.convert_ids_to_tokens(vlm.config.image_token_id)
        theirs = tokenizer(f"{marker * vlm.config.image_tokens}\nUSER: {text}\nASSISTANT:")["input_ids"]
        assert row.tokens.ids.tolist() == theirs
        pixels = processor(images=[image], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(row.images[0].arrays, pixels.transpose(1, 2, 0))
