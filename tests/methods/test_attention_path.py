"""Every method under both attention paths: the same answers, and no buffer of tokens by tokens in any program."""

import re
from dataclasses import replace

import numpy as np
import pytest
from small import parameters
from tiny import tiny_llava
from tiny_blip import tiny_blip

import jaxvqa
from jaxvqa import gradients, handlers, matching, vif
from jaxvqa.engine import Engine
from jaxvqa.methods.cof import Cof
from jaxvqa.methods.controls import MaskReweight
from jaxvqa.methods.focus import Focus
from jaxvqa.methods.hiperson import HiPerson
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import Vicrop
from jaxvqa.methods.vif import Vif
from jaxvqa.requests import Sample
from jaxvqa.vif.generator import GeneratorConfig, specs
from tests.methods.driven import picture

LONG = 512
"""Every prompt with an image is longer: it has 529 tokens."""
PLAIN = Vanilla(max_new_tokens=4)
METHODS = {
    "vanilla": PLAIN,
    "vicrop rel_att": Vicrop(max_new_tokens=4),
    "vicrop grad_att": Vicrop(maps="grad_att", max_new_tokens=4),
    "vicrop pure_grad": Vicrop(maps="pure_grad", max_new_tokens=4),
    "hiperson": HiPerson(max_new_tokens=8),
    "cof": Cof(like=PLAIN),
    "reweighting": MaskReweight(PLAIN, "truth"),
    "focus": Focus(extraction="rules", n_steps=1, like=PLAIN),
    "vif": None,
}
BACKENDS = ("xla", "xla_chunked")
SAMPLE = Sample(picture((300, 200)), "What is on the red plate?", "one", boxes=((20, 30, 80, 90),))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The two models, under each backend."""
    root = tmp_path_factory.mktemp("long")
    llava = tiny_llava(root / "llava", image_size=184, patch_size=8, max_position_embeddings=4096)
    blip = tiny_blip(root / "blip", image_size=184, patch_size=8)
    return {
        backend: {
            "llava": jaxvqa.load(llava, attention=backend),
            "matcher": jaxvqa.load_matcher(blip, attention=backend),
        }
        for backend in BACKENDS
    }


def configured(name, vlm):
    if name != "vif":
        return METHODS[name]
    config = GeneratorConfig.of(
        32, latent_width=8, num_heads=2, mlp_width=8, num_layers=1, num_slots=2, attention=vlm.attention
    )
    facts = vlm.facts
    pairs = vif.layer_pairs(facts.num_layers)
    return Vif(vif.Trained(config, parameters(specs(config)), facts.fingerprint, facts.name, pairs, 0.4), like=PLAIN)


@pytest.fixture
def programs(monkeypatch):
    """The text of every program that runs, by name."""
    texts = {}

    def recorded(module, name):
        program = getattr(module, name)

        def call(*args, **options):
            texts[name, len(texts)] = program.lower(*args, **options).compile().as_text()
            return program(*args, **options)

        monkeypatch.setattr(module, name, call)

    for module, names in (
        (handlers, ("_encode", "_prefix", "_prefill", "_extend", "_decode", "_yes_no")),
        (gradients, ("_gradient",)),
        (matching, ("_match", "_match_gradient")),
    ):
        for name in names:
            recorded(module, name)
    return texts


def squares(text: str) -> set[str]:
    """Shapes with two axes as long as a prompt, of what a program stores: the insides of its fusions are not."""
    found = set()
    for computation in re.split(r"\n\n+", text):
        if "fused_computation" in computation.lstrip().split("(")[0]:
            continue
        for shape in re.findall(r"= \(?(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", computation):
            if sum(int(axis) >= LONG for axis in shape.split(",")) > 1:
                found.add(shape)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_both_paths_answer_alike_and_the_chunked_one_holds_no_square(name, models, programs):
    answers, held = {}, {}
    for backend in BACKENDS:
        programs.clear()
        vlm = models[backend]["llava"]
        (answers[backend],) = Engine(models[backend], batch_size=1).run([replace(SAMPLE)], configured(name, vlm))
        assert answers[backend].error is None, answers[backend].error
        held[backend] = {program: found for (program, _), text in programs.items() if (found := squares(text))}
    assert held["xla"], "the plain path does, so the test would see one"
    assert not held["xla_chunked"]
    one, two = answers.values()
    assert one.text == two.text and one.forward_passes == two.forward_passes
    np.testing.assert_allclose(one.boxes, two.boxes)
    if one.grid is not None:
        assert np.abs(one.grid - two.grid).max() < 1e-4 * np.abs(one.grid).max()
