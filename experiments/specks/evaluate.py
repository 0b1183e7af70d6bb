"""What a Specks model can do: python experiments/specks/evaluate.py [--model FOLDER] [--scenes 500]

Prints accuracies over held-out scenes through the library's own path (PIL image, HF processor, prompt, greedy answer):
presence, reading (ground-truth crop, whole scene, blind), colour, shape, relation, count, boxes; and how often the peak
of relative attention lies in or next to the target, by layer, the layer being chosen on other scenes.
"""

import argparse
import json
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

import jaxvqa
from jaxvqa.prompts import GENERAL_QUESTION, render
from jaxvqa.specks import Scene, crop_around, scene
from jaxvqa.specks.questions import BOX, SHORT, Question, has_rivals, questions, read_question
from jaxvqa.taps import ReadSpec
from jaxvqa.vlm import VLM, Encoded, collate

TEST_SEED, DEV_SEED, BATCH = 3, 2, 25
CROP = 160
"""Side of a ground-truth crop: the plate and a margin."""


class Runner:
    """Encodes prompts about views of scenes, each view preprocessed once, and runs them in batches."""

    def __init__(self, vlm: VLM):
        self.vlm = vlm
        self.pixels = lru_cache(4096)(lambda s, box: vlm.preprocess(s.picture.crop(box))[0])

    def encode(self, s: Scene, boxes, template: str, text: str, ending: str = "open") -> Encoded:
        tokens = self.vlm.tokenise(render(template, text, num_images=len(boxes), ending=ending), len(boxes))
        side = self.vlm.config.vision.image_size
        pixels = np.stack([self.pixels(s, box) for box in boxes]) if boxes else np.zeros((0, side, side, 3), np.float32)
        return Encoded(tokens, pixels, ())

    def batches(self, rows: list[Encoded]):
        length = -(-max(len(row.tokens.ids) for row in rows) // 16) * 16
        for i in range(0, len(rows), BATCH):
            part = rows[i : i + BATCH]
            full = part + [part[-1]] * (BATCH - len(part))
            yield part, collate(full, length=length)

    def answers(self, rows: list[Encoded], max_new_tokens: int = 4) -> list[str]:
        texts = []
        for part, inputs in self.batches(rows):
            out = self.vlm.prefill(inputs, max_new_tokens=max_new_tokens)
            texts += self.vlm.decode(out, max_new_tokens=max_new_tokens)[: len(part)]
        return texts

    def attention(self, rows: list[Encoded]) -> np.ndarray:
        """Attention of the last prompt token to the image, mean over heads, by layer: [L, rows, P]."""
        layers = tuple(range(self.vlm.config.decoder.num_layers))
        spec, maps = ReadSpec(layers=layers, read=frozenset({"rows"})), []
        for part, inputs in self.batches(rows):
            read = np.asarray(self.vlm.prefill(inputs, spec=spec, max_new_tokens=1).readouts.rows)[:, :, 0]
            for n, row in enumerate(part):
                start, length = row.tokens.image_spans[0]
                maps.append(read[:, n, start : start + length])
        return np.stack(maps, 1)


def targets(seed: int, count: int) -> list[tuple[Scene, Question]]:
    """One reading question per scene, about a plate with a rival of its colour and one of its shape."""
    made = []
    for index in range(count):
        s = scene(seed, index)
        rng = np.random.default_rng((seed, index, 3))
        plates = [p for p in s.plates if has_rivals(p, s.plates)]
        made.append((s, read_question(plates[int(rng.integers(len(plates)))])))
    return made


def reading(run: Runner, cases) -> dict[str, float]:
    """Reading accuracy by what the model is shown. "miss": the crop shows another plate."""

    def accuracy(boxes_of, template):
        rows = [run.encode(s, boxes_of(s, q.targets[0]), template, q.text, "short") for s, q in cases]
        return share(t == q.answer for t, (_, q) in zip(run.answers(rows), cases, strict=True))

    def near(s, p):
        return crop_around(p, CROP)

    return {
        "read: scene + ground-truth crop": accuracy(lambda s, p: [s.box, near(s, p)], "vicrop_hf"),
        "read: ground-truth crop alone": accuracy(lambda s, p: [near(s, p)], "vicuna_v1"),
        "read: whole scene": accuracy(lambda s, p: [s.box], "vicuna_v1"),
        "read: whole scene (vicrop_hf)": accuracy(lambda s, p: [s.box], "vicrop_hf"),
        "read: scene + another plate's crop": accuracy(
            lambda s, p: [s.box, near(s, next(o for o in s.plates if o is not p))], "vicrop_hf"
        ),
        "read: blind": accuracy(lambda s, p: [], "vicuna_v1"),
    }


def asked(run: Runner, cases) -> dict[str, float]:
    """Accuracy on whole scenes of the other kinds, and blind."""
    groups: dict[str, list[tuple[Scene, Question]]] = defaultdict(list)
    for s, _ in cases:
        kinds = ("color", "shape", "presence", "relation", "count", "where")
        for q in questions(s, np.random.default_rng((s.seed, s.index, 4)), None, kinds):
            groups["where (grounding prompt)" if q.kind == "where" and q.ending != BOX else q.kind].append((s, q))
    figures = {}
    for kind, group in sorted(groups.items()):
        for name, boxes in ((kind, True), (f"{kind}: blind", False)):
            if kind.startswith("where") and not boxes:
                continue
            rows = [_ask(run, s, q, [s.box] if boxes else []) for s, q in group]
            texts = run.answers(rows, 24 if kind.startswith("where") else 4)
            if kind.startswith("where"):
                overlaps = [iou(parse(t), q.box) for t, (_, q) in zip(texts, group, strict=True)]
                figures |= {
                    f"{name}: mean IoU": float(np.mean(overlaps)),
                    f"{name}: IoU > 0.5": share(o > 0.5 for o in overlaps),
                }
            else:
                figures[name] = share(t == q.answer for t, (_, q) in zip(texts, group, strict=True))
    return figures


def _ask(run: Runner, s: Scene, q: Question, boxes) -> Encoded:
    if q.ending == SHORT:
        return run.encode(s, boxes, "vicuna_v1", q.text, "short")
    return run.encode(s, boxes, "vicuna_v1", f"{q.text}{' ' if q.kind == 'presence' else chr(10)}{q.ending}")


def peaks(run: Runner, cases) -> np.ndarray:
    """Share of cases, by layer, whose relative attention peaks in a cell of the target or next to one: [L]."""
    question, general = (
        run.attention([run.encode(s, [s.box], "vicrop_hf", text or q.text, "short") for s, q in cases])
        for text in (None, GENERAL_QUESTION)
    )
    grid = run.vlm.config.grid[0]
    best = (question / general).argmax(-1)
    row, col = best // grid, best % grid
    hits = np.zeros(best.shape, bool)
    for n, (s, q) in enumerate(cases):
        cell = (s.box[2] - s.box[0]) / grid
        x1, y1, x2, y2 = q.box
        inside_x = (col[:, n] >= x1 // cell - 1) & (col[:, n] <= (x2 - 1) // cell + 1)
        hits[:, n] = inside_x & (row[:, n] >= y1 // cell - 1) & (row[:, n] <= (y2 - 1) // cell + 1)
    return hits.mean(1)


def parse(text: str) -> tuple[float, ...] | None:
    """A box in fractions of the scene, as pixels; None if the text is none."""
    try:
        numbers = json.loads(text)
        return tuple(896 * float(n) for n in numbers) if len(numbers) == 4 else None
    except (ValueError, TypeError):
        return None


def iou(a, b) -> float:
    if a is None:
        return 0.0
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0, c[2] - c[0]) * max(0, c[3] - c[1]) for c in (a, b)]
    return shared / max(sum(areas) - shared, 1e-9)


def share(hits) -> float:
    return float(np.mean(list(hits)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(jaxvqa.__file__).parent / "assets" / "specks-llava"
    parser.add_argument("--model", default=default)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    run = Runner(jaxvqa.load(str(args.model)))
    cases = targets(TEST_SEED, args.scenes)
    figures = reading(run, cases)
    dev = peaks(run, targets(DEV_SEED, max(1, 2 * args.scenes // 5)))
    layer, test = int(dev.argmax()), peaks(run, cases)
    figures |= {f"relative attention, layer {n}": float(x) for n, x in enumerate(test)}
    figures |= {f"relative attention at layer {layer} (chosen on development scenes)": float(test[layer])}
    figures |= asked(run, cases)
    for name, value in figures.items():
        print(f"{name:60s} {value:.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
