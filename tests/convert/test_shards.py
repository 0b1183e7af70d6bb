"""Loading onto a mesh: every process reads the bytes of its own shards, each once, and gets the right values."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_llava

from jaxvqa.convert import convert, load
from jaxvqa.convert.tables import flatten

WORKER = Path(__file__).with_name("shards_worker.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of three shards, and its parameters as one device reads them."""
    base = tmp_path_factory.mktemp("sharded")
    folder = tiny_llava(base / "hf", shards=3)
    np.savez(base / "reference.npz", **{p: np.asarray(x) for p, x in flatten(load(folder, dtype=None)[1]).items()})
    return folder, base / "reference.npz"


def start(folder, reference, out, mesh, *process):
    command = [sys.executable, WORKER, folder, reference, out, *mesh, *process]
    return subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True)


def report(process, out):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return json.loads(out.read_text())


def test_each_slice_is_read_once_on_eight_devices(model, tmp_path):
    """data=2 replicates every parameter: its second copy must not be read again."""
    out = tmp_path / "out.json"
    found = report(start(*model, out, (2, 2, 2)), out)
    assert found["wrong"] == []
    assert found["split"] > 20
    assert found["read"] == found["own"] == found["total"]


def test_each_of_two_processes_reads_only_its_own_shards(model, tmp_path):
    """Both read what is replicated; of the rest each reads half."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    outs = [tmp_path / f"{i}.json" for i in range(2)]
    processes = [start(*model, out, (1, 4, 2), i, 2, port) for i, out in enumerate(outs)]
    for found in [report(p, out) for p, out in zip(processes, outs, strict=True)]:
        assert found["wrong"] == []
        assert found["read"] == found["own"]
        assert found["own"] < 0.6 * found["total"]


def test_a_converted_folder_is_restored_onto_a_mesh(model, tmp_path):
    folder, reference = model
    converted, out = convert(folder, tmp_path / "converted"), tmp_path / "out.json"
    found = report(start(converted, reference, out, (1, 4, 2)), out)
    assert found["wrong"] == []
    assert found["split"] > 20
