"""FOCUS end to end against its reference on transformers: targets, maps, regions, verification, answers, passes."""

import json

import pytest

pytest.importorskip("torch")

from agreement import Agreement, answers, both, tiny_samples
from focus_reference import ASK, LEAD, extract, focus
from tiny import tiny_llava

from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.specks.strata import samples

pytestmark = pytest.mark.parity

BOTH = "compare the positions"
EXAMPLES = [
    (question, f"To answer the question, I need know the location of {what} so that I can {aim}. {LEAD}{what}.")
    for question, what, aim in (
        ("What colour is the dog's collar?", "dog with a collar", "determine the color"),
        ("Is the red bicycle on the left or the right of the blue van?", "red bicycle and blue van", BOTH),
        ("What is written on the sign above the shop door?", "sign above the shop door", "read the text"),
        (
            "Is the man with the umbrella in front of or behind the woman with the white hat?",
            "man with the umbrella and woman with the white hat",
            BOTH,
        ),
        ("Which animal is printed on the green flag?", "green flag", "determine the animal"),
        ("How many boats are in the picture?", "all boats", "count the boats"),
    )
]
# The library's names of the reference's options.
NAMES = dict(nms="nms_iou", clip="clip_negative", dilate="merge_dilation", t_far="t_obj_dist")


@pytest.fixture(scope="module")
def finer_folder(tmp_path_factory):
    """A random LLaVA with 8x8 cells."""
    return tiny_llava(tmp_path_factory.mktemp("reference") / "finer", image_size=112)


def compare(measured, name, folder, asked, targets, *, layers, limit=20, **options):
    """targets: by hand, or a file of examples by which both find them."""
    llava, vlm = both(folder)
    given = dict(targets=targets) if isinstance(targets, tuple) else dict(icl_examples=str(targets))
    given |= {NAMES.get(key, key): value for key, value in options.items()}
    given |= dict(layer_start=layers[0], layer_end=layers[-1] + 1, like=Vanilla("vicuna_v1", "short", limit))
    with Agreement(measured, f"FOCUS, {name}") as agree:
        for image, question, ours in answers(asked, vlm, "focus", **given):
            llava.margin, agree.samples = float("inf"), agree.samples + 1
            found = by_hand(targets) if isinstance(targets, tuple) else extract(llava, question, EXAMPLES)
            theirs = focus(llava, image, question, found, layers=layers, limit=limit, **options)
            reads = [entry.prompt for entry in ours.log if entry.kind == "Read"]
            assert len(reads) == len(found) and all(
                f"a {name} in" in p for (name, _), p in zip(found, reads, strict=True)
            )
            if len(found) == 1:
                agree.maps(theirs["maps"][0], ours.grid)
            if agree.same(theirs["boxes"], ours.boxes, theirs["lead"]):
                assert ours.forward_passes == (theirs["search"], 1)
                agree.same(theirs["text"], ours.text, llava.margin)


def by_hand(targets):
    return [(name[4:].removesuffix("s"), 2) if name.startswith("all ") else (name, 1) for name in targets]


@pytest.mark.parametrize(
    "targets, options",
    [
        (("red plate",), dict()),
        (("blue one",), dict(n_steps=2, norm="column", s_dist=2.0, s_max=7, threshold=0.9)),
        (("red plate",), dict(n_steps=1, overrun=False, clip=False)),
        (("red plate",), dict(n_steps=2, feature="key_no_rope")),
        (("sign", "red plate"), dict(n_steps=3, t_far=1e4)),
        (("sign", "red plate"), dict(n_steps=3, overrun=False, t_far=1.0)),
        (("sign", "red plate", "blue one"), dict(n_steps=3, t_far=1.0, s_max=3)),
        (("all plates",), dict(t_type2=-0.2, s_max=3, t_far=1.0)),
        (("all plates", "sign"), dict(t_type2=0.0, dilate=5.0, n_steps=2)),
    ],
)
def test_random_model(finer_folder, measured, targets, options):
    options = (
        dict(n_steps=4, overrun=True, n_anchors=12, s_min=3, s_max=5, s_dist=1.5, threshold=0.5, nms=0.3) | options
    )
    name = f"random model, {', '.join(targets)}, {options['n_steps']} steps, {options['s_max']}"
    compare(measured, name, finer_folder, tiny_samples(), targets, layers=(1, 2), limit=8, **options)


@pytest.mark.slow
def test_bundled_model(tmp_path, measured):
    questions, replies = zip(*EXAMPLES, strict=True)
    file = tmp_path / "examples.json"
    file.write_text(json.dumps(dict(question_template=ASK, question_list=questions, response_list=replies)))
    asked = [
        sample
        for stratum, count in (("small", 8), ("near", 3), ("far", 3))
        for sample in samples(stratum, "dev", count)
    ]
    options = dict(n_steps=3, n_anchors=30, s_min=3, s_max=3, s_dist=2.0, t_far=457.0)
    compare(measured, "bundled model", SPECKS_LLAVA, asked, file, layers=(3, 4, 5), **options)
