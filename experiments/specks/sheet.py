"""The strata of Specks on one sheet, a question each, and how fast scenes are drawn.

Of each stratum the scene, with the plates asked for in green and their rivals in orange, and what the encoder sees of
it and of the ground-truth crop. Prints scenes per second on one core, by kind: layouts alone, and rendered.

Example:
  python experiments/specks/sheet.py --out experiments/specks/strata.png
"""

import argparse
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from jaxvqa.images import crop
from jaxvqa.methods.controls import side_around, square_around
from jaxvqa.requests import Sample
from jaxvqa.specks import SIZE, scene
from jaxvqa.specks.scenes import LAYOUTS
from jaxvqa.specks.strata import STRATA, samples

SIDE, SEEN, EDGE, LINE = 336, 128, 12, 20
CROP = 160
TARGET, RIVAL = (0, 200, 60), (255, 150, 0)
TILE = (SIDE + EDGE + SEEN, SIDE + 3 * LINE)


def tile(stratum: str, sample: Sample) -> Image.Image:
    """One stratum: the scene with its boxes, the encoder's views beside it, the question below."""
    picture, draw = _canvas(TILE)
    marked = sample.image.convert("RGB")
    for boxes, colour, width in ((sample.rivals, RIVAL, 5), (sample.boxes, TARGET, 10)):
        for x1, y1, x2, y2 in boxes:
            edges = x1 - width, y1 - width, x2 + width - 1, y2 + width - 1
            ImageDraw.Draw(marked).rectangle(edges, outline=colour, width=width)
    picture.paste(marked.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (0, LINE))
    views = [("seen whole", sample.image)]
    if sample.box is not None:
        square = square_around(sample.box, side_around(sample.box, CROP), sample.image.size)
        views.append(("seen in a crop", crop(sample.image, square)))
    for n, (title, view) in enumerate(views):
        x, y = SIDE + EDGE, LINE + n * (SEEN + 2 * LINE)
        picture.paste(view.resize((SEEN, SEEN), Image.Resampling.BICUBIC), (x, y))
        draw.text((x, y + SEEN + 2), title, "black", _font())
    draw.text((0, 2), stratum, "black", _font())
    draw.text((0, SIDE + LINE + 4), f"{sample.question}  {sample.answer}", "black", _font())
    return picture


def sheet(number: int, columns: int = 3) -> Image.Image:
    """Test samples of every stratum, from `number` on, for different grounds."""
    rows = -(-len(STRATA) // columns)
    picture, _ = _canvas((columns * (TILE[0] + EDGE) + EDGE, rows * TILE[1] + EDGE))
    for n, stratum in enumerate(STRATA):
        place = (EDGE + n % columns * (TILE[0] + EDGE), EDGE + n // columns * TILE[1])
        picture.paste(tile(stratum, samples(stratum)[number + n]), place)
    return picture


def _canvas(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", size, "white")
    return picture, ImageDraw.Draw(picture)


def _font():
    return ImageFont.load_default(14)


def rates(kind: str, count: int) -> tuple[float, float]:
    """Layouts and rendered scenes per second of one core's time."""
    for made in (scene(0, index, kind) for index in range(200)):
        _ = made.picture  # textures and plate masks are kept
    start = time.process_time()
    drawn = [scene(1, index, kind) for index in range(count)]
    laid_out = time.process_time()
    for made in drawn:
        _ = made.picture
        del made.__dict__["picture"]
    return count / (laid_out - start), count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--number", type=int, default=11, help="of the first test sample shown; default: %(default)s")
    parser.add_argument("--scenes", type=int, default=200, help="scenes to time per kind; default: %(default)s")
    args = parser.parse_args()
    sheet(args.number).quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")
    print(f"{'kind':8s} {'layouts/s':>10s} {'scenes/s':>10s}   on one core, {SIZE} x {SIZE} pixels")
    for kind in LAYOUTS:
        print("{:8s} {:10.0f} {:10.0f}".format(kind, *rates(kind, args.scenes)))


if __name__ == "__main__":
    main()
