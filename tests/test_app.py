"""What the app makes of settings, and how it stops."""

from __future__ import annotations

import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sam_poll import app, settings
from sam_poll.errors import ExitCode, ModelError
from tests.conftest import wait_until


def made(tmp_path: Path, **flags: object) -> settings.Settings:
    return settings.load(None, env={}, flags={"input": tmp_path / "in", "model": "fake", **flags})


def test_a_stop_that_hangs_ends_the_process_after_all() -> None:
    stop, ends = threading.Event(), list[int]()
    with app.bounded_stop(stop, 0.01, ends.append):
        stop.set()
        wait_until(lambda: ends == [ExitCode.OK])


def test_a_stop_in_time_ends_nothing_else() -> None:
    stop, ends = threading.Event(), list[int]()
    before = set(threading.enumerate())
    with app.bounded_stop(stop, 60.0, ends.append):
        stop.set()
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert ends == []


def test_a_stop_while_a_fleets_models_are_loaded_is_an_orderly_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(app, "stop_on_signals", lambda: nullcontext(stop))
    (tmp_path / "in").mkdir()
    assert app.watch(made(tmp_path, devices=["cpu", "cpu"])) == ExitCode.OK


HANGING = """
import hashlib, os, threading
from sam_poll.app import stop_on_signals
with stop_on_signals() as stop:
    threading.Thread(target=lambda: stop.wait() and os._exit(7), daemon=True).start()
    print("ready", flush=True)
    while True:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # minutes in which Python's own handlers cannot run
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_the_main_thread_hangs(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        try:
            assert process.wait(20) == 7
        finally:
            process.kill()


def test_after_the_run_signals_are_as_they_were() -> None:
    before = [
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
    ]
    threads = set(threading.enumerate())
    with app.stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(stop.is_set)
    after = [
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
    ]
    assert after == before
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (8, 4), (64, 8)])
def test_auto_threads_follow_the_cores(tmp_path: Path, cores: int, threads: int) -> None:
    sizes = app.sizes_of(made(tmp_path), cores)
    assert (sizes.decode_threads, sizes.finish_threads) == (threads, max(2, threads))
    assert app.sizes_of(made(tmp_path, **{"pipeline.decode_threads": 3}), cores).decode_threads == 3


def test_an_overlay_asks_for_more_pixels_than_a_small_network_needs(tmp_path: Path) -> None:
    assert (app.sizes_of(made(tmp_path)).cover, app.sizes_of(made(tmp_path)).pixels) == (0, False)
    assert app.sizes_of(made(tmp_path, formats=["overlay"])).pixels
    assert app.sizes_of(made(tmp_path, formats=["overlay"])).cover == 1024
    assert app.sizes_of(made(tmp_path, **{"formats": ["overlay"], "overlay.max_side": 300})).cover == 300


@pytest.mark.parametrize(
    ("flags", "cards", "names"),
    [
        ({}, "4", ["auto"]),
        ({"device": "cuda:1"}, "4", ["cuda:1"]),
        ({"devices": ["cuda:1", "cpu"]}, "4", ["cuda:1", "cpu"]),
        ({"devices": "auto"}, "3", ["cuda:0", "cuda:1", "cuda:2"]),
        ({"devices": "auto"}, "1", ["auto"]),
        ({"devices": "auto"}, "Traceback", ["auto"]),
    ],
)
def test_devices_auto_is_every_card_and_where_there_are_not_several_what_device_auto_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], cards: str, names: list[str]
) -> None:
    told = subprocess.CompletedProcess([], 0, stdout=f"{cards}\n")
    monkeypatch.setattr(app.subprocess, "run", lambda *_, **__: told)
    assert app.devices_of(made(tmp_path, **flags)) == names


def test_a_count_of_cards_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(app.subprocess, "run", hangs)
    with pytest.raises(ModelError, match="longer than 7 s"):
        app.devices_of(made(tmp_path, devices="auto", load_timeout_s=7))


def test_processes_on_the_cpu_share_its_cores_unless_somebody_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "cores_here", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settings = made(tmp_path)
    assert [p.env["OMP_NUM_THREADS"] for p in app.posts_of(settings, ["cpu", "cpu"])] == ["4", "4"]
    assert "OMP_NUM_THREADS" not in app.posts_of(settings, ["cuda:0", "cuda:1"])[0].env
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [p.env["OMP_NUM_THREADS"] for p in app.posts_of(settings, ["cpu", "cpu"])] == ["3", "3"]


def test_what_loading_makes_is_not_gone_through_by_the_collector_again(tmp_path: Path) -> None:
    try:
        app.engine_of(made(tmp_path))
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        with app.uncollected():
            assert not gc.isenabled()
        with pytest.raises(ModelError), app.uncollected():
            raise ModelError("not there")
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_a_daemon_ends_without_a_word_from_libraries(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    command = [sys.executable, "-m", "sam_poll", "watch", str(tmp_path / "in"), "-m", "demo", "--once", "--log", "text"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert all(re.match(r"20\d\d-", line) for line in ended.stderr.splitlines()), ended.stderr


def test_what_a_process_of_a_fleet_is_told_can_travel_and_gives_it_its_engine(tmp_path: Path) -> None:
    (post, _) = app.posts_of(made(tmp_path, model="fake", formats=["mask", "opex"]), ["cpu", "cpu"])
    equipment = pickle.loads(pickle.dumps(post.equip))()
    assert (equipment.engine.info.name, len(equipment.formats)) == ("fake", 2)
    assert equipment.sizes.finish_threads >= 1
    assert equipment.pieces.args == ("fake",), "the model that tiles are of"


def test_names_in_cvat_are_relative_to_what_holds_input_and_done(tmp_path: Path) -> None:
    layout = app.layout_of(made(tmp_path))
    assert layout.share_name(layout.done / "cam1" / "dog.jpg") == "done/cam1/dog.jpg"
    elsewhere = app.layout_of(made(tmp_path, done=tmp_path / "tree" / "answered"))
    assert elsewhere.share_name(elsewhere.done / "dog.jpg") == "tree/answered/dog.jpg"


def test_the_folder_door_is_told_how_long_a_lease_is_and_what_proves_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manners = app.manners_of(made(tmp_path, lease_s=7, attempts=5, sentinel="here"), once=False)
    assert (manners.lease_s, manners.attempts, manners.sentinel) == (7.0, 5, tmp_path / "here")
    assert app.manners_of(made(tmp_path), once=False).sentinel is None
