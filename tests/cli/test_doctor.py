"""What `jaxvqa doctor` finds, and what it says when something is not as it should be."""

import json
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from jaxvqa.cli import doctor, main


def test_installed_packages_are_found_with_their_versions():
    found = {check.name: check for check in doctor.packages() if check.group == "package"}
    assert found["jax"].ok and found["jax"].detail == metadata.version("jax")
    assert {"python", "jaxvqa", "flax", "transformers", "numpy"} <= found.keys()
    assert all(check.core for check in found.values())


def test_missing_package_and_old_version_are_named_with_the_extra_that_adds_them(monkeypatch):
    wanted = ["no-such-package>=2 ; extra == 'viz'", "pytest>=999 ; extra == 'viz'", "jax>=0.1"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda package: wanted if package == "jaxvqa" else [])
    viz = next(check for check in doctor.packages() if check.name == "viz")
    assert not viz.ok and not viz.core
    assert "no-such-package is not installed" in viz.detail and ">=999 is needed" in viz.detail
    assert "pip install 'jaxvqa[viz]'" in viz.detail


def test_extra_of_an_extra_is_followed():
    """`jax[cuda13]` is met by jax alone as far as its name goes, and means its plugin."""
    assert doctor._faults(Requirement("jax")) == []
    nested = doctor._faults(Requirement("jaxvqa[viz]"))
    assert nested == [fault for wanted in doctor._requirements("jaxvqa", "viz") for fault in doctor._faults(wanted)]
    assert doctor._requirements("jaxvqa", "viz") != doctor._requirements("jaxvqa")


def test_package_that_is_not_installed_is_broken_core(monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    (check,) = doctor.packages()
    assert check.core and not check.ok and "pip install jaxvqa" in check.detail


def test_every_backend_is_tried_and_the_plain_one_works():
    found = {check.name: check for check in doctor.backends()}
    assert found["xla"].ok and found["xla"].core and found["xla_chunked"].ok
    assert all(check.ok or "cannot serve" in check.detail for check in found.values())


def test_backend_with_other_values_does_not_pass(monkeypatch):
    from jaxvqa import attention

    right = attention.attend
    scale = {"xla": 1.0, "xla_chunked": 1.5}
    monkeypatch.setattr(
        attention, "attend", lambda *a, backend, **k: right(*a, backend="xla", **k) * scale.get(backend, 1)
    )
    found = {check.name: check for check in doctor.backends()}
    assert found["xla"].ok and not found["xla_chunked"].ok and "differs from xla" in found["xla_chunked"].detail


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, 1)])
def test_exit_code_says_whether_the_core_works(monkeypatch, capsys, works, code):
    monkeypatch.setattr(doctor, "packages", lambda: [doctor.Check("package", "jaxvqa", works, "0", core=True)])
    for check in ("devices", "backends", "bundled_model"):
        found = [doctor.Check("extra", check, False, "absent")]
        monkeypatch.setattr(
            doctor, check, type("Named", (), {"__name__": check, "__call__": lambda self, f=found: f})()
        )
    assert main(["doctor"]) == code
    printed = capsys.readouterr().out
    assert ("BROKEN" in printed) != works and ("The core works." in printed) == works
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["ok"] == works
