"""The bundled models are ordinary HF checkpoints: transformers loads them, and answers as we do."""

import numpy as np
import pytest

import jaxvqa
from jaxvqa.bundled import SPECKS_LLAVA, SPECKS_LLAVA_NEXT
from jaxvqa.prompts import render
from jaxvqa.specks import scene
from jaxvqa.specks.questions import questions

pytestmark = [pytest.mark.parity, pytest.mark.slow]

QUESTIONS = {SPECKS_LLAVA: 50, SPECKS_LLAVA_NEXT: 10}
HELD_OUT = 977
NEW_TOKENS = 12
TIE = 1e-3
"""Margin between the two best logits below which two implementations may choose differently."""


@pytest.fixture(scope="module", params=QUESTIONS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def asked(folder):
    """Questions about held-out scenes, of every kind that looks at an image."""
    found = []
    for index in range(QUESTIONS[folder]):
        one = scene(HELD_OUT, index)
        rng = np.random.default_rng((HELD_OUT, index))
        kinds = ("read", "color", "shape", "presence", "relation", "count", "where")
        question = questions(one, rng, kinds=(kinds[index % len(kinds)], "presence"))[0]
        found.append((one.picture, f"{question.text} {question.ending}".strip()))
    return found


def test_transformers_gives_the_same_answers(folder, asked, measured):
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vlm = jaxvqa.load(folder, dtype="float32")
    rows = [vlm.encode(image, render("vicrop_hf", text, ending="open")) for image, text in asked]
    first = vlm.prefill(jaxvqa.collate(rows))
    logits, ours = np.asarray(first.logits), vlm.decode(first, max_new_tokens=NEW_TOKENS)

    different = ties = apart = 0
    for (image, _), row, mine, score in zip(asked, rows, ours, logits, strict=True):
        pixels = pixels_of(row)
        sizes = {"image_sizes": torch.tensor([image.size[::-1]])} if pixels.ndim == 4 else {}
        out = model.generate(
            input_ids=torch.tensor(row.tokens.ids)[None].long(),
            attention_mask=torch.ones(1, len(row.tokens.ids), dtype=torch.long),
            pixel_values=torch.tensor(pixels)[None],
            **sizes,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        apart = max(apart, float(np.abs(score - out.logits[0][0].numpy()).max()))
        theirs = tokenizer.decode(out.sequences[0, len(row.tokens.ids) :], skip_special_tokens=True).strip()
        if mine != theirs:
            top = torch.stack(out.logits)[:, 0].topk(2).values
            tie = bool((top[:, 0] - top[:, 1]).min() < TIE)
            ties, different = ties + tie, different + (not tie)
    measured(f"{folder.name}: answers that differ from transformers, of {len(rows)}", different)
    measured(f"{folder.name}: answers that differ at a tie, of {len(rows)}", ties)
    measured(f"{folder.name}: logits of the first token against transformers", apart)
    assert different == 0
    assert ties <= 0.02 * QUESTIONS[folder]
    assert apart <= 1e-4


def pixels_of(row):
    """A prompt's image as transformers takes it: [3, E, E], of tiles [n, 3, E, E]."""
    arrays = row.images[0].arrays
    return np.moveaxis(getattr(arrays, "pixels", arrays), -1, -3)


def test_transformers_own_processor_makes_the_same_prompt_and_pixels(folder, asked):
    from transformers import AutoImageProcessor, AutoTokenizer

    vlm = jaxvqa.load(folder, image_setup="hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for image, text in asked[:5]:
        row = vlm.encode(image, render("vicrop_hf", text, ending="open"))
        marker = tokenizer.convert_ids_to_tokens(vlm.config.image_token_id)
        theirs = tokenizer(f"{marker * row.images[0].tokens}\nUSER: {text}\nASSISTANT:")["input_ids"]
        assert row.tokens.ids.tolist() == theirs
        pixels = processor(images=[image], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(pixels_of(row), pixels)
