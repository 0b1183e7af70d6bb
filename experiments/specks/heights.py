"""Reading accuracy against the height of the character at the encoder, as a curve.

Small scenes are shown in square crops around the target, from a close one to the whole scene, so one and the same
question is asked at every height. Whole scenes of large plates (crowded, whole) are shown as they are: where they lie
below the curve, it is not the size of the character that is in the way. Needs matplotlib (extra: viz).

Examples:
  python experiments/specks/heights.py --out experiments/specks/heights.png
  python experiments/specks/heights.py --model work/specks-llava --count 200 --out heights.png --json heights.json
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from evaluate import ask, gather

import jaxvqa
from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.engine import Engine
from jaxvqa.images import crop
from jaxvqa.methods.controls import square_around
from jaxvqa.requests import Request, Sample
from jaxvqa.specks import CHARACTERS, SIZE
from jaxvqa.specks.evaluation import right
from jaxvqa.specks.scenes import LAYOUTS
from jaxvqa.specks.strata import SPLITS, WHOLE, samples

SIDES = (112, 160, 224, 288, 352, 448, 576, 720, SIZE)
"""Sides of the crops of small scenes, in pixels."""
EDGES = np.geomspace(1.8, 24, 15)
"""Of the classes of height, in encoder pixels."""
LEAST = 20
"""Answers that a class needs to be drawn."""


def crops(sample: Sample) -> dict[str, Request]:
    """The question about the target in crops of every side."""
    views = {side: crop(sample.image, square_around(sample.box, side, sample.image.size)) for side in SIDES}
    return {str(side): ask((view,), sample.question) for side, view in views.items()}


def whole(sample: Sample) -> dict[str, Request]:
    return {str(SIZE): ask(sample.images, sample.question)}


def height(sample: Sample, kind: str) -> int:
    """Of the target's character, in pixels of the scene."""
    layout = LAYOUTS[kind]
    return round(np.interp(sample.box[2] - sample.box[0], layout.side, layout.character))


def curve(engine: Engine, kind: str, chosen, requests) -> np.ndarray:
    """By class of height: mean height in encoder pixels, accuracy, its 95 % interval (Agresti-Coull), count: [n, 5]."""
    encoder, results = engine.default.config.vision.image_size, gather(engine, chosen, requests)
    points = np.array(
        [
            (height(sample, kind) * encoder / int(side), right(reply, sample))
            for sample, replies in zip(chosen, results, strict=True)
            for side, reply in replies.items()
        ]
    )
    rows = []
    for number in range(len(EDGES) - 1):
        mine = points[np.digitize(points[:, 0], EDGES) - 1 == number]
        if len(mine) >= LEAST:
            middle = (mine[:, 1].sum() + 2) / (len(mine) + 4)
            spread = 1.96 * np.sqrt(middle * (1 - middle) / (len(mine) + 4))
            rows.append((*mine.mean(0), max(0, middle - spread), min(1, middle + spread), len(mine)))
    return np.array(rows).reshape(-1, 5)


def draw(curves: dict[str, np.ndarray], out: Path) -> None:
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in curves.items():
        (line,) = panel.plot(points[:, 0], points[:, 1], marker="o", markersize=4, label=name)
        panel.fill_between(points[:, 0], points[:, 2], points[:, 3], color=line.get_color(), alpha=0.15, linewidth=0)
    panel.axhline(1 / len(CHARACTERS), color="gray", linewidth=0.8, linestyle=":", label="chance")
    panel.set(xscale="log", ylim=(0, 1), xlabel="height of the character at the encoder, pixels", ylabel="accuracy")
    ticks = (2, 3, 4, 6, 8, 12, 16)
    panel.set_xticks(ticks, labels=map(str, ticks))
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SPECKS_LLAVA), help="folder; default: the bundled model")
    parser.add_argument("--count", type=int, default=200, help="test questions per kind of scene; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--json", type=Path, help="also write the points here")
    args = parser.parse_args()
    most = SPLITS["test"][1]
    if not 1 <= args.count <= most:
        parser.error(f"--count {args.count}: expected 1 to {most}")
    engine = Engine(jaxvqa.load(args.model), batch_size=16)
    large = samples("whole", count=min(most, len(WHOLE) * args.count))[WHOLE.index("read") :: len(WHOLE)]
    curves = {
        "small scenes, crops of the target": curve(engine, "small", samples("small", count=args.count), crops),
        "crowded scenes, whole": curve(engine, "crowded", samples("crowded", count=args.count), whole),
        "few large plates, whole": curve(engine, "whole", large, whole),
    }
    for name, points in curves.items():
        for at, accuracy, low, high, count in points.tolist():
            print(f"{name:36s} {at:5.1f} px {accuracy:6.3f} [{low:.3f}, {high:.3f}]  {count:.0f} answers")
    draw(curves, args.out)
    if args.json:
        args.json.write_text(json.dumps({name: points.tolist() for name, points in curves.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
