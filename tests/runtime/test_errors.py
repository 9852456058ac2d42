"""How bad input ends, and how files are written whole."""

import io
import math
import os
import re
import signal
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest
from conftest import ROOT, in_shell

from errors import ArgumentParser, InputError, Output, check_regular, number, replacing, run_script


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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(SystemExit) as caught:
            run_script(main)
    finally:
        signal.signal(signal.SIGINT, before)
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


# Output that fails ------------------------------------------------------------------------------

FULL, CLOSED, LEFT = "(No space left on device)", "(it is closed)", "(Broken pipe)"


def write_script(folder, main, options=""):
    """Write script.py, which runs this `main`; returns its folder."""
    (folder / "script.py").write_text(f"import os, sys, errors\ndef main():\n    {main}\n"
                                      f"errors.run_script(main{options})\n")
    return folder


def shell(folder, main, redirection, options=""):
    """Run a script with this `main` in a shell: its exit code, and what reached the shell's stdout and stderr."""
    found = in_shell(f"script.py {redirection}", write_script(folder, main, options), PYTHONPATH=str(ROOT))
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize("redirection, lost, out, err", [
    (">/dev/full", FULL, "", "note\n"), ("2>/dev/full", None, "figure\n", ""),
    ("1>&-", CLOSED, "", "note\n"), ("2>&-", None, "figure\n", ""),
    (">/dev/full 2>&1", None, "", ""), ("1>&- 2>&-", None, "", "")])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_script_whose_output_fails_goes_on_and_ends_with_2(tmp_path, redirection, lost, out, err):
    main = "print('figure'); print('note', file=sys.stderr); print('figure', file=open('done', 'w'))"
    code, found, said = shell(tmp_path, main, redirection)
    assert (tmp_path / "done").read_text() == "figure\n" and (code, found) == (2, out)
    sentence = rf"error: standard output could not be written {re.escape(lost)}.*\n" if lost else ""
    assert said.startswith(err) and re.fullmatch(sentence, said[len(err):]), said


def test_a_reader_who_leaves_ends_a_script_at_once_and_quietly_or_not_at_all(tmp_path):
    main = "print('x' * 1_000_000, flush=True); print('more', flush=True); open('done', 'w').close()"
    assert shell(tmp_path, main, "| head -c 1") == (1, "x", "")
    assert not (tmp_path / "done").exists()
    code, found, said = shell(tmp_path, main, "| head -c 1", ", outlasts_reader=True")
    assert (code, found, said.count("\n")) == (2, "x", 1) and LEFT in said and (tmp_path / "done").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_is_lost_as_the_script_ends_is_noticed(tmp_path):
    code, _, said = shell(tmp_path, "print('x')", ">/dev/full")
    assert code == 2 and FULL in said and "ignored" not in said and said.count("\n") == 1
    assert shell(tmp_path, "print('x'); sys.exit(7)", ">/dev/full") == (7, "", "")
    code, _, said = shell(tmp_path, "print('x'); raise errors.InputError('no data: get some')", ">/dev/full")
    assert (code, said) == (2, "error: no data: get some\n")
    assert shell(tmp_path, "raise errors.InputError('no data: get some')", "2>/dev/full") == (2, "", "")


def test_what_the_encoding_of_output_lacks_is_escaped(tmp_path):
    found = in_shell("script.py", write_script(tmp_path, "print('caf\\xe9', chr(0xdcff))"), PYTHONPATH=str(ROOT),
                     PYTHONIOENCODING="ascii:strict")
    assert (found.returncode, found.stdout, found.stderr) == (0, "caf\\xe9 \\udcff\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_bug_s_traceback_is_shown_where_stdout_fails(tmp_path):
    code, _, said = shell(tmp_path, "print('x'); 1 / 0", ">/dev/full")
    assert code == 1 and said.rstrip().endswith("ZeroDivisionError: division by zero") and "ignored" not in said


def test_a_script_leaves_the_streams_as_they_were(capsys):
    streams = sys.stdout, sys.stderr
    run_script(lambda: print("figure"))
    assert (sys.stdout, sys.stderr) == streams and capsys.readouterr().out == "figure\n"
    with pytest.raises(SystemExit):
        run_script(lambda: sys.exit(3))
    assert (sys.stdout, sys.stderr) == streams


class Disk(io.RawIOBase):
    """A file on a disk that is full as long as `full` is set; `at_write` is called within each write."""

    full, content, at_write = False, b"", staticmethod(lambda: None)

    def writable(self):
        return True

    def write(self, data):
        self.at_write()
        if self.full:
            raise OSError(28, "No space left on device")
        self.content += bytes(data)
        return len(data)


def test_output_goes_on_when_there_is_room_again():
    disk = Disk()
    output = Output("error", io.TextIOWrapper(io.BufferedWriter(disk), line_buffering=True), False)
    for disk.full, line in ((False, "one\n"), (True, "two\n"), (False, "three\n")):
        output.write(line)
    assert disk.content == b"one\ntwo\nthree\n"
    assert output.failure.strerror == "No space left on device" and output.isatty() is False


def test_a_signal_s_handler_may_speak_in_the_middle_of_a_write():
    disk, said = Disk(), []
    output = Output("error", io.TextIOWrapper(io.BufferedWriter(disk), line_buffering=True), False)

    def handler():
        if not said:
            said.append(True)
            output.write("stopping\n")
    disk.at_write = handler
    output.write("one\n")
    assert said and disk.content.startswith(b"one\n") and output.failure is None


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


def test_a_link_stays_one_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/target").write_text("old")
    os.symlink("deep/target", tmp_path / "link")
    with replacing(str(tmp_path / "link"), "w") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep/target").read_text() == "new"
    assert os.listdir(tmp_path / "deep") == ["target"]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are POSIX")
def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe could not be written .it is a folder, a pipe or a device"):
        with replacing(str(tmp_path / "pipe")) as file:
            file.write(b"x")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')",
                                   "RuntimeError(\"DefaultCPUAllocator: can't allocate memory: 7 bytes\\nmore\")",
                                   "RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate')",
                                   "MemoryError()"])
def test_memory_that_does_not_suffice_is_one_sentence(tmp_path, error):
    code, _, said = shell(tmp_path, f"import torch; raise {error}", "")
    assert code == 2 and said.startswith("error: the memory does not hold this (") and "--micro_batch" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("words", ["unable to allocate shared memory(shm) for file </t>",
                                   "DataLoader worker (pid 7) is killed by signal: Killed. ",
                                   "DataLoader worker (pid(s) 7, 8) exited unexpectedly"])
def test_processes_that_load_data_and_end_are_told_apart(tmp_path, words):
    code, _, said = shell(tmp_path, f"raise RuntimeError({words!r})", "")
    assert code == 2 and said.startswith(f"error: the processes that load data have ended, or ran out of shared "
                                         f"memory ({words}") and "--workers" in said
    assert said.count("\n") == 1


def test_a_bug_in_a_process_that_loads_data_keeps_its_traceback(tmp_path):
    code, _, said = shell(tmp_path, "raise RuntimeError('Caught RuntimeError in DataLoader worker process 0.')", "")
    assert code == 1 and "Traceback" in said


def test_a_path_that_is_a_folder_is_bad_input(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder could not be written"), replacing(str(tmp_path / "folder")) as file:
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


def test_help_tells_of_every_default_once():
    parser = ArgumentParser("A script.")
    parser.add_argument("--steps", default=0, type=int, help="how many")
    parser.add_argument("--width", type=int, help="of the file (default: its own)")
    parser.add_argument("--quick", action="store_true", help="in a hurry")
    text = " ".join(parser.format_help().split())
    assert "how many (default: 0)" in text and "of the file (default: its own) --quick in a hurry" in text
