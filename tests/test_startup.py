"""What importing lf_hf loads, and how every way of starting lm-eval finds it, from a wheel and a checkout."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT

TASKS = ROOT / "lm_eval_tasks"
COMMANDS = Path(sys.executable).parent
SITES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
# Takes away what the start-up file has done, as where none is run.
BLOCKED = "import sys\nsys.meta_path = [f for f in sys.meta_path if type(f).__module__ != 'lf_hf_startup']\n"
PLACES = "import lf_hf\nprint(lf_hf.__file__, lf_hf.tasks_path(), sep='\\n')\n"
# lm-eval takes seconds to look through all its tasks; here are ours alone.
OWN_TASKS = """
import functools, runpy
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
"""


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1"} | extra


def run(*command: Path | str, folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(**extra), timeout=600)


def output(python: Path, *words: str) -> str:
    done = run(python, *words, folder=python.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def installed(folder: Path, *source: str) -> Path:
    """An interpreter that sees this one's packages, and has lf_hf installed in its own environment.

    Start-up files work only from an environment's own folder, so those of this environment do not count there.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    [site] = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("\n".join(SITES) + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--no-build-isolation", *source], check=True, env=environment(), timeout=300)
    return python


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("wheel"), str(ROOT))


@pytest.fixture(scope="module")
def editable_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("editable"), "--editable", str(ROOT))


def test_lm_eval_finds_the_model(wheel_python: Path, tmp_path: Path) -> None:
    words = ["--model", "fused_llama", "--model_args", "pretrained=base,method=mka", "--tasks", "mmlu_sample_anatomy"]
    words += ["--include_path", str(TASKS)]
    lm_eval = f"{OWN_TASKS}runpy.run_path({str(COMMANDS / 'lm_eval')!r}, run_name='__main__')"
    done = run(wheel_python, "-c", lm_eval, *words, folder=tmp_path)
    # What FusedLM says at once to these arguments; no other model class does.
    assert "ValueError: method without num_fusions has no effect" in done.stderr


def test_an_editable_install_where_lm_eval_is_imported_already(editable_python: Path) -> None:
    """As in a notebook that was running when lf_hf was installed."""
    code = f"{BLOCKED}import lm_eval.models\n{PLACES}from lm_eval.api.registry import get_model\n"
    package, tasks, name = output(editable_python, "-c", f"{code}print(get_model('fused').__name__)").splitlines()
    assert name == "FusedLM" and (Path(package), Path(tasks)) == (ROOT / "lf_hf" / "__init__.py", TASKS)


def test_a_wheel_has_all_files(wheel_python: Path) -> None:
    package, tasks = map(Path, output(wheel_python, "-c", PLACES).splitlines())
    assert wheel_python.parent.parent in package.parents and tasks == package.parent / "lm_eval_tasks"
    names, shipped = (
        {str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.suffix != ".pyc"}
        for folder in (TASKS, tasks)
    )
    assert shipped == names


REGISTERED = """
import inspect, lm_eval.models
from lm_eval.api.registry import model_registry
names = dict(model_registry.items())
assert names["fused"] == "lf_hf.evaluate.lm_eval_model:FusedLM"
assert names["fused_llama"] == "lf_hf.evaluate.lm_eval_model:FusedLM"
assert "MODEL_MAPPING" in inspect.getsource(lm_eval.models)
assert not {"lf_hf", "torch"} & set(sys.modules)
assert not [f for f in sys.meta_path if type(f).__module__ == "lf_hf_startup"]
"""


def test_registers_names_and_imports_nothing(wheel_python: Path, editable_python: Path) -> None:
    at_once = "import sys\nassert not {'lf_hf', 'lm_eval', 'torch', 'typing'} & set(sys.modules)\n"
    at_once += "del sys.modules['lf_hf_startup']\nbefore = set(sys.modules)\nimport lf_hf_startup\n"
    at_once += "assert set(sys.modules) - before == {'lf_hf_startup'}\n"
    for python in (wheel_python, editable_python):
        output(python, "-c", at_once + REGISTERED)


def test_the_entry_point_of_newer_pythons_does_the_same(wheel_python: Path) -> None:
    """Without `site`, which runs .pth files, but with its rule for .start files: each line names what is called."""
    [site] = wheel_python.parent.parent.glob("lib/python*/site-packages")
    lines = (site / "lf_hf_startup.start").read_text(encoding="utf-8").splitlines()
    code = f"import sys\nsys.path += {[str(site), *SITES]}\nassert 'lf_hf_startup' not in sys.modules\n"
    code += f"from pkgutil import resolve_name\nfor line in {lines} * 2:\n    resolve_name(line)()\n"
    code += "assert [type(f).__name__ for f in sys.meta_path].count('LmEvalFinder') == 1\n"
    output(wheel_python, "-S", "-c", code + REGISTERED)


REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        self[name] = target

model_registry = Registry()
"""
# Of a made-up lm-eval: its registry, its models, and what is said on standard output or error.
FAKES: dict[str, tuple[str, str, str]] = {
    "names that are not there": (REGISTRY, "", "{'fused': 'lf_hf.evaluate.lm_eval_model:FusedLM', 'fused_llama': 'l"),
    "plugins are found": (REGISTRY + "def load_plugins(): ...\n", "", "{}"),
    "a name that is there": (
        REGISTRY,
        "from lm_eval.api.registry import model_registry as r\nr['fused_llama'] = 'mine'\n",
        "{'fused_llama': 'mine'",
    ),
    "another registry": ("model_registry = None\n", "", "lf_hf could not add fused and fused_llama to lm-eval: "),
    "an error of its own": (REGISTRY, "1 / 0\n", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", FAKES)
def test_the_bridge_adds_what_is_missing_and_never_raises(name: str, tmp_path: Path) -> None:
    registry, models, said = FAKES[name]
    for module, text in {"__init__": "", "api/__init__": "", "api/registry": registry, "models": models}.items():
        file = tmp_path / "lm_eval" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    code = "import lf_hf_startup; lf_hf_startup.arm()\nimport lm_eval.models\n"
    code += "import lm_eval.api.registry as r; print(getattr(r, 'model_registry', None))"
    done = run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert said in done.stdout + done.stderr
    assert ("Error: " in said) == (done.returncode != 0), done.stderr


# Each folder or module of lf_hf imports those before it alone.
ORDER = "runtime settings families text decoder plan report checkpoint refit stages measure choose".split()
ORDER += "healing pipeline fuse __init__ evaluate cli".split()


def imported(file: Path) -> set[str]:
    """The folders and modules right in lf_hf that a file imports, at once or later inside a function."""
    text = file.read_text(encoding="utf-8")
    found = re.findall(r"^ *(?:from|import) lf_hf\.(\w+)", text, re.M)
    for names in re.findall(r"^ *from lf_hf import (\([^)]*\)|[^#\n]*)", text, re.M):
        found += re.findall(r"\w+", names)
    return {name if name in ORDER else "__init__" for name in found}


def test_folders_import_one_way() -> None:
    for place, name in enumerate(ORDER):
        folder = ROOT / "lf_hf" / name
        files = [*folder.rglob("*.py")] if folder.is_dir() else [folder.with_suffix(".py")]
        wrong = set[str]().union(*map(imported, files)) - {*ORDER[: place + 1]}
        assert files and not wrong, f"{name} imports {wrong}"


LOADED = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
before = set(sys.modules)
import lf_hf.cli
assert "peft" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
print(json.dumps(sorted(set(sys.modules) - before)))
import lf_hf.healing.heal, lf_hf.pipeline.run
assert "sklearn" not in sys.modules  # which what compares no layers does without; it takes 90 MB
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
