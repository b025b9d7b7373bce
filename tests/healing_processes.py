"""One of several processes that heal a model together; run by healing/test_heal.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import lf_hf


def main(file: Path) -> None:
    lf_hf.heal(**json.loads(file.read_text(encoding="utf-8")))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
