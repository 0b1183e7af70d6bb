"""Say what is installed, which devices and attention backends work here, and what is missing for what.

The exit code is 0 when the core works: its packages, a device, attention, and the bundled model.

Example: jaxvqa doctor --json
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from jaxvqa.cli.output import error_text, progress, table

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PURPOSE = {
    "cuda": "NVIDIA GPUs",
    "tpu": "TPUs",
    "train": "training",
    "data": "benchmark data in parquet files",
    "viz": "plots",
    "lmms": "running under lmms-eval",
    "test": "the tests",
    "parity": "the tests against transformers on torch",
    "dev": "developing jaxvqa",
}


@dataclass(frozen=True)
class Check:
    """One finding: `ok` says whether the thing works, `core` whether everything depends on it."""

    group: str
    name: str
    ok: bool
    detail: str
    core: bool = False


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")


def run(args: argparse.Namespace) -> int:
    findings = packages()
    # Without its packages nothing below could do more than repeat that one is missing.
    for check in (devices, backends, bundled_model) if all(found.ok for found in findings if found.core) else ():
        progress(f"checking {check.__name__.replace('_', ' ')}")
        findings += check()
    healthy = all(found.ok for found in findings if found.core)
    if args.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(found) for found in findings]}))
    else:
        rows = [(found.group, found.name, _verdict(found), found.detail) for found in findings]
        print(table(("part", "name", "state", "detail"), rows))
        print("\nThe core works." if healthy else "\nThe core does not work: see the lines marked BROKEN.")
    return 0 if healthy else 1


def packages() -> list[Check]:
    """The declared dependencies against what is installed; then every extra with what it still lacks."""
    try:
        version = metadata.version("jaxvqa")
    except metadata.PackageNotFoundError:
        return [Check("package", "jaxvqa", False, "not installed: pip install jaxvqa (-e . in a checkout)", core=True)]
    findings = [
        Check("package", "python", True, platform.python_version(), core=True),
        Check("package", "jaxvqa", True, version, core=True),
    ]
    for wanted in _requirements("jaxvqa"):
        faults = _faults(wanted)
        found = "; ".join(faults) or metadata.version(wanted.name)
        findings.append(Check("package", wanted.name, not faults, found, core=True))
    for extra in metadata.metadata("jaxvqa").get_all("Provides-Extra") or []:
        faults = [fault for wanted in _requirements("jaxvqa", extra) for fault in _faults(wanted)]
        remedy = f"; {'; '.join(faults)}: pip install 'jaxvqa[{extra}]'" if faults else ""
        findings.append(Check("extra", extra, not faults, f"for {PURPOSE.get(extra, extra)}{remedy}"))
    return findings


def devices() -> list[Check]:
    """What jax computes on."""
    import jax

    def find() -> str:
        found = jax.devices()
        return f"{len(found)} × {found[0].device_kind} ({found[0].platform})"

    return [_try("device", "default", find, core=True)]


def backends() -> list[Check]:
    """Each attention backend on a tiny causal request, compared with the plain one; `xla` is the core."""
    import jax
    import jax.numpy as jnp

    from jaxvqa.attention import BACKENDS, Mask, attend

    order = jnp.arange(128, dtype=jnp.int32)[None]
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 128, 2, 64), jnp.bfloat16) for i in range(3))

    def call(backend: str):
        return attend(q, k, v, Mask(order, order, causal=True), scale=0.125, backend=backend).astype(jnp.float32)

    expected = call("xla")

    def works(backend: str) -> str:
        error = float(jnp.abs(call(backend) - expected).max())
        if not error < 0.05:  # bf16 keeps 8 bits of values of order 1
            raise ArithmeticError(f"differs from xla by {error:.3g}")
        return "emulated, for tests only" if (backend, jax.default_backend()) == ("splash", "cpu") else "works"

    return [_try("attention", name, lambda name=name: works(name), core=name == "xla") for name in BACKENDS]


def bundled_model() -> list[Check]:
    """The bundled weights are there and load."""

    def load() -> str:
        import jax

        import jaxvqa
        from jaxvqa.bundled import SPECKS_LLAVA

        start = time.perf_counter()
        vlm = jaxvqa.load(SPECKS_LLAVA)
        size = sum(leaf.size for leaf in jax.tree.leaves(vlm.params))
        return f"{SPECKS_LLAVA.name}: {size / 1e6:.1f} M parameters, loaded in {time.perf_counter() - start:.1f} s"

    return [_try("model", "bundled", load, core=True)]


def _try(group: str, name: str, attempt: Callable[[], str], core: bool) -> Check:
    """Run the attempt; whatever stops it is the finding."""
    try:
        return Check(group, name, True, attempt(), core)
    except Exception as error:
        return Check(group, name, False, error_text(error), core)


def _verdict(found: Check) -> str:
    if found.ok:
        return "ok"
    return "BROKEN" if found.core else "missing" if found.group == "extra" else "not here"


def _requirements(package: str, extra: str = "") -> "list[Requirement]":
    """What an installed package needs here: always, or what the extra adds to that."""
    from packaging.requirements import Requirement

    def applies(wanted: Requirement, extra: str) -> bool:
        return wanted.marker is None or wanted.marker.evaluate({"extra": extra})

    wanted = map(Requirement, metadata.requires(package) or [])
    return [one for one in wanted if applies(one, extra) and not (extra and applies(one, ""))]


def _faults(wanted: "Requirement") -> list[str]:
    """What keeps a requirement, with the extras that it names, from being met here."""
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return [f"{wanted.name} is not installed"]
    if not wanted.specifier.contains(version, prereleases=True):
        return [f"{wanted.name} {version} is installed, {wanted.specifier} is needed"]
    inner = [one for extra in sorted(wanted.extras) for one in _requirements(wanted.name, extra)]
    return [fault for one in inner for fault in _faults(one)]
