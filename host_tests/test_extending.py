"""The recipes of docs/extending.md: each of their blocks runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_there_is_a_block_for_each_recipe():
    assert len(BLOCKS) >= len(re.findall(r"^## ", PAGE, re.MULTILINE)) >= 4


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_recipe(number, tmp_path):
    pytest.importorskip("torch", reason="no torch: recipes of the build road not run")
    block = tmp_path / "recipe.py"
    block.write_text(BLOCKS[number], "utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(block)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
