"""The tensors of a checkpoint folder, opened but not read: shapes and dtypes from the headers, bytes on demand."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxvqa.convert.errors import ConversionError

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Weights that can be read, by their safetensors name."""


@runtime_checkable
class Tensor(Protocol):
    """One tensor on disk. `dtype` is its safetensors name; only those in `FLOATS` can be read."""

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The values at `index` (one slice with non-negative bounds and step 1 per axis); reads no other bytes."""
        ...


@dataclass(frozen=True)
class SafeTensor:
    """A tensor of a safetensors file, which stays mapped as long as this lives."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    handle: Any

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.handle.get_slice(self.name)[index]


def safe_tensors(path: Path) -> Iterator[SafeTensor]:
    """The tensors of one safetensors file."""
    try:
        handle = safe_open(path, framework="np")
    except (SafetensorError, OSError) as e:
        raise ConversionError(f"{path}: not a complete safetensors file ({e})", remedy="fetch it again") from e
    for name in handle.keys():
        view = handle.get_slice(name)
        yield SafeTensor(name, path.name, tuple(view.get_shape()), view.get_dtype(), handle)


def folder_tensors(folder: Path, from_pickle: bool, command: str) -> tuple[list[Tensor], list[str]]:
    """All tensors of the folder's weight files and what is wrong with its index: (tensors, faults).

    The weights are `model.safetensors`, or the shards that `model.safetensors.index.json` names (in this order, as in
    transformers); with `from_pickle`, where there are none, `pytorch_model.bin` or its shards. Without it these are
    refused, and `command` is named.
    """
    if (folder / "model.safetensors").exists():
        return [*safe_tensors(folder / "model.safetensors")], []
    if (folder / "model.safetensors.index.json").exists():
        return _sharded(folder, folder / "model.safetensors.index.json", safe_tensors)
    found = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if not found:
        raise ConversionError(
            f"{folder}: no weights; expected model.safetensors, or model.safetensors.index.json and its shards",
            remedy="fetch the checkpoint again",
        )
    if not from_pickle:
        raise refused_pickle(folder, found, command)

    from jaxvqa.convert.pickled import pickled_tensors

    if (folder / "pytorch_model.bin.index.json").exists():
        return _sharded(folder, folder / "pytorch_model.bin.index.json", pickled_tensors)
    if (folder / "pytorch_model.bin").exists():
        return [*pickled_tensors(folder / "pytorch_model.bin")], []
    raise ConversionError(f"{folder}: pickled weights {', '.join(found)}; expected pytorch_model.bin, or its index")


def refused_pickle(folder: Path, files: list[str], command: str) -> ConversionError:
    """The error that says how pickled weights can be read after all."""
    return ConversionError(
        f"{folder}: weights are pickled ({', '.join(files)}); a pickle can run code, so only safetensors are read",
        remedy=f"convert them with the restricted reader: {command}",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; `ConversionError` if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ConversionError(f"{path}: cannot be read as JSON ({e})") from e
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    return value


def _sharded(folder: Path, index: Path, read_file) -> tuple[list[Tensor], list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: no `weight_map`; expected tensor name -> shard")
    tensors: list[Tensor] = []
    faults: list[str] = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            faults.append(f"index: shard {file!r} lies outside the folder")
        elif not (folder / file).exists():
            count = sum(f == file for f in weight_map.values())
            faults.append(f"index: shard {file} does not exist; expected with {count} tensors")
        else:
            tensors += read_file(folder / file)
    held = {(t.name, t.file) for t in tensors}
    missing_files = {f for f in weight_map.values() if not (folder / f).exists()}
    for name, file in weight_map.items():
        if file not in missing_files and (name, file) not in held:
            faults.append(f"index: {name}: found no such tensor in {file}, where the index expects it")
    for name, file in sorted(held):
        if weight_map.get(name) != file:
            says = f"expects it in {weight_map[name]}" if name in weight_map else "does not name it"
            faults.append(f"index: {name}: found in {file}, but the index {says}")
    return tensors, faults
