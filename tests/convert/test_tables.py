"""Transforms and the LLaVA table: both directions, slices, and the agreement with the declared parameters."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llava

from jaxvqa.convert import llava
from jaxvqa.convert.tables import (
    Naming,
    as_is,
    conv,
    expected_names,
    heads_bias,
    heads_in,
    heads_out,
    leaves,
    transpose,
)
from jaxvqa.models.llava import LlavaConfig, specs

# transform, shape in the checkpoint, our shape, and the same rearrangement written out
CASES = {
    "as_is": (as_is, (5, 6), (5, 6), lambda x: x),
    "transpose": (transpose, (5, 6), (6, 5), lambda x: x.T),
    "heads_out": (
        heads_out,
        (12, 5),
        (5, 3, 4),
        lambda x: np.stack([x[4 * n : 4 * n + 4].T for n in range(3)], axis=1),
    ),
    "heads_in": (heads_in, (5, 12), (3, 4, 5), lambda x: np.stack([x[:, 4 * n : 4 * n + 4].T for n in range(3)])),
    "heads_bias": (heads_bias, (12,), (3, 4), lambda x: np.stack([x[4 * n : 4 * n + 4] for n in range(3)])),
    "conv": (conv, (5, 3, 2, 2), (3, 2, 2, 5), lambda x: np.einsum("dcij->cijd", x)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_transform_rearranges_as_written_out_and_back(name):
    transform, theirs, ours, written_out = CASES[name]
    x = np.arange(np.prod(theirs), dtype=np.float32).reshape(theirs)
    y = transform.forward(x, ours)
    assert np.array_equal(y, written_out(x))
    assert transform.source_shape(ours) == theirs
    assert np.array_equal(transform.inverse(y), x)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_any_slice_is_read_without_reading_more(name, data):
    transform, theirs, ours, written_out = CASES[name]
    x = np.arange(np.prod(theirs), dtype=np.float32).reshape(theirs)
    bounds = []
    for n in ours:
        start = data.draw(st.integers(0, n - 1))
        bounds.append((start, data.draw(st.integers(start + 1, n))))
    seen = []

    def read(index):
        seen.append(x[index])
        return x[index]

    part = transform.read(read, ours, tuple(bounds))
    assert np.array_equal(part, written_out(x)[tuple(slice(*b) for b in bounds)])
    assert sum(s.size for s in seen) == part.size


def config_of(tmp_path, **changes) -> LlavaConfig:
    config = LlavaConfig.from_hf(llava.read_config(tiny_llava(tmp_path / "tiny", num_kv_heads=2)))
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"qkv_bias": True}, {"qk_norm": True}])
def test_every_declared_parameter_has_its_tensors(tmp_path, changes):
    config = config_of(tmp_path, **changes)
    paths = {path for path, _ in expected_names(llava.TABLE, specs(config)).values()}
    assert paths == leaves(specs(config)).keys()


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"qkv_bias": True}, {"qk_norm": True}, {"rope_factor": 2.0}])
def test_a_config_survives_its_hf_form(tmp_path, changes):
    config = config_of(tmp_path, **changes)
    assert LlavaConfig.from_hf(llava.to_hf(config)) == config


def test_no_tensor_is_left_unread_without_a_reason():
    for naming in (llava.HF, llava.ORIGINAL, llava.CLIP):
        assert all(len(reason) > 10 for reason in naming.unread.values())


def test_the_first_prefix_that_fits_renames():
    naming = Naming((("a.b.", "x."), ("a.", "y.")), {"*.buffer": "a buffer that tests make up"})
    assert [naming.canonical(n) for n in ("a.b.c", "a.c", "b.c", "a.buffer")] == ["x.c", "y.c", "b.c", None]
