"""Array types with shapes, e.g. `Float[Array, "B T D"]`; plain arrays where jaxtyping is not installed."""

from jax import Array

try:
    from jaxtyping import Bool, Float, Int, UInt8
except ModuleNotFoundError:

    class _Shaped:
        def __class_getitem__(cls, item):
            return item[0]

    Bool = Float = Int = UInt8 = _Shaped

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]
