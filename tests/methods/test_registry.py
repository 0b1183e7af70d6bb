"""Methods by name, their options, and the presets of models."""

import dataclasses
from importlib.metadata import EntryPoint

import pytest

from jaxvqa import methods
from jaxvqa.cli import main
from jaxvqa.cli.ask import configure
from jaxvqa.cli.methods import attribute_docs
from jaxvqa.errors import UserError
from jaxvqa.methods import Facts

LLAVA = Facts("llava-1.5-7b", 32, 336, (24, 24), "vicuna_v1")


def test_every_method_has_its_name_a_summary_and_documented_defaults():
    for name in methods.names():
        cls = methods.get(name)
        assert cls.name == name
        assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
        assert methods.resolve(name) == cls()


def test_controls_stand_together_after_the_methods_and_say_what_they_are():
    told = [methods.get(name).__doc__.startswith("Control: ") for name in methods.BUILTIN]
    assert told == sorted(told) and sum(told) == 7


def test_every_option_is_explained():
    for name in methods.BUILTIN:
        cls = methods.get(name)
        assert set(attribute_docs(cls)) == {field.name for field in dataclasses.fields(cls)}, name


def test_classes_are_attributes_of_the_package():
    assert methods.Vicrop is methods.get("vicrop")
    with pytest.raises(AttributeError):
        _ = methods.Nothing


def test_unknown_methods_and_options_name_the_close_ones():
    with pytest.raises(UserError, match=r"unknown method 'vicorp'; did you mean vicrop"):
        methods.resolve("vicorp")
    with pytest.raises(UserError, match=r"unknown option 'layers' of method Vicrop; did you mean layer"):
        methods.resolve("vicrop", layers=3)
    with pytest.raises(UserError, match=r"unknown method 'zzz' \(known: vanilla, vicrop"):
        methods.resolve("zzz")


def test_options_beside_a_configured_method_are_refused():
    with pytest.raises(UserError, match="beside a configured method"):
        methods.resolve(methods.Vicrop(layer=3), base=7)


@pytest.mark.parametrize(("num_layers", "layer"), [(32, 14), (40, 18), (28, 12), (6, 3), (3, 1), (1, 0)])
def test_vicrops_layer_is_14_of_32_at_the_same_depth_elsewhere(num_layers, layer):
    bound = methods.bind(methods.Vicrop(), LLAVA._replace(num_layers=num_layers))
    assert bound.layer == layer


def test_binding_fills_only_what_was_left_open_and_records_it():
    bound = methods.bind(methods.Vicrop(layer=3), LLAVA)
    assert (bound.layer, bound.base) == (3, 336)
    assert methods.method_options(bound)["base"] == 336
    assert methods.bind(methods.Vanilla(), LLAVA).template == "vicuna_v1"


def test_a_models_preset_goes_before_the_rule_and_after_the_user(monkeypatch):
    monkeypatch.setitem(methods.PRESETS, ("vicrop", LLAVA.name), {"layer": 9})
    assert methods.bind(methods.Vicrop(), LLAVA).layer == 9
    assert methods.bind(methods.Vicrop(layer=2), LLAVA).layer == 2
    assert methods.bind(methods.get("random_crop")(), LLAVA).like.layer == 9


def test_a_layer_that_the_model_lacks_is_refused():
    with pytest.raises(UserError, match=r"layer=32; llava-1.5-7b has layers 0 to 31"):
        methods.bind(methods.Vicrop(layer=32), LLAVA)


@pytest.mark.parametrize("option", [{"alignment": "offical"}, {"maps": "grad"}])
def test_a_choice_that_is_none_is_refused_with_the_choices(option):
    with pytest.raises(UserError, match="expected one of"):
        methods.resolve("vicrop", **option)


def test_packages_add_methods_by_entry_point(monkeypatch):
    point = EntryPoint("fractions", "fractions:Fraction", methods.GROUP)
    monkeypatch.setattr(methods, "entry_points", lambda group: [point] if group == methods.GROUP else [])
    methods._plugins.cache_clear()
    try:
        assert "fractions" in methods.names()
        assert methods.get("fractions").__name__ == "Fraction"
    finally:
        methods._plugins.cache_clear()


def plain(sample):
    """Says nothing."""
    yield from ()


def test_a_package_may_add_a_plain_generator_function(monkeypatch, capsys):
    point = EntryPoint("plain", f"{__name__}:plain", methods.GROUP)
    monkeypatch.setattr(methods, "_plugins", lambda: {"plain": point})
    monkeypatch.setattr(EntryPoint, "load", lambda self: plain)
    assert methods.resolve("plain") is plain and configure("plain", []) is plain
    with pytest.raises(UserError, match=r"unknown option 'layer' of method plain \(known: none\)"):
        configure("plain", ["layer=3"])
    assert main(["methods"]) == main(["methods", "plain"]) == 0
    assert capsys.readouterr().out.count("Says nothing") == 2


def test_a_users_function_is_a_method_with_its_options():
    def mine(sample, word="a"):
        yield word

    configured = methods.resolve(mine, word="b")
    assert next(configured(None)) == "b"
    assert (methods.method_name(configured), methods.method_options(configured)) == ("mine", {"word": "b"})
    assert methods.bind(configured, LLAVA) is configured


def test_a_class_that_is_no_dataclass_is_refused():
    with pytest.raises(UserError, match="no dataclass"):
        methods.resolve(type("Mine", (), {}))


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        methods.Vicrop().layer = 3
