"""``hf://`` and ``https://``: files on the Internet, whose SHA-256 has to be known."""

import hashlib
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from instseg.checkpoint import Checkpointer, read_weights, save_safetensors
from instseg.downloads import hash_in_name, require_hash
from instseg.errors import CheckpointError

COMMIT = "f" * 40
SHA256 = "0123456789abcdef" * 4


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A file with one weight."""
    save_safetensors(tmp_path / "a.safetensors", {"weight": torch.ones(1, 2)}, {"iteration": 3})
    return (tmp_path / "a.safetensors").read_bytes()


@pytest.fixture
def hub(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A Hugging Face Hub on this machine with one file; gives the paths that were asked for."""
    constants = pytest.importorskip("huggingface_hub.constants")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(b"")

        def do_GET(self) -> None:
            self.answer(content)

        def answer(self, body: bytes) -> None:
            asked.append(f"{self.command} {self.path}")
            exists = self.path.partition("?")[0].endswith("/models/a.safetensors")
            self.send_response(200 if exists else 404)
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Error-Code", "" if exists else "EntryNotFound")
            self.send_header("Content-Length", str(len(content)) if exists else "0")
            self.end_headers()
            self.wfile.write(body if exists else b"")

        def log_message(self, *args: object) -> None:
            """Keep the test's output clean."""

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()


def test_weights_come_from_a_hub_at_a_revision(hub: list[str], content: bytes) -> None:
    model = nn.Linear(2, 1, bias=False)
    digest = hashlib.sha256(content).hexdigest()
    rest = Checkpointer(model, sha256=digest).load("hf://org/repo/models/a.safetensors@v1.0")
    assert torch.equal(model.weight, torch.ones(1, 2))
    assert rest["iteration"] == 3
    assert f"GET /org/repo/resolve/{COMMIT}/models/a.safetensors" in hub or (
        "GET /org/repo/resolve/v1.0/models/a.safetensors" in hub
    )


def test_a_file_of_a_hub_with_another_hash_is_refused(hub: list[str]) -> None:
    with pytest.raises(CheckpointError, match=f"but MODEL.WEIGHTS_SHA256 is {SHA256}; .*; delete"):
        read_weights("hf://org/repo/models/a.safetensors", SHA256)


def test_a_file_that_a_hub_does_not_have_is_one_line(hub: list[str]) -> None:
    with pytest.raises(CheckpointError, match="hf://org/repo/b.pth cannot be downloaded") as caught:
        read_weights("hf://org/repo/b.pth", SHA256)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["hf://repo/a.pth", "hf://org/repo", "hf://org/repo/a.pth@"])
def test_an_incomplete_address_of_a_hub_is_refused_with_the_form(address: str) -> None:
    with pytest.raises(CheckpointError, match="expected hf://ORG/REPO/FILE or"):
        read_weights(address, SHA256)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"huggingface_hub: pip install 'instseg\[hub\]'"):
        read_weights("hf://org/repo/a.pth", SHA256)


@pytest.mark.parametrize(
    "address",
    ["hf://org/repo/a-01234567.pth", "https://host/a.pth", "http://host/a.pth?x=-01234567.pth"],
)
def test_a_file_on_the_internet_needs_a_hash(address: str) -> None:
    with pytest.raises(CheckpointError, match="need the SHA-256 .* set MODEL.WEIGHTS_SHA256"):
        Checkpointer(nn.Identity()).load(address)
    require_hash(address, SHA256)


@pytest.mark.parametrize(
    "address",
    ["a.pth", "detectron2://a.pkl", "zoo://a", "https://download.pytorch.org/a-01234567.pth"],
)
def test_other_files_need_none(address: str) -> None:
    require_hash(address, "")


def test_the_hash_in_the_name_of_a_file_of_pytorch_counts() -> None:
    pytorch = "https://download.pytorch.org/models"
    assert hash_in_name(f"{pytorch}/vgg16-397923af.pth?download=true") == "397923af"
    assert hash_in_name("vgg16-397923af.pth") == ""
    assert hash_in_name(f"{pytorch}/resnet-50.pth") == ""
    assert hash_in_name("https://host/model-20231115.pth") == ""
