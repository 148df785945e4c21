"""Model names, paths and downloads, against a server on this machine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from loguru import logger

from sam_poll.core.errors import ModelError
from sam_poll.engines import catalog, download
from sam_poll.engines.catalog import MODELS, Model, Verdict, resolve

BODY = bytes(range(256)) * 40_000  # 10 MB
NAME = "small"


class Server(http.server.ThreadingHTTPServer):
    """A server of BODY whose faults are set by the test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = BODY
        self.ranges = True
        self.cut_after: list[
            int
        ] = []  # bytes of the next responses before the connection is closed
        self.drop = False
        self.status: int | None = None
        self.starts: list[int] = []
        self.lengths: list[str] | None = None  # values of Content-Length, instead of the right one
        self.chunked = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        if self.server.drop:
            self.connection.close()
            return
        if self.server.status:
            self.send_error(self.server.status)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and self.server.ranges else 0
        self.server.starts.append(start)
        if start >= len(self.server.body):
            self.send_error(416)
            return
        body = self.server.body[start:]
        self.send_response(206 if start else 200)
        for length in [str(len(body))] if self.server.lengths is None else self.server.lengths:
            self.send_header("Content-Length", length)
        if self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.server.chunked:
            with contextlib.suppress(OSError):  # the client has closed the connection
                self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        elif self.server.lengths is not None:
            with contextlib.suppress(OSError):
                self.wfile.write(body)
            self.close_connection = True
        elif self.server.cut_after:
            self.wfile.write(body[: self.server.cut_after.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model(
        NAME, "sam2", "x.yaml", "some/small.pt", len(BODY), hashlib.sha256(BODY).hexdigest()
    )
    monkeypatch.setitem(MODELS, NAME, model)
    return model


def names(folder: Path) -> set[str]:
    """Return the names in the cache, without the lock file."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_download_is_complete_and_reports_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = catalog.download(
        NAME, cache=tmp_path / "a" / "b", base_url=server.url, progress=lambda *at: seen.append(at)
    )
    assert path == tmp_path / "a" / "b" / "small.pt"
    assert path.read_bytes() == BODY
    assert names(path.parent) == {"small.pt"}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (len(BODY), len(BODY))
    assert {total for _, total in seen} == {len(BODY)}


def test_download_skips_an_existing_model(server: Server, tmp_path: Path) -> None:
    (tmp_path / "small.pt").write_bytes(b"mine")
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == b"mine"
    assert server.starts == []


def test_download_continues_a_part_where_it_stopped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "small.pt.part").write_bytes(BODY[:3_000_000])
    seen: list[tuple[int, int]] = []
    path = catalog.download(
        NAME, cache=tmp_path, base_url=server.url, progress=lambda *at: seen.append(at)
    )
    assert server.starts == [3_000_000]
    assert path.read_bytes() == BODY
    assert seen[0][0] > 3_000_000
    assert seen[-1] == (len(BODY), len(BODY))


def test_download_renames_a_complete_part(server: Server, tmp_path: Path) -> None:
    (tmp_path / "small.pt.part").write_bytes(BODY)
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == BODY


def test_download_starts_over_where_the_server_cannot_resume(
    server: Server, tmp_path: Path
) -> None:
    server.ranges = False
    (tmp_path / "small.pt.part").write_bytes(b"x" * 3_000_000)
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == BODY


def test_download_reconnects_in_the_same_call(server: Server, tmp_path: Path) -> None:
    server.cut_after = [4_000_000, 5_000_000]
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.starts == [0, 4_000_000, 9_000_000]


def test_download_fails_on_a_dead_connection_and_the_next_call_continues(
    server: Server, tmp_path: Path
) -> None:
    server.cut_after = [4_000_000, 0]
    with pytest.raises(ModelError, match=r"cut.*continues where it stopped"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert names(tmp_path) == {"small.pt.part"}
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.starts == [0, 4_000_000, 4_000_000]


def test_download_fails_where_the_server_sends_nothing(server: Server, tmp_path: Path) -> None:
    server.drop = True
    with pytest.raises(ModelError, match="cut"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("with_part", [False, True])
def test_download_with_a_wrong_hash_leaves_no_file(
    server: Server, tmp_path: Path, with_part: bool
) -> None:
    server.body = BODY[:-1] + b"?"
    if with_part:
        (tmp_path / "small.pt.part").write_bytes(BODY[:1000])
    with pytest.raises(ModelError, match=r"SHA-256 .* instead of"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert names(tmp_path) == set()


def test_download_removes_a_part_longer_than_the_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "small.pt.part").write_bytes(BODY + b"more")
    with pytest.raises(ModelError, match="SHA-256"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (["-1"], "invalid length"),
        (["many"], "invalid length"),
        (["+10240000"], "invalid length"),
        (["0x10"], "invalid length"),
        (["1e9"], "invalid length"),
        (["³"], "invalid length"),
        (["9" * 5000], "invalid length"),
        ([str(len(BODY)), "1"], "invalid length"),
        ([str(2 * len(BODY))], "announces 20,480,000 bytes of a file that has about 10,240,000"),
        (["100"], "had 100 bytes instead of about 10,240,000"),
    ],
)
def test_download_refuses_an_invalid_content_length(
    server: Server, tmp_path: Path, lengths: list[str], words: str
) -> None:
    server.lengths = lengths
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert caught.value.place == f"{server.url}some/small.pt"
    assert caught.value.remedy
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "lengths", [[], ["100"]], ids=["no length", "a smaller length than what comes"]
)
def test_download_stops_at_the_size_of_the_catalogue_or_the_server(
    server: Server, tmp_path: Path, lengths: list[str]
) -> None:
    server.chunked = True
    server.lengths = lengths
    server.body = BODY * 3
    with pytest.raises(ModelError, match="sends more bytes than"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert names(tmp_path) == set()


def test_download_keeps_the_part_after_an_invalid_content_length(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "small.pt.part").write_bytes(BODY[:3_000_000])
    server.lengths = ["-1"]
    with pytest.raises(ModelError, match="length"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    server.lengths = None
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.starts == [3_000_000] * 2


def test_download_accepts_a_copy_slightly_longer_than_the_catalogue_size(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Model
) -> None:
    monkeypatch.setitem(MODELS, NAME, replace(small_model, size=int(len(BODY) * 0.99)))
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == BODY


# ── files planted in the folder ──


def plant(path: Path, kind: str, outside: Path) -> None:
    """Plant something at `path`; `outside` is a file that must not change."""
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "dangling link":
        path.symlink_to(outside.with_name("made"))
    elif kind == "hard link":
        path.hardlink_to(outside)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        os.mkfifo(path)


KINDS = ["link", "dangling link", "hard link", "folder", "socket", "FIFO"]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["small.pt.part", "small.pt.lock"])
def test_download_refuses_planted_part_and_lock_files(
    server: Server, tmp_path: Path, name: str, kind: str
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    cache = tmp_path / "cache"
    cache.mkdir()
    plant(cache / name, kind, outside)
    with pytest.raises(ModelError, match=re.escape(name)) as caught:
        catalog.download(NAME, cache=cache, base_url=server.url)
    assert caught.value.place == str(cache)
    assert caught.value.remedy
    assert outside.read_bytes() == b"mine"
    assert not (tmp_path / "made").exists()
    assert os.path.lexists(cache / name)
    assert server.starts == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["dangling link", "folder", "socket", "FIFO"])
def test_download_never_replaces_a_planted_final_name(
    server: Server, tmp_path: Path, kind: str
) -> None:
    plant(tmp_path / "small.pt", kind, tmp_path / "outside")
    before = os.lstat(tmp_path / "small.pt")
    with pytest.raises(ModelError, match=r"small\.pt is in the way"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert os.lstat(tmp_path / "small.pt").st_ino == before.st_ino
    assert server.starts == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_download_refuses_another_users_part(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "small.pt.part"
    part.write_bytes(BODY[:1000])
    os.chown(part, 4321, 4321)
    with pytest.raises(ModelError, match="belongs to another user"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert part.read_bytes() == BODY[:1000]
    os.chown(tmp_path, 4321, 4321)  # a mount that gives all files to one user
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == BODY


def test_download_uses_a_link_to_an_existing_model(server: Server, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(BODY)
    (tmp_path / "small.pt").symlink_to(tmp_path / "elsewhere")
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.starts == []


@pytest.mark.parametrize("status", [404, 403, 500])
def test_download_reports_http_errors_with_the_url(
    server: Server, tmp_path: Path, status: int
) -> None:
    server.status = status
    with pytest.raises(ModelError, match=str(status)) as caught:
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert caught.value.place == f"{server.url}some/small.pt"
    assert names(tmp_path) == set()


def test_download_without_network_names_a_remedy(server: Server, tmp_path: Path) -> None:
    port = server.server_address[1]
    server.socket.close()  # no process listens there any more
    with pytest.raises(ModelError, match=r"cannot be reached.*proxy.*by hand"):
        catalog.download(
            NAME,
            cache=tmp_path,
            base_url=f"http://127.0.0.1:{port + 1 if port < 65535 else port - 1}/",
        )


def test_download_checks_free_space_before_writing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(ModelError, match="no room"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert all(path.stat().st_size == 0 for path in tmp_path.iterdir())


def test_download_frees_the_space_when_the_disk_fills_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(ModelError, match="no room"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert names(tmp_path) == set()


def test_download_reports_a_cache_that_cannot_be_created(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelError, match="SAM_POLL_CACHE"):
        catalog.download(NAME, cache=tmp_path / "file", base_url=server.url)


def test_fetch_accepts_http_and_https_only(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="http"):
        catalog.download(NAME, cache=tmp_path, base_url="file:///etc/")


PROCESS = """
import sys
from pathlib import Path
from sam_poll.engines import catalog
url, cache, length, sha256 = sys.argv[1:]
model = catalog.Model("small", "sam2", "x.yaml", "some/small.pt", int(length), sha256)
catalog.MODELS["small"] = model
catalog.download("small", cache=Path(cache), base_url=url)
"""


def test_download_by_three_processes_fetches_once(
    server: Server, tmp_path: Path, small_model: Model
) -> None:
    command = [
        sys.executable,
        "-c",
        PROCESS,
        server.url,
        str(tmp_path),
        str(len(BODY)),
        small_model.sha256,
    ]
    workers = [subprocess.Popen(command) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert (tmp_path / "small.pt").read_bytes() == BODY
    assert server.starts == [0]


def test_verify_distinguishes_right_wrong_and_unknown_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path))
    right = tmp_path / "small.pt"
    right.write_bytes(BODY)
    assert catalog.verify(NAME) is Verdict.PUBLISHED
    assert catalog.verify(right) is Verdict.PUBLISHED
    right.write_bytes(BODY[:-1])
    assert catalog.verify(NAME) is Verdict.DIFFERENT
    own = tmp_path / "own.pt"
    own.write_bytes(b"")
    assert catalog.verify(own) is Verdict.UNKNOWN
    with pytest.raises(ModelError, match="no such file"):
        catalog.verify(tmp_path / "none.pt")


# ── without a published hash ──


@pytest.fixture
def unpublished(monkeypatch: pytest.MonkeyPatch, small_model: Model) -> None:
    monkeypatch.setitem(MODELS, NAME, replace(small_model, sha256=None))


@pytest.mark.usefixtures("unpublished")
def test_first_download_without_a_published_hash_is_recorded_and_said_not_to_be_verified(
    server: Server, tmp_path: Path
) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    try:
        path = catalog.download(NAME, cache=tmp_path, base_url=server.url)
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    finally:
        logger.remove(sink)
    recorded = hashlib.sha256(BODY).hexdigest()
    assert (tmp_path / "small.pt.sha256").read_text() == f"{recorded}  small.pt\n"
    assert sum("not verified" in line and recorded in line for line in lines) == 1
    assert catalog.verify(path) is Verdict.RECORDED
    path.write_bytes(BODY[:-1])
    assert catalog.verify(path) is Verdict.DIFFERENT


@pytest.mark.usefixtures("unpublished")
def test_later_download_must_have_the_recorded_hash(server: Server, tmp_path: Path) -> None:
    catalog.download(NAME, cache=tmp_path, base_url=server.url).unlink()
    server.body = BODY[:-1] + b"!"
    with pytest.raises(ModelError, match="instead of"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert names(tmp_path) == {"small.pt.sha256"}
    server.body = BODY
    assert catalog.download(NAME, cache=tmp_path, base_url=server.url).read_bytes() == BODY


@pytest.mark.usefixtures("unpublished")
def test_short_download_without_a_published_hash_is_refused(server: Server, tmp_path: Path) -> None:
    server.body = b"<html>sign in</html>"
    with pytest.raises(ModelError, match="20 bytes instead of about"):
        catalog.download(NAME, cache=tmp_path, base_url=server.url)
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("unpublished")
def test_record_is_not_written_through_a_link(server: Server, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "small.pt.sha256").symlink_to(outside)
    with pytest.raises(ModelError, match=r"small\.pt\.sha256 is a link"):
        catalog.download(NAME, cache=cache, base_url=server.url)
    assert outside.read_bytes() == b"mine"


def test_catalogue_is_consistent() -> None:
    assert len(MODELS) == 16 + 1  # and the small one of these tests
    for name, model in MODELS.items():
        assert name == model.name
        assert model.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", model.sha256)
        assert model.family in ("sam1", "sam2", "sam-hq", "mobile-sam")
        assert (model.config is None) == (model.family != "sam2")
        assert model.base.startswith("https://")
        assert model.license
    hashes = [model.sha256 for model in MODELS.values() if model.sha256]
    assert len(set(hashes)) == len(hashes) == len(MODELS) - 2
    assert len({model.filename for model in MODELS.values()}) == len(MODELS)


def test_catalogue_urls_are_the_publishers() -> None:
    assert MODELS["sam_vit_b"].path == "segment_anything/sam_vit_b_01ec64.pth"
    assert (
        MODELS["sam2.1_hiera_base_plus"].path
        == "segment_anything_2/092824/sam2.1_hiera_base_plus.pt"
    )
    assert MODELS["sam2_hiera_tiny"].config == "configs/sam2/sam2_hiera_t.yaml"
    assert MODELS["sam2.1_hiera_base_plus"].config == "configs/sam2.1/sam2.1_hiera_b+.yaml"


def test_cache_dir_follows_the_environment() -> None:
    assert catalog.cache_dir({"SAM_POLL_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert catalog.cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/sam_poll")
    assert catalog.cache_dir({}) == Path.home() / ".cache" / "sam_poll"


def test_resolve_maps_a_catalogue_name_to_its_file_in_the_cache(tmp_path: Path) -> None:
    spec = resolve("sam2.1_hiera_tiny", cache_dir=tmp_path, env={})
    assert spec.checkpoint == tmp_path / "sam2.1_hiera_tiny.pt"
    assert (spec.family, spec.config) == ("sam2", "configs/sam2.1/sam2.1_hiera_t.yaml")
    assert spec.sha256 == MODELS["sam2.1_hiera_tiny"].sha256
    assert resolve("sam_vit_b", env={"SAM_POLL_CACHE": "/cache"}).checkpoint == Path(
        "/cache/sam_vit_b_01ec64.pth"
    )


def test_resolve_finds_the_bundled_demo() -> None:
    spec = resolve("demo", env={})
    assert spec.checkpoint is not None
    assert spec.checkpoint.is_file()
    assert Path(str(spec.config)).is_file()


def test_resolve_keeps_a_path(tmp_path: Path) -> None:
    own = tmp_path / "my model"
    own.write_bytes(b"")
    spec = resolve(str(own), env={})
    assert (spec.name, spec.checkpoint, spec.family, spec.sha256) == ("my model", own, None, None)
    assert resolve(str(own), config="x.yaml", env={}).family == "sam2"
    assert resolve(str(own), model_type="vit_b", env={}).family == "sam1"
    assert resolve("gone.pth", env={}).checkpoint == Path("gone.pth")


def test_resolve_uses_the_environment_only_without_a_name() -> None:
    env = {"MODEL": "/m/x.pt", "MODEL_CFG": "sam2.1_hiera_t.yaml"}
    spec = resolve("", env=env)
    assert (spec.checkpoint, spec.config) == (Path("/m/x.pt"), "sam2.1_hiera_t.yaml")
    assert resolve("demo", env=env).name == "demo"
    assert resolve("/m/y.pt", env=env).config is None
    with pytest.raises(ModelError, match="no model is named"):
        resolve("", env={})


def test_resolve_refuses_an_unknown_name_and_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"sam2\.1_hiera_tiny"):
        resolve("sam3", env={})
    with pytest.raises(ModelError, match="to download"):
        catalog.download("demo")


def test_identity_depends_on_the_weights_not_only_the_name(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "mine.pt"
    names = []
    for value in (1.0, 2.0):
        torch.save({"a": torch.full((1000,), value)}, path)
        names.append(catalog.identity(catalog.resolve(str(path))))
    assert names[0] != names[1]
    assert all(name.startswith("mine@") for name in names)
    assert (
        catalog.identity(catalog.resolve("sam2.1_hiera_tiny"))
        == "sam2.1_hiera_tiny@7402e0d864fa8270"
    )
    assert catalog.identity(catalog.resolve("fake")) == "fake"
