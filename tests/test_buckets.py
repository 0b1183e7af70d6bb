"""Buckets: chosen to pad as little as can be, and no image of any size compiles anything once they are warm."""

import importlib.util
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_internvl import tiny_internvl
from tiny_qwen import tiny_qwen

import jaxvqa
from jaxvqa.engine import Engine
from jaxvqa.errors import UserError
from jaxvqa.requests import Answer, Sample, Score
from jaxvqa.vision.inputs import bucket_of, buckets_for


def padded(sizes, buckets) -> int:
    return sum(bucket_of(size, buckets, "an image") for size in sizes)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 5))
def test_no_other_buckets_pad_less(sizes, count):
    found, distinct = buckets_for(sizes, count), sorted(set(sizes))
    assert found == tuple(sorted(set(found))) and found[-1] == max(sizes) and len(found) <= count
    others = combinations(distinct[:-1], min(count, len(distinct)) - 1)
    assert padded(sizes, found) == min(padded(sizes, (*other, distinct[-1])) for other in others)


def test_as_many_buckets_as_sizes_pad_nothing():
    assert buckets_for([7, 3, 3, 9], 3) == buckets_for([7, 3, 3, 9], 100) == (3, 7, 9)


@pytest.mark.parametrize(("sizes", "count"), [([], 2), ([0, 3], 2), ([3], 0)])
def test_what_has_no_buckets_is_refused(sizes, count):
    with pytest.raises(UserError, match="expected numbers >= 1"):
        buckets_for(sizes, count)


@pytest.fixture(scope="module")
def script():
    file = Path(__file__).parents[1] / "experiments" / "buckets.py"
    spec = importlib.util.spec_from_file_location("buckets", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILIES = {
    "qwen2_5_vl": partial(tiny_qwen, text_layers=2, vision_layers=2, full_layers=(1,), pixels=(4 * 28**2, 36 * 28**2)),
    "internvl": partial(tiny_internvl, text_layers=2, vision_layers=1, max_patches=4),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp("buckets") / request.param)


def test_an_image_is_as_large_as_the_smallest_bucket_that_holds_it(folder):
    vlm = jaxvqa.load(folder, dtype="float32")
    for size in [(300, 200), (28, 28), (640, 90)]:
        found, image = vlm.size_of(size), Image.new("RGB", size)
        assert vlm.process(image, bucket=found).geometry.image_size == size
        if found > 1:
            with pytest.raises(UserError):
                vlm.process(image, bucket=found - 1)
    small = jaxvqa.load(folder, dtype="float32", image_buckets=(1,))
    with pytest.raises(UserError, match="largest bucket"):
        small.size_of((640, 90))


def test_two_images_of_different_buckets_run_as_the_larger_one_would(folder, script):
    images = [Image.effect_noise(size, 50).convert("RGB") for size in [(28, 28), (600, 560)]]
    vlm = jaxvqa.load(folder, dtype="float32")
    small, large = map(vlm.size_of, ((28, 28), (600, 560)))
    assert small < large

    def score(sample):
        return Answer("", scores=(yield Score(sample.images, sample.question, options=("red", "a lamp"))))

    def scores(buckets):
        engine = Engine(jaxvqa.load(folder, dtype="float32", image_buckets=buckets), lengths=(256,))
        (first,) = engine.run([Sample(tuple(images), "What differs?")], score)
        with script.compilations() as heard:
            (turned,) = engine.run([Sample(tuple(reversed(images)), "What differs?")], score)
        assert not heard
        assert first.error is None and turned.error is None, (first.error, turned.error)
        return np.stack([first.scores, turned.scores])

    found = scores((small, large))
    np.testing.assert_allclose(found, scores((large,)), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vanilla", "vicrop"])
def test_a_hundred_images_of_random_sizes_compile_nothing_after_warming_up(folder, script, method, measured):
    vlm = jaxvqa.load(folder, dtype="float32")
    pictures = script.pictures(100, 28, 640, seed=0)
    chosen = script.chosen(vlm, pictures, 2)
    vlm = jaxvqa.load(folder, dtype="float32", image_buckets=chosen)
    report = script.measure(vlm, pictures, method)
    assert report["warming"] > 0 and report["compiled"] == 0
    assert report["failed"] == []
    measured(f"{folder.name}, {method}, buckets {chosen}: image rows that are padding", report["rows_wasted"])
    measured(f"{folder.name}, {method}, buckets {chosen}: of the encoder's FLOPs", report["encoder_wasted"])
    measured(f"{folder.name}, {method}, buckets {chosen}: of all FLOPs", report["flops_wasted"])
    assert len(chosen) == 2 and all(0 < report[f"{what}_wasted"] < 1 for what in ("rows", "encoder", "flops"))
