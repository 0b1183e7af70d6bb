"""The engine on a mesh of eight devices answers as on one device, by the same path.

The device count is fixed when jax starts, so this file is also the program of the child process.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_llava
from tiny_blip import tiny_blip

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FLAGS += " --xla_llvm_disable_expensive_passes=true"  # compiling is most of this test
CLOSE = 1e-4
"""f32 rounding of sums over shards."""


def every_kind(sample):
    """One request of each kind, each after those that it needs."""
    from jaxvqa.methods.vicrop import attention_on_image
    from jaxvqa.prompts import render
    from jaxvqa.requests import Answer, Continue, Generate, Gradient, Match, Read, Score, YesNo
    from jaxvqa.taps import ReadSpec

    asked, new = (sample.images, render("vicrop_hf", sample.question)), 4
    spec = ReadSpec((0,), frozenset({"rows"}), stop=1)
    reading, reply, sampled, scores, confidence, *more = yield [
        Read(*asked, spec, reduce=attention_on_image, keep=True),
        Generate(*asked, max_new_tokens=new, keep=True),
        Generate(*asked, max_new_tokens=new, temperature=1.0),
        Score(*asked, ("red", "a blue plate", "x")),
        YesNo(*asked),
        Match(sample.image, sample.question),
        Gradient(sample.image, sample.question, of="match", layers=(0,), reduce=slopes),
        Gradient(*asked, layers=(0, 2), reduce=slopes),
        Gradient(*asked, wrt="pixels", reduce=slopes),
    ]
    turn = render("vicrop_hf", [sample.question, reply.text, "Why?"])
    resumed, further = yield [Continue(reading, max_new_tokens=new), Continue(reply, turn, max_new_tokens=new)]
    ids = [result.ids for result in (reply, sampled, resumed, further)]
    arrays = [scores, confidence, reading.value, *(getattr(result, "value", result) for result in more)]
    numbers = np.concatenate([np.ravel(array) for array in arrays])
    assert all(np.abs(array).max() > 1e-4 for array in arrays)
    return Answer(json.dumps({"ids": ids, "numbers": numbers.tolist()}))


def slopes(row):
    """The gradient, where it lies on the image."""
    return row.gradient if row.readouts.rows is None else row.on_image(row.gradient * row.readouts.rows)


def report(folder: str, matching: str) -> None:
    """Print what each sample gives, without and with a mesh."""
    import jaxvqa
    from jaxvqa.engine import Engine
    from jaxvqa.sharding import make_mesh

    rng = np.random.default_rng(0)
    samples = [
        jaxvqa.Sample(Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)), f"What is {'so ' * n}red?")
        for n, (h, w) in enumerate(((60, 90), (300, 200), (56, 56)))
    ]
    for mesh in (None, make_mesh(2, 2, 2)):
        vlm = jaxvqa.load(folder, mesh=mesh, dtype="float32")
        matcher = jaxvqa.load_matcher(matching, mesh=mesh, dtype="float32")
        engine = Engine({"vlm": vlm, "matcher": matcher}, batch_size=3, lengths=(16, 128))
        answers = list(engine.run(samples, every_kind))
        assert engine.stats.rows["prefix"] == 3, "prompts run in two parts"
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        print(json.dumps([json.loads(answer.text) for answer in answers]))


@pytest.mark.slow
def test_a_mesh_changes_no_answer(tmp_path):
    folder = tiny_llava(tmp_path / "tiny", text_layers=3, vision_layers=2)
    matching = tiny_blip(tmp_path / "blip", num_heads=2)
    child = subprocess.run(
        [sys.executable, __file__, str(folder), str(matching)],
        env=os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    one, eight = (json.loads(line) for line in child.stdout.splitlines())
    assert [sample["ids"] for sample in eight] == [sample["ids"] for sample in one]
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b["numbers"], a["numbers"], atol=CLOSE)


if __name__ == "__main__":
    report(*sys.argv[1:])
