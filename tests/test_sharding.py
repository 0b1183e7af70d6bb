"""Sharding: the same results on eight devices as on one, the batch split, weights gathered one layer at a time.

The device count is fixed when jax starts, so this file is also the program of the child processes: it runs everything
on each mesh, compares with one device, and prints what it found as one JSON object for the tests to judge.
"""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from jaxvqa import attention, decoder, decoding, sharding
from jaxvqa.decoder import DecoderConfig
from jaxvqa.errors import JaxVQAError
from jaxvqa.models import llava
from jaxvqa.models.llava import LlavaConfig
from jaxvqa.sharding import BATCH, layout
from jaxvqa.taps import Edit, Mix, Plugin, ReadSpec, Tap, Taps
from jaxvqa.vision.clip import ClipConfig

MESHES = ("8x1x1", "2x2x2", "1x4x2", "2x1x4")
TRAINED = ("2x2x2", "2x1x4")
B, T, IMAGES, CAPACITY = 8, 14, 1, 40
# The two stacks have 7 and 6 layers and no other array an axis of 7 or 6: a gather of a whole stack shows.
CONFIG = LlavaConfig(
    vision=ClipConfig(28, 14, 32, 48, num_layers=6, num_heads=4, norm_eps=1e-5, activation="quick_gelu"),
    decoder=DecoderConfig(
        num_layers=7, width=32, mlp_width=48, num_heads=8, num_kv_heads=4, head_dim=4, vocab_size=48, max_length=64,
        rope_theta=1e4, rope_factor=1.0, norm_eps=1e-5, qkv_bias=True, qk_norm=True, tied=True,
    ),
    image_token_id=3, feature_layers=(-2,), select="default", projector_activation="gelu", projector_bias=True,
)  # fmt: skip
D = CONFIG.decoder
READ = ReadSpec((1, 2), frozenset({"rows", "values", "keys", "hidden"}), heads="all")
EVERY = replace(READ, layers=tuple(range(D.num_layers)), heads="mean")
FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"
FLAGS += " --xla_llvm_disable_expensive_passes=true"  # compiling is most of this test


def nudge(params, cut, stream, carry):
    """A plugin: changes the stream, keeps a state per row, edits the layers after its cut."""
    stream = replace(stream, hidden=stream.hidden + params)
    bias = 0.1 * stream.positions[None, :, None, :].astype(jnp.float32)
    return stream, carry + stream.hidden.mean(axis=(1, 2)), (Edit(Tap(key_bias=bias), cut, D.num_layers),)


def inputs():
    """Parameters and one batch, as host arrays: the same in every process."""
    rng = np.random.default_rng(0)
    f32 = partial(jax.tree.map, lambda x: np.asarray(x, np.float32))

    def noisy(spec):
        return (spec.init == "ones") + 0.2 * rng.standard_normal(spec.shape)

    maps = np.zeros((1, B, IMAGES, T))
    maps[..., 2:6] = 0.25
    ids = rng.integers(4, D.vocab_size, (B, T))
    ids[:, 2:6] = CONFIG.image_token_id
    batch = dict(
        pixels=f32(rng.standard_normal((B * IMAGES, 28, 28, 3))),
        ids=ids.astype(np.int32),
        lengths=np.array([14, 13, 12, 11, 10, 9, 14, 8], np.int32),
        rows=np.array([[5, 7]] * B, np.int32),
        options=rng.integers(4, D.vocab_size, (B, 3, 3)).astype(np.int32),
        option_lengths=np.array([[1, 2, 3]] * B, np.int32),
    )
    edits = f32(dict(
        key_bias=rng.standard_normal((D.num_layers, B, D.num_heads, T)),
        alpha=np.full((1, B, IMAGES), 0.3),
        maps=maps,
        perturb=rng.standard_normal((D.num_layers, B, 2, D.num_heads, D.head_dim)),
    ))  # fmt: skip
    return f32(sharding.tree_map_specs(noisy, llava.specs(CONFIG))), batch, edits


def make_taps(edits, rows, start=0, stop=D.num_layers):
    mix = Mix(edits["alpha"], edits["maps"], jnp.full((B, IMAGES), 5, jnp.int32))
    tap = Tap(edits["key_bias"][start:stop], mix, edits["perturb"][start:stop])
    return Taps((Edit(tap, start, stop),), rows)


def prefill(params, batch, taps=Taps(), backend="xla", **kwargs):
    features = llava.encode_images(params, CONFIG, batch["pixels"], backend=backend)
    features = jnp.reshape(features, (B, -1, D.width), out_sharding=layout(BATCH))
    is_image = batch["ids"] == CONFIG.image_token_id
    slots = jnp.where(is_image, jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1, -1)
    images = dict(features=features, slots=slots)
    return llava.prefill(params, CONFIG, batch["ids"], batch["lengths"], **images, taps=taps, backend=backend, **kwargs)


def forward(params, batch, edits):
    """Prefill with every tap and readout, then decode, score options, go on with a turn and sample."""
    plugins = (Plugin(nudge, (3,), params=jnp.full(D.width, 0.1), carry=jnp.zeros(B)),)
    taps = make_taps(edits, batch["rows"], 1, 3)
    out = prefill(params, batch, taps, capacity=CAPACITY, spec=READ, plugins=plugins)
    decode = partial(decoding.decode, params.decoder, D, max_new_tokens=4, eos_ids=(2,))
    everywhere = make_taps(edits, None).edits[0]
    greedy = decode(out, taps=Taps((replace(everywhere, tap=replace(everywhere.tap, perturb=None)),)))
    scores = decoding.score_options(params.decoder, D, out, batch["options"], batch["option_lengths"])
    turn = llava.extend(params, CONFIG, batch["options"][:, 0], batch["option_lengths"][:, 0], greedy.cache)
    sampled = decode(turn, keys=jax.random.split(jax.random.key(0), B), temperature=0.7)
    return dict(prefill=out, greedy=greedy, scores=scores, turn=turn.logits, sampled=sampled)


def gradients(params, batch, edits):
    """Of a training loss over all tokens, by parameters and by edits, rematerialised, through the chunked attention."""

    def loss(params, edits):
        out = prefill(params, batch, make_taps(edits, batch["rows"]), "xla_chunked", remat=True, spec=EVERY)
        log_probs = jax.nn.log_softmax(decoder.finish(params.decoder, D, out.hidden))
        targets = jax.nn.one_hot(jnp.roll(batch["ids"], -1, axis=1), D.vocab_size)
        return -(log_probs * targets).sum() / (B * T) + jnp.square(out.readouts.rows).mean()

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, edits)
    return dict(value=value, params=grads[0], edits=grads[1])


def place(params, batch, mesh):
    by_row = NamedSharding(mesh, sharding.partition(BATCH))
    return jax.device_put(params, sharding.shardings(llava.specs(CONFIG), mesh)), jax.device_put(batch, by_row)


def names_and_leaves(tree):
    return [(jax.tree_util.keystr(p, simple=True, separator="."), x) for p, x in jax.tree.leaves_with_path(tree)]


def deviation(got, want, relative) -> dict[str, float]:
    """Largest difference per top-level part, absolute or against a leaf's largest number; tokens and counts count."""
    worst: dict[str, float] = {}
    for (name, a), (_, b) in zip(names_and_leaves(got), names_and_leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        part = name.split(".")[0]
        # The gradient of the tower's key bias is zero by identity: noise, not to be compared with itself.
        scale = max(np.abs(b).max(initial=0.0), 1e-3) if relative else 1.0
        worst[part] = max(worst.get(part, 0.0), float(np.abs(a - b).max(initial=0.0) / scale))
    return worst


def gathers(hlo: str) -> list[list[int]]:
    """Shapes of all that the program gathers."""
    results = re.findall(r"= (.*?) all-gather(?:-start)?\(", hlo)
    return [[int(n) for n in shape.split(",")] for r in results for shape in re.findall(r"\w+\[([\d,]+)\]", r)]


def measure(program, args, mesh, want):
    """Run on a mesh: deviations from one device, leaves whose batch is whole, shapes gathered."""
    with jax.set_mesh(mesh):
        compiled = jax.jit(program).lower(*args).compile()
        got = compiled(*args)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    whole = []
    for leaf, x in names_and_leaves(got):
        if program is forward and x.ndim and B in x.shape[:2]:
            axis = x.shape.index(B)
            if x.sharding.shard_shape(x.shape)[axis] != B // ways:
                whole.append(leaf)
    off = deviation(got, want, relative=program is gradients)
    return dict(deviation=off, whole=whole, gathers=gathers(compiled.as_text())), got


def report():
    """On eight devices: every mesh against one device."""
    attention.CHUNK = 4
    params, batch, edits = inputs()
    found = {}
    wanted = {p.__name__: jax.jit(p)(params, batch, edits) for p in (forward, gradients)}
    for name in MESHES:
        mesh = sharding.make_mesh(*map(int, name.split("x")))
        args = (*place(params, batch, mesh), edits)
        found[name], _ = measure(forward, args, mesh, wanted["forward"])
        if name in TRAINED:
            found[name]["gradients"], grads = measure(gradients, args, mesh, wanted["gradients"])
            same = jax.tree.map(lambda g, p: g.sharding == p.sharding, grads["params"], args[0])
            found[name]["unlike"] = [leaf for leaf, ok in names_and_leaves(same) if not ok]
    return found


def one_of_two(process: str, address: str):
    """One of two processes: each holds half of the rows; their sums of scores and counts meet on every process."""
    jax.distributed.initialize(address, num_processes=2, process_id=int(process))
    params, batch, _ = inputs()
    mesh = sharding.make_mesh(data=2)
    mine = slice(int(process) * B // 2, (int(process) + 1) * B // 2)
    rows = NamedSharding(mesh, sharding.partition(BATCH))
    batch = {k: jax.make_array_from_process_local_data(rows, v[mine]) for k, v in batch.items()}
    params = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda at: x[at]),
        params,
        sharding.shardings(llava.specs(CONFIG), mesh),
    )
    with jax.set_mesh(mesh):
        best, count = jax.jit(statistics)(params, batch)
    return dict(devices=jax.device_count(), best=float(best), count=int(count))


def statistics(params, batch):
    """Sufficient statistics over all rows: a sum and a count, never a mean."""
    logits = prefill(params, batch).logits
    return jax.nn.log_softmax(logits).max(axis=-1).sum(), (batch["lengths"] > 10).sum()


LLAVA_7B = dict(
    text_config=dict(model_type="llama", vocab_size=32064),
    vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                       image_size=336, patch_size=14),
)  # fmt: skip


def ahead_of_time(backend: str):
    """Compile the prefill of LLaVA-1.5-7B for eight v5e chips that are not here; bytes per chip and gathered shapes."""
    from jax.experimental import topologies

    config = LlavaConfig.from_hf(LLAVA_7B)
    mesh = sharding.make_mesh(fsdp=4, tensor=2, devices=topologies.get_topology_desc("v5e:2x4", "tpu").devices)
    jax.default_backend = lambda: "tpu"  # what a backend asks when it is chosen and built
    specs, rows = llava.specs(config), NamedSharding(mesh, sharding.partition(BATCH))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        sharding.abstract(specs, jnp.bfloat16),
        sharding.shardings(specs, mesh),
    )
    pixels, ids, lengths = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for shape, dtype in (((8, 336, 336, 3), jnp.float32), ((8, 640), jnp.int32), ((8,), jnp.int32))
    )

    def program(params, pixels, ids, lengths):
        features = llava.encode_images(params, config, pixels, backend=backend)
        return llava.prefill(params, config, ids, lengths, features, ids % 577 - 1, capacity=656, backend=backend)

    with jax.set_mesh(mesh):
        compiled = jax.jit(program).lower(params, pixels, ids, lengths).compile()
    memory = compiled.memory_analysis()
    return dict(
        parameters=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        gathers=gathers(compiled.as_text()),
    )


def start(program: str, *args: str, devices: int = 1) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": FLAGS.format(devices), "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, __file__, program, *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return result(start("report", devices=8))


on_each_mesh = pytest.mark.parametrize("mesh", MESHES)


@pytest.mark.slow
@on_each_mesh
def test_a_mesh_changes_no_result(mesh, found, measured):
    for part, value in found[mesh]["deviation"].items():
        measured(f"mesh {mesh}, {part}: largest deviation from one device", value)
        assert value <= 1e-4, part


@pytest.mark.slow
@pytest.mark.parametrize("mesh", TRAINED)
def test_a_mesh_changes_no_gradient_and_each_lies_where_its_parameter_lies(mesh, found, measured):
    for part, value in found[mesh]["gradients"]["deviation"].items():
        measured(f"mesh {mesh}, gradients of {part}: largest relative deviation from one device", value)
        assert value <= 5e-4, part
    assert found[mesh]["unlike"] == []


@pytest.mark.slow
@on_each_mesh
def test_whatever_has_a_batch_comes_back_split(mesh, found):
    assert found[mesh]["whole"] == []


@pytest.mark.slow
@on_each_mesh
def test_weights_are_gathered_one_layer_at_a_time(mesh, found):
    stacks = {D.num_layers, CONFIG.vision.num_layers}
    for run in (found[mesh], found[mesh].get("gradients")):
        if run is not None:
            assert [s for s in run["gathers"] if stacks & set(s)] == []
            if mesh == "2x2x2":  # gate_proj of one layer: whole in fsdp, split in tensor
                assert [D.width, D.mlp_width // 2] in run["gathers"]


@pytest.mark.slow
def test_two_processes_add_up_their_rows():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    both = [result(p) for p in [start("one_of_two", str(i), address) for i in range(2)]]
    params, batch, _ = inputs()
    best, count = jax.jit(statistics)(params, batch)
    for got in both:
        assert got["devices"] == 2
        assert got["count"] == count
        assert got["best"] == pytest.approx(float(best), abs=1e-4)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla_chunked", "splash"])
def test_a_7b_model_compiles_for_a_tpu_slice_that_is_not_here(backend, measured):
    pytest.importorskip("libtpu")
    got = result(start("ahead_of_time", backend))
    measured(f"7B prefill on 8 v5e chips, {backend}: GiB of parameters per chip", got["parameters"] / 2**30)
    measured(f"7B prefill on 8 v5e chips, {backend}: GiB of temporaries per chip", got["temporary"] / 2**30)
    assert got["parameters"] < 1.1 * 2 * sharding.count(llava.specs(LlavaConfig.from_hf(LLAVA_7B))) / 8
    assert got["temporary"] < 1e9
    assert [s for s in got["gathers"] if {24, 32} & set(s)] == []


def test_without_a_mesh_the_program_knows_of_none():
    jaxpr = str(jax.make_jaxpr(forward)(*inputs()))
    assert not re.search(r"reshard|shard_map|sharding_constraint|mesh", jaxpr)


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)


def test_heads_that_the_mesh_does_not_divide_are_listed_in_one_line():
    with pytest.raises(JaxVQAError, match=r"does not divide.*layers\.k_proj: 4 over tensor \(8\)") as error:
        sharding.shardings(llava.specs(CONFIG), abstract_mesh(1, 1, 8))
    assert "\n" not in str(error.value)


def test_a_batch_that_the_mesh_does_not_divide_is_refused_at_the_entry():
    params = sharding.abstract(llava.specs(CONFIG))
    ids, lengths = jax.ShapeDtypeStruct((6, T), jnp.int32), jax.ShapeDtypeStruct((6,), jnp.int32)
    with jax.sharding.use_abstract_mesh(abstract_mesh(2, 4, 1)):
        with pytest.raises(JaxVQAError, match=r"batch of 6 does not split over 8 devices") as error:
            jax.eval_shape(partial(llava.prefill, c=CONFIG), params, ids=ids, lengths=lengths)
    assert "\n" not in str(error.value)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(JaxVQAError, match=r"mesh 64 × 1 × 2 needs 128 devices, found"):
        sharding.make_mesh(64, 1, 2)


def test_two_axes_of_one_array_cannot_share_a_mesh_axis():
    with pytest.raises(JaxVQAError, match="collide"):
        sharding.partition(("heads", "mlp"))


if __name__ == "__main__":
    programs = {p.__name__: p for p in (report, one_of_two, ahead_of_time)}
    print(json.dumps(programs[sys.argv[1]](*sys.argv[2:])))
