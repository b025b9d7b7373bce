"""The bridge to lm-eval: every way of starting lm-eval finds the models of lf_hf, from a wheel and from a checkout."""

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# What FusedLlamaLM says at once to these arguments; no other model class does.
ARGUMENTS = ["--model", "fused_llama", "--model_args", "pretrained=base,method=mka", "--tasks", "mmlu_sample_anatomy"]
ANSWER = "ValueError: method without num_fusions has no effect"
# Takes away what the start-up file has done, as where none is run.
BLOCKED = "import runpy, sys; sys.meta_path = [f for f in sys.meta_path if type(f).__module__ != 'lf_hf_startup']; "


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1"} | extra


def script(package: str, name: str) -> str:
    """Path of a command that a package installs."""
    files = distribution(package).files or []
    return str(next(file.locate() for file in files if file.parts[-2:] in {("bin", name), ("Scripts", f"{name}.exe")}))


@pytest.fixture(scope="module")
def python_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make an interpreter that sees this one's packages, and has lf_hf installed in the way asked for.

    Start-up files work only from an environment's own folder, so those of this environment do not count there.
    """

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        venv.create(folder, with_pip=False, symlinks=True)
        python = folder / "bin" / "python"
        [site] = folder.glob("lib/python*/site-packages")
        shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site / "shared.pth").write_text("\n".join(shared) + "\n")
        if kind != "nothing":
            install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
            source = ["--editable", str(ROOT)] if kind == "editable" else [str(ROOT)]
            command = [*install, "--no-deps", "--no-build-isolation", *source]
            subprocess.run(command, check=True, env=environment(), timeout=300)
        return python

    return make


@pytest.fixture(scope="module")
def wheel_python(python_with: Callable[[str], Path]) -> Path:
    return python_with("wheel")


@pytest.fixture(scope="module")
def editable_python(python_with: Callable[[str], Path]) -> Path:
    return python_with("editable")


def run(python: Path | str, code: str, folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(**extra), timeout=300)


def output(python: Path | str, code: str, folder: Path, **extra: str) -> str:
    done = run(python, code, folder, **extra)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_command_finds_the_model(wheel_python: Path, editable_python: Path, tmp_path: Path) -> None:
    lm_eval = [*ARGUMENTS, "--include_path", str(ROOT / "lm_eval_tasks")]
    commands = [  # a third way, -m lm_eval, is launched below
        [str(editable_python), script("lm_eval", "lm_eval"), *lm_eval],
        [str(wheel_python), "-c", BLOCKED + "runpy.run_module('lf_hf.evaluate', run_name='__main__')", *lm_eval],
    ]
    where: dict[str, Any] = {"cwd": tmp_path, "env": environment()}
    running = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True, **where) for words in commands]
    for process in running:
        _, text = process.communicate(timeout=600)
        assert ANSWER in text, f"{process.args!r}\n{text}"


def test_data_parallel_run(wheel_python: Path, base: str, tmp_path: Path) -> None:
    """Two processes fuse, evaluate, and write one results file."""
    launch = [script("accelerate", "accelerate"), "launch", "--num_processes", "2", "--cpu", "-m", "lm_eval"]
    model_args = f"pretrained={base},num_fusions=2,method=truncate,perplexity_tokens=0"
    tasks = output(wheel_python, "import lf_hf; print(lf_hf.tasks_path())", tmp_path)
    lm_eval = ["--model", "fused_llama", "--model_args", model_args, "--tasks", "mmlu_sample_anatomy"]
    command = [str(wheel_python), *launch, *lm_eval, "--include_path", tasks, "--output_path", "results"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    [results] = tmp_path.glob("results/*/*.json")
    assert json.loads(results.read_text())["config"]["fusion"]["layers"] == [5, 3]


def test_installed_files(wheel_python: Path, editable_python: Path, tmp_path: Path) -> None:
    code = "import lf_hf; print(lf_hf.__file__); print(lf_hf.tasks_path())"
    package, tasks = map(Path, output(wheel_python, code, tmp_path).splitlines())
    assert wheel_python.parent.parent in package.parents
    assert tasks == package.parent / "lm_eval_tasks"
    names = {str(path.relative_to(ROOT / "lm_eval_tasks")) for path in (ROOT / "lm_eval_tasks").rglob("*.*")}
    shipped = {str(path.relative_to(tasks)) for path in tasks.rglob("*.*")}
    assert {n for n in shipped if not n.endswith(".pyc")} == {n for n in names if not n.endswith(".pyc")}

    package, tasks = map(Path, output(editable_python, code, tmp_path).splitlines())
    assert package == ROOT / "lf_hf" / "__init__.py"
    assert tasks == ROOT / "lm_eval_tasks"


def test_registers_names_and_imports_nothing(wheel_python: Path, editable_python: Path, tmp_path: Path) -> None:
    code = """if True:
        import sys
        assert not {"lf_hf", "lm_eval", "torch", "typing"} & set(sys.modules)
        import inspect, lm_eval.models
        from lm_eval.api.registry import model_registry
        names = dict(model_registry.items())
        assert names["fused"] == "lf_hf.evaluate.lm_eval_model:FusedLM"
        assert names["fused_llama"] == "lf_hf.evaluate.lm_eval_model:FusedLlamaLM"
        assert "MODEL_MAPPING" in inspect.getsource(lm_eval.models)
        assert not {"lf_hf", "torch"} & set(sys.modules)
        assert not [f for f in sys.meta_path if type(f).__module__ == "lf_hf_startup"]
        """
    for python in (wheel_python, editable_python):
        output(python, code, tmp_path)


def test_the_entry_point_of_newer_pythons_does_the_same(wheel_python: Path, tmp_path: Path) -> None:
    """Without `site`, which runs .pth files, but with its rule for .start files: each line names what is called."""
    [site] = wheel_python.parent.parent.glob("lib/python*/site-packages")
    paths = [str(site), *(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))]
    code = f"""if True:
        import sys
        sys.path += {paths}
        assert "lf_hf_startup" not in sys.modules
        from pkgutil import resolve_name
        for line in open({str(site / "lf_hf_startup.start")!r}, encoding="utf-8").read().splitlines():
            resolve_name(line)()
            resolve_name(line)()
        assert [type(f).__name__ for f in sys.meta_path].count("LmEvalFinder") == 1
        import lm_eval.models
        from lm_eval.api.registry import model_registry
        print("fused" in model_registry, "fused_llama" in model_registry, "lf_hf" in sys.modules)
        """
    done = subprocess.run(
        [str(wheel_python), "-S", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        timeout=300,
    )
    assert done.stdout.strip() == "True True False", done.stderr


def test_nothing_without_installation(python_with: Callable[[str], Path], tmp_path: Path) -> None:
    """The control: in such an environment the name comes from lf_hf's start-up file alone."""
    code = "import lm_eval.models as m; from lm_eval.api.registry import model_registry as r; print('fused_llama' in r)"
    assert output(python_with("nothing"), code, tmp_path) == "False"


def test_start_up_costs_little(wheel_python: Path, tmp_path: Path) -> None:
    """A fraction of a small standard module's import, and no import of anything else."""
    ratios = []
    for _ in range(3):
        command = [str(wheel_python), "-X", "importtime", "-c", "import argparse"]
        said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment()).stderr
        found = re.findall(r"(\d+) \| +(lf_hf_startup|argparse)$", said, re.M)
        taken = {name: int(cumulative) for cumulative, name in found}
        ratios.append(taken["lf_hf_startup"] / taken["argparse"])
    assert min(ratios) < 0.25
    code = "import sys; sys.modules.pop('lf_hf_startup'); before = set(sys.modules)\n"
    code += "import lf_hf_startup; print(set(sys.modules) - before)"
    assert output(wheel_python, code, tmp_path) == "{'lf_hf_startup'}"


REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        self[name] = target

model_registry = Registry()
"""


# Of a made-up lm-eval: its registry, its models (None: no such module), and what is said on standard output or error.
FAKES: dict[str, tuple[str, str | None, str]] = {
    "names that are not there": (REGISTRY, "", "{'fused': 'lf_hf.evaluate.lm_eval_model:FusedLM', 'fused_llama': 'l"),
    "plugins are found": (REGISTRY + "def load_plugins(): ...\n", "", "{}"),
    "a name that is there": (
        REGISTRY,
        "from lm_eval.api.registry import model_registry as r\nr['fused_llama'] = 'mine'\n",
        "{'fused_llama': 'mine'",
    ),
    "no registry": ("", "", "lf_hf could not add fused and fused_llama to lm-eval: "),
    "another registry": ("model_registry = None\n", "", "lf_hf could not add fused and fused_llama to lm-eval: "),
    "no models": (REGISTRY, None, "ModuleNotFoundError: No module named 'lm_eval.models'"),
    "an error of its own": (REGISTRY, "1 / 0\n", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", FAKES)
def test_the_bridge_adds_what_is_missing_and_never_raises(name: str, tmp_path: Path) -> None:
    registry, models, said = FAKES[name]
    for module, text in {"__init__": "", "api/__init__": "", "api/registry": registry, "models": models}.items():
        if text is not None:
            file = tmp_path / "lm_eval" / f"{module}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    code = (
        "import lf_hf_startup; lf_hf_startup.arm()\n"
        "import lm_eval.models\n"
        "import lm_eval.api.registry as r; print(getattr(r, 'model_registry', None))"
    )
    done = run(sys.executable, code, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert said in done.stdout + done.stderr
    assert ("Error: " in said) == (done.returncode != 0), done.stderr
