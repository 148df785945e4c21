"""Objects made from settings: options, devices, worker processes, folders."""

from __future__ import annotations

import gc
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sam_poll.config import settings
from sam_poll.core.errors import ModelError, SettingsError
from sam_poll.core.types import ModelInfo
from sam_poll.runtime import builders
from tests.conftest import Share


def made(tmp_path: Path, **flags: object) -> settings.Settings:
    return settings.load(None, env={}, flags={"input": tmp_path / "in", "model": "fake", **flags})


def test_a_whole_share_is_not_taken_for_its_input_folder(share: Share) -> None:
    share.run_once()
    chosen = settings.load(None, env={}, flags={"input": share.root, "model": "fake"})
    with pytest.raises(SettingsError, match="whole share") as raised:
        builders.layout_of(chosen)
    assert str(share.input) in raised.value.remedy
    assert builders.layout_of(made(share.root)).input.path == share.input


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (8, 4), (64, 8)])
def test_auto_threads_follow_the_cores(tmp_path: Path, cores: int, threads: int) -> None:
    options = builders.pipeline_options_of(made(tmp_path), cores)
    assert (options.decode_threads, options.finish_threads) == (threads, max(2, threads))
    chosen = made(tmp_path, **{"pipeline.decode_threads": 3})
    assert builders.pipeline_options_of(chosen, cores).decode_threads == 3


def test_an_overlay_needs_more_pixels_than_a_small_network(tmp_path: Path) -> None:
    plain = builders.pipeline_options_of(made(tmp_path))
    assert (plain.min_decode_side, plain.pixels) == (0, False)
    overlay = builders.pipeline_options_of(made(tmp_path, formats=["overlay"]))
    assert (overlay.min_decode_side, overlay.pixels) == (1024, True)
    small = made(tmp_path, **{"formats": ["overlay"], "overlay.max_side": 300})
    assert builders.pipeline_options_of(small).min_decode_side == 300


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
def test_devices_auto_is_every_card_or_device_auto_where_there_is_at_most_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, Any],
    cards: str,
    names: list[str],
) -> None:
    completed = subprocess.CompletedProcess([], 0, stdout=f"{cards}\n")
    monkeypatch.setattr(builders.subprocess, "run", lambda *_, **__: completed)
    assert builders.devices_of(made(tmp_path, **flags)) == names


def test_counting_the_cards_has_a_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(command: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(builders.subprocess, "run", hangs)
    with pytest.raises(ModelError) as caught:
        builders.devices_of(made(tmp_path, devices="auto", load_timeout_s=7))
    assert caught.value.place == "devices"


def test_workers_on_the_cpu_share_its_cores_unless_the_environment_sets_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builders, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settings = made(tmp_path)

    def threads() -> list[str]:
        specs = builders.worker_specs_of(settings, ["cpu", "cpu"])
        return [spec.env["OMP_NUM_THREADS"] for spec in specs]

    assert threads() == ["4", "4"]
    assert "OMP_NUM_THREADS" not in builders.worker_specs_of(settings, ["cuda:0", "cuda:1"])[0].env
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads() == ["3", "3"]


def test_objects_made_while_loading_are_exempt_from_garbage_collection(tmp_path: Path) -> None:
    try:
        builders.engine_of(made(tmp_path))
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        with builders.uncollected():
            assert not gc.isenabled()
        with pytest.raises(ModelError), builders.uncollected():
            raise ModelError("not there")
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_a_worker_spec_can_be_pickled_and_makes_engine_formats_and_options(
    tmp_path: Path,
) -> None:
    (spec, _) = builders.worker_specs_of(
        made(tmp_path, model="fake", formats=["mask", "opex"]), ["cpu", "cpu"]
    )
    setup = pickle.loads(pickle.dumps(spec.equip))()
    assert (setup.engine.info.name, len(setup.formats)) == ("fake", 2)
    assert setup.options.finish_threads >= 1
    assert setup.tiled_jobs.args == ("fake",), "the model whose tiles are kept"


def test_names_in_cvat_are_relative_to_the_folder_that_holds_input_and_done(tmp_path: Path) -> None:
    layout = builders.layout_of(made(tmp_path))
    assert layout.share_name(layout.done / "cam1" / "dog.jpg") == "done/cam1/dog.jpg"
    elsewhere = builders.layout_of(made(tmp_path, done=tmp_path / "tree" / "answered"))
    assert elsewhere.share_name(elsewhere.done / "dog.jpg") == "tree/answered/dog.jpg"


def test_folder_options_have_lease_attempts_and_the_absolute_sentinel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = builders.folder_options_of(
        made(tmp_path, lease_s=7, attempts=5, sentinel="here"), once=False
    )
    assert (options.lease_s, options.attempts, options.sentinel) == (7.0, 5, tmp_path / "here")
    assert builders.folder_options_of(made(tmp_path), once=False).sentinel is None


def test_embeddings_are_kept_on_a_disk_only_where_the_settings_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path / "models"))
    flags = {"input": str(tmp_path / "in"), "model": "demo"}
    assert builders.disk_cache_of(settings.load(None, env={}, flags=flags)) is None
    beside = builders.disk_cache_of(
        settings.load(None, env={}, flags={**flags, "cache.disk_mib": 1})
    )
    assert beside
    assert beside.folder.path == tmp_path / "models" / "embeddings"
    flags |= {"cache.disk_mib": 1, "cache.folder": str(tmp_path / "share")}
    named = builders.disk_cache_of(settings.load(None, env={}, flags=flags))
    assert named
    assert named.folder.path == tmp_path / "share"


def test_other_weights_or_another_yaml_are_another_network_for_kept_embeddings(
    tmp_path: Path,
) -> None:
    weights, yaml = tmp_path / "weights.pt", tmp_path / "model.yaml"
    weights.write_bytes(b"one")
    yaml.write_text("model: {a: 1}")

    def name(**flags: Any) -> str:
        given = {"input": str(tmp_path / "in"), "cache.disk_mib": 1, **flags}
        cache = builders.disk_cache_of(settings.load(None, env={}, flags=given))
        assert cache
        return cache.key("picture", ModelInfo("", "sam2", 1024, "cpu", "float32")).name

    names = [name(model="demo"), name(model=str(weights))]
    names += [name(model=str(weights), model_cfg=str(yaml))]
    yaml.write_text("model: {a: 2}")
    names += [name(model=str(weights), model_cfg=str(yaml))]
    weights.write_bytes(b"two")
    names += [name(model=str(weights), model_cfg=str(yaml))]
    assert len(set(names)) == 5
    assert name(model=str(weights), model_cfg=str(yaml)) == names[-1]
