"""Fine-grained visual question answering from inside multimodal LLMs, as pure JAX transforms.

    vlm = jaxvqa.load("llava-hf/llava-1.5-7b-hf")
    answer = jaxvqa.ask(vlm, "photo.jpg", "What does the small sign say?", method="vicrop")

Names are imported when they are first used, so that scoring a file does not start jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxvqa import convert, geometry, images, methods, prompts, regions, sharding, specks, transforms
    from jaxvqa.engine import Engine, ask, ask_many
    from jaxvqa.matcher import Matcher, load_matcher
    from jaxvqa.requests import Answer, Sample
    from jaxvqa.taps import Edit, Mix, ReadSpec, Tap, Taps
    from jaxvqa.vlm import VLM, collate, load


__version__ = "0.1.0"

_HOMES = {
    "VLM": "vlm",
    "collate": "vlm",
    "load": "vlm",
    "Matcher": "matcher",
    "load_matcher": "matcher",
    "Engine": "engine",
    "ask": "engine",
    "ask_many": "engine",
    "Answer": "requests",
    "Sample": "requests",
    "Edit": "taps",
    "Mix": "taps",
    "ReadSpec": "taps",
    "Tap": "taps",
    "Taps": "taps",
}
_MODULES = ("convert", "geometry", "images", "methods", "prompts", "regions", "sharding", "specks", "transforms")

__all__ = [
    "VLM",
    "Answer",
    "Edit",
    "Engine",
    "Matcher",
    "Mix",
    "ReadSpec",
    "Sample",
    "Tap",
    "Taps",
    "ask",
    "ask_many",
    "collate",
    "convert",
    "geometry",
    "images",
    "load",
    "load_matcher",
    "methods",
    "prompts",
    "regions",
    "sharding",
    "specks",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxvqa.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"jaxvqa.{name}")
    raise AttributeError(f"module 'jaxvqa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
