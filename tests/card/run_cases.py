"""Fuses on stand-in cards, and writes a line of JSON for each case and check: run_cases.py LIBRARY OUT.

A new placement, method or family is an entry in cases.py; what is no fusion of that table is a function in `CHECKS`.
"""

# ruff: noqa: E402
import ctypes
import sys

LIBRARY = ctypes.CDLL(sys.argv[1])  # before torch

import gc
import json
import queue
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from card.cases import CASES, FAMILIES, PLACEMENTS, Case, make_base, outcome
from card.stand_in import insert
from conftest import make_texts, save_base, tensors
from tiny_models import tiny_model
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import DefaultFlowCallback, PreTrainedModel

from lf_hf import fuse_checkpoint, heal
from lf_hf.checkpoint.base import Base
from lf_hf.decoder.decoder import Decoder
from lf_hf.pipeline.fusion import FusionInputs
from lf_hf.pipeline.healing import HealInputs
from lf_hf.pipeline.planning import fusion_plan, healing_plan
from lf_hf.plan.machine import CONTEXT
from lf_hf.plan.plan import NoRoom, Plan
from lf_hf.refit.layer_parts import build_layer
from lf_hf.runtime.progress import Clock

CARDS = insert(LIBRARY)
Figures = dict[str, Any]


class Waits:
    """How often the host waits for a card in a phase of fusing, in a step of healing, and for a written token."""

    def __init__(self) -> None:
        self._phases = Counter[str]()
        self._steps = list[int]()
        self._tokens = list[int]()
        self._rough_fits = 0
        register_module_forward_pre_hook(self._begin_layer)
        end_step, time_phase = DefaultFlowCallback.on_step_end, Clock.__call__

        @contextmanager
        def phase(clock: Clock, name: str) -> Iterator[None]:
            self._phases[name] -= CARDS.waits
            with time_phase(clock, name):
                yield
            self._phases[name] += CARDS.waits

        def on_step_begin(*_: Any, **__: Any) -> None:
            self._steps.append(-CARDS.waits)

        def on_step_end(*given: Any, **named: Any) -> Any:
            self._steps[-1] += CARDS.waits
            return end_step(*given, **named)

        def rough_fit(*given: Any, **named: Any) -> Any:
            self._rough_fits += 1
            return build_layer(*given, **named)

        patch.object(Clock, "__call__", phase).start()
        patch("lf_hf.choose.costs.build_layer", rough_fit).start()
        patch.object(DefaultFlowCallback, "on_step_begin", on_step_begin).start()
        patch.object(DefaultFlowCallback, "on_step_end", on_step_end).start()

    def take(self) -> Figures:
        """Of what was seen since the last call: in each phase, the most in a step, and the median of all tokens."""
        found: Figures = {"phases": {**self._phases}, "rough fits": self._rough_fits}
        if self._steps:
            found["step"] = max(self._steps)
        if len(self._tokens) > 1:
            found["token"] = median(after - before for before, after in pairwise(self._tokens))
        for seen in (self._phases, self._steps, self._tokens):
            seen.clear()
        self._rough_fits = 0
        return found

    def _begin_layer(self, module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        attention: Any = getattr(module, "self_attn", None)
        is_first = attention is not None and attention.layer_idx == 0
        if is_first and given and given[0].shape[1] == 1:  # hidden states of one token
            self._tokens.append(CARDS.waits)


def after_loading(use: Callable[[torch.nn.Module], None]) -> Any:
    """A patch that shows `use` every model that transformers loads."""
    load: Any = PreTrainedModel.from_pretrained

    def from_pretrained(cls: Any, *given: Any, **named: Any) -> Any:
        loaded = load.__func__(cls, *given, **named)
        use(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    return patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))


def error_of(work: Callable[[], Any]) -> str | None:
    """What `work` raises where a card refuses an operation or has no room, and what that comes from.

    Any other error ends the program: it is a fault of what is tested or of the test, and not a finding.
    """
    try:
        work()
    except (RuntimeError, MemoryError, TypeError):  # of which TypeError is NumPy's, of what is on a card
        return traceback.format_exc()
    finally:
        gc.collect()
    return None


def mixed(_: dict[str, str]) -> str | None:
    """What an operation raises on tensors of a card and of the host."""
    return error_of(lambda: torch.ones(2, device="cuda") + torch.ones(2))


def no_room(bases: dict[str, str]) -> str | None:
    """What a fusion raises where another process takes the card's memory once the model is there."""
    before = CARDS.capacity()
    with after_loading(lambda _: CARDS.set_capacity(CARDS.live() + (1 << 16))):
        error = error_of(lambda: outcome(Case("refit", "Llama"), bases["Llama"], **PLACEMENTS["in memory"]))
    CARDS.set_capacity(before)
    return error


def layers_on_disk(bases: dict[str, str]) -> Figures:
    """In which order layers are read when each is used once the next one is there, and what reading leaves behind."""
    reads, order, same = queue.SimpleQueue[int](), list[int](), True
    held, read = tensors(Path(bases["Llama"])), OffloadedWeightsLoader.__getitem__

    def noted(loader: OffloadedWeightsLoader, name: str) -> torch.Tensor:
        if name.endswith("mlp.up_proj.weight"):
            reads.put(int(name.split(".")[2]))
        return read(loader, name)

    with tempfile.TemporaryDirectory() as scratch, patch.object(OffloadedWeightsLoader, "__getitem__", noted):
        base, on_disk = Base.open(bases["Llama"], {}), dict.fromkeys(("model.embed_tokens", "model.layers"), "disk")
        placed: dict[str, Any] = {"device_map": on_disk | {"model.norm": 0, "lm_head": 0}, "offload_folder": scratch}
        decoder = Decoder(replace(base, loading={**base.loading, **placed}).load())
        threads = threading.enumerate()
        for number, layer in enumerate(decoder.layers(range(4))):
            while len(order) < min(number + 2, 4):
                order.append(reads.get(timeout=60))
            for name, parameter in layer.named_parameters():
                same &= parameter.is_cuda and torch.equal(parameter.cpu(), held[f"model.layers.{number}.{name}"])
        for _ in decoder.layers(range(4)):
            break
        layers = decoder.copy().layers(range(4))
        next(layers)
        del layers
        return {"order": order, "same": same, "threads": len({*threading.enumerate()} - {*threads})}


def trainings(_: dict[str, str]) -> list[Figures]:
    """What trains, and its peak, on a large card, and on cards with no more than parts of what is planned for that; at
    the end adapters, which are asked for: here they take as much as the fused layers, so no plan chooses them."""
    long: dict[str, Any] = {"num_hidden_layers": 9, "max_position_embeddings": 1024, "num_key_value_heads": 4}
    of_one: dict[str, Any] = dict.fromkeys(("tokens", "length", "batch_tokens"), 1024)  # one step of one sequence
    settings = of_one | {"text": make_texts(200), "device_map": "cuda"}
    free, found = 80 << 30, list[Figures]()

    def noted(inputs: HealInputs, folder: Path) -> Plan:
        plan = healing_plan(inputs, folder)
        CARDS.set_capacity(free - CONTEXT)
        found.append({"why": plan.healing and plan.healing.why, "planned": plan.peak["cuda:0"] - CONTEXT})
        return plan

    with tempfile.TemporaryDirectory() as scratch, patch("lf_hf.pipeline.run.healing_plan", noted):
        base = save_base(Path(scratch, "base"), tiny_model("llama", **long).bfloat16())
        fused = Path(scratch, "fused")
        fuse_checkpoint(base, fused, num_fusions=1, method="truncate", perplexity_tokens=128, speed=False)
        adapters = {"train": "lora", "lora_rank": 4}
        for part, asked in (1, {}), (0.7, {}), (0.52, {}), (0.52, adapters):
            if found:
                free = CONTEXT + int(part * found[0]["planned"])
            given = settings | asked | {"max_memory": {0: free, "cpu": 4 << 30}}
            with CARDS.watch() as seen:
                heal(fused, Path(scratch, f"{len(found)}"), base=base, **given)
            CARDS.set_capacity(80 << 30)
            found[-1] |= {"peak": seen.peak}
    return found


CHECKS: list[Callable[[dict[str, str]], Any]] = [mixed, no_room, layers_on_disk, trainings]


def placed(case: Case, base: str) -> dict[str, Any]:
    """Where a case is fused: on a card that is too small, with so much of it as a plan would do with."""
    placement = PLACEMENTS[case.placement]
    if "max_memory" not in placement:
        return placement
    with pytest.raises(NoRoom) as refused:
        outcome(case, base, **placement)
    return placement | {"max_memory": placement["max_memory"] | {0: refused.value.needed}}


def fused(case: Case, base: str, waits: Waits) -> Figures:
    """What comes of a case, or its error, on a card with no more memory than the plan was made for, and what the books
    say."""
    CARDS.count = 2 if case.placement == "on two cards" else 1
    found: Figures = {}
    plans, capacity, placement = [], CARDS.capacity(), placed(case, base)

    def noted(inputs: FusionInputs, folder: Path | None = None) -> Plan:
        plans.append(fusion_plan(inputs, folder))
        CARDS.set_capacity(plans[-1].machine.free["cuda:0"] - CONTEXT)
        return plans[-1]

    planned = (patch(f"lf_hf.pipeline.{module}.fusion_plan", noted) for module in ("run", "planning"))
    with CARDS.watch() as seen, next(planned), next(planned):
        found["error"] = error_of(lambda: found.update(outcome(case, base, **placement)))
    found |= {"waits": seen.waits, "weights_read": seen.weights_read, "capacity": CARDS.capacity()}
    CARDS.set_capacity(capacity)
    [plan] = plans
    found |= {"peak": seen.peak, "planned": plan.peak["cuda:0"] - CONTEXT}
    found |= {"states": plan.resting_place, "weights": [*plan.weights]}
    return found | waits.take() | {"left": CARDS.live(0) + CARDS.live(1)}


def main(out: Path) -> None:
    gc.freeze()  # what was imported stays, and takes long to look through
    with tempfile.TemporaryDirectory() as scratch, out.open("w", encoding="utf-8") as lines:

        def write(name: Any, found: Any) -> None:
            print(json.dumps([name, found]), file=lines, flush=True)

        bases = {family: make_base(family, Path(scratch, family)) for family in FAMILIES}
        for check in CHECKS:
            write(check.__name__, check(bases))
        waits = Waits()
        after_loading(lambda model: CARDS.mark_weights(model.parameters())).start()
        for case in CASES:
            write(case, fused(case, bases[case.family], waits))


if __name__ == "__main__":
    main(Path(sys.argv[2]))
