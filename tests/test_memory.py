"""Free memory: limits that a container or a scheduler sets count as the machine's own memory does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lf_hf.runtime import memory

MIB = 1 << 20
V2 = "memory.max", "memory.current"
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"


def group(names: tuple[str, str], limit: int, used: int | str, stat: str = "anon 5") -> dict[str, str]:
    in_use = f"{used * MIB}" if isinstance(used, int) else used
    return {names[0]: f"{limit * MIB}\n", names[1]: in_use, "memory.stat": stat}


CACHE = f"anon 5\nactive_file {MIB}\ninactive_file {2 * MIB}\n"
TOTAL = f"active_file 7\ninactive_file 7\ntotal_active_file {MIB}\ntotal_inactive_file {2 * MIB}"


@pytest.mark.parametrize(
    ("cgroup", "groups", "left"),
    [
        ("", {}, []),
        ("0::/slurm/job\n", {"slurm/job": group(V2, 1000, 300, CACHE), "slurm": group(V2, 700, 500)}, [703, 200]),
        ("0::/docker/8c1f\n", {"": group(V2, 100, 40, CACHE)}, [63]),  # the path is the host's, not the container's
        ("4:cpu,memory:/docker/8c1f\n", {"memory": group(V1, 100, 40, TOTAL)}, [63]),
        ("\nnonsense\n0::/job\n", {"job": group(V2, 100, 40, "anon x\nactive_file")}, [60]),
        ("0::/job\n", {"job": group(V2, 100, 40) | {"memory.high": f"{90 * MIB}\n"}}, [50]),
        ("0::/job\n", {"job": group(V2, 100, "many\n")}, []),
    ],
)
def test_a_job_has_what_is_left_of_each_limit_above_it(
    cgroup: str, groups: dict[str, dict[str, str]], left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on the whole the least of that and of the machine's memory."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, files in groups.items():
        folder = tmp_path / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_text(content)
    found = memory.left_to_control_groups(tmp_path)
    assert found == [size * MIB for size in left]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=250 * MIB))
    monkeypatch.setattr(memory, "left_to_control_groups", lambda: found)
    assert memory.free_memory(torch.device("cpu")) == min([250, *left]) * MIB
