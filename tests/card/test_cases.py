"""On stand-in cards every method does what it does on the CPU, mixes no devices, and waits no more than it has to."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from card.cases import CASES, Case, make_base, outcome
from card.stand_in import build, why_not
from conftest import run_program
from filelock import FileLock

Found = dict[Any, Any]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What run_cases.py found, by case and by name of a check; one of all workers runs it."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out = folder / "card.jsonl"
    with FileLock(folder / "card.lock"):
        if not out.is_file():
            part = out.with_suffix(".part")
            done = run_program("card/run_cases.py", build(), part)
            assert done.returncode == 0, done.stderr
            part.rename(out)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {Case(*name) if isinstance(name, list) else name: line for name, line in lines}


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], dict[str, Any]]:
    """The outcome of a case in memory on the CPU."""
    bases: dict[str, str] = {}
    outcomes: dict[Case, dict[str, Any]] = {}

    def made(case: Case) -> dict[str, Any]:
        case = Case(case.method, case.family)
        if case.family not in bases:
            bases[case.family] = make_base(case.family, tmp_path_factory.mktemp("base"))
        if case not in outcomes:
            outcomes[case] = outcome(case, bases[case.family], device_map="cpu")
        return outcomes[case]

    return made


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_card_gives_what_the_cpu_gives(case: Case, found: Found, on_cpu: Callable[[Case], dict[str, Any]]) -> None:
    """No operation mixes devices, which would be an error; and nothing stays on the card after the model."""
    line = found[case]
    assert line["error"] is None, line["error"]
    expected = on_cpu(case)
    assert line["device"] == "cuda" and line["layers"] == expected["layers"]
    for here, there in zip(line["judged"], expected["judged"], strict=True):
        assert here == pytest.approx(there, rel=1e-5)
    size = max(map(abs, expected["logits"]))
    share = 5e-3 if case.method == "healed" else 1e-5  # on a card it trains in bfloat16
    assert line["logits"] == pytest.approx(expected["logits"], abs=share * size)
    assert line["left"] == 0
    assert not line["weights_read"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.method in ("refit", "healed") and case.family == "Llama"], ids=" ".join
)
def test_a_plan_says_what_a_card_has_to_hold(case: Case, found: Found) -> None:
    """At most; and not many times as much."""
    line = found[case]
    assert line["planned"] / 3 < line["peak"] <= line["planned"]


@pytest.mark.parametrize("method", ["refit", "healed"])
def test_a_plan_for_a_small_card_is_kept_where_more_is_out_of_memory(method: str, found: Found) -> None:
    """Weights and states lie elsewhere there."""
    at_ease, small = (found[Case(method, "Llama", placement)] for placement in ("in memory", "on a small card"))
    assert (at_ease["weights"], at_ease["states"]) == (["cuda:0"], "device")
    assert (small["weights"], small["states"]) == (["cpu"], "host")
    assert small["peak"] <= small["capacity"] < at_ease["planned"]


def test_on_a_smaller_card_it_trains_with_fewer_activations_and_then_less_and_stays_in_the_plan(found: Found) -> None:
    at_ease, smaller, small, adapters = found["trainings"]
    assert at_ease["why"].startswith("all layers") and "checkpointing" not in at_ease["why"]
    assert smaller["why"].startswith("all layers") and "with gradient checkpointing" in smaller["why"]
    assert small["why"].startswith("the fused layers") and "with gradient checkpointing" in small["why"]
    assert adapters["why"].startswith("adapters")
    for training in found["trainings"]:
        assert training["planned"] / 1.5 < training["peak"] <= training["planned"]


@pytest.mark.parametrize("case", [case for case in CASES if case.placement == "in memory"], ids=" ".join)
def test_the_host_waits_no_more_often_than_this(case: Case, found: Found) -> None:
    """Whatever widths are: in a layer's activations, a rough fit, the making of a layer, a step and a written token."""
    line = found[case]
    most = {"activations": 4, "choosing": 2 + 4 * line["rough fits"], "making": 5 * len(line["layers"])}
    if case.method == "neural_alignment":  # whose rows are assigned on the host
        del most["making"]
    for phase in most.keys() & line["phases"].keys():
        assert line["phases"][phase] <= most[phase], (phase, line["waits"])
    if case.method in ("refit", "healed"):
        assert line["rough fits"] > 0 and {"choosing", "making"} <= line["phases"].keys()
        assert 0 < line["token"] <= 1, line["waits"]
    if case.method == "healed":
        assert 0 < line["step"] <= 2, line["waits"]


def test_a_card_without_room_is_out_of_memory(found: Found) -> None:
    assert "MemoryError: Memory ran out on cuda:0" in found["no_room"] and "max_memory=cuda:0=" in found["no_room"]


def test_the_next_layer_is_read_from_disk_while_one_is_used(found: Found) -> None:
    """What is read is what the files hold, and no thread is left where reading stops early."""
    assert found["layers_on_disk"] == {"order": [0, 1, 2, 3], "same": True, "threads": 0}


def test_an_operation_that_mixes_devices_is_an_error(found: Found) -> None:
    """Of the stand-in, without which the other tests would show little."""
    assert "Expected all tensors to be on the same device" in found["mixed"]
