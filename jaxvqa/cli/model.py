"""Which model a command runs: `--model` and what loading it takes; the bundled one by default."""

import argparse
from typing import TYPE_CHECKING

from jaxvqa.bundled import SPECKS_LLAVA

if TYPE_CHECKING:
    from jaxvqa.vlm import VLM


def model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=str(SPECKS_LLAVA),
        metavar="M",
        help="converted or Hugging Face folder, or hub id; default: bundled",
    )
    group.add_argument("--revision", metavar="REV", help="commit, tag or branch of the hub repository")
    group.add_argument("--offline", action="store_true", help="use only what is already in the hub cache")
    group.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the parameters; default: float32 on a CPU, bfloat16 elsewhere",
    )
    group.add_argument(
        "--attention", default="auto", metavar="BACKEND", help="see: jaxvqa doctor; default: %(default)s"
    )
    group.add_argument(
        "--image-setup",
        choices=("pad", "hf"),
        help="how images are made ready. pad: to a square, as the original LLaVA-1.5; hf: as transformers does. "
        "Default: pad for LLaVA-1.5, hf for others",
    )
    group.add_argument(
        "--chat-template",
        metavar="NAME",
        help="how questions are put, a name in jaxvqa.prompts.TEMPLATES; default: the checkpoint's own chat template "
        "(LLaVA-1.5, InstructBLIP: the papers')",
    )


def load_model(args: argparse.Namespace) -> "VLM":
    """The model that `model_arguments` describe."""
    import jaxvqa

    return jaxvqa.load(
        args.model,
        revision=args.revision,
        offline=args.offline,
        dtype=args.dtype,
        attention=args.attention,
        image_setup=args.image_setup,
        template=args.chat_template,
    )
