"""Run the unmodified model and the methods side by side on bundled scenes: the main job, in two minutes.

The scenes are drawn on the spot from seeds that no training has seen. Each shows plates with a character that is too
small to read when the scene is seen whole; the methods find the plate from inside the model and crop to it, or attend
to it more. Writes a picture with heat map and boxes per question and method, and one HTML page; prints where they are.

Example: jaxvqa demo --out ./jaxvqa-demo --samples 8
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.cli.ask import summary
from jaxvqa.cli.output import error_text, mark, progress, shortened, table
from jaxvqa.errors import UserError

if TYPE_CHECKING:
    from jaxvqa.report.page import Entry
    from jaxvqa.requests import Answer, Sample

# The unmodified model answers ViCrop's own prompt, so that the two differ in the crop alone.
METHODS = {
    "vanilla": {"template": "vicrop_hf", "max_new_tokens": 20},
    "vicrop": {},
    "hiperson": {"max_new_tokens": 96},  # its reply has at most 80 here
    "focus": {},
    "cof": {},
}
SEED = 20261120  # of the demo's scenes alone
MAX_SAMPLES = 1000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="jaxvqa-demo", metavar="DIR", help="folder to write; default: ./%(default)s")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="questions to ask; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.samples <= MAX_SAMPLES:
        raise UserError(f"--samples {args.samples}: expected 1 to {MAX_SAMPLES}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    import jaxvqa

    start = time.perf_counter()
    progress(f"drawing {args.samples} scenes")
    samples = held_out(args.samples)
    progress("loading the bundled model")
    vlm = jaxvqa.load(SPECKS_LLAVA)
    answers: dict[str, list[Answer]] = {}
    for method, options in METHODS.items():
        progress(f"asking {method} (the first answers wait for compilation)")
        answers[method] = list(jaxvqa.ask_many(vlm, samples, method=method, **options))
    seconds = time.perf_counter() - start

    pictures = write_pictures(out, samples, answers)
    page = write_page(out, vlm.name, samples, answers, seconds)
    if args.json:
        print(json.dumps(record(vlm.name, page, samples, answers, pictures)))
    else:
        print(f"{questions_table(samples, answers)}\n\n{methods_table(samples, answers)}")
        print(f"\nPictures with heat map, boxes and plate: {out}/*.png\nEverything on one page: {page}")
    failed = [answer.error for method in METHODS for answer in answers[method] if answer.error is not None]
    for error in failed:
        progress(f"jaxvqa: a sample failed: {error_text(error)}")
    return 1 if failed else 0


def held_out(count: int) -> "list[Sample]":
    """Reading questions, numbered as the pictures that are written."""
    from jaxvqa.specks.evaluation import reading_samples

    return [replace(sample, id=f"{n:02d}") for n, sample in enumerate(reading_samples(SEED, count), 1)]


def questions_table(samples: "Sequence[Sample]", answers: "dict[str, list[Answer]]") -> str:
    """A line per question: the truth, each method's answer with its mark, and all passes."""
    from jaxvqa.specks.evaluation import right

    rows = []
    for sample, *given in zip(samples, *answers.values(), strict=True):
        cells = [f"{shortened(answer.text)} {mark(right(answer, sample))}" for answer in given]
        passes = " / ".join(str(answer.forward_passes.total) for answer in given)
        rows.append((sample.id, sample.question, sample.answer, *cells, passes))
    return table(("", "question", "truth", *answers, "passes"), rows)


def methods_table(samples: "Sequence[Sample]", answers: "dict[str, list[Answer]]") -> str:
    """A line per method: right answers, boxes that hold the plate, passes per question."""
    from jaxvqa.geometry import covers
    from jaxvqa.specks.evaluation import right

    rows = []
    for method, given in answers.items():
        pairs = list(zip(given, samples, strict=True))
        correct = sum(right(answer, sample) for answer, sample in pairs)
        held = [
            any(covers(box, sample.box) for box in answer.boxes.tolist())
            for answer, sample in pairs
            if sample.box and len(answer.boxes)
        ]
        passes = sum(answer.forward_passes.total for answer in given) / len(given)
        rows.append(
            (method, f"{correct} of {len(pairs)}", f"{sum(held)} of {len(held)}" if held else "", f"{passes:.3g}")
        )
    return table(("method", "right", "box holds the plate", "passes per question"), rows)


def write_pictures(out: Path, samples: "Sequence[Sample]", answers: "dict[str, list[Answer]]") -> list[dict[str, Path]]:
    """For each sample a PNG per method that looked: heat map, its boxes (cyan), the plate asked for (green)."""
    paths = []
    for number, sample in enumerate(samples):
        looked = {method: given[number] for method, given in answers.items() if _looked(given[number])}
        paths.append({method: out / f"{sample.id}-{method}.png" for method in looked})
        for method, path in paths[-1].items():
            _evidence(sample, looked[method]).save(path)
    return paths


def write_page(
    out: Path, model: str, samples: "Sequence[Sample]", answers: "dict[str, list[Answer]]", seconds: float
) -> Path:
    """The run as one HTML page; returns its path."""
    import jax

    from jaxvqa.report.page import render

    device = jax.devices()[0]
    facts = [
        ("model", model),
        ("questions", str(len(samples))),
        ("device", device.device_kind),
        ("time, compilation included", f"{seconds:.0f} s"),
        ("seconds of an answer", "from its start, in a batch, compilation included"),
    ]
    entries = [_entry(sample, given) for sample, *given in zip(samples, *answers.values(), strict=True)]
    page = out / "index.html"
    page.write_text(render("jaxvqa demo: the same model, before and after looking closer", facts, entries), "utf-8")
    return page


def record(
    model: str,
    page: Path,
    samples: "Sequence[Sample]",
    answers: "dict[str, list[Answer]]",
    pictures: Sequence[dict[str, Path]],
) -> dict[str, object]:
    """What `--json` prints."""
    from jaxvqa.specks.evaluation import right

    return {
        "model": model,
        "page": str(page),
        "right": {
            method: sum(right(answer, sample) for answer, sample in zip(given, samples, strict=True))
            for method, given in answers.items()
        },
        "samples": [
            {
                "id": sample.id,
                "question": sample.question,
                "answer": sample.answer,
                "box": sample.box,
                "pictures": {method: str(path) for method, path in paths.items()},
                "methods": [summary(answer) | {"right": right(answer, sample)} for answer in given],
            }
            for sample, paths, *given in zip(samples, pictures, *answers.values(), strict=True)
        ],
    }


def _entry(sample: "Sample", answers: "Sequence[Answer]") -> "Entry":
    from jaxvqa.images import crop
    from jaxvqa.report.page import Entry, Outcome
    from jaxvqa.specks.evaluation import right

    pictures = [("the scene", sample.image)]
    for answer in filter(_looked, answers):
        pictures.append((f"{answer.method}: heat map, boxes (cyan), the plate (green)", _evidence(sample, answer)))
        pictures += [(f"{answer.method}: what the box holds", crop(sample.image, box)) for box in answer.boxes[:1]]
    outcomes = [
        Outcome(
            answer.method,
            answer.text,
            right(answer, sample),
            answer.forward_passes.total,
            answer.seconds,
            tuple(map(tuple, answer.boxes.tolist())),
            "" if answer.error is None else error_text(answer.error),
        )
        for answer in answers
    ]
    return Entry(f"Question {int(sample.id)}", sample.question, tuple(pictures), tuple(outcomes), sample.answer)


def _looked(answer: "Answer") -> bool:
    return answer.heatmap is not None or len(answer.boxes) > 0


def _evidence(sample: "Sample", answer: "Answer"):
    from jaxvqa.images import overlay

    return overlay(sample.image, answer.heatmap, [*answer.boxes.tolist(), sample.box])
