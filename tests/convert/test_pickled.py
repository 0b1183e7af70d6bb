"""The restricted reader of pickled weights: it builds what torch saved, and runs nothing."""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import tiny_llava, write_json

from jaxvqa.convert import ConversionError, convert, load
from jaxvqa.convert.pickled import pickled_tensors
from jaxvqa.convert.tables import flatten


class _Named:
    """Pickles as the global `module.name`, whether or not that exists here."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class _Storage:
    def __init__(self, kind, key, numel):
        self.pid = ("storage", _Named("torch", kind), key, "cpu", numel)


class _Tensor:
    def __init__(self, *args):
        self.args = args


class _Call:
    def __init__(self, function, *args):
        self.function, self.args = function, args


class _Pickler(pickle._Pickler):
    """Writes what torch.save writes, without torch."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Storage):
            self.save(obj.pid)
            self.write(pickle.BINPERSID)
        elif isinstance(obj, _Tensor):
            self.save(_Call(_Named("torch._utils", "_rebuild_tensor_v2"), *obj.args, False, collections.OrderedDict()))
        elif isinstance(obj, _Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def write(path, state, storages, compression=zipfile.ZIP_STORED):
    program = io.BytesIO()
    _Pickler(program, protocol=2).dump(state)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


KIND = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def write_arrays(path, arrays):
    """Each array in a storage of its own."""
    state, storages = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        strides = tuple(s // array.itemsize for s in array.strides)
        state[name] = _Tensor(_Storage(KIND[array.dtype.name], str(i), array.size), 0, array.shape, strides)
        storages[str(i)] = array
    return write(path, state, storages)


def whole(tensor):
    return tensor.read(tuple(slice(0, n) for n in tensor.shape))


def refused(path):
    with pytest.raises(ConversionError) as e:
        list(pickled_tensors(path))
    return str(e.value)


def test_views_of_one_storage_are_read_by_offset_and_stride(tmp_path):
    x = np.arange(24, dtype=np.float32)
    storage = _Storage("FloatStorage", "0", 24)
    state = {"a": _Tensor(storage, 4, (3, 4), (4, 1)), "t": _Tensor(storage, 0, (4, 6), (1, 4))}
    a, t = pickled_tensors(write(tmp_path / "x.bin", state, {"0": x}))
    assert np.array_equal(whole(a), x[4:16].reshape(3, 4))
    assert np.array_equal(whole(t), x.reshape(6, 4).T)
    assert np.array_equal(t.read((slice(1, 3), slice(2, 4))), x.reshape(6, 4).T[1:3, 2:4])


def test_a_pickled_checkpoint_converts_like_its_safetensors(tmp_path):
    folder = tiny_llava(tmp_path / "a", dtype="bfloat16")
    expected = flatten(load(folder, dtype=None)[1])
    raw = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(raw)
    files = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in files.items():
        write_arrays(folder / file, {name: raw[name] for name in part})
    weight_map = {name: file for file, part in files.items() for name in part}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    with pytest.raises(ConversionError, match="jaxvqa convert --from-pickle"):
        load(folder)
    params = flatten(load(convert(folder, tmp_path / "out", from_pickle=True), dtype=None)[1])
    assert all(np.array_equal(params[p], expected[p]) and params[p].dtype == expected[p].dtype for p in expected)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    trace = tmp_path / "ran"
    for module, name, argument in (
        (os.system.__module__, "system", f"touch {trace}"),
        ("builtins", "eval", f"open({str(trace)!r}, 'w')"),
        ("builtins", "getattr", "x"),
        ("torch.nn.modules.linear", "Linear", "x"),
        ("torch", "load", "x"),
        ("collections", "OrderedDict.fromkeys", "x"),
    ):
        path = write(tmp_path / "x.bin", {"w": _Call(_Named(module, name), argument)}, {})
        assert f"names {module}.{name}" in refused(path)
    assert not trace.exists()


def test_allowed_names_cannot_be_altered_or_misused(tmp_path):
    """BUILD sets attributes on what is on the stack; none of what the reader hands out takes them."""
    rebuild = _Named("torch._utils", "_rebuild_tensor_v2")
    for target in (rebuild, _Named("torch", "FloatStorage"), _Named("collections", "OrderedDict")):
        program = io.BytesIO()
        pickler = _Pickler(program, protocol=2)
        pickler.write(pickle.PROTO + b"\x02")
        pickler.save(target)
        pickler.save((None, {"x": 1}))
        program.write(pickle.BUILD + pickle.STOP)
        with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
            archive.writestr("archive/data.pkl", program.getvalue())
        assert "not a dictionary of tensors" in refused(tmp_path / "x.bin")
    assert "not a dictionary" in refused(
        write(tmp_path / "y.bin", {"w": _Call(_Named("torch", "FloatStorage"), 3)}, {})
    )
    assert "not a dictionary" in refused(write(tmp_path / "y.bin", {"w": _Tensor("no storage", 0, (1,), (1,))}, {}))


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides"),
    [(24, 20, (5,), (1,)), (24, 0, (2, 13), (12, 1)), (24, 0, (3,), (2**40,)), (10**9, 0, (10**9,), (1,))],
)
def test_a_view_beyond_its_storage_is_refused(tmp_path, numel, offset, shape, strides):
    state = {"w": _Tensor(_Storage("FloatStorage", "0", numel), offset, shape, strides)}
    path = write(tmp_path / "x.bin", state, {"0": np.zeros(24, np.float32)})
    assert "reaches beyond its storage" in refused(path)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"), [(-1, (2,), (1,)), (0, (-2,), (1,)), (8, (2,), (-1,)), (0, (2,), ())]
)
def test_negative_and_odd_views_are_refused(tmp_path, offset, shape, strides):
    state = {"w": _Tensor(_Storage("FloatStorage", "0", 24), offset, shape, strides)}
    assert "offset" in refused(write(tmp_path / "x.bin", state, {"0": np.zeros(24, np.float32)}))


def test_files_that_are_no_weights_are_refused(tmp_path):
    x = np.zeros(4, np.float32)
    tensor = _Tensor(_Storage("FloatStorage", "0", 4), 0, (4,), (1,))
    (tmp_path / "legacy.bin").write_bytes(pickle.dumps({"w": 1}))
    assert "not a torch file in zip form" in refused(tmp_path / "legacy.bin")
    assert "not a dictionary of tensors" in refused(write(tmp_path / "a.bin", {"w": [tensor]}, {"0": x}))
    assert "not a dictionary of tensors" in refused(write(tmp_path / "b.bin", [tensor], {"0": x}))
    assert "storage '0' is not in the file" in refused(write(tmp_path / "c.bin", {"w": tensor}, {}))
    assert "is compressed" in refused(write(tmp_path / "d.bin", {"w": tensor}, {"0": x}, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "e.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00(X\x01")
    assert "not a dictionary of tensors" in refused(tmp_path / "e.bin")


@pytest.mark.parity
def test_what_torch_saves_is_read_without_torch(tmp_path):
    torch = pytest.importorskip("torch")
    folder = tiny_llava(tmp_path / "a", dtype="float16")
    expected = flatten(load(folder, dtype=None)[1])
    state = collections.OrderedDict(
        (n, torch.from_numpy(t)) for n, t in load_file(folder / "model.safetensors").items()
    )
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4)
    base = torch.randn(10, 6)
    torch.save({"t": base[2:7].t()}, tmp_path / "t.bin")
    (t,) = pickled_tensors(Path(tmp_path / "t.bin"))
    assert np.array_equal(whole(t), base[2:7].t().numpy())
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    params = flatten(load(convert(folder, tmp_path / "out", from_pickle=True), dtype=None)[1])
    assert all(np.array_equal(params[p], expected[p]) for p in expected)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.bin")
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "module.bin")
