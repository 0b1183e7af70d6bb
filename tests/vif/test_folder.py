"""Generators are saved and loaded whole, and a folder that is none is refused in one clear line."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import parameters

from jaxvqa import vif
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.vif import generator
from jaxvqa.vif.generator import GeneratorConfig

C = GeneratorConfig.of(6, "released", latent_width=4, num_heads=2, num_layers=1, num_slots=2, share_slots=False)


@pytest.fixture(scope="module")
def trained():
    return vif.Trained(C, parameters(generator.specs(C)), "0123", "llava", ((11, 25), (13, 27)), 0.4)


@pytest.fixture
def folder(trained, tmp_path):
    return vif.save(trained, tmp_path / "generator")


def test_what_is_saved_is_loaded_again(trained, folder):
    again = vif.load(folder, posterior=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    for name in ("config", "backbone", "backbone_name", "pairs", "alpha"):
        assert getattr(again, name) == getattr(trained, name)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "generator.json"}


def test_answering_needs_no_posterior_and_may_be_in_half_precision(trained, folder):
    again = vif.load(str(folder), dtype="bfloat16")
    assert again.params.posterior is None
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), replace(trained.params, posterior=None))
    jax.tree.map(np.testing.assert_array_equal, again.params, expected)


def test_a_generator_says_what_it_is_without_its_arrays(trained):
    assert len(repr(trained)) < 500 and "llava" in repr(trained)


def test_an_existing_folder_is_replaced_only_when_told_to(trained, folder):
    with pytest.raises(JaxVQAError, match="not empty"):
        vif.save(trained, folder)
    vif.save(replace(trained, alpha=0.1), folder, overwrite=True)
    assert vif.load(folder).alpha == 0.1


def test_a_folder_without_a_generator_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no VIF generator; expected a folder with generator.json"):
        vif.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(format=0), "format 0, expected 1"),
        (lambda about: about.pop("alpha"), "alpha is missing"),
        (lambda about: about["config"].update(dropout=0.1), "dropout is unknown"),
        (lambda about: about["config"].update(map_norm="max"), "map_norm='max'"),
        (lambda about: about["config"].update(num_slots=3), r"misshapen: prior.slots.queries: found \[2, 4\]"),
    ],
)
def test_a_generator_json_that_does_not_fit_is_refused(folder, change, message):
    about = json.loads((folder / "generator.json").read_text())
    change(about)
    (folder / "generator.json").write_text(json.dumps(about))
    with pytest.raises(JaxVQAError, match=message):
        vif.load(folder)


def test_missing_and_unknown_tensors_are_listed(folder):
    weights = load_file(folder / "model.safetensors")
    weights["prior.other"] = weights.pop("prior.mean.bias")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(JaxVQAError) as error:
        vif.load(folder)
    assert "unknown: prior.other" in str(error.value) and "missing: prior.mean.bias" in str(error.value)
