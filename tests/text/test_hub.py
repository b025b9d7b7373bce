"""Text from the hub where none is given: the same each time, and ten seconds at most are lost where there is none."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pytest
from conftest import make_texts
from pyarrow import parquet

from lf_hf.text import hub
from lf_hf.text.calibration import (
    BUNDLED,
    DOCUMENTATION,
    HUB,
    QUESTIONS,
    load_calibration,
    load_corpus,
    load_training_text,
)
from lf_hf.text.mmlu import SUBJECTS


def table(**columns: object) -> bytes:
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content, row_group_size=300)
    return content.getvalue()


COUNT = 57 * 2
FILES = {
    hub.GENERAL.path: table(id=range(3000), text=[f"page {n} {text}" for n, text in enumerate(make_texts(3000))]),
    hub.MMLU.path: table(
        question=[f"asked {n}" for n in range(COUNT)],
        subject=[*SUBJECTS] * 2,
        choices=[["a", "b", "c", "d"]] * COUNT,
        answer=[1] * COUNT,
    ),
}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a server, for two files, or something else."""

    manner = "good"
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        body, status, file = b"<html>Please log in</html>", 200, FILES.get(self.path.split("/", 6)[-1], b"")
        if self.manner == "hangs":
            time.sleep(20)
        elif self.manner == "good" and file:
            first, last = (int(place) for place in self.headers["range"].removeprefix("bytes=").split("-"))
            body, status = file[first : last + 1], 206
        elif self.manner == "good":
            files = [{"type": "file", "path": path, "size": len(file), "oid": "0"} for path, file in FILES.items()]
            of_set = {"id": "a/b", "sha": self.path.split("/")[-1]}
            body = json.dumps(files if "/tree/" in self.path else of_set).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # of whom no longer listens
            for byte in [body] if self.manner != "trickles" else [b" "] * len(body):
                self.wfile.write(byte)
                time.sleep(0.2 if self.manner == "trickles" else 0)

    do_POST = do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    class Own(Hub):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(hub, "failure", None)
    yield Own
    server.shutdown()


def test_general_text_and_questions_come_from_the_hub_once(online: type[Hub]) -> None:
    fitted, trained, calibration = load_corpus(max_tokens=4096), load_training_text(None, 131072), load_calibration()
    asked = online.requests
    assert asked and not fitted.is_bundled and "general text" in fitted.note
    general = "HuggingFaceFW/fineweb-edu at 87f09149"
    assert [*fitted.parts] == [general, QUESTIONS] and [*trained.parts] == [general, DOCUMENTATION, QUESTIONS]
    for text in (fitted.parts[general], trained.parts[general]):
        assert text.startswith("page 0 ") and "page 999 " in text and "page 1000 " not in text
    assert calibration.source == "cais/mmlu at c30699e8, validation split" and calibration.labels == list(SUBJECTS)
    assert calibration.texts[1] == "asked 1\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    online.manner = "garbage"  # what was read is in the cache
    assert load_corpus(max_tokens=4096) == fitted and load_calibration() == calibration
    assert online.requests == asked
    assert load_corpus(HUB, max_tokens=4096) == fitted and load_calibration(HUB) == calibration
    bundled = load_corpus(BUNDLED), load_calibration(BUNDLED)
    assert [*bundled[0].parts] == [DOCUMENTATION, QUESTIONS] and "lm-eval" in bundled[1].source


@pytest.mark.parametrize("manner", ["hangs", "trickles", "garbage", "refuses", "chatty"])
def test_a_hub_that_does_not_answer_as_it_should_costs_ten_seconds_at_most(
    manner: str, online: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert hub.PATIENCE == 10
    monkeypatch.setattr(hub, "PATIENCE", 2.0)
    if manner == "refuses":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    elif manner == "chatty":  # a Python that says something wherever it starts
        (tmp_path / "sitecustomize.py").write_text("print('hello')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    else:
        online.manner = manner
    start = time.monotonic()
    corpora = [load_corpus()]
    asked = online.requests
    corpora += [load_corpus(), load_training_text(None, 8192)]
    samples = load_calibration()
    assert time.monotonic() - start < 5
    assert all({DOCUMENTATION, QUESTIONS} <= corpus.parts.keys() and corpus.is_bundled for corpus in corpora)
    assert "lm-eval" in samples.source and samples == load_calibration(BUNDLED)
    assert online.requests == asked and not list((tmp_path / "assets").rglob("*.json"))
    for load in (load_corpus, load_calibration):
        with pytest.raises(OSError, match=r"hub does not give the default text .* 'bundled' as calibration text"):
            load(HUB)
    assert "as the hub gave none (" in corpora[0].note and "1.1 to 1.4 times the perplexity" in corpora[0].note
