"""Stand-in cards: real "cuda" tensors where there is no GPU, with the CPU's values; stand_in.cpp holds the kernels.

`insert` puts the cards into this process for good, so only programs of their own do. Then operations that mix devices
raise as on a card, memory that was never written holds large numbers, and a copy to pinned memory holds NaN until it is
waited for. The module counts bytes, waits of the host, and weights that are read back. It knows nothing of time, TF32,
fragmentation, what libraries of a card take for themselves, temporaries inside one operation, and races of streams.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from filelock import FileLock
from torch.torch_version import TorchVersion

SOURCE = Path(__file__).parent / "stand_in.cpp"
CACHE = Path(__file__).parents[2] / ".cache" / "card"
WATCHED = "/lf_hf/"
"""In the paths of files whose lines are named."""

NAME = "stand-in card"
OLDEST = "2.13"


def why_not() -> str | None:
    """Why there can be no stand-in card here, or None."""
    if TorchVersion(torch.__version__) < OLDEST:
        return f"the stand-in card was tried with torch {OLDEST} and newer, as torch's interface for kernels changes"
    if torch.version.cuda or torch.version.hip:
        return "this torch has kernels for real cards"
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        return "the stand-in card needs g++ on Linux"
    return None


def build() -> Path:
    """The compiled kernels, made once for each version of them and of torch, by whichever process comes first."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = CACHE / f"{key}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.is_file():
            root = Path(torch.__file__).parent
            flags = ["-std=c++20", "-O1", "-g0", "-shared", "-fPIC", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"]
            places = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include", f"-L{root}/lib"]
            part = library.with_suffix(".part")
            subprocess.run(["g++", str(SOURCE), *places, *flags, "-o", str(part)], check=True)
            part.rename(library)
    return library


@dataclass
class Seen:
    """What happened on the cards inside a `Cards.watch` block."""

    waits: Counter[str] = field(default_factory=Counter)
    """How often the host waited for a card, by the line that made it wait."""

    weights_read: Counter[str] = field(default_factory=Counter)
    """How often a whole weight was copied to the host other than to be saved, by line."""

    peak: int = 0
    """Most bytes in use on one card."""


class Cards:
    """The cards of this process, as `insert` makes them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.count = library, 1
        self._seen: list[Seen] = []
        # Kept, as the library holds nothing of it but its address.
        self._listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._count_event)
        library.card_listen(self._listener)

    @property
    def waits(self) -> int:
        """How often the host waited since the innermost `watch` block began."""
        return self._seen[-1].waits.total()

    def live(self, number: int = -1) -> int:
        """Bytes in use on a card; on the current one by default."""
        return int(self.library.card_live(number))

    def capacity(self, number: int = -1) -> int:
        return int(self.library.card_capacity(number))

    def set_capacity(self, size: int) -> None:
        """Bytes of each card. What needs more raises torch.OutOfMemoryError."""
        self.library.card_set_capacity(ctypes.c_int64(size))

    def mark_weights(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count matrices among these tensors as weights, where they are on a card, and what is made of each value."""
        for tensor in tensors:
            if tensor.is_cuda and tensor.dim() > 1:
                self.library.card_mark_weight(ctypes.c_void_p(tensor.untyped_storage().data_ptr()))

    @contextmanager
    def watch(self) -> Iterator[Seen]:
        """Keep book of a block."""
        self.library.card_reset_peak()
        self._seen.append(Seen())
        try:
            yield self._seen[-1]
        finally:
            self._seen.pop().peak = int(self.library.card_peak())

    def _count_event(self, event: bytes) -> None:
        """Count an event at the innermost line of lf_hf, or at that of another program where none runs."""
        kind, line, is_saving = event.decode(), "", False
        for caller in _callers(sys._getframe().f_back):
            name = _watched_name(caller.f_code.co_filename)
            line = line or (name and f"{name}:{caller.f_lineno}")
            is_saving |= caller.f_code.co_name.lstrip("_").startswith("save")
        line = line or "outside lf_hf"
        for seen in self._seen:
            if kind.startswith("wait"):
                seen.waits[f"{line}, {kind.removeprefix('wait: ')}"] += 1
            elif not is_saving:
                seen.weights_read[line] += 1


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and all around it; threads of torch's own have none."""
    while frame is not None:
        yield frame
        frame = frame.f_back


@cache
def _watched_name(file: str) -> str:
    """The name of a file inside lf_hf; empty for others."""
    return file.rpartition(WATCHED)[2] if WATCHED in file else ""


class _Stream:
    """What torch.cuda.Stream, Event and device are to those that use them; there is one stream a card."""

    library: ClassVar[ctypes.CDLL]
    cuda_stream = 0

    def __init__(self, *given: Any, **_: Any) -> None:
        number = _number(*given)
        self.device = torch.device("cuda", self.library.card_current() if number < 0 else number)

    def __enter__(self) -> _Stream:
        self._before = int(self.library.card_current())
        self.library.card_use(self.device.index)
        return self

    def __exit__(self, *_: Any) -> None:
        self.library.card_use(self._before)

    def synchronize(self) -> None:
        self.library.card_wait()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def record(self, *_: Any) -> None: ...

    wait_stream = wait_event = wait = record_event = record


def _number(device: Any = None, *_: Any, **__: Any) -> int:
    """Number of the card that an argument of a function of torch.cuda names; -1 for the current one."""
    if isinstance(device, _Stream):
        return device.device.index
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return -1 if index is None else index


def insert(library: ctypes.CDLL) -> Cards:
    """Put cards into this process: torch finds one, and "cuda:1" is another one that works, too.

    `library` is what `build` made, loaded before torch, which asks once whether there are cards.
    """
    with suppress(ImportError):
        # Imported before there are cards, as what it takes from CUDA for a card is not here.
        importlib.import_module("bitsandbytes")
    for name in ("card_live", "card_capacity", "card_peak"):
        getattr(library, name).restype = ctypes.c_int64
    _Stream.library, cards = library, Cards(library)
    cards.set_capacity(80 << 30)

    def always(value: Any = None) -> Any:
        return lambda *_, **__: value

    def free_and_total(*given: Any) -> tuple[int, int]:
        number = _number(*given)
        size = cards.capacity(number)
        return size - cards.live(number), max(size, 1 << 31)  # transformers leaves 1.2 GiB of it alone

    def properties(*given: Any) -> SimpleNamespace:
        return SimpleNamespace(
            name=NAME, major=9, minor=0, multi_processor_count=1, total_memory=free_and_total(*given)[1]
        )

    functions: dict[str, Any] = {
        "is_available": always(True),
        "is_initialized": always(True),
        "is_bf16_supported": always(True),
        "is_current_stream_capturing": always(False),
        "device_count": lambda: cards.count,
        "current_device": lambda: library.card_current(),
        "set_device": lambda device: library.card_use(_number(device)),
        "get_device_name": always(NAME),
        "get_device_capability": always((9, 0)),
        "get_device_properties": properties,
        "mem_get_info": free_and_total,
        "memory_allocated": lambda *given: cards.live(_number(*given)),
        "memory_reserved": lambda *given: cards.live(_number(*given)),
        "max_memory_allocated": lambda *given: cards.live(_number(*given)),
        "max_memory_reserved": lambda *given: cards.live(_number(*given)),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "synchronize": lambda *_: library.card_wait(),
        **dict.fromkeys(("device", "stream", "current_stream", "default_stream", "Stream", "Event"), _Stream),
    }
    for name in (
        "_lazy_init init _lazy_call empty_cache ipc_collect manual_seed manual_seed_all seed seed_all set_rng_state "
        "set_rng_state_all set_stream reset_peak_memory_stats"
    ).split():
        functions[name] = always()
    for module in (torch.cuda, torch.cuda.memory, torch.cuda.random):
        for name, function in functions.items():
            if hasattr(module, name):
                setattr(module, name, function)
    of_accelerator = {"get_memory_info": free_and_total, "empty_cache": always()}
    of_accelerator |= {name: functions[name] for name in ("synchronize", "current_stream", "memory_allocated")}
    for name, function in of_accelerator.items():
        setattr(torch.accelerator, name, function)
    patch("torch.nn.functional.scaled_dot_product_attention", _attend).start()
    patch("torch.Tensor.record_stream", always()).start()
    return cards


_all_scores = torch.nn.functional.scaled_dot_product_attention


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As a card attends: without keeping scores, but for grouped heads in float32 or with a mask."""
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # which lowers what attention takes
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    grouped = query.shape[1] != key.shape[1] and (query.dtype == torch.float32 or attn_mask is not None)
    if not query.is_cuda or grouped:
        return _all_scores(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
