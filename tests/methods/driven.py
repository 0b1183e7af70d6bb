"""Methods driven by hand: samples, a bound model's facts, and results given to a generator."""

import numpy as np
from PIL import Image

from jaxvqa.methods import Facts
from jaxvqa.requests import Sample

FACTS = Facts("llava-1.5-7b", 32, 336, (24, 24), "vicuna_v1")
SIZE = (700, 500)


def picture(size=SIZE, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


PICTURE = picture()


def sample_of(image=PICTURE, question="What?", id="7", **truth):
    """A sample; truth: boxes, rivals, other."""
    return Sample(image, question, id, **truth)


def drive(method, sample, *results):
    """Run a method by hand, giving it results: all that it asked for, and its answer."""
    generator, asked = method(sample), []
    try:
        for result in (None, *results):
            asked.append(generator.send(result))
    except StopIteration as stop:
        return asked, stop.value
    raise AssertionError("it asks for more")
