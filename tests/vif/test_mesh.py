"""VIF on eight devices is VIF on one.

The device count is fixed when jax starts, so this file is also the program of the child process.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


@pytest.mark.slow
def test_maps_and_states_on_a_mesh_are_those_of_one_device():
    """Batch, heads and weights are split; two images per row, sampled."""
    env = os.environ | {
        "XLA_FLAGS": FLAGS,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    out = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert float(out.stdout) < 1e-4, "largest difference"


def child():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from small import cells_from, parameters

    from jaxvqa import decoder, sharding, vif
    from jaxvqa.decoder import DecoderConfig, right_padded
    from jaxvqa.requests import Row
    from jaxvqa.sharding import BATCH, constrain
    from jaxvqa.vif import generator
    from jaxvqa.vif.plugin import begin

    jax.config.update("jax_default_matmul_precision", "highest")
    c = DecoderConfig(
        num_layers=4, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=4, vocab_size=40, max_length=64,
        rope_theta=1e4, rope_factor=1.0, norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied=True,
    )  # fmt: skip
    g = vif.GeneratorConfig.of(c.width, latent_width=8, num_heads=2, mlp_width=8, num_layers=2, num_slots=3)
    models = parameters(decoder.specs(c)), parameters(generator.specs(g), seed=1)
    x = np.random.default_rng(0).standard_normal((8, 16, c.width)).astype(np.float32)
    starts = np.array([[1, 6], [0, 8]] * 4, np.int32)
    lengths = np.array([16, 15, 14, 13] * 2, np.int32)

    def run(models, x, starts, lengths, seeds):
        params, weights = models
        x, starts, lengths, seeds = (constrain(a, BATCH) for a in (x, starts, lengths, seeds))
        last = jnp.zeros_like(lengths)[:, None]
        shapes = jnp.stack([jnp.full_like(starts, 2)] * 2, axis=-1)
        row = Row(cells_from(starts, (2, 2)), lengths, last, last == 0, None, None, (2, 2), 16, shapes=shapes)
        plugin = replace(vif.plugin(weights, g, ((0, 2), (1, 3))), carry=jax.vmap(begin)(row, seeds))
        hidden, cache, _, after = decoder.run(
            params, c, right_padded(x, lengths), plugins=(plugin,), capacity=17, backend="xla"
        )
        new = right_padded(x[:, :1], jnp.ones_like(lengths), cache.length)
        return hidden, decoder.run(params, c, new, cache=cache, plugins=after, backend="xla")[0], after[0].carry.maps

    data = x, starts, lengths, np.arange(8, dtype=np.int32)
    one = jax.jit(run)(models, *data)
    mesh = sharding.make_mesh(2, 2, 2)
    placed = sharding.shardings((decoder.specs(c), generator.specs(g)), mesh)
    with jax.set_mesh(mesh):
        many = jax.jit(run)(jax.device_put(models, placed), *data)
    differ = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), one, many)
    print(max(jax.tree.leaves(differ)))


if __name__ == "__main__":
    child()
