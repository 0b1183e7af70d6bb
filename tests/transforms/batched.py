"""What must hold for every pure function of arrays with leading batch axes."""

import functools

import jax
import numpy as np


@functools.cache
def _compiled(function):
    return jax.jit(function), jax.jit(jax.vmap(function))


def assert_batched(function, *args, order, rtol=1e-6, atol=0.0):
    """The result of a batch is that of its rows: one by one, vmapped, in any order, compiled or not.

    function: of the module, not made for the occasion (it is compiled once).
    """
    compiled, vmapped = _compiled(function)
    whole, order = np.asarray(function(*args)), np.asarray(order)
    for name, got, expected in (
        ("compiled, in another order", compiled(*[x[order] for x in args]), whole[order]),
        ("one by one", [compiled(*row) for row in zip(*args, strict=True)], whole),
        ("vmapped", vmapped(*args), whole),
    ):
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=name)
