"""The papers' models at full size: abstractly built, with the published number of parameters, and as HF builds them."""

import importlib.util
from pathlib import Path

import pytest

from jaxvqa.errors import UserError

FILE = Path(__file__).parents[2] / "experiments" / "backbones.py"
SPEC = importlib.util.spec_from_file_location(FILE.stem, FILE)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

each_model = pytest.mark.parametrize("name", sorted(script.FILES))


@each_model
def test_a_model_has_the_published_number_of_parameters(name):
    record = script.published(name)
    assert script.count(record) == record["parameters"]


@pytest.mark.parity
@each_model
def test_transformers_builds_it_with_as_many(name):
    import torch
    import transformers

    config = script.published(name)["config"]
    architecture = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = architecture(architecture.config_class.from_dict(config))
    assert sum(p.numel() for p in model.parameters()) == script.published(name)["parameters"]


def test_a_picture_is_what_the_published_processor_makes_of_it():
    assert script.pictured(script.published("qwen3-vl-8b"))[1] == 1024
    assert script.pictured(script.published("internvl3.5-8b"))[1] == 3 * 256
    assert script.pictured(script.published("llava-next-vicuna-7b"))[1] == 576 + 24 * 25


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(UserError, match=r"model 'gpt': expected one of blip-itm-large, .*qwen3-vl-8b"):
        script.published("gpt")
    assert script.main(["--models", "gpt"]) == 2
    assert capsys.readouterr().err.startswith("backbones: model 'gpt'")
