"""The pages say what is: every command, flag and exit code; their links lead somewhere, their shell
lines parse.
"""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
import yaml

from sam_poll.cli import waikato_poll
from sam_poll.core.alarms import KINDS
from sam_poll.core.errors import ExitCode
from sam_poll.core.types import AutomaticMaskRequest
from sam_poll.engines import catalog, hub
from sam_poll.engines.memory import plan
from sam_poll.formats import registry
from sam_poll.imaging import decode
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.prompts import parser
from sam_poll.share.intake import scanner, stability
from tests.support.paths import ROOT
from tests.support.shell_lines import commands, parse

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
)
USAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


COMMANDS = dict(commands())


def options(command: Any) -> set[str]:
    return {
        flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")
    } | {"-h", "--help"}


def section(command: tuple[str, ...]) -> str:
    """The part of usage.md that is about a command, or about its group."""
    parts = re.split(r"^## ", USAGE, flags=re.MULTILINE)
    own = [p for p in parts if re.match(rf"`sam-poll {' '.join(command)}\b", p)]
    (found,) = own or [p for p in parts if re.match(rf"`sam-poll {command[0]}\b", p)]
    return found


# ── commands, flags, exit codes ──


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_every_flag_is_in_usage_and_has_help(command: tuple[str, ...]) -> None:
    text = section(command)
    assert f"`sam-poll {' '.join(command)}" in text
    assert COMMANDS[command].help
    for parameter in COMMANDS[command].params:
        flags = [flag for flag in parameter.opts if flag.startswith("-")]
        for flag in flags:
            assert f"`{flag}`" in text, f"{flag} of {' '.join(command)}"
        assert not flags or parameter.help, flags


@pytest.mark.parametrize("code", ExitCode, ids=lambda code: code.name)
def test_every_exit_code_is_in_usage_and_in_the_readme(code: ExitCode) -> None:
    assert f"| {code.value} | `{code.name}` |" in USAGE
    assert f"\n| {code.value} | " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_of_the_drop_in_is_in_its_page() -> None:
    text = (ROOT / "docs" / "waikato.md").read_text(encoding="utf-8")
    flags = [action.option_strings[-1] for action in waikato_poll.parser()._actions]
    for flag in flags:
        assert flag == "--help" or f"`{flag}" in text, flag


# ── shell lines ──


def invocations(page: Path) -> Iterator[tuple[str, bool]]:
    """Each call of our programs on a page, and whether it is a whole line of a shell block (else:
    in running text).
    """
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            line = re.sub(r".* run --rm sam-poll-(?:cpu|cuda) ", "sam-poll ", line)
            found = re.search(
                r"(?<![\w/.-])(?:\S*/bin/)?(sam-poll|sam(?:hq)?_predict_poll) (.*)", line
            )
            if found and not re.match(r" *(cp|python|systemctl|journalctl|grep) ", line):
                yield f"{found[1]} {found[2]}", True
    for span in re.findall(r"`(sam-poll [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield span, False


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    return words[
        : next((n for n, word in enumerate(words) if word in (">", "|", "&&", "2>&1")), len(words))
    ]


@pages
def test_shell_lines_parse(page: Path) -> None:
    for line, whole in invocations(page):
        if whole:
            try:
                parse(words_of(line))
            except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, the line is named
                pytest.fail(f"{name_of(page)}: {line}: {error!r}")


@pages
def test_commands_in_running_text_exist_with_their_flags(page: Path) -> None:
    for line, whole in invocations(page):
        words = line.replace("[", " ").replace("]", " ").split()
        if whole or words[1] in ("COMMAND", "--version"):
            continue
        matching = [c for name, c in COMMANDS.items() if list(name) == words[1 : 1 + len(name)]]
        assert (
            matching or words[1:] == ["models"] or words[1:3] == ["models", "list|download|verify"]
        ), line
        for flag in [word for word in words if word.startswith("-")]:
            assert flag in options(matching[0]), line


def test_the_shell_lines_are_found() -> None:
    whole = [line for page in PAGES for line, complete in invocations(page) if complete]
    assert len(whole) >= 30
    assert "sam-poll models download sam2.1_hiera_tiny" in [
        " ".join(words_of(line)) for line in whole
    ]
    with pytest.raises(Exception, match="bogus"):
        parse(["sam-poll", "watch", "--bogus"])


# ── links, snippets, paths ──


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pages
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pages
def test_python_blocks_compile(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, name_of(page), "exec")


def test_the_index_names_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "docs").as_posix()
        assert path == "README.md" or f"({path})" in text, path


@pytest.mark.parametrize(
    "file",
    [
        *PAGES,
        *(
            p
            for f in ("docker", "examples")
            for p in sorted((ROOT / f).rglob("*"))
            if p.suffix not in (".jpg", ".png", ".JPG", ".pyc") and p.is_file()
        ),
    ],
    ids=name_of,
)
def test_no_path_of_somebodys_machine(file: Path) -> None:
    assert not re.search(r"/root/|/home/(?!django)|/Users/", file.read_text(encoding="utf-8"))


def test_the_readme_shows_pictures_that_load_quickly() -> None:
    pictures = re.findall(
        r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    assert len(pictures) == 2
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 150_000
        assert cv2.imread(str(ROOT / picture)) is not None


# ── what else the pages state ──


def test_every_package_names_its_modules_and_packages_in_its_docstring() -> None:
    for init in (ROOT / "sam_poll").rglob("__init__.py"):
        inside = {path.stem for path in init.parent.glob("*.py")} - {"__init__", "__main__"}
        inside |= {path.parent.name for path in init.parent.glob("*/__init__.py")}
        if init.parent.name == "formats":
            inside -= set(registry.names())  # the registry lists the formats
        if init.parent.name != "sam_poll":
            text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
            assert not [name for name in inside if not re.search(rf"\b{name}\b", text)], init


def test_architecture_names_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for init in (ROOT / "sam_poll").glob("*/__init__.py"):
        assert f"`{init.parent.name}`" in text, init


def test_architecture_states_the_waits_and_the_ladder_as_they_are() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    waits = (stability.RENAMED_S, stability.CLOSED_S, stability.LOCAL_S, stability.NETWORK_S)
    for wait in waits:
        assert f" {wait:g} s |" in text
    assert f"picture waits {scanner.LONE_S:g} s, or" in text
    assert f"({', '.join(map(str, plan.SIDES))}, not below" in re.sub(r"\s+", " ", text)
    assert f"after {plan.PATIENCE} successful calls" in text
    assert f"up to {plan.MAX_PATIENCE:,}" in text


def test_models_lists_the_catalogue_with_its_sizes() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    listed = {
        name: int(size)
        for name, size in re.findall(
            r"^\| `(\w\S+)` \| (?:SAM[ .\d]*|SAM-HQ|MobileSAM|EdgeTAM) \| (\d+) \|$",
            text,
            re.MULTILINE,
        )
    }
    known = {**catalog.MODELS, **hub.MODELS}
    assert listed == {name: round(entry.size / 1e6) for name, entry in known.items()}


@pytest.mark.parametrize(
    "words",
    [
        "ready at ",
        "watching ",
        " done: ",
        " rejected: ",
        " is requeued: ",
        "took over ",
        "another daemon has taken it over",
        " and ended it, or its files in work/ were deleted",
        " is not readable: its contents wait",
        "; only the jobs that need it wait",
        "the hold on ",
        "cannot be put away (",
        " stays in work/, to be taken over: ",
        " was deleted; it is created again",
        " is over after ",
        " cannot be touched: ",
        "out of memory in ",
        ": trying again at ",
        "cached embeddings are evicted",
        " does not fit any more: going down to ",
        "memory is back: going up to ",
        "memory has been enough for a while: trying ",
        "; the next one starts in ",
        " jobs did not finish within ",
        "shutdown timed out; exiting. Unfinished jobs will be recovered",
        " more prompts wait for their pictures; ",
        "no picture came with the prompt: it was answered on ",
        "another share is mounted here than at the start",
        " files in work/ had no claim: moved back to ",
        " jobs answered (",
    ],
)
def test_log_lines_that_operations_explains_are_still_written_so(words: str) -> None:
    assert words in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert any(
        words in path.read_text(encoding="utf-8") for path in (ROOT / "sam_poll").rglob("*.py")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_operations_says_what_each_alarm_means_and_what_to_do(kind: str) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{kind}` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert all(row)


def test_metrics_are_listed_and_the_rules_for_alerts_use_no_others() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    source = (ROOT / "sam_poll" / "runtime" / "metrics.py").read_text(encoding="utf-8")
    made = set(re.findall(r'(Gauge|Counter|Histogram|Info)\(\s*"(\w+)"', source))
    endings = {"Counter": "_total", "Info": "_info"}
    names = {name + endings.get(kind, "") for kind, name in made}
    assert len(names) == 12
    assert set(re.findall(r"^\| `(sam_poll_\w+)", text, re.MULTILINE)) == names
    (block,) = re.findall(r"```yaml\n(groups:.*?)```", text, re.DOTALL)
    rules = yaml.safe_load(block)["groups"][0]["rules"]
    used = {
        name
        for rule in rules
        for name in re.findall(r"sam_poll_\w+", re.sub('"[^"]*"', "", rule["expr"]))
    }
    assert len(rules) == len({rule["alert"] for rule in rules})
    assert used
    assert used <= names


def test_operations_names_the_systemd_units_times_as_they_are() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    unit = (ROOT / "examples" / "systemd" / "sam-poll.service").read_text(encoding="utf-8")
    for word in re.findall(
        r"`((?:Type|WatchdogSec|TimeoutStartSec|RestartPreventExitStatus|PYTHONFAULTHANDLER)=[^`]*)`",
        text,
    ):
        assert re.search(rf"^(Environment=)?{re.escape(word)}$", unit, re.MULTILINE), word


# ── examples ──


def drop_pair(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "drop_pair.py"
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_drop_pair_drops_both_and_leaves_nothing_else(tmp_path: Path) -> None:
    here = ROOT / "examples" / "waikato"
    done = drop_pair(here / "box.jpg", here / "box.prompt", tmp_path / "in" / "cam1")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "in" / "cam1").iterdir()) == ["box.jpg", "box.prompt"]
    assert (tmp_path / "in/cam1/box.jpg").read_bytes() == (here / "box.jpg").read_bytes()


def test_drop_pair_overwrites_nothing_and_refuses_a_prompt_of_another_name(tmp_path: Path) -> None:
    here = ROOT / "examples" / "waikato"
    (tmp_path / "box.jpg").write_bytes(b"mine")
    again = drop_pair(here / "box.jpg", here / "box.prompt", tmp_path)
    assert again.returncode == 1
    assert "already there" in again.stderr
    other = drop_pair(here / "box.jpg", here / "points.prompt", tmp_path)
    assert other.returncode == 1
    assert "box.json" in other.stderr
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("box.jpg", b"mine")]


@pytest.mark.parametrize("stem", ["box", "points"])
def test_waikatos_examples_fit_their_pictures(stem: str) -> None:
    here = ROOT / "examples" / "waikato"
    read = parser.parse((here / f"{stem}.prompt").read_bytes()).prompts
    assert not isinstance(read, AutomaticMaskRequest)
    assert parser.fit(read, decode.read_header((here / f"{stem}.jpg").read_bytes()).size) == read


def test_the_systemd_unit_calls_us_rightly_and_does_not_repeat_hopeless_starts() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "examples" / "systemd" / "sam-poll.service", encoding="utf-8")
    service = unit["Service"]
    program, *arguments = service["ExecStart"].split()
    assert Path(program).name == "sam-poll"
    parse(["sam-poll", *arguments])
    hopeless = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert hopeless == {ExitCode.USAGE, ExitCode.SETTINGS}
    assert int(service["TimeoutStopSec"]) > PipelineOptions().drain_s
