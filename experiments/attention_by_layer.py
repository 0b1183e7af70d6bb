"""Where each decoder layer looks, for right and for wrong answers: a table, attention.json and three pictures.

Of the attention of the last prompt token (or of the question's tokens), per layer:
  share    how much of it falls on image tokens (VIF, section 2.1, Figures 1 and 2);
  entropy  how evenly it is spread over them, over ln(image tokens): 1 is uniform (VIF, section 2.2, Figures 2 and 3);
  ratio    relative attention inside the target over its mean inside all boxes of equal size, 1 being chance
           (HiPerson, appendix B.2, Figure 9). Relative is: over attention under a request for a general description.
Means over all answers of a kind (HiPerson shows the "top" 30) with standard errors. Questions without a target have no
ratio. VIF does not say whether its entropy is of the heads' mean map or the mean of each head's: --heads has both.
Needs matplotlib (extra: viz).
"""

import argparse
import json
import math
import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from jaxvqa.cli.model import load_model, model_arguments
from jaxvqa.cli.output import WRONG_PATH, error_text, progress
from jaxvqa.engine import Engine
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.methods import Facts, fill
from jaxvqa.prompts import GENERAL_QUESTION, render
from jaxvqa.requests import Answer, Generate, Read, Row, Sample
from jaxvqa.specks import strata
from jaxvqa.specks.evaluation import right
from jaxvqa.taps import ReadSpec
from jaxvqa.transforms import attention_ratio, box_weights, image_share, relative_attention, spatial_entropy
from jaxvqa.typing import Array, Float

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

EXAMPLE = """examples:
  python experiments/attention_by_layer.py --stratum small --out attention
  python experiments/attention_by_layer.py --model llava-hf/llava-1.5-7b-hf --samples textvqa.jsonl --out attention
a line of the file (the image's path is relative to it; "answer" may be a list of accepted ones; the boxes are optional,
in pixels, x1 y1 x2 y2):
  {"image": "1.jpg", "question": "What does the sign say?", "answer": "stop", "box": [30, 40, 90, 80]}"""
STYLES = {"right": ("#0072B2", "o-"), "wrong": ("#D55E00", "s--")}  # told apart by every kind of colour vision
AXES = {
    "share": "attention on image tokens\n(share of all attention, 0 to 1)",
    "entropy": "entropy of attention over image tokens\n(over ln of their number; 1 = uniform)",
    "ratio": "relative attention inside the target\n(over boxes of equal size; 1 = chance)",
}


class Case(NamedTuple):
    """A question and the answers that count as right."""

    sample: Sample
    accepted: tuple[str, ...]


class Statistics(NamedTuple):
    """Per layer, each [L]."""

    share: Float[Array, "L"]
    entropy: Float[Array, "L"]
    ratio: Float[Array, "L"]
    """NaN where the question has no target, or the encoder did not see it."""


@dataclass(frozen=True, eq=False)
class Looked(Answer):
    statistics: Statistics | None = None


@dataclass(frozen=True)
class AttentionByLayer:
    """The unmodified model's answer, and where each of its layers looked."""

    name: ClassVar[str] = "attention_by_layer"

    rows: str = "last"
    """Whose attention: "last" (the last prompt token) or "question" (mean over the question's tokens)."""
    heads: str = "mean"
    """Entropy "mean": of the map averaged over heads and rows; "all": of every head's and row's map, then averaged."""
    template: str | None = None
    """Prompt template; None is the model's own."""
    layers: tuple[int, ...] | None = None
    """None is all of them."""
    max_new_tokens: int = 20

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "AttentionByLayer":
        return fill(self, template=facts.template, layers=tuple(range(facts.num_layers)))

    def __call__(self, sample: Sample) -> Generator[Any, Any, Looked]:
        assert self.template is not None and self.layers is not None, "bound"
        asked, general = (render(self.template, text, ending="short") for text in (sample.question, GENERAL_QUESTION))
        spec = ReadSpec(self.layers, frozenset({"rows"}))
        reference = yield Read(sample.images, general, spec, rows=self.rows, reduce=mean_map)
        weights = box_weights(sample.boxes, reference.geometries[0])
        spec = replace(spec, heads=self.heads)
        reading, reply = yield [
            Read(sample.images, asked, spec, rows=self.rows, reduce=statistics, args=(reference.value, *weights)),
            Generate(sample.images, asked, max_new_tokens=self.max_new_tokens),
        ]
        return Looked(reply.text, statistics=reading.value)


def mean_map(row: Row) -> Float[Array, "L h w"]:
    """Attention to the image per layer, averaged over the wanted rows and, where they were read, the heads."""
    maps = jnp.average(row.on_image(row.readouts.rows), axis=-3, weights=row.wanted)
    return maps if maps.ndim == 3 else maps.mean(1)


def statistics(
    row: Row, reference: Float[Array, "L h w"], inside: Float[Array, "h w"], anywhere: Float[Array, "h w"]
) -> Statistics:
    """The figures of one question; the entropy is the mean over heads and rows where all heads were read."""
    mean, maps = mean_map(row), row.on_image(row.readouts.rows)
    if maps.ndim == 4:
        entropy = spatial_entropy(mean)
    else:
        entropy = jnp.average(spatial_entropy(maps), axis=-1, weights=row.wanted).mean(1)
    ratio = attention_ratio(relative_attention(mean, reference), inside, anywhere)
    return Statistics(image_share(mean), entropy, ratio)


def read_cases(file: Path) -> list[Case]:
    """The questions of a JSON Lines file; UserError with the line's number for one that is not as EXAMPLE says."""
    cases = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image, question, answer = (record[key] for key in ("image", "question", "answer"))
            boxes = record["boxes"] if "boxes" in record else [record["box"]] if "box" in record else []
            boxes = tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in boxes)
            accepted = tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)
            sample = Sample((file.parent / image,), question, str(number), boxes=boxes, answer=accepted[0])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            expected = 'expected {"image": .., "question": .., "answer": .., "box": [x1, y1, x2, y2]}'
            raise UserError(f"{where}: {type(error).__name__} {error}; {expected}") from None
        for box in boxes:
            if not (box[0] < box[2] and box[1] < box[3]):
                raise UserError(f"{where}: box {list(box)}; expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
        if not sample.image.is_file():
            raise UserError(f"{where}: there is no image {sample.image}; its path is relative to the file")
        cases.append(Case(sample, accepted))
    if not cases:
        raise UserError(f"{file}: no question in it; expected one JSON object per line")
    return cases


def measure(vlm, cases: Iterable[Case], method: AttentionByLayer, batch_size: int = 8) -> dict[str, Any]:
    """Ask all questions; the figures as attention.json holds them."""
    asked, judged = tee(cases)  # a picture lives only while its question is in flight
    answers = Engine(vlm, batch_size=batch_size).run((case.sample for case in asked), method)
    groups, said, failed = {"right": [], "wrong": [], "all": []}, [], []
    for answer, case in zip(answers, judged, strict=True):
        if answer.error is not None:
            failed.append(f"{answer.sample}: {error_text(answer.error)}")
            continue
        assert isinstance(answer, Looked)
        is_right = any(right(answer, replace(case.sample, answer=text)) for text in case.accepted)
        said.append({"id": answer.sample, "text": answer.text, "right": is_right})
        for group in ("right" if is_right else "wrong", "all"):
            groups[group].append(answer.statistics)
    if not groups["all"]:
        raise UserError(f"no question could be answered; the first: {failed[0]}")
    return {
        "model": vlm.name,
        "image_setup": vlm.image_setup,
        "options": {"rows": method.rows, "heads": method.heads},
        "image_tokens": math.prod(vlm.facts.grid),
        "questions": {name: len(group) for name, group in groups.items()},
        "failed": failed,
        "answers": said,
        "layers": [
            {name: {q: summary(getattr(s, q)[layer] for s in group) for q in AXES} for name, group in groups.items()}
            for layer in range(vlm.config.decoder.num_layers)
        ],
    }


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Mean, its standard error and the number of values; None where there are too few. NaN is no value."""
    known = np.array([value for value in values if not math.isnan(value)], np.float64)
    return {
        "mean": float(known.mean()) if len(known) else None,
        "standard_error": float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None,
        "count": len(known),
    }


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown: mean ± standard error."""
    counts = report["questions"]
    columns = [(quantity, group) for quantity in AXES for group in counts]
    lines = [
        f"| layer | {' | '.join(f'{quantity}, {group} ({counts[group]})' for quantity, group in columns)} |",
        f"|--:|{'--:|' * len(columns)}",
    ]
    for number, layer in enumerate(report["layers"]):
        cells = [_cell(layer[group][quantity]) for quantity, group in columns]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figure: dict[str, Any]) -> str:
    error = figure["standard_error"]
    return "–" if figure["mean"] is None else f"{figure['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def draw(report: dict[str, Any], quantity: str, title: str, file: Path) -> None:
    """One quantity over the layers, right and wrong answers as two lines with the 95 % interval of the mean."""
    figure, panel = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for group, (color, style) in STYLES.items():
        figures = enumerate(layer[group][quantity] for layer in report["layers"])
        known = [
            (number, f["mean"], f["standard_error"] or math.nan, f["count"]) for number, f in figures if f["count"]
        ]
        if not known:
            continue
        numbers, mean, error, counts = map(np.array, zip(*known, strict=True))
        panel.plot(numbers, mean, style, color=color, markersize=4, label=f"{group} answers (n = {counts.max()})")
        panel.fill_between(numbers, mean - 1.96 * error, mean + 1.96 * error, color=color, alpha=0.2, linewidth=0)
    if quantity == "ratio":
        panel.axhline(1, color="gray", linewidth=1, linestyle=":", label="chance")
    else:
        panel.set_ylim(0, 1)
    if quantity == "entropy":
        nats = math.log(report["image_tokens"])
        right_axis = panel.secondary_yaxis(
            "right", functions=(partial(np.multiply, nats), lambda y: np.divide(y, nats))
        )
        right_axis.set_ylabel("nats")
    panel.set(xlabel="decoder layer (the first is 0)", ylabel=AXES[quantity])
    panel.set_title(title, fontsize=10)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9, title="bands: 95 % interval of the mean", title_fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def run(args: argparse.Namespace) -> int:
    if min(args.count, args.batch_size) < 1:
        raise UserError(f"--count {args.count}, --batch-size {args.batch_size}: expected at least 1")
    if args.samples:
        task, cases = args.samples.stem, read_cases(args.samples)[: args.count]
    else:
        task = f"Specks {args.stratum}"
        cases = (Case(sample, (str(sample.answer),)) for sample in strata.samples(args.stratum, "test", args.count))
    args.out.mkdir(parents=True, exist_ok=True)
    vlm = load_model(args)
    progress(f"asking {vlm.name} (the first answers wait for compilation)")
    report = measure(vlm, cases, AttentionByLayer(args.rows, args.heads), args.batch_size)
    report |= {"task": task, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    (args.out / "attention.json").write_text(json.dumps(report, indent=1) + "\n")
    rows = {"last": "last prompt token", "question": "question tokens"}[args.rows]
    for quantity in AXES:
        draw(report, quantity, f"{vlm.name} on {task}, {rows}", args.out / f"{quantity}.png")
    print(table(report))
    for failure in report["failed"]:
        progress(f"attention_by_layer: a question failed: {failure}")
    return 1 if report["failed"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model_arguments(parser)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--samples", type=Path, metavar="FILE.jsonl", help="questions about images; see below")
    task.add_argument(
        "--stratum", choices=tuple(strata.STRATA), default="small", help="of Specks (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=200, help="questions at most (default: %(default)s)")
    rows = "whose attention: the last prompt token's, or the mean of the question's tokens (default: %(default)s)"
    parser.add_argument("--rows", choices=("last", "question"), default="last", help=rows)
    heads = "entropy of the heads' mean map, or mean of all heads' entropies (default: %(default)s)"
    parser.add_argument("--heads", choices=("mean", "all"), default="mean", help=heads)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("attention"), help="folder to write (default: ./%(default)s)")
    try:
        return run(parser.parse_args(argv))
    except (JaxVQAError, UnicodeDecodeError, *WRONG_PATH) as error:
        print(f"attention_by_layer: {error_text(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
