"""`jaxvqa models`: what works with what, as the methods themselves say it of the published configurations."""

import json

import pytest

from jaxvqa.cli import main, models
from jaxvqa.errors import UserError
from jaxvqa.methods.vanilla import Vanilla

LLAVA, LARGE, ONEVISION, QWEN, QWEN3, BLIP = (
    "llava-hf/llava-1.5-7b-hf",
    "llava-hf/llava-1.5-13b-hf",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen3-VL-8B-Instruct",
    "Salesforce/instructblip-vicuna-7b",
)


@pytest.fixture(scope="module")
def found():
    return {model.name: model for model in models.matrix()}


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        (LLAVA, "vicrop", {"layer": 14, "base": 336, "template": "vicrop_hf"}),
        (LARGE, "vicrop", {"layer": 18, "base": 336}),
        (QWEN, "vicrop", {"layer": 22, "base": 224, "template": "qwen2_5_vl"}),
        (QWEN3, "vicrop", {"layer": 22, "base": 224}),
        (BLIP, "vicrop", {"layer": 15, "base": 224}),
        (ONEVISION, "vicrop", {"layer": 17, "base": 384}),
        (LLAVA, "hiperson", {"layer": (31,), "base": 336}),
        (QWEN, "hiperson", {"layer": (22,), "base": 224}),
        (QWEN3, "hiperson", {"layer": (35,), "base": 224}),
        (BLIP, "hiperson", {"layer": (15,), "base": 224}),
        (LLAVA, "focus", {"layer_start": 14, "layer_end": 32, "s_dist": 3.0, "final": "canvas", "t_obj_dist": 1200.0}),
        (ONEVISION, "focus", {"layer_start": 21, "layer_end": 28, "s_dist": 2.0, "final": "two_image", "blur": 1.0}),
        (LLAVA, "vif", {"extract": (11, 13, 15, 17), "inject": (25, 27, 29, 31)}),
        (LARGE, "cof", {"lam": 4.5, "alpha": 1.0}),
    ],
)
def test_layers_and_windows_are_those_of_the_papers(found, name, method, options):
    said = found[name].verdicts[method].options
    assert {option: said[option] for option in options} == options


def test_what_cannot_work_is_refused_with_its_reason(found):
    blip = found[BLIP].verdicts
    for method in ("focus", "vif"):
        assert not blip[method].works and "sees an image through queries" in blip[method].reason
    pixels = "vicrop maps=pure_grad"
    assert found[LLAVA].verdicts[pixels].works and not found[QWEN].verdicts[pixels].works
    assert all(model.verdicts["vanilla"].works and not model.verdicts["vanilla"].reason for model in found.values())


def test_vif_works_where_a_generator_is_given(found):
    said = found[LLAVA].verdicts["vif"]
    assert said.works and "needs a generator trained for this model" in said.reason


@pytest.mark.parametrize("as_json", [False, True])
def test_the_table_says_what_the_methods_say(capsys, monkeypatch, as_json):
    def refuse(self, facts, preset):
        if facts.detail:
            raise UserError("vanilla: never in detail")
        return self

    monkeypatch.setattr(models, "PUBLISHED", {name: models.PUBLISHED[name] for name in ("llava-1.5-7b", "qwen2-vl-7b")})
    monkeypatch.setattr(Vanilla, "bind", refuse)
    assert main(["models", *(["--json"] if as_json else [])]) == 0
    printed = capsys.readouterr().out
    if as_json:
        said = json.loads(printed)
        (llava,), (qwen,) = said["llava"]["models"], said["qwen2_vl"]["models"]
        assert llava["verdicts"]["vanilla"]["works"] and "FOCUS" in llava["papers"] and said["internvl"]["models"] == []
        assert qwen["verdicts"]["vanilla"] == {"works": False, "reason": "vanilla: never in detail", "options": {}}
        return
    (row,) = [line for line in printed.splitlines() if line.startswith("vanilla ")]
    first, second = (line for line in printed.splitlines() if line.startswith("bundled model"))
    assert first.startswith("bundled model, the default of --model: ") and first.endswith("specks-llava (8.8 MB)")
    assert second.endswith("specks-llava-next (8.8 MB)")
    mark, crossed, note = row.split()[1:]
    assert (mark, crossed) in (("✓", "✗"), ("+", "-")) and f"\n{note}: vanilla: never in detail" in printed
