"""How fast a fused model is beside its base: tokens a second, and bytes of weights and of cache.

A layer's time depends on its kind and shape and not on its weights, so the fused model stands in for the base, with as
many layers of each kind as the base has: some occur twice, sharing their weights. Both models run in turns, so that
other load on the machine affects both.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from lf_hf.decoder.placement import is_offloaded, sharing_copy
from lf_hf.families.models import CausalLM, family_of, set_config_layers, text_model
from lf_hf.report.data import Rate, SpeedInfo
from lf_hf.report.report import FusionReport
from lf_hf.runtime.errors import reason
from lf_hf.runtime.words import plural

logger = logging.get_logger(__name__)
SECONDS = 4.0
"""For warming up, and again for all rounds, about: a slow machine makes one run and two rounds of the least size."""
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 9
_LEAST_PREFILLED, _MOST_PREFILLED, _MOST_DECODED = 16, 512, 32  # tokens
_PARTS = 12  # of the time: prefill and decoding by two models, in three rounds


def with_speed(report: FusionReport, model: CausalLM, base: PreTrainedConfig) -> FusionReport:
    """A fused model's report with its speed, unless that is there or not wanted, or weights are offloaded.

    The model is in evaluation mode afterwards.
    """
    if report.speed is not None or not report.config.get("speed", True):
        return report
    if is_offloaded(model):
        logger.warning_once("Speed is not measured where weights are offloaded.")
        return report
    try:
        speed = measure_speed(model.eval(), base)
    except Exception as error:  # of any kind, such as a device without room: what was made before must not be lost
        logger.warning(f"Speed was not measured ({reason(error)}).")
        return report
    return dataclasses.replace(report, speed=speed)


@torch.no_grad()
def measure_speed(model: CausalLM, base: PreTrainedConfig) -> SpeedInfo:
    """Speed of a fused model and of its base, for one sequence at a time.

    After warming up, both run in turns as often as `SECONDS` allow: twice at least.
    """
    fused_body = text_model(model)
    base_body = _with_layers_of(base, fused_body)
    longest = max(1, min(_MOST_PREFILLED, fused_body.config.max_position_embeddings - _MOST_DECODED))
    prefilled, decoded = min(longest, _LEAST_PREFILLED), 1
    start = time.perf_counter()
    for body in (fused_body, base_body, base_body):
        run = _run(model, body, prefilled, decoded)
        if time.perf_counter() - start > SECONDS:  # so slow that a first run's own costs do not count
            break
    prefilled = min(longest, max(prefilled, int(SECONDS / _PARTS / run.prefill)))
    decoded = min(_MOST_DECODED, max(decoded, int(SECONDS / _PARTS / run.decoding)))
    dense: list[Run] = []
    fused: list[Run] = []
    start = time.perf_counter()
    while len(dense) < _LEAST_ROUNDS or (len(dense) < _MOST_ROUNDS and time.perf_counter() - start <= SECONDS):
        dense.append(_run(model, base_body, prefilled, decoded))
        fused.append(_run(model, fused_body, prefilled, decoded))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    removed = base_body.layers[len(fused_body.layers) :]
    more = sum(parameter.nbytes for layer in removed for parameter in layer.parameters())
    return SpeedInfo(
        device=_device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        prefill_tokens=prefilled,
        decoded_tokens=decoded,
        prefill=_rate(dense, fused, "prefill"),
        decoding=_rate(dense, fused, "decoding"),
        weight_bytes=[weights + more, weights],
        cache_bytes=[dense[0].cache_bytes, fused[0].cache_bytes],
        runs=len(dense),
    )


class Run(NamedTuple):
    """One run of a model: seconds a token of prefill and of decoding, and bytes of cache a token."""

    prefill: float
    decoding: float
    cache_bytes: int


def _run(model: CausalLM, body: Any, prefilled: int, decoded: int) -> Run:
    """Run `body`, a model without its head, with the head of `model`."""
    cache: Any = DynamicCache(config=body.config)
    arguments = {family_of(body.config).cache_argument: cache, "use_cache": True}

    def next_token(ids: Tensor) -> Tensor:
        states = body(input_ids=ids, **arguments).last_hidden_state
        return model.lm_head(states[:, -1:]).argmax(-1)

    token = torch.arange(prefilled, device=body.embed_tokens.weight.device)[None] % body.config.vocab_size
    start = time.perf_counter()
    token = next_token(token)
    token.item()  # waits for the device
    between = time.perf_counter()
    # Layers without attention keep a state that does not grow.
    of_tokens: list[Any] = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in of_tokens)
    for _ in range(decoded):
        token = next_token(token)
    token.item()
    end = time.perf_counter()
    return Run((between - start) / prefilled, (end - between) / decoded, cache_bytes // prefilled)


def _with_layers_of(base: PreTrainedConfig, body: Any) -> Any:
    """A model without its head that has as many layers of each kind as its base.

    Those that it lacks are its own first ones of that kind, which come again at the end with the same weights.
    """
    longer, family = sharing_copy(body), family_of(body.config)
    kinds = family.config_kinds(body.config)
    missing = family.config_kinds(base.get_text_config())
    for kind in kinds:
        missing.remove(kind)
    again: list[int] = []
    for kind in missing:
        alike = [number for number, other in enumerate(kinds) if other == kind] or range(len(kinds))
        again.append(alike[len(again) % len(alike)])
        layer = sharing_copy(longer.layers[again[-1]])
        family.mixer_module(layer).layer_idx = len(longer.layers)
        longer.layers.append(layer)
    set_config_layers(longer.config, [*range(len(kinds)), *again])
    return longer


def _rate(dense: list[Run], fused: list[Run], name: str) -> Rate:
    """From the seconds a token of both models in each round."""
    base, other = ([getattr(run, name) for run in runs] for runs in (dense, fused))
    ratios = [base_seconds / fused_seconds for base_seconds, fused_seconds in zip(base, other, strict=True)]
    base_rate, fused_rate = 1 / statistics.median(base), 1 / statistics.median(other)
    return Rate(base_rate, fused_rate, statistics.median(ratios), min(ratios), max(ratios))


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu, {threads} {plural(threads, 'thread')}"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
