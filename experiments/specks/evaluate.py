"""What a model can do in the world of Specks, stratum by stratum, beside what is asked of the bundled one.

Everything goes through the library's own path: PIL image, HF processor, prompt, engine, greedy answer. Accuracies of
what a method is measured against (whole image, crops, no image); how often a box asked for in words is the plate's; how
often maps peak at the target. Layers are chosen on development seeds, figures are of test seeds.

Examples:
  python experiments/specks/evaluate.py
  python experiments/specks/evaluate.py --model work/specks-llava --count 100 --strata small crowded
  python experiments/specks/evaluate.py --count 1000 --json figures.json
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from math import inf
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxvqa
from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.engine import Engine
from jaxvqa.geometry import covers
from jaxvqa.images import crop
from jaxvqa.methods.controls import side_around, square_around
from jaxvqa.prompts import GENERAL_QUESTION, render
from jaxvqa.requests import Answer, Generate, Read, Reading, Request, Row, Sample
from jaxvqa.specks import SIZE
from jaxvqa.specks.evaluation import difference, iou, map_quality, right
from jaxvqa.specks.questions import BOX, GROUND, YES_NO
from jaxvqa.specks.strata import SPLITS, STRATA, WHOLE, samples
from jaxvqa.taps import ReadSpec
from jaxvqa.transforms import relative_attention
from jaxvqa.transforms.value_similarity import relevance, value_similarity

CROP = 160
"""Side of a crop in pixels, where what it must hold is not larger."""
NEW_TOKENS, BOX_TOKENS = 8, 32


class Line(NamedTuple):
    """A figure, the range in which it is asked to lie, and its 95 % interval where it is a difference."""

    name: str
    value: float
    low: float = -inf
    high: float = inf
    interval: tuple[float, float] | None = None


# ---- asking ----------------------------------------------------------------------------------------------------------


def gather(engine: Engine, chosen: Sequence[Sample], requests: Callable[[Sample], dict[str, Request]]) -> list[dict]:
    """For each sample the results of its requests, by their names."""
    results = {}

    def method(sample):
        asked = requests(sample)
        results[sample.id] = dict(zip(asked, (yield list(asked.values())), strict=True))
        return Answer("")

    for answer in engine.run(chosen, method):
        if answer.error is not None:
            raise answer.error
    return [results[sample.id] for sample in chosen]


def ask(images: tuple, question: str, max_new_tokens: int = NEW_TOKENS, ending: str = "short") -> Generate:
    """A question in the prompts of the methods: two images as ViCrop's, others as LLaVA's."""
    template = "vicrop_hf" if len(images) == 2 else "vicuna_v1"
    prompt = render(template, question, num_images=len(images), ending=ending)
    return Generate(images, prompt, max_new_tokens=max_new_tokens)


def around(box: tuple[float, ...]) -> tuple[float, ...]:
    """The square that a crop of a box shows."""
    return square_around(box, side_around(box, CROP), (SIZE, SIZE))


def reading(sample: Sample) -> dict[str, Request]:
    """A question in every form: one image, or the image and a crop of it."""
    rng = np.random.default_rng([int(part) for part in sample.id.split("/")[1:]])
    x, y = rng.integers(0, SIZE - CROP + 1, 2).tolist()
    rivals = [box for box in map(around, sample.rivals) if not covers(box, sample.box)]
    crops = {
        "ground-truth crop": around(sample.box),
        "random crop": (x, y, x + CROP, y + CROP),
        "rival's crop": rivals[int(rng.integers(len(rivals)))],
    }
    pictures = {name: crop(sample.image, box) for name, box in crops.items()}
    both = {f"image + {name}": ask((sample.image, picture), sample.question) for name, picture in pictures.items()}
    alone = ask((pictures["ground-truth crop"],), sample.question)
    return {**whole(sample), "no image": ask((), sample.question), "ground-truth crop alone": alone, **both}


def whole(sample: Sample) -> dict[str, Request]:
    return {"whole image": ask(sample.images, sample.question)}


def whole_and_crop(sample: Sample) -> dict[str, Request]:
    """The crop holds all targets."""
    picture = crop(sample.image, around(sample.box))
    return {
        **whole(sample),
        "ground-truth crop alone": ask((picture,), sample.question),
        "image + ground-truth crop": ask((sample.image, picture), sample.question),
    }


def presence(sample: Sample) -> dict[str, Request]:
    return {"whole image": ask(sample.images, f"{sample.question} {YES_NO}", ending="open")}


def boxes(sample: Sample) -> dict[str, Request]:
    """The target's box, asked for in the model's own form, and in CoF's."""
    return {
        "where": ask(sample.images, f"Where is the {name_in(sample.question)}?\n{BOX}", BOX_TOKENS, "open"),
        "grounding": ask(sample.images, f"{sample.question}\n{GROUND}", BOX_TOKENS, "open"),
    }


def name_in(question: str) -> str:
    """The plate that a reading question asks about."""
    return question.removeprefix("What character is on the ").removesuffix("?")


# ---- accuracies ------------------------------------------------------------------------------------------------------


def hits(chosen: Sequence[Sample], results: list[dict]) -> dict[str, np.ndarray]:
    """By form, which answers are right."""
    marks = [{form: right(reply, s) for form, reply in found.items()} for s, found in zip(chosen, results, strict=True)]
    return {form: np.array([mark[form] for mark in marks]) for form in results[0]}


def accuracies(stratum: str, found: dict[str, np.ndarray], asked: dict[str, tuple[float, float]]) -> list[Line]:
    """A line for each form, with the range asked of it, and for what it gives or takes beside the whole image."""
    lines = [Line(f"{stratum}: {form}", marks.mean(), *asked.get(form, ())) for form, marks in found.items()]
    for form, marks in found.items():
        if form.startswith("image + "):
            change = difference(marks, found["whole image"])
            lines.append(Line(f"{stratum}: {form}, less whole image", change.value, interval=change[1:]))
    return lines


def box_lines(stratum: str, chosen: Sequence[Sample], results: list[dict], asked: dict) -> list[Line]:
    lines = []
    for form in results[0]:
        pairs = zip(results, chosen, strict=True)
        overlaps = np.array([iou(parse(found[form].text), s.box) for found, s in pairs])
        lines.append(Line(f"{stratum}: box ({form}), IoU >= 0.3", np.mean(overlaps >= 0.3), *asked.get(form, ())))
        lines.append(Line(f"{stratum}: box ({form}), mean IoU", overlaps.mean()))
    return lines


def parse(text: str) -> tuple[float, ...]:
    """The first box in a text, fractions of the square scene, in pixels; an empty one where there is none."""
    numbers = re.findall(r"\d*\.\d+", text)[:4]
    return tuple(SIZE * float(n) for n in numbers) if len(numbers) == 4 else (0.0,) * 4


# ---- maps ------------------------------------------------------------------------------------------------------------


def attention(row: Row) -> jax.Array:
    """Attention of the last prompt token to the image, by layer: [L, h, w]."""
    return row.on_image(row.readouts.rows[:, 0])


def similarity(row: Row) -> jax.Array:
    """FOCUS's relevance map of the wanted rows, for every range of layers (see `ranges`): [ranges, h, w]."""
    values, valid = row.readouts.values, jnp.arange(row.readouts.values.shape[1]) < row.length
    layers = jax.vmap(lambda v: row.on_image(value_similarity(v[None], row.rows, valid)))(values)
    return jnp.stack([relevance(layers[a:b].sum(axis=0), row.wanted) for a, b in ranges(len(values))])


def ranges(layers: int) -> list[tuple[int, int]]:
    """All (start, stop)."""
    return list(combinations(range(layers + 1), 2))


def looking(engine: Engine) -> Callable[[Sample], dict[str, Request]]:
    """Requests for the maps of the question and of another one about the same scene."""
    layers = tuple(range(engine.default.config.decoder.num_layers))
    rows, values = (ReadSpec(layers, frozenset({what})) for what in ("rows", "values"))

    def requests(sample):
        found = {}
        for whose, question in (("own", sample.question), ("other", sample.other), ("general", GENERAL_QUESTION)):
            prompt = render("vicrop_hf", question, ending="short")
            found[whose] = Read(sample.images, prompt, rows, reduce=attention)
        for whose, question in (("own name", sample.question), ("other name", sample.other)):
            name = name_in(question)
            prompt = render("vicuna_v1", f"Is there a {name} in the image? {YES_NO}")
            found[whose] = Read(sample.images, prompt, values, rows=name, reduce=similarity)
        return found

    return requests


def on_grid(reading: Reading) -> np.ndarray:
    """A reading's maps on the image's own grid."""
    return reading.geometries[0].on_grid(np.asarray(reading.value))


def maps_of(results: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """By method, the maps of the question and of another one: [choices, samples, h, w]."""
    stacked = {name: np.stack([on_grid(found[name]) for found in results], axis=1) for name in results[0]}
    relative = {whose: np.asarray(relative_attention(stacked[whose], stacked["general"])) for whose in ("own", "other")}
    return {
        "relative attention": relative,
        "value similarity": {whose: stacked[f"{whose} name"] for whose in ("own", "other")},
    }


def map_lines(engine: Engine, count: int) -> tuple[list[Line], dict[str, list]]:
    """How often maps peak at the target, by layer; the layers being chosen on development scenes."""
    found, tables = {}, {}
    for split in SPLITS:
        chosen = samples("small", split, min(count, SPLITS[split][1]))
        maps = maps_of(gather(engine, chosen, looking(engine)))
        found[split] = {
            (method, whose): [map_quality(m, chosen, (SIZE, SIZE)) for m in by_choice]
            for method, both in maps.items()
            for whose, by_choice in both.items()
        }
    lines, layers = [], engine.default.config.decoder.num_layers
    for method, low in (("relative attention", 0.6), ("value similarity", 0.4)):
        dev, test, other = found["dev"][method, "own"], found["test"][method, "own"], found["test"][method, "other"]
        every = [(n, n + 1) for n in range(layers)] if method == "relative attention" else ranges(layers)
        best = max(range(len(dev)), key=lambda n: dev[n].peak)
        title = f"small: {method}, {layer_text(*every[best])}"
        lines += [
            Line(f"{title}: peak at target", test[best].peak, low),
            Line(f"{title}: area chance", test[best].chance),
            Line(f"{title}: peak at a rival", test[best].rival),
            Line(f"{title}: peak of another question's map at target", other[best].peak),
            Line(f"{title}: mass in target", test[best].mass),
            Line(f"{title}: area of target", test[best].area),
        ]
        single = [n for n, (a, b) in enumerate(every) if b - a == 1]
        tables[method] = [(layer_text(*every[n]), dev[n].peak, test[n], other[n].peak) for n in single]
    return lines, tables


def layer_text(start: int, stop: int) -> str:
    return f"layer {start}" if stop == start + 1 else f"layers {start}-{stop - 1}"


# ---- the table -------------------------------------------------------------------------------------------------------


def evaluate(engine: Engine, strata: Sequence[str], count: int) -> tuple[list[Line], dict[str, list]]:
    """All lines, and the tables of maps by layer."""
    lines, tables, least = [], {}, (0.85,)

    def run(stratum, requests):
        chosen = samples(stratum, count=count)
        start = time.perf_counter()
        results = gather(engine, chosen, requests)
        print(f"{stratum}: {count} questions, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return chosen, results

    if "presence" in strata:
        lines += accuracies("presence", hits(*run("presence", presence)), {"whole image": (0.9,)})
    if "small" in strata:
        found = hits(*run("small", reading))
        near = (found["whole image"].mean() - 0.05, found["whole image"].mean() + 0.05)
        asked = {"whole image": (-inf, 0.3), "no image": (-inf, 0.13), "image + random crop": near}
        asked |= {"ground-truth crop alone": least, "image + ground-truth crop": least}
        lines += accuracies("small", found, asked)
    if "crowded" in strata:
        asked = {"whole image": (0.5, 0.75), "ground-truth crop alone": least, "image + ground-truth crop": least}
        lines += accuracies("crowded", hits(*run("crowded", whole_and_crop)), asked)
    for stratum in ("near", "far"):
        if stratum in strata:
            lines += accuracies(stratum, hits(*run(stratum, whole_and_crop)), {})
    if "whole" in strata:
        found = hits(*run("whole", whole_and_crop))
        lines += accuracies("whole", found, {"whole image": least})
        for number, kind in enumerate(WHOLE):
            of_kind = {form: marks[number :: len(WHOLE)] for form, marks in found.items()}
            lines += [Line(f"whole, {kind}: {form}", marks.mean()) for form, marks in of_kind.items() if len(marks)]
    for stratum, asked in (("crowded", {"where": (0.7,), "grounding": (0.7,)}), ("small", {})):
        if stratum in strata:
            lines += box_lines(stratum, *run(stratum, boxes), asked)
    if "small" in strata:
        more, tables = map_lines(engine, count)
        lines += more
    return lines, tables


def text_of(line: Line) -> str:
    bounds = {(True, True): "", (False, True): f">= {line.low:.2f}", (True, False): f"<= {line.high:.2f}"}
    asked = bounds.get((line.low == -inf, line.high == inf), f"{line.low:.2f} to {line.high:.2f}")
    verdict = ("met" if line.low <= line.value <= line.high else "NOT MET") if asked else ""
    interval = "" if line.interval is None else "[{:+.3f}, {:+.3f}]".format(*line.interval)
    return f"{line.name:72s} {line.value:7.3f} {interval:18s} {asked:13s} {verdict}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SPECKS_LLAVA), help="folder; default: the bundled model")
    parser.add_argument("--count", type=int, default=500, help="test questions per stratum; default: %(default)s")
    parser.add_argument("--strata", nargs="+", default=list(STRATA), choices=STRATA, help="default: all")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if not 1 <= args.count <= SPLITS["test"][1]:
        parser.error(f"--count {args.count}: expected 1 to {SPLITS['test'][1]}")
    engine = Engine(jaxvqa.load(args.model), batch_size=args.batch_size)
    lines, tables = evaluate(engine, args.strata, args.count)
    print(f"{'measure':72s} {'found':>7s} {'95 % interval':18s} asked for")
    print("\n".join(map(text_of, lines)))
    for method, rows in tables.items():
        print(f"\n{method}: peak on development scenes; on test scenes peak, chance, rival, another question's, mass")
        for layer, dev, quality, other in rows:
            figures = (dev, quality.peak, quality.chance, quality.rival, other, quality.mass)
            print(f"  {layer:10s}" + "".join(f"{figure:8.3f}" for figure in figures))
    if args.json:
        record = {line.name: line.value for line in lines}
        by_layer = {
            method: [
                {"layers": layer, "dev_peak": dev, "other_peak": other, **q._asdict()} for layer, dev, q, other in t
            ]
            for method, t in tables.items()
        }
        args.json.write_text(json.dumps({"count": args.count, "figures": record, "maps": by_layer}, indent=1) + "\n")


if __name__ == "__main__":
    main()
