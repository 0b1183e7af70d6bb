"""List the model families that load, and the bundled model.

Example: jaxvqa models
"""

import argparse
import inspect

from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.cli.output import table


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from jaxvqa.convert.checkpoint import ARCHITECTURES
    from jaxvqa.models import FAMILIES

    about = {kind: inspect.getdoc(inspect.getmodule(config)) or "" for kind, config in FAMILIES.items()}
    print(table(("model_type", "what it is"), [(kind, doc.partition("\n")[0]) for kind, doc in about.items()]))
    print(f"\narchitectures in config.json: {', '.join(ARCHITECTURES)}")
    weights = SPECKS_LLAVA / "model.safetensors"
    size = f"{weights.stat().st_size / 1e6:.1f} MB" if weights.exists() else "its weights are missing: reinstall jaxvqa"
    print(f"bundled model, the default of --model: {SPECKS_LLAVA} ({size})")
    return 0
