"""Array types with shapes, e.g. `Float[Array, "B T D"]`; plain arrays where jaxtyping is not installed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # A leaf is an array of JAX or NumPy, or in a tree of declarations an `ArraySpec`: jaxtyping checks it in the tests.
    Array = Any
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as UInt8
else:
    from jax import Array

    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ModuleNotFoundError:

        class _Shaped:
            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = Int = UInt8 = _Shaped

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]
