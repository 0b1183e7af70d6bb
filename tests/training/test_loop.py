import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvqa.training.loop import fit, prefetch, restore, start

TX = optax.adam(0.1)


def batch_of(step):
    return np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)


def step_fn(params, opt_state, batch, progress):
    def loss_of(w):
        return jnp.mean(jnp.square(batch @ w - batch.sum(1)))

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, opt_state = TX.update(grads, opt_state)
    params = optax.apply_updates(params, jax.tree.map(lambda u: u * (1 - progress), updates))
    return params, opt_state, {"loss": loss, "loss#": 1.0, "progress": progress, "progress#": 1.0}


def fresh():
    params = jnp.zeros(3)
    return start(params, TX.init(params))


def quiet(_):
    pass


def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path):
    whole = fit(fresh(), step_fn, batch_of, tmp_path / "whole", steps=20, log=quiet)

    def failing(step):
        if step == 13:
            raise RuntimeError("killed")
        return batch_of(step)

    with pytest.raises(RuntimeError, match="killed"):
        fit(fresh(), step_fn, failing, tmp_path / "parts", steps=20, save_every=0.0, log=quiet)
    assert int(restore(tmp_path / "parts", fresh()).step) == 13
    parts = fit(fresh(), step_fn, batch_of, tmp_path / "parts", steps=20, log=quiet)
    for a, b in zip(
        jax.tree.leaves((whole.params, whole.opt_state)), jax.tree.leaves((parts.params, parts.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_is_not_trained_further(tmp_path):
    first = fit(fresh(), step_fn, batch_of, tmp_path, steps=4, log=quiet)
    again = fit(fresh(), step_fn, batch_of, tmp_path, steps=4, log=quiet)
    assert int(again.step) == 4
    np.testing.assert_array_equal(first.params, again.params)


def test_a_spent_time_budget_ends_training_and_is_remembered(tmp_path):
    state = fit(fresh(), step_fn, batch_of, tmp_path, steps=10**6, seconds=0.5, log=quiet)
    assert 0 < int(state.step) < 10**6 and float(state.seconds) >= 0.5
    assert int(fit(fresh(), step_fn, batch_of, tmp_path, steps=10**6, seconds=0.5, log=quiet).step) == int(state.step)


def test_progress_is_the_used_share_of_the_budget_and_metrics_are_means(tmp_path):
    lines = []
    fit(fresh(), step_fn, batch_of, tmp_path, steps=4, log_every=2, log=lines.append)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4] and len(lines) == 2
    assert records[0]["progress"] == pytest.approx(1 / 8) and records[1]["progress"] == pytest.approx(5 / 8)
    assert records[1]["loss"] < records[0]["loss"]


def test_nothing_is_restored_from_an_empty_folder(tmp_path):
    assert restore(tmp_path, fresh()) is None


def test_batches_come_in_order_and_their_errors_reach_the_caller():
    assert list(prefetch(lambda n: n * n, 2, 6)) == [(2, 4), (3, 9), (4, 16), (5, 25)]

    def broken(n):
        raise KeyError("no such scene")

    with pytest.raises(KeyError, match="no such scene"):
        list(prefetch(broken, 0, 3))
