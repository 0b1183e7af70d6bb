"""One training loop: steps over batches that are functions of the step, checkpoints, exact restarts, a time budget."""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import register_dataclass

from jaxvqa.typing import Array, Float, Int


@register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that a restart needs. `seconds` is the time trained so far."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]
    seconds: Float[Array, ""]


StepFn = Callable[[Any, Any, Any, Float[Array, ""]], tuple[Any, Any, dict[str, Array]]]
"""(params, opt_state, batch, progress in [0, 1]) -> params, opt_state, sums of metrics."""


def start(params: Any, opt_state: Any) -> State:
    """The state before the first step."""
    return State(params, opt_state, jnp.int32(0), jnp.float32(0))


def fit(
    state: State,
    step_fn: StepFn,
    batch_of: Callable[[int], Any],
    folder: Path,
    *,
    steps: int,
    seconds: float = float("inf"),
    save_every: float = 300.0,
    log_every: int = 20,
    log: Callable[[str], None] = print,
) -> State:
    """Train until `steps` or `seconds` are used up, whichever comes first, and return the last state.

    `step_fn` is jitted here, with params and optimiser state donated (the caller's `state` is used up). Its `progress`
    is the larger used fraction of the two budgets, so a schedule that follows it ends where training ends. Metrics are
    pairs `name`, `name#` (sum and weight); their means over `log_every` steps go to `log` and to `folder/log.jsonl`.
    A checkpoint is written every `save_every` seconds and at the end; with one in `folder`, training goes on from it,
    and without a time budget the result is bit-equal to that of an uninterrupted run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step_fn = jax.jit(step_fn, donate_argnums=(0, 1))
    with ocp.CheckpointManager(
        (folder / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager:
        state = restore(manager, state) or state
        done, used, sums, saved, begun = int(state.step), float(state.seconds), {}, time.monotonic(), time.monotonic()
        params, opt_state = state.params, state.opt_state
        for step, batch in prefetch(batch_of, done, steps):
            elapsed = used + time.monotonic() - begun
            if elapsed >= seconds:
                break
            progress = max(step / steps, elapsed / seconds)
            params, opt_state, metrics = step_fn(params, opt_state, batch, jnp.float32(progress))
            sums = {k: sums.get(k, 0.0) + np.asarray(v, np.float64) for k, v in metrics.items()}
            done = step + 1
            elapsed = used + time.monotonic() - begun
            if done % log_every == 0:
                means = {k: round(float(v / max(sums[k + "#"], 1e-9)), 4) for k, v in sums.items() if k + "#" in sums}
                record = {"step": done, "seconds": round(elapsed, 1), "progress": round(progress, 4)} | means
                with (folder / "log.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
                log(" ".join(f"{k} {v:g}" for k, v in record.items()))
                sums = {}
            if time.monotonic() - saved > save_every:
                _save(manager, State(params, opt_state, jnp.int32(done), jnp.float32(elapsed)))
                saved = time.monotonic()
        state = State(params, opt_state, jnp.int32(done), jnp.float32(used + time.monotonic() - begun))
        if manager.latest_step() != done:
            _save(manager, state)
    return state


def restore(manager: ocp.CheckpointManager | Path, like: State) -> State | None:
    """The latest checkpoint (of a manager or a training folder), structured as `like`; None if there is none."""
    if isinstance(manager, Path):
        if not (manager / "checkpoints").exists():
            return None
        with ocp.CheckpointManager((manager / "checkpoints").absolute()) as opened:
            return restore(opened, like)
    if manager.latest_step() is None:
        return None
    state: Any = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
    return state


def _save(manager: ocp.CheckpointManager, state: State) -> None:
    manager.save(int(state.step), args=ocp.args.StandardSave(state))
    manager.wait_until_finished()


def prefetch(batch_of: Callable[[int], Any], start: int, stop: int, depth: int = 2) -> Iterator[tuple[int, Any]]:
    """(step, batch_of(step)) for the steps start..stop-1, made ahead by a thread; its errors are raised here."""
    ready: queue.Queue = queue.Queue(depth)
    finished = threading.Event()

    def work():
        for step in range(start, stop):
            try:
                item = (step, batch_of(step))
            except Exception as error:  # handed over to the consumer
                item = error
            while not finished.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if finished.is_set() or isinstance(item, Exception):
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        finished.set()
        thread.join()
