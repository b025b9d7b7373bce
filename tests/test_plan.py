"""The plan of a fusion finds a way wherever there is one, and says what the fusion then does or refuses."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import QUICK, TINY, dry_run, make_texts, make_tokenizer, pickled
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig

from lf_hf import FusionConfig, HealSettings, fuse_checkpoint
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.weights import weights_size
from lf_hf.pipeline.dry_run import DryRun
from lf_hf.pipeline.planning import plan_phases
from lf_hf.plan.machine import Machine, read_max_memory
from lf_hf.plan.plan import NoRoom, Plan
from lf_hf.plan.probe import probe
from lf_hf.runtime import memory
from lf_hf.runtime.memory import in_gib
from lf_hf.text.calibration import load_corpus

TIED: dict[str, Any] = {"tie_word_embeddings": True, "attention_bias": True, "dtype": torch.bfloat16}
BASES = [("truncate", "llama", {}), ("refit", "llama", TIED), ("truncate", "qwen3_vl", {})]


@pytest.mark.parametrize(("method", "model_type", "shape"), BASES)
def test_a_fusion_does_what_its_plan_says(
    method: str, model_type: str, shape: dict[str, Any], family_base: Callable[..., Path], tmp_path: Path
) -> None:
    texts, base = make_texts(100), family_base(model_type, **shape)
    config = FusionConfig(2, method, calibration_tokens=1024, perplexity_tokens=512)
    said = dry_run(base, config, calibration=texts).summary()
    report = fuse_checkpoint(base, tmp_path / "out", config, calibration=texts)
    assert "layers: 6 -> 4 (-33.3%)" in said and (report.layers_before, report.layers_after) == (6, 4)
    assert f"parameters: {report.parameters_before:,} -> {report.parameters_after:,} (" in said
    if config.selection == "last":
        assert [layer.layers for layer in report.fused_layers] == [[3, 4, 5]]
        assert "layers that become one: 3 to 5, numbered from 0" in said
    else:
        assert "layers that become one: chosen while fusing" in said
    [sizes] = re.findall(r"bytes on disk: ([\d,]+) -> ([\d,]+) ", said)
    before, after = (int(size.replace(",", "")) for size in sizes)
    assert before == weights_size(base)
    assert 0 <= weights_size(tmp_path / "out") - after < 20_000  # the header


@pytest.mark.parametrize("method", ["refit", "healed"])
def test_a_budget_has_a_plan_for_one_fusion(base: str, method: str) -> None:
    plan = dry_run(base, FusionConfig(method=method, max_divergence=0.1), calibration=make_texts(400))
    assert 0 < plan.plan.peak["cpu"] < 1 << 31 and "layers: 5 -> 4 " in plan.summary()
    assert "as the budget allows" in plan.summary() and ("healing: on" in plan.summary()) == (method == "healed")


def test_it_reads_no_weights_and_each_text_once(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base on the hub it would have to fetch them to know what they hold."""
    monkeypatch.setattr(Base, "content_files", None)
    monkeypatch.setattr("lf_hf.pipeline.fusion.load_corpus", loading := Mock(wraps=load_corpus))
    config = FusionConfig(1, "truncate", heal_tokens=2048)
    assert "healing: on" in dry_run(base, config, out=tmp_path, calibration=make_texts(200)).summary()
    assert loading.call_count == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_fusions": 9},
        {"out": "taken"},
        {"calibration": ["too", "few"]},
        {"device_map": "cuda:99"},
        {"heal_tokens": 2048, "method": "truncate", "calibration": ["too little to heal on"]},
    ],
)
def test_what_fusing_refuses(
    base: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken", "config.json").touch()
    given: dict[str, Any] = {"num_fusions": 1, "base": base, "out": "out"} | arguments
    given["config"] = FusionConfig(**{name: given.pop(name) for name in FusionConfig.known if name in given})
    with pytest.raises((ValueError, OSError), match=r"\.$") as planning:
        dry_run(**given)
    with pytest.raises(planning.type, match=f"^{re.escape(str(planning.value))}$"):
        fuse_checkpoint(**given)


def test_a_large_model_that_is_not_downloaded_yet_is_planned(tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE, max_position_embeddings=8192)
    config.dtype, snapshot = "bfloat16", tmp_path / "models--you--model" / "snapshots" / "0"
    config.save_pretrained(snapshot)
    make_tokenizer().save_pretrained(snapshot)
    (tmp_path / "models--you--model" / "refs").mkdir()
    (tmp_path / "models--you--model" / "refs" / "main").write_text("0")

    def plan(method: str = "truncate", **given: Any) -> DryRun:
        config = FusionConfig(4, method, perplexity_tokens=0)
        return dry_run("you/model", config, cache_dir=str(tmp_path), **given)

    four = plan()
    assert "32 -> 28 (-12.5%)" in four.summary() and "8,030,261,248 -> 7,157,813,248 (-10.9%)" in four.summary()
    assert "not on this machine yet" in four.notes[0]
    assert "disk" in four.plan.weights or four.plan.peak["cpu"] > 15 * 2**30  # as this machine has room
    low = plan(max_memory="cpu=8GiB").plan
    assert "disk" in low.weights and 1 < low.peak["cpu"] / 2**30 < 8


def test_a_torch_for_cards_takes_the_cpu_where_there_is_none(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built_for_cuda(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    fuse_checkpoint(base, tmp_path / "out", **QUICK)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.device.type == "cpu" and model.config.num_hidden_layers == TINY["num_hidden_layers"] - 1
    assert dry_run(base, FusionConfig(1, "healed"), calibration=make_texts(400), device_map="auto").plan.device == "cpu"
    assert list(read_max_memory({0: "24GiB", "cpu": "8GiB"})) == ["cuda:0", "cpu"]  # a card of another machine
    assert read_max_memory({"cpu": np.int64(GIB), 0: 2e9}) == {"cpu": GIB, "cuda:0": 2 * 10**9}


def test_what_a_user_should_know_is_noted(
    make_base: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, out = FusionConfig(1, "truncate", perplexity_tokens=0), tmp_path / "out"
    monkeypatch.setattr("lf_hf.plan.machine.computes_bfloat16", lambda _: False)
    base = make_base(dtype=torch.bfloat16)
    assert dry_run(base, config, out=out, dtype="float32").notes == []
    pickled(Path(shutil.copytree(base, tmp_path / "pickled")))
    assert dry_run(tmp_path / "pickled", config, use_safetensors=False, dtype="float32").notes == []
    fuse_checkpoint(base, out, config)
    assert "no instructions for bfloat16" in caplog.text
    caplog.clear()
    said = dry_run(base, config, out=out, overwrite=True).summary()
    assert f"note: {str(out)!r} holds a result, which would be replaced." in said
    assert "This CPU has no instructions for bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/\n", "memory.max"),
        ("0::/system.slice/job_7/step_0\n", "system.slice/job_7/memory.max"),
        ("5:devices:/\n4:memory:/slurm/job_7\n", "memory/slurm/memory.limit_in_bytes"),
    ],
)
def test_what_is_left_of_a_containers_limit(
    groups: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, own = torch.device("cpu"), tmp_path / "cgroup"
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", own)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 << 40))
    assert memory.free_memory(device) == 2 << 40
    own.write_text(groups)
    limit = tmp_path / file
    limit.parent.mkdir(parents=True, exist_ok=True)
    for said, least, most in (("max", 2 << 40, 2 << 40), (str(1 << 40), 1 << 39, 1 << 40), ("4096", 0, 0)):
        limit.write_text(f"{said}\n")
        assert least <= memory.free_memory(device) <= most


GIB = 1 << 30
SHAPE: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
SHAPE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
TOKENS = 49152
HEALING = HealSettings(tokens=131072)
WIDE = LlamaConfig(**SHAPE)  # as Llama-3-8B: 15 GiB in bfloat16


def machine(card: float = 0, memory: float = 64) -> Machine:
    """A machine with so many GiB on a card, if any, and in memory."""
    free = {"cuda:0": int(card * GIB)} if card else {}
    return Machine(free | {"cpu": int(memory * GIB)}, bfloat16=True, is_here=False)


def planned(on: Machine, method: str = "refit", **arguments: Any) -> Plan:
    healing = HEALING if method == "healed" else None
    config = FusionConfig(4, method, calibration_tokens=TOKENS)
    return plan_phases(WIDE, torch.bfloat16, config, on, **{"healing": healing, **arguments})


@pytest.mark.parametrize(
    ("on", "places"),
    [
        (machine(80), {"cuda:0"}),
        (machine(24), {"cuda:0", "cpu"}),
        (machine(24, 12), {"cuda:0", "cpu", "disk"}),
        (machine(memory=64), {"cpu"}),
        (machine(memory=18), {"cpu", "disk"}),
    ],
)
def test_weights_lie_as_near_as_they_fit_and_no_place_holds_more_than_it_has(on: Machine, places: set[str]) -> None:
    made = planned(on)
    assert made.weights.keys() == places
    assert sum(made.weights.values()) == planned(machine(1000)).weights["cuda:0"]
    for place, size in made.peak.items():
        assert made.weights.get(place, 0) < size <= on.free[place]
    assert (made.device_map is None) == (len(places) == 1)
    assert "minutes unknown" in made.lines()[-1]


def test_the_first_rung_that_fits_trains_and_the_reason_names_the_first_that_did_not() -> None:
    rungs = [planned(machine(card), "healed").healing for card in (200, 80, 24)]
    assert [rung and rung.train for rung in rungs] == ["layers", "fused", "lora"]
    assert rungs[0] and " as " not in rungs[0].why
    assert rungs[2] and "as all layers would take 117" in rungs[2].why
    sharded = planned(replace(machine(80), processes=4, shards=4), "healed").healing
    assert sharded and sharded.train == "layers" and sharded.sequences == 1
    given = planned(machine(80), "healed", healing=replace(HEALING, train="lora")).healing
    assert given and given.train == "lora" and not given.gradient_checkpointing and given.sequences == 4


def test_training_splits_its_steps_and_keeps_fewer_activations_before_it_trains_less() -> None:
    tight = [planned(machine(card), "healed").healing for card in (41, 35, 31.5)]
    assert [(rung.train, rung.sequences) for rung in tight if rung] == [("fused", 2), ("fused", 1), ("fused", 4)]
    assert [rung.gradient_checkpointing for rung in tight if rung] == [False, False, True]


TIGHT = [(machine(8), None, "cuda:0"), (machine(24), "fused", "cuda:0"), (machine(80, 1), None, "cpu")]
TIGHT += [(machine(memory=4), None, "cpu"), (machine(memory=4), "lora", "cpu")]


@pytest.mark.parametrize(("on", "train", "place"), TIGHT)
def test_a_refusal_names_the_least_that_would_do_and_that_does(on: Machine, train: str | None, place: str) -> None:
    healing = train and replace(HEALING, train=train)
    with pytest.raises(NoRoom, match=f"{in_gib(on.free[place])} are free on {place}, .* with so much") as refused:
        planned(on, healing=healing)
    needed = refused.value.needed
    enough, too_little = (replace(on, free={**on.free, place: size}) for size in (needed, needed - (1 << 20)))
    assert 0.9 * needed < planned(enough, healing=healing).peak[place] <= needed
    with pytest.raises(NoRoom):
        planned(too_little, healing=healing)


@pytest.mark.filterwarnings("error:Attempting to save a model with offloaded")
def test_a_tiny_model_does_with_the_least_that_is_named(base: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"num_fusions": 1, "calibration": make_texts(200), "perplexity_tokens": 0}
    given |= {"method": "refit", "calibration_tokens": 1024, "calibration_length": 32}
    with pytest.raises(NoRoom) as refused:
        fuse_checkpoint(base, tmp_path, max_memory="cpu=1MiB", **given)
    fuse_checkpoint(base, tmp_path, max_memory={"cpu": refused.value.needed}, **given)


@pytest.mark.parametrize(
    ("on", "fusions", "ways"),
    [
        (machine(11), 4, r"max_memory=cpu=65536MiB\."),
        (machine(24, 24), 26, r"num_fusions=\d+\."),
        (machine(4, 4), 4, r"much\."),
    ],
)
def test_a_refusal_advises_what_would_do(on: Machine, fusions: int, ways: str) -> None:
    config = FusionConfig(fusions, "refit", calibration_tokens=TOKENS)
    with pytest.raises(NoRoom, match=f"give a device with so .*{ways}") as refused:
        plan_phases(WIDE, torch.bfloat16, config, on)
    for fewer in re.findall(r"num_fusions=(\d+)", str(refused.value)):
        assert plan_phases(WIDE, torch.bfloat16, replace(config, num_fusions=int(fewer)), on)


def test_a_limit_leaves_the_groups_as_they_are() -> None:
    """So the same are fused: it is refused where they do not fit, with the least that would do."""
    free = machine(memory=64)
    limited = replace(free, free={"cpu": 4 * GIB}, unlimited=64 * GIB)
    with pytest.raises(NoRoom) as refused:
        planned(limited)
    enough = planned(replace(limited, free={"cpu": refused.value.needed}))
    assert enough.longest == planned(free).longest and enough.peak["cpu"] <= refused.value.needed


@pytest.mark.parametrize("where", ["measure", "open_teacher"])
def test_memory_that_runs_out_is_said(where: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran_out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(f"lf_hf.pipeline.run.{where}", Mock(side_effect=ran_out))
    given: dict[str, Any] = {"num_fusions": 1, "calibration": make_texts(200), "perplexity_tokens": 0}
    with pytest.raises(MemoryError, match=r"Memory ran out on cpu, .* Give max_memory=cpu=") as failed:
        fuse_checkpoint(base, tmp_path / "out", **given, method="truncate", heal_tokens=2048)
    _, _, places = str(failed.value).partition("max_memory=")
    assert read_max_memory(places.split(", ")[0]).keys() == {"cpu"}


@pytest.mark.parametrize("more", [{"calibration_tokens": 98304}, {"perplexity_tokens": 8000}, {"num_fusions": 6}])
def test_more_takes_no_less(more: dict[str, Any]) -> None:
    rates = dict.fromkeys(("layer", "head", "product", "solve", "logits", "calls", "bytes"), 1e12)
    one: dict[str, Any] = {"num_fusions": 4, "method": "refit", "calibration_tokens": TOKENS}
    less, much = (
        plan_phases(WIDE, torch.bfloat16, FusionConfig(**arguments), machine(80), rates=lambda: rates)
        for arguments in (one, one | more)
    )
    assert less.minutes and much.minutes and sum(less.minutes.values()) < sum(much.minutes.values())
    assert less.phases.keys() == much.phases.keys() == {"measure", "choose", "make", "judge"}
    assert all(less.phases[name] <= much.phases[name] for name in less.phases)


def test_sizes_of_places_are_read() -> None:
    assert read_max_memory("cuda:0=20GiB, cpu=1GB,disk=5MiB") == {"cuda:0": 20 * GIB, "cpu": 10**9, "disk": 5 << 20}
    assert read_max_memory("cuda=20GiB") == read_max_memory({0: "20GiB"}) == {"cuda:0": 20 * GIB}
    assert read_max_memory("cpu:0=4GiB") == {"cpu": 4 * GIB}
    with pytest.raises(ValueError, match="names the disk alone"):
        read_max_memory("disk=5GiB")
    for wrong in ("20GiB", "card=20GiB", "cpu=much", ""):
        with pytest.raises(ValueError, match="max_memory must be places and sizes"):
            read_max_memory(wrong)
    with pytest.raises(ValueError, match="names a place twice"):
        read_max_memory("cpu=1GiB,cpu=2GiB")
    with pytest.raises(ValueError, match="names a place twice"):
        read_max_memory({0: "2GiB", "cuda:0": "2GiB"})
    with pytest.raises(ValueError, match="max_memory must be places and sizes"):
        Machine.here([torch.device("cpu")], "")


def test_this_machine_gives_no_more_than_it_has_and_another_one_all_that_is_named() -> None:
    cpu = [torch.device("cpu")]
    here, limited = Machine.here(cpu), Machine.here(cpu, "cpu=100MiB")
    assert here.device == "cpu" and here.is_here and min(here.free.values()) > 0
    assert limited.free["cpu"] == 100 << 20 and limited.is_here
    assert Machine.here(cpu, "cpu=9999GiB").free["cpu"] < 9999 * GIB
    other = Machine.here(cpu, "cpu=9999GiB,cuda:7=24GiB")
    assert not other.is_here and other.device == "cuda:7"
    assert other.free == {"cuda:7": 24 * GIB, "cpu": 9999 * GIB}


def test_in_a_launch_any_card_that_is_named_stands_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"cuda:3": 9 * GIB, "cpu": 9 * GIB}
    for name, value in {
        "local_processes": lambda: 2,
        "free_memory": lambda device: has[str(device)],
        "computes_bfloat16": lambda _: True,
    }.items():
        monkeypatch.setattr(f"lf_hf.plan.machine.{name}", value)
    cases: list[tuple[Any, int]] = [(None, 9), ("cuda:0=5GiB,cpu=30GiB", 5), ({0: "5GiB", "cpu": "30GiB"}, 5)]
    cases += [("cuda:0=2GiB,cuda:3=8GiB,cpu=30GiB", 8), ("cuda:0=7GiB,cuda:1=6GiB,cpu=30GiB", 6)]
    for given, own in cases:
        found = Machine.here([torch.device("cuda:3")], given)
        assert found.is_here and found.free == {"cuda:3": own * GIB, "cpu": 9 * GIB}


def test_healing_takes_the_first_card_alone(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Machine({"cuda:1": 80 * GIB, "cpu": 64 * GIB}, bfloat16=True)
    monkeypatch.setattr("lf_hf.pipeline.planning.Machine", SimpleNamespace(here=lambda *_: second))
    with pytest.raises(ValueError, match="Healing trains on cuda:0, not on cuda:1; hide the others, and give cuda"):
        dry_run(base, FusionConfig(1, "healed"), calibration=make_texts(100), max_memory="cuda:1=80GiB,cpu=64GiB")


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma4_unified"])
def test_the_decoder_of_a_model_of_images_is_timed_by_itself(model_type: str) -> None:
    """That of Qwen3-VL is no model with a head in transformers."""
    assert min(probe(torch.device("cpu"), torch.float32, tiny_config(model_type)).values()) > 0


def test_a_probe_gives_minutes() -> None:
    config, device = LlamaConfig(**TINY), torch.device("cpu")
    rates = probe(device, torch.float32, config)
    assert min(rates.values()) > 0
    fusion = FusionConfig(2, "healed", calibration_tokens=TOKENS)
    made = plan_phases(WIDE, torch.float32, fusion, machine(160), healing=HEALING, rates=lambda: rates)
    assert made.minutes and list(made.minutes) == ["measure", "choose", "make", "teach", "heal", "judge"]
    assert min(made.minutes.values()) > 0 and made.lines()[-1].startswith("minutes, about: measure ")
