"""Free memory: limits that a container or a scheduler sets count as the machine's own memory does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lf_hf import memory

MIB = 1 << 20


def write_group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


V2 = "memory.max", "memory.current"
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"


def test_a_job_has_what_is_left_of_each_limit_above_it(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    groups = machine / "sys/fs/cgroup"
    cache = f"anon 5\nactive_file {MIB}\ninactive_file {2 * MIB}\n"
    write_group(groups / "slurm/job_7/step_0", V2, "max", 300 * MIB, cache)
    write_group(groups / "slurm/job_7", V2, str(1000 * MIB), 300 * MIB, cache)
    write_group(groups / "slurm", V2, str(700 * MIB), 500 * MIB, "anon 5\n")
    assert memory.left_to_control_groups(machine) == [703 * MIB, 200 * MIB]


@pytest.mark.parametrize(
    ("line", "place", "names", "prefix"),
    [
        ("0::/", "sys/fs/cgroup", V2, ""),
        ("0::/docker/8c1f", "sys/fs/cgroup", V2, ""),  # the path is the host's, and not there in the container
        ("4:cpu,memory:/docker/8c1f", "sys/fs/cgroup/memory", V1, "total_"),
    ],
)
def test_a_container_has_what_is_left_of_its_limit(
    machine: Path, line: str, place: str, names: tuple[str, str], prefix: str
) -> None:
    (machine / "proc/self/cgroup").write_text(f"3:cpuset:/elsewhere\n{line}\n")
    own = "active_file 7\ninactive_file 7\n" if prefix else ""  # without the groups below it
    stat = f"{own}{prefix}active_file {MIB}\n{prefix}inactive_file {MIB}\n"
    write_group(machine / place, names, str(100 * MIB), 40 * MIB, stat)
    assert memory.left_to_control_groups(machine) == [62 * MIB]


def test_the_lower_of_two_limits_counts_and_damaged_files_cost_no_more_than_they_say(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("\nnonsense\n0::/job\n")
    job = machine / "sys/fs/cgroup/job"
    for stat in ("anon", "anon x\nactive_file", ""):
        write_group(job, V2, str(100 * MIB), 40 * MIB, stat)
        assert memory.left_to_control_groups(machine) == [60 * MIB]
    (job / "memory.high").write_text(f"{90 * MIB}\n")
    (job / "memory.stat").unlink()
    assert memory.left_to_control_groups(machine) == [50 * MIB]
    (job / "memory.current").write_text("many\n")
    assert memory.left_to_control_groups(machine) == []


def test_a_machine_without_control_groups_has_no_such_limits(tmp_path: Path) -> None:
    assert memory.left_to_control_groups(tmp_path) == []


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=50 * MIB))
    for left, free in (([], 50), ([80 * MIB], 50), ([80 * MIB, 20 * MIB], 20)):
        monkeypatch.setattr(memory, "left_to_control_groups", lambda left=left: left)
        assert memory.free_memory(cpu) == free * MIB
