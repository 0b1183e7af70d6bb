"""VIF: maps generated from middle layers, mixed into the attention of deep layers, in the one pass that answers."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from jaxvqa import methods
from jaxvqa.errors import UserError
from jaxvqa.methods import Facts, check_choice, fill
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import preview_size
from jaxvqa.requests import Answer, Sample
from jaxvqa.taps import Plugin
from jaxvqa.vif import Trained, load, plugin

ASKING = Vanilla()
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"sample": False, "inject_decode": True},
    "released": {"sample": True, "inject_decode": False, "map_norm": "softmax", "text_self_mask": False},
}


@dataclass(frozen=True)
class Vif:
    """VIF: text tokens of deep layers attend to a map that a trained generator makes from middle layers' states.

    It needs a generator that was trained for the model; none is bundled. `heatmap` is the first image's map, the mean
    over the pairs of layers.
    """

    name: ClassVar[str] = "vif"
    paper: ClassVar[str] = (
        "From Attenuation to Attention: Variational Information Flow Manipulation for Fine-Grained Visual Perception"
    )

    generator: str | Trained | None = None
    """The trained generator: a folder that `jaxvqa.vif.save` wrote, or one that is loaded (on a mesh: by
    `jaxvqa.vif.load(folder, mesh=mesh)`)."""
    alpha: float | None = None
    """α, the weight of the map; several images share it equally. None is what the generator was trained with (0.5)."""
    extract: tuple[int, ...] | None = None
    """l_mid, decoder layers (0-based) whose output the maps are made of; None is what the generator was trained with:
    11, 13, 15, 17 of 32 layers, elsewhere those at the same relative depth (`jaxvqa.vif.layer_pairs`)."""
    inject: tuple[int, ...] | None = None
    """l_deep, the layers, one for each of `extract`, into whose attention they are mixed; None as above: 25, 27, 29,
    31 of 32 layers."""
    preset: Literal["default", "released"] = "default"
    """What the following are where they are None: "released" is the code as it was published."""
    map_norm: str | None = None
    """How a mixture becomes a map M: divided by its "sum", or by "softmax" (released); None is the generator's own."""
    sample: bool | None = None
    """Whether z is sampled from the prior (released), or its mean (default)."""
    inject_decode: bool | None = None
    """Whether generated tokens are injected, too, as in training (default), or the prompt alone (released)."""
    text_self_mask: bool | None = None
    """Whether the generator's text tokens see no padding; None is the generator's own. Without (released), a map
    depends on the length to which its prompt was padded."""
    seed: int = 0
    """Of a sampled z, with the sample's id."""
    like: Vanilla = ASKING
    """What asks the question."""
    facts: Facts | None = None
    """The model; filled in when the method is bound to it."""

    def __post_init__(self):
        check_choice(self, "preset", tuple(PRESETS))
        if self.map_norm is not None:
            check_choice(self, "map_norm", ("sum", "softmax"))
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"vif: alpha={self.alpha}; expected 0 to 1")

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "Vif":
        bound = fill(fill(self, **preset), **PRESETS[self.preset])
        if facts.queries:
            raise UserError(
                f"vif: its maps are of image tokens that show a cell each; {facts.name} sees an image through queries"
            )
        if bound.generator is None:
            raise UserError(
                f"vif needs a generator trained for {facts.name}, and none is given or bundled: train one, and give "
                "its folder (written by jaxvqa.vif.save) as the option generator"
            )
        trained = bound.generator
        if isinstance(trained, str):
            trained = load(trained, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
        if facts.fingerprint != trained.backbone:
            raise UserError(
                f"vif: the generator was trained for another model ({trained.backbone_name}, configuration "
                f"{trained.backbone[:12]}), not for {facts.name} ({facts.fingerprint[:12]}): give one trained for it"
            )
        extract, inject = zip(*trained.pairs, strict=True)
        own = trained.config
        bound = fill(bound, alpha=trained.alpha, map_norm=own.map_norm, text_self_mask=own.text_self_mask)
        bound = replace(fill(bound, extract=extract, inject=inject), generator=trained, facts=facts)
        if len(bound.extract) != len(bound.inject) or max(bound.inject) >= facts.num_layers:
            raise UserError(
                f"vif: extract={bound.extract}, inject={bound.inject}; expected as many of one as of the other, and "
                f"{facts.name} has layers 0 to {facts.num_layers - 1}"
            )
        return replace(bound, like=methods.bind(self.like, facts))

    @cached_property
    def plugin(self) -> Plugin:
        """The plugin of all requests: of one identity, so that they run in batches."""
        assert isinstance(self.generator, Trained) and self.extract and self.inject, "bound"
        assert self.alpha is not None and self.inject_decode is not None, "bound"
        config = replace(self.generator.config, map_norm=self.map_norm, text_self_mask=self.text_self_mask)
        pairs = tuple(zip(self.extract, self.inject, strict=True))
        return plugin(self.generator.params, config, pairs, alpha=self.alpha, decode=self.inject_decode)

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        assert self.facts is not None, "bound"
        seed = (sample.random(self.seed).integers(2**31, dtype=np.int32),) if self.sample else ()
        reply = yield replace(next(self.like(sample)), plugin=self.plugin, args=seed)
        if not sample.images:
            return Answer(reply.text)
        view = self.facts.geometry(sample.image.size, len(sample.images))
        grid = view.on_grid(reply.value[0])
        return Answer(reply.text, grid=grid, heatmap=view.to_image(grid, preview_size(sample.image.size)))
