"""`jaxvqa ask`, `convert`, `models` and `methods` on a tiny random model: what they print and write."""

import json

import pytest
from PIL import Image
from tiny import tiny_llava

from jaxvqa.cli import main

KEYS = ["text", "boxes", "forward_passes", "status", "method", "model", "seconds"]
SIZE = (96, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_llava(tmp_path_factory.mktemp("cli") / "tiny-model"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("cli") / "picture.png"
    Image.effect_noise(SIZE, 60).convert("RGB").save(path)
    return str(path)


def ask(capsys, *argv: str) -> tuple[str, str]:
    """stdout and stderr of a request that must succeed."""
    code = main(["ask", "--question", "What is there?", "--max-new-tokens", "3", *argv])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out, printed.err


def test_json_is_exactly_one_object_with_the_promised_keys(capsys, model, picture):
    out, _ = ask(capsys, "--image", picture, "--model", model, "--json")
    said = json.loads(out)
    assert list(said) == KEYS and out.count("\n") == 1
    assert (said["method"], said["model"], said["status"]) == ("vanilla", "tiny-model", "ok")
    assert said["boxes"] == [] and said["forward_passes"] == 1 and said["seconds"] > 0


def test_vicrop_gives_a_box_inside_the_picture_and_saves_its_evidence(capsys, model, picture, tmp_path):
    saved = tmp_path / "evidence.png"
    argv = ["--image", picture, "--model", model, "--method", "vicrop", "--option", "base=24", "--save", str(saved)]
    out, err = ask(capsys, *argv, "--json")
    said = json.loads(out)
    ((x1, y1, x2, y2),) = said["boxes"]
    assert 0 <= x1 < x2 <= SIZE[0] and 0 <= y1 < y2 <= SIZE[1]
    assert said["forward_passes"] == 3 and str(saved) in err
    evidence = Image.open(saved)
    assert evidence.size == SIZE and evidence.tobytes() != Image.open(picture).tobytes()


def test_without_json_stdout_is_the_answer_alone(capsys, model, picture):
    said = json.loads(ask(capsys, "--image", picture, "--model", model, "--json")[0])
    out, err = ask(capsys, "--image", picture, "--model", model)
    assert out == said["text"] + "\n" and "1 forward passes" in err


def test_several_images_go_in_their_order(capsys, model, picture, tmp_path):
    Image.new("RGB", SIZE, "red").save(tmp_path / "red.png")
    pair = ["--image", picture, "--image", str(tmp_path / "red.png"), "--model", model, "--json"]
    assert json.loads(ask(capsys, *pair)[0])["forward_passes"] == 1


@pytest.mark.parametrize(("exif", "size"), [("ignore", SIZE), ("apply", SIZE[::-1])])
def test_orientation_tag_is_followed_only_when_asked_for(capsys, model, picture, tmp_path, exif, size):
    rotated, saved = tmp_path / "rotated.jpg", tmp_path / "saved.png"
    tags = Image.Exif()
    tags[0x0112] = 6  # orientation: a quarter turn
    Image.open(picture).save(rotated, exif=tags)
    ask(capsys, "--image", str(rotated), "--model", model, "--exif", exif, "--save", str(saved))
    assert Image.open(saved).size == size


def test_converted_model_gives_the_same_answer(capsys, model, picture, tmp_path):
    out = tmp_path / "converted"
    assert main(["convert", model, str(out), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    answers = [
        json.loads(ask(capsys, "--image", picture, "--model", m, "--json")[0])["text"] for m in (model, str(out))
    ]
    assert answers[0] == answers[1]
    assert main(["convert", model, str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["convert", model, str(out), "--overwrite"]) == 0


def test_pickle_is_converted_only_when_asked_for(capsys, model, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    folder = tiny_llava(tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert "--from-pickle" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["convert", str(folder), str(tmp_path / "out"), "--from-pickle"]) == 0


def test_question_beyond_the_context_is_refused(capsys, model, picture):
    assert main(["ask", "--image", picture, "--model", model, "--question", "What? " * 3000]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "shorten the question" in printed.err.splitlines()[-1]


def test_unknown_attention_backend_is_refused(capsys, model, picture):
    assert main(["ask", "--image", picture, "--model", model, "--question", "What?", "--attention", "fast"]) == 2
    assert "attention backend 'fast'" in capsys.readouterr().err


def test_models_lists_what_the_registry_holds(capsys):
    from jaxvqa.models import FAMILIES

    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{kind} " in printed for kind in FAMILIES) and "specks-llava" in printed


def test_methods_lists_every_method_with_its_options(capsys):
    from jaxvqa import methods

    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in methods.names())
    assert "alignment=corrected" in printed and "max_new_tokens=64" in printed


def test_method_in_detail_gives_type_default_and_meaning(capsys):
    assert main(["methods", "vicrop"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (layer,) = [line for line in lines if line.startswith("layer ")]
    assert "int | none" in layer and "Decoder layer" in layer
    assert any(
        line.startswith("ratios ") and "1,1.2,1.4,1.6,1.8,2" in line.replace("1.0", "1").replace("2.0", "2")
        for line in lines
    )
