"""Writing a folder so that it is either complete or not there."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from jaxvqa.convert.errors import ConversionError

# What a processor is made of, as transformers names it.
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


@contextmanager
def publish(out: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and is removed when it does not."""
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise ConversionError(f"{out} is a file; expected a folder to write")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ConversionError(f"{out} exists and is not empty", remedy="choose another folder, or overwrite it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.incomplete-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            retired = temporary.with_name(temporary.name + "-old")
            out.rename(retired)
            temporary.rename(out)
            shutil.rmtree(retired)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# InstructBLIP has a second tokenizer, for what its Q-Former reads.
PROCESSOR_FOLDERS = ("", "qformer_tokenizer")


def copy_processor(source: Path, out: Path) -> None:
    """Copy the processor's and tokenizers' files (following the hub cache's links)."""
    for folder, name in product(PROCESSOR_FOLDERS, PROCESSOR_FILES):
        if (source / folder / name).exists():
            (out / folder).mkdir(exist_ok=True)
            shutil.copyfile(source / folder / name, out / folder / name)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
