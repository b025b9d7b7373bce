"""What a fusion takes, before weights are read: where they lie, peak bytes by place, and minutes by phase.

Pure arithmetic on a config, settings and a machine, which need not be this one: no weights, text or device. Only
`Machine.here` asks how much is free, and only `probe` computes anything.
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers import PreTrainedConfig

from lf_hf.decoder.generating import WRITTEN_LENGTH
from lf_hf.decoder.interface import set_config_layers
from lf_hf.families import head_dim
from lf_hf.models import family_of, model_class, text_model
from lf_hf.runtime.memory import free_memory, in_gib
from lf_hf.runtime.numerics import bfloat16_products, computes_bfloat16
from lf_hf.settings import LONGEST_GROUP, FusionConfig
from lf_hf.text.judging import PERPLEXITY_LENGTH
from lf_hf.text.packing import JUDGING_LENGTH

CPU_BATCH, LARGEST_BATCH = 1 << 26, 1 << 32
"""Bytes that a batch may take inside a layer: on the CPU, where more gains nothing, and on a large card."""
_BATCH_SHARE = 16  # of another card, one part in so many
_BATCH_COPIES = 64  # bytes for each token and channel of an MLP, see `Decoder.batch_indices`
_PYTHON, _OF_TOKENIZER = 13 << 26, 512  # bytes that Python takes with all libraries, and a token of the vocabulary
CONTEXT = 1 << 30
"""Bytes of a card for its kernels and the workspaces of its libraries."""
_LOW_MEMORY_STATES = 1 << 27  # bytes of states in memory where little is to be used
_OFFLOADED = 3  # layers that come and go: one that computes, one that is read, and one that is made
_LOGITS = 1 << 25  # of a model at a time, where texts are judged
_JUDGED_AT_ONCE = 9  # models whose predictions are compared in choosing
_VOCABULARY, _MOST_SKIPPED = 1 << 15, 6  # choosing judges one token in so many, by the vocabulary
_CANDIDATES, _CANDIDATES_PER_KEPT = 6144, 1.25  # channels that are compared by regression
_EXACT = 4096  # unknowns up to which a system is solved in float64
_FITTING_TOKENS = 4096  # of choosing
_PIECES, _OTHER_PIECES, _GROUP_PIECES = 16, 16, 4  # that judge: of the text, of other kinds, and one in so many of both
_SHORT_GROUPS = 2  # layers that go in groups which are all measured
_TRIALS, _LEAST_TRIALS, _TRIAL_TOKENS = 16, 6, 2048
_TUNED_PASSES, _TUNED_TOKENS, _STEP_TOKENS = 8, 8 * 49152, 2048
_SAMPLES, _SAMPLE_LENGTH = 57, 128  # of the published method's default, about
_TRAINED_BYTES = 18  # of a trained parameter: master, gradient, two moments in float32, and a copy to compute in
_STEP_BYTES = 60  # of it that AdamW and the copy read and write in a step
_ADAMW_STATE = 12  # of it in a state on disk
_STATES = 2  # of a training on disk: the last and the best one
_HEAL_LOGITS, _HEAL_FLOATS, _HEAL_FLOATS_ON_CPU = 1 << 27, 1 << 24, 1 << 17  # see healing.loss
_EVALUATIONS, _HELD_OUT = 7, 8192  # of a healing, and tokens of each
_WRITTEN_SHARE = 1 / 2  # of calibration text that the model writes, at most

Work = Counter[str]
"""Operations by the rate that bounds them. Flops: of whole layers, the `head`, each `product` in float32, and what is
`solve`d in float64. `logits` are numbers of a softmax, `calls` of a layer with a token each, and `bytes` what is moved.
"""
Rates = Mapping[str, float]
"""Operations a second, by the names of `Work`."""
Train = Literal["layers", "fused", "lora", "all"]
_TRAINED: dict[Train, str] = {
    "layers": "all layers",
    "fused": "the fused layers",
    "lora": "adapters",
    "all": "all parameters",
}


class NoRoom(ValueError):
    """No way to run fits the machine; `needed` bytes, which the message names, would do where layers compute."""

    def __init__(self, what: str, machine: Machine, needed: int, advice: str) -> None:
        device = machine.device
        super().__init__(
            f"{in_gib(machine.free[device])} are free on {device}, and {what} takes {in_gib(needed)} there at least; "
            f"give a device with so much, or {advice}."
        )
        self.needed = needed


@dataclass(frozen=True)
class Machine:
    """What a run may use: bytes by place, and what computes, which is the first place.

    Places are "cuda:0" and the like, "cpu" and "disk". `bfloat16`: whether training computes in it. `is_here`: whether
    it is this machine, whose rates can be measured.
    """

    free: Mapping[str, int]
    bfloat16: bool
    is_here: bool = True

    @property
    def device(self) -> str:
        return next(iter(self.free))

    @property
    def has_card(self) -> bool:
        return self.device != "cpu"

    def own_bytes(self, vocab: int) -> int:
        """Bytes that are taken before there are weights, where layers compute."""
        return CONTEXT if self.has_card else _PYTHON + _OF_TOKENIZER * vocab

    @classmethod
    def here(
        cls, devices: Sequence[torch.device], max_memory: str | None = None, folder: Path | None = None
    ) -> Machine:
        """What is free now on some devices, in memory and on the disk of `folder`; with `max_memory` no more than that.

        A place that `max_memory` does not name is not used, but for the disk. Raises ValueError for one that cannot be
        read. Where it names a device that is not here, the machine is another one, and all that it names is free.
        """
        given = read_max_memory(max_memory) if max_memory else {}
        free = {str(device): free_memory(device) for device in [*devices, torch.device("cpu")]}
        is_here = given.keys() <= free.keys() | {"disk"}
        for place, size in given.items():
            given[place] = min(size, free.get(place, size)) if is_here else size
        cards = sorted(place for place in given or free if place not in ("cpu", "disk"))
        free = {place: (given or free)[place] for place in [*cards, "cpu"] if place in (given or free)}
        free["disk"] = given.get("disk", shutil.disk_usage(folder or Path.cwd()).free)
        return cls(free, computes_bfloat16() if is_here else bool(cards), is_here)


def read_max_memory(text: str) -> dict[str, int]:
    """Bytes by place, of "cuda:0=20GiB,cpu=30GiB". Raises ValueError for what cannot be read."""
    sizes = {}
    for part in text.split(","):
        place, _, size = part.strip().partition("=")
        try:
            if place != "disk":
                torch.device(place)
            sizes[place] = convert_file_size_to_int(size)
        except (RuntimeError, ValueError):
            raise ValueError(
                f"max_memory must be places and sizes, such as cuda:0=20GiB,cpu=30GiB; got {part!r:.80}."
            ) from None
    return sizes


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its space and time follow from; `size` is of a stored number, in bytes."""

    layers: int
    hidden: int
    mlp: int
    queries: int  # rows of q_proj
    keys: int  # of k_proj, and of v_proj
    vocab: int
    layer: int  # parameters of a layer
    total: int  # of the model, tied ones once
    size: int
    has_norm_after: bool  # whether halves write through a norm, and so are fitted twice
    has_head_norms: bool

    @classmethod
    def of(cls, model: Any, size: int) -> Shape:
        """Of a model, which may be on the meta device."""
        text, family = model.config.get_text_config(), family_of(model.config)
        layers = text_model(model).layers
        return cls(
            layers=len(layers),
            hidden=text.hidden_size,
            mlp=text.intermediate_size,
            queries=text.num_attention_heads * head_dim(text),
            keys=text.num_key_value_heads * head_dim(text),
            vocab=text.vocab_size,
            layer=_count(layers) // len(layers),
            total=_count(model),
            size=size,
            has_norm_after=family.mlp.after is not None,
            has_head_norms=family.head_norms is not None,
        )

    @property
    def layer_bytes(self) -> int:
        return self.layer * self.size

    @property
    def bytes(self) -> int:
        return self.total * self.size

    @property
    def head(self) -> int:
        """Parameters of the head, or of the embeddings."""
        return self.vocab * self.hidden

    @property
    def adapters(self) -> int:
        """Parameters of a LoRA of rank 1 on all projections of a layer."""
        return 4 * self.hidden + 2 * self.queries + 2 * self.keys + 3 * (self.hidden + self.mlp)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Need:
    """What a phase takes beside the model's weights: bytes where layers compute, bytes of lists of states, and work."""

    inside: int
    lists: int
    work: Work


@dataclass(frozen=True)
class _Fusion:
    """The phases of a fusion of a model, but for healing."""

    shape: Shape
    config: FusionConfig
    batch_bytes: int
    on_card: bool
    heal_tokens: int
    longest: int  # layers that may become one
    few_reads: bool  # whether weights lie on a disk, so that the model writes nothing

    @property
    def fusions(self) -> int:
        return self.config.num_fusions or 1

    @property
    def groups(self) -> int:
        """About how many groups there are."""
        a_group = {"last": self.fusions, "least_influence": 4 / 3, "groups": 2}  # layers that go in it
        return math.ceil(self.fusions / a_group[self.config.selection])

    @property
    def judged(self) -> int:
        """Tokens of both judging texts."""
        return 2 * self.config.perplexity_tokens

    @property
    def passing(self) -> int:
        """Bytes of layers that come and go, and of embeddings, where weights lie elsewhere."""
        layers = _OFFLOADED + self.longest * self.config.fits
        return layers * self.shape.layer_bytes + self.shape.head * self.shape.size

    @property
    def lists(self) -> int:
        """The most bytes of lists of states."""
        return max(need.lists for need in self.needs.values())

    def most(self, states: str) -> int:
        """The most bytes of a phase, with lists of states where these are on the "device"."""
        return max(need.inside + need.lists * (states == "device") for need in self.needs.values())

    @cached_property
    def needs(self) -> dict[str, Need]:
        """The phases by name, in their order."""
        phases = {"measure": self._measure()}
        if self.config.needs_text:
            phases["choose"] = self._choose()
        phases["make"] = self._make()
        phases["judge"] = self._judge()
        return phases

    def _batch(self, length: int) -> int:
        """Tokens that pass a layer together, of sequences of `length` tokens."""
        return max(1, self.batch_bytes // (_BATCH_COPIES * self.shape.mlp) // length) * length

    def _running(self, length: int) -> int:
        """Bytes inside a layer: gate, its activation, up and their product; the stream, norms and all of attention."""
        return self._batch(length) * (4 * self.shape.mlp + 10 * self.shape.hidden) * self.shape.size

    def _states(self, tokens: int) -> int:
        """Bytes of a list of the states of so many tokens."""
        return tokens * self.shape.hidden * self.shape.size

    def _forward(self, tokens: int, layers: int) -> Work:
        return Work(layer=2 * self.shape.layer * tokens * layers)

    def _head(self, tokens: int, models: int = 1) -> Work:
        logits = tokens * self.shape.vocab * models
        return Work(head=2 * self.shape.hidden * logits, logits=logits)

    def _logits(self, tokens: int, models: int) -> int:
        """Bytes of logits of some models of at most so many tokens; a card has them in float32, and their softmax."""
        return models * min(_LOGITS, tokens * self.shape.vocab) * (self.shape.size + 8 * self.on_card)

    def _written(self, rows: int, steps: int) -> tuple[int, Work]:
        """Bytes and work of text that a model writes, `rows` sequences together."""
        shape = self.shape
        of_layer = rows * steps * 2 * shape.keys * shape.size
        cache = of_layer * (shape.layers + 1)  # one of them beside what it grows to
        logits = rows * shape.vocab * (shape.size + 12 * self.on_card)  # float32, softmax and its sums
        work = self._forward(rows * steps, shape.layers) + self._head(rows * steps)
        work += Work(calls=steps * shape.layers, bytes=of_layer * shape.layers * steps // 2)  # written anew each step
        return cache + logits, work

    def _measure(self) -> Need:
        """Judging, what the model writes, and samples or the final states of what is healed on."""
        shape, config = self.shape, self.config
        inside, lists = self._running(PERPLEXITY_LENGTH), self._states(self.judged)
        work = self._forward(self.judged, shape.layers) + self._head(self.judged)
        inside += self._logits(self._batch(PERPLEXITY_LENGTH), 1)
        if config.perplexity_tokens and not self.few_reads:
            work += self._written(4, 24)[1]
        if config.averages:
            samples = _SAMPLES * _SAMPLE_LENGTH
            lists += 2 * self._states(samples)
            work += self._forward(samples, shape.layers)
        if config.needs_text and not self.few_reads:
            written, of_text = self._written(
                int(config.calibration_tokens * _WRITTEN_SHARE) // WRITTEN_LENGTH, WRITTEN_LENGTH
            )
            inside, work = max(inside, written), work + of_text
        if self.heal_tokens:
            work += self._forward(self.heal_tokens, shape.layers)
        return Need(inside, lists, work)

    def _judge(self) -> Need:
        """Both models on the judging texts, and what the fused one writes."""
        layers = self.shape.layers - self.fusions
        inside = self._running(PERPLEXITY_LENGTH) + self._logits(self._batch(PERPLEXITY_LENGTH), 2)
        work = self._forward(self.judged, layers) + self._head(self.judged, 2)
        if self.config.perplexity_tokens and not self.few_reads:
            work += self._written(4, 24)[1]
        return Need(inside, 2 * self._states(self.judged), work)

    def _choose(self) -> Need:
        shape, length = self.shape, self.config.calibration_length
        if self.config.selection != "groups":  # by influence, on some text
            tokens = min(8192, self.config.calibration_tokens) * (self.config.selection == "least_influence")
            return Need(self._running(length), 2 * self._states(tokens), self._forward(tokens, shape.layers))
        fitted = min(_FITTING_TOKENS, self.config.calibration_tokens)
        of_text = min(_PIECES, int(self.config.calibration_tokens * (1 - _WRITTEN_SHARE)) // length // 2)
        judging = (of_text + _OTHER_PIECES) * JUDGING_LENGTH  # of sets; a part of it judges groups
        judging_groups = judging // _GROUP_PIECES
        trials = min(_TRIALS, max(_LEAST_TRIALS, self.config.calibration_tokens // _TRIAL_TOKENS))
        short = sum(shape.layers - 2 - more for more in range(1, min(self.fusions, _SHORT_GROUPS) + 1))
        measured = short + trials  # and those of the sets, of which about one is new in each
        stride = min(max(2, shape.vocab // _VOCABULARY), _MOST_SKIPPED)
        # Lists: at all boundaries, inside a group, of groups that are judged, and above those of sets.
        lists = self._states((shape.layers + 1) * (fitted + judging) + self.longest * fitted)
        lists += self._states(measured * judging_groups + trials * self.groups * (fitted + judging))
        fitting, work_of_fit = self._fit(fitted, 2, rough=True)
        longest_fit, _ = self._fit(fitted, self.longest, rough=True)
        judged_at_once = self._batch(JUDGING_LENGTH) // stride
        inside = self._running(length) + max(fitting, longest_fit, self._logits(judged_at_once, _JUDGED_AT_ONCE))
        work = self._forward(fitted * 2 + judging, shape.layers)
        through = Work()  # groups run through the layers above them: half of them on average
        through += self._forward(measured * judging_groups, shape.layers // 2)
        through += self._forward(trials * (fitted + judging), shape.layers * 2 // 3)
        heads = self._head(measured * judging_groups // stride + trials * judging // stride)
        return Need(inside, lists, work + through + heads + _times(work_of_fit, measured + trials * self.groups))

    def _make(self) -> Need:
        shape, config = self.shape, self.config
        joined = 1 + math.ceil(self.fusions / self.groups)  # layers of a group, on average
        made = self.groups * shape.layer_bytes
        if config.averages:
            rows = shape.mlp if config.alignment != "none" else 0
            return Need(made + 12 * rows**2 + 12 * shape.hidden * rows, 0, self._average())
        if not config.fits:
            return Need(made, 0, Work())
        tokens, length = config.calibration_tokens, config.calibration_length
        inside, _ = self._fit(tokens, self.longest, rough=False)
        tuned = _TRAINED_BYTES * shape.layer + max(_STEP_TOKENS, length) * activation_bytes(shape)
        passes = max(1, min(_TUNED_PASSES, round(_TUNED_TOKENS / tokens)))
        work = self._forward(
            tokens, shape.layers
        )  # the dense stream up to the last group, and the other one from the first
        _, of_fit = self._fit(tokens, joined, rough=False)
        trained = Work(layer=5 * shape.layer * passes * tokens)  # some gradients of what it reads are not needed
        trained += Work(bytes=passes * tokens // _STEP_TOKENS * _STEP_BYTES * shape.layer)
        # Lists: before and between the halves of each layer, after them, and of the model as it becomes, twice.
        lists = self._states((2 * self.longest + 4) * tokens)
        return Need(
            self._running(length) + made + max(inside, tuned), lists, work + _times(of_fit + trained, self.groups)
        )

    def _average(self) -> Work:
        """Rows of all projections compared, and assigned: the solver's steps grow about as rows to the power 2.5."""
        shape = self.shape
        work = Work(bytes=self.fusions * shape.layer * 40)
        if self.config.alignment != "none":
            for rows in (shape.mlp, shape.mlp, shape.hidden, shape.queries, shape.keys, shape.keys, shape.hidden):
                work += Work(product=2 * rows * rows * shape.hidden, bytes=int(12 * rows**2.5))
        return _times(work, self.fusions)

    def _fit(self, tokens: int, joined: int, *, rough: bool) -> tuple[int, Work]:
        """Bytes, but for lists of states, and work of the fit of `joined` layers as one."""
        shape, batch = self.shape, self._batch(self.config.calibration_length)
        hidden, mlp, size = shape.hidden, shape.mlp, shape.size
        wide, heads = joined * mlp, joined * shape.queries
        compared = mlp if rough else min(wide, max(_CANDIDATES, int(_CANDIDATES_PER_KEPT * mlp)))
        # The maps, the wide half in its own numbers and a reader in float32; then the channels that are compared.
        widened = joined * (4 * hidden**2 + 3 * hidden * mlp * size) + 8 * hidden * mlp
        chosen = 3 * hidden * (wide + compared) * size
        solving = self._solving(compared, mlp)
        if shape.has_norm_after:  # the second problem beside the first one
            solving += 4 * (mlp**2 + hidden * mlp)
        channels = (
            batch * max(wide, compared) * (3 * size + 4)
        )  # of a batch: gate, up, their product, and it in float32
        inside = channels + max(widened, chosen + solving, self._solving(heads, shape.queries) + chosen)
        readers = 2 * mlp + shape.queries + 2 * shape.keys
        work = self._forward(tokens, joined)
        of_map = self._summed(tokens, hidden) + self._solved(hidden, hidden)
        work += _times(of_map + Work(product=2 * hidden**2 * readers // 2), 2 * joined)
        twice = 1 + shape.has_head_norms
        attention = Work(layer=2 * tokens * hidden * (shape.queries + 2 * shape.keys) * joined * twice)
        attention += self._summed(tokens, heads) + self._solved(heads, shape.queries)
        if compared < wide:
            work += Work(layer=4 * tokens * hidden * wide)
        work += Work(layer=4 * tokens * hidden * compared)
        work += attention + self._summed(tokens, compared) + self._solved(compared, mlp)
        if shape.has_norm_after:
            work += Work(layer=12 * tokens * hidden * (mlp + shape.queries))
            if not rough:
                work += self._summed(tokens, mlp) + self._solved(mlp, mlp)
        return inside, work

    def _solving(self, unknowns: int, kept: int) -> int:
        """Bytes of a least-squares problem: its sums, and what it is pruned and solved in."""
        exact = 8 if unknowns <= _EXACT else 4
        squares = 3 if self.on_card and kept < unknowns else 1  # an inverse on a card is made beside its factor
        return (4 + squares * exact) * unknowns**2 + (12 + 2 * exact) * unknowns * self.shape.hidden

    def _summed(self, tokens: int, unknowns: int) -> Work:
        """Half of a gram matrix, and what it is solved for."""
        return Work(product=tokens * unknowns * (unknowns + 2 * self.shape.hidden))

    def _solved(self, unknowns: int, kept: int) -> Work:
        """Pruning by an inverse, where there is any, and the solution of what is left."""
        work = Work()
        for size, steps in ((unknowns, kept < unknowns), (kept, 1)):
            rate = "solve" if size <= _EXACT else "product"
            flops = size**3 // 3 + 2 * size**2 * self.shape.hidden
            if size > kept:  # the inverse, and its updates
                flops += 2 * size**3 // 3 + 2 * (size**3 - kept**3) // 3
            work += Work({rate: flops * steps, "product": 2 * size**2 * self.shape.hidden * steps})
        return work


def _times(work: Work, count: float) -> Work:
    return Work({name: int(amount * count) for name, amount in work.items()})


def activation_bytes(shape: Shape) -> int:
    """Bytes that a layer keeps of a token for its gradient under autocast, by what torch saves.

    Each norm: what it reads and what it gives in float32, and a bfloat16 copy. Attention: queries, keys and values in
    front of rotary embeddings and behind them, keys for all queries, and their norms. The MLP: gate, up, the activation
    and their product.
    """
    norms = 4 if shape.has_norm_after else 2
    of_heads = 8 * (shape.queries + shape.keys) * shape.has_head_norms
    return 10 * norms * shape.hidden + 8 * (shape.queries + 2 * shape.keys) + of_heads + 8 * shape.mlp


class Training(Protocol):
    """What of a healing's settings counts here; `train` is None where the plan is to choose."""

    @property
    def tokens(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def batch_tokens(self) -> int: ...
    @property
    def lora_rank(self) -> int: ...
    @property
    def train(self) -> Any: ...


@dataclass(frozen=True)
class HealingPlan:
    """What trains, how many sequences at a time, and bytes: where it computes, and of states on the disk."""

    train: Train
    gradient_checkpointing: bool
    sequences: int
    why: str
    trained: int
    bytes: int
    disk: int
    work: Work


@dataclass(frozen=True)
class Plan:
    """Where everything lies, and what it takes.

    `peak` is by place, and `phases` by phase of the place that computes; `disk` is at most, while it runs. `minutes`
    are by phase, None for a device that is not here.
    """

    machine: Machine
    device_map: dict[str, str | int] | None  # for from_pretrained; None: whole on one device
    batch_bytes: int
    states: Literal["device", "host", "disk"]
    longest: int  # layers that may become one, where that is a choice
    healing: HealingPlan | None
    weights: dict[str, int]
    phases: dict[str, int]
    peak: dict[str, int]
    disk: int
    minutes: dict[str, float] | None

    @property
    def device(self) -> str:
        return self.machine.device

    def lines(self) -> list[str]:
        """All of it, for people."""
        where = ", ".join(f"{in_gib(size)} on {place}" for place, size in self.weights.items() if size)
        states = {"device": f"on {self.device}", "host": "in memory", "disk": "on disk"}[self.states]
        lines = [f"weights: {where}; hidden states {states}; at most {self.longest} layers become one"]
        if self.healing is not None:
            lines.append(f"training: {self.healing.why}")
        peak = ", ".join(
            f"{in_gib(size)} of {in_gib(self.machine.free.get(place, 0))} on {place}"
            for place, size in self.peak.items()
        )
        lines += [f"peak memory, about: {peak}", f"disk, while it runs, at most about: {in_gib(self.disk)}"]
        if self.minutes is None:
            return [*lines, "minutes unknown: that device is not here"]
        of_phases = ", ".join(f"{name} {minutes:.1f}" for name, minutes in self.minutes.items())
        return [*lines, f"minutes, about: {of_phases}; in all {sum(self.minutes.values()):.1f}"]


def plan(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    fusion: FusionConfig,
    machine: Machine,
    *,
    healing: Training | None = None,
    device_map: dict[str, str | int] | None = None,
    low_memory: bool = False,
    rates: Rates | None = None,
) -> Plan:
    """Decide what lies where, and what trains, from a base's config and what a machine has.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the base.
    dtype : torch.dtype
        Of its weights.
    fusion : FusionConfig
    machine : Machine
    healing : Training, optional
        Settings of the healing that follows.
    device_map : dict, optional
        Where a user wants the weights.
    low_memory : bool
        All weights on the disk, and few states in memory.
    rates : mapping, optional
        What `probe` measured; without it there are no minutes.

    Raises
    ------
    NoRoom
        If nothing that the settings allow fits.
    """
    with torch.device("meta"):
        model = model_class(config)(config)
    shape, device = Shape.of(model, dtype.itemsize), machine.device
    batch_bytes = CPU_BATCH
    if machine.has_card:
        batch_bytes = min(max(CPU_BATCH, machine.free[device] // _BATCH_SHARE), LARGEST_BATCH)
    heal_tokens = healing.tokens if healing else 0
    phases_of = partial(_Fusion, shape, fusion, batch_bytes, machine.has_card, heal_tokens)
    own, free = machine.own_bytes(shape.vocab), machine.free[device]
    longest, phases = _longest_that_fits(phases_of, fusion, free - own)
    states = _place_of_states(phases, machine, free - own, low_memory=low_memory)
    room = own + phases.most(states)
    if low_memory:
        device_map = {"": "disk"}
    elif device_map is None and shape.bytes + room > free:
        in_memory = phases.lists * (states == "host")
        device_map = _placed(model, dtype, machine, room + phases.passing, in_memory)
    weights = _weights_by_place(model, dtype, device_map or {"": device})
    phases = phases_of(longest, few_reads="disk" in weights)
    passing = phases.passing * (weights.keys() != {device})
    beside = own + weights.get(device, 0) + passing
    by_phase = {name: beside + need.inside + need.lists * (states == "device") for name, need in phases.needs.items()}
    steps = None
    if healing is not None:
        steps = plan_healing(shape, fusion, machine, healing)
        by_phase["heal"] = steps.bytes
    peak = {device: max(by_phase.values())}
    if machine.has_card:
        peak["cpu"] = _PYTHON + CONTEXT + weights.get("cpu", 0) + phases.lists * (states == "host")
    made = (shape.total - fused_layers(fusion) * shape.layer) * shape.size
    training = shape.hidden * 2 * heal_tokens + steps.disk if steps else 0  # the base's final states, and the Trainer's
    disk = made + max(phases.lists * (states == "disk"), training) + weights.get("disk", 0)
    minutes = None
    if rates is not None:
        work = {name: need.work for name, need in phases.needs.items()}
        if steps is not None:
            work |= {"heal": steps.work, "judge": _times(work.pop("judge"), 2)}
        minutes = {name: sum(amount / rates[rate] for rate, amount in of.items()) / 60 for name, of in work.items()}
    return Plan(machine, device_map, batch_bytes, states, longest, steps, weights, by_phase, peak, disk, minutes)


def fused_layers(fusion: FusionConfig) -> int:
    """How many layers go, and at most so many are fused; where a budget says how many, one at least."""
    return fusion.num_fusions or 1


def _longest_that_fits(phases_of: Callable[..., _Fusion], fusion: FusionConfig, free: int) -> tuple[int, _Fusion]:
    """How many layers may become one, where long groups are a choice: as many as fit, with what else lies elsewhere."""
    longest = fused_layers(fusion) + 1
    if fusion.selection == "groups":
        longest = min(longest, LONGEST_GROUP)
    phases = phases_of(longest, few_reads=False)
    least = 2 if fusion.selection == "groups" else longest
    while longest > least and phases.most("elsewhere") + min(phases.passing, phases.shape.bytes) > free:
        longest -= 1
        phases = phases_of(longest, few_reads=False)
    return longest, phases


def _place_of_states(
    phases: _Fusion, machine: Machine, free: int, *, low_memory: bool
) -> Literal["device", "host", "disk"]:
    """Where lists of states rest: where layers compute, if they fit beside all weights, else as near as they fit."""
    if low_memory and not machine.has_card:
        return "device" if phases.lists <= _LOW_MEMORY_STATES else "disk"
    if phases.most("device") + (phases.passing if low_memory else phases.shape.bytes) <= free:
        return "device"
    if machine.has_card and phases.lists <= machine.free.get("cpu", 0) // 2:  # the rest is for layers
        return "host"
    return "disk"


def _placed(model: Any, dtype: torch.dtype, machine: Machine, room: int, in_memory: int) -> dict[str, str | int]:
    """Where accelerate puts layers, if `room` stays free where they compute, and beside a card so much `in_memory`.

    Raises NoRoom if there is no such room.
    """
    device = machine.device
    if room > machine.free[device]:
        raise NoRoom("fusing, with all weights elsewhere,", machine, room, "fewer calibration_tokens")
    most: dict[str | int, int] = {}
    for place, size in machine.free.items():
        if place != "disk":
            index = torch.device(place).index
            kept = _PYTHON + CONTEXT + in_memory if place == "cpu" != device else room
            most[place if index is None else index] = max(0, size - kept)
    if not machine.is_here:  # accelerate warns of devices that it does not find
        logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)
    layer = family_of(model.config).decoder_layer.__name__
    return dict(infer_auto_device_map(model, most, no_split_module_classes=[layer], dtype=dtype))


def _weights_by_place(model: Any, dtype: torch.dtype, device_map: Mapping[str, str | int]) -> dict[str, int]:
    """Bytes of parameters, tied ones once, by the place that a device map gives them."""
    weights: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        module = max((key for key in device_map if not key or f"{name}.".startswith(f"{key}.")), key=len)
        place = device_map[module]
        weights[f"cuda:{place}" if isinstance(place, int) else str(place)] += parameter.numel() * dtype.itemsize
    return dict(weights)


def plan_healing(shape: Shape, fusion: FusionConfig, machine: Machine, healing: Training) -> HealingPlan:
    """What trains: the first rung of a ladder that fits, with as many sequences at a time as fit.

    All layers, the fused ones, or adapters, each without and with checkpoints of gradients. The fused model stays where
    it trains, and what is not trained is its own. Raises NoRoom where no rung fits.
    """
    layers = shape.layers - fused_layers(fusion)
    own, free = machine.own_bytes(shape.vocab), machine.free[machine.device]
    trained_by: dict[Train, int] = {
        "layers": layers * shape.layer,
        "fused": fused_layers(fusion) * shape.layer,
        "lora": layers * shape.adapters * healing.lora_rank,
        "all": shape.total - fused_layers(fusion) * shape.layer,
    }
    ladder: list[Train] = [healing.train] if healing.train else ["layers", "fused", "lora"]
    batch = max(1, healing.batch_tokens // healing.length)
    divisors = [number for number in range(batch, 0, -1) if batch % number == 0]
    least: dict[Train, int] = {}  # of what did not fit
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
        return HealingPlan(train, checkpoints, sequences, why, trained, takes, disk, work)
    what = f"healing with train={ladder[-1]!r} and gradient checkpointing"
    raise NoRoom(what, machine, least[ladder[-1]], "method='refit'")


def _healing_bytes(shape: Shape, machine: Machine, layers: int, trained: int, tokens: int, *, checkpoints: bool) -> int:
    """Bytes of a training, of so many tokens at a time."""
    size = 2 if machine.bfloat16 else 4
    model = shape.total - (shape.layers - layers) * shape.layer
    fixed = model * shape.size + (_TRAINED_BYTES if machine.bfloat16 else 16) * trained
    if size != shape.size:  # copies of what is not trained, in the type that training computes in
        fixed += max(0, model - trained) * size
    # What a layer keeps; with checkpoints that of one layer, and the stream in front of each.
    a_token = activation_bytes(shape) * size // 2 * (1 if checkpoints else layers)
    a_token += 4 * shape.hidden * layers * checkpoints
    # Both models' slices of logits, and softmaxes of a few of them in float32.
    logits = tokens * shape.vocab
    floats = _HEAL_FLOATS if machine.has_card else _HEAL_FLOATS_ON_CPU
    return fixed + tokens * a_token + 2 * size * min(logits, _HEAL_LOGITS) + 24 * min(logits, floats)


def _healing_work(shape: Shape, layers: int, trained: int, healing: Training, *, checkpoints: bool) -> Work:
    """Steps, and looks at held-out text: forward, gradients of states and of what trains, and both models' heads."""
    tokens = healing.tokens
    weight_gradients = 2 * min(trained, layers * shape.layer)
    a_token = (4 + 2 * checkpoints) * layers * shape.layer + weight_gradients
    steps = max(1, tokens // healing.batch_tokens)
    seen = _EVALUATIONS * _HELD_OUT
    work = Work(layer=tokens * a_token, head=tokens * 6 * shape.head, logits=3 * tokens * shape.vocab)
    work += Work(layer=seen * 2 * layers * shape.layer, head=seen * 4 * shape.head, logits=2 * seen * shape.vocab)
    return work + Work(bytes=steps * _STEP_BYTES * trained)


_PROBED_SECONDS = 0.15  # of each rate, about: in all two seconds at most, with what is too short to count


def probe(
    device: torch.device, dtype: torch.dtype, config: PreTrainedConfig, clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """Operations a second on a device, by the names of `Work`, in two seconds at most.

    `clock` gives seconds; those of the process, where others share the machine.
    """
    layer, run_layer = _one_layer(config, device, dtype)

    def seconds(run: Callable[[int], Any], size: int) -> float:
        start = clock()
        result = run(size)
        torch.as_tensor(result).flatten()[:1].float().cpu()  # waits for the device
        return clock() - start

    def rate(run: Callable[[int], Any], operations: Callable[[int], float], size: int, most: int) -> float:
        seconds(run, size)  # what a first run prepares
        while (taken := seconds(run, size)) < _PROBED_SECONDS / 2 and size < most:
            size *= 2
        return operations(size) / min(taken, seconds(run, size))

    def square(size: int, kind: torch.dtype) -> torch.Tensor:
        return torch.eye(size, dtype=kind, device=device).add_(1 / size)

    def multiply(size: int) -> torch.Tensor:
        with bfloat16_products(dtype == torch.bfloat16):
            return square(size, torch.float32) @ square(size, torch.float32)

    def solve(size: int) -> torch.Tensor:
        factor = torch.linalg.cholesky(square(size, torch.float64))
        return torch.linalg.solve_triangular(factor, factor, upper=False)

    text = config.get_text_config()
    weight = torch.full((text.vocab_size, text.hidden_size), 0.01, dtype=dtype, device=device)

    def head(rows: int) -> torch.Tensor:
        return torch.ones(rows, text.hidden_size, dtype=dtype, device=device) @ weight.T

    def logits(rows: int) -> torch.Tensor:
        return torch.ones(rows, text.vocab_size, device=device).log_softmax(-1)

    def copied(size: int) -> torch.Tensor:
        return torch.ones(size, device=device).clone()

    return {
        "layer": rate(run_layer, lambda tokens: 2 * layer * tokens, 16, 4096),
        "calls": 1 / min(seconds(run_layer, 1) for _ in range(3)),
        "head": rate(head, lambda rows: 2 * rows * weight.numel(), 8, 1024),
        "product": rate(multiply, lambda size: 2 * size**3, 256, 8192),
        "solve": rate(solve, lambda size: 4 / 3 * size**3, 256, 4096),
        "logits": rate(logits, lambda rows: rows * text.vocab_size, 1, 1024),
        "bytes": rate(copied, lambda size: 12 * size, 1 << 18, 1 << 28),
    }


def _one_layer(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> tuple[int, Callable[[int], torch.Tensor]]:
    """Parameters of a layer, and what runs it on so many tokens."""
    small: Any = copy.deepcopy(config.get_text_config())
    family = family_of(small)
    set_config_layers(small, [0])
    small.vocab_size, small.pad_token_id = 16, None
    with torch.device("meta"):
        body = text_model(family.causal_lm(small))
    body = body.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.fill_(1 / small.hidden_size)
    body.rotary_emb = family.rotary_embedding(config=small).to(device)

    @torch.no_grad()
    def run(tokens: int) -> torch.Tensor:
        ids = torch.ones(max(1, tokens // PERPLEXITY_LENGTH), min(tokens, PERPLEXITY_LENGTH), dtype=torch.long)
        states: torch.Tensor = body(input_ids=ids.to(device), use_cache=False).last_hidden_state
        return states

    return _count(body.layers), run
