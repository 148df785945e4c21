"""Models of the Hugging Face hub: names, the local cache, downloads from a server like the hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loguru import logger
from safetensors.torch import load_file, save_file

from sam_poll.core.errors import ModelError
from sam_poll.core.types import Box, Prompt
from sam_poll.engines import catalog, edgetam, hub, load, resolve
from sam_poll.engines.memory.plan import MemoryStep
from tests.support.engine_contract import picture
from tests.support.networks import small_edgetam

REPO = "someone/EdgeTAM-small"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = "f" * 40
PROMPTS = [Prompt(box=Box(10, 20, 90, 70))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small EdgeTAM in the form of the hub."""
    path = tmp_path_factory.mktemp("edgetam") / "model"
    small_edgetam(256).save_pretrained(path)
    return path


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(folder, tmp_path / "changed"))


def answer(engine: Any) -> np.ndarray:
    [embedding] = engine.encode([engine.prepare(picture())])
    [logits] = engine.decode(embedding, PROMPTS)
    return logits.pixels


# ── names ──


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("yonigozlan/EdgeTAM-hf", hub.HubModel("yonigozlan/EdgeTAM-hf")),
        ("a/b@main", hub.HubModel("a/b", "main")),
        (f"a/b@{COMMIT}", hub.HubModel("a/b", COMMIT)),
        ("a/b@refs/pr/1", hub.HubModel("a/b", "refs/pr/1")),
        ("a", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("./a", None),
        ("../b", None),
        ("a/b@", None),
    ],
)
def test_names_of_the_hub_are_told_from_paths(name: str, expected: Any) -> None:
    assert hub.parse(name) == expected


def test_resolve_takes_a_folder_a_file_and_a_checkpoints_name_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("models/mine.pt", env={}).hub is None
    spec = resolve("models/mine", env={})
    assert spec.hub == hub.HubModel("models/mine")
    shutil.copytree(folder, tmp_path / "models" / "mine")
    spec = resolve("models/mine", env={})
    assert (spec.hub, spec.checkpoint, spec.name) == (None, Path("models/mine"), "mine")


# ── folders ──


def test_model_in_a_folder_is_loaded_with_its_weights(folder: Path) -> None:
    engine = load(resolve(str(folder)), device="cpu")
    assert engine.info.family == "edgetam"
    assert engine.info.stretches
    np.testing.assert_array_equal(answer(engine), answer(edgetam.EdgeTamEngine(small_edgetam(256))))


def test_edgetam_back_in_float32_is_as_before(folder: Path) -> None:
    engine = load(resolve(str(folder)), device="cpu", warmup=False).engine  # type: ignore[attr-defined]
    before = answer(engine)
    engine.apply(MemoryStep("bfloat16", 1, 1, 256, "cpu"))
    assert np.abs(answer(engine) - before).max() > 0
    engine.apply(MemoryStep("float32", 1, 1, 256, "cpu"))
    np.testing.assert_array_equal(answer(engine), before)


def test_weights_of_the_video_model_are_left_out(changed: Path) -> None:
    weights = load_file(changed / "model.safetensors")
    weights["memory_attention.layers.0.linear1.weight"] = torch.zeros(1)
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    config = json.loads((changed / "config.json").read_text())
    config |= {"model_type": "edgetam_video", "architectures": ["EdgeTamVideoModel"]}
    (changed / "config.json").write_text(json.dumps(config))
    assert load(resolve(str(changed)), device="cpu", warmup=False).info.family == "edgetam"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("no_memory_embedding"), "missing no_memory_embedding"),
        (lambda w: w.update(renamed=w.pop("no_memory_embedding")), "missing .*; unknown renamed"),
        (lambda w: w.update(stray=torch.zeros(1)), "unknown stray"),
        (lambda w: w.update(no_memory_embedding=torch.zeros(1, 1, 5)), "shape|size"),
    ],
    ids=["missing", "renamed", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_refused(changed: Path, change: Any, reason: str) -> None:
    weights = load_file(changed / "model.safetensors")
    change(weights)
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=reason) as caught:
        load(resolve(str(changed)), device="cpu")
    assert caught.value.place == str(changed)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, r"config\.json cannot be read"),
        ("config.json", "{", r"config\.json cannot be read"),
        ("config.json", '{"model_type": "sam_hq"}', "sam_hq.*not supported"),
        ("model.safetensors", None, "the model cannot be read"),
        ("model.safetensors", "nonsense", "the model cannot be read"),
    ],
)
def test_broken_folder_is_refused_with_its_place(
    changed: Path, name: str, content: str | None, reason: str
) -> None:
    (changed / name).unlink()
    if content is not None:
        (changed / name).write_text(content)
    with pytest.raises(ModelError, match=reason) as caught:
        load(resolve(str(changed)), device="cpu")
    assert caught.value.place == str(changed)


def test_weights_that_could_run_code_are_not_read(changed: Path) -> None:
    weights = load_file(changed / "model.safetensors")
    torch.save(weights, changed / "pytorch_model.bin")
    (changed / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="the model cannot be read"):
        load(resolve(str(changed)), device="cpu")


def test_identity_of_a_folder_depends_on_all_its_weights(changed: Path) -> None:
    before = catalog.identity(resolve(str(changed)))
    assert before.startswith("changed@")
    assert catalog.identity(resolve(str(changed))) == before
    weights = load_file(changed / "model.safetensors")
    weights["mask_decoder.conv_s0.bias"] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    assert catalog.identity(resolve(str(changed))) != before


# ── the hub ──


class Hub(http.server.ThreadingHTTPServer):
    """A server with the addresses of the hub that a download of one repository needs."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.files |= {"README.md": b"x", "pytorch_model.bin": b"code"}
        self.commit = COMMIT
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.status: tuple[int, str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        path = self.path.split("?")[0]
        server.asked.append(path)
        server.tokens.add(self.headers.get("Authorization"))
        if server.status:
            status, code = server.status
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        headers, body = {}, b""
        if path.startswith(f"/api/models/{REPO}/tree/"):
            body = json.dumps([self.entry(*item) for item in server.files.items()]).encode()
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in server.files]
            info = {"id": REPO, "modelId": REPO, "sha": server.commit, "siblings": siblings}
            body = json.dumps(info).encode()
        else:
            name = path.rpartition("/")[2]
            body = server.files[name]
            headers = {"X-Repo-Commit": server.commit, "ETag": f'"{self.etag(name, body)}"'}
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    @staticmethod
    def etag(name: str, body: bytes) -> str:
        is_large = name.endswith(".safetensors")
        return (hashlib.sha256 if is_large else hashlib.sha1)(body).hexdigest()

    def entry(self, name: str, body: bytes) -> dict[str, Any]:
        made = {"type": "file", "path": name, "size": len(body), "oid": self.etag(name, body)[:40]}
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(body).hexdigest()
            made["lfs"] = {"oid": sha256, "size": len(body), "pointerSize": 130}
        return made


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of this machine, which the library uses, and an empty cache."""
    from huggingface_hub import constants

    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "".join(template[1:])
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_loading_never_downloads_and_names_the_command(server: Hub) -> None:
    with pytest.raises(ModelError, match=f"sam-poll models download {REPO}"):
        load(resolve(REPO), device="cpu")
    assert server.asked == []


def test_download_fills_the_hubs_cache_reports_progress_and_is_loaded_offline(
    server: Hub,
) -> None:
    seen: list[tuple[int, int]] = []
    path = catalog.download(REPO, progress=lambda *at: seen.append(at))
    assert hub.revision_of(path) == COMMIT
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors"}
    total = sum(len(server.files[name]) for name in ("config.json", "model.safetensors"))
    assert seen[-1] == (total, total)
    asked = len(server.asked)
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    try:
        engine = load(resolve(REPO), device="cpu", warmup=False)
    finally:
        logger.remove(sink)
    assert engine.info.name == REPO
    assert any(COMMIT in line for line in lines)
    assert len(server.asked) == asked
    assert catalog.identity(resolve(REPO)) == f"{REPO}@{COMMIT[:16]}"


def test_downloaded_model_stays_at_its_commit_until_another_is_named(server: Hub) -> None:
    first = catalog.download(REPO)
    server.commit = NEWER
    assert catalog.download(REPO) == first
    newer = catalog.download(f"{REPO}@{NEWER}")
    assert hub.revision_of(newer) == NEWER
    assert catalog.folder_or_file(resolve(f"{REPO}@{NEWER}")) == newer
    assert catalog.folder_or_file(resolve(REPO)) == first


def test_verify_compares_with_the_hubs_hash(server: Hub) -> None:
    path = catalog.download(REPO)
    assert catalog.verify(REPO) is catalog.Verdict.PUBLISHED
    weights = (path / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert catalog.verify(REPO) is catalog.Verdict.DIFFERENT


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "GatedRepo", "accepted its licence"),
        (404, "RepoNotFound", "no such model"),
        (404, "RevisionNotFound", "no such revision"),
        (500, "", "cannot be downloaded"),
    ],
)
def test_refusal_of_the_hub_is_explained(server: Hub, status: int, code: str, reason: str) -> None:
    server.status = (status, code)
    with pytest.raises(ModelError, match=reason) as caught:
        catalog.download(REPO)
    assert caught.value.place == REPO


def test_offline_mode_is_respected_and_named(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        catalog.download(REPO)
    assert server.asked == []


def test_command_downloads_with_the_variables_of_the_hub(server: Hub, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
        "SAM_POLL_CACHE": str(tmp_path),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "sam_poll", "models", "download", REPO],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert Path(ended.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
    assert f"revision {COMMIT}" in ended.stderr
    assert "Bearer hf_secret" in server.tokens
