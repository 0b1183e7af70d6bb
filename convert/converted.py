"""Converted folders: an Orbax checkpoint with config, processor and tokenizer beside it.

params/         Orbax; one flat dictionary, path in the parameter tree -> array
jaxvqa.json     format version, source, dtype; written last
config.json, tokenizer and processor files   as transformers has them
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxvqa import sharding
from jaxvqa.convert.checkpoint import open_checkpoint
from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.families import Config, Params, tables_of
from jaxvqa.convert.files import copy_processor, publish, write_json
from jaxvqa.convert.tables import as_dtype, flatten, leaves, unflatten
from jaxvqa.convert.tensors import read_json
from jaxvqa.models import config_from_hf

FORMAT = 1
"""Version of the layout of converted folders."""


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    offline: bool = False,
    from_pickle: bool = False,
    vision_tower: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint (see `load`) to the folder `out`, which `load` reads; returns `out`.

    dtype: None keeps each parameter as stored. from_pickle: read .bin weights with the restricted reader. An existing,
    non-empty `out` is refused unless `overwrite`. The folder appears under its name only when it is complete.
    """
    dtype = as_dtype(dtype)
    checkpoint = open_checkpoint(
        source, revision=revision, offline=offline, from_pickle=from_pickle, vision_tower=vision_tower, base=base
    )
    with publish(out, overwrite) as folder:
        params = flatten(checkpoint.read(dtype))
        _save(folder / "params", params)
        copy_processor(checkpoint.processor(), folder)
        write_json(folder / "config.json", checkpoint.hf_config)
        dtypes = sorted({str(x.dtype) for x in params.values()})
        about = {"format": FORMAT, "source": os.fspath(source), "revision": revision, "dtype": dtypes}
        write_json(folder / "jaxvqa.json", about)
    return Path(out)


def is_converted(folder: Path) -> bool:
    """Whether `convert` wrote the folder (or began to)."""
    return (folder / "jaxvqa.json").exists() or (folder / "params").is_dir()


def load(folder: Path, dtype: np.dtype | None, mesh: Mesh | None) -> tuple[Config, Params, Path]:
    """Read a converted folder; see `jaxvqa.convert.load`."""
    import orbax.checkpoint as ocp

    needed = ("jaxvqa.json", "config.json", "params/_METADATA")
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise ConversionError(
            f"{folder}: an incomplete converted folder, {', '.join(missing)} missing", remedy="convert the source again"
        )
    version = read_json(folder / "jaxvqa.json").get("format")
    if version != FORMAT:
        raise ConversionError(
            f"{folder}: format version {version!r}, expected {FORMAT}",
            remedy="convert the source again with this version of jaxvqa",
        )
    config: Config = config_from_hf(read_json(folder / "config.json"))
    specs = tables_of(config).specs(config)
    declared = leaves(specs)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata((folder / "params").absolute()).item_metadata.tree
        if faults := _misfits(declared, stored):
            raise ConversionError(f"{folder}: params do not fit config.json", faults, remedy="convert the source again")
        if mesh is None:
            device = SingleDeviceSharding(jax.local_devices()[0])
            placed = dict.fromkeys(declared, device)
        else:
            placed = flatten(sharding.shardings(specs, mesh))
        wanted = {
            path: jax.ShapeDtypeStruct(spec.shape, dtype or stored[path].dtype, sharding=placed[path])
            for path, spec in declared.items()
        }
        values = checkpointer.restore((folder / "params").absolute(), wanted)
    # What is stored is finite: `convert` saw to it. A cast to a dtype of smaller range may not be.
    smaller = [path for path in declared if jnp.finfo(values[path]).max < jnp.finfo(stored[path].dtype).max]
    finite = jax.jit(lambda xs: [jnp.isfinite(x).all() for x in xs])([values[path] for path in smaller])
    if bad := [path for path, ok in zip(smaller, finite, strict=True) if not ok]:
        raise ConversionError(
            f"{folder}: {len(bad)} parameters are not finite as {dtype}",
            [f"{path}: found infinite values, expected finite weights" for path in bad],
            remedy="choose bfloat16 or float32",
        )
    return config, unflatten(specs, values), folder


def _misfits(declared: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    faults = [f"missing: {p}: found none, expected {list(s.shape)}" for p, s in declared.items() if p not in stored]
    faults += [f"unknown: {p}: found {list(stored[p].shape)}, expected none" for p in stored if p not in declared]
    for path in declared.keys() & stored.keys():
        found, shape = tuple(stored[path].shape), declared[path].shape
        if found != shape:
            faults.append(f"misshapen: {path}: found {list(found)}, expected {list(shape)}")
    return faults


def _save(folder: Path, params: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), params)
