"""The run-time type checker that `conftest.py` puts on every function of jaxvqa."""

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """beartype, but not for constructors: JAX rebuilds a parameter tree around specs, shardings and placeholders."""
    if function.__name__ == "__init__":
        return function
    try:
        return _check(function)
    except BeartypeDecorHintPep3119Exception:  # a Protocol that isinstance cannot check
        return function
