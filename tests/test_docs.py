"""The code that the documentation shows runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_method_in_60_lines_of_build_md_runs(monkeypatch, capsys):
    code = re.search(r"## Your method in 60 lines.*?```python\n(.*?)```", (ROOT / "BUILD.md").read_text(), re.S)[1]
    assert len(code.splitlines()) <= 60
    monkeypatch.chdir(ROOT)
    exec(compile(code, "BUILD.md", "exec"), {"__name__": "build_md"})
    assert len(capsys.readouterr().out.split()) == 1, "one word: the character"


def test_the_readme_holds_the_two_commands_that_ci_and_newcomers_run():
    readme = (ROOT / "README.md").read_text()
    for name in ("demo", "test"):
        block = re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```\n<!-- end -->", readme, re.S)[1]
        assert block.startswith("python3 -m venv .venv && "), block
        assert "\n" not in block, "one command"
