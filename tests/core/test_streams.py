"""Every program on streams that are closed, full, unread, not UTF-8, or of no width: run by a real
shell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sam_poll.core.errors import ExitCode
from tests.conftest import Share, picture_bytes
from tests.support.paths import ROOT

LONG = (
    "a-long-name-" * 12 + "of-a-picture.jpg"
)  # wider than the 80 columns that a pipe is taken to have
SAM_POLL = "from sam_poll.cli.main import main; main()"
PROGRAMS = {
    "sam_predict_poll": "from sam_poll.cli.waikato_poll import main; main()",
    "sam_predict_redis": "from sam_poll.cli.waikato_redis import predict_main; predict_main()",
    "sam_test_redis_send": "from sam_poll.cli.waikato_redis import send_main; send_main()",
    "sam_test_redis_recv": "from sam_poll.cli.waikato_redis import recv_main; recv_main()",
    "samhq_predict_poll": "from sam_poll.cli.waikato_poll import hq_main; hq_main()",
}


def shell(
    arguments: str, redirected: str = "", program: str = SAM_POLL, **env: str
) -> subprocess.CompletedProcess:
    """`sam-poll ARGUMENTS REDIRECTED` in a shell with `pipefail`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SAM_POLL_", "COLUMNS", "LINES"))
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = f"set -o pipefail; '{sys.executable}' -c '{program}' {arguments} {redirected}"
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        env={**kept, "PYTHONPATH": path, **env},
        timeout=120,
        check=False,
        encoding="utf-8",
    )


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dog.jpg"
    path.write_bytes(picture_bytes(width=200, height=100))
    return path


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
def test_a_daemon_works_with_any_of_its_streams_closed(share: Share, closed: str) -> None:
    share.pair("dog")
    done = shell(f"watch '{share.input}' --once -m fake -f mask", closed)
    assert done.returncode == ExitCode.OK
    assert share.tree("output") == ["dog.mask.png"]


@pytest.mark.parametrize("closed", CLOSED)
def test_no_file_and_no_process_gets_the_number_of_a_closed_stream(
    tmp_path: Path, closed: str
) -> None:
    """Else what a library writes to stderr would go into that file."""
    seen = tmp_path / "seen"
    code = (
        "import os, subprocess, sys; from pathlib import Path; "
        "from sam_poll.cli import error_handling as reporting; "
        'inner = "import os; print([os.path.exists(f\\"/proc/self/fd/{n}\\") for n in '
        "range(3)], "
        f'file=open(\\"{seen}\\", \\"w\\"))"; '
        'look = lambda: (print("x"), print("x", file=sys.stderr), '
        f'Path("{tmp_path}").joinpath("ours").write_text("mine"), '
        'subprocess.run([sys.executable, "-c", inner])); '
        "reporting.run(look)"
    )
    assert shell("", closed, code).returncode == ExitCode.OK
    assert seen.read_text() == "[True, True, True]\n"
    assert (tmp_path / "ours").read_text() == "mine"


@pytest.mark.parametrize("arguments", ["--help", "models list", "schema"])
def test_output_that_cannot_be_written_is_one_line_of_error(arguments: str) -> None:
    done = shell(arguments, ">/dev/full")
    assert done.returncode == ExitCode.SHARE
    assert done.stderr == "error: standard output: No space left on device\n"


def test_a_log_that_cannot_be_written_stops_no_work(share: Share) -> None:
    share.pair("dog")
    assert shell(f"watch '{share.input}' --once -m fake", "2>/dev/full").returncode == ExitCode.OK
    assert len(share.tree("output")) == 2


def test_answers_are_written_whether_the_table_of_them_can_be_or_not(
    picture: Path, tmp_path: Path
) -> None:
    done = shell(
        f"predict '{picture}' --box 1,1,50,50 -m fake -f mask -o '{tmp_path}/o'", ">/dev/full"
    )
    assert done.returncode == ExitCode.SHARE
    assert "Traceback" not in done.stderr
    assert (tmp_path / "o" / "dog.mask.png").is_file()


@pytest.mark.parametrize("arguments", ["--help", "--version", "models list", "schema"])
def test_a_reader_that_leaves_ends_a_command_quietly_with_its_own_code(arguments: str) -> None:
    done = shell(arguments, "| true")
    assert (done.returncode, done.stderr) == (ExitCode.OK, "")


def test_check_stops_when_nobody_reads_what_it_has_found(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number}.json").write_text("{")
    done = shell(f"check '{tmp_path}'", "| head -1")
    assert done.returncode == ExitCode.FAILED_JOBS
    assert len(done.stdout.splitlines()) == 1
    assert "3000 wrong" not in done.stderr


def test_what_the_encoding_lacks_is_escaped(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # away from the checkout's config.yaml
    command = f"predict '{picture}' --box 1,1,50,50 --label Küche -m fake -f mask -o '{tmp_path}/o'"
    done = shell(command, PYTHONIOENCODING="ascii")
    assert done.returncode == ExitCode.OK
    assert "K\\xfcche" in done.stdout
    done = shell("watch --once", PYTHONIOENCODING="ascii")
    assert done.returncode == ExitCode.USAGE
    assert "-> name the input folder, or a settings file: `-c config.yaml`" in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_prints_its_help_in_ascii(program: str) -> None:
    done = shell(
        "--help",
        program=PROGRAMS[program],
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        COLUMNS="0",
    )
    assert (done.returncode, done.stderr) == (ExitCode.OK, "")
    assert program in done.stdout
    assert done.stdout.isascii()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_reports_a_full_stdout(program: str) -> None:
    done = shell("--help", ">/dev/full", PROGRAMS[program])
    assert (done.returncode, done.stderr) == (
        ExitCode.SHARE,
        "error: standard output: No space left on device\n",
    )


@pytest.mark.parametrize("columns", ["0", "1", "-7", "many", "99999999999"])
def test_a_senseless_width_is_taken_for_none(columns: str) -> None:
    plain = shell("--help")
    odd = shell("--help", COLUMNS=columns, LINES="0")
    assert odd.returncode == ExitCode.OK
    assert odd.stdout == plain.stdout


# ── names in pipes ──


@pytest.mark.slow
@pytest.mark.parametrize("columns", [{}, {"COLUMNS": "40"}], ids=["unset", "40"])
def test_names_are_whole_in_a_pipe(share: Share, tmp_path: Path, columns: dict[str, str]) -> None:
    long = tmp_path / LONG
    long.write_bytes(picture_bytes(width=200, height=100))
    predicted = shell(
        f"predict '{long}' --box 1,1,50,50 -m fake -f mask -o '{tmp_path}/[o]'", **columns
    )
    assert LONG in predicted.stdout
    assert f"written to {tmp_path}/[o]" in predicted.stderr
    cache = tmp_path / ("deep-" * 30)
    cache.mkdir()
    (cache / "sam_vit_b_01ec64.pth").write_bytes(b"")
    assert (
        f"{cache}/sam_vit_b_01ec64.pth"
        in shell("models list", SAM_POLL_CACHE=str(cache), **columns).stdout
    )
    inside = cache / "in"
    inside.mkdir()
    assert f" {inside}" in shell(f"status '{inside}'", **columns).stdout
    (tmp_path / (LONG + ".json")).write_text("{")
    assert f"{tmp_path}/{LONG}.json: " in shell(f"check '{tmp_path}/{LONG}.json'", **columns).stdout


# ── predict: what is known before the model is loaded ──


@pytest.fixture
def odd(tmp_path: Path, picture: Path) -> Path:
    """A folder of pictures that cannot be answered."""
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "words.jpg").write_text("words")
    (tmp_path / "cut.jpg").write_bytes(picture.read_bytes()[:300])
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "far.json").write_text(
        json.dumps({"box": {"x0": 900, "y0": 900, "x1": 950, "y1": 950}})
    )
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (
            "nope.jpg --box 1,1,50,50 -o o",
            "error: nope.jpg: cannot be read: No such file or directory",
            3,
        ),
        ("nope.jpg -o o", "error: nope.jpg: cannot be read: No such file or directory", 3),
        (
            "folder.jpg --box 1,1,50,50 -o o",
            "error: folder.jpg: cannot be read: it is not a file",
            3,
        ),
        ("pipe.jpg --box 1,1,50,50 -o o", "error: pipe.jpg: cannot be read: it is not a file", 3),
        ("words.jpg --box 1,1,50,50 -o o", "error: words.jpg: the file is not a picture", 3),
        ("cut.jpg --box 1,1,50,50 -o o", "error: cut.jpg: the picture is truncated", 3),
        ("dog.jpg --prompt bad.json -o o", "error: bad.json: line 1", 3),
        (
            "dog.jpg --prompt far.json -o o",
            "error: dog.jpg: box.x0: 900 is outside the picture",
            3,
        ),
        ("dog.jpg --box 1,1,5 -o o", "error: --box 1,1,5: not the expected numbers", 2),
        ("dog.jpg --box 1,1,50,50 -o file", "error: -o file: is not a folder", 2),
        ("dog.jpg --box 1,1,50,50 -o file/below", "error: -o file/below: is not a folder", 2),
        (
            "dog.jpg --box 1,1,50,50 -o /proc/none",
            "error: -o /proc/none: results cannot be written there",
            75,
        ),
    ],
)
def test_predict_refuses_before_the_model_is_loaded_and_once(
    odd: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str, code: int
) -> None:
    monkeypatch.chdir(odd)
    # Whoever imports it ends with an error of another kind
    loading = "import sys; sys.modules['torch'] = None; "
    done = shell(
        f"predict {arguments} -m demo -f mask", program=loading.replace("'", '"') + SAM_POLL
    )
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert done.stderr.count("error:") == 1
    assert len(done.stderr.splitlines()) <= 2  # the error and its remedy
    assert "retry" not in done.stderr
    assert not (odd / "o").exists()


def test_predict_answers_a_link_and_refuses_each_bad_picture_once(
    odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(odd)
    (odd / "link.jpg").symlink_to("dog.jpg")
    done = shell("predict link.jpg nope.jpg words.jpg --box 1,1,50,50 -m fake -f mask -o o")
    assert done.returncode == ExitCode.FAILED_JOBS
    assert [path.name for path in (odd / "o").iterdir()] == ["link.mask.png"]
    assert [done.stderr.count(name) for name in ("nope.jpg", "words.jpg")] == [1, 1]


def test_predict_says_who_may_not_read_and_knows_of_no_daemon(
    picture: Path, tmp_path: Path
) -> None:
    picture.chmod(0)
    if os.access(picture, os.R_OK):
        pytest.skip("root reads everything")
    done = shell(f"predict '{picture}' --box 1,1,50,50 -m demo -o '{tmp_path}/o'")
    assert done.returncode == ExitCode.FAILED_JOBS
    assert "error: dog.jpg: cannot be read: Permission denied" in done.stderr
    assert "retry" not in done.stderr
    assert "daemon" not in done.stderr


def test_check_does_not_wait_for_a_pipe(odd: Path) -> None:
    done = shell(f"check '{odd}/pipe.jpg'")
    assert done.returncode == ExitCode.FAILED_JOBS
    assert "it is not a file" in done.stdout


def test_one_wrong_format_is_one_error(picture: Path, tmp_path: Path) -> None:
    done = shell(f"predict '{picture}' --box 1,1,50,50 -m fake -f nonsense -o '{tmp_path}/o'")
    assert done.returncode == ExitCode.SETTINGS
    assert "has 0 entries" not in done.stderr
    assert done.stderr.startswith(
        'error: command line, formats[0]: there is no format "nonsense"\n'
    )


def test_a_refusal_names_the_command_that_puts_it_back_in_a_folder_only() -> None:
    from sam_poll.core.types import Job
    from sam_poll.imaging import source_file
    from sam_poll.share.error_report import encode_report

    error = source_file.unreadable_error(PermissionError(13, "Permission denied"))
    assert error.remedy
    assert "retry" not in error.remedy
    told = json.loads(encode_report(["dog.jpg"], Job("dog", "dog.jpg", Path("dog.jpg"), ()), error))
    assert told["remedy"] == f"{error.remedy}; then `sam-poll retry`"
