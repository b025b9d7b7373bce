"""Where the weights of a model lie: in modules, or offloaded, where accelerate's hooks find them.

accelerate leaves a parameter on the meta device, and its value in the hook's `weights_map`: in memory or on disk.
"""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, offload_state_dict
from torch import Tensor, nn
from transformers.integrations.accelerate import load_offloaded_parameter

from lf_hf.runtime.memory import give_back_freed

M = TypeVar("M", bound=nn.Module)


def mend_offloading(model: Any) -> None:
    """Make right, after a model was loaded, what accelerate and transformers do not with offloaded weights.

    They are read into memory, from where torch copies them to the device in the current stream: safetensors would do so
    outside of it. And what the config ties and the files hold twice is tied where it is equal, and else is not, as
    transformers does with other weights.
    """
    if is_offloaded(model):
        give_back_freed(from_now_on=True)
    for part in model.modules():
        if (hook := _offloading(part)) is not None and isinstance(hook.weights_map.dataset, OffloadedWeightsLoader):
            hook.weights_map.dataset.device = None
    for name, source in [*model.all_tied_weights_keys.items()]:
        weight, tied_to = model.get_parameter(name), model.get_parameter(source)
        if weight is tied_to or not (weight.is_meta and tied_to.is_meta):
            continue
        if torch.equal(*(load_offloaded_parameter(model, each) for each in (name, source))):
            place, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(place), own_name, tied_to)
        else:
            del model.all_tied_weights_keys[name]


def is_offloaded(module: nn.Module) -> bool:
    """Whether some of a module's parameters are not in it."""
    return any(parameter.is_meta for parameter in module.parameters())


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes."""
    for part in module.modules():
        if (hook := _offloading(part)) is not None:
            return torch.device(hook.execution_device)  # also of a number, or a name
    return next(module.parameters()).device


def value(module: nn.Module, name: str) -> Tensor:
    """The value of one of a module's own parameters, where the module computes."""
    parameter, hook = module.get_parameter(name), _offloading(module)
    if hook is None or not parameter.is_meta:
        return parameter
    return hook.weights_map[name].to(hook.execution_device, parameter.dtype)


def named_values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The values of all parameters in a module, also of offloaded ones, one at a time; tied ones once.

    Buffers that files have, too, come after them.
    """
    for name, _ in distinct_parameters(module):
        place, _, own_name = name.rpartition(".")
        yield name, value(module.get_submodule(place), own_name)
    saved = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in saved)


def distinct_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters in a module, tied ones once; those that are offloaded have no values."""
    tied = getattr(module, "all_tied_weights_keys", {})
    for name, parameter in module.named_parameters():
        if not (parameter.is_meta and name in tied):  # accelerate makes a parameter anew when it has computed with it
            yield name, parameter


def bring_in(module: nn.Module) -> None:
    """Let an offloaded module have its values again."""
    values = dict(named_values(module))
    for part in module.modules():
        if _offloading(part) is not None:
            remove_hook_from_module(part)
    module.load_state_dict(values, assign=True)


def offload(module: nn.Module, device: torch.device, scratch: Path | None, **hooks: Any) -> None:
    """Offload a module that computes on a device: to a new folder in `scratch`, which goes with the last copy of the
    module, or without `scratch` to memory.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    if scratch is None:
        weights = OffloadedWeightsLoader(state_dict=tensors)
    else:
        folder = mkdtemp(dir=scratch)
        offload_state_dict(folder, tensors)
        weights = OffloadedWeightsLoader(save_folder=folder)
        weakref.finalize(weights, shutil.rmtree, folder, ignore_errors=True)
    attach_align_device_hook(module, device, offload=True, weights_map=weights, **hooks)


def sharing_copy(module: M) -> M:
    """A copy of a module, with its hooks, that has the same parameters and buffers, wherever they lie."""
    maps = [getattr(part._hf_hook, "weights_map", None) for part in module.modules() if hasattr(part, "_hf_hook")]
    shared = {id(held): held for held in (*module.parameters(), *module.buffers(), *maps)}
    return copy.deepcopy(module, shared)


def _offloading(module: nn.Module) -> Any:
    """The hook by which a module's own parameters are offloaded, if they are."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None
