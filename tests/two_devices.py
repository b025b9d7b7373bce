"""A second device for machines that have none: tensors on "cuda:1" are in memory, but do not mix with others.

As torch, it refuses operations on tensors of two devices, and reading from memory what is not there. What is copied
without blocking on a stream of its own is NaN until that stream is synchronised.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

CPU, OTHER = torch.device("cpu"), torch.device("cuda:1")


class Stream:
    """What `torch.cuda.Stream` is to copies; `entered` has, for each thread, the one that it copies on."""

    entered = threading.local()

    def __init__(self, device: torch.device) -> None:
        assert device == OTHER
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._running = threading.Lock()  # two threads may copy on one stream

    @classmethod
    @contextmanager
    def of_thread(cls, stream: Stream) -> Iterator[None]:
        cls.entered.stream = stream
        yield
        cls.entered.stream = None

    @classmethod
    def current(cls, device: torch.device = OTHER) -> Stream | None:
        return getattr(cls.entered, "stream", None)

    def synchronize(self) -> None:
        with self._running, torch._C.DisableTorchFunction():
            while self.copies:
                target, source = self.copies.pop(0)
                target.copy_(source)


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()


class TwoDevices(TorchFunctionMode):
    """In a `with` block, keeps book of which storage is on which device, in this thread and in those that it starts."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[int, torch.device] = {}
        self._foreign: set[int] = set()  # storages that a stream copied to, and no other stream may use yet
        self._patches = ExitStack()

    def __enter__(self) -> TwoDevices:
        run = threading.Thread.run

        def run_inside(thread: threading.Thread) -> None:
            with self._mode():
                run(thread)

        self._patches.enter_context(patch("threading.Thread.run", run_inside))
        for name, stand_in in (
            ("cuda.Stream", Stream),
            ("cuda.stream", Stream.of_thread),
            ("cuda.current_stream", Stream.current),
            ("Tensor.record_stream", lambda tensor, _: self._foreign.discard(_storage(tensor))),
        ):
            self._patches.enter_context(patch(f"torch.{name}", stand_in))
        self._patches.enter_context(self._mode())
        return self

    def __exit__(self, *error: Any) -> None:
        self._patches.__exit__(*error)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def place(self, tensor: torch.Tensor) -> torch.device:
        if tensor.is_meta:
            return torch.device("meta")
        return self._places.get(_storage(tensor), CPU)

    def put(self, tensor: torch.Tensor, device: torch.device) -> None:
        self._places[_storage(tensor)] = device
        self._foreign.discard(_storage(tensor))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = (resolve_name(func) or getattr(func, "__name__", "")).removeprefix("torch.")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name == "_parse_to":  # the arguments of Module.to
            return func(*args, **kwargs)
        if name == "Tensor.device.__get__":
            return self.place(args[0])
        stream, storages = Stream.current(), set(map(_storage, tensors))
        if stream is None and storages & self._foreign:
            raise RuntimeError(f"{name} uses what another stream copied and may overwrite; record_stream comes first.")
        if name == "Tensor.copy_" and kwargs.pop("non_blocking", False) and stream is not None:
            args[0].fill_(torch.nan)  # before any thread can synchronise
            self._foreign.add(_storage(args[0]))
            stream.copies.append((args[0], args[1]))
            return args[0]
        kwargs.pop("pin_memory", None)
        # Numbers mix with any tensor, and where an empty tensor is cannot be told.
        places = {
            self.place(tensor) for tensor in tensors if tensor.numel() and (tensor.dim() or self.place(tensor) != CPU)
        }
        if name in ("Tensor.numpy", "Tensor.__array__") and OTHER in places:
            raise TypeError("can't convert cuda:1 device type tensor to numpy")
        asked = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, (torch.device, str))]
        target = CPU if name == "Tensor.cpu" else torch.device(asked[0]) if name == "Tensor.to" and asked else None
        if name == "Tensor.to" and len(tensors) == 2:
            target = self.place(tensors[1])
        elif kwargs.get("device") is not None:
            kwargs["device"] = target = torch.device(kwargs["device"])
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
            result = result.clone()
        made = name.endswith("__") or not name.endswith("_")
        for leaf in tree_leaves(result):
            if made and isinstance(leaf, torch.Tensor) and leaf.numel() and leaf.device.type == "cpu":
                self.put(leaf, place)
        return result
