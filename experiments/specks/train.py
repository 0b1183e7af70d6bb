"""Train the bundled Specks model in four stages: python experiments/specks/train.py --work /tmp/specks

Stage 1 teaches the tower what each image token shows; stage 2 the decoder to answer about one image, stage 3 about two
images and step by step, both on a sample of the image tokens; stage 4 repeats it on all of them. Each stage has a time
budget and can be interrupted and restarted.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvqa.decoder import DecoderConfig
from jaxvqa.models import llava
from jaxvqa.models.llava import LlavaConfig
from jaxvqa.specks.scenes import COLORS, scene
from jaxvqa.specks.tokenizer import IMAGE, train_tokenizer
from jaxvqa.specks.views import VIEWS, open_views, render, view_boxes
from jaxvqa.training import specks
from jaxvqa.training.loop import fit, restore, start
from jaxvqa.training.optimizer import apply, optimizer, warmup_linear
from jaxvqa.vision.clip import ClipConfig

SEED = 1
SCENES = {"small": 16000, "crowded": 10000, "whole": 8000, "dense": 8000}
"""Scenes by kind; every kind has a seed of its own."""
DENSE = ("dense", "whole", "crowded", "dense", "small", "whole")
ASKED = ("small", "crowded", "whole")
"""Kinds of scenes in the order in which the stages draw them: what image tokens show; what is asked."""
GRID = 16


def model_config(vocab_size: int, image_token_id: int) -> LlavaConfig:
    """The bundled model: CLIP 4 x 192 at 128 px, Llama 6 x 192, tied."""
    return LlavaConfig(
        vision=ClipConfig(128, 8, 192, 512, 4, 3, 1e-5, "quick_gelu"),
        decoder=DecoderConfig(
            num_layers=6,
            width=192,
            mlp_width=512,
            num_heads=3,
            num_kv_heads=3,
            head_dim=64,
            vocab_size=vocab_size,
            max_length=2048,
            rope_theta=10000.0,
            rope_factor=1.0,
            norm_eps=1e-5,
            qkv_bias=False,
            qk_norm=False,
            tied=True,
        ),
        image_token_id=image_token_id,
        feature_layers=(-1,),
        select="default",
        projector_activation="gelu",
        projector_bias=True,
    )


@lru_cache(maxsize=512)
def _scene(seed: int, index: int, kind: str):
    made = scene(seed, index, kind)
    return made, view_boxes(made)


@dataclass(frozen=True)
class Views:
    """Rendered views in an endless order: scene `number` is of the kind that comes next in `order`."""

    images: dict[str, np.ndarray]
    order: tuple[str, ...]
    seed: int = 0
    """Of what is asked about them."""

    def pick(self, number: int, view: int):
        """View 0 (the whole scene) to 3 of a scene: the scene, the view's box, its image."""
        turn, place = divmod(number, len(self.order))
        kind = self.order[place]
        index = turn * self.order.count(kind) + self.order[:place].count(kind)
        index %= len(self.images[kind])
        made, boxes = _scene(_seed(kind), index, kind)
        return made, boxes[view], self.images[kind][index, view]


def _seed(kind: str) -> int:
    return SEED + 100 * list(SCENES).index(kind)


def rendered(work: Path, kind: str) -> np.ndarray:
    """The views of all training scenes of a kind, rendered by two processes unless that was finished before."""
    path, count = work / f"{kind}.u8", SCENES[kind]
    done = path.with_suffix(".done")
    if not done.exists():
        open_views(path, count, mode="r+")
        halves = [(0, count // 2), (count // 2, count)]
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            make = partial(scene, kind=kind)
            seeds = [_seed(kind)] * 2
            list(pool.map(render, [make] * 2, seeds, *zip(*halves, strict=True), [path] * 2, [count] * 2))
        done.touch()
    return open_views(path, count)


def cells_of(picks) -> specks.Cells:
    """Dense targets of some views."""
    columns = zip(*(specks.cells(made.plates, box, GRID) for made, box, _ in picks), strict=True)
    return specks.Cells(*(np.stack(c).astype(np.float32 if i > 3 else np.int32) for i, c in enumerate(columns)))


def dense_batch(views: Views, batch: int, step: int):
    """All four views of a few scenes."""
    few = batch // VIEWS
    picks = [views.pick(step * few + n // VIEWS, n % VIEWS) for n in range(batch)]
    return np.stack([image for *_, image in picks]), cells_of(picks)


def packed_batch(items, packer: specks.Packer, predictions: int, each: int | None, step: int):
    """Images and packed rows of (picks, row) items; a row shows its picks in order.

    each: rows hold a sample of the image tokens (`sparse_tokens`), which makes them short; None: all of them.
    """
    images = np.stack([np.stack([image for *_, image in picks]) for picks, _ in items])
    rows = []
    for number, (picks, row) in enumerate(items):
        shown, keep = picks[: row[0].count(None)], None
        if each is not None and shown:
            dense = [specks.cells(made.plates, box, GRID) for made, box, _ in shown]
            keep = np.concatenate([sparse_tokens(*targets[:4], each, number) for targets in dense])
        rows.append(packer.row(*row, keep=keep, hide=np.random.default_rng((SEED, 6, step, number))))
    return images, packer.stack(rows, predictions)


def sparse_tokens(color, shape, character, box, each: int, seed: int, others: int = 8) -> np.ndarray:
    """How many image tokens each stands for, 0 where it is left out.

    Of each plate at random `each` tokens (one, where there are many plates) that show its character and as many that do
    not, and `others` beside the plates.
    """
    rng, keep, solid = np.random.default_rng(seed), np.zeros(len(color)), color < len(COLORS)
    groups = np.unique(box[solid], axis=0)
    each = 1 if len(groups) > 12 else each
    for plate in groups:
        mine = solid & (box == plate).all(1)
        for group in (mine & (character >= 0), mine & (character < 0)):
            pick = rng.permutation(np.flatnonzero(group))[:each]
            keep[pick] = group.sum() / max(len(pick), 1)
    pick = rng.permutation(np.flatnonzero(~solid))[:others]
    keep[pick] = (~solid).sum() / max(len(pick), 1)
    return keep


def single_batch(views: Views, packer: specks.Packer, batch: int, step: int):
    """Rows of one view with many questions; each view of a batch from another scene."""
    items = []
    for number in range(step * batch, (step + 1) * batch):
        rng = np.random.default_rng((SEED + views.seed, 4, number))
        pick = views.pick(number, int(rng.integers(VIEWS)))
        items.append(([pick], specks.single(rng, *pick[:2], terse=0.7)))
    return packed_batch(items, packer, 200, 2, step)


def mixed_batch(views: Views, packer: specks.Packer, each: int | None, batch: int, step: int):
    """Rows of one view, of two views, and stepwise; where whole rows fit, some extract targets after examples."""
    items = []
    for number in range(step * batch, (step + 1) * batch):
        rng = np.random.default_rng((SEED + views.seed, 5, number))
        whole, crop = (views.pick(number, view) for view in (0, 1 + int(rng.integers(VIEWS - 1))))
        form = rng.random()
        if form < 0.06 and each is None:
            items.append(([whole, crop], specks.few_shot(rng, whole[0])))
        elif form < 0.4:
            first, second = (crop, whole) if rng.random() < 0.25 else (whole, crop)
            items.append(([first, second], specks.single(rng, *first[:2], terse=0.3)))
        elif form < 0.8:
            items.append(([whole, crop], specks.double(rng, whole[0], crop[1])))
        else:
            items.append(([crop, whole], specks.stepwise(rng, whole[0], crop[1])))
    return packed_batch(items, packer, 288, each, step)


def dense_step(config, words, tx, peak, params, opt_state, batch, progress):
    """Stage 1: the tower and the connector (and the embeddings they are aligned with)."""
    images, target = batch

    def loss_of(trained):
        features = llava.encode_images(trained.model, config, specks.normalise(images), backend="xla")
        return specks.dense_loss(trained, features, target, words)

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    rate = warmup_linear(progress, peak, 0.05)
    params = apply(params, updates, lambda path: rate)
    return params, opt_state, metrics | {"loss": loss, "loss#": 1.0}


def answer_step(config, words, floor, look, tx, peak, params, opt_state, batch, progress):
    """Stages 2 to 4: the decoder, on the image tokens that stage 1 has taught.

    look: weight of the scaffold (`specks.answer_loss`) at the beginning; it is gone when half of the stage is over.
    """
    look = look * jnp.clip(1 - 2 * progress, 0.0, 1.0)
    images, rows = batch
    count, each = images.shape[:2]
    pixels = specks.normalise(images).reshape(count * each, *images.shape[2:])
    features = llava.encode_images(params.model, config, pixels, backend="xla")
    features = features.reshape(count, each, *features.shape[1:])

    def loss_of(trained):
        return specks.answer_loss(trained, config, features, rows, words, look)

    return learn(loss_of, floor, tx, peak, params, opt_state, progress)


def learn(loss_of, floor, tx, peak, params, opt_state, progress):
    """A step of the decoder; its words move at a quarter's rate, the rest of what image tokens are made of stays."""
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    rate = warmup_linear(progress, peak, 0.03, floor)
    scale = {"vision": 0.0, "projector": 0.0, "heads": 0.0, "embed": 0.25}
    params = apply(params, updates, lambda path: rate * next((scale[p] for p in path if p in scale), 1.0))
    return params, opt_state, metrics | {"loss": loss, "loss#": 1.0}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--views", type=Path, help="folder for the rendered views (default: WORK)")
    parser.add_argument("--seed", type=int, default=0, help="of the first parameters and of the questions")
    parser.add_argument("--stages", default="1234", help="which stages to run; each goes on from the one before")
    parser.add_argument("--minutes", type=float, nargs=4, default=(26, 22, 9, 6), help="time budget of each stage")
    parser.add_argument("--steps", type=int, nargs=4, default=(100_000,) * 4, help="step budget of each stage")
    args = parser.parse_args()
    tokenizer = train_tokenizer()
    words = specks.Words.of(tokenizer)
    config = model_config(tokenizer.get_vocab_size(), tokenizer.token_to_id(IMAGE))
    images = {kind: rendered(args.views or args.work, kind) for kind in SCENES}
    packers = [specks.Packer(tokenizer, GRID * GRID, length) for length in (272, 400, 768)]
    asked, answer = Views(images, ASKED, args.seed), partial(answer_step, config, words)
    stages = (
        (("vision",), partial(dense_step, config, words), 3e-3, partial(dense_batch, Views(images, DENSE), 24)),
        (("decoder",), partial(answer, 0.4, 0.3), 3e-3, partial(single_batch, asked, packers[0], 24)),
        (("decoder",), partial(answer, 0.1, 0.0), 1.5e-3, partial(mixed_batch, asked, packers[1], 3, 16)),
        (("decoder",), partial(answer, 0.02, 0.0), 5e-4, partial(mixed_batch, asked, packers[2], None, 6)),
    )
    params = specks.initialise(config, words, jax.random.key(args.seed))
    for number, (stacks, step, peak, batches) in enumerate(stages, 1):
        folder = args.work / f"stage{number}"
        tx = optimizer(params, stacks)
        state = start(params, tx.init(params))
        if str(number) in args.stages:
            budget = {"steps": args.steps[number - 1], "seconds": 60 * args.minutes[number - 1]}
            state = fit(state, partial(step, tx, peak), batches, folder, **budget)
        else:
            state = restore(folder, state) or state
        params = specks.hand_over(state.params, words) if number == 1 else state.params


if __name__ == "__main__":
    main()
