"""Settings: precedence holds, every mistake is named with its line, config.yaml and the docs are
complete.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sam_poll.config import settings
from sam_poll.config.settings import Settings, env_name, keys, load
from sam_poll.core.errors import ExitCode, SettingsError
from sam_poll.core.yaml_reader import YamlError, read_yaml, scalar
from sam_poll.formats import registry
from tests.support.paths import ROOT

CONFIG = ROOT / "config.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(
    path: Path | None, *, env: dict[str, str] | None = None, flags: dict[str, Any] | None = None
) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        load(path, env=env or {}, flags=flags)
    said = str(caught.value)
    assert "pydantic" not in said
    assert "Input should" not in said
    assert "type=" not in said
    assert caught.value.exit_code == ExitCode.SETTINGS
    return caught.value


# ── the file in the project, the docs ──


def test_the_projects_config_holds_exactly_the_defaults() -> None:
    assert load(CONFIG, env={}) == Settings() == load(None, env={})


def test_the_projects_config_mentions_every_key_once() -> None:
    values, lines, found = read_yaml(CONFIG.read_text("utf-8"))
    assert not found
    assert {
        ".".join(str(p) for p in loc)
        for loc in lines
        if loc and not any(isinstance(p, int) for p in loc)
    } == {
        *keys(),
        *{key.split(".")[0] for key in keys()},
    }
    assert values["input"] == "/mnt/share/in"


def test_every_line_with_a_key_in_the_projects_config_is_explained() -> None:
    for line in CONFIG.read_text("utf-8").splitlines():
        if re.match(r"\s*\w+: \S", line):
            assert "# " in line, line


def test_the_docs_have_every_key_its_variable_and_its_default() -> None:
    text = (ROOT / "docs" / "settings.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `(SAM_POLL_\w+)` \|", text, re.M))
    assert rows == {key: env_name(key) for key in keys()}
    shown = dict(re.findall(r"^\| `([\w.]+)` \| `SAM_POLL_\w+` \| `([^`]*)` \|", text, re.M))
    assert {
        key: load(None, env={env_name(key): "" if value == "null" else value})
        for key, value in shown.items()
    } == {key: Settings() for key in keys()}
    for key, default in keys().items():
        assert (shown[key] == "null") == (default is None), key


def test_the_docs_examples_of_mistakes_are_what_is_said(config: Any) -> None:
    text = (ROOT / "docs" / "settings.md").read_text("utf-8")
    ((wrong, said),) = re.findall(r"```yaml\n(.*?)```.*?```text\n(.*?)```", text, re.S)
    path = config(wrong)
    assert str(refusal(path)).replace(str(path), "config.yaml").split() == said.split()


def test_every_key_can_be_set_by_the_environment() -> None:
    for key in keys():
        with pytest.raises(SettingsError, match=re.escape(f"environment, {env_name(key)}")):
            load(None, env={env_name(key): "\x00"})


# ── precedence ──


def test_the_file_is_weaker_than_the_environment_and_that_than_the_command_line(
    config: Any,
) -> None:
    path = config("load_timeout_s: 1\nwatch: {rescan_s: 1, settle_s: 1}\nmodel: a")
    env = {"SAM_POLL_WATCH__RESCAN_S": "2", "SAM_POLL_WATCH__SETTLE_S": "2", "SAM_POLL_MODEL": "b"}
    made = load(path, env=env, flags={"watch.settle_s": 3, "model": None})
    assert (made.load_timeout_s, made.watch.rescan_s, made.watch.settle_s, made.model) == (
        1,
        2,
        3,
        "b",
    )
    assert made.watch.mode == "auto"


def test_flags_may_be_dotted_or_nested_and_texts_are_read_as_their_setting_needs() -> None:
    flags = {
        "watch": {"mode": "poll"},
        "memory.min_side": "512",
        "formats": "mask, overlay",
        "input": Path("/a/in"),
    }
    made = load(None, env={}, flags=flags)
    assert (made.watch.mode, made.memory.min_side, made.formats, made.input) == (
        "poll",
        512,
        ("mask", "overlay"),
        Path("/a/in"),
    )


def test_variables_are_read_as_their_setting_needs() -> None:
    env = {
        "SAM_POLL_DEVICES": "cuda:0,cuda:1",
        "SAM_POLL_FORMATS": "[mask]",
        "SAM_POLL_MODEL": "5",
        "SAM_POLL_PAIR_TIMEOUT_S": "1e2",
        "SAM_POLL_PIPELINE__BATCH": "4",
        "SAM_POLL_LOG": "json",
    }
    made = load(None, env=env)
    assert (made.devices, made.formats, made.model) == (("cuda:0", "cuda:1"), ("mask",), "5")
    assert (made.pair_timeout_s, made.pipeline.batch, made.log) == (100.0, 4, "json")


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    assert (
        load(
            None,
            env={
                "SAM_POLL_LOAD_TIMEOUT_S": "",
                "SAM_POLL_MODEL": "",
                "MODEL": "",
                "SAM_POLL_CONFIG": "",
            },
        )
        == Settings()
    )


def test_the_cache_the_config_and_what_kubernetes_adds_are_no_settings() -> None:
    env = {
        "SAM_POLL_CACHE": "/c",
        "SAM_POLL_PORT": "tcp://10.0.0.1:80",
        "SAM_POLL_SERVICE_HOST": "10.0.0.1",
    }
    assert load(None, env=env | {"SAM_POLL_PORT_80_TCP_ADDR": "10.0.0.1"}) == Settings()


def test_kubernetes_may_have_a_service_whose_name_begins_with_ours() -> None:
    added = {
        "SAM_POLL_REDIS_PORT": "tcp://10.0.0.1:6379",
        "SAM_POLL_REDIS_PORT_6379_TCP_ADDR": "10.0.0.1",
        "SAM_POLL_REDIS_SERVICE_PORT_MAIN": "6379",
    }
    host = {"SAM_POLL_REDIS_SERVICE_HOST": "10.0.0.1"}
    assert load(None, env=added | host) == Settings()
    for name, value in added.items():
        with pytest.raises(SettingsError, match=name):
            load(None, env={name: value})
    with pytest.raises(SettingsError, match="SAM_POLL_REDIS_HOST"):
        load(None, env=host | {"SAM_POLL_REDIS_HOST": "10.0.0.1"})


def test_the_environment_may_name_the_config_and_an_explicit_one_wins(
    config: Any, tmp_path: Path
) -> None:
    env = {"SAM_POLL_CONFIG": str(config("load_timeout_s: 7"))}
    assert load(None, env=env).load_timeout_s == 7
    other = tmp_path / "other.yaml"
    other.write_text("load_timeout_s: 8")
    assert load(other, env=env).load_timeout_s == 8


def test_model_of_the_environment_counts_only_where_nobody_names_a_model(config: Any) -> None:
    env = {"MODEL": "sam_vit_b", "MODEL_CFG": "x.yaml"}
    made = load(config("load_timeout_s: 7"), env=env)
    assert (made.model, made.model_cfg) == ("sam_vit_b", "x.yaml")
    for made in (
        load(config("model: demo"), env=env),
        load(None, env=env | {"SAM_POLL_MODEL": "demo"}),
        load(None, env=env, flags={"model": "demo"}),
    ):
        assert (made.model, made.model_cfg) == ("demo", None)
    assert load(None, env={"MODEL_CFG": "x.yaml"}).model_cfg is None


def test_a_model_named_by_a_stronger_source_leaves_the_weaker_ones_yaml_behind(config: Any) -> None:
    path = config("model: /m/a.pt\nmodel_cfg: /m/a.yaml")
    assert load(path, env={"SAM_POLL_LOAD_TIMEOUT_S": "5"}).model_cfg == "/m/a.yaml"
    assert load(path, env={}, flags={"model": "demo"}).model_cfg is None
    assert load(path, env={}, flags={"model": "demo", "model_cfg": "b.yaml"}).model_cfg == "b.yaml"


def test_a_device_of_a_stronger_source_replaces_the_devices_of_a_weaker_one(config: Any) -> None:
    made = load(config("devices: [cuda:0, cuda:1]"), env={}, flags={"device": "cpu"})
    assert (made.device, made.devices) == ("cpu", ())
    made = load(config("device: cpu"), env={"SAM_POLL_DEVICES": "cuda:0,cuda:1"})
    assert (made.device, made.devices) == ("auto", ("cuda:0", "cuda:1"))


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("devices: auto", ("auto",)),
        ("devices: [auto]", ("auto",)),
        ("devices: [cpu, cpu]", ("cpu", "cpu")),
        ("devices: [cuda:1, cpu]", ("cuda:1", "cpu")),
    ],
)
def test_devices_may_be_all_cards_or_a_list_in_which_the_cpu_may_come_twice(
    config: Any, text: str, devices: tuple[str, ...]
) -> None:
    assert load(config(text), env={}).devices == devices
    assert load(None, env={"SAM_POLL_DEVICES": ",".join(devices)}).devices == devices


def test_device_and_devices_in_one_source_are_refused(config: Any) -> None:
    assert "both set" in refusal(config("device: cpu\ndevices: [cuda:0]")).reason


def test_compile_is_torchs_and_not_openvinos(config: Any) -> None:
    assert "both set" in refusal(config("compile: true\nruntime: openvino")).reason
    assert load(config("compile: true\nruntime: torch"), env={}).compile


# ── mistakes in the file ──


@pytest.mark.parametrize(
    ("text", "line", "key", "said"),
    [
        ("\n\nload_timeout: 5", 3, "load_timeout", "unknown key (did you mean load_timeout_s?)"),
        ("watch:\n  mode: poll\n  rescan: 3", 3, "watch.rescan", "did you mean rescan_s?"),
        ("watch: {\n mode: poll,\n mood: 3}", 3, "watch.mood", "unknown key (did you mean mode?)"),
        ("rescan_s: 3", 1, "rescan_s", "unknown key here (did you mean watch.rescan_s?)"),
        ("zzzz: 3", 1, "zzzz", "see docs/settings.md"),
        (
            "load_timeout_s: '60'",
            1,
            "load_timeout_s",
            'not a number: it is the text "60" (write the number without quotes)',
        ),
        ("load_timeout_s: true", 1, "load_timeout_s", "not a number: it is true"),
        ("load_timeout_s: [1]", 1, "load_timeout_s", "not a number: it is a list"),
        ("load_timeout_s:", 1, "load_timeout_s", "not a number: it is null"),
        ("load_timeout_s: 0", 1, "load_timeout_s", "must be more than 0"),
        ("load_timeout_s: .nan", 1, "load_timeout_s", "not a finite number"),
        ("load_timeout_s: .inf", 1, "load_timeout_s", "not a finite number"),
        ("load_timeout_s: " + "9" * 5000, 1, "load_timeout_s", "not a finite number"),
        ("load_timeout_s: 12:30", 1, "load_timeout_s", 'not a number: it is the text "12:30"'),
        ("watch:\n  mode: on", 2, "watch.mode", 'not auto, events or poll: it is the text "on"'),
        ("log: off", 1, "log", 'not auto, text or json: it is the text "off"'),
        ("watch: 5", 1, "watch", "not an object with keys: it is 5"),
        ("watch: {settle_s: soon}", 1, "watch.settle_s", "not a number or auto"),
        (
            "memory: {budget_mib: 1.5}",
            1,
            "memory.budget_mib",
            "not a whole number or auto: it is 1.5",
        ),
        ("memory: {budget_mib: 0}", 1, "memory.budget_mib", "must be at least 1"),
        ("memory: {min_side: 300}", 1, "memory.min_side", "not 256, 512, 768 or 1024: it is 300"),
        ("contours: {tolerance_px: -1}", 1, "contours.tolerance_px", "must be at least 0"),
        ("formats: mask", 1, "formats", "not a list: it is the text"),
        ("formats: []", 1, "formats", "needs at least 1"),
        ("formats:\n- mask\n- opxe", 3, "formats[1]", 'no format "opxe" (did you mean opex?)'),
        ("formats: [mask, mask]", 1, "formats", "lists mask twice"),
        ("device: gpu", 1, "device", "not a device"),
        ("devices: [cuda:0, tpu]", 1, "devices[1]", "not a device"),
        ("devices: [cuda:0, cuda:0]", 1, "devices", "lists cuda:0 twice"),
        ("devices: [cuda, cuda:1]", 1, "devices", "number the GPUs"),
        ("devices: [auto, cpu]", 1, "devices", "cannot be one of several"),
        ("pipeline: {batch_wait_ms: -1}", 1, "pipeline.batch_wait_ms", "must be at least 0"),
        ("compile: 1", 1, "compile", "not true or false"),
        ("lease_s: 1.5", 1, "lease_s", "must be at least 2"),
        ("lease_s:", 1, "lease_s", "not a number: it is null"),
        ("attempts: 0", 1, "attempts", "must be at least 1"),
        ("attempts: 2.5", 1, "attempts", "not a whole number: it is 2.5"),
        ("sentinel: ''", 1, "sentinel", "is blank"),
        ("sentinel: $SHARE/here", 1, "sentinel", "holds a variable"),
        ("health:\n  stuck_s: 0", 2, "health.stuck_s", "must be more than 0"),
        ("health:\n  file: [x]", 2, "health.file", "not a path: it is a list"),
        (
            "health: {metrics: soon}",
            1,
            "health.metrics",
            'not an address: "soon" (127.0.0.1:9464 (host:port), or',
        ),
        ("health: {metrics: 0}", 1, "health.metrics", "not an address"),
        ("health: {metrics: 65536}", 1, "health.metrics", "not an address"),
        ("health: {metrics: 'a b:80'}", 1, "health.metrics", "not an address"),
        ("health: {metrics: true}", 1, "health.metrics", "not a text: it is true"),
        ("health: {metrics: 1.5}", 1, "health.metrics", "not a text: it is 1.5"),
        ("metrics: 9464", 1, "metrics", "unknown key here (did you mean health.metrics?)"),
        ("input: 5", 1, "input", "not a path: it is 5"),
        ("input: ''", 1, "input", "is blank"),
        ("output: $HOME/out", 1, "output", "holds a variable"),
        ("output: ~nobody-of-this-name/out", 1, "output", "home folder that does not exist"),
        ("model:", 1, "model", "not a text: it is null"),
        ("model: ' '", 1, "model", "is blank"),
        (
            "load_timeout_s: 5\n\nload_timeout_s: 6",
            3,
            "load_timeout_s",
            "given twice, first in line 1",
        ),
        ("watch:\n  mode: poll\n  mode: poll", 3, "watch.mode", "given twice, first in line 2"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(
    config: Any, text: str, line: int, key: str, said: str
) -> None:
    path = config(text)
    error = refusal(path)
    assert error.place == f"{path}, line {line}, {key}"
    assert said in str(error)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("load_timeout_s: 5\nwatch: {mode: poll", 2, "not YAML"),
        ("load_timeout_s: 5\n\tlog: text", 2, "not YAML"),
        ("a: 1\n b: 2", 2, "not YAML"),
        ("a: 1\n---\nb: 2", 2, "single document"),
        ("a: &x 1\nb: *x", 2, "aliases"),
        ("model: 1\nlog: !!python/object/apply:os.system [x]", 2, "tag"),
        ("? [a, b]\n: 1", 1, "a key must be a word"),
        ("model: a\nlog: \x07", 2, "character"),
        (b"model: a\nlog: \xe9", 2, "not UTF-8"),
        ("model: a".encode("utf-16"), 1, "not UTF-8"),
        ("[" * 5000, None, "nested too deeply"),
        ("- a\n- b", None, "contains no keys"),
        ("watch", None, "contains no keys"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(
    config: Any, text: str | bytes, line: int | None, said: str
) -> None:
    path = config(text)
    error = refusal(path)
    assert error.place == (f"{path}, line {line}" if line else str(path))
    assert said in error.reason


def test_all_mistakes_are_listed_at_once_from_the_top_of_the_file(config: Any) -> None:
    text = str(
        refusal(
            config("lgo: text\nload_timeout_s: x\nwatch:\n  mode: never"),
            env={"SAM_POLL_LOAD_TIMEOUT": "1"},
        )
    )
    assert text.startswith("4 problems in the settings:")
    assert re.findall(r"line (\d+), ([\w.]+)", text) == [
        ("1", "lgo"),
        ("2", "load_timeout_s"),
        ("4", "watch.mode"),
    ]
    assert (
        "environment, SAM_POLL_LOAD_TIMEOUT: unknown setting (did you mean "
        "SAM_POLL_LOAD_TIMEOUT_S?)" in text
    )


def test_a_file_with_hundreds_of_mistakes_is_not_listed_whole(config: Any) -> None:
    text = str(refusal(config("\n".join(f"key_{i}: 1" for i in range(300)))))
    assert text.startswith("300 problems")
    assert text.endswith("… and 280 more")


def test_a_mistake_is_told_even_where_a_stronger_source_hides_it(config: Any) -> None:
    assert "load_timeout_s" in str(
        refusal(config("load_timeout_s: x"), env={"SAM_POLL_LOAD_TIMEOUT_S": "5"})
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.yaml", "does not exist"),
        (".", "is a folder"),
        ("x" * 300, "cannot be read"),
        ("a\0b", "does not exist|cannot"),
    ],
)
def test_a_settings_file_that_is_none_is_refused(tmp_path: Path, name: str, said: str) -> None:
    error = refusal(tmp_path / name)
    assert re.search(said, error.reason)
    assert str(error).isprintable()


def test_a_settings_file_that_never_ends_or_blocks_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    assert "is not a file" in refusal(tmp_path / "fifo.yaml").reason
    (tmp_path / "big.yaml").write_bytes(b"#" * (settings.MAX_FILE_BYTES + 1))
    assert "larger than" in refusal(tmp_path / "big.yaml").reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_settings_file_that_may_not_be_read_is_refused(config: Any) -> None:
    path = config("log: text")
    path.chmod(0)
    assert "cannot be read" in refusal(path).reason


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "watch:\n", "\ufeffwatch:\n  # all left out\n", "---\n"]
)
def test_a_file_that_sets_nothing_gives_the_defaults(config: Any, text: str) -> None:
    assert load(config(text), env={}) == Settings()


# ── mistakes elsewhere ──


def test_an_unknown_variable_is_refused_with_the_nearest() -> None:
    error = refusal(None, env={"SAM_POLL_WATCH_MODE": "poll"})
    assert (error.place, error.remedy) == (
        "environment, SAM_POLL_WATCH_MODE",
        "did you mean SAM_POLL_WATCH__MODE?",
    )


def test_a_group_in_the_environment_is_told_how_to_set_its_keys() -> None:
    assert "SAM_POLL_WATCH__MODE" in str(
        refusal(None, env={"SAM_POLL_WATCH": "{mode: poll}"}).remedy
    )


def test_a_wrong_flag_is_named() -> None:
    assert refusal(None, flags={"watch.mode": "never"}).place == "command line, watch.mode"
    assert refusal(None, flags={"wach": 1}).remedy == "did you mean watch?"


def test_a_variable_that_is_not_unicode_is_a_path_or_refused() -> None:
    names = {
        "input",
        "output",
        "work",
        "done",
        "failed",
        "model",
        "model_cfg",
        "sentinel",
        "cache.folder",
        "health.file",
        "serve.token_file",
        "watch.ignore",
    }
    made = load(None, env={env_name(key): f"/a/{key}\udcff" for key in names})
    assert made.folders.output == Path("/a/output\udcff")
    for key in keys().keys() - names:
        refusal(None, env={env_name(key): "\udcff"})


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", "127.0.0.1:9464"),
        ("'9464'", "127.0.0.1:9464"),
        ("0.0.0.0:80", "0.0.0.0:80"),
        ("localhost:09464", "localhost:9464"),
        ("'[::1]:9464'", "[::1]:9464"),
        ("null", None),
    ],
)
def test_a_bare_port_is_one_of_this_machine_only(
    config: Any, text: str, address: str | None
) -> None:
    assert load(config(f"health: {{metrics: {text}}}"), env={}).health.metrics == address
    variable = "" if address is None else text.strip("'")
    assert load(None, env={"SAM_POLL_HEALTH__METRICS": variable}).health.metrics == address


def test_no_port_is_opened_and_no_file_touched_unless_asked() -> None:
    assert (Settings().health.metrics, Settings().health.file, Settings().sentinel) == (
        None,
        None,
        None,
    )


# ── folders ──


def test_the_other_folders_are_siblings_of_input_by_default() -> None:
    made = load(None, env={}, flags={"input": "/data/x/drop"}).folders
    assert [str(p) for p in (made.input, made.output, made.work, made.done, made.failed)] == [
        "/data/x/drop",
        "/data/x/out",
        "/data/x/work",
        "/data/x/done",
        "/data/x/failed",
    ]


def test_home_is_expanded_and_relative_folders_count_from_the_current_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    made = load(None, env={}, flags={"input": "a/../in", "output": "~/out", "model": "~/m.pt"})
    assert (made.folders.input, made.folders.output, made.folders.work, made.model) == (
        tmp_path / "in",
        Path("/home/me/out"),
        tmp_path / "work",
        "/home/me/m.pt",
    )


@pytest.mark.parametrize("name", ["output", "work", "done", "failed"])
def test_a_folder_inside_input_is_refused_with_the_remedy(config: Any, name: str) -> None:
    path = config(f"input: /s/in\n{name}: /s/x/../in/deep/x")
    error = refusal(path)
    assert error.place == f"{path}, line 2, {name}"
    assert "is inside input (/s/in)" in error.reason
    assert (
        error.remedy == f"put it beside input, for example /s/{'out' if name == 'output' else name}"
    )


@pytest.mark.parametrize("path", ["/s/in", "/s/in/cache", "/s/done/cache", "/s/out"])
def test_a_cache_inside_a_folder_of_the_share_is_refused_with_the_remedy(path: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(None, env={}, flags={"input": "/s/in", "cache.folder": path})
    assert caught.value.place == "command line, cache.folder"
    assert f"{path} is inside" in caught.value.reason
    assert caught.value.remedy == "put it beside input, for example /s/embeddings"
    beside = load(None, env={}, flags={"input": "/s/in", "cache.folder": "/s/embeddings"})
    assert beside.cache.folder == Path("/s/embeddings")


@pytest.mark.parametrize("name", ["output", "work", "done", "failed"])
def test_an_input_inside_another_folder_is_refused(name: str) -> None:
    assert (
        "input (/s/in) is inside /s" in refusal(None, flags={"input": "/s/in", name: "/s"}).reason
    )


def test_equal_folders_are_refused() -> None:
    assert "is also input" in refusal(None, flags={"input": "/s/in", "done": "/s/in/"}).reason
    assert "is also output" in refusal(None, flags={"input": "/s/in", "done": "/s/out"}).reason
    assert "is also input" in refusal(None, flags={"input": "/s/work"}).reason


def test_a_name_that_only_begins_like_input_is_another_folder() -> None:
    assert load(None, env={}, flags={"input": "/s/in", "output": "/s/in2"}).folders.output == Path(
        "/s/in2"
    )


def test_done_may_be_the_output_where_it_is_asked_for() -> None:
    flags = {"input": "/s/in", "output": "/s/o", "done": "/s/o"}
    made = load(None, env={}, flags=flags, done_may_be_output=True)
    assert made.folders.done == made.folders.output
    with pytest.raises(SettingsError, match="also work"):
        load(None, env={}, flags=flags | {"work": "/s/o"}, done_may_be_output=True)


# ── words ──


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("010", 10),
        ("-5", -5),
        (".5", 0.5),
        ("5.", 5.0),
        ("on", "on"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("-.inf", float("-inf")),
        ("٣", "٣"),
    ],
)
def test_plain_words_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_quotes_make_a_text_of_anything() -> None:
    values, _, _ = read_yaml("a: '5'\nb: \"true\"\nc: ''\nd: |\n  5\n")
    assert values == {"a": "5", "b": "true", "c": "", "d": "5\n"}


@given(st.text(max_size=80) | st.text("abc:-[]{},#&*!|>'\"%@` \n\t?~", max_size=60))
@hypothesis_settings(deadline=None, max_examples=400)
def test_no_text_brings_anything_but_values_or_a_word(text: str) -> None:
    try:
        _, lines, _ = read_yaml(text)
    except YamlError as error:
        assert error.reason  # noqa: PT017 - it may raise, it need not
        return
    assert all(line >= 1 for line in lines.values())


@given(
    st.dictionaries(
        st.sampled_from([*keys(), "x", "watch", "a.b"]),
        st.none() | st.integers() | st.text(max_size=9),
    )
)
@hypothesis_settings(deadline=None, max_examples=150)
def test_no_flags_bring_anything_but_settings_or_their_error(flags: dict[str, Any]) -> None:
    try:
        made = load(None, env={}, flags=flags)
    except SettingsError:
        return
    assert isinstance(made, Settings)


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Settings().load_timeout_s = 5  # type: ignore[misc]


def test_the_formats_are_those_that_there_are() -> None:
    assert load(None, env={}, flags={"formats": registry.names()}).formats == tuple(
        registry.names()
    )


def test_importing_the_settings_brings_neither_torch_nor_opencv() -> None:
    code = (
        "import sys, sam_poll.config.settings; sys.exit(any(m in sys.modules for m in "
        "('torch', 'cv2', 'loguru')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_in_force_names_the_strongest_source_of_each_setting(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: demo\nwatch:\n  rescan_s: 5\nlease_s: 9\n")
    env = {"SAM_POLL_LEASE_S": "8", "MODEL": "weak"}
    flags = {"input": tmp_path / "in", "lease_s": None}
    loaded = load(file, env=env, flags=flags)
    found = {one.key: one for one in settings.in_force(loaded, file, env=env, flags=flags)}
    assert list(found) == list(settings.keys())
    assert found["model"].where == f"{file}, line 1, model"
    assert found["watch.rescan_s"].where == f"{file}, line 3, watch.rescan_s"
    assert (found["lease_s"].value, found["lease_s"].where) == (8, "environment, SAM_POLL_LEASE_S")
    assert found["input"].where == "command line, input"
    assert (found["attempts"].value, found["attempts"].where) == (3, "default")
