"""The README's Python example runs, and its commands are there for CI to use."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "error at most" in capsys.readouterr().out


def test_two_commands():
    for marker, needed in (("main-command", "scripts/train.py"), ("test-command", "pytest")):
        (command,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", README)
        assert command.startswith("python3 -m venv") and needed in command and "\n" not in command
