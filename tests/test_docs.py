"""The pages say what is: every command, flag and exit code; their links lead somewhere, their shell lines parse."""

from __future__ import annotations

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
import typer.main
import yaml

from sam_poll import cli, images, prompts, waikato
from sam_poll.alarms import KINDS
from sam_poll.doors import scan, settle
from sam_poll.engines import catalog, memory
from sam_poll.errors import ExitCode
from sam_poll.pipeline import Sizes
from sam_poll.types import Everything

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
USAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
PROGRAM: Any = typer.main.get_command(cli.app)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def commands(group: Any = PROGRAM, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


COMMANDS = dict(commands())


def options(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")} | {"-h", "--help"}


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
    flags = [action.option_strings[-1] for action in waikato.parser()._actions]
    for flag in flags:
        assert flag == "--help" or f"`{flag}" in text, flag


# ── shell lines ──


def invocations(page: Path) -> Iterator[tuple[str, bool]]:
    """Each call of our programs on a page, and whether it is a whole line of a shell block (else: in running text)."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            line = re.sub(r".* run --rm sam-poll-(?:cpu|cuda) ", "sam-poll ", line)
            found = re.search(r"(?<![\w/.-])(?:\S*/bin/)?(sam-poll|sam_predict_poll) (.*)", line)
            if found and not re.match(r" *(cp|python|systemctl|journalctl|grep) ", line):
                yield f"{found[1]} {found[2]}", True
    for span in re.findall(r"`(sam-poll [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield span, False


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    return words[: next((n for n, word in enumerate(words) if word in (">", "|", "&&", "2>&1")), len(words))]


def parse(words: list[str]) -> None:
    """As the program would; whatever is wrong is raised."""
    if words[0] == "sam_predict_poll":
        waikato.parser().parse_args(words[1:])
        return
    command, rest = PROGRAM, words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(" ".join(words), list(rest))


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
        assert matching or words[1:] == ["models"] or words[1:3] == ["models", "list|download|verify"], line
        for flag in [word for word in words if word.startswith("-")]:
            assert flag in options(matching[0]), line


def test_the_shell_lines_are_found() -> None:
    whole = [line for page in PAGES for line, complete in invocations(page) if complete]
    assert len(whole) >= 30
    assert "sam-poll models download sam2.1_hiera_tiny" in [" ".join(words_of(line)) for line in whole]
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
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in text, page.name


@pytest.mark.parametrize(
    "file",
    [
        *PAGES,
        *(
            p
            for f in ("docker", "examples")
            for p in sorted((ROOT / f).rglob("*"))
            if p.suffix not in (".jpg", ".png", ".JPG") and p.is_file()
        ),
    ],
    ids=name_of,
)
def test_no_path_of_somebodys_machine(file: Path) -> None:
    assert not re.search(r"/root/|/home/(?!django)|/Users/", file.read_text(encoding="utf-8"))


def test_the_readme_shows_an_overlay_that_loads_quickly() -> None:
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert (ROOT / picture).stat().st_size < 150_000
    assert cv2.imread(str(ROOT / picture)) is not None


# ── what else the pages state ──


def test_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "sam_poll"
    for path in package.rglob("*.py"):
        if path.name != "__init__.py" and path.parent.name != "formats":
            assert path.relative_to(package).as_posix() in text, path


def test_architecture_states_the_waits_and_the_ladder_as_they_are() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    waits = (settle.RENAMED_S, settle.CLOSED_S, settle.LOCAL_S, settle.NETWORK_S)
    for wait in waits:
        assert f" {wait:g} s |" in text
    assert f"waits {scan.LONE_S:g} s (`LONE_S`)" in text
    assert f"({', '.join(map(str, memory.SIDES))}, not below" in text
    assert f"After {memory.PATIENCE} calls" in text
    assert f"up to {memory.MAX_PATIENCE:,}" in text


def test_models_lists_the_catalogue_with_its_sizes() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    listed = {
        name: int(size) for name, size in re.findall(r"^\| `(sam\S+)` \| SAM[ .\d]* \| (\d+) \|$", text, re.MULTILINE)
    }
    assert listed == {name: round(entry.size / 1e6) for name, entry in catalog.MODELS.items()}


@pytest.mark.parametrize(
    "words",
    [
        "ready at ",
        "watching ",
        " done: ",
        " rejected: ",
        " goes back: ",
        "took over ",
        "another daemon has taken it over",
        " stays in work/, to be taken over: ",
        " was deleted; it is made anew",
        " is over after ",
        " cannot be touched: ",
        "out of memory in ",
        ": trying again at ",
        "memory has been enough for a while: trying ",
        " files lay in work/ without a claim: they are back in ",
        " jobs answered (",
    ],
)
def test_log_lines_that_operations_explains_are_still_written_so(words: str) -> None:
    assert words in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert any(words in path.read_text(encoding="utf-8") for path in (ROOT / "sam_poll").rglob("*.py"))


@pytest.mark.parametrize("kind", KINDS)
def test_operations_says_what_each_alarm_means_and_what_to_do(kind: str) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{kind}` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert all(row)


def test_operations_lists_the_metrics_and_its_rules_use_no_others() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    source = (ROOT / "sam_poll" / "metrics.py").read_text(encoding="utf-8")
    made = set(re.findall(r'(Gauge|Counter|Histogram|Info)\(\s*"(\w+)"', source))
    endings = {"Counter": "_total", "Info": "_info"}
    names = {name + endings.get(kind, "") for kind, name in made}
    assert len(names) == 11
    assert set(re.findall(r"^\| `(sam_poll_\w+)", text, re.MULTILINE)) == names
    (block,) = re.findall(r"```yaml\n(groups:.*?)```", text, re.DOTALL)
    rules = yaml.safe_load(block)["groups"][0]["rules"]
    used = {name for rule in rules for name in re.findall(r"sam_poll_\w+", re.sub('"[^"]*"', "", rule["expr"]))}
    assert len(rules) == len({rule["alert"] for rule in rules})
    assert used
    assert used <= names


def test_operations_names_the_systemd_units_times_as_they_are() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    unit = (ROOT / "examples" / "systemd" / "sam-poll.service").read_text(encoding="utf-8")
    for word in re.findall(
        r"`((?:Type|WatchdogSec|TimeoutStartSec|RestartPreventExitStatus|PYTHONFAULTHANDLER)=[^`]*)`", text
    ):
        assert re.search(rf"^(Environment=)?{re.escape(word)}$", unit, re.MULTILINE), word


# ── examples ──


def drop_pair(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "drop_pair.py"
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60
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
    read = prompts.parse((here / f"{stem}.prompt").read_bytes()).prompts
    assert not isinstance(read, Everything)
    assert prompts.fit(read, images.read_header((here / f"{stem}.jpg").read_bytes()).size) == read


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
    assert int(service["TimeoutStopSec"]) > Sizes().drain_s
