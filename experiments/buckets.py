"""Image buckets: how many, what padding they cost, and that nothing is compiled once they are warm.

Images of random sizes go through the engine, with the family's default buckets and with as many chosen for these
images. All prompts are padded to one length, so that a program is one of a number of images and the largest one's
bucket. After the warm-up (every bucket, every pair, every shape of a map) no compilation may follow.
What is padding is said of the images' feature rows, of their encoding (beside a bucket of their own for every image)
and of all FLOPs (beside what the samples cost by themselves: prompts and batches are padded, too).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, combinations_with_replacement
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import jaxvqa
from jaxvqa.cli.output import WRONG_PATH, error_text
from jaxvqa.engine import Engine
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.geometry import missing
from jaxvqa.handlers import LENGTHS, bucket
from jaxvqa.methods import bind, resolve
from jaxvqa.models import family_of
from jaxvqa.regions.windows import search
from jaxvqa.requests import Answer, Generate, Sample
from jaxvqa.vision.inputs import bucket_of, buckets_for
from jaxvqa.vlm import VLM

EXAMPLE = """example:
  python experiments/buckets.py --model Qwen/Qwen2.5-VL-3B-Instruct --sides 200 1200 --json buckets.json"""
QUESTION = "What is on the plate?"
TEXT = 200
"""Tokens of text that a prompt may have."""
COMPILED = "/jax/core/compile/backend_compile_duration"


def sides(count: int, shortest: int, longest: int, seed: int) -> list[tuple[int, int]]:
    """Sizes (W, H), drawn evenly on a logarithmic scale."""
    drawn = np.random.default_rng(seed).uniform(np.log(shortest), np.log(longest), (count, 2))
    return [(w, h) for w, h in np.exp(drawn).astype(int).tolist()]


def pictures(count: int, shortest: int, longest: int, seed: int) -> list[Image.Image]:
    """Noise of random sizes."""
    rng = np.random.default_rng(seed)
    drawn = sides(count, shortest, longest, seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in drawn]


def chosen(vlm: VLM, images: Sequence[Image.Image], count: int) -> tuple[int, ...]:
    """`count` buckets for these images; the last is the model's largest, as crops may be of any size."""
    most, needed = vlm.image_buckets[-1], [vlm.size_of(image.size) for image in images]
    if (found := buckets_for(needed, count))[-1] == most:
        return found
    return (*buckets_for(needed, count - 1), most) if count > 1 else (most,)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled meanwhile."""
    heard = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def samples(images: Sequence[Image.Image]) -> list[Sample]:
    return [Sample((image,), QUESTION, id=str(number)) for number, image in enumerate(images)]


def warm_up(engine: Engine, method: Any, images: Sequence[Image.Image]) -> None:
    """Run one image of every bucket, and of every pair, and search a map of every shape."""
    vlm, of_bucket = engine.default, {}
    others = (Image.new("RGB", size) for size in sides(2000, 1, 4000, seed=1))
    for image in chain(images, others):
        if len(of_bucket) == len(vlm.image_buckets):
            break
        with suppress(UserError):  # longer and narrower than the model takes
            of_bucket.setdefault(bucket_of(vlm.size_of(image.size), vlm.image_buckets, "an image"), image)
    list(engine.run(samples(list(of_bucket.values())), method))
    if method.name != "vicrop":
        return

    def both(sample):
        for pair in combinations_with_replacement(of_bucket.values(), 2):
            yield Generate(pair, method.prompt(QUESTION, 2), max_new_tokens=method.max_new_tokens)
        return Answer("")

    list(engine.run(samples(images[:1]), both))
    views = [vlm.facts.geometry(image.size) for image in images]
    shapes = {tuple(n + sum(missing(n)) for n in view.grid): view for view in views}
    for where in shapes.values():
        search(np.zeros(where.grid), where.image_size, method.base, method.ratios, geometry=where)


def measure(vlm: VLM, images: Sequence[Image.Image], method: str) -> dict[str, Any]:
    """Answers a question about every image; what was compiled, and what was padding."""
    made = [vlm.process(image) for image in images]
    tight = [vlm.process(image, bucket=vlm.size_of(image.size)) for image in images]
    length = bucket(2 * max(image.capacity for image in made) + TEXT, LENGTHS, "a prompt of two images")
    engine = Engine(vlm, lengths=(min(length, vlm.max_length),))
    bound = bind(resolve(method, max_new_tokens=4), vlm.facts)
    with compilations() as heard:
        warm_up(engine, bound, images)
        before, flops = len(heard), engine.stats.flops
        answers = list(engine.run(samples(images), bound))
    padded, needed = (
        sum(family_of(vlm.config).image_flops(vlm.config, image.arrays) for image in inputs) for inputs in (made, tight)
    )
    return {
        "method": method,
        "buckets": vlm.image_buckets,
        "images": len(images),
        "warming": before,
        "compiled": len(heard) - before,
        "failed": [str(answer.error) for answer in answers if answer.error is not None],
        "rows_wasted": 1 - sum(image.tokens for image in made) / sum(image.capacity for image in made),
        "encoder_wasted": 1 - needed / padded,
        "flops_wasted": 1 - sum(answer.cost.flops for answer in answers) / (engine.stats.flops - flops),
    }


def run(args: argparse.Namespace) -> int:
    images, reports = pictures(args.count, *args.sides, seed=0), []
    print("| method | buckets | warm-up compiles | then | rows | encoding | all FLOPs |\n|---|---|---|---|---|---|---|")
    vlm = jaxvqa.load(args.model)
    own = chosen(vlm, images, args.buckets or len(vlm.image_buckets))
    for buckets in (vlm.image_buckets, own):
        vlm = jaxvqa.load(args.model, image_buckets=buckets)
        for method in ("vanilla", "vicrop"):
            found = measure(vlm, images, method)
            reports.append(found)
            cells = [method, f"{len(buckets)}: {', '.join(map(str, buckets))}", found["warming"], found["compiled"]]
            cells += [f"{found[key]:.0%}" for key in ("rows_wasted", "encoder_wasted", "flops_wasted")]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            for error in found["failed"]:
                print(f"buckets: an image failed: {error}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1) + "\n")
    return 1 if any(report["compiled"] or report["failed"] for report in reports) else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="M", help="folder or hub id")
    parser.add_argument("--count", type=int, default=100, help="images (default: %(default)s)")
    parser.add_argument(
        "--sides", type=int, nargs=2, default=(28, 640), metavar=("SHORTEST", "LONGEST"), help="pixels; default: 28 640"
    )
    parser.add_argument("--buckets", type=int, help="how many to choose (default: as many as the family has)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    try:
        return run(parser.parse_args(argv))
    except (JaxVQAError, *WRONG_PATH) as error:
        print(f"buckets: {error_text(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
