"""Methods by name: what there is, how one is configured, and the presets that belong to a model.

A method is any callable that takes a `requests.Sample` and returns a generator of requests. Ours are frozen dataclasses
of options whose `__call__` is that generator; a user's plain generator function serves as well. Packages add methods
through the entry point group `jaxvqa.methods`: a name, and such a dataclass or function.
"""

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxvqa.errors import UserError

if TYPE_CHECKING:
    from jaxvqa.geometry import Geometry
    from jaxvqa.prompts import Template

GROUP = "jaxvqa.methods"

BUILTIN = {
    "vanilla": "jaxvqa.methods.vanilla:Vanilla",
    "vicrop": "jaxvqa.methods.vicrop:Vicrop",
    "cof": "jaxvqa.methods.cof:Cof",
    "hiperson": "jaxvqa.methods.hiperson:HiPerson",
    "focus": "jaxvqa.methods.focus:Focus",
    "vif": "jaxvqa.methods.vif:Vif",
    "blind": "jaxvqa.methods.controls:Blind",
    "random_crop": "jaxvqa.methods.controls:RandomCrop",
    "rival_crop": "jaxvqa.methods.controls:RivalCrop",
    "other_map": "jaxvqa.methods.controls:OtherMap",
    "truth_map": "jaxvqa.methods.controls:TruthMap",
    "truth_crop": "jaxvqa.methods.controls:TruthCrop",
    "mask_reweight": "jaxvqa.methods.controls:MaskReweight",
}


class Depth(NamedTuple):
    """A layer where a paper puts it: `layer` (0-based) of `of`. In a model of another depth: `scaled_layer`."""

    layer: int
    of: int


_LLAMA, _QWEN = Depth(14, 32), Depth(22, 36)
MIDDLE = {
    "llava": _LLAMA,
    "llava_next": _LLAMA,
    "llava_onevision": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "internvl": _QWEN,
    "instructblip": Depth(15, 32),
}
"""Family -> the middle layer in which a model's attention finds things, as ViCrop's release names it for LLaVA-1.5-7B,
Qwen2.5-VL-3B and InstructBLIP-7B. The others have that of the model with the same kind of decoder, Llama or Qwen."""

FAMILY_PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    **{("vicrop", family): {"layer": layer} for family, layer in MIDDLE.items()},
    ("vicrop", "llava"): {"layer": _LLAMA, "template": "vicrop_hf"},
    ("vicrop", "qwen3_vl"): {"layer": _QWEN, "base": 224},
    ("hiperson", "qwen2_5_vl"): {"layer": _QWEN},
    ("hiperson", "qwen3_vl"): {"base": 224},
    ("hiperson", "instructblip"): {"layer": MIDDLE["instructblip"]},
    ("focus", "llava_onevision"): {"layer_start": Depth(21, 28)},
    # Images at about their own size: the largest regions, 5 cells of 4 x 4 tokens, are 1 to 2 times 448 pixels wide.
    ("focus", "qwen2_5_vl"): {"blur": 2.0, "pool": 4},
    ("focus", "qwen3_vl"): {"blur": 2.0, "pool": 4},
    ("cof", "qwen2_5_vl"): {"units": "encoder"},
    ("cof", "qwen3_vl"): {"units": "thousandths"},
    ("cof", "internvl"): {"units": "thousandths"},
    ("vanilla", "instructblip"): {"ending": "open"},
}
"""(method, family) -> options, as the method's paper or release has them for that family and no other."""

PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    # Chosen on development questions (BUILD.md). HiPerson's other rows, the mean over the question's tokens, find any
    # plate of the colour or the shape.
    ("vicrop", "specks-llava"): {"layer": 5},
    ("hiperson", "specks-llava"): {"layer": 5, "query_rows": "last"},
    ("focus", "specks-llava"): {"layer_start": 2, "layer_end": 3},
    ("hiperson", "specks-llava-next"): {"layer": 3, "query_rows": "last"},
}
"""(method, model name) -> options, where a model wants other values than its family's, or the method's rule."""


class Facts(NamedTuple):
    """What a method may know of the model that it runs on; `None` in its options is filled in from this."""

    name: str
    num_layers: int
    """Decoder layers."""
    image_side: int
    """Pixels of the image encoder's square input."""
    grid: tuple[int, int]
    """Token rows and columns of an image."""
    template: "str | Template"
    """The prompt template that the model was trained with; of `prompts.TEMPLATES` the name."""
    view: "str | Callable[[tuple[int, int], int], Geometry]" = "pad"
    """How an image is laid into that square: "pad", "crop" or "squash"; or a function that says it by size (W, H) and
    the prompt's number of images."""
    detail: bool = False
    """Whether it sees images in detail: in tiles, or at about their own size (what FOCUS calls global-local)."""
    fingerprint: str = ""
    """Of the model's configuration (`models.fingerprint`): tells what was trained for it."""
    family: str = "llava"
    """The module of `jaxvqa.models` that computes with it."""
    queries: bool = False
    """Whether it sees an image through queries, so that none of its tokens shows a cell (InstructBLIP)."""

    def geometry(self, size: tuple[int, int], num_images: int = 1) -> "Geometry":
        """Where each image token of an image of `size` (W, H) looks, in a prompt of so many images."""
        from jaxvqa import geometry

        if not isinstance(self.view, str):
            return self.view(size, num_images)
        return getattr(geometry, f"for_{self.view}")(*size, self.image_side, self.grid)


def names() -> list[str]:
    """All known methods: ours, then those of installed packages."""
    return [*BUILTIN, *sorted(set(_plugins()) - set(BUILTIN))]


def get(name: str) -> Any:
    """A method by its name: its options class, or a package's generator function.

    Raises UserError, with the close matches, for an unknown name.
    """
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in _plugins():
        return _plugins()[name].load()
    raise unknown("method", name, names())


def resolve(method: Any, **options: Any) -> Any:
    """A method from its name and options, or as given.

    method: a name, a configured method (`Vicrop(layer=12)`), an options class, or a user's generator function.
    Raises UserError for an unknown name or option, and for options beside something already configured.
    """
    if isinstance(method, str):
        method = get(method)
    if not isinstance(method, type):
        if not callable(method):
            raise UserError(f"method is {method!r}: expected a name ({', '.join(names())}) or a generator function")
        if not options:
            return method
        if dataclasses.is_dataclass(method):
            raise UserError(f"options {sorted(options)} beside a configured method: put them into {method!r}")
        return functools.partial(method, **options)
    if not dataclasses.is_dataclass(method):
        raise UserError(f"method class {method.__name__} is no dataclass of options; give an instance of it")
    known = [field.name for field in dataclasses.fields(method) if field.init]
    for option in options:
        if option not in known:
            raise unknown("option", option, known, of=f"method {method.__name__}")
    return method(**options)


def bind(method: Any, facts: Facts) -> Any:
    """The method with every option that depends on the model resolved: its `bind(facts, preset)`, where it has one.

    Raises UserError for a method that cannot work with the model.
    """
    if not hasattr(method, "bind"):
        return method
    return method.bind(facts, preset(method_name(method), facts))


def preset(name: str, facts: Facts) -> dict[str, Any]:
    """What a method's options are on a model where they are left open: its own presets, then its family's."""
    found = FAMILY_PRESETS.get((name, facts.family), {}) | PRESETS.get((name, facts.name), {})
    layers = facts.num_layers
    return {option: scaled_layer(*v, layers) if isinstance(v, Depth) else v for option, v in found.items()}


def middle_layer(facts: Facts) -> int:
    """The model's layer at the depth that `MIDDLE` says of its family; that of LLaVA's where it says nothing."""
    return scaled_layer(*MIDDLE.get(facts.family, _LLAMA), facts.num_layers)


def method_name(method: Any) -> str:
    """The name under which a method is recorded."""
    if isinstance(method, functools.partial):
        return method_name(method.func)
    return getattr(method, "name", None) or getattr(method, "__name__", type(method).__name__)


def method_options(method: Callable) -> dict[str, Any]:
    """The full configuration of a method."""
    if isinstance(method, functools.partial):
        return dict(method.keywords)
    if not dataclasses.is_dataclass(method):
        return {}
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


def fill(options: Any, **values: Any) -> Any:
    """A copy of a dataclass of options with those that are None replaced by `values`."""
    return dataclasses.replace(options, **{k: v for k, v in values.items() if getattr(options, k) is None})


def check_choice(options: Any, option: str, allowed: tuple[str, ...]) -> None:
    """UserError where an option is none of those allowed."""
    if getattr(options, option) not in allowed:
        raise UserError(f"{options.name}: {option}={getattr(options, option)!r}; expected one of {', '.join(allowed)}")


def scaled_layer(layer: int, of: int, num_layers: int) -> int:
    """The layer at the same relative depth: `layer` of `of` layers, in a model of `num_layers`, rounded half up."""
    return min((2 * layer * num_layers + of) // (2 * of), num_layers - 1)


def unknown(kind: str, name: str, known: Iterable[str], of: str = "") -> UserError:
    """The error for a name that is not among `known`: the close matches, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return UserError(f"unknown {kind} {name!r}{f' of {of}' if of else ''}{hint} (known: {', '.join(known) or 'none'})")


@functools.cache
def _plugins() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=GROUP)}


_CLASSES = {target.partition(":")[2]: name for name, target in BUILTIN.items()}


def __getattr__(attribute: str) -> Any:
    """`jaxvqa.methods.Vicrop` without importing jax for the names alone."""
    if attribute in _CLASSES:
        return get(_CLASSES[attribute])
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
