"""A reader of torch's .bin/.pt weights that never imports torch and never runs what a pickle names.

A torch file is a zip: `*/data.pkl` says how the tensors are built from storages, `*/data/<key>` holds the storages,
not compressed. The pickle may name OrderedDict, torch's storage types and `torch._utils._rebuild_tensor_v2`, which are
replaced by descriptions; anything else is refused by name. Storages are mapped, so a slice reads its own bytes only.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.tensors import FLOATS

STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""torch's storage types, by the safetensors name of their dtype."""


@dataclass(frozen=True)
class PickledTensor:
    """A strided view of a storage, `offset` elements into it."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    start: int
    """Byte of the file at which the storage begins."""
    numel: int
    """Elements of the storage."""
    offset: int
    strides: tuple[int, ...]

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        dtype = FLOATS[self.dtype]
        storage = np.memmap(self.path, dtype, mode="r", offset=self.start, shape=(self.numel,))
        strides = tuple(s * dtype.itemsize for s in self.strides)
        view = np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, strides, writeable=False)
        return np.asarray(view[index])


def pickled_tensors(path: Path) -> Iterator[PickledTensor]:
    """The tensors of a torch file that holds a dictionary of tensors; `ConversionError` for any other content."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as e:
        raise ConversionError(
            f"{path}: not a torch file in zip form ({e})", remedy="save it again with torch >= 1.6, or as safetensors"
        ) from e
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        programs = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(programs) != 1:
            raise ConversionError(f"{path}: found {len(programs)} files data.pkl, expected one")
        root = programs[0].removesuffix("data.pkl")
        if root + "byteorder" in members and archive.read(root + "byteorder") != b"little":
            raise ConversionError(f"{path}: weights are not little-endian")
        state = _unpickle(path, archive.read(programs[0]))
        for name, tensor in state.items():
            yield _checked(path, name, tensor, members.get(f"{root}data/{tensor.storage.key}"))


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _View:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Rebuild:
    """Stands for `torch._utils._rebuild_tensor_v2`. An instance without a dict: a pickle cannot set anything on it."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> _View:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        integers = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
        if not integers or len(shape) != len(strides):
            raise pickle.UnpicklingError(f"a tensor with offset {offset}, shape {shape}, strides {strides}")
        return _View(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise ConversionError(
            f"the pickle names {module}.{name}; only OrderedDict, tensors and storages are allowed in weights",
            remedy="do not trust this file, or save plain weights as safetensors where it was made",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or dtype not in STORAGES.values() or type(key) is not str or type(numel) is not int:
            raise pickle.UnpicklingError(f"a reference to {pid!r}, expected a storage")
        return _Storage(dtype, key, numel)


def _unpickle(path: Path, program: bytes) -> dict[str, _View]:
    try:
        state = _Unpickler(io.BytesIO(program)).load()
    except ConversionError as e:
        raise ConversionError(f"{path}: {e}") from None
    except Exception as e:  # whatever a malformed or hostile program provokes is one fault: this file
        raise ConversionError(f"{path}: not a dictionary of tensors ({type(e).__name__}: {e})") from e
    if not isinstance(state, dict) or not all(type(k) is str and isinstance(v, _View) for k, v in dict.items(state)):
        raise ConversionError(f"{path}: not a dictionary of tensors", remedy="save the model's state_dict() alone")
    return dict(dict.items(state))


def _checked(path: Path, name: str, view: _View, member: zipfile.ZipInfo | None) -> PickledTensor:
    """A tensor whose every element lies inside its storage, and its storage inside the file."""
    storage = view.storage
    if member is None:
        raise ConversionError(f"{path}: {name}: storage {storage.key!r} is not in the file")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ConversionError(f"{path}: {name}: storage {storage.key!r} is compressed, expected it stored as it is")
    empty = 0 in view.shape
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    itemsize = FLOATS[storage.dtype].itemsize if storage.dtype in FLOATS else 1
    if (not empty and last >= storage.numel) or storage.numel * itemsize > member.file_size:
        raise ConversionError(f"{path}: {name}: shape {view.shape} reaches beyond its storage of {storage.numel}")
    with path.open("rb") as f:  # the local header repeats the name, with an extra field of its own
        f.seek(member.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", f.read(4))
    start = member.header_offset + 30 + name_length + extra_length
    return PickledTensor(
        name, path.name, view.shape, storage.dtype, path, start, storage.numel, view.offset, view.strides
    )
