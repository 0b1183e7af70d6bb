"""ViCrop (arXiv 2502.17422; saccharomycetes/mllms_know), straight from the paper."""

import math

import numpy as np
import torch
from PIL import Image
from plain import SHORT, crop, view_of

GENERAL = "Write a general description of the image."
RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)


def one_image(question):
    return f"<image>\nUSER: {question} {SHORT}\nASSISTANT:"


def vicrop(llava, image, question, *, maps="rel_att", layer=14, alignment="corrected", tile=1024, base=336, limit=20):
    """(heat map, box, its margin, answer, search passes)."""
    before = llava.passes
    if maps.endswith("_high"):
        make = MAPS[maps.removesuffix("_high")]
        rows = [[make(llava, t, question, layer, alignment) for t in row] for row in tiles(image, tile)]
        heat = np.block(rows)
    else:
        heat = MAPS[maps](llava, image, question, layer, alignment)
    search = llava.passes - before
    view = llava.view(image)
    if alignment == "official":  # the map is taken to cover the whole image, whatever the encoder saw
        box, lead = window(heat, (0, 0), image.size, image.size, base)
    else:
        box, lead = window(*without_padding(heat, view), image.size, base)
    text = f"<image><image>\nUSER: {question} {SHORT}\nASSISTANT:"
    return heat, box, lead, llava.generate([image, crop(image, box)], text, limit), search


@torch.no_grad()
def rel_att(llava, image, question, layer, alignment):
    """Attention of the last prompt token on the image, question over general question (§3: relative attention)."""
    rows = []
    for text in (one_image(question), one_image(GENERAL)):
        probs = llava.run([image], text).attentions[layer][0]
        rows.append(probs[:, -1, llava.columns(text)].mean(dim=0))
    return (rows[0] / rows[1]).reshape(llava.grid).numpy()


def grad_att(llava, image, question, layer, alignment):
    """Attention times the positive part of the gradient of the best token's log-probability."""
    text = one_image(question)
    out = llava.run([image], text, pixel_values=llava.pixels([image]).requires_grad_())
    probs = out.attentions[layer]
    (slope,) = torch.autograd.grad(best_token(llava, out), probs)
    heat = (probs * slope.relu())[0, :, -1, llava.columns(text)].mean(dim=0)
    return heat.reshape(llava.grid).detach().numpy()


def pure_grad(llava, image, question, layer, alignment):
    """Ratio of two pixel gradients where the image is busy, averaged over each patch."""
    norms = []
    for text in (one_image(question), one_image(GENERAL)):
        pixels = llava.pixels([image]).requires_grad_()
        (slope,) = torch.autograd.grad(best_token(llava, llava.run([image], text, pixel_values=pixels)), pixels)
        norms.append(slope[0].norm(dim=0).numpy())
    # Where the encoder looked; officially the image is squashed, wherever it did.
    view = llava.view(image) if alignment == "corrected" else view_of("squash", image.size, 0, llava.grid)
    ratio, heat, p = norms[0] / norms[1] * busy(image, view, llava.encoder), np.zeros(llava.grid), llava.patch
    for r in range(llava.grid[0]):
        for c in range(llava.grid[1]):
            heat[r, c] = ratio[r * p : (r + 1) * p, c * p : (c + 1) * p].mean()
    return heat


MAPS = {"rel_att": rel_att, "grad_att": grad_att, "pure_grad": pure_grad}


def tiles(image, height):
    """Rows of about square tiles, at most so high; what hangs over the image is black."""
    v = math.ceil(image.height / height)
    u = max(1, int(v * image.width / image.height))
    w, h = math.ceil(image.width / u), math.ceil(image.height / v)
    return [[image.crop((x * w, y * h, (x + 1) * w, (y + 1) * h)) for x in range(u)] for y in range(v)]


def best_token(llava, out):
    """Log-probability of the most likely next token. Notes how far it is from certain: the gradient is as small."""
    best = out.logits[0, -1].log_softmax(dim=-1).max()
    llava.doubt = min(llava.doubt, -float(torch.expm1(best.detach())))
    return best


def busy(image, view, side):
    """Which of the encoder's pixels [side, side] have more fine detail than the median. Padding has no part in it."""
    mask, scale = np.zeros((side, side), bool), [side / view.extent[i] for i in (0, 1)]
    x1, y1 = (max(math.floor(-view.origin[i] * scale[i] + 1e-6), 0) for i in (0, 1))
    x2, y2 = (min(math.ceil((view.size[i] - view.origin[i]) * scale[i] - 1e-6), side) for i in (0, 1))
    box = [view.origin[i % 2] + edge / scale[i % 2] for i, edge in enumerate((x1, y1, x2, y2))]
    box = [min(max(x, 0), view.size[i % 2]) for i, x in enumerate(box)]
    detail = high_pass(image, (x2 - x1, y2 - y1), box)
    mask[y1:y2, x1:x2] = detail > np.median(detail)
    return mask


def high_pass(image, size, box=None):
    """Strength of the fine detail, [height, width]: the image less its 3x3 Gaussian blur, median of 7x7."""
    x = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box), np.float64) / 255
    weights = np.exp(-0.5 * (np.array([-1, 0, 1]) / 0.8) ** 2)
    weights /= weights.sum()
    around, low, (w, h) = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="reflect"), np.zeros_like(x), size
    for i in range(3):
        for j in range(3):
            low += weights[i] * weights[j] * around[i : i + h, j : j + w]
    strength = np.pad(np.sqrt(((x - low) ** 2).sum(axis=-1)), 3, mode="symmetric")
    return np.array([[np.median(strength[i : i + 7, j : j + 7]) for j in range(w)] for i in range(h)])


def without_padding(heat, view):
    """The cells of a map that see any of the image, and the rectangle (origin, extent) that they cover."""
    (c1, c2), (r1, r2) = view.seen()
    (x, y), (bx, by) = view.origin, view.cell
    return heat[r1:r2, c1:c2], (x + c1 * bx, y + r1 * by), ((c2 - c1) * bx, (r2 - r1) * by)


def window(heat, origin, extent, size, base, *, ratios=RATIOS, neighbours=4, area_norm=True):
    """The square crop that stands out most from its neighbours, and by which relative margin it was chosen.

    The map covers a rectangle of the image's plane (origin, extent in pixels); `base` is the crop's side at ratio 1.
    """
    (h, w), (width, height) = heat.shape, size
    bx, by = extent[0] / w, extent[1] / h
    steps = [(-1, 0), (1, 0), (0, -1), (0, 1)]
    steps += [(-1, -1), (-1, 1), (1, -1), (1, 1)] if neighbours == 8 else []
    found = {}
    for ratio in ratios:
        nx, ny = max(1, min(int(base * ratio / bx), w)), max(1, min(int(base * ratio / by), h))
        if nx == w and ny == h:
            if ratio == 1:
                return (0, 0, width, height), math.inf
            continue
        sums = {}
        for x in range(w - nx + 1):
            for y in range(h - ny + 1):
                sums[x, y] = float(heat[y : y + ny, x : x + nx].astype(np.float64).sum())
        px, py = max(sums, key=sums.get)  # the first of equals: x outer, y inner
        near = [sums[px + i, py + j] for i, j in steps if (px + i, py + j) in sums]
        score = (sums[px, py] - np.mean(near)) / (nx * ny if area_norm else 1)
        if (nx, ny) not in found:  # a larger ratio with the same window has the same score, and the first wins
            found[nx, ny] = score, ratio, px * bx + bx * nx / 2, py * by + by * ny / 2, margin(sums.values())
    _, ratio, cx, cy, lead = max(found.values(), key=lambda one: one[0])
    cx, cy, half = origin[0] + cx, origin[1] + cy, base * ratio // 2
    if any(0 < abs(x - round(x)) < 1e-9 for x in (cx, cy)):
        lead = 0  # another order of floating-point operations may give the next integer
    cx = min(max(int(cx), half), width - half)
    cy = min(max(int(cy), half), height - half)
    box = (max(0, cx - half), max(0, cy - half), min(width, cx + half), min(height, cy + half))
    return box, min(lead, margin(one[0] for one in found.values()))


def margin(scores):
    """How far the best score lies above the second, relative to it."""
    *_, second, best = -math.inf, *sorted(scores)
    return (best - second) / max(abs(best), 1e-30)
