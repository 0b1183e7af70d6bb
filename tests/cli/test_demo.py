"""`jaxvqa demo`: scenes, tables, files; with a stand-in for the model, and once with the bundled one."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

import jaxvqa
from jaxvqa.cli import demo, main
from jaxvqa.requests import Answer, Passes

LOOKING = ["vicrop", "hiperson", "focus", "cof"]
KEYS = {"text", "boxes", "forward_passes", "status", "method", "model", "seconds"}


def answer(sample, method: str, error: Exception | None = None) -> Answer:
    """Vanilla answers a question mark; the others answer right, around the plate."""
    if error is not None:
        return Answer("", status="error", error=error, method=method, model="stand-in")
    if method == "vanilla":
        return Answer("?", forward_passes=Passes(0, 1), method=method, model="stand-in")
    return Answer(
        f"{sample.answer.lower()}.",
        boxes=[sample.box],
        heatmap=np.random.default_rng(0).random((16, 16)).astype(np.float32),
        forward_passes=Passes(2, 1),
        method=method,
        model="stand-in",
    )


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(jaxvqa, "load", lambda path: types.SimpleNamespace(name="stand-in"))
    monkeypatch.setattr(jaxvqa, "ask_many", lambda vlm, samples, method, **_: (answer(s, method) for s in samples))


def test_scenes_are_the_same_every_time_and_their_plates_have_rivals():
    first, again = demo.held_out(3), demo.held_out(3)
    for one, other in zip(first, again, strict=True):
        assert (one.question, one.answer, one.box) == (other.question, other.answer, other.box)
        assert np.array_equal(one.image, other.image)
    assert len({sample.question for sample in demo.held_out(8)}) > 1


def test_tables_show_answers_marks_and_passes(stand_in, capsys, tmp_path):
    assert main(["demo", "--samples", "2", "--out", str(tmp_path / "deep" / "out")]) == 0
    printed = capsys.readouterr()
    questions, methods = printed.out.split("\n\n")[:2]
    sample = demo.held_out(1)[0]
    line = questions.splitlines()[2]
    assert (
        sample.question in line
        and "? ✗" in line
        and f"{sample.answer.lower()}. ✓" in line
        and "1 / 3 / 3 / 3 / 3" in line
    )
    assert methods.splitlines()[2].split() == ["vanilla", "0", "of", "2", "1"]
    assert methods.splitlines()[3].split() == ["vicrop", "2", "of", "2", "2", "of", "2", "3"]
    assert "loading the bundled model" in printed.err


def test_demo_writes_a_picture_per_sample_and_one_page(stand_in, capsys, tmp_path):
    assert main(["demo", "--samples", "2", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"{number}-{method}.png" for number in ("01", "02") for method in sorted(LOOKING)),
        "index.html",
    ]
    shown, drawn = np.asarray(Image.open(tmp_path / "01-focus.png")), np.asarray(demo.held_out(1)[0].image)
    assert shown.shape == drawn.shape and (shown != drawn).any()
    page = (tmp_path / "index.html").read_text("utf-8")
    assert page.count("<section") == 2 and page.count("data:image/jpeg") == 2 * (1 + 2 * len(LOOKING))
    assert str(tmp_path / "index.html") in capsys.readouterr().out


def test_json_is_one_object_with_an_answer_per_method(stand_in, capsys, tmp_path):
    assert main(["demo", "--samples", "2", "--json", "--out", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["right"] == {"vanilla": 0} | dict.fromkeys(LOOKING, 2) and len(said["samples"]) == 2
    for one in said["samples"]:
        assert [given["method"] for given in one["methods"]] == ["vanilla", *LOOKING]
        assert all(KEYS < given.keys() for given in one["methods"])


def test_failed_sample_is_told_and_gives_exit_code_1(monkeypatch, stand_in, capsys, tmp_path):
    def ask_many(vlm, samples, method, **options):
        return [
            answer(one, method, ValueError("no luck") if (i, method) in ((0, "vanilla"), (1, "vicrop")) else None)
            for i, one in enumerate(samples)
        ]

    monkeypatch.setattr(jaxvqa, "ask_many", ask_many)
    assert main(["demo", "--samples", "3", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("a sample failed: ValueError: no luck") == 2
    assert "no luck" in (tmp_path / "index.html").read_text("utf-8")


def test_folder_that_cannot_be_written_is_refused(stand_in, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "file: File exists" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_runs_on_the_bundled_model(tmp_path):
    command = [sys.executable, "-m", "jaxvqa.cli", "demo", "--samples", "8", "--json", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["right"]["vicrop"] > said["right"]["vanilla"]
    assert all((tmp_path / name).exists() for name in ("01-vicrop.png", "08-cof.png", "index.html"))
    assert all(said["right"][method] > said["right"]["vanilla"] for method in ("hiperson", "focus"))
    assert [given["forward_passes"] for given in said["samples"][0]["methods"]][:3] == [1, 3, 3]
