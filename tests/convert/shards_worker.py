"""Loads a folder on a mesh of forced host devices and reports which bytes it read; run by test_shards.py.

shards_worker.py FOLDER REFERENCE.npz OUT.json DATA FSDP TENSOR [PROCESS PROCESSES PORT]
"""

import json
import math
import os
import sys
from dataclasses import dataclass

PROCESS, PROCESSES, PORT = (int(a) for a in sys.argv[7:]) if len(sys.argv) > 7 else (0, 1, 0)
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // PROCESSES}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402

if PROCESSES > 1:
    jax.distributed.initialize(f"localhost:{PORT}", PROCESSES, PROCESS)

from jaxvqa.convert import load, open_checkpoint  # noqa: E402
from jaxvqa.convert.tables import flatten  # noqa: E402
from jaxvqa.models.llava import specs  # noqa: E402
from jaxvqa.sharding import make_mesh, shardings  # noqa: E402


@dataclass
class Counted:
    """A tensor that adds up the bytes that are read of it."""

    inner: object
    bytes: int = 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def read(self, index):
        values = self.inner.read(index)
        self.bytes += values.nbytes
        return values


def main(folder, reference, out, *mesh_sizes):
    mesh = make_mesh(*(int(n) for n in mesh_sizes))
    if os.path.exists(os.path.join(folder, "jaxvqa.json")):
        params, read = load(folder, dtype=None, mesh=mesh)[1], None
    else:
        checkpoint = open_checkpoint(folder)
        counted = [(name, Counted(tensor)) for name, tensor in checkpoint.tensors]
        checkpoint.tensors[:] = counted
        params = checkpoint.read(None, shardings(specs(checkpoint.config), mesh))
        read = sum(tensor.bytes for _, tensor in counted)
    own, total, wrong, split = 0, 0, [], 0
    with np.load(reference) as expected:
        for path, x in flatten(params).items():
            slices = {str(s.index): s for s in x.addressable_shards}
            own += sum(s.data.nbytes for s in slices.values())
            total += math.prod(x.shape) * x.dtype.itemsize
            split += len({str(i) for i in x.sharding.devices_indices_map(x.shape).values()}) > 1
            wrong += [path for s in slices.values() if not np.array_equal(s.data, expected[path][s.index])]
    with open(out, "w") as f:
        json.dump({"read": read, "own": own, "total": total, "split": split, "wrong": wrong}, f)


main(*sys.argv[1:7])
