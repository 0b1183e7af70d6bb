"""What every installed package must have, and what importing it must not cost."""

import subprocess
import sys
import tomllib
from pathlib import Path

import jaxvqa

ROOT = Path(__file__).parent.parent


def test_every_package_folder_is_listed_for_installation():
    """setuptools installs only listed packages; a forgotten one is missing from the wheel and from nowhere else."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [*(ROOT / "jaxvqa").rglob("__init__.py"), *(ROOT / "convert").rglob("__init__.py")]
    names = [".".join(f.parent.relative_to(ROOT).parts) for f in folders]
    assert sorted(listed) == sorted(
        name.replace("convert", "jaxvqa.convert", 1) if name.startswith("convert") else name for name in names
    )


def test_every_public_name_resolves():
    for name in jaxvqa.__all__:
        assert getattr(jaxvqa, name) is not None


def test_importing_the_package_starts_neither_jax_nor_transformers():
    heavy = ("jax", "transformers", "numpy", "torch")
    code = f"import sys, jaxvqa, jaxvqa.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_room_imports_from_a_room_above_it():
    """An import goes only downwards; the order is the one of the design."""
    order = (
        "errors typing sharding attention taps decoder decoding geometry images prompts vision models convert "
        "vlm matcher transforms regions requests vif handlers matching gradients engine methods specks training report "
        "cli"
    ).split()
    # Names of rooms that a lower room may know: the registry of methods carries no code of theirs.
    allowed = {("vlm", "methods"), ("engine", "methods")}
    faults = []
    for file in [*(ROOT / "jaxvqa").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]:
        room = (
            file.relative_to(ROOT).parts[1].removesuffix(".py") if file.is_relative_to(ROOT / "jaxvqa") else "convert"
        )
        if room not in order:
            continue
        for line in file.read_text().splitlines():
            words = line.split()
            if not line.startswith(("from jaxvqa.", "import jaxvqa.")):
                continue
            other = words[1].split(".")[1]
            if other in order and order.index(other) > order.index(room) and (room, other) not in allowed:
                faults.append(f"{file.relative_to(ROOT)}: {line}")
    assert not faults, "\n".join(faults)
