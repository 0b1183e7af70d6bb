"""VIF's trained part: the generator of importance maps, the plugin that puts it into a model, and its folders."""

from jaxvqa.vif.folder import Trained, load, save
from jaxvqa.vif.generator import PRESETS, Generator, GeneratorConfig, initialise
from jaxvqa.vif.plugin import Flow, Injection, layer_pairs, plugin

__all__ = [
    "PRESETS",
    "Flow",
    "Generator",
    "GeneratorConfig",
    "Injection",
    "Trained",
    "initialise",
    "layer_pairs",
    "load",
    "plugin",
    "save",
]
