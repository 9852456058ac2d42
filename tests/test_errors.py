"""How bad input ends, and how files are written whole."""

import math
import os
import signal
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest
from conftest import ROOT

from errors import ArgumentParser, InputError, check_regular, number, replacing, run_script


@pytest.mark.parametrize("kind, low, high, low_allowed, text", [
    (int, 1, math.inf, True, "0"), (int, 1, math.inf, True, "-3"), (float, 0, 1, False, "0"),
    (float, 0, 1, False, "1.0000001"), (float, 0, 1, True, "-1e-9"), (float, 0, math.inf, True, "nan"),
    (float, 0, math.inf, True, "inf"), (float, 0, math.inf, True, "-inf")])
def test_a_number_out_of_range_is_refused_by_its_value(kind, low, high, low_allowed, text):
    with pytest.raises(ArgumentTypeError, match=text):
        number(kind, low, high, low_allowed)(text)


@pytest.mark.parametrize("kind, low, high, low_allowed, text, value", [
    (int, 1, math.inf, True, "1", 1), (float, 0, 1, False, "1", 1.0), (float, 0, 1, True, "0", 0.0),
    (float, 0, 1, False, "1e-300", 1e-300)])
def test_a_number_at_its_bound_is_taken(kind, low, high, low_allowed, text, value):
    found = number(kind, low, high, low_allowed)(text)
    assert found == value and type(found) is kind


@pytest.mark.parametrize("flags", [["--batch", "4"], ["--batch_size", "four"], ["--batch_size", "0"],
                                   ["--batch_size", "4", "extra"], ["--unknown"], ["--batch_size"]], ids=" ".join)
def test_a_wrong_flag_is_one_sentence_that_names_it(flags):
    parser = ArgumentParser("Test.")
    parser.add_argument("--batch_size", type=number(int, 1))
    with pytest.raises(InputError) as caught:
        parser.parse_args(flags)
    assert "\n" not in str(caught.value) and flags[-2 if flags[-1] in ("four", "0") else -1] in str(caught.value)


def test_run_script_prints_one_line_and_ends_with_2(capsys):
    def main():
        raise InputError("data/train_caps.txt is empty: fill it")
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: data/train_caps.txt is empty: fill it\n")


def test_ctrl_c_ends_a_script_with_130_and_without_a_word(capsys):
    def main():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 130 and capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("name", ["train.py", "compute_results.py"])
@pytest.mark.parametrize("ignored", [False, True], ids=["foreground", "background"])
def test_ctrl_c_during_the_imports_ends_a_script_without_a_word(tmp_path, name, ignored):
    """The first import of torch gets the signal; a shell's background job, which ignores it, goes on ignoring it."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nos._exit(7)\n")
    result = subprocess.run(
        [sys.executable, str(ROOT / name)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, restore_signals=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL))
    assert result.returncode == (7 if ignored else -signal.SIGINT)  # which a shell counts as 130
    assert (result.stdout, result.stderr) == ("", "")


def test_run_script_lets_a_bug_keep_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A current folder with one of each kind of path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    for name in ("file", "folder", "pipe", "absent"):
        os.symlink(name, f"link to {name}")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are POSIX")
@pytest.mark.parametrize("path", ["folder", "pipe", "link to folder", "link to pipe", "/dev/null", "/dev/zero"])
def test_what_is_no_regular_file_is_refused_by_its_name(paths, path):
    with pytest.raises(InputError, match=f"{path} is .*not a regular file") as caught:
        check_regular(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are POSIX")
@pytest.mark.parametrize("path", ["file", "link to file", "absent", "link to absent", "file/below", "nul\0"])
def test_a_regular_file_passes_and_an_absent_one_is_left_to_its_reader(paths, path):
    check_regular(path)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no /dev/fd here")
def test_a_shell_s_process_substitution_is_refused():
    """`--model_path <(zcat run.gz)` hands over /dev/fd/63, a pipe."""
    end, other = os.pipe()
    try:
        with pytest.raises(InputError, match="/dev/fd"):
            check_regular(f"/dev/fd/{end}")
    finally:
        os.close(end)
        os.close(other)


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(str(path), "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replacing(str(path), "w") as file:
        file.write("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_no_new_file(tmp_path):
    with pytest.raises(ValueError), replacing(str(tmp_path / "file")) as file:
        file.write(b"half")
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_missing_folders_are_made(tmp_path):
    with replacing(str(tmp_path / "a" / "b" / "file"), "w") as file:
        file.write("x")
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


def test_a_bare_name_is_written_into_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with replacing("file", "w") as file:
        file.write("x")
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_that_is_a_file_is_bad_input(tmp_path):
    (tmp_path / "taken").write_text("x")
    path = str(tmp_path / "taken" / "file")
    with pytest.raises(InputError, match="taken"), replacing(path) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_path_that_is_a_folder_is_bad_input(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder"), replacing(str(tmp_path / "folder")) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="file modes are POSIX")
def test_a_written_file_has_the_usual_mode(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(str(tmp_path / "file")) as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
