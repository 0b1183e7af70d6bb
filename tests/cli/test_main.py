"""The command line as a user meets it: help at once, errors in one line, exit codes."""

import subprocess
import sys

import pytest
from PIL import Image
from tiny import tiny_llava

from jaxvqa.cli import COMMANDS, main

HEAVY = ("jax", "numpy", "transformers", "flax", "PIL", "torch", "orbax")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (32, 32), "white").save(path)
    return str(path)


def refused(capsys, *argv: str) -> str:
    """The single line on stderr of a request that must be refused with exit code 2; stdout stays empty."""
    try:
        code = main(argv)
    except SystemExit as leaving:
        code = leaving.code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("jaxvqa: ")]
    assert (code, printed.out) == (2, ""), printed.err
    assert len(lines) == 1 and printed.err.rstrip().endswith(lines[0])
    return lines[0]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy_and_takes_under_a_second(command):
    argv = [command, "--help"] if command else ["--help"]
    code = f"""
import sys, time
from jaxvqa.cli import main
try:
    main({argv})
except SystemExit as leaving:
    assert leaving.code == 0
print([name for name in {HEAVY} if name in sys.modules], time.process_time(), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, _, seconds = done.stderr.rpartition(" ")
    # CPU time of the whole process: unlike wall time it does not depend on what else runs here.
    assert loaded == "[]" and float(seconds) < 1
    assert "example:\n  jaxvqa" in done.stdout


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n    {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["ask", "--image", "x.png"], "--question"),
        (["ask", "--question", "what?"], "--image"),
        (["ask", "--image", "x.png", "--question", "what?", "--colour", "red"], "--colour"),
        (["convert", "somewhere"], "OUT"),
        (["demo", "--samples", "0"], "--samples 0: expected 1 to"),
        (["demo", "--samples", "many"], "invalid int value"),
        (["methods", "vicrap"], "unknown method 'vicrap'; did you mean vicrop?"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(capsys, argv, said):
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "vicrap"], "unknown method 'vicrap'; did you mean vicrop?"),
        (["--method", "vicrop", "--option", "leyer=3"], "unknown option 'leyer' of method vicrop; did you mean layer?"),
        (["--method", "vicrop", "--option", "layer=deep"], "--option layer=deep: expected int | none"),
        (["--method", "vicrop", "--option", "layer"], "'layer' is not of the form name=value"),
        (["--method", "vicrop", "--option", "alignment=offical"], "expected corrected | official"),
        (["--save", "evidence.txt"], "--save evidence.txt: expected a file name that ends in .png"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
    ],
)
def test_wrong_method_or_option_is_refused_before_anything_is_loaded(capsys, picture, options, said):
    assert said in refused(capsys, "ask", "--image", picture, "--question", "what?", *options)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question_is_refused(capsys, picture, question):
    assert "--question is empty" in refused(capsys, "ask", "--image", picture, "--question", question)


def test_missing_image_is_refused(capsys, tmp_path):
    line = refused(capsys, "ask", "--image", str(tmp_path / "none.png"), "--question", "what?")
    assert "none.png: no such image file" in line


@pytest.mark.parametrize(("content", "said"), [(b"", "empty"), (b"hello, no image here", "not an image")])
def test_file_that_is_no_image_is_refused(capsys, tmp_path, content, said):
    path = tmp_path / "note.jpg"
    path.write_bytes(content)
    assert said in refused(capsys, "ask", "--image", str(path), "--question", "what?")


def test_truncated_jpeg_is_refused(capsys, tmp_path):
    path = tmp_path / "half.jpg"
    Image.effect_noise((128, 128), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert "half.jpg" in refused(capsys, "ask", "--image", str(path), "--question", "what?")


def test_image_beyond_the_aspect_limit_is_refused(capsys, tmp_path):
    path = tmp_path / "thread.png"
    Image.new("RGB", (30000, 2)).save(path)
    assert "30000x2 is more elongated than" in refused(capsys, "ask", "--image", str(path), "--question", "what?")


def test_model_that_does_not_exist_is_refused(capsys, picture, tmp_path):
    argv = ("ask", "--image", picture, "--question", "what?", "--offline", "--model")
    assert "no/such-model" in refused(capsys, *argv, "no/such-model")
    assert "no folder" in refused(capsys, *argv, str(tmp_path / "nowhere"))


def test_folder_without_config_is_refused(capsys, picture, tmp_path):
    line = refused(capsys, "ask", "--image", picture, "--question", "what?", "--model", str(tmp_path))
    assert "config.json" in line


def test_pickled_weights_are_refused_with_the_command_that_works(capsys, picture, tmp_path):
    folder = tiny_llava(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    line = refused(capsys, "ask", "--image", picture, "--question", "what?", "--model", str(folder))
    assert "jaxvqa convert --from-pickle" in line


def test_unsupported_architecture_is_refused(capsys, picture, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    line = refused(capsys, "ask", "--image", picture, "--question", "what?", "--model", str(tmp_path))
    assert "GPT2LMHeadModel is not supported" in line and "LlavaForConditionalGeneration" in line


def test_debug_adds_the_traceback_wherever_it_stands(capsys, tmp_path):
    argv = ["ask", "--image", str(tmp_path / "none.png"), "--question", "what?"]
    for given, traced in ((argv, False), ([*argv, "--debug"], True), (["--debug", *argv], True)):
        assert main(given) == 2
        assert capsys.readouterr().err.startswith("Traceback") == traced


def test_unforeseen_error_is_one_line_with_its_type_and_exit_code_1(capsys, monkeypatch):
    def fail(args):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(COMMANDS["models"], "run", fail)
    assert main(["models"]) == 1
    assert capsys.readouterr().err == "jaxvqa: RuntimeError: first line second line (--debug shows where)\n"


def test_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["models"], "run", interrupt)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "jaxvqa: interrupted\n"


def test_reader_that_stops_early_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m jaxvqa.cli methods | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0 and capsys.readouterr().out.startswith("jaxvqa 0.")
