"""What every test runs under: no network, checked array shapes, exact matmuls; fixtures that several files share."""

import gc
import importlib.util
import os
from pathlib import Path

for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[switch] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The suite is many small compilations: without LLVM's optimiser it takes a third less.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Before the first import of jaxvqa: every function then checks the shapes and types that its signature promises.
install_import_hook("jaxvqa", "typechecking.check")

# One compilation of a property test may take seconds, and its first example pays for it.
hypothesis.settings.register_profile("jaxvqa", deadline=None, max_examples=12, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("jaxvqa")


def pytest_configure(config):
    import jax

    # Accelerators round f32 matmuls to bf16 or tf32 by default; the tolerances of the tests assume f32.
    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("torch") is None:
        skip = pytest.mark.skip(reason="torch is not installed (extra: parity)")
        for item in items:
            if "parity" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Compiled programs take memory maps, of which Linux gives a process 65530: beyond them compilation aborts."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
        gc.collect()


_MEASURED: dict[str, str] = {}


@pytest.fixture(scope="session")
def measured():
    """measured(name, value): a figure that the run prints at its end, such as the largest deviation of a check."""

    def note(name: str, value: float) -> None:
        _MEASURED[name] = f"{value:.3g}"

    return note


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes (pytest -n)
        session.config.workeroutput["measured"] = _MEASURED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _MEASURED.update(getattr(node, "workeroutput", {}).get("measured", {}))


def pytest_terminal_summary(terminalreporter):
    if _MEASURED:
        terminalreporter.section("measured")
        for name in sorted(_MEASURED):
            terminalreporter.write_line(f"{name:<78} {_MEASURED[name]:>10}")
