"""How fast a fused model is beside its base: tokens a second, and bytes of weights and of cache.

The time of a layer depends on its shape and not on what its weights are, so the base is run as the fused model with as
many layers as the base has: some of them twice, with the same weights in memory. Both are run in turns, so that what
else the machine does falls on both.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.utils import logging

from lf_hf.decoder.in_memory import sharing_copy
from lf_hf.decoder.interface import set_config_layers
from lf_hf.families import CausalLM, family_of
from lf_hf.report.records import Rate, SpeedInfo
from lf_hf.report.report import FusionReport
from lf_hf.runtime.errors import reason
from lf_hf.runtime.fields import plural
from lf_hf.runtime.launch import Processes

logger = logging.get_logger(__name__)
SECONDS = 4.0
"""For warming up, and again for all rounds, about: a slow machine makes one run and two rounds of the least size."""
_ROUNDS = (2, 9)  # at least, and at most
_PREFILL, _DECODED = (16, 512), (1, 32)  # tokens, at least and at most


def with_speed(report: FusionReport, model: CausalLM) -> FusionReport:
    """A fused model's report with its speed, unless that is there or not wanted, or several processes work together.

    The model is in evaluation mode afterwards.
    """
    if report.speed is not None or not report.config.get("speed", True):
        return report
    processes = Processes.of_launch()
    if processes.world_size > 1:
        if processes.is_main:
            logger.warning_once("Speed is not measured where several processes work together.")
        return report
    try:
        return dataclasses.replace(report, speed=measure_speed(model.eval(), report.layers_before))
    except Exception as error:  # of any kind, such as a device without room: what was made before must not be lost
        logger.warning(f"Speed was not measured ({reason(error)}).")
        return report


@torch.no_grad()
def measure_speed(model: CausalLM, num_base_layers: int) -> SpeedInfo:
    """Speed of a fused model and of its base of `num_base_layers` layers, for one sequence at a time.

    After warming up, both run in turns as often as `SECONDS` allow: twice at least.
    """
    fused, head = model.model, model.lm_head
    base = _with_layers(fused, num_base_layers)
    length = max(1, min(_PREFILL[1], model.config.max_position_embeddings - _DECODED[1]))
    ids = torch.arange(length, device=fused.embed_tokens.weight.device)[None] % model.config.vocab_size
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    cache_argument = family_of(model.config).cache_argument

    def now() -> float:
        for device in devices:  # whose work is to be done
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def run(body: Any, prefilled: int, decoded: int) -> tuple[float, float, int]:
        """Seconds a token of both, and bytes of cache a token."""
        cache: Any = DynamicCache(config=body.config)
        start, given = now(), {cache_argument: cache, "use_cache": True}
        token = head(body(input_ids=ids[:, :prefilled], **given).last_hidden_state[:, -1:]).argmax(-1)
        between, cache_bytes = now(), sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        for _ in range(decoded):
            token = head(body(input_ids=token, **given).last_hidden_state).argmax(-1)
        return (between - start) / prefilled, (now() - between) / decoded, cache_bytes // prefilled

    prefilled, decoded, start = min(length, _PREFILL[0]), _DECODED[0], now()
    for body in (fused, base, base):
        a_token = run(body, prefilled, decoded)
        if now() - start > SECONDS:  # so slow that a first run's own costs do not count
            break
    share = SECONDS / 12  # seconds of each of the four parts of a round, of three rounds
    prefilled = min(length, max(prefilled, int(share / a_token[0])))
    decoded = min(_DECODED[1], max(decoded, int(share / a_token[1])))
    rounds, start = list[tuple[Any, Any]](), now()
    while len(rounds) < _ROUNDS[0] or (len(rounds) < _ROUNDS[1] and now() - start < SECONDS):
        rounds.append((run(base, prefilled, decoded), run(fused, prefilled, decoded)))
    prefill, decoding = (_rate([(base[part], fused[part]) for base, fused in rounds]) for part in (0, 1))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    more = sum(parameter.nbytes for layer in base.layers[len(fused.layers) :] for parameter in layer.parameters())
    return SpeedInfo(
        device=_device_name(ids.device),
        dtype=str(model.dtype).removeprefix("torch."),
        prefill_tokens=prefilled,
        decoded_tokens=decoded,
        prefill=prefill,
        decoding=decoding,
        weight_bytes=[weights + more, weights],
        cache_bytes=[cache_bytes for *_, cache_bytes in rounds[0]],
        runs=len(rounds),
    )


def _with_layers(body: Any, count: int) -> Any:
    """A model without its head that has `count` layers: the first ones come again at the end, with the same weights."""
    longer = sharing_copy(body)
    left = len(longer.layers)
    again = [number % left for number in range(count - left)]
    for number in again:
        layer = sharing_copy(longer.layers[number])
        layer.self_attn.layer_idx = len(longer.layers)
        longer.layers.append(layer)
    set_config_layers(longer.config, [*range(left), *again])
    return longer


def _rate(seconds: Sequence[tuple[float, float]]) -> Rate:
    """From seconds a token of base and fused model in each round."""
    of_base, of_fused = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratios = [a / b for a, b in seconds]
    return Rate(1 / of_base, 1 / of_fused, statistics.median(ratios), min(ratios), max(ratios))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} {plural(threads, 'thread')}" if device.type == "cpu" else device.type
