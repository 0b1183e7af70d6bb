"""The papers' models at full size, without their weights and without a TPU: parameters, and bytes per chip.

What is published of each lies in jaxvqa/assets/published, of the one that only matches in configs/ here: its
config.json ("config"), its preprocessor_config.json ("preprocessor"), its number of "parameters"; and the size of a
"picture" of about a thousand tokens, or as many as the model makes.

With --chips, the programs of 8 questions (2 on one chip), each with that picture and 64 tokens of text, are compiled in
bfloat16 for TPUs that are not here: encoding the pictures, prefill and decoding up to 64 tokens. That needs libtpu
(`pip install "jaxvqa[tpu]"`). Bytes are XLA's, of one chip: what programs are given, and what they need besides.
A line is printed as soon as it is known.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from jaxvqa import decoding, sharding
from jaxvqa.cli.models import CONFIGS
from jaxvqa.cli.output import WRONG_PATH, error_text, progress
from jaxvqa.decoding import Output
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.handlers import LENGTHS, bucket
from jaxvqa.models import config_from_hf, family_of
from jaxvqa.models.qformer import Asked
from jaxvqa.sharding import BATCH
from jaxvqa.taps import Readouts

EXAMPLE = """examples:
  python experiments/backbones.py
  python experiments/backbones.py --chips 8 4 1 --models qwen2.5-vl-7b qwen3-vl-8b --json backbones.json"""
FILES = {file.stem: file for folder in (CONFIGS, Path(__file__).parent / "configs") for file in folder.glob("*.json")}
CHIPS = {
    1: ("v6e:1x1", (1, 1, 1), 2),
    4: ("v5e:2x2", (1, 2, 2), 8),
    8: ("v5e:2x4", (1, 4, 2), 8),
}
"""Topology, sizes of the mesh (data, fsdp, tensor) and questions. One v5e has 16 GiB, too few for 7B: v6e, 32."""
TEXT = 64
NEW_TOKENS = 64


def published(name: str) -> dict[str, Any]:
    """What the file of a model says. Raises UserError for a name without one."""
    if name not in FILES:
        raise UserError(f"model {name!r}: expected one of {', '.join(sorted(FILES))}")
    return json.loads(FILES[name].read_text())


def count(record: dict[str, Any]) -> int:
    """Parameters of a model, built abstractly."""
    config = config_from_hf(record["config"])
    made = jax.eval_shape(lambda: sharding.init(family_of(config).specs(config), jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(made))


def pictured(record: dict[str, Any]) -> tuple[Any, int]:
    """The picture as the encoder takes it, and its tokens in a prompt."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    config, image = config_from_hf(record["config"]), Image.new("RGB", record["picture"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(record["preprocessor"]))
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    if not hasattr(config, "decoder"):
        pixels = processor(images=[image], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        return pixels, 0
    family = family_of(config)
    family.check_processor(config, processor)
    setup = next(iter(family.SETUPS))
    made = family.process(config, processor, image, family.default_buckets(config, processor), setup)
    return made.arrays, made.tokens


def programs(record: dict[str, Any], mesh: Mesh, rows: int) -> Iterator[tuple[str, Callable, tuple, int]]:
    """Name, program, abstract arguments on the mesh and tokens of a prompt, one program after the other."""
    config = config_from_hf(record["config"])
    family = family_of(config)
    specs, by_row = family.specs(config), NamedSharding(mesh, sharding.partition(BATCH))

    def batch(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=by_row)

    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        sharding.abstract(specs, jnp.bfloat16),
        sharding.shardings(specs, mesh),
    )
    picture, tokens = pictured(record)
    images = jax.tree.map(lambda x: batch(x.shape, x.dtype), picture)
    if not hasattr(config, "decoder"):

        def match(params, images, ids, lengths):
            return family.match(params, config, ids, lengths, family.encode_images(params, config, images))

        yield "prefill", match, (params, images, batch((TEXT,)), batch(())), TEXT
        return
    length = bucket(tokens + TEXT, LENGTHS, "the prompt")
    capacity = length + NEW_TOKENS
    inputs: dict[str, Any] = {"ids": batch((length,)), "lengths": batch(()), "slots": batch((length,))}
    if config.decoder.mrope is not None:
        inputs["positions"] = batch((length, 3))
    if hasattr(config, "qformer"):
        inputs["asked"] = Asked(batch((TEXT,)), batch(()))

    def prefill(params, images, inputs):
        features = family.encode_images(params, config, images)
        out = family.prefill(params, config, features=features, capacity=capacity, **inputs)
        return replace(out, hidden=None)

    def decode(params, cache, logits):
        output = Output(logits, None, cache, Readouts(), ())
        return decoding.decode(params.decoder, config.decoder, output, max_new_tokens=NEW_TOKENS, eos_ids=(2,))

    yield "prefill", prefill, (params, images, inputs), length
    out = jax.eval_shape(prefill, params, images, inputs)
    yield "decode", decode, (params, out.cache, out.logits), length


def compiled(name: str, chips: int) -> dict[str, Any]:
    """Bytes per chip of a model's programs, and how long they took to compile."""
    from jax.experimental import topologies

    topology, sizes, rows = CHIPS[chips]
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    mesh = sharding.make_mesh(*sizes, devices=topologies.get_topology_desc(topology, "tpu", **bounds).devices)
    report: dict[str, Any] = {"model": name, "chips": chips, "topology": topology, "mesh": sizes, "rows": rows}
    started = time.perf_counter()
    # What a backend of attention asks when it is chosen and built.
    with jax.set_mesh(mesh), mock.patch("jax.default_backend", return_value="tpu"):
        for kind, program, args, length in programs(published(name), mesh, rows):
            donated = (1,) if kind == "decode" else ()
            memory = jax.jit(program, donate_argnums=donated).lower(*args).compile().memory_analysis()
            report |= {
                "tokens": length,
                "parameters": sum(map(on_chip, jax.tree.leaves(args[0]))),
                f"{kind}_given": memory.argument_size_in_bytes,
                f"{kind}_temporary": memory.temp_size_in_bytes,
                f"{kind}_output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            }
    return report | {"seconds": time.perf_counter() - started}


def on_chip(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one chip."""
    shape = x.sharding.shard_shape(x.shape)
    return functools.reduce(int.__mul__, shape, x.dtype.itemsize)


def line(report: dict[str, Any]) -> str:
    """A row of the table, in GiB per chip."""

    def gib(name):
        return f"{report[name] / 2**30:.2f}" if name in report else "-"

    cells = [report["model"], f"{report['chips']} ({report['topology']})", f"{report['rows']} × {report['tokens']}"]
    cells += [gib(key) for key in ("parameters", "prefill_temporary", "decode_given", "decode_temporary")]
    return f"| {' | '.join(cells)} | {report['seconds']:.0f} |"


HEAD = (
    "| GiB per chip | chips | prompts | parameters | prefill's temporaries | decode is given | its temporaries | s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def run(args: argparse.Namespace) -> int:
    chosen, reports, wrong = args.models or sorted(FILES), [], 0
    print("| model | parameters | published |\n|---|---|---|")
    for name in chosen:
        record = published(name)
        found = count(record)
        wrong += found != record["parameters"]
        print(f"| {name} | {found:,} | {record['parameters']:,} |", flush=True)
        reports.append({"model": name, "found": found, "published": record["parameters"]})
    if args.chips:
        print(f"\n{HEAD}", flush=True)
    for chips in args.chips:
        for name in chosen:
            try:
                reports.append(compiled(name, chips))
            except jax.errors.JaxRuntimeError as error:
                said = str(error).strip().splitlines()[0]
                reports.append({"model": name, "chips": chips, "error": said})
                progress(f"backbones: {name} on {chips} chips: {said}")
            else:
                print(line(reports[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(reports, indent=1) + "\n")
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1) + "\n")
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--chips", nargs="+", type=int, default=[], choices=tuple(CHIPS), help="compile for so many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("JAX_PLATFORMS", "cpu")):
        os.environ.setdefault(variable, value)
    try:
        return run(parser.parse_args(argv))
    except (JaxVQAError, *WRONG_PATH) as error:
        print(f"backbones: {error_text(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
