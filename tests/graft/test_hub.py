"""Adapters up to and down from a small hub on this machine, which speaks as much of the protocol as is asked."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import titans_ds
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import LoraSettings, TitansModel
from titans_ds.errors import AdapterError

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, `me/memory`, that starts empty."""

    files: dict[str, bytes]

    @property
    def here(self) -> str:
        """Its own address, which huggingface_hub expects in what it answers."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        name = re.search(r"/me/memory/resolve/[^/]+/(.+)", self.path)
        if name and name[1] in self.files:
            content = self.files[name[1]]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(content, X_Repo_Commit=COMMIT, ETag=tag, Accept_Ranges="bytes")
        elif self.path.startswith("/api/models/me/memory/tree/"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in self.files.items()]
            self.answer(json.dumps(tree).encode())
        elif self.path.startswith("/api/models/me/memory"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": "me/memory", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/repos/create"):
            self.answer(json.dumps({"url": f"{self.here}/me/memory", "id": "me/memory", "name": "me/memory"}).encode())
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            self.answer(json.dumps({"files": modes}).encode())
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = {"commitUrl": f"{self.here}/me/memory/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            self.answer(json.dumps(address).encode())
        else:
            self.answer(b"{}")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """What the hub holds. huggingface_hub is pointed to it for the time of a test."""
    from huggingface_hub import constants

    held: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Hub,), {"files": held}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield held
    server.shutdown()


def test_an_adapter_goes_to_the_hub_and_comes_back(files: dict[str, bytes], tmp_path: Path) -> None:
    model = titans_ds.attach(tiny_base("llama"), lora=LoraSettings(rank=2, targets=["q_proj"])).eval()
    assert model.push_to_hub("me/memory").endswith(COMMIT)
    assert {"titans_config.json", "titans_memory.safetensors", "README.md", "lora/adapter_config.json"} <= set(files)
    assert not any("model-" in name or name == "model.safetensors" for name in files)
    files["surprise.py"] = b"raise SystemExit"
    loaded = TitansModel.from_pretrained(tiny_base("llama"), "me/memory").eval()
    assert not list(tmp_path.rglob("surprise.py"))
    ids = token_ids(2, 9)
    with torch.no_grad(), model.memory_session(2) as memory:
        model.prime(token_ids(2, 20, seed=1), memory)
        assert torch.equal(loaded(ids, memory=memory.state).logits, model(ids, memory=memory.state).logits)


def test_what_the_hub_does_not_have_is_named(files: dict[str, bytes]) -> None:
    with pytest.raises(AdapterError, match="you/other is no folder here, and the hub gives no repository of that name"):
        TitansModel.from_pretrained(tiny_base("llama"), "you/other")


def test_the_card_tells_of_base_licence_data_and_losses_and_goes_on_with_the_adapter(tmp_path: Path) -> None:
    base = tiny_base("llama")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# Base\nlicense: other\n")
    model = titans_ds.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "plain")
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert "The base model's licence: apache-2.0." in plain
    assert "Training data and measured losses: not recorded." in plain
    losses = {"memory": {"mean": 1.25, "standard_error": 0.01}, "wrong": {"mean": 1.5, "standard_error": None}}
    model.provenance = {
        "data": "python-2026",
        "split": "train",
        "steps": 1200,
        "repositories": 64,
        "losses": losses,
        "minus_memory": {"wrong": {"mean": 0.25, "standard_error": 0.02}},
    }
    model.save_pretrained(tmp_path / "trained")
    again = TitansModel.from_pretrained(tmp_path / "base", tmp_path / "trained")
    again.save_pretrained(tmp_path / "again")
    for name in ("trained", "again"):
        card = (tmp_path / name / "README.md").read_text()
        assert 'Trained on "python-2026" (split "train") in 1,200 steps.' in card
        assert "mean over 64 repositories" in card
        assert "| own memory | 1.2500 ± 0.0100 |  |" in card
        assert "| another repository's memory | 1.5000 ± not finite | 0.2500 ± 0.0200 |" in card
    path = tmp_path / "trained" / "titans_config.json"
    path.write_text(path.read_text().replace("1200", '"many"'))
    with pytest.raises(AdapterError, match=r"provenance\.steps is 'many'; expected a valid integer"):
        TitansModel.from_pretrained(tmp_path / "base", tmp_path / "trained")
