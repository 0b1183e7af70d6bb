"""Ask a question about a picture.

Prints the answer; with --json one object with the keys text, boxes, forward_passes, status, method, model, seconds.
Boxes are x1, y1, x2, y2 in pixels of the given picture. Several --image are shown to the model in their order.

Example: jaxvqa ask --image street.jpg --question "What is written on the sign?" --method vicrop --save evidence.png
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jaxvqa.cli.model import load_model, model_arguments
from jaxvqa.cli.options import parse_options
from jaxvqa.cli.output import box_text, progress
from jaxvqa.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxvqa.requests import Answer

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, action="append", metavar="I", help="picture file; may be repeated")
    parser.add_argument("--question", required=True, metavar="Q", help="what to ask about it")
    parser.add_argument("--method", default="vanilla", help="see: jaxvqa methods; default: %(default)s")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method; may be repeated"
    )
    parser.add_argument(
        "--matcher", metavar="M", help="image-text matching model of a method that wants one: folder or hub id"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the method's own")
    parser.add_argument(
        "--exif", choices=("ignore", "apply"), default="ignore", help="the orientation tag; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", metavar="PNG", help="write the first picture with heat map and boxes")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from jaxvqa.images import open_image, overlay

    matcher = [] if args.matcher is None else [f"matcher={args.matcher}"]
    method = configure(args.method, args.option + matcher, args.max_new_tokens)
    if not args.question.strip():
        raise UserError("--question is empty: say what to ask about the picture")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    if args.save and Path(args.save).suffix.lower() not in PICTURES:
        raise UserError(f"--save {args.save}: expected a file name that ends in {', '.join(PICTURES)}")
    images = tuple(open_image(path, exif=args.exif) for path in args.image)

    import jaxvqa
    from jaxvqa.engine import matcher_of

    progress(f"loading {args.model}")
    vlm = load_model(args)
    models = matcher_of(method, vlm, offline=args.offline)
    answer = jaxvqa.ask(vlm, images, args.question, method=method, models=models)
    if args.save:
        overlay(images[0], answer.heatmap, answer.boxes).save(args.save)
        progress(f"wrote {args.save}")
    if args.json:
        print(json.dumps(summary(answer)))
    else:
        print(answer.text)
        for box in answer.boxes.tolist():
            progress(f"looked at {box_text(box)}")
        passes = answer.forward_passes.total
        progress(f"{answer.method} on {answer.model}: {passes} forward passes, {answer.seconds:.1f} s")
    return 0


def configure(name: str, pairs: list[str], max_new_tokens: int | None = None) -> "Callable":
    """The method of that name with the options `k=v`; UserError for anything that it does not know."""
    from jaxvqa import methods

    options = parse_options(methods.get(name), pairs)
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    return methods.resolve(name, **options)


def summary(answer: "Answer") -> dict[str, object]:
    """What `--json` prints of an answer; the passes are their total."""
    return {
        "text": answer.text,
        "boxes": answer.boxes.tolist(),
        "forward_passes": answer.forward_passes.total,
        "status": answer.status,
        "method": answer.method,
        "model": answer.model,
        "seconds": round(answer.seconds, 3),
    }
