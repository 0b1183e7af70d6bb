"""Train the bundled image-text matcher on Specks: python experiments/specks/train_itm.py --work /tmp/specks

The tower first learns what each image token shows (from the tower of train.py's first stage, where there is one), then
the text side learns to tell texts that match a view from others, with the tower as it is. Both stages can be
interrupted and restarted. The result goes to WORK/itm/specks-blip, an ordinary Hugging Face folder, and is evaluated on
held-out scenes; `--minutes 0` exports and evaluates what there is.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from evaluate_itm import evaluate
from tokenizers import Tokenizer
from train import ASKED, DENSE, GRID, SCENES, SEED, Views, dense_batch, model_config, rendered
from transformers import BertTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from jaxvqa.convert import export_hf
from jaxvqa.matcher import load_matcher
from jaxvqa.models import blip_itm
from jaxvqa.models.blip_itm import BlipItm, BlipItmConfig, BlipTextConfig
from jaxvqa.specks.tokenizer import IMAGE, train_tokenizer
from jaxvqa.specks.views import VIEWS
from jaxvqa.training import itm, specks
from jaxvqa.training.loop import fit, restore, start
from jaxvqa.training.optimizer import apply, optimizer, warmup_linear
from jaxvqa.vision.clip import Clip, ClipConfig

BATCH, TOKENS, TEXTS = 24, 144, 16
"""Views of a batch; tokens and texts of a row."""
DENSE_SHARE = 0.35
"""Of the time, for the tower."""
LOOK = 0.3
"""Weight of the scaffold for the attention, which is gone half way."""
MAX_LENGTH = 64


def blip_config(vocab_size: int) -> BlipItmConfig:
    """The bundled matcher: ViT 4 x 192 at 128 px, BERT 3 x 192 with cross-attention."""
    return BlipItmConfig(
        vision=ClipConfig(128, 8, 192, 512, 4, 3, 1e-5, "quick_gelu"),
        text=BlipTextConfig(3, 192, 512, 3, vocab_size, MAX_LENGTH, 1e-12, "gelu"),
        projection_width=32,
    )


def text_batch(views: Views, encode, batch: int, step: int):
    """Views, half of them whole scenes, each with many texts."""
    images, rows = [], []
    for number in range(step * batch, (step + 1) * batch):
        rng = np.random.default_rng((SEED, 7, number))
        view = int(rng.integers(1, VIEWS)) if rng.random() < 0.5 else 0
        scene, box, image = views.pick(number, view)
        images.append(image)
        rows.append(itm.texts(rng, scene, box, TEXTS, GRID))
    return np.stack(images), itm.pack(rows, encode, TOKENS, TEXTS, GRID * GRID)


def dense_step(config, words, tx, peak, params, opt_state, batch, progress):
    """Stage 1: the tower, and the embeddings of the words that it is aligned with."""
    images, target = batch

    def loss_of(params):
        image = blip_itm.encode_images(params, config, specks.normalise(images), backend="xla")
        return itm.dense_loss(params, image, target, words)

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    rate = warmup_linear(progress, peak, 0.05)
    params = apply(params, updates, lambda path: rate if {"vision", "embed"} & {*path} else 0.0)
    return params, opt_state, metrics | {"loss": loss, "loss#": 1.0}


def match_step(config, tx, peak, params, opt_state, batch, progress):
    """Stage 2: the text side, on the image tokens that stage 1 has taught."""
    images, rows = batch
    image = blip_itm.encode_images(params, config, specks.normalise(images), backend="xla")
    scaffold = LOOK * jnp.maximum(0.0, 1 - 2 * progress)
    loss_of = partial(itm.match_loss, config=config, image=image, rows=rows, look_share=scaffold)
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    rate = warmup_linear(progress, peak, 0.03)
    scale = {"vision": 0.0, "embed": 0.25}
    params = apply(params, updates, lambda path: rate * next((scale[p] for p in path if p in scale), 1.0))
    return params, opt_state, metrics | {"loss": loss, "loss#": 1.0}


def llava_tower(folder: Path, wanted: ClipConfig) -> Clip | None:
    """The CLIP tower of the first stage of train.py, from its latest checkpoint; None where there is none."""
    tokenizer = train_tokenizer()
    config = model_config(tokenizer.get_vocab_size(), tokenizer.token_to_id(IMAGE))
    if config.vision != wanted:
        raise SystemExit(f"the tower of train.py is {config.vision}, the matcher's is {wanted}")
    params = specks.initialise(config, specks.Words.of(tokenizer), jax.random.key(0))
    state = restore(folder, start(params, optimizer(params, ("vision",)).init(params)))
    return None if state is None else state.params.model.vision


def export(config: BlipItmConfig, params: BlipItm, tokenizer: Tokenizer, out: Path) -> None:
    """Write a Hugging Face folder in bf16."""
    side = config.vision.image_size
    with tempfile.TemporaryDirectory() as folder:
        BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=MAX_LENGTH).save_pretrained(folder)
        BlipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        export_hf(config, half, out, processor_folder=folder, overwrite=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for views, checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=18, help="time budget of both stages together")
    parser.add_argument("--steps", type=int, default=100_000, help="step budget of each stage")
    parser.add_argument("--tower", type=Path, help="first stage of train.py to start from (default: WORK/stage1)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes of the evaluation; 0 leaves it out")
    args = parser.parse_args()
    tokenizer = itm.make_tokenizer()
    words, encode = itm.class_words(tokenizer), itm.encoder(tokenizer)
    config = blip_config(tokenizer.get_vocab_size())
    images = {kind: rendered(args.work, kind) for kind in SCENES}
    dense = partial(dense_batch, Views(images, DENSE), BATCH)
    params = itm.initialise(config, jax.random.key(args.seed))
    out = args.work / "itm"
    source = args.tower or args.work / "stage1"
    tower = llava_tower(source, config.vision)
    if tower is None and args.tower:
        raise SystemExit(f"{args.tower}: no checkpoint of the first stage of train.py")
    print(f"tower: {'from random' if tower is None else source}")
    if tower is not None:
        params = replace(params, vision=itm.from_clip(tower, config.vision, specks.normalise(dense(0)[0])))
    stages = (
        (("vision",), partial(dense_step, config, words), 2e-3, dense, DENSE_SHARE),
        (("text",), partial(match_step, config), 3e-3, partial(text_batch, Views(images, ASKED), encode, BATCH), 1.0),
    )
    minutes = args.minutes
    for number, (stacks, step, peak, batches, share) in enumerate(stages, 1):
        tx = optimizer(params, stacks)
        budget = {"steps": args.steps, "seconds": 60 * share * minutes}
        state = fit(start(params, tx.init(params)), partial(step, tx, peak), batches, out / f"stage{number}", **budget)
        params, minutes = state.params, minutes - share * minutes
    export(config, params, tokenizer, out / "specks-blip")
    size = (out / "specks-blip" / "model.safetensors").stat().st_size
    print(f"{int(state.step)} steps of matching -> {out / 'specks-blip'} ({size / 1e6:.1f} MB)")
    if args.scenes:
        result = evaluate(load_matcher(out / "specks-blip"), args.scenes)
        (out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
