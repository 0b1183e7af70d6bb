"""Teach a trained Specks LLaVA to see tiles: python experiments/specks/train_tiled.py --work WORK --out FOLDER

The result is a LLaVA-NeXT of the same tower, connector and decoder: an image is a base view of 128 px and a canvas of
2 x 2 tiles of 128 px. The tower stays as it is and reads every view once; then the decoder learns where the new tokens
stand, first on a sample of them, then on all. Can be interrupted and restarted.
"""

import argparse
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from export import write
from PIL import Image
from tokenizers import Tokenizer
from train import ASKED, SCENES, SEED, learn, sparse_tokens
from transformers import LlavaNextImageProcessor, LlavaNextProcessor

from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.convert import load
from jaxvqa.images import crop
from jaxvqa.methods.focus import MAIN_IMAGE, ZOOMED_IN
from jaxvqa.models import llava_next
from jaxvqa.models.llava import Llava, LlavaConfig
from jaxvqa.models.llava_next import LlavaNextConfig
from jaxvqa.models.llava_onevision import LlavaOnevision
from jaxvqa.specks.scenes import Box, Plate, Scene, scene
from jaxvqa.specks.views import view_boxes
from jaxvqa.training import specks
from jaxvqa.training.loop import fit, start
from jaxvqa.training.optimizer import optimizer
from jaxvqa.vision.inputs import ImageInput

TILES = 2
"""Tiles along each side of the canvas."""
MAX_LENGTH = 4096
SPARSE, ONE, TWO = 512, 1600, 2944
"""Tokens of a row: with a sample of the image tokens, and with all of one image or of two."""
BASE_KINDS = ("where", "side")
"""Questions whose answer the base view's tokens hold: those of a tile know places in the tile."""


# ---- the model -------------------------------------------------------------------------------------------------------


def tiled_config(c: LlavaConfig) -> LlavaNextConfig:
    """The LLaVA-NeXT of the same tower, connector and decoder."""
    side = TILES * c.vision.image_size
    return LlavaNextConfig(
        vision=c.vision,
        decoder=replace(c.decoder, max_length=MAX_LENGTH),
        image_token_id=c.image_token_id,
        feature_layers=c.feature_layers,
        projector_activation=c.projector_activation,
        projector_bias=c.projector_bias,
        canvases=((side, side),),
        max_tiles=None,
    )


def tiled_model(model: Llava, newline: int) -> LlavaOnevision:
    """A LLaVA's parameters, and the word of token `newline` as what follows each row of cells."""
    return LlavaOnevision(model.vision, model.projector, model.decoder.embed[newline], model.decoder)


def image_processor(c: LlavaNextConfig):
    """What cuts an image into a base view and tiles."""
    E = c.vision.image_size
    return LlavaNextImageProcessor(
        size={"shortest_edge": E},
        crop_size={"height": E, "width": E},
        image_grid_pinpoints=[list(size) for size in c.canvases],
    )


def process(c: LlavaNextConfig, processor, image: Image.Image) -> ImageInput:
    return llava_next.process(c, processor, image, llava_next.default_buckets(c, processor))


@dataclass(frozen=True, eq=False)
class Layout:
    """How the tokens of a square image follow each other.

    base: side of the base view's grid, whose tokens come first. cells: the token of each cell of the canvas, row by
    row. newlines: the tokens that are neither.
    """

    base: int
    cells: np.ndarray
    newlines: np.ndarray
    tokens: int

    @classmethod
    def of(cls, c: LlavaNextConfig, processor) -> "Layout":
        E = c.vision.image_size
        image = process(c, processor, Image.new("RGB", (E, E)))
        base = c.vision.grid[0]
        return cls(base, image.cells, np.setdiff1d(np.arange(base**2, image.tokens), image.cells), image.tokens)

    @property
    def side(self) -> int:
        """Of the canvas, in cells."""
        return TILES * self.base

    def join(self, base: np.ndarray, cells: np.ndarray, newlines: np.ndarray | bool = False) -> np.ndarray:
        """Values of the base view's tokens, of the cells and of the newlines as values of all tokens."""
        values = np.zeros(self.tokens, base.dtype)
        values[: len(base)], values[self.cells], values[self.newlines] = base, cells, newlines
        return values

    def finer(self, base: np.ndarray) -> np.ndarray:
        """Values of the canvas's cells, each that of the base view's token that looks there."""
        return np.kron(base.reshape(self.base, self.base), np.ones((TILES, TILES), base.dtype)).ravel()


# ---- features --------------------------------------------------------------------------------------------------------


class TiledPlate(Plate):
    """A plate whose character is read from the tiles."""

    def legible(self, view: Box, encoder: int = 128 * TILES, minimum: float = 4.5) -> bool:
        return super().legible(view, encoder, minimum)


@lru_cache(maxsize=4096)
def scene_of(number: int) -> tuple[Scene, tuple[Box, Box]]:
    """Training scene `number`, kinds taking turns, and the two views of it: all of it and a crop."""
    index, turn = divmod(number, len(ASKED))
    kind = ASKED[turn]
    made = scene(SEED + 100 * list(SCENES).index(kind), index, kind)
    return replace(made, plates=tuple(TiledPlate(**vars(plate)) for plate in made.plates)), view_boxes(made)[:2]


def encoded(work: Path, count: int, c: LlavaNextConfig, model: LlavaOnevision, processor, layout: Layout) -> np.ndarray:
    """The tokens of both views of the scenes 0..count-1 before the decoder, float16 [count, 2, tokens, D], on disk.

    A file `features.done` says how many are there; further ones are added.
    """
    path, done = work / "features.f16", work / "features.done"
    shape, there = (count, 2, layout.tokens, c.decoder.width), int(done.read_text()) if done.exists() else 0
    if there < count:
        encode = jax.jit(partial(llava_next.encode_images, backend="xla"), static_argnums=1)
        features = np.memmap(path, np.float16, "r+" if path.exists() else "w+", shape=shape)
        for number in range(there, count):
            made, boxes = scene_of(number)
            picture = replace(made).picture  # of a copy: the scene that is kept stays small
            views = [process(c, processor, crop(picture, box)).arrays for box in boxes]
            features[number] = encode(model, c, jax.tree.map(lambda *x: np.stack(x), *views))
            if number % 100 == 99 or number + 1 == count:
                features.flush()
                done.write_text(f"{number + 1}\n")
                print(f"{number + 1} scenes encoded", flush=True)
    return np.memmap(path, np.float16, "r", shape=shape)


# ---- batches ---------------------------------------------------------------------------------------------------------


def sample(layout: Layout, made: Scene, view: Box, rng: np.random.Generator, each: int = 2) -> np.ndarray:
    """How many tokens of a view each token stands for, 0 where it is left out; one newline in eight."""
    seeds = rng.integers(1 << 31, size=2)
    base, cells = (
        sparse_tokens(*specks.cells(made.plates, view, grid)[:4], each, int(seed))
        for grid, seed in zip((layout.base, layout.side), seeds, strict=True)
    )
    newlines = np.zeros(len(layout.newlines))
    newlines[rng.permutation(len(newlines))[: len(newlines) // 8]] = 8
    return layout.join(base, cells, newlines)


def aimed(layout: Layout, ask: specks.Ask) -> specks.Ask:
    """A question whose `cells`, base views alone, become those of the tokens that answer it."""
    if ask.cells is None:
        return ask
    nothing = np.zeros(layout.base**2, bool), np.zeros(layout.side**2, bool)
    views = ask.cells.reshape(-1, layout.base**2)
    shown = [(v, nothing[1]) if ask.kind in BASE_KINDS else (nothing[0], layout.finer(v)) for v in views]
    return replace(ask, cells=np.concatenate([layout.join(*pair) for pair in shown]))


def zoomed(row: specks.Row) -> specks.Row:
    """A row about a scene and a crop in the words of FOCUS."""
    prefix, asks = row
    told = f"\n{MAIN_IMAGE.format(colour='red')}\n"
    return [prefix[0], None, told, None], [replace(ask, prompt=f"\n{ZOOMED_IN}{ask.prompt}") for ask in asks]


def pair_of(rng: np.random.Generator, made: Scene, whole: Box, part: Box) -> tuple[list[Box], specks.Row]:
    """Questions about a scene and a crop of it: the views in the order in which they are shown, and the row."""
    if rng.random() < 0.3:
        return [part, whole], specks.stepwise(rng, made, part)
    row = specks.double(rng, made, part)
    return [whole, part], zoomed(row) if row[0][0] == specks.head(specks.VICUNA) and rng.random() < 0.5 else row


def batch_of(features: np.ndarray, layout: Layout, packers: tuple[specks.Packer, ...], sizes: tuple[int, ...], step):
    """Features [B, I, tokens, D] and packed rows. Rows of one view and of two.

    packers, sizes: one of each for a sample of the tokens, both forms mixed; two for all tokens, steps of one view and
    steps of two views taking turns.
    """
    sparse, turn = len(packers) == 1, step % len(packers)
    shown, rows = [], []
    for number in range(step * sizes[turn], (step + 1) * sizes[turn]):
        rng = np.random.default_rng((SEED, 7, sparse, number))
        index = int(rng.integers(len(features)))
        made, (whole, part) = scene_of(index)
        if rng.random() < 0.55 if sparse else turn:
            boxes, row = pair_of(rng, made, whole, part)
        elif rng.random() < 0.06 and not sparse:
            boxes, row = [whole], specks.few_shot(rng, made)
        else:
            boxes = [part if rng.random() < 0.25 else whole]
            row = specks.single(rng, made, boxes[0], terse=0.3)
        order = [0 if box == whole else 1 for box in boxes]
        shown.append(features[index, (order * 2)[: 2 if sparse else turn + 1]])
        keep = np.concatenate([sample(layout, made, box, rng) for box in boxes]) if sparse else None
        asks = [aimed(layout, ask) for ask in row[1]]
        rows.append(packers[turn].row(row[0], asks, keep, hide=rng))
    return np.stack(shown), packers[turn].stack(rows, 400)


# ---- training --------------------------------------------------------------------------------------------------------


def tiled_step(config, words, newlines, floor, look, tx, peak, params, opt_state, batch, progress):
    """The decoder and the newline, on the features of the tower as it is.

    look: weight of the scaffold (`specks.answer_loss`) at the beginning; it is gone when half of the stage is over.
    """
    look = look * jnp.clip(1 - 2 * progress, 0.0, 1.0)
    features, rows = batch

    def loss_of(trained):
        shown = jnp.where(newlines[:, None], trained.model.newline, features.astype(jnp.float32))
        return specks.answer_loss(trained, config, shown, rows, words, look)

    return learn(loss_of, floor, tx, peak, params, opt_state, progress)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for features, checkpoints and logs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--start", type=Path, default=SPECKS_LLAVA, help="Specks LLaVA (default: the bundled one)")
    parser.add_argument("--scenes", type=int, default=2400, help="how many to show, 1 MB each")
    parser.add_argument("--minutes", type=float, nargs=2, default=(20, 8), help="time budget of both stages")
    parser.add_argument("--steps", type=int, nargs=2, default=(100_000,) * 2, help="step budget of both stages")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    start_config, start_model, folder = load(args.start, dtype="float32")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config, words = tiled_config(start_config), specks.Words.of(tokenizer)
    model = tiled_model(start_model, tokenizer.encode("\n", add_special_tokens=False).ids[0])
    processor = image_processor(config)
    layout = Layout.of(config, processor)
    features = encoded(args.work, args.scenes, config, model, processor, layout)
    sparse, one, two = (specks.Packer(tokenizer, layout.tokens, length) for length in (SPARSE, ONE, TWO))
    newlines = np.isin(np.arange(layout.tokens), layout.newlines)
    step = partial(tiled_step, config, words, newlines)
    stages = (
        (partial(step, 0.1, 0.1), 1.5e-3, partial(batch_of, features, layout, (sparse,), (16,))),
        (partial(step, 0.02, 0.0), 5e-4, partial(batch_of, features, layout, (one, two), (4, 2))),
    )
    params = specks.Trained(model, jnp.zeros((4, 1, 1)))
    for number, (train, peak, batches) in enumerate(stages, 1):
        tx = optimizer(params, ("decoder",))
        budget = {"steps": args.steps[number - 1], "seconds": 60 * args.minutes[number - 1]}
        state = start(params, tx.init(params))
        state = fit(
            state,
            partial(train, tx, peak),
            batches,
            args.work / f"stage{number}",
            save_every=60,
            log_every=10,
            **budget,
        )
        params = state.params
        print(f"stage {number}: {int(state.step)} steps in {float(state.seconds):.0f} s")
    write(config, params.model, tokenizer, LlavaNextProcessor, processor, args.out)


if __name__ == "__main__":
    main()
