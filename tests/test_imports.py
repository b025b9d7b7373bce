"""What importing lf_hf loads, and that the folders of lf_hf depend on each other one way only."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

import lf_hf

# Each folder or module of lf_hf imports those before it alone.
ORDER = "runtime settings families text decoder plan report checkpoint refit stages measure choose".split()
ORDER += "healing inputs pipeline fuse __init__ evaluate cli".split()


@functools.cache
def modules() -> dict[str, Path]:
    """The modules of lf_hf by their names without `lf_hf.`."""
    folder = ROOT / "lf_hf"
    files = [file for file in folder.rglob("*.py") if "lm_eval_tasks" not in file.parts]
    return {".".join(file.relative_to(folder).with_suffix("").parts): file for file in files}


def imported(file: Path) -> set[str]:
    """The modules of lf_hf that a file imports, at once or later inside a function."""
    found: set[str] = set()
    queue: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lf_hf":
            name = (node.module or "").removeprefix("lf_hf").removeprefix(".")
            inside = [f"{name}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {module if module in modules() else name or "__init__" for module in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("lf_hf.") for alias in node.names if alias.name.startswith("lf_hf.")}
        only_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not only_for_types:
            queue += ast.iter_child_nodes(node)
    return found


def test_modules_and_folders_import_one_way() -> None:
    of_modules = {name: imported(file) for name, file in modules().items()}
    assert sum(map(len, of_modules.values())) > 80
    of_folders: dict[str, set[str]] = {}
    for name, others in of_modules.items():
        folder = name.split(".")[0]
        of_folders.setdefault(folder, set()).update({other.split(".")[0] for other in others} - {folder})
    for graph in (of_modules, of_folders):
        TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
    places = {name: place for place, name in enumerate(ORDER)}
    assert places.keys() <= of_folders.keys()
    for folder, others in of_folders.items():
        wrong = [other for other in others if places.get(other, -1) > places.get(folder, len(ORDER))]
        assert not wrong, f"{folder} imports {wrong}"


def test_what_the_package_offers() -> None:
    names = dir(lf_hf)
    assert {*names} == {*lf_hf.__all__, "__version__"}
    assert all(getattr(lf_hf, name) is not None for name in names)


LOADED = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
before = set(sys.modules)
import lf_hf.cli
assert "peft" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
print(json.dumps(sorted(set(sys.modules) - before)))
out = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True, output_attentions=True)
assert len(out.hidden_states) == len(out.attentions) + 1 == model.config.num_hidden_layers + 1
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
assert table["fused_llama"] == table["llama"]
"""


def test_a_new_process_loads_a_model_without_what_fusing_takes_and_knows_it(fused: Path) -> None:
    """Besides what transformers itself imports for a Llama; PEFT waits for the first fused model. They take seconds.

    transformers registers what a class can return when one is built.
    """
    command, env = [sys.executable, "-c", LOADED, str(fused)], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "lf_hf.settings" in loaded
    heavy = {"sklearn", "pandas", "scipy", "lm_eval", "matplotlib", "datasets"}
    assert [name for name in loaded if name.split(".")[0] in heavy] == []


def test_healing_needs_no_scikit_learn() -> None:
    code = "import sys; import lf_hf.healing.heal; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
