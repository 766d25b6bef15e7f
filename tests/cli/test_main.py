import errno
import subprocess
import sys
import types

import pytest

from reelflow.cli import main
from reelflow.errors import ReelflowError


@pytest.fixture
def failing(monkeypatch, reelflow):
    """Run a command that raises."""

    def command(error, *options):
        def plan(*args, **kwargs):
            raise error

        monkeypatch.setattr("reelflow.cli.plan.find_recipe", plan)
        return reelflow("plan", "world", *options)

    return command


def test_help_and_version_load_nothing_heavy():
    code = (
        "import sys; from reelflow.cli.main import run; status = run(['--help']) or run(['--version'])\n"
        "print(status, sorted({'torch', 'numpy', 'av', 'pydantic'} & set(sys.modules)))"
    )
    lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[0].startswith("Usage: reelflow")
    assert lines[-2].startswith("reelflow 0.")
    assert lines[-1] == "0 []"


@pytest.mark.parametrize(
    "command", ["generate", "train", "encode", "evaluate", "plan", "compare", "demo", "data inspect"]
)
def test_every_option_has_a_help_text(reelflow, command):
    import typer

    status, out, _ = reelflow(*command.split(), "--help")
    assert status == 0
    assert "Usage: reelflow" in out
    node = typer.main.get_command(main.app)
    for name in command.split():
        node = node.commands[name]
    assert node.help
    assert all(param.help for param in node.params if param.name != "help")


def test_an_error_is_one_line_and_status_2(failing):
    status, out, err = failing(ReelflowError("this\ndoes   not work"))
    assert (status, out, err) == (2, "", "error: this does not work\n")


def test_a_full_disk_is_one_line_and_status_2(failing):
    status, _, err = failing(OSError(errno.ENOSPC, "No space left on device", "out.mp4"))
    assert (status, err) == (2, "error: out.mp4: No space left on device\n")


def test_ctrl_c_is_status_130(failing):
    assert failing(KeyboardInterrupt())[0] == 130


def test_a_fault_of_ours_says_so_on_one_line(failing):
    status, _, err = failing(ZeroDivisionError("oh"))
    assert (status, err.count("\n")) == (1, 1)
    assert "--debug" in err


@pytest.mark.parametrize("place", [0, 1])
def test_debug_shows_the_traceback_wherever_it_stands(failing, reelflow, place):
    assert "Traceback" not in failing(ReelflowError("no"))[2]
    err = (reelflow("--debug", "plan", "world") if place == 0 else reelflow("plan", "world", "--debug"))[2]
    assert "Traceback" in err
    assert err.endswith("error: no\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "Did you mean 'generate'"),
        (["plan"], "give a recipe or a model"),
        (["plan", "world", "--frame", "5"], "--frames"),
        (["plan", "world", "--frames", "many"], "--frames"),
        (["generate", "x", "-o", "x.mp4", "--sampler", "euller"], "'heun'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(reelflow, arguments, message):
    status, _, err = reelflow(*arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(("good", "expected"), [(True, 0), (False, 1)])
def test_the_status_of_demo_says_whether_it_went_well(reelflow, monkeypatch, tmp_path, good, expected):
    seen = []
    module = types.SimpleNamespace(demo=lambda out, *, console: seen.append(out) or good)
    monkeypatch.setitem(sys.modules, "reelflow.recipes.demo", module)
    assert reelflow("demo", "--out", tmp_path / "show")[0] == expected
    assert seen == [tmp_path / "show"]


def test_freed_memory_is_kept_without_harm_where_there_is_no_glibc(monkeypatch):
    main.keep_freed_memory()

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(main.ctypes, "CDLL", missing)
    main.keep_freed_memory()
