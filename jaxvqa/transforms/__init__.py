"""Pure functions on readouts: arrays in, heat maps or taps out."""

from jaxvqa.transforms.attention_statistics import attention_ratio, box_weights, image_share, spatial_entropy
from jaxvqa.transforms.blur import average_pool, gaussian_blur
from jaxvqa.transforms.gaussian_mixture import gaussian_mixture
from jaxvqa.transforms.gradient import (
    attention_gradient,
    gradient_length,
    gradient_map,
    high_pass_mask,
    match_layer,
    pixel_gradient_map,
    text_rows,
)
from jaxvqa.transforms.information_flow import information_flow, inject
from jaxvqa.transforms.normalise import distribution, minmax
from jaxvqa.transforms.query_map import query_map
from jaxvqa.transforms.relative_attention import relative_attention
from jaxvqa.transforms.resample import overlap, resample
from jaxvqa.transforms.reweight import log_reweight
from jaxvqa.transforms.value_similarity import value_similarity

__all__ = [
    "attention_gradient",
    "attention_ratio",
    "average_pool",
    "box_weights",
    "distribution",
    "gaussian_blur",
    "gaussian_mixture",
    "gradient_length",
    "gradient_map",
    "high_pass_mask",
    "image_share",
    "information_flow",
    "inject",
    "log_reweight",
    "match_layer",
    "minmax",
    "overlap",
    "pixel_gradient_map",
    "query_map",
    "relative_attention",
    "resample",
    "spatial_entropy",
    "text_rows",
    "value_similarity",
]
