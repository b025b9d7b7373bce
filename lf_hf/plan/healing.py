"""What a healing trains: the most that fits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

from lf_hf.plan.machine import Machine, NoRoom
from lf_hf.plan.phases import STEP_BYTES, TRAINED_BYTES, Shape, Work, activation_bytes, fused_layers
from lf_hf.runtime.memory import in_gib
from lf_hf.settings import FusionConfig

_ADAMW_STATE = 12  # bytes of a trained parameter in a state on disk
_STATES = 2  # of a training on disk: the last and the best one
_LOGITS, _FLOATS, _FLOATS_ON_CPU = 1 << 27, 1 << 24, 1 << 17  # see healing.loss
_HELD_OUT = 8192  # tokens of a look at held-out text
EVALUATIONS = 3
"""How many times a training looks at held-out text, and keeps its state; it looks once more before the first step."""

Training: TypeAlias = Any
"""Settings of a healing, of which tokens, length, batch_tokens, lora_rank and train count; to choose, train is None."""
_TRAINED: dict[str, str] = {
    "layers": "all layers",
    "fused": "the fused layers",
    "lora": "adapters",
    "all": "all parameters",
}


@dataclass(frozen=True)
class HealingPlan:
    """What trains and why, how many sequences at a time, and bytes: on its `device`, and of states on the disk."""

    train: str
    device: str
    gradient_checkpointing: bool
    sequences: int
    why: str
    trained: int
    bytes: int
    disk: int
    work: Work


def plan_healing(shape: Shape, fusion: FusionConfig, machine: Machine, healing: Training) -> HealingPlan:
    """What trains: the first rung of a ladder that fits, with as many sequences at a time as fit.

    All layers, the fused ones, or adapters, each without and with checkpoints of gradients. The fused model stays where
    it trains, and what is not trained is its own. Raises NoRoom where no rung fits.
    """
    layers = shape.layers - fused_layers(fusion)
    own, free = machine.own_bytes(shape.vocab), machine.free[machine.device]
    trained_by: dict[str, int] = {
        "layers": layers * shape.layer,
        "fused": fused_layers(fusion) * shape.layer,
        "lora": layers * shape.adapters * healing.lora_rank,
        "all": shape.total - fused_layers(fusion) * shape.layer,
    }
    ladder: list[str] = [healing.train] if healing.train else ["layers", "fused", "lora"]
    batch = max(1, healing.batch_tokens // healing.length // machine.processes)
    divisors = [number for number in range(batch, 0, -1) if batch % number == 0]
    least: dict[str, int] = {}  # of what did not fit
    for train, checkpoints, sequences in product(ladder, (False, True), divisors):
        trained = trained_by[train]
        tokens = sequences * healing.length
        takes = own + _healing_bytes(shape, machine, layers, trained, tokens, checkpoints=checkpoints)
        if takes > free:
            least[train] = takes
            continue
        why = f"{_TRAINED[train]}, {trained:,} parameters{' with gradient checkpointing' * checkpoints}"
        if train != ladder[0]:
            why += f", as {_TRAINED[ladder[0]]} would take {in_gib(least[ladder[0]])}"
        work = _healing_work(shape, layers, trained, healing, checkpoints=checkpoints)
        disk = _STATES * _ADAMW_STATE * trained
        return HealingPlan(train, machine.device, checkpoints, sequences, why, trained, takes, disk, work)
    what = f"healing with train={ladder[-1]!r} and gradient checkpointing"
    raise NoRoom(what, machine, least[ladder[-1]], "method='refit'")


def _healing_bytes(shape: Shape, machine: Machine, layers: int, trained: int, tokens: int, *, checkpoints: bool) -> int:
    """Bytes of a training, of so many tokens at a time."""
    size = 2 if machine.bfloat16 else 4
    model = shape.total - (shape.layers - layers) * shape.layer
    fixed = model * shape.size + (TRAINED_BYTES if machine.bfloat16 else 16) * trained
    if size != shape.size:  # copies of what is not trained, in the type that training computes in
        fixed += max(0, model - trained) * size
    if machine.shards > 1:  # all of it in float32, as shards are of one type
        fixed = (4 * model + (TRAINED_BYTES - 4) * trained) // machine.shards
    # What a layer keeps; with checkpoints that of one layer, and the stream in front of each.
    a_token = activation_bytes(shape) * size // 2 * (1 if checkpoints else layers)
    a_token += 4 * shape.hidden * layers * checkpoints
    # Both models' slices of logits, and softmaxes of a few of them in float32.
    logits = tokens * shape.vocab
    floats = _FLOATS if machine.has_card else _FLOATS_ON_CPU
    return fixed + tokens * a_token + 2 * size * min(logits, _LOGITS) + 24 * min(logits, floats)


def _healing_work(shape: Shape, layers: int, trained: int, healing: Training, *, checkpoints: bool) -> Work:
    """Steps, and looks at held-out text: forward, gradients of states and of what trains, and both models' heads."""
    tokens = healing.tokens
    weight_gradients = 2 * min(trained, layers * shape.layer)
    a_token = (4 + 2 * checkpoints) * layers * shape.layer + weight_gradients
    steps = max(1, tokens // healing.batch_tokens)
    seen = (min(EVALUATIONS, steps) + 1) * _HELD_OUT
    work = Work(layer=tokens * a_token, head=tokens * 6 * shape.head, logits=3 * tokens * shape.vocab)
    work += Work(layer=seen * 2 * layers * shape.layer, head=seen * 4 * shape.head, logits=2 * seen * shape.vocab)
    return work + Work(bytes=steps * STEP_BYTES * trained)
