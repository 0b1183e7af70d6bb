"""FOCUS (focus-mllm-vqa.github.io), straight from the paper, for models with one global view (LLaVA-1.5)."""

import math
import re

import numpy as np
import torch
from PIL import Image
from plain import MEAN_COLOUR, SHORT, crop, outputs_of, vicuna
from vicrop_reference import margin

ASK = "Question: {}\nIf you want to answer the question, which objects' information do you need?"
LEAD = "So I need the information about the following objects: "
PRONOUNS = set(
    "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs this that these "
    "those who whom whose which what someone somebody something anyone anybody anything everyone everybody everything"
    " myself yourself himself herself itself ourselves themselves".split()
)


def extract(llava, question, examples, limit=256):
    """The objects that a question is about, asked without the image: [(name, type)]."""
    turns = [text for asked, reply in examples for text in (ASK.format(asked), reply)]
    reply = llava.generate([], vicuna(*turns, ASK.format(question)), limit)
    if LEAD not in reply:
        return []
    objects = reply.split(LEAD)[1].split("\n")[0].strip().removesuffix(".")
    found = {}
    for name in re.split(r" and |, ", objects):
        if name.strip() and not PRONOUNS & set(re.findall(r"[a-z]+", name.lower())):
            kind = 2 if name.startswith("all ") else 1
            found.setdefault(name.strip().lower(), (name[4:].removesuffix("s") if kind == 2 else name.strip(), kind))
    return list(found.values())


def focus(
    llava, image, question, targets, *, layers, n_steps=8, overrun=True, n_anchors=30, s_min=3, s_max=5, s_dist=3,
    threshold=0.5, nms=0.3, t_type2=0.6, t_far=1200, norm="row", clip=True, feature="value", dilate=0, limit=20,
    final="<image>\n{}\n" + SHORT,
):  # fmt: skip
    """A dict: maps and ROIs by target, boxes, text, search passes, composed image, margins of decisions."""
    before, maps, chosen, lead = llava.passes, [], [], math.inf
    for name, kind in targets:
        heat = relevance(llava, image, name, layers, norm, clip, feature)
        maps.append(heat)
        rois, gap = propose(heat, n_anchors, s_min, s_max, s_dist, threshold, nms)
        boxes = [box for box in (to_pixels(roi, llava.view(image)) for roi in rois) if box]
        steps = len(boxes) if kind == 2 else n_steps
        kept, doubt = verify(llava, image, name, boxes, kind, steps, overrun, t_type2)
        chosen += [(box, kind) for box in kept]
        lead = min(lead, gap, doubt)
    boxes = [box for box, _ in chosen]
    several = any(kind == 2 for _, kind in chosen)
    if several:
        boxes = merge(boxes, dilate)
    search = llava.passes - before
    seen = compose(image, boxes, 0 if several else t_far, llava.encoder)
    text = llava.generate([seen], vicuna(final.format(question)), limit)
    return dict(maps=maps, boxes=boxes, text=text, search=search, seen=seen, lead=lead)


@torch.no_grad()
def relevance(llava, image, target, layers, norm="row", clip=True, feature="value"):
    """How alike the values of the target's tokens and of the image's are (§3.2): [h, w], sum 1."""
    text = vicuna(f"<image>\n{exists(target)}")
    at = llava.positions(text.split(" in the image?")[0], target)
    attentions = [llava.layers[layer].self_attn for layer in layers]
    with outputs_of([a.v_proj if feature == "value" else a.k_proj for a in attentions]) as values:
        llava.run([image], text)
    rows = 0
    for value in values:
        v = value[0].reshape(len(value[0]), -1, attentions[0].head_dim).double().numpy()
        rows = rows + similarity(v, norm)[at][:, llava.columns(text)]
    return product(rows, clip).reshape(llava.grid)


def similarity(v, norm):
    """Normalised similarity of all tokens [S, S] from their values [S, K, H] in one layer."""
    v = v / np.linalg.norm(v, axis=-1, keepdims=True)
    r = (np.einsum("ikh,jkh->ij", v, v) + np.eye(len(v))) / 2
    return r / r.sum(axis=1, keepdims=True) if norm == "row" else r / r.sum(axis=1)[None, :]


def product(rows, clip):
    """The target's tokens' maps [n, P], multiplied; absolute values sum to 1, so that the sign stays."""
    heat = np.ones(rows.shape[1])
    for a in rows:
        a = a / a.sum()
        heat = heat * (np.clip(a, 0, None) if clip else a)
    return heat / np.abs(heat).sum()


def propose(heat, n_anchors, s_min, s_max, s_dist, threshold, nms):
    """Boxes of cells (x1, y1, x2, y2), best first, and the smallest relative margin of a decision (§3.3)."""
    h, w = heat.shape
    order = sorted((-heat[r, c], r, c) for r in range(h) for c in range(w))
    anchors, rois, kept, lead = [], [], [], math.inf
    for number, (score, r, c) in enumerate(order):
        if len(anchors) < n_anchors and all(math.dist((r, c), a) >= s_dist for a in anchors):
            anchors.append((r, c))
            if number + 1 < len(order):
                lead = min(lead, margin((-score, -order[number + 1][0])))
    for r, c in anchors:
        half = s_min // 2
        while 2 * half + 1 < s_max:
            mean = heat[max(r - half - 1, 0) : r + half + 2, max(c - half - 1, 0) : c + half + 2].mean()
            lead = min(lead, abs(mean - threshold * heat[r, c]) / max(heat[r, c], 1e-30))
            if mean < threshold * heat[r, c]:
                break
            half += 1
        rois.append((max(c - half, 0), max(r - half, 0), min(c + half + 1, w), min(r + half + 1, h)))
    for roi in rois:
        if all(iou(roi, other) <= nms for other in kept):
            kept.append(roi)
    return kept, lead


def iou(a, b):
    def area(x1, y1, x2, y2):
        return max(x2 - x1, 0) * max(y2 - y1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return shared / (area(*a) + area(*b) - shared)


def to_pixels(roi, view):
    """Cells to image pixels, clamped; None where less than a pixel is left."""
    box = [view.origin[i % 2] + roi[i] * view.cell[i % 2] for i in range(4)]
    box = tuple(min(max(box[i], 0), view.size[i % 2]) for i in range(4))
    return box if box[2] - box[0] >= 1 and box[3] - box[1] >= 1 else None


def exists(target):
    return f"Is there a {target} in the image? Answer Yes or No."


def verify(llava, image, target, boxes, kind, n_steps, overrun, t_type2):
    """The boxes that the model says show the target: the best of type 1, all good ones of type 2; and a margin."""
    if kind == 1 and n_steps == 1 and not overrun:
        return boxes[:1], math.inf
    scores = []
    for number, box in enumerate(boxes):
        if number >= n_steps and (not overrun or max(scores) > 0):
            break
        scores.append(llava.confidence([crop(image, box)], vicuna(f"<image>\n{exists(target)}")))
    if not scores:
        return [], math.inf
    best = boxes[max(range(len(scores)), key=scores.__getitem__)]
    if kind == 2:
        return [box for box, c in zip(boxes, scores, strict=True) if c > t_type2] or [best], min(
            abs(c - t_type2) for c in scores
        )
    return [best], min(margin(scores), *(abs(c) for c in scores))


def merge(boxes, dilate):
    """Boxes that overlap, each grown by `dilate` pixels, become one, until none do."""
    boxes = list(boxes)
    for i in range(len(boxes)):
        for j in range(i + 1, len(boxes)):
            a, b = boxes[i], boxes[j]
            if all(min(a[k + 2], b[k + 2]) + 2 * dilate > max(a[k], b[k]) for k in (0, 1)):
                rest = [box for k, box in enumerate(boxes) if k not in (i, j)]
                union = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
                return merge([*rest[:i], union, *rest[i:]], dilate)
    return boxes


def compose(image, boxes, t_far, side):
    """The one image of the final prompt (§3.4): the whole, a crop, the crop of a union, or regions on a canvas."""
    if not boxes:
        return image
    boxes = [tuple(round(x) for x in box) for box in boxes]
    union = tuple(f(box[i] for box in boxes) for i, f in enumerate((min, min, max, max)))
    centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes]
    if all(math.dist(a, b) <= t_far for a in centres for b in centres):
        return crop(image, union)
    canvas = Image.new("RGB", (2 * side, 2 * side), MEAN_COLOUR)
    if len(boxes) == 2:
        left, right = sorted(boxes, key=lambda box: box[0])
        d = (right[1] + right[3]) // 2 - (left[1] + left[3]) // 2
        d = min(max(d, -side), side)
        canvas.paste(crop(image, left).resize((side, side)), (0, side // 2 - d // 2))
        canvas.paste(crop(image, right).resize((side, side)), (side, side // 2 + d // 2))
        return canvas
    block = side // math.ceil(math.sqrt(len(boxes)))
    for box, centre in reversed(list(zip(boxes, centres, strict=True))):  # the best is drawn last, within the canvas
        corner = []
        for i in (0, 1):
            share = (centre[i] - union[i]) / (union[i + 2] - union[i])
            corner.append(min(max(math.floor(share * 2 * side - block / 2), 0), 2 * side - block))
        canvas.paste(crop(image, box).resize((block, block)), tuple(corner))
    return canvas
