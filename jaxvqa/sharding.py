"""Where arrays live on a mesh: logical axis names, one table of rules, and the declaration of a tensor.

A tensor is declared once, as `ArraySpec(shape, axes)`; from it come the abstract tree, the shardings and the random
initialisation. Activations name their axes by layout (`einsum(..., out=ACT_BTD)`), and so does whatever else in
`jax.numpy` takes an `out_sharding` (`jnp.zeros(..., out_sharding=layout(BATCH))`). Without a mesh in context
(`jax.set_mesh`) a layout is None and `constrain` the identity, so a single device runs the plain program.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxvqa.errors import JaxVQAError
from jaxvqa.typing import Array

# Logical axis -> mesh axes. The batch is split over `data` and `fsdp`; weights over `fsdp` (model width) and `tensor`.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # The batch while words are looked up: `fsdp` splits the width of the table, which is not gathered.
    "lookup": "data",
}

# Layouts of activations; axes that are not named are whole.
BATCH = ("batch",)
ACT_BTD = ("batch", None, None)
ACT_BTNH = ("batch", None, "heads", None)
ACT_BTKH = ("batch", None, "kv_heads", None)
ACT_BTF = ("batch", None, "mlp")
ACT_BTV = ("batch", None, "vocab")

CACHE_LBSKH = (None, "batch", None, "kv_heads", None)

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class ArraySpec:
    """Declaration of one parameter: shape, logical axes, initialiser ("normal" with `scale`, "zeros" or "ones")."""

    shape: tuple[int, ...]
    axes: Axes
    init: str = "normal"
    scale: float = 0.02


def _is_spec(x: Any) -> bool:
    return isinstance(x, ArraySpec)


def tree_map_specs(fn, specs):
    """`jax.tree.map` over the `ArraySpec` leaves of a parameter tree."""
    return jax.tree.map(fn, specs, is_leaf=_is_spec)


def stack(specs, num_layers: int):
    """Declare `num_layers` copies with a leading, unsharded layer axis."""
    return tree_map_specs(lambda s: ArraySpec((num_layers, *s.shape), (None, *s.axes), s.init, s.scale), specs)


def abstract(specs, dtype: DTypeLike = jnp.float32):
    """The tree of `jax.ShapeDtypeStruct` that a tree of `ArraySpec` declares."""
    return tree_map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs)


def init(specs, key: Array, dtype: DTypeLike = jnp.float32):
    """Random parameters; a leaf's key is derived from its position in the tree."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=_is_spec)
    keys = jax.random.split(key, len(leaves))
    make = {
        "normal": lambda s, k: s.scale * jax.random.normal(k, s.shape, dtype),
        "zeros": lambda s, k: jnp.zeros(s.shape, dtype),
        "ones": lambda s, k: jnp.ones(s.shape, dtype),
    }
    return treedef.unflatten([make[s.init](s, k) for s, k in zip(leaves, keys, strict=True)])


def count(specs) -> int:
    """Number of parameters."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=_is_spec))


def partition(axes: Axes) -> PartitionSpec:
    """Translate logical axes to mesh axes; two axes of one array on the same mesh axis are refused."""
    mesh_axes = [RULES.get(a) if a is not None else None for a in axes]
    used = [m for a in mesh_axes if a is not None for m in ((a,) if isinstance(a, str) else a)]
    if len(used) != len(set(used)):
        raise JaxVQAError(f"logical axes {axes} collide on the mesh: they translate to {mesh_axes}")
    return PartitionSpec(*mesh_axes)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A `data × fsdp × tensor` mesh with explicit axes; the sizes must multiply to the number of devices."""
    devices = jax.devices() if devices is None else devices
    if data * fsdp * tensor != len(devices):
        raise JaxVQAError(f"mesh {data} × {fsdp} × {tensor} needs {data * fsdp * tensor} devices, found {len(devices)}")
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3, devices=devices)


def shardings(specs, mesh: Mesh | AbstractMesh):
    """The tree of `NamedSharding` of a parameter tree. Axes that the mesh does not divide are listed in one error."""
    faults: list[str] = []

    def one(path, spec: ArraySpec):
        parts = partition(spec.axes)
        for size, part, ways in zip(spec.shape, parts, _ways(parts, mesh), strict=True):
            if size % ways:
                faults.append(f"{jax.tree_util.keystr(path, simple=True, separator='.')}: {size} over {part} ({ways})")
        return NamedSharding(mesh, parts)

    tree = jax.tree_util.tree_map_with_path(one, specs, is_leaf=_is_spec)
    if faults:
        raise JaxVQAError(f"mesh {dict(mesh.shape)} does not divide these parameters: " + "; ".join(faults))
    return tree


def active() -> bool:
    """Whether a mesh with explicit axes is in context."""
    return not jax.sharding.get_abstract_mesh().empty


def layout(axes: Axes) -> PartitionSpec | None:
    """The `out_sharding` of logical axes; None without a mesh."""
    return partition(axes) if active() else None


def constrain(x: Array, axes: Axes) -> Array:
    """Lay `x` out by logical axes (identity without a mesh). Raises `JaxVQAError` if the mesh does not divide `x`."""
    if not active():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    for name, size, ways in zip(axes, x.shape, _ways(partition(axes), mesh), strict=False):
        if size % ways:
            raise JaxVQAError(f"{name} of {size} does not split over {ways} devices (mesh {dict(mesh.shape)}): pad it")
    return jax.sharding.reshard(x, partition(axes))


def einsum(equation: str, *operands: Array, out: Axes, **kwargs) -> Array:
    """`jnp.einsum` whose result is laid out by the logical axes `out`."""
    return jnp.einsum(equation, *operands, out_sharding=layout(out), **kwargs)


def take(table: Array, ids: Array, out: Axes) -> Array:
    """Rows of `table` [V, D] at `ids` (clipped to V); the result is laid out by the logical axes `out`."""
    ids = constrain(ids, ("lookup",))
    return constrain(table.at[ids].get(out_sharding=layout(("lookup", None, "embed")), mode="clip"), out)


def _ways(parts: PartitionSpec, mesh: Mesh | AbstractMesh) -> list[int]:
    """How many ways each axis is split."""
    return [math.prod(mesh.shape[m] for m in ((part,) if isinstance(part, str) else part or ())) for part in parts]
