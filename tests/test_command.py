"""How every command starts and ends: help, versions, one line for what went wrong, and the exit code."""

import re
import runpy
import subprocess
import sys
import time
import warnings

import pytest
import typer

import kdmos
from kdmos.__main__ import COMMANDS, main
from kdmos.command import Bar, fail, run
from kdmos.errors import InputError


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """`run` sets how warnings look for the whole process; a debugging user's environment is not ours."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.delenv("KDMOS_DEBUG", raising=False)


def exit_code(function, *arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    return stop.value.code


def raises(error):
    def command() -> None:
        raise error

    return command


def one_line(capsys) -> str:
    """What is on stderr: exactly one line; stdout is empty."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    return err[:-1]


# ---- kdmos itself


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_kdmos_alone_lists_the_commands(argv, capsys):
    assert main(argv) is None
    out, err = capsys.readouterr()
    assert out.startswith("usage: kdmos COMMAND") and err == ""
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", out, re.MULTILINE)


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"kdmos {kdmos.__version__}\n"


@pytest.mark.parametrize("name", ["trian", "Train", "--bogus", ""])
def test_unknown_command(name, capsys):
    assert exit_code(main, [name]) == 2
    assert one_line(capsys) == f"kdmos {name}: no such command; there are {', '.join(COMMANDS)}"


def test_listing_the_commands_loads_none_of_them():
    """Also the one real process: arguments come from the command line."""
    script = "import sys; from kdmos.__main__ import main; main(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kdmos {kdmos.__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "kdmos", "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("kdmos nothing: no such command")


# ---- each command


@pytest.mark.parametrize("name", COMMANDS)
def test_help_as_command_and_as_module(name, capsys, monkeypatch):
    assert exit_code(main, [name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert re.match(rf"Usage: kdmos {name} ", out) and err == ""
    assert "--help" in out
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module was imported before
        assert exit_code(lambda: runpy.run_module(f"kdmos.{name}", run_name="__main__")) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_flag(name, capsys):
    assert exit_code(main, [name, "--bogus"]) == 2
    line = one_line(capsys)
    assert line.startswith(f"kdmos {name}: ") and "--bogus" in line and line.endswith(f"(kdmos {name} --help)")


# ---- how one ends


def with_arguments(number: int, label: str = typer.Option("none"), quick: bool = False) -> int:
    """Do nothing."""
    return number


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["1", "--labell", "a"], "No such option.*--labell"),
        (["1", "--label"], "--label.*requires an argument"),
        (["one"], "number.*integer"),
        ([], "Missing argument.*number"),
        (["1", "2"], "unexpected extra argument.*2"),
    ],
)
def test_wrong_arguments(argv, match, capsys):
    assert exit_code(run, with_arguments, "thing", argv) == 2
    line = one_line(capsys)
    assert line.startswith("kdmos thing: ") and line.endswith(" (kdmos thing --help)")
    assert re.search(match, line, re.IGNORECASE)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_a_returned_code_is_the_exit_code(returned, code, capsys):
    assert exit_code(run, lambda: returned, "thing", []) == code
    assert capsys.readouterr() == ("", "")


def test_arguments_arrive():
    assert exit_code(run, with_arguments, "thing", ["7", "--label", "a", "--quick"]) == 7


def test_typer_exit_is_an_exit_code():
    assert exit_code(run, raises(typer.Exit(4)), "thing", []) == 4


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InputError("a/000003.bin: the scan is empty"), "a/000003.bin: the scan is empty"),
        (InputError("mine.yaml: not YAML:\n  line 1\n    a: [1\n"), "mine.yaml: not YAML: line 1 a: [1"),
        (FileNotFoundError(2, "No such file or directory", "a.bin"), "[Errno 2] No such file or directory: 'a.bin'"),
        (OSError(28, "No space left on device", "a.bin"), "[Errno 28] No space left on device: 'a.bin'"),
    ],
)
def test_what_the_user_gave_cannot_be_used(error, expected, capsys):
    assert exit_code(run, raises(error), "thing", []) == 2
    assert one_line(capsys) == f"kdmos thing: {expected}"


def test_debugging_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("KDMOS_DEBUG", "1")
    error = InputError("a.bin: empty")
    with pytest.raises(InputError) as raised:
        run(raises(error), "thing", [])
    assert raised.value is error
    monkeypatch.setenv("KDMOS_DEBUG", "0")
    assert exit_code(run, raises(error), "thing", []) == 2
    assert one_line(capsys) == "kdmos thing: a.bin: empty"


def test_interrupted(capsys):
    assert exit_code(run, raises(KeyboardInterrupt()), "thing", []) == 130
    assert one_line(capsys).startswith("kdmos thing: interrupted; what was finished is kept")


@pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("bug"), KeyError("bug"), ZeroDivisionError()])
def test_our_own_mistakes_are_not_swallowed(error, capsys):
    with pytest.raises(type(error)) as raised:
        run(raises(error), "thing", [])
    assert raised.value is error
    assert capsys.readouterr() == ("", "")


def test_warnings_are_one_line():
    exit_code(run, lambda: None, "thing", [])
    assert warnings.formatwarning("mind the gap", UserWarning, "a.py", 3) == "kdmos thing: warning: mind the gap\n"


def test_fail_prints_one_line(capsys):
    assert exit_code(fail, "thing", "a\n  b") == 2
    assert one_line(capsys) == "kdmos thing: a b"
    assert exit_code(fail, "thing", "a", 5) == 5


def test_a_bar_says_in_lines_how_far_it_is(monkeypatch, capsys):
    """Where no terminal draws it: once half a minute has passed, and not at the end."""
    now = iter([0.0, 10.0, 31.0, 40.0, 62.0, 100.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with Bar("predict", 5) as bar:
        for _ in range(2):
            bar.advance()
        bar.advance(0)
        bar.what = "odometry"
        bar.advance()
        bar.advance(2)
    said = capsys.readouterr()
    assert said.err == "predict: 2 of 5, about 0:00:46 left\nodometry: 3 of 5, about 0:00:41 left\n"
    assert said.out == ""


def test_a_bar_of_nothing_or_for_nobody_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(Bar, "SECONDS", 0.0)
    with Bar("predict", 0) as bar:
        bar.advance(0)
    with Bar("predict", 3, show=False) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")
