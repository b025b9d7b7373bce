"""Print the lowest versions that pyproject.toml allows of all that the package depends on, as constraints for pip.

Runs on any python3 that can make the environment; it knows no TOML before 3.11, so lines are read.
"""

from __future__ import annotations

import re
from pathlib import Path

text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
project = text[text.index("\ndependencies = [") : text.index("\n[project.scripts]")]  # extras too
for name, version in re.findall(r'"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)"', project):
    print(f"{name}=={version}")
