"""The script on a tiny random model: its figures against NumPy on whole attention rows, what it writes and refuses."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_llava

import jaxvqa
from jaxvqa.prompts import GENERAL_QUESTION, render
from jaxvqa.taps import ReadSpec, Taps
from jaxvqa.vlm import collate

pytest.importorskip("matplotlib")

LAYERS, WIDTH, HEIGHT = 3, 48, 32
BOXES = [[5, 4, 15, 20], [25, 10, 45, 30], [0, 0, 48, 32], [35, 3, 40, 8]]
GOOD = {"image": "0.png", "question": "What?", "answer": "K", "box": [1, 2, 30, 40]}


@pytest.fixture(scope="module")
def script():
    file = Path(__file__).parents[2] / "experiments" / "attention_by_layer.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("attention") / "tiny-model"
    return str(tiny_llava(folder, text_layers=LAYERS, num_kv_heads=2, image_size=70, patch_size=14))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def run(script, model, folder: Path, records, *argv: str) -> dict:
    """attention.json of a run that must succeed."""
    (folder / "task.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = folder / "out"
    assert script.main(["--model", model, "--samples", str(folder / "task.jsonl"), "--out", str(out), *argv]) == 0
    return json.loads((out / "attention.json").read_text())


def questions(boxes, answers=("never said",) * 4):
    said = zip(boxes, answers, strict=True)
    return [
        {"image": f"{i}.png", "question": f"What is {'on the plate ' * i}?", "answer": a, "boxes": [box]}
        for i, (box, a) in enumerate(said)
    ]


def held(heat, geometry, box):
    """Sum of a map in a box, each cell weighed with the area that the box takes of it."""
    x, y = geometry.edges()
    across = np.clip(np.minimum(x[1:], box[2]) - np.maximum(x[:-1], box[0]), 0, None)
    down = np.clip(np.minimum(y[1:], box[3]) - np.maximum(y[:-1], box[1]), 0, None)
    return down @ heat @ across


@pytest.fixture(scope="module")
def attention(model, pictures):
    """maps(rows)[question] of all heads, asked and in general, each [L, N, R, P]; and the geometry of the pictures."""
    vlm, encoded = jaxvqa.load(model), []
    for record in questions(BOXES):
        for text in (record["question"], GENERAL_QUESTION):
            prompt = render(vlm.facts.template, text, ending="short")
            encoded.append(vlm.encode(str(pictures / record["image"]), prompt))
    wanted = [(*row.tokens.indices("user"), row.tokens.last) for row in encoded]
    longest = max(map(len, wanted))
    rows = np.array([(*at, *at[-1:] * (longest - len(at))) for at in wanted], np.int32)
    spec = ReadSpec(tuple(range(LAYERS)), frozenset({"rows"}), heads="all")
    read = np.asarray(vlm.prefill(collate(encoded), taps=Taps(rows=rows), spec=spec).readouts.rows, np.float64)

    def maps(which):
        found = []
        for n, row in enumerate(encoded):
            (start, count), size = row.tokens.image_spans[0], len(wanted[n])
            kept = slice(size - 1) if which == "question" else slice(size - 1, size)
            found.append(read[:, n, :, kept, start : start + count])
        return list(zip(found[::2], found[1::2], strict=True))

    return maps, encoded[0].geometries[0]


def expected(asked, general, geometry, box, heads):
    """Share, entropy and ratio of one question, each [L]; of every placement of the box, one by one."""
    heat, general = (maps.mean((1, 2)) for maps in (asked, general))
    p = asked if heads == "all" else heat[:, None, None]
    p = p / p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1).mean((1, 2)) / math.log(p.shape[-1])
    (W, H), w, h = geometry.image_size, box[2] - box[0], box[3] - box[1]
    everywhere = [(x, y, x + w, y + h) for x in range(W - w + 1) for y in range(H - h + 1)]
    ratio = []
    for relative in (heat / general).reshape(-1, *geometry.grid):
        ratio.append(held(relative, geometry, box) / np.mean([held(relative, geometry, at) for at in everywhere]))
    return {"share": heat.sum(-1), "entropy": entropy, "ratio": np.array(ratio)}


@pytest.mark.parametrize(("rows", "heads"), [("last", "mean"), ("question", "all")])
def test_the_figures_are_those_of_the_attention_of_all_heads(script, model, pictures, attention, rows, heads):
    options = ("--rows", rows, "--heads", heads)
    first = run(script, model, pictures, questions(BOXES), *options)
    assert first["questions"] == {"right": 0, "wrong": 4, "all": 4} and first["image_tokens"] == 25
    assert first["layers"][0]["right"]["ratio"] == {"mean": None, "standard_error": None, "count": 0}

    # Two of the answers are declared right, and one box is moved: only its ratio follows.
    said = [answer["text"].strip().rstrip(".") for answer in first["answers"]]
    assert len(said) == 4
    boxes = [[30, 15, 40, 31], *BOXES[1:]]
    report = run(script, model, pictures, questions(boxes, (*said[:2], "never", "said")), *options)
    assert report["questions"] == {"right": 2, "wrong": 2, "all": 4}
    for old, new in zip(first["layers"], report["layers"], strict=True):
        assert old["all"]["share"] == new["all"]["share"] and old["all"]["entropy"] == new["all"]["entropy"]
        assert abs(old["all"]["ratio"]["mean"] - new["all"]["ratio"]["mean"]) > 1e-4

    maps, geometry = attention
    found = [expected(*both, geometry, box, heads) for both, box in zip(maps(rows), boxes, strict=True)]
    for quantity in ("share", "entropy", "ratio"):
        values = np.stack([figures[quantity] for figures in found])
        for group, part in (("right", values[:2]), ("wrong", values[2:]), ("all", values)):
            got = [layer[group][quantity] for layer in report["layers"]]
            np.testing.assert_allclose([f["mean"] for f in got], part.mean(0), rtol=2e-4)
            error = part.std(0, ddof=1) / math.sqrt(len(part))
            np.testing.assert_allclose([f["standard_error"] for f in got], error, rtol=5e-3, atol=1e-5)


def test_it_prints_a_table_and_draws_right_and_wrong_in_three_pictures(script, model, pictures, capsys):
    said = [answer["text"].strip().rstrip(".") for answer in run(script, model, pictures, questions(BOXES))["answers"]]
    capsys.readouterr()
    records = questions(BOXES, (*said[:2], "never", "said"))
    records[0]["answer"] = ["another", said[0]]
    del records[3]["boxes"]
    report = run(script, model, pictures, records)
    assert [report["layers"][0][group]["ratio"]["count"] for group in ("right", "wrong", "all")] == [2, 1, 3]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + LAYERS and {line.count("|") for line in lines} == {11}
    assert "share, right (2)" in lines[0] and "ratio, all (4)" in lines[0] and " ± " in lines[2]
    for quantity in ("share", "entropy", "ratio"):
        with Image.open(pictures / "out" / f"{quantity}.png") as picture:
            pixels = set(picture.convert("RGB").get_flattened_data())
        assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= pixels, "both lines"


def test_its_default_task_is_specks(script, model, tmp_path):
    assert script.main(["--model", model, "--count", "3", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "attention.json").read_text())
    assert report["task"] == "Specks small" and report["layers"][0]["all"]["ratio"]["count"] == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no question in it"),
        ("{", "line 1: JSONDecodeError"),
        ("[1]", "line 1"),
        (json.dumps({"image": "0.png", "question": "What?"}), "line 1: KeyError 'answer'"),
        ("\n" + json.dumps(GOOD | {"box": [5, 5, 5, 9]}), "line 2: box [5.0, 5.0, 5.0, 9.0]; expected"),
        (json.dumps(GOOD | {"box": [1, 2, 3]}), "line 1: ValueError not enough values"),
        (json.dumps(GOOD | {"answer": []}), "line 1: IndexError"),
        (json.dumps(GOOD | {"image": "no.png"}), "there is no image"),
        (None, "No such file"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line(script, pictures, tmp_path, capsys, content, said):
    file = tmp_path / "faulty.jsonl"
    if content is not None:
        file.write_text(content)
        (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes())
    assert script.main(["--samples", str(file), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_help_shows_an_example(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert "python experiments/attention_by_layer.py --stratum small" in capsys.readouterr().out
