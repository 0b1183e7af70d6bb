"""Checkpoints in and out: Hugging Face folders and hub ids -> jaxvqa parameters, converted folders, and back.

config, params, folder = jaxvqa.convert.load("llava-hf/llava-1.5-7b-hf")
jaxvqa.convert.convert("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b")          # Orbax, loads like the source
jaxvqa.convert.export_hf(config, params, "out", processor_folder=folder)    # a folder that transformers loads
"""

import os
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxvqa import sharding
from jaxvqa.convert import converted
from jaxvqa.convert.checkpoint import open_checkpoint
from jaxvqa.convert.converted import convert
from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.export import export_hf
from jaxvqa.convert.families import Config, Params, tables_of
from jaxvqa.convert.source import resolve
from jaxvqa.convert.tables import as_dtype


def load(
    source: str | os.PathLike[str],
    revision: str | None = None,
    dtype: DTypeLike | None = "bfloat16",
    mesh: Mesh | None = None,
    offline: bool = False,
    *,
    vision_tower: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> tuple[Config, Params, Path]:
    """Read a model: (config, parameters, folder from which transformers loads the processor).

    source: a Hugging Face folder or hub id (at `revision`; `offline`: from the cache only), a folder that `convert`
        wrote, an original LLaVA folder, or a LoRA adapter, which is merged.
    dtype: of the parameters; None keeps each as stored.
    mesh: lay the parameters out over it; each process then reads its own shards only.
    vision_tower: CLIP folder or hub id of an original LLaVA folder, instead of the one that its config names.
    base: base model of an adapter, likewise.
    Raises `ConversionError` (a `ValueError`) that lists everything wrong with the checkpoint.
    """
    dtype, folder = as_dtype(dtype), Path(source).expanduser()
    if converted.is_converted(folder):
        return converted.load(folder, dtype, mesh)
    checkpoint = open_checkpoint(source, revision=revision, offline=offline, vision_tower=vision_tower, base=base)
    placed = None if mesh is None else sharding.shardings(tables_of(checkpoint.config).specs(checkpoint.config), mesh)
    return checkpoint.config, checkpoint.read(dtype, placed), checkpoint.processor()


__all__ = ["ConversionError", "convert", "export_hf", "load", "open_checkpoint", "resolve"]
