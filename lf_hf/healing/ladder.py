"""What a healing trains, by how much memory there is, and what the training takes: a ladder of ways, by arithmetic."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from lf_hf.decoder.demand import STEP_BYTES, TRAINED_BYTES, Work, activation_bytes
from lf_hf.families.shape import Shape
from lf_hf.healing.text import HELD_OUT
from lf_hf.plan.machine import Machine
from lf_hf.plan.plan import HealingPlan, NoRoom
from lf_hf.runtime.amounts import EVALUATIONS, FLOAT_LOGITS, FLOAT_LOGITS_ON_CPU, TRAINED_LOGITS
from lf_hf.runtime.memory import in_gib
from lf_hf.settings import TRAINED, HealSettings

_KINDS = 4  # of text that is healed on, about: two that are given, and text and chats that the base writes
_STATE, _OF_ADAPTER = 12, 4  # bytes on disk of a trained parameter: it and two moments, and an adapter's alone


def plan_training(machine: Machine, fusions: int, healing: HealSettings, shape: Shape, least: int) -> HealingPlan:
    """What trains: the first rung of a ladder that fits, with as many sequences at a time as fit.

    All layers, the fused ones, or adapters, each without and with checkpoints of gradients. The fused model stays where
    it trains, and what is not trained is its own. Raises NoRoom where no rung fits: it names no less than the `least`
    bytes that all else takes.
    """
    layers = shape.layers - fusions
    own, free = machine.own_bytes(shape.vocab), machine.free[machine.device]
    fused = fusions * shape.layer  # parameters, as many as go
    trained_by = {
        "layers": layers * shape.layer,
        "fused": fused,
        "lora": layers * shape.adapters * healing.lora_rank,
        "all": shape.total - fused,
    }
    ladder = [healing.train] if healing.train else ["layers", "fused", "lora"]
    batch = max(1, healing.batch_tokens // healing.length // machine.processes)
    divisors = [number for number in range(batch, 0, -1) if batch % number == 0]
    tried: dict[str, int] = {}  # bytes of what did not fit
    for train, checkpoints, sequences in product(ladder, (False, True), divisors):
        trained = trained_by[train]
        tokens = sequences * healing.length
        takes = own + training_bytes(shape, machine, layers, trained, tokens, checkpoints=checkpoints)
        if takes > free:
            tried[train] = takes
            continue
        why = f"{TRAINED[train]}, {trained:,} parameters{' with gradient checkpointing' * checkpoints}"
        if train != ladder[0]:
            why += f", as {TRAINED[ladder[0]]} would take {in_gib(tried[ladder[0]])}"
        work = training_work(shape, layers, trained, healing, checkpoints=checkpoints)
        last = _OF_ADAPTER if train == "lora" else shape.size  # in the model's own dtype
        disk = (_STATE + (_STATE if machine.shards > 1 else last)) * trained
        settings = replace(healing, train=train)
        return HealingPlan(settings, machine.device, checkpoints, sequences, why, takes, disk, work)
    what = f"healing with train={ladder[-1]!r} and gradient checkpointing"
    raise NoRoom(what, machine, max(tried[ladder[-1]], least), machine.device)


def training_bytes(shape: Shape, machine: Machine, layers: int, trained: int, tokens: int, *, checkpoints: bool) -> int:
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
    a_token += 14 * shape.hidden  # the embedded stream, and the final norm
    # Both models' slices of logits, and softmaxes of a few of them in float32.
    logits = tokens * shape.vocab
    floats = min(logits, FLOAT_LOGITS if machine.has_card else FLOAT_LOGITS_ON_CPU)
    return fixed + tokens * a_token + 2 * size * min(logits, TRAINED_LOGITS) + 24 * floats


def training_work(shape: Shape, layers: int, trained: int, healing: HealSettings, *, checkpoints: bool) -> Work:
    """Steps, and looks at held-out text: forward, gradients of states and of what trains, and both models' heads."""
    tokens = healing.tokens
    weight_gradients = 2 * min(trained, layers * shape.active)
    a_token = (4 + 2 * checkpoints) * layers * shape.active + weight_gradients
    steps = max(1, tokens // healing.batch_tokens)
    look = HELD_OUT * _KINDS * healing.length  # tokens of a look at held-out text
    seen = (min(EVALUATIONS, steps) + 1) * look
    work = Work(layer=tokens * a_token, head=tokens * 6 * shape.head, logits=3 * tokens * shape.vocab)
    work += Work(layer=seen * 2 * layers * shape.active, head=seen * 4 * shape.head, logits=2 * seen * shape.vocab)
    return work + Work(bytes=steps * STEP_BYTES * trained)
