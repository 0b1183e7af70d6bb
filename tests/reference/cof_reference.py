"""CoF (Coarse-to-Fine, Gavin001201/CoF), straight from the paper: ground the answer, then look there harder."""

import math
import re

from plain import SHORT, attention, vicuna

GROUND = (
    "According to the information in the image and the question, \n"
    "detail the bounding box of the region in the image that contains the answer in JSON format."
)


def cof(llava, image, question, *, lam=2.0, alpha=1.3, layers=None, strict=False, fallback="all", limit=128):
    """(mask, boxes in image pixels, answer, search passes, grounding reply)."""
    before = llava.passes
    stem = question.split("\n")[0]
    reply = llava.generate([image], vicuna(f"<image>\n{stem}\n{GROUND}"), limit)
    search = llava.passes - before
    side, (h, w) = max(image.size), llava.grid
    boxes = parse(reply, side, strict)
    if boxes:
        mask = [[False] * w for _ in range(h)]
        for box in boxes:
            for r, c in cells(box, alpha, h, strict):
                mask[r][c] = True
    else:
        mask = [[fallback == "all"] * w for _ in range(h)]
    text = vicuna(f"<image>\n{question}\n{SHORT}")
    return mask, pixels(boxes, image.size), reweighted(llava, image, text, mask, lam, layers, limit), search, reply


def reweighted(llava, image, text, mask, lam, layers, limit):
    """The answer with log λ added to the attention logits of the masked image tokens (eq. 3), in every row."""
    flat = [on for row in mask for on in row]
    chosen = [column for column, on in zip(llava.columns(text), flat, strict=True) if on]

    def add(layer, scores):
        if layers is None or layer in layers:
            scores = scores.clone()
            scores[..., chosen] += math.log(lam)
        return scores

    with attention(scores=add):
        return llava.generate([image], text, limit)


def parse(reply, side, strict):
    """Boxes (x1, y1, x2, y2), normalised to the padded square of this side in pixels."""
    if strict:
        number = r"(-?\d+\.\d+)"
        found = re.search(r"\[" + ", ".join([number] * 4) + r"\]", reply)
        return [tuple(float(x) for x in found.groups())] if found else []
    number = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
    boxes = []
    for found in re.findall(r"\[" + ",".join([number] * 4) + r"\]", reply):
        x1, y1, x2, y2 = (float(x) for x in found)
        if max(x1, y1, x2, y2) > 1.5:
            x1, y1, x2, y2 = (x / side for x in (x1, y1, x2, y2))
        x1, y1, x2, y2 = (min(max(x, 0.0), 1.0) for x in (x1, y1, x2, y2))
        boxes.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return boxes


def cells(box, alpha, side, strict):
    """Cells (row, column) of a box on a grid of `side` x `side`, enlarged by alpha to a square."""
    x1, y1, x2, y2 = box
    size = max((x2 - x1) * alpha, (y2 - y1) * alpha)
    ranges = []
    for centre in ((y1 + y2) / 2, (x1 + x2) / 2):
        low, high = centre - size / 2, centre + size / 2
        if strict:  # the released test looks a whole width ahead
            low = low if centre - size > 0 else 0
            high = high if centre + size < 1 else 1
        else:
            low, high = (0, high - low) if low < 0 else (low, high)
            low, high = (low - (high - 1), 1) if high > 1 else (low, high)
            low, high = max(low, 0), min(high, 1)
        ranges.append(range(int(low * (side - 1)), int(high * (side - 1)) + 1))
    return [(r, c) for r in ranges[0] for c in ranges[1]]


def pixels(boxes, size):
    """Boxes on the padded square to pixels of the image."""
    side, out = max(size), []
    for box in boxes:
        moved = [box[i] * side - (side - size[i % 2]) // 2 for i in range(4)]
        out.append(tuple(min(max(moved[i], 0), size[i % 2]) for i in range(4)))
    return out
