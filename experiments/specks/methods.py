"""Methods and their controls on held-out Specks, stratum by stratum.

Per method and stratum: accuracy with its 95 % interval (Wilson); the difference from the unmodified model on the
questions that both could be asked, with its paired 95 % interval; share of the gap from the random crop to the
ground-truth crop that it closes; coverage (share of questions whose boxes hold at least half of every target) with the
boxes' share of the image; logical passes of the model, analytic FLOPs per question, latency of one question at batch 1,
throughput in batches, and peak memory of the device, or of the process where the device keeps no record; each method
has its own process. Compilation and rendering are in none of the times. A control that needs a truth which a question
lacks (a rival, a box) is not asked that one.

What is measured is added to the JSON file when a method is through: run again, it goes on. Options were chosen with
`--choose`, which looks at development questions only.

Examples:
  python experiments/specks/methods.py --out work/methods.json
  python experiments/specks/methods.py --out work/methods.json --strata small --questions 50 --methods vanilla FOCUS
  python experiments/specks/methods.py --out work/methods.json --tables experiments/specks/methods.md --readme README.md
  python experiments/specks/methods.py --out work/next.json --model jaxvqa/assets/specks-llava-next --batch-size 4
  python experiments/specks/methods.py --choose --strata small crowded
"""

import argparse
import json
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import isnan
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxvqa
from jaxvqa.bundled import SPECKS_BLIP, SPECKS_LLAVA
from jaxvqa.engine import Engine
from jaxvqa.errors import UserError
from jaxvqa.geometry import covers
from jaxvqa.methods.cof import Cof
from jaxvqa.methods.controls import Blind, MaskReweight, OtherMap, RandomCrop, RivalCrop, TruthCrop, TruthMap
from jaxvqa.methods.focus import Focus
from jaxvqa.methods.hiperson import HiPerson
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import Vicrop
from jaxvqa.requests import Sample
from jaxvqa.specks import SIZE
from jaxvqa.specks.evaluation import area_share, difference, gap_closed, right, wilson
from jaxvqa.specks.strata import SPLITS, STRATA, samples

PLAIN = Vanilla(max_new_tokens=20)
SHOWN = HiPerson(max_new_tokens=96)
"""Its reply of three steps has at most 80 tokens here; the paper's 512 would only make every cache longer."""
ROWS = {
    "vanilla": PLAIN,
    "no image": Blind(PLAIN),
    "random crop": RandomCrop(),
    "rival's crop": RivalCrop(),
    "another question's map": OtherMap(),
    "ground-truth crop": TruthCrop(),
    "ground-truth crop alone": TruthCrop(images="crop", alone=PLAIN),
    "ViCrop": Vicrop(),
    "ViCrop, grad_att": Vicrop(maps="grad_att"),
    "ViCrop, pure_grad": Vicrop(maps="pure_grad"),
    "HiPerson": SHOWN,
    "HiPerson, attention only": replace(SHOWN, maps="rel"),
    "HiPerson, gradient only": replace(SHOWN, maps="grad"),
    "HiPerson, crop without steps": replace(SHOWN, prompt="vicrop"),
    "HiPerson, steps on a random crop": RandomCrop(SHOWN),
    "FOCUS": Focus(like=PLAIN),
    "FOCUS, names by rules": Focus(extraction="rules", like=PLAIN),
    "FOCUS, top region": Focus(n_steps=1, overrun=False, like=PLAIN),
    "FOCUS, keys without rope": Focus(feature="key_no_rope", like=PLAIN),
    "FOCUS, random map": Focus(feature="random", like=PLAIN),
    "FOCUS, ground-truth map": TruthMap(Focus(like=PLAIN)),
    "CoF": Cof(),
    "CoF, ground truth": MaskReweight(PLAIN, "truth"),
    "CoF, elsewhere": MaskReweight(PLAIN, "random"),
    "CoF, whole image": MaskReweight(PLAIN, "all"),
}
ABLATIONS = (
    "ViCrop, pure_grad", "HiPerson, attention only", "HiPerson, gradient only", "HiPerson, crop without steps",
    "HiPerson, steps on a random crop", "FOCUS, top region", "FOCUS, keys without rope", "FOCUS, random map",
)  # fmt: skip
"""Only asked about the first stratum, unless named."""
BASE, RANDOM, TRUTH = "vanilla", "random crop", "ground-truth crop"
COLUMNS = (
    "questions", "accuracy", "difference", "gap closed", "coverage", "share of image", "passes", "GFLOPs",
    "latency, one by one", "questions/s, in batches", "peak memory",
)  # fmt: skip
TIMED, SERVED = 16, 48  # questions whose latency is measured, one at a time; in batches


def candidates(layers: int) -> dict[str, dict[str, Any]]:
    """What `--choose` compares, by method."""
    lambdas = (1.5, 2.0, 3.0, 4.5, 8.0)
    return {
        "ViCrop": {f"layer {n}": Vicrop(layer=n) for n in range(layers)},
        "ViCrop, grad_att": {f"layer {n}": Vicrop(maps="grad_att", layer=n) for n in range(layers)},
        "HiPerson": {
            f"layer {n}, text layer {m}": replace(SHOWN, layer=n, itm_layer=m, prompt="vicrop")
            for n in range(layers)
            for m in (0, 1)
        },
        "FOCUS": {
            f"layers {a}-{b - 1}": Focus(layer_start=a, layer_end=b, like=PLAIN)
            for a, b in ((2, layers), (3, layers), (4, layers), (3, 5), (2, 4))
        },
        "CoF": {f"lambda {lam}": Cof(lam=lam) for lam in lambdas},
        "CoF, ground truth": {f"lambda {lam}": MaskReweight(PLAIN, "truth", lam) for lam in lambdas},
    }


@dataclass(frozen=True)
class Bench:
    """The models, and how many questions share a batch."""

    models: dict[str, Any]
    batch_size: int

    def engine(self, batch_size: int | None = None) -> Engine:
        return Engine(self.models, batch_size=batch_size or self.batch_size)

    def answers(self, method: Callable, questions: Sequence[Sample]) -> tuple[list, Engine]:
        """Answers; those to questions that lack what the method needs are errors. Any other error is raised."""
        engine = self.engine()
        answers = list(engine.run(questions, method))
        for answer in answers:
            if answer.error is not None and not isinstance(answer.error, UserError):
                raise answer.error
        if all(answer.error for answer in answers):
            raise answers[0].error
        return answers, engine

    def measure(self, method: Callable, questions: Sequence[Sample], timed: bool) -> dict:
        """What the tables show; `right` has None for a question that lacks what the method needs."""
        answers, engine = self.answers(method, questions)  # compiles, too
        asked = [(answer, q) for answer, q in zip(answers, questions, strict=True) if answer.error is None]
        found = [(answer.boxes, q.boxes) for answer, q in asked if len(answer.boxes) and q.boxes]
        held = [all(any(covers(box, b) for box in boxes) for b in targets) for boxes, targets in found]
        return {
            "options": asked[0][0].record()["options"],
            "right": [None if a.error else right(a, q) for a, q in zip(answers, questions, strict=True)],
            "coverage": statistics.fmean(held) if held else None,
            "share": statistics.fmean(area_share(boxes, (SIZE, SIZE)) for boxes, _ in found) if found else None,
            "passes": statistics.fmean(answer.forward_passes.total for answer, _ in asked),
            "flops": statistics.fmean(answer.cost.flops for answer, _ in asked),
            **(self.times(method, [q for _, q in asked[:SERVED]]) if timed else {}),
            "physical": {"rows": dict(engine.stats.rows), "flops": engine.stats.flops},
        }

    def times(self, method: Callable, questions: list[Sample]) -> dict:
        """Throughput and latency, once everything for batches is compiled, and the peak of memory until then."""
        for question in questions:
            question.image.load()
        start = time.perf_counter()
        list(self.engine().run(questions, method))
        throughput, peak = len(questions) / (time.perf_counter() - start), peak_memory()
        timed = questions[:TIMED]
        list(self.engine(1).run(timed, method))  # compiles
        latency = statistics.median(next(self.engine(1).run([q], method)).seconds for q in timed)
        return {"throughput": throughput, "latency": latency, "peak_memory": peak}


def peak_memory() -> int:
    """Bytes: of the first device, or of this process where the device keeps no record."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load(args: argparse.Namespace) -> Bench:
    models = {"llava": jaxvqa.load(args.model), "matcher": jaxvqa.load_matcher(args.matcher)}
    return Bench(models, args.batch_size)


def measure(name: str, strata: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """A method on some strata."""
    bench, rows = load(args), {}
    for stratum in strata:
        start = time.perf_counter()
        rows[stratum] = bench.measure(ROWS[name], samples(stratum, args.split, args.questions), not args.untimed)
        took = time.perf_counter() - start
        print(f"{stratum} {line(name, {name: rows[stratum]})} {took:.0f} s", flush=True)
    return rows


def choose(args: argparse.Namespace) -> None:
    """Accuracy of every candidate."""
    bench = load(args)
    for stratum in args.strata:
        questions = samples(stratum, "dev", args.questions)
        for name, options in candidates(bench.models["llava"].config.decoder.num_layers).items():
            for option, method in options.items() if name in (args.methods or ROWS) else ():
                answers, _ = bench.answers(method, questions)
                hits = [right(answer, q) for answer, q in zip(answers, questions, strict=True)]
                print(f"{stratum}: {name}, {option}: {statistics.fmean(hits):.1%}", flush=True)


# ---- tables ----------------------------------------------------------------------------------------------------------


def shared(*rows: dict) -> list[np.ndarray]:
    """Which answers of each row are right, on the questions that all of them were asked."""
    asked = [answers for answers in zip(*(row["right"] for row in rows), strict=True) if None not in answers]
    return list(np.array(asked, bool).reshape(-1, len(rows)).T)


def accuracy(row: dict) -> str:
    hits = [hit for hit in row["right"] if hit is not None]
    low, high = wilson(sum(hits), len(hits))
    return f"{100 * statistics.fmean(hits):.1f} ({100 * low:.0f}–{100 * high:.0f})"


def costs(row: dict) -> tuple[str, ...]:
    return (
        f"{row['passes']:.3g}",
        f"{row['flops'] / 1e9:.2f}",
        f"{1000 * row['latency']:.0f} ms" if "latency" in row else "",
        f"{row['throughput']:.1f}" if "throughput" in row else "",
        f"{row['peak_memory'] / 1e9:.2f} GB" if "peak_memory" in row else "",
    )


def line(name: str, rows: dict[str, dict]) -> str:
    """One row of a stratum's Markdown table; the difference is from the unmodified model."""
    row, change, closed = rows[name], "", ""
    if BASE in rows and name != BASE:
        found = difference(*shared(row, rows[BASE]))
        change = f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    if {RANDOM, TRUTH} <= rows.keys() and name not in (RANDOM, TRUTH):
        share = gap_closed(*(float(x.mean()) for x in shared(row, rows[RANDOM], rows[TRUTH])))
        closed = "no gap" if isnan(share) else f"{share:.0%}"
    asked = sum(hit is not None for hit in row["right"])
    crop = ("" if row[key] is None else f"{row[key]:.1%}" for key in ("coverage", "share"))
    return joined(name, str(asked), accuracy(row), change, closed, *crop, *costs(row))


def joined(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def header(*columns: str) -> list[str]:
    return [joined("method", *columns), f"|---|{'--:|' * len(columns)}"]


def overview(strata: dict[str, dict[str, dict]]) -> list[str]:
    """The README's table: accuracy in every stratum, and what a question of the first one costs."""
    first = next(iter(strata.values()))
    names = [name for name in ROWS if any(name in rows for rows in strata.values())]
    lines = header(*strata, "passes", "GFLOPs", "latency", "questions/s", "memory")
    for name in names:
        cells = (accuracy(rows[name]) if name in rows else "" for rows in strata.values())
        lines.append(joined(name, *cells, *(costs(first[name]) if name in first else [""] * 5)))
    return lines


def tables(strata: dict[str, dict[str, dict]]) -> Iterable[str]:
    """Every stratum with every figure."""
    for stratum, rows in strata.items():
        yield f"### {stratum}\n"
        yield from header(*COLUMNS)
        yield from (line(name, rows) for name in ROWS if name in rows)
        yield ""


def put_between(path: Path, marker: str, lines: Iterable[str]) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- end -->`."""
    text = path.read_text()
    found = re.search(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", text, re.DOTALL)
    if found is None:
        raise UserError(f"{path} has no <!-- {marker} --> ... <!-- end --> to write the table into")
    path.write_text(text[: found.end(1)] + "\n" + "\n".join(lines).rstrip() + "\n\n" + text[found.start(2) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SPECKS_LLAVA))
    parser.add_argument("--matcher", default=str(SPECKS_BLIP))
    parser.add_argument("--strata", nargs="+", choices=STRATA, default=list(STRATA))
    parser.add_argument("--methods", nargs="+", choices=ROWS, metavar="NAME", help="default: all")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--untimed", action="store_true", help="leave out latency, throughput and memory")
    parser.add_argument("--choose", action="store_true", help="compare options, on the development split only")
    parser.add_argument("--out", type=Path, help="JSON file with all measurements; what is in it is not run again")
    parser.add_argument("--tables", type=Path, help="file for all figures, between the markers of the model's name")
    parser.add_argument("--readme", type=Path, help="file for accuracies and costs, between the same markers")
    args = parser.parse_args()

    if args.choose:
        choose(args)
        return
    setting = {"model": Path(args.model).name, "split": args.split, "batch_size": args.batch_size}
    setting |= {"jax": jax.__version__}
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else setting | {"strata": {}}
    if other := {k: found[k] for k in setting if found[k] != setting[k]}:
        raise UserError(f"{args.out} was measured with {other}; give another --out, or the same settings")
    strata = found["strata"]
    for name in args.methods or ROWS:
        asked = args.strata[:1] if name in ABLATIONS and not args.methods else args.strata
        rows = [strata.setdefault(stratum, {}).get(name) for stratum in asked]
        todo = [s for s, row in zip(asked, rows, strict=True) if row is None or len(row["right"]) != args.questions]
        if not todo:
            continue
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            for stratum, row in alone.submit(measure, name, todo, args).result().items():
                strata[stratum][name] = row
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.tables:
        put_between(args.tables, found["model"], tables(strata))
    if args.readme:
        put_between(args.readme, found["model"], overview(strata))


if __name__ == "__main__":
    main()
