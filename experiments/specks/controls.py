"""ViCrop beside its controls on held-out Specks: python experiments/specks/controls.py --stratum small --out small.json

Per method: accuracy; the difference from the first row on the questions that both could be asked, with its paired 95 %
interval; share of the gap from the random crop to the ground-truth crop that it closes; coverage (share of questions
whose crop holds at least half of every target) with the crop's share of the image; logical passes, analytic FLOPs per
question, latency of one question at batch 1, and throughput in batches, compilation and rendering excluded from both.
Prints a Markdown table. A control that needs a truth which a question lacks (a rival, a box) is not asked that one.
The random crop's passes and times include the search whose size it takes. `--layers` compares ViCrop's layers instead,
on the development split only.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from math import isnan
from pathlib import Path

import jax
import numpy as np

import jaxvqa
from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.engine import Engine
from jaxvqa.errors import UserError
from jaxvqa.geometry import covers
from jaxvqa.methods.controls import Blind, MaskReweight, OtherMap, RandomCrop, RivalCrop, TruthCrop
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import Vicrop
from jaxvqa.requests import Sample
from jaxvqa.specks import SIZE
from jaxvqa.specks.evaluation import area_share, difference, gap_closed, right
from jaxvqa.specks.strata import SPLITS, STRATA, samples

PLAIN = Vanilla(template=Vicrop.template, max_new_tokens=Vicrop.max_new_tokens)
"""With ViCrop's prompt, so that all rows have the same."""
RANDOM, TRUTH = "random crop", "ground-truth crop"
METHODS = {
    "vanilla": PLAIN,
    "no image": Blind(PLAIN),
    RANDOM: RandomCrop(),
    "rival's crop": RivalCrop(),
    "another question's map": OtherMap(),
    "ViCrop": Vicrop(),
    TRUTH: TruthCrop(),
    "ground-truth crop alone": TruthCrop(images="crop", alone=PLAIN),
    "attention × 2: ground truth": MaskReweight(PLAIN, "truth"),
    "attention × 2: elsewhere": MaskReweight(PLAIN, "random"),
    "attention × 2: whole image": MaskReweight(PLAIN, "all"),
}
COLUMNS = (
    "questions", "accuracy", "difference", "gap closed", "coverage", "crop's share", "passes", "GFLOPs",
    "latency, one by one", "questions/s, in batches",
)  # fmt: skip
TIMED = 16  # questions whose latency is measured, one at a time


def measure(vlm, method: Callable, questions: list[Sample], batch_size: int) -> dict:
    """One row of the table; `right` has None for a question that lacks what the method needs."""
    list(Engine(vlm, batch_size=batch_size).run(questions, method))  # compiles
    engine = Engine(vlm, batch_size=batch_size)
    start = time.perf_counter()
    answers = list(engine.run(questions, method))
    seconds = time.perf_counter() - start
    asked = [(answer, q) for answer, q in zip(answers, questions, strict=True) if answer.error is None]
    for answer in answers:
        if answer.error is not None and not (asked and isinstance(answer.error, UserError)):
            raise answer.error

    timed = [q for _, q in asked[:TIMED]]
    list(Engine(vlm, batch_size=1).run(timed, method))  # compiles
    latencies = [next(Engine(vlm, batch_size=1).run([q], method)).seconds for q in timed]
    crops = [(answer.boxes[0], q.boxes) for answer, q in asked if len(answer.boxes) and q.boxes]
    return {
        "options": asked[0][0].record()["options"],
        "right": [None if a.error else right(a, q) for a, q in zip(answers, questions, strict=True)],
        "coverage": statistics.fmean(all(covers(box, b) for b in boxes) for box, boxes in crops) if crops else None,
        "crop_share": statistics.fmean(area_share([box], (SIZE, SIZE)) for box, _ in crops) if crops else None,
        "passes": statistics.fmean(answer.forward_passes.total for answer, _ in asked),
        "flops": statistics.fmean(answer.cost.flops for answer, _ in asked),
        "latency": statistics.median(latencies),
        "throughput": len(asked) / seconds,
        "batch_size": batch_size,
        "physical": {
            "rows": dict(engine.stats.rows),
            "padding": dict(engine.stats.padding),
            "flops": engine.stats.flops,
        },
    }


def shared(*rows: dict) -> list[np.ndarray]:
    """Which answers of each row are right, on the questions that all of them were asked."""
    asked = [answers for answers in zip(*(row["right"] for row in rows), strict=True) if None not in answers]
    return list(np.array(asked, bool).reshape(-1, len(rows)).T)


def line(name: str, rows: dict[str, dict]) -> str:
    """One row of the Markdown table; differences from the first of `rows`."""
    row, first = rows[name], next(iter(rows.values()))
    hits = [hit for hit in row["right"] if hit is not None]
    change, closed = "", ""
    if row is not first:
        mine, theirs = shared(row, first)
        found = difference(mine, theirs)
        change = f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    if {RANDOM, TRUTH} <= rows.keys() and name not in (RANDOM, TRUTH):
        share = gap_closed(*(float(x.mean()) for x in shared(row, rows[RANDOM], rows[TRUTH])))
        closed = "no gap" if isnan(share) else f"{share:.0%}"
    crop = ("" if row[key] is None else f"{row[key]:.1%}" for key in ("coverage", "crop_share"))
    cost = (
        f"{row['passes']:g}",
        f"{row['flops'] / 1e9:.2f}",
        f"{1000 * row['latency']:.0f} ms",
        f"{row['throughput']:.1f}",
    )
    cells = (name, str(len(hits)), f"{statistics.fmean(hits):.1%}", change, closed, *crop, *cost)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(SPECKS_LLAVA))
    parser.add_argument("--stratum", choices=STRATA, default="small")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--layers", action="store_true", help="ViCrop at every layer, to choose the preset")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()

    split = "dev" if args.layers else args.split
    vlm, questions = jaxvqa.load(args.model), list(samples(args.stratum, split, args.questions))
    methods = METHODS
    if args.layers:
        methods = {f"layer {layer}": Vicrop(layer=layer) for layer in range(vlm.config.decoder.num_layers)}
    rows = {}
    for name, method in methods.items():
        rows[name] = measure(vlm, method, questions, args.batch_size)
        print(line(name, rows), flush=True)
    print(f"\n| {' | '.join(('method', *COLUMNS))} |\n|---|{'--:|' * len(COLUMNS)}")
    print("\n".join(line(name, rows) for name in rows))
    if args.out:
        run = {"model": vlm.name, "stratum": args.stratum, "split": split, "jax": jax.__version__}
        args.out.write_text(json.dumps(run | {"device": jax.devices()[0].device_kind, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
