"""A trained generator on disk: `model.safetensors` beside `generator.json`, which says what it belongs to."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from jaxvqa import sharding
from jaxvqa.convert.files import publish, write_json
from jaxvqa.convert.tables import as_dtype, as_is, flatten, leaves, plan, read_params
from jaxvqa.convert.tensors import read_json, safe_tensors
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.vif import generator
from jaxvqa.vif.generator import Generator, GeneratorConfig
from jaxvqa.vif.plugin import Pairs

FORMAT = 1
"""Version of the layout of these folders."""
WEIGHTS, ABOUT = "model.safetensors", "generator.json"
RECORDED = ("backbone", "backbone_name", "pairs", "alpha")


@dataclass(frozen=True, eq=False)
class Trained:
    """A generator, and the model and layers that it belongs to."""

    config: GeneratorConfig
    params: Generator = field(repr=False)
    backbone: str
    """Fingerprint of the model's configuration (`models.fingerprint`)."""
    backbone_name: str
    pairs: Pairs
    """(extraction layer, injection layer)."""
    alpha: float
    """α, the weight of the map."""


def save(trained: Trained, out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a generator to the folder `out`, as stored; returns `out`. The folder appears when it is complete."""
    with publish(out, overwrite) as folder:
        save_file({path: np.asarray(leaf) for path, leaf in flatten(trained.params).items()}, folder / WEIGHTS)
        about = {name: getattr(trained, name) for name in RECORDED}
        write_json(folder / ABOUT, {"format": FORMAT, "config": dataclasses.asdict(trained.config)} | about)
    return Path(out)


def load(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    posterior: bool = False,
) -> Trained:
    """Read a folder that `save` wrote.

    dtype: of the parameters; None keeps each as stored. mesh: lay them out over it, as the model's are.
    posterior: read the branch that sees the answer, too (training).
    Raises UserError where there is no such folder, `JaxVQAError` with all that is wrong with one.
    """
    folder = Path(source).expanduser()
    if not (folder / ABOUT).is_file():
        raise UserError(f"{folder}: no VIF generator; expected a folder with {ABOUT} and {WEIGHTS} (jaxvqa.vif.save)")
    about = read_json(folder / ABOUT)
    if about.get("format") != FORMAT:
        raise JaxVQAError(f"{folder / ABOUT}: format {about.get('format')!r}, expected {FORMAT}; save it again")
    _check_names(about, {"format", "config", *RECORDED}, folder)
    _check_names(about["config"], {f.name for f in dataclasses.fields(GeneratorConfig)}, folder)
    config = GeneratorConfig(**about["config"])
    declared = generator.specs(config, posterior)
    path_of = {path: (path, as_is) for path in leaves(declared)}
    stored = [(tensor.name, tensor) for tensor in safe_tensors(folder / WEIGHTS)]
    if not posterior:
        stored = [(name, tensor) for name, tensor in stored if not name.startswith("posterior.")]
    planned, faults = plan(stored, path_of, declared)
    if faults:
        raise JaxVQAError("\n  ".join([f"{folder / WEIGHTS}: the weights do not fit {ABOUT}", *faults]))
    placed = None if mesh is None else sharding.shardings(declared, mesh)
    params = read_params(planned, declared, as_dtype(dtype), placed)
    recorded = {name: about[name] for name in RECORDED}
    recorded["pairs"] = tuple((middle, deep) for middle, deep in about["pairs"])
    return Trained(config, params, **recorded)


def _check_names(values: Any, names: set[str], folder: Path) -> None:
    """JaxVQAError unless `values` is an object of just these names."""
    found = set(values) if isinstance(values, dict) else set()
    if found != names:
        faults = [f"{name} is {'missing' if name in names else 'unknown'}" for name in sorted(found ^ names)]
        raise JaxVQAError(f"{folder / ABOUT}: {', '.join(faults)}; save it again with this version of jaxvqa")
