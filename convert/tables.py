"""Tables from checkpoint names to parameters, and what reads a parameter tree by them.

A family's table maps a tensor's name, with `{i}` for the layer, to (path in our parameter tree, transform). The shapes
that a checkpoint must have follow from the model's own declaration (`ArraySpec`) through the transform. A leaf whose
pattern has `{i}` is stacked: axis 0 is the layer.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from tqdm import tqdm

from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.tensors import FLOATS, Tensor
from jaxvqa.sharding import ArraySpec

Shape = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]  # (start, stop) per axis


@dataclass(frozen=True)
class Transform:
    """How a checkpoint's tensor becomes ours: split one axis into (heads, head size), then permute the axes.

    Any slice of ours can be read without reading more of theirs: the slices of the axes are permuted back, and those of
    the split axis are joined to runs.
    """

    name: str
    permutation: tuple[int, ...] | None = None
    """Axes of the split tensor in our order; None leaves them."""
    split: int | None = None

    def source_shape(self, shape: Shape) -> Shape:
        """Shape in the checkpoint of what has `shape` here."""
        split = self._unpermuted(shape)
        a = self.split
        return split if a is None else (*split[:a], split[a] * split[a + 1], *split[a + 2 :])

    def forward(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """A whole tensor of the checkpoint -> ours, of `shape`."""
        return array.reshape(self._unpermuted(shape)).transpose(self._order(len(shape)))

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Ours -> the checkpoint's."""
        return array.transpose(np.argsort(self._order(array.ndim))).reshape(self.source_shape(array.shape))

    def read(self, read: Callable[[tuple[slice, ...]], np.ndarray], shape: Shape, bounds: Bounds) -> np.ndarray:
        """The part `bounds` of ours, whose whole has `shape`; `read` reads slices of the checkpoint's tensor."""
        window = self._unpermuted(bounds)
        sizes = [stop - start for start, stop in window]
        slices = [slice(*b) for b in window]
        a = self.split
        if a is None:
            return read(tuple(slices)).transpose(self._order(len(shape)))
        heads, (start, stop) = range(*window[a]), window[a + 1]
        H = self._unpermuted(shape)[a + 1]
        if stop - start == H:
            runs = [slice(heads.start * H, heads.stop * H)]
        else:
            runs = [slice(n * H + start, n * H + stop) for n in heads]
        parts = [read((*slices[:a], run, *slices[a + 2 :])) for run in runs]
        return np.concatenate(parts, axis=a).reshape(sizes).transpose(self._order(len(shape)))

    def _order(self, rank: int) -> tuple[int, ...]:
        return tuple(range(rank)) if self.permutation is None else self.permutation

    def _unpermuted(self, ours: tuple) -> tuple:
        return tuple(ours[j] for j in np.argsort(self._order(len(ours))))


as_is = Transform("as_is")
transpose = Transform("transpose", (1, 0))  # [out, in] -> [in, out]
heads_out = Transform("heads_out", (2, 0, 1), split=0)  # [N*H, D] -> [D, N, H]
heads_in = Transform("heads_in", (1, 2, 0), split=1)  # [D, N*H] -> [N, H, D]
heads_bias = Transform("heads_bias", split=0)  # [N*H] -> [N, H]
conv = Transform("conv", (1, 2, 3, 0))  # [D, 3, p, p] -> [3, p, p, D]
conv3d = Transform("conv3d", (1, 2, 3, 4, 0))  # [D, 3, t, p, p] -> [3, t, p, p, D]

Table = Mapping[str, tuple[str, Transform]]


def decoder_table(model: str, head: str) -> Table:
    """Of every decoder: `model` stands before the names of its tensors, `head` is the output head's.

    Those that a config does not have (biases, norms of queries and keys, a tied head) are not looked for.
    """
    layer = model + "layers.{i}."
    return {
        model + "embed_tokens.weight": ("decoder.embed", as_is),
        layer + "input_layernorm.weight": ("decoder.layers.attn_norm", as_is),
        layer + "self_attn.q_proj.weight": ("decoder.layers.q_proj", heads_out),
        layer + "self_attn.q_proj.bias": ("decoder.layers.q_bias", heads_bias),
        layer + "self_attn.q_norm.weight": ("decoder.layers.q_norm", as_is),
        layer + "self_attn.k_proj.weight": ("decoder.layers.k_proj", heads_out),
        layer + "self_attn.k_proj.bias": ("decoder.layers.k_bias", heads_bias),
        layer + "self_attn.k_norm.weight": ("decoder.layers.k_norm", as_is),
        layer + "self_attn.v_proj.weight": ("decoder.layers.v_proj", heads_out),
        layer + "self_attn.v_proj.bias": ("decoder.layers.v_bias", heads_bias),
        layer + "self_attn.o_proj.weight": ("decoder.layers.o_proj", heads_in),
        layer + "post_attention_layernorm.weight": ("decoder.layers.mlp_norm", as_is),
        layer + "mlp.gate_proj.weight": ("decoder.layers.gate_proj", transpose),
        layer + "mlp.up_proj.weight": ("decoder.layers.up_proj", transpose),
        layer + "mlp.down_proj.weight": ("decoder.layers.down_proj", transpose),
        model + "norm.weight": ("decoder.norm", as_is),
        head: ("decoder.lm_head", transpose),
    }


@dataclass(frozen=True)
class Naming:
    """How a layout's names become the table's: prefixes to replace (first match), and what is left unread, with why."""

    prefixes: tuple[tuple[str, str], ...]
    unread: Mapping[str, str]

    def canonical(self, name: str) -> str | None:
        """The table's name of `name`; None if it is known and deliberately not read."""
        for theirs, ours in self.prefixes:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        return None if any(fnmatchcase(name, pattern) for pattern in self.unread) else name


Fused = Mapping[str, tuple[str, ...]]
"""What stands in the name of a tensor that is several of the table's, stacked along axis 0 -> what stands in theirs."""


@dataclass(frozen=True)
class Part:
    """Part `number` of the `count` equal ones of a tensor along axis 0."""

    whole: Tensor
    number: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.whole.name} (part {self.number + 1} of {self.count})"

    @property
    def file(self) -> str:
        return self.whole.file

    @property
    def shape(self) -> Shape:
        rows, *rest = self.whole.shape
        return rows // self.count, *rest

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        first, *rest = index
        at = self.number * self.shape[0]
        return self.whole.read((slice(at + first.start, at + first.stop), *rest))


def split_fused(tensors: Iterable[tuple[str, Tensor]], fused: Fused) -> list[tuple[str, Tensor]]:
    """Named tensors, the fused ones replaced by their parts."""
    split: list[tuple[str, Tensor]] = []
    for name, tensor in tensors:
        whole = next((w for w in fused if w in name), None)
        if whole is None or not tensor.shape:
            split.append((name, tensor))
            continue
        parts = fused[whole]
        split += [(name.replace(whole, part), Part(tensor, i, len(parts))) for i, part in enumerate(parts)]
    return split


def join_fused(tensors: Mapping[str, np.ndarray], fused: Fused) -> dict[str, np.ndarray]:
    """The inverse: the parts, by the table's names, become the tensors of the checkpoint."""
    joined: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        whole, parts = next(((w, p) for w, p in fused.items() if any(part in name for part in p)), ("", ()))
        if not parts:
            joined[name] = tensor
        elif parts[0] in name:
            joined[name.replace(parts[0], whole)] = np.concatenate(
                [tensors[name.replace(parts[0], part)] for part in parts]
            )
    return joined


@dataclass(frozen=True)
class Leaf:
    """One parameter and the checkpoint's tensors that it is made of: one, or one per layer."""

    path: str
    shape: Shape
    transform: Transform
    tensors: tuple[Tensor, ...]
    stacked: bool

    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds what is stored."""
        return np.dtype(jax.numpy.result_type(*(FLOATS[t.dtype] for t in self.tensors)))


def as_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """`dtype` if weights can have it."""
    if dtype is None:
        return None
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in FLOATS.values():
        raise ConversionError(f"dtype {dtype!r}: expected {', '.join(d.name for d in FLOATS.values())}")
    return found


def leaves(specs: Any) -> dict[str, ArraySpec]:
    """The declared parameters by path, e.g. `decoder.layers.q_proj`."""
    return flatten(specs, lambda x: isinstance(x, ArraySpec))


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a parameter tree by path."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}


def unflatten(specs: Any, values: Mapping[str, Any]) -> Any:
    """The tree of `specs` with `values` by path."""
    treedef = jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, ArraySpec))
    return treedef.unflatten([values[path] for path in leaves(specs)])


def expected_names(table: Table, specs: Any) -> dict[str, tuple[str, Shape]]:
    """Every tensor that the parameters `specs` are made of: name -> (path, shape in the checkpoint)."""
    expected = {}
    declared = leaves(specs)
    for pattern, (path, transform) in table.items():
        if path in declared:
            shape = declared[path].shape
            if "{i}" in pattern:
                theirs = transform.source_shape(shape[1:])
                expected |= {pattern.replace("{i}", str(i)): (path, theirs) for i in range(shape[0])}
            else:
                expected[pattern] = (path, transform.source_shape(shape))
    if missing := declared.keys() - {path for path, _ in expected.values()}:
        raise AssertionError(f"the table has no tensors for {sorted(missing)}")
    return expected


def plan(tensors: Iterable[tuple[str, Tensor]], table: Table, specs: Any) -> tuple[list[Leaf], list[str]]:
    """Match tensors, by the table's names, with the declared parameters: (leaves, faults).

    Faults: unknown, missing, duplicate and misshapen tensors and dtypes that are no weights. With faults the leaves are
    incomplete.
    """
    expected = expected_names(table, specs)
    found: dict[str, Tensor] = {}
    faults = []
    for name, tensor in tensors:
        what = f"{tensor.name}: found {list(tensor.shape)} {tensor.dtype} in {tensor.file}"
        if name not in expected:
            faults.append(f"unknown: {what}, expected no such tensor")
            continue
        if name in found:
            other = found[name]
            faults.append(f"duplicate: {what}, expected once (also {other.name} in {other.file})")
            continue
        found[name] = tensor
        path, shape = expected[name]
        if tensor.shape != shape:
            faults.append(f"misshapen: {what}, expected {list(shape)} (for {path})")
        if tensor.dtype not in FLOATS:
            faults.append(f"dtype: {what}, expected {', '.join(FLOATS)}")
    for name, (path, shape) in expected.items():
        if name not in found:
            faults.append(f"missing: {name}: found none, expected {list(shape)} (for {path})")
    if faults:
        return [], faults

    declared, planned = leaves(specs), []
    for pattern, (path, transform) in table.items():
        if path in declared:
            shape, stacked = declared[path].shape, "{i}" in pattern
            names = [pattern.replace("{i}", str(i)) for i in range(shape[0])] if stacked else [pattern]
            planned.append(Leaf(path, shape, transform, tuple(found[n] for n in names), stacked))
    return planned, []


def read_params(planned: list[Leaf], specs: Any, dtype: np.dtype | None = None, shardings: Any = None) -> Any:
    """Read the parameter tree of `specs`, cast to `dtype` (None: as stored), laid out by the tree `shardings`.

    Each process reads the bytes of its own shards only, each of them once. Raises `ConversionError` with all tensors
    that hold NaN or infinite values, or that overflow `dtype`.
    """
    placed = flatten(shardings) if shardings is not None else {}
    default = SingleDeviceSharding(jax.local_devices()[0])
    dtypes = {leaf.path: leaf.dtype() if dtype is None else dtype for leaf in planned}
    total = sum(math.prod(leaf.shape) * dtypes[leaf.path].itemsize for leaf in planned)
    bar = tqdm(total=total, desc="reading weights", unit="B", unit_scale=True, delay=2, leave=False)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reader = _Reader(pool, bar, {})
        values = {leaf.path: reader.leaf(leaf, dtypes[leaf.path], placed.get(leaf.path, default)) for leaf in planned}
    if reader.bad:
        raise ConversionError(
            f"{len(reader.bad)} tensors hold values that are not finite",
            [f"{name}: {what}" for name, what in sorted(reader.bad.items())],
            remedy="fetch the checkpoint again; for an overflow choose bfloat16 or float32",
        )
    return unflatten(specs, values)


@dataclass(frozen=True)
class _Reader:
    pool: Executor
    """Reads the layers of a leaf side by side."""
    bar: tqdm
    bad: dict[str, str]
    """Tensor -> what is wrong with its values."""

    def leaf(self, leaf: Leaf, dtype: np.dtype, sharding: Sharding) -> jax.Array:
        blocks: dict[Bounds, np.ndarray] = {}  # devices may hold the same slice; the callback runs once for each

        def block(index: Any) -> np.ndarray:
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
            if bounds not in blocks:
                blocks[bounds] = self.block(leaf, bounds, dtype)
            return blocks[bounds]

        return jax.make_array_from_callback(leaf.shape, sharding, block)

    def block(self, leaf: Leaf, bounds: Bounds, dtype: np.dtype) -> np.ndarray:
        out = np.empty([stop - start for start, stop in bounds], dtype)
        if not leaf.stacked:
            self.tensor(leaf.tensors[0], leaf.transform, leaf.shape, bounds, out)
            return out
        (first, stop), rest = bounds[0], bounds[1:]
        jobs = [
            self.pool.submit(self.tensor, leaf.tensors[i], leaf.transform, leaf.shape[1:], rest, out[i - first])
            for i in range(first, stop)
        ]
        for job in jobs:
            job.result()
        return out

    def tensor(self, tensor: Tensor, transform: Transform, shape: Shape, bounds: Bounds, out: np.ndarray) -> None:
        values = transform.read(tensor.read, shape, bounds)
        with np.errstate(over="ignore"):
            _copy(out, values.astype(out.dtype, copy=False))
        if count := _count_non_finite(out):
            kind = f"overflow {out.dtype.name}" if not _count_non_finite(values) else "are NaN or infinite"
            self.bad[tensor.name] = f"found {count} values that {kind} in {tensor.file}, expected finite weights"
        self.bar.update(out.nbytes)


def _copy(target: np.ndarray, values: np.ndarray) -> None:
    """target[...] = values, in runs of 1 MiB of the source: a transposed copy is 2 to 3 times faster so."""
    axis = int(np.argmax(values.strides))
    step = max(1, 2**20 // max(1, values.strides[axis]))
    source, out = (np.moveaxis(_bits(a), axis, 0) for a in (values, target))
    for i in range(0, len(source), step):
        out[i : i + step] = source[i : i + step]


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as integers: numpy copies and compares those much faster than ml_dtypes' values."""
    return array.view({2: np.uint16, 4: np.uint32}[array.itemsize])


def _count_non_finite(array: np.ndarray) -> int:
    """Values whose exponent bits are all set."""
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}[array.dtype.name]
    bits = _bits(array)
    mask = bits.dtype.type(exponent)
    return int(np.count_nonzero((bits & mask) == mask))
