"""Every method on every family: it runs on small random models as `jaxvqa models` says, or is refused as that says."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from small import parameters
from tiny import tiny_llava
from tiny_blip import tiny_blip
from tiny_instructblip import tiny_instructblip
from tiny_internvl import tiny_internvl
from tiny_onevision import tiny_onevision
from tiny_qwen import tiny_qwen
from tiny_qwen3 import tiny_qwen3

import jaxvqa
from jaxvqa import methods, vif
from jaxvqa.cli.models import PUBLISHED, matrix
from jaxvqa.engine import Engine
from jaxvqa.errors import UserError
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import preview_size
from jaxvqa.prompts import MARKER
from jaxvqa.regions.windows import high_res_split
from jaxvqa.requests import Sample
from jaxvqa.vif.generator import GeneratorConfig, specs
from tests.methods.driven import picture

FAMILIES = {
    "llava": functools.partial(tiny_llava, text_layers=4, vision_layers=2, feature_layer=-1),
    "llava_next": functools.partial(
        tiny_onevision, is_next=True, text_model="llama", text_layers=4, vision_layers=2, image_size=28
    ),
    "llava_onevision": functools.partial(tiny_onevision, text_layers=4, vision_layers=2),
    "qwen2_vl": functools.partial(tiny_qwen, kind="qwen2_vl", text_layers=4, vision_layers=2),
    "qwen2_5_vl": functools.partial(tiny_qwen, text_layers=4, vision_layers=2, full_layers=(1,)),
    "qwen3_vl": functools.partial(tiny_qwen3, vision_layers=3),
    "internvl": functools.partial(tiny_internvl, text_layers=4),
    "instructblip": functools.partial(tiny_instructblip, text_layers=4, question_tokens=512),
}
"""By HF's model_type."""

NEW, BASE, TILE = 3, 60, 60
ASKING = Vanilla(max_new_tokens=NEW)
CROP = dict(base=BASE, max_new_tokens=NEW)
VICROP = methods.Vicrop(**CROP)
FOCUS = dict(targets=("red plate",), n_steps=2, overrun=False, pool=2, like=ASKING)
CASES = {
    "vanilla": dict(max_new_tokens=NEW),
    "vicrop": CROP,
    "vicrop maps=grad_att": CROP | {"maps": "grad_att"},
    "vicrop maps=pure_grad": CROP | {"maps": "pure_grad"},
    "vicrop maps=rel_att_high": CROP | {"maps": "rel_att_high", "tile": TILE},
    "cof": dict(like=ASKING),
    "hiperson": CROP,
    "focus": FOCUS,
    "vif": dict(like=ASKING),
    "blind": dict(like=ASKING),
    "random_crop": dict(like=VICROP),
    "rival_crop": dict(like=VICROP),
    "other_map": dict(like=VICROP),
    "truth_map": dict(like=methods.Focus(**FOCUS)),
    "truth_crop": dict(like=VICROP),
    "mask_reweight": dict(like=ASKING),
}
PASSES = {
    "vanilla": (0, 1),
    "vicrop": (2, 1),
    "vicrop maps=grad_att": (1, 1),
    "vicrop maps=pure_grad": (2, 1),
    "cof": (1, 1),
    "hiperson": (2, 2),  # these models name no answer, and are asked for it in a second turn
    "vif": (0, 1),
    "blind": (0, 1),
    "random_crop": (2, 1),
    "rival_crop": (0, 1),
    "other_map": (2, 1),
    "truth_crop": (0, 1),
    "mask_reweight": (0, 1),
}
"""(search, final) forward passes, whatever the model; those of the others depend on the image."""
WITHOUT_MAP = {"vanilla", "blind", "random_crop", "rival_crop", "truth_crop"}
WITH_BOXES = {"vicrop", "hiperson", "focus", "random_crop", "rival_crop", "other_map", "truth_map", "truth_crop"}


def sample_of(number: int, width: int, height: int) -> Sample:
    target, rival = (8, 8, 28, 28), (width - 28, height - 28, width - 8, height - 8)
    return Sample(
        (picture((width, height), number),), "What is on the red plate?", str(number), boxes=(target,), rivals=(rival,),
        other="Where does the small blue sign stand?",
    )  # fmt: skip


SAMPLES = [sample_of(n, *size) for n, size in enumerate([(168, 112), (84, 224), (280, 196)])]
PAIR = replace(
    SAMPLES[0],
    images=(SAMPLES[0].image, SAMPLES[1].image),
    question="Is the plate in the first image red, too?",
    id="3",
)
"""A question about two images, of which methods look at the first more closely."""


@pytest.fixture(scope="module")
def matcher(tmp_path_factory):
    return jaxvqa.load_matcher(tiny_blip(tmp_path_factory.mktemp("matcher")), dtype="float32")


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request, tmp_path_factory, matcher):
    vlm = jaxvqa.load(FAMILIES[request.param](tmp_path_factory.mktemp(request.param)), dtype="float32")
    yield Engine({request.param: vlm, "matcher": matcher}, batch_size=2, lengths=(64, 832))
    jax.clear_caches()  # a family's programs: of all together a process could not hold the memory maps


@functools.cache
def verdicts():
    """What `jaxvqa models` says, of the first model of each kind."""
    return {model.kind: model.verdicts for model in reversed(matrix())}


def generator_for(vlm):
    """Random weights; its pairs of layers are those of the rule."""
    config = GeneratorConfig.of(vlm.config.decoder.width, latent_width=8, num_heads=2, mlp_width=8, num_layers=1)
    pairs = vif.layer_pairs(vlm.config.decoder.num_layers)
    return vif.Trained(config, parameters(specs(config)), vlm.facts.fingerprint, vlm.name, pairs, 0.4)


def grid_of(name, method, facts, sample):
    """Rows and columns of the map that a method makes of the first image."""
    image, count = sample.image, len(sample.images)
    if name in ("focus", "truth_map"):
        return (method if name == "focus" else method.like).view_of(image).grid
    if name != "vicrop maps=rel_att_high":
        return facts.geometry(image.size, count).grid
    rows, columns, size = high_res_split(image.size, TILE)
    h, w = facts.geometry(size, count).grid
    return rows * h, columns * w


def passes_of(name, answer, image):
    if name == "focus":  # its map, and the one or two regions that it verifies
        return (2 if answer.forward_passes.search == 2 else 3, 1)
    if name == "truth_map":
        return (1 if answer.forward_passes.search == 1 else 2, 1)
    if name == "vicrop maps=rel_att_high":
        rows, columns, _ = high_res_split(image.size, TILE)
        return (2 * rows * columns, 1)
    return PASSES[name]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_method_works_with_every_family_or_is_refused_before_it_begins(engine, case):
    """Three images of different sizes in batches of two, and a question about two: text, boxes in the first image, maps
    on its own grid, passes as counted, the further image in the last prompt; and each answer is the same alone."""
    vlm, name, options = engine.default, case.partition(" ")[0], CASES[case]
    options = options | ({"generator": generator_for(vlm)} if name == "vif" else {})
    (kind, _), _ = engine.models.items()
    said = verdicts()[kind].get(case, verdicts()[kind][name])
    try:
        method = methods.bind(methods.resolve(name, **options), vlm.facts)
    except UserError as refused:
        assert not said.works and str(refused).replace(vlm.name, "this model") == said.reason
        return
    assert said.works

    asked = [*SAMPLES, PAIR]
    answers = list(engine.run(asked, method))
    for sample, answer in zip(asked, answers, strict=True):
        (W, H), boxes = sample.image.size, answer.boxes
        assert answer.error is None, repr(answer.error)
        assert json.dumps(answer.record()) and answer.text.strip() == answer.text
        assert answer.forward_passes == passes_of(case, answer, sample.image)
        assert len(boxes) > 0 if name in WITH_BOXES else name == "cof" or len(boxes) == 0
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (W, H)).all() and (boxes[:, :2] < boxes[:, 2:]).all()
        assert (answer.grid is None) == (answer.heatmap is None) == (name in WITHOUT_MAP)
        if answer.grid is not None:
            assert answer.grid.shape == grid_of(case, method, vlm.facts, sample)
            assert answer.heatmap.shape == preview_size(sample.image.size)[::-1]
            assert np.isfinite(answer.grid).all()
            assert name == "cof" or answer.grid.size == 1 or np.ptp(answer.grid) > 0
    one, *_, two = (answer.log[-1].prompt.count(MARKER) for answer in answers)
    assert two == one + (name != "blind")

    for sample, answer in zip(asked[1:], answers[1:], strict=True):
        (alone,) = engine.run([sample], method)
        assert (alone.text, alone.forward_passes, alone.cost) == (answer.text, answer.forward_passes, answer.cost)
        np.testing.assert_array_equal(alone.boxes, answer.boxes)
        np.testing.assert_array_equal(alone.grid, answer.grid)


def test_every_method_and_every_family_of_the_table_is_tried():
    assert {case.partition(" ")[0] for case in CASES} == set(methods.BUILTIN)
    assert set(FAMILIES) == {model.kind for model in matrix()} and len(matrix()) == len(PUBLISHED)
