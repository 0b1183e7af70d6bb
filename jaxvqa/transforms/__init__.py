"""Pure functions on readouts: arrays in, heat maps or taps out."""

from jaxvqa.transforms.normalise import minmax
from jaxvqa.transforms.relative_attention import relative_attention

__all__ = ["minmax", "relative_attention"]
