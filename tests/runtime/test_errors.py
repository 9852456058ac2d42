"""How bad input, failing output and signals end a script."""

import importlib
import io
import math
import os
import re
import signal
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest

from runtime.errors import ArgumentParser, InputError, Output, left_out, number, run_script
from tests.helpers.made import ROOT, in_shell


@pytest.mark.parametrize(
    "kind, low, high, low_allowed, text",
    [
        (int, 1, math.inf, True, "0"),
        (int, 1, math.inf, True, "-3"),
        (float, 0, 1, False, "0"),
        (float, 0, 1, False, "1.0000001"),
        (float, 0, 1, True, "-1e-9"),
        (float, 0, math.inf, True, "nan"),
        (float, 0, math.inf, True, "inf"),
        (float, 0, math.inf, True, "-inf"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_value(kind, low, high, low_allowed, text):
    with pytest.raises(ArgumentTypeError, match=text):
        number(kind, low, high, low_allowed)(text)


@pytest.mark.parametrize(
    "kind, low, high, low_allowed, text, value",
    [
        (int, 1, math.inf, True, "1", 1),
        (float, 0, 1, False, "1", 1.0),
        (float, 0, 1, True, "0", 0.0),
        (float, 0, 1, False, "1e-300", 1e-300),
    ],
)
def test_a_number_at_its_bound_is_taken(kind, low, high, low_allowed, text, value):
    found = number(kind, low, high, low_allowed)(text)
    assert found == value and type(found) is kind


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch", "4"],
        ["--batch_size", "four"],
        ["--batch_size", "0"],
        ["--batch_size", "4", "extra"],
        ["--unknown"],
        ["--batch_size"],
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_one_sentence_that_names_it(flags):
    parser = ArgumentParser("Test.")
    parser.add_argument("--batch_size", type=number(int, 1))
    with pytest.raises(InputError) as caught:
        parser.parse_args(flags)
    assert "\n" not in str(caught.value) and flags[-2 if flags[-1] in ("four", "0") else -1] in str(
        caught.value
    )


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

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background ignores it
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
    """The signal arrives during the first import of torch.

    A background job of a shell goes on ignoring it.
    """
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nos._exit(7)\n"
    )
    result = subprocess.run(
        [sys.executable, str(ROOT / name)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        restore_signals=False,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL
        ),
    )
    assert result.returncode == (7 if ignored else -signal.SIGINT)  # which a shell counts as 130
    assert (result.stdout, result.stderr) == ("", "")


def test_run_script_lets_a_bug_keep_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


# Output that fails ------------------------------------------------------------------------------

FULL, CLOSED, LEFT = "(No space left on device)", "(it is closed)", "(Broken pipe)"


def write_script(folder, main, options=""):
    """Write script.py, which runs this `main`; returns its folder."""
    (folder / "script.py").write_text(
        f"import os, sys\nfrom runtime import errors\ndef main():\n    {main}\n"
        f"errors.run_script(main{options})\n"
    )
    return folder


def shell(folder, main, redirection, options=""):
    """Run a script with this `main` in a shell.

    Its exit code, and what reached the shell's stdout and stderr.
    """
    found = in_shell(
        f"script.py {redirection}", write_script(folder, main, options), PYTHONPATH=str(ROOT)
    )
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(
    "redirection, lost, out, err",
    [
        (">/dev/full", FULL, "", "note\n"),
        ("2>/dev/full", None, "figure\n", ""),
        ("1>&-", CLOSED, "", "note\n"),
        ("2>&-", None, "figure\n", ""),
        (">/dev/full 2>&1", None, "", ""),
        ("1>&- 2>&-", None, "", ""),
    ],
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_script_whose_output_fails_goes_on_and_ends_with_2(tmp_path, redirection, lost, out, err):
    main = (
        "print('figure'); print('note', file=sys.stderr); print('figure', file=open('done', 'w'))"
    )
    code, found, said = shell(tmp_path, main, redirection)
    assert (tmp_path / "done").read_text() == "figure\n" and (code, found) == (2, out)
    sentence = rf"error: standard output could not be written {re.escape(lost)}.*\n" if lost else ""
    assert said.startswith(err) and re.fullmatch(sentence, said[len(err) :]), said


def test_a_reader_who_leaves_ends_a_script_at_once_and_quietly_or_not_at_all(tmp_path):
    main = (
        "print('x' * 1_000_000, flush=True); print('more', flush=True); open('done', 'w').close()"
    )
    assert shell(tmp_path, main, "| head -c 1") == (1, "x", "")
    assert not (tmp_path / "done").exists()
    code, found, said = shell(tmp_path, main, "| head -c 1", ", outlasts_reader=True")
    assert (
        (code, found, said.count("\n")) == (2, "x", 1)
        and LEFT in said
        and (tmp_path / "done").exists()
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_is_lost_as_the_script_ends_is_noticed(tmp_path):
    code, _, said = shell(tmp_path, "print('x')", ">/dev/full")
    assert code == 2 and FULL in said and "ignored" not in said and said.count("\n") == 1
    assert shell(tmp_path, "print('x'); sys.exit(7)", ">/dev/full") == (7, "", "")
    code, _, said = shell(
        tmp_path, "print('x'); raise errors.InputError('no data: get some')", ">/dev/full"
    )
    assert (code, said) == (2, "error: no data: get some\n")
    assert shell(tmp_path, "raise errors.InputError('no data: get some')", "2>/dev/full") == (
        2,
        "",
        "",
    )


def test_what_the_encoding_of_output_lacks_is_escaped(tmp_path):
    found = in_shell(
        "script.py",
        write_script(tmp_path, "print('caf\\xe9', chr(0xdcff))"),
        PYTHONPATH=str(ROOT),
        PYTHONIOENCODING="ascii:strict",
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "caf\\xe9 \\udcff\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_bug_s_traceback_is_shown_where_stdout_fails(tmp_path):
    code, _, said = shell(tmp_path, "print('x'); 1 / 0", ">/dev/full")
    assert (
        code == 1
        and said.rstrip().endswith("ZeroDivisionError: division by zero")
        and "ignored" not in said
    )


def test_a_script_leaves_the_streams_as_they_were(capsys):
    streams = sys.stdout, sys.stderr
    run_script(lambda: print("figure"))
    assert (sys.stdout, sys.stderr) == streams and capsys.readouterr().out == "figure\n"
    with pytest.raises(SystemExit):
        run_script(lambda: sys.exit(3))
    assert (sys.stdout, sys.stderr) == streams


class Disk(io.RawIOBase):
    """A file on a disk that is full as long as `full` is set.

    `at_write` is called within each write.
    """

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


@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')",
        'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: 7 bytes\\nmore")',
        "RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate')",
        "MemoryError()",
    ],
)
def test_memory_that_does_not_suffice_is_one_sentence(tmp_path, error):
    code, _, said = shell(tmp_path, f"import torch; raise {error}", "")
    assert (
        code == 2
        and said.startswith("error: the memory does not hold this (")
        and "--micro_batch" in said
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "unable to allocate shared memory(shm) for file </t>",
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
    ],
)
def test_processes_that_load_data_and_end_are_told_apart(tmp_path, words):
    code, _, said = shell(tmp_path, f"raise RuntimeError({words!r})", "")
    assert (
        code == 2
        and said.startswith(
            f"error: the processes that load data have ended, or ran out of shared memory ({words}"
        )
        and "--workers" in said
    )
    assert said.count("\n") == 1


def test_a_bug_in_a_process_that_loads_data_keeps_its_traceback(tmp_path):
    code, _, said = shell(
        tmp_path, "raise RuntimeError('Caught RuntimeError in DataLoader worker process 0.')", ""
    )
    assert code == 1 and "Traceback" in said


def test_help_tells_of_every_default_once():
    parser = ArgumentParser("A script.")
    parser.add_argument("--steps", default=0, type=int, help="how many")
    parser.add_argument("--width", type=int, help="of the file (default: its own)")
    parser.add_argument("--quick", action="store_true", help="in a hurry")
    text = " ".join(parser.format_help().split())
    assert (
        "how many (default: 0)" in text
        and "of the file (default: its own) --quick in a hurry" in text
    )


# Paths of no name --------------------------------------------------------------------------------

SOURCES = [
    *((path.stem, path) for path in sorted(ROOT.glob("*.py"))),
    ("train", ROOT / "training" / "options.py"),
    ("extract_features", ROOT / "features" / "encoders.py"),
]
PATH_FLAGS = [
    (script, flag)
    for script, path in SOURCES
    for piece in path.read_text(encoding="utf-8").split("add_argument(")[1:]
    for flag in re.findall(r'^\s*"--(\w+)"', piece)
    if flag.endswith("_path")
    or flag in ("data_name", "logger_name", "cache_dir")
    or re.search(r'metavar="[^"]*(FILE|DIR|FOLDER|CHECKPOINT|PATH)', piece)
]


def test_the_flags_that_name_paths_are_found():
    assert {
        ("train", "logger_name"),
        ("compute_results", "save_json"),
        ("search", "index"),
        ("extract_features", "output"),
        ("reproduce", "record"),
        ("vocab", "vocab_path"),
    } <= set(PATH_FLAGS)


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize("script, flag", PATH_FLAGS)
def test_a_path_of_no_name_is_refused_by_its_flag(script, flag, text):
    if (script, flag) == ("train", "resume"):  # the released default, which means none
        assert importlib.import_module("train").parse_args(["--resume", ""]).resume == ""
    else:
        with pytest.raises(
            InputError, match=f"argument --{flag}: it is empty: give a name, or leave the flag out"
        ):
            importlib.import_module(script).parse_args([f"--{flag}", text])


def test_a_name_left_out_says_what_to_use_once_it_is_called():
    find = left_out("data", {"get_loader": "use get_loaders"})
    with pytest.raises(InputError, match="^data.get_loader is left out here: use get_loaders$"):
        find("get_loader")("folder", batch_size=3)
    with pytest.raises(AttributeError, match="module 'data' has no attribute 'get_other'"):
        find("get_other")
