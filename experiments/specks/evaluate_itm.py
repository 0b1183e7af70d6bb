"""What the image-text matcher can do: python experiments/specks/evaluate_itm.py --model FOLDER [--scenes 200]

Prints, over held-out scenes through the library's own path: how often a text about a plate that is there, and one whose
colour and shape are there on different plates, is told right; and how often the peak of the gradient map of a reading
question lies in or next to the target, by text layer, beside chance (area) and the map of another question.
"""

import argparse
import json

import numpy as np

from jaxvqa.matcher import MAX_TOKENS, Matcher, Pair, collate, load_matcher
from jaxvqa.specks import COLORS, SHAPES, Plate, Scene, scene
from jaxvqa.specks.questions import has_rivals, read_question

DEV_SEED, BATCH = 2, 25
READINGS = {
    "first token": ("sum", lambda maps, length: maps[0]),
    "tokens": ("grad", lambda maps, n: maps[1 : n - 1].mean(0)),
}
"""HiPerson's map and LAVIS's, which is zero in the last layer."""


def batches(pairs: list[Pair]):
    for i in range(0, len(pairs), BATCH):
        part = pairs[i : i + BATCH]
        yield len(part), collate(part + [part[-1]] * (BATCH - len(part)), length=MAX_TOKENS)


def says_match(matcher: Matcher, pairs: list[Pair]) -> np.ndarray:
    """Bool [len(pairs)]."""
    logits = [np.asarray(matcher.match_logits(batch))[:n] for n, batch in batches(pairs)]
    return np.concatenate(logits).argmax(-1) == 1


def conjunction(s: Scene, rng: np.random.Generator) -> str | None:
    """A colour and a shape that are in the scene, but not together."""
    there = {p.name for p in s.plates}
    colors, shapes = {p.color for p in s.plates}, {p.shape for p in s.plates}
    names = [f"{c} {h}" for c in COLORS for h in SHAPES if c in colors and h in shapes and f"{c} {h}" not in there]
    return names[int(rng.integers(len(names)))] if names else None


def matching(matcher: Matcher, count: int, seed: int, kind: str) -> dict[str, float]:
    """Accuracy on texts that match and on conjunctions that do not, over whole scenes of a kind."""
    yes, no = [], []
    for index in range(count):
        s, rng = scene(seed, index, kind), np.random.default_rng((seed, index, 4))
        pixels, place = matcher.preprocess(s.picture)
        name, other = s.plates[int(rng.integers(len(s.plates)))].name, conjunction(s, rng)
        form = ("Is there a {} in the image?", "the {}")[index % 2]
        yes.append(Pair(matcher.tokenise(form.format(name)), pixels, place))
        if other is not None:
            no.append(Pair(matcher.tokenise(form.format(other)), pixels, place))
    return {
        "match": round(float(says_match(matcher, yes).mean()), 4),
        "conjunction": round(float((~says_match(matcher, no)).mean()), 4),
    }


def peak_near(heat: np.ndarray, plate: Plate, cells: np.ndarray) -> bool:
    """Whether the centre of the largest cell lies in the plate's box, widened by one cell."""
    x1, y1, x2, y2 = cells[np.unravel_index(heat.argmax(), heat.shape)]
    width, height = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top, right, bottom = plate.box
    return left - width <= x <= right + width and top - height <= y <= bottom + height


def looking(matcher: Matcher, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Where the maps of reading questions peak, over whole small scenes; targets have two rivals of either kind."""
    pairs, others, targets, cells, chance = [], [], [], None, []
    for index in range(count):
        s, rng = scene(seed, index, "small"), np.random.default_rng((seed, index, 3))
        pixels, place = matcher.preprocess(s.picture)
        plates = [p for p in s.plates if has_rivals(p, s.plates)]
        target = plates[int(rng.integers(len(plates)))]
        rest = [p for p in s.plates if p is not target]
        other = rest[int(rng.integers(len(rest)))]
        for rows, plate in ((pairs, target), (others, other)):
            rows.append(Pair(matcher.tokenise(read_question(plate).text), pixels, place))
        targets.append(target)
        cells = place.cell_boxes()
        spots = np.eye(cells.shape[0] * cells.shape[1]).reshape(-1, *cells.shape[:2])
        chance.append(np.mean([peak_near(spot, target, cells) for spot in spots]))
    found = {"area": {"target": round(float(np.mean(chance)), 4)}}
    for layer in range(matcher.config.text.num_layers):
        for name, (relu, read) in READINGS.items():
            if name == "tokens" and layer == matcher.config.text.num_layers - 1:
                continue
            hits = []
            for rows in (pairs, others):
                maps = [np.asarray(matcher.gradcam(batch, layer, relu=relu))[:n] for n, batch in batches(rows)]
                heats = [read(m, len(row.ids)) for m, row in zip(np.concatenate(maps), rows, strict=True)]
                hits.append(np.mean([peak_near(h, t, cells) for h, t in zip(heats, targets, strict=True)]))
            found[f"layer {layer}, {name}"] = {
                "target": round(float(hits[0]), 4),
                "another question's": round(float(hits[1]), 4),
            }
    return found


def evaluate(matcher: Matcher, count: int, seed: int = DEV_SEED) -> dict[str, dict]:
    """All figures, over `count` scenes each."""
    right = {kind: matching(matcher, count, seed, kind) for kind in ("small", "crowded", "whole")}
    return {"matching": right, "peak of the gradient map": looking(matcher, count, seed)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=DEV_SEED)
    args = parser.parse_args()
    print(json.dumps(evaluate(load_matcher(args.model), args.scenes, args.seed), indent=2))


if __name__ == "__main__":
    main()
