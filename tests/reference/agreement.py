"""How a reference and the library are compared: what must be equal, and which differences are ties."""

import functools
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from plain import Llava

import jaxvqa
from jaxvqa.requests import Sample

MAPS = 1e-4
"""Largest difference of two heat maps, relative to the map's range."""
TIE = 1e-3
"""Margin of a decision (in logits, or relative between scores) below which the two may decide differently."""
TIES = 0.02
"""Share of samples that may differ so."""
ROUNDING = 1e-6
"""The gradient of the log-probability of a token that is certain but for d is known to this over d in float32, relative
to the map: transformers' own float32 is as far from float64."""


class Agreement:
    """Compares sample by sample; at the end of the `with` block the ties must be few."""

    def __init__(self, measured, name):
        self.measured, self.name, self.samples, self.ties, self.deviation = measured, name, 0, 0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if failed is None:
            self.measured(f"{self.name}: maps, relative to their range", self.deviation)
            self.measured(f"{self.name}: ties, of {self.samples} samples", self.ties)
            assert self.samples and self.ties <= TIES * self.samples

    def maps(self, theirs, ours, doubt=1.0):
        theirs, ours = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
        assert theirs.shape == ours.shape
        # A map that is the same everywhere has no range.
        difference = np.abs(theirs - ours).max() / (np.ptp(theirs) or 1)
        self.deviation = max(self.deviation, difference)
        assert difference <= max(MAPS, ROUNDING / doubt)

    def same(self, theirs, ours, margin):
        """Whether a decision fell alike; a difference without a tie fails."""
        if isinstance(theirs, str):
            equal = theirs == ours
        else:
            theirs, ours = (np.asarray(x, np.float64).reshape(-1, 4) for x in (theirs, ours))
            equal = theirs.shape == ours.shape and np.allclose(theirs, ours, rtol=0, atol=1e-2)
        assert equal or margin < TIE, f"reference {theirs!r}, library {ours!r}, margin {margin}"
        self.ties += not equal
        return equal


@functools.cache
def both(folder, setup="pad", dtype=torch.float32):
    """The reference's model and the library's (always float32), from one Hugging Face folder."""
    torch.set_num_threads(1)
    return Llava(folder, setup, dtype), jaxvqa.load(folder, image_setup=setup, dtype="float32")


def picture(image):
    """An image of a Specks sample as an ordinary one."""
    return Image.fromarray(np.asarray(image))


def grainy(sample):
    """A Specks sample with noise over its image, whose flat areas otherwise have equal detail."""
    pixels = np.asarray(sample.image).astype(int)
    noise = np.random.default_rng(0).integers(-12, 13, pixels.shape)
    return replace(sample, images=(Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)),))


def noise(width, height, seed=0):
    """Noise with some structure: blocks of colour under it."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.fromarray((np.asarray(blocks) * 0.6 + rng.integers(0, 100, (height, width, 3))).astype(np.uint8))


def tiny_samples():
    """Images of many shapes, smaller and larger than the encoder's 56 pixels."""
    questions = ("What is red?", "Is the blue plate left of the red one?", "What is on the sign?\nSay it.")
    sizes = ((700, 500), (200, 200), (90, 400), (40, 30), (300, 299), (57, 120))
    return [Sample((noise(*size, seed),), questions[seed % 3]) for seed, size in enumerate(sizes)]


def answers(samples, *args, **options):
    """(image, question, the library's answer) of each sample."""
    found = jaxvqa.ask_many(args[0], samples, *args[1:], batch_size=6, **options)
    for sample, answer in zip(samples, found, strict=True):
        if answer.error is not None:
            raise answer.error
        yield picture(sample.image), sample.question, answer
