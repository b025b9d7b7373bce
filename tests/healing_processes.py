"""One of several processes that heal a model together; run by healing/test_heal.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import lf_hf
from lf_hf.healing import heal as module


def main(file: Path) -> None:
    vars(module)["JUDGING_TOKENS"] = 1024
    lf_hf.heal(**json.loads(file.read_text(encoding="utf-8")))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
