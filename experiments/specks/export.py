"""Write a checkpoint of train.py as a Hugging Face folder.

python experiments/specks/export.py --work WORK --stage 3 --out jaxvqa/assets/specks-llava
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from train import model_config
from transformers import CLIPImageProcessor, GenerationConfig, LlavaProcessor, PreTrainedTokenizerFast

from jaxvqa.convert import export_hf
from jaxvqa.specks.tokenizer import BOS, EOS, IMAGE, UNK, train_tokenizer
from jaxvqa.training import specks
from jaxvqa.training.loop import restore, start
from jaxvqa.training.optimizer import optimizer


def write(config, model, tokenizer, kind, images, out: Path) -> None:
    """Write a model as a Hugging Face folder, weights in bfloat16.

    kind, images: transformers' class of the processor, and the image processor for it.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=config.decoder.max_length,
        clean_up_tokenization_spaces=False,
    )
    processor = kind(
        images,
        fast,
        patch_size=config.vision.patch_size,
        vision_feature_select_strategy=config.select,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    ids = {f"{name}_token_id": tokenizer.token_to_id(t) for name, t in (("bos", BOS), ("eos", EOS), ("pad", UNK))}
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        images.save_pretrained(folder)
        GenerationConfig(**ids, max_new_tokens=64, do_sample=False).save_pretrained(folder)
        stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
        export_hf(config, stored, out, processor_folder=folder, overwrite=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = train_tokenizer()
    config = model_config(tokenizer.get_vocab_size(), tokenizer.token_to_id(IMAGE))
    params = specks.initialise(config, specks.Words.of(tokenizer), jax.random.key(0))
    tx = optimizer(params, ("vision",) if args.stage == 1 else ("decoder",))
    state = restore(args.work / f"stage{args.stage}", start(params, tx.init(params)))
    if state is None:
        raise SystemExit(f"no checkpoint of stage {args.stage} in {args.work}")
    side = config.vision.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    write(config, state.params.model, tokenizer, LlavaProcessor, images, args.out)
    print(f"step {int(state.step)} after {float(state.seconds):.0f} s -> {args.out}")


if __name__ == "__main__":
    main()
