"""What a fusion was made of, by content: so that several runs share what one of them fused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.saving import changed_files, file_sha
from lf_hf.report.report import FusionReport
from lf_hf.settings import ALGORITHM, FusionConfig

_TOKENIZED_CHARACTERS = 1 << 16  # of calibration text, enough to tell tokenizers apart
_MEANING = {
    "base": "another base, or other files in its folder",
    "calibration": "other calibration text or another tokenizer",
    "dtype": "another dtype",
    "algorithm": "another version of lf_hf",
}


def fingerprints(base: Base, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] | None) -> dict[str, str]:
    """What a fusion, and the healing that may follow, is made of besides its FusionConfig: by content, not by name.

    `texts` are what the user gave to calibrate on; None stands for the default text, wherever it is from. Of them
    "calibration" is the SHA-256, with the tokens of their beginning and the chat template.
    """
    calibration = hashlib.sha256(str(tokenizer.chat_template).encode())
    if texts is None:  # which also depends on the tokenizer
        vocabulary = tokenizer.get_vocab()
        texts = [" ".join(sorted(vocabulary, key=vocabulary.__getitem__))]
    for text in texts:
        calibration.update(hashlib.sha256(text.encode()).digest())
        calibration.update(str(tokenizer(text[:_TOKENIZED_CHARACTERS], verbose=False)["input_ids"]).encode())
    return {
        "base": base_fingerprint(base),
        "calibration": calibration.hexdigest(),
        "dtype": str(base.dtype or base.config.dtype).removeprefix("torch."),
        "algorithm": str(ALGORITHM),
    }


def base_fingerprint(base: Base) -> str:
    """SHA-256 over the names and the SHA-256 of a base's weights, configs and tokenizer files.

    And over those arguments of loading that choose among files or change the config, where there are any.
    """
    files = base.content_files()
    with ThreadPoolExecutor() as pool:
        digests = [(file.name, digest) for file, digest in zip(files, pool.map(file_sha, files), strict=True)]
    content = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    changes = [name for name in base.loading if name == "variant" or hasattr(base.config, name)]
    chosen = {name: repr(base.loading[name]) for name in sorted(changes) if name != "dtype"}
    return hashlib.sha256(json.dumps([content, chosen]).encode()).hexdigest() if chosen else content


def why_not_reused(folder: Path, config: FusionConfig, made_of: dict[str, str]) -> str | None:
    """One sentence that says what keeps a saved fusion from being used; None where nothing does.

    Raises ValueError for a healed one that does not say what it was made of: training is not to be lost.
    """
    try:
        report = FusionReport.load(folder)
    except ValueError as error:
        return str(error)
    if not (folder / CONFIG_NAME).is_file():  # looked for after the report: a save under way puts it back last
        return f"{str(folder)!r} holds no complete checkpoint."
    if changed := changed_files(folder):
        return f"{', '.join(changed)} in {str(folder)!r} changed since it was fused."
    if report.fingerprints is None:
        if report.healed is not None:
            raise ValueError(
                f"{str(folder)!r} holds a healed model that does not say by content what it was made of; load it with "
                "from_pretrained, or choose another folder."
            )
        return f"{str(folder)!r} was saved without saying by content what it was made of."
    if differing := [_MEANING[name] for name, value in made_of.items() if report.fingerprints.get(name) != value]:
        return f"{str(folder)!r} was made with {' and '.join(differing)}."
    settings = [
        f"{name}={report.config.get(name)!r} instead of {value!r}"
        for name, value in config.to_dict().items()
        if name != "speed" and report.config.get(name) != value
    ]
    return f"{str(folder)!r} was fused with {', '.join(settings)}." if settings else None
