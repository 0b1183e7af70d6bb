"""ViCrop beside its controls on held-out Specks: python experiments/specks/vicrop.py --out vicrop.json

On reading questions (a character that is too small in the whole scene): accuracy, coverage (share of questions whose
crop holds at least half of the plate) with the crop's share of the image, logical passes, analytic FLOPs per question,
latency of one question at batch 1, and throughput in batches, compilation excluded from both. Prints a Markdown table.
The random crop's passes and times include the search whose size it takes. `--layers` compares ViCrop's layers instead,
on development seeds (--seed 2) only.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax

import jaxvqa
from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.engine import Engine
from jaxvqa.methods.controls import RandomCrop, TruthCrop
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import Vicrop
from jaxvqa.requests import Sample
from jaxvqa.specks import SIZE
from jaxvqa.specks.evaluation import covers, reading_samples, right

SEED = 3  # of the test scenes; training and development have their own
COLUMNS = ("accuracy", "coverage", "crop's share", "passes", "GFLOPs", "latency, one by one", "questions/s, in batches")
TIMED = 16  # questions whose latency is measured, one at a time


def share(box: Sequence[float]) -> float:
    """The crop's share of the scene."""
    return (box[2] - box[0]) * (box[3] - box[1]) / SIZE**2


def measure(vlm, method, questions: list[Sample], batch_size: int) -> dict:
    """One row of the table."""
    list(Engine(vlm, batch_size=batch_size).run(questions, method))  # compiles
    engine = Engine(vlm, batch_size=batch_size)
    start = time.perf_counter()
    answers = list(engine.run(questions, method))
    seconds = time.perf_counter() - start
    for answer in answers:
        if answer.error is not None:
            raise answer.error

    list(Engine(vlm, batch_size=1).run(questions[:TIMED], method))  # compiles
    latencies = [next(Engine(vlm, batch_size=1).run([q], method)).seconds for q in questions[:TIMED]]
    crops = [
        (answer.boxes[0].tolist(), q.box) for answer, q in zip(answers, questions, strict=True) if len(answer.boxes)
    ]
    return {
        "method": answers[0].method,
        "options": answers[0].record()["options"],
        "right": sum(right(answer, q) for answer, q in zip(answers, questions, strict=True)),
        "questions": len(questions),
        "coverage": statistics.fmean(covers(*pair) for pair in crops) if crops else None,
        "crop_share": statistics.fmean(share(box) for box, _ in crops) if crops else None,
        "passes": statistics.fmean(answer.forward_passes.total for answer in answers),
        "flops": statistics.fmean(answer.cost.flops for answer in answers),
        "latency": statistics.median(latencies),
        "throughput": len(questions) / seconds,
        "batch_size": batch_size,
        "physical": {
            "rows": dict(engine.stats.rows),
            "padding": dict(engine.stats.padding),
            "flops": engine.stats.flops,
        },
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [f"| method | {' | '.join(COLUMNS)} |", f"|---|{'--:|' * len(COLUMNS)}"]
    for row in rows:
        percent = ["" if row[key] is None else f"{row[key]:.1%}" for key in ("coverage", "crop_share")]
        accuracy = f"{row['right'] / row['questions']:.1%}"
        times = f"{1000 * row['latency']:.0f} ms | {row['throughput']:.1f}"
        figures = f"{row['passes']:g} | {row['flops'] / 1e9:.2f} | {times}"
        lines.append(f"| {row['method']} | {accuracy} | {' | '.join(percent)} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(SPECKS_LLAVA))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=SEED, help="of the scenes; %(default)s is the test set")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--layers", action="store_true", help="ViCrop at every layer, to choose the preset")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()

    vlm, questions = jaxvqa.load(args.model), reading_samples(args.seed, args.questions)
    methods = [Vanilla(template=Vicrop.template, max_new_tokens=20), RandomCrop(), Vicrop(), TruthCrop()]
    if args.layers:
        methods = [Vicrop(layer=layer) for layer in range(vlm.config.decoder.num_layers)]
    rows = []
    for method in methods:
        rows.append(measure(vlm, method, questions, args.batch_size))
        print(f"{table(rows[-1:]).splitlines()[-1]}  {rows[-1]['options'].get('layer', '')}", flush=True)
    print(f"\n{table(rows)}")
    if args.out:
        device = jax.devices()[0].device_kind
        result = {"model": vlm.name, "seed": args.seed, "device": device, "jax": jax.__version__, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
