"""A second device for machines that have none: tensors on "cuda:1" are in memory, but do not mix with others.

As torch, it refuses operations on tensors of two devices, and reading from memory what is not there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

CPU, OTHER = torch.device("cpu"), torch.device("cuda:1")


class TwoDevices(TorchFunctionMode):
    """In a `with` block, keeps book of which storage is on which device."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[int, torch.device] = {}
        self.moved = 0  # tensors that went to another device

    def place(self, tensor: torch.Tensor) -> torch.device:
        return self._places.get(tensor.untyped_storage().data_ptr(), CPU)

    def put(self, tensor: torch.Tensor, device: torch.device) -> None:
        self._places[tensor.untyped_storage().data_ptr()] = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = (resolve_name(func) or getattr(func, "__name__", "")).removeprefix("torch.")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name == "Tensor.device.__get__":
            return self.place(args[0])
        # Numbers mix with any tensor, and where an empty tensor is cannot be told.
        places = {
            self.place(tensor) for tensor in tensors if tensor.numel() and (tensor.dim() or self.place(tensor) != CPU)
        }
        if name in ("Tensor.numpy", "Tensor.__array__") and OTHER in places:
            raise TypeError("can't convert cuda:1 device type tensor to numpy")
        asked = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, (torch.device, str))]
        target = torch.device(asked[0]) if name in ("Tensor.to", "Tensor.cpu") and asked else None
        if name == "Tensor.cpu":
            target = CPU
        elif name == "Tensor.to" and len(tensors) == 2:
            target = self.place(tensors[1])
        elif kwargs.get("device") is not None:
            target = torch.device(kwargs["device"])
        if name in ("Tensor.to", "Tensor.cpu", "Tensor.copy_"):
            places = {self.place(args[0])}
        elif name == "Tensor.__getitem__":  # memory indices are taken by any device
            places = {self.place(args[0])} | {place for place in places if place != CPU}
        if len(places) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got two.")
        source = places.pop() if places else CPU
        to_cpu = lambda leaf: CPU if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf  # noqa: E731
        result = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        place = source if target is None or target.type == "meta" else target
        if name in ("Tensor.to", "Tensor.cpu") and place != source:
            self.moved += 1
            result = result.clone()
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.numel()
                and leaf.device.type == "cpu"
                and (name.endswith("__") or not name.endswith("_"))
            ):
                self.put(leaf, place)
        return result


def spread(model: nn.Module, first: int, devices: TwoDevices) -> None:
    """Put layers from `first` on, norm, rotary embedding and head on the second device; hooks move what each reads."""
    for name, module in model.named_modules():
        number = name.removeprefix("model.layers.").split(".")[0]
        other = int(number) >= first if number.isdigit() else name in ("model.norm", "model.rotary_emb", "lm_head")
        device = OTHER if other else CPU
        tensors = [*module.parameters(), *module.buffers()]
        if name in ("", "model") or name == "model.layers" or not tensors:
            continue
        for tensor in tensors:
            devices.put(tensor, device)

        def move(_: nn.Module, args: Any, kwargs: Any, device: torch.device = device) -> Any:
            return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))

        module.register_forward_pre_hook(move, with_kwargs=True)
