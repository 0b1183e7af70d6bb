"""Convert a Hugging Face checkpoint to a jaxvqa folder.

SOURCE is a folder or a hub id of a Hugging Face checkpoint (both key layouts, the original liuhaotian layout with
its separate vision tower, or a LoRA adapter). OUT becomes an Orbax checkpoint with configuration, processor and
tokenizer beside it, which every command takes as --model.

Example: jaxvqa convert llava-hf/llava-1.5-7b-hf ./llava-1.5-7b --dtype bfloat16
"""

import argparse

from jaxvqa.cli.output import progress


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder or hub id of the checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as stored")
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch of the hub repository")
    parser.add_argument("--offline", action="store_true", help="use only what is already in the hub cache")
    parser.add_argument(
        "--from-pickle",
        action="store_true",
        help="read .bin/.pt weights with a restricted reader that builds tensors and runs nothing else",
    )
    parser.add_argument("--vision-tower", metavar="PATH", help="CLIP checkpoint of a liuhaotian-layout SOURCE")
    parser.add_argument("--base", metavar="PATH", help="base model of a LoRA adapter, where its config names none here")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    from jaxvqa.convert import convert

    progress(f"converting {args.source}")
    out = convert(
        args.source,
        args.out,
        dtype=args.dtype,
        revision=args.revision,
        offline=args.offline,
        from_pickle=args.from_pickle,
        vision_tower=args.vision_tower,
        base=args.base,
        overwrite=args.overwrite,
    )
    print(out)
    return 0
