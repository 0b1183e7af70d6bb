"""HiPerson (ACL 2026, "Beyond the Panorama"), straight from the paper: two maps, one window, three steps."""

import re

import numpy as np
import torch
from plain import SHORT, crop, outputs_of, vicuna, view_of
from vicrop_reference import one_image, window

NEUTRAL = "Describe this image"
THREE_STEPS = """<image>
1) Observe the cropped image above and provide a brief description.
2) Now observe the original full image below:
<image>
Re-describe the content of the cropped region using the full image for context.
3) Based on the information from both images, answer the question:
{question}"""
SINGLE = "Based on the cropped image and the full image above, answer the question:\n{question}"


def hiperson(
    llava, matcher, image, question, *, template="vicuna_v1", layer=-1, rows="question", neutral=NEUTRAL, itm_layer=-1,
    relu="sum", itm_rows="enc", align="resample", base=336, neighbours=4, area_norm=True, prompt=THREE_STEPS,
    maps="both", limit=512,
):  # fmt: skip
    """A dict: rel and grad (on their token grids), sem (on the whole image), box, lead, reasoning, text, passes."""
    before, view, (h, w) = llava.passes, llava.view(image), llava.grid
    rel = relative(llava, image, question, neutral, layer, rows, template) if maps != "grad" else None
    grad = match_gradient(matcher, image, question, itm_layer, relu, itm_rows) if maps != "rel" else None
    search, sem = llava.passes - before, np.zeros((h, w))
    for heat, seen in ((rel, view), (grad, view_of("squash", image.size, 0, matcher.grid))):
        if heat is not None:
            sem += minmax(resample(heat, seen, (h, w)) if align == "resample" else heat)
    box, lead = window(sem, (0, 0), image.size, image.size, base, neighbours=neighbours, area_norm=area_norm)
    images, asked = [crop(image, box), image], prompt.format(question=question)
    reasoning = llava.generate(images, TEMPLATES[template](asked), limit)
    if found := re.findall(r"Answer:([^\n]*)", reasoning):
        text = found[-1].strip()
    else:  # a second turn of the same conversation
        text = llava.generate(images, TEMPLATES[template](asked, reasoning, SHORT), limit)
    return dict(
        rel=rel, grad=grad, sem=sem, box=box, lead=lead, reasoning=reasoning, text=text.removesuffix("."),
        search=search, passes=llava.passes - before,
    )  # fmt: skip


def usual(*turns):
    """As transformers' documentation prompts LLaVA: no system text, and images that have no place first."""
    text = "" if "<image>" in turns[0] else "<image><image>\n"
    for number, turn in enumerate(turns):
        text += f" {turn}</s>" if number % 2 else f"USER: {turn}\nASSISTANT:"
    return text


TEMPLATES = {"vicuna_v1": vicuna, "vicrop_hf": usual}


@torch.no_grad()
def relative(llava, image, question, neutral, layer, rows, template):
    """Attention of the question's tokens on the image, over that of the neutral question's (eq. 1 and 2)."""
    focus = []
    for asked in (question, neutral):
        text = one_image(asked) if template == "vicrop_hf" else vicuna(f"<image>\n{asked}\n{SHORT}")
        probs = llava.run([image], text).attentions[layer][0].mean(dim=0)
        chosen = [-1] if rows == "last" else llava.positions(text, asked)
        focus.append(probs[chosen][:, llava.columns(text)].mean(dim=0))
    return (focus[0] / (focus[1] + 1e-8)).reshape(llava.grid).numpy()


def match_gradient(matcher, image, text, layer, relu, rows):
    """What in the text's attention to the image speaks for a match (eq. 3 and 4): [h, w]."""
    text = " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:50])
    ids = matcher.tokenizer(text, truncation=True, max_length=35, return_tensors="pt")["input_ids"]
    pixels = torch.tensor(matcher.processor(images=[image], return_tensors="np")["pixel_values"]).requires_grad_()
    cross = [block.crossattention.self for block in matcher.model.text_encoder.encoder.layer]
    with outputs_of(cross) as seen:
        logit = matcher.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).itm_score[0, 1]
    probs = seen[layer][1]
    (slope,) = torch.autograd.grad(logit, probs)
    probs, slope = probs[0, :, :, 1:].detach(), slope[0, :, :, 1:]  # without the CLS column
    if relu == "sum":
        heat = (probs * slope).sum(dim=0).relu()
    else:  # LAVIS
        heat = (probs * slope.relu()).mean(dim=0)
    heat = heat[0] if rows == "enc" else heat[1:-1].mean(dim=0)
    return heat.reshape(matcher.grid).numpy()


def minmax(heat):
    low, high = heat.min(), heat.max()
    return (heat - low) / (high - low) if high > low else np.zeros_like(heat)


def resample(heat, view, grid):
    """The map on a grid that covers the whole image, by shares of area; what nobody saw has the map's minimum."""
    (width, height), (bx, by), out = view.size, view.cell, np.zeros(grid)
    sx, sy = width / grid[1], height / grid[0]
    for r in range(grid[0]):
        for c in range(grid[1]):
            total = covered = 0.0
            for i in range(view.grid[0]):
                for j in range(view.grid[1]):
                    x, y = view.origin[0] + j * bx, view.origin[1] + i * by
                    shared_x = min(x + bx, (c + 1) * sx) - max(x, c * sx)
                    shared_y = min(y + by, (r + 1) * sy) - max(y, r * sy)
                    if shared_x > 1e-9 * sx and shared_y > 1e-9 * sy:
                        total += heat[i, j] * shared_x * shared_y
                        covered += shared_x * shared_y
            out[r, c] = total / covered if covered else heat.min()
    return out
