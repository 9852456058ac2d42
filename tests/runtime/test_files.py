"""Files are written whole or not at all, and leftovers of killed processes are removed."""

import hashlib
import os
import subprocess
import sys

import pytest

from runtime.errors import InputError
from runtime.files import (
    HOST,
    check_new,
    check_regular,
    hash_file,
    new_folder,
    remove_leftovers,
    replacing,
)
from tests.helpers.made import ROOT


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
@pytest.mark.parametrize(
    "path", ["folder", "pipe", "link to folder", "link to pipe", "/dev/null", "/dev/zero"]
)
def test_what_is_no_regular_file_is_refused_by_its_name(paths, path):
    with pytest.raises(InputError, match=f"{path} is .*not a regular file") as caught:
        check_regular(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are POSIX")
@pytest.mark.parametrize(
    "path", ["file", "link to file", "absent", "link to absent", "file/below", "nul\0"]
)
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
    with pytest.raises(
        InputError, match="pipe could not be written .it is a folder, a pipe or a device"
    ):
        with replacing(str(tmp_path / "pipe")) as file:
            file.write(b"x")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_path_that_is_a_folder_is_bad_input(tmp_path):
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(InputError, match="folder could not be written"),
        replacing(str(tmp_path / "folder")) as file,
    ):
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


KILLED = """
import contextlib, os, signal, sys
from runtime import files as kept
with contextlib.ExitStack() as files:
    for path in sys.argv[1:]:
        files.enter_context(kept.replacing(path))
    {end}
"""


def written_by(folder, end, *paths):
    """A process that has begun to write some files, started in a folder."""
    return subprocess.Popen(
        [sys.executable, "-c", KILLED.format(end=end), *paths],
        cwd=folder,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def temporaries(folder):
    return sorted(path.name.split(".")[0] for path in folder.glob("*.tmp"))


def test_what_a_killed_process_left_goes_with_the_next_file_there_and_a_living_one_s_stays(
    tmp_path,
):
    alive = written_by(tmp_path, "print(flush=True); signal.pause()", "living.csv")
    alive.stdout.readline()
    written_by(
        tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "vocab.json", "a" * 200 + ".npz"
    ).wait()
    assert temporaries(tmp_path) == ["a" * 40, "living", "vocab"]
    other_machine = next(tmp_path.glob("vocab*")).name.replace(f".{HOST}-", ".elsewhere-")
    strangers = [
        other_machine.replace("vocab", "far"),
        "mine.tmp",
        "thesis.tex.abcdefgh.tmp",
        "x.host-1-abc.tmp",
    ]
    for name in strangers:
        (tmp_path / name).write_text("hers")
    with replacing(tmp_path / "results.json", "w") as file:
        file.write("{}")
    try:
        assert temporaries(tmp_path) == sorted(
            ["living", *(name.split(".")[0] for name in strangers)]
        )
    finally:
        alive.kill()
        alive.wait()
        alive.stdout.close()


def test_an_earlier_process_of_the_same_number_is_dead_and_this_one_s_own_files_stay(tmp_path):
    """As in a container, where each start is process 1 of the same machine."""
    left = tmp_path / f"vocab.json.{HOST}-{os.getpid()}-00000000-abcdefgh.tmp"
    left.write_text("half")
    with replacing(tmp_path / "one"):
        assert temporaries(tmp_path) == ["one"]
        remove_leftovers(tmp_path)
        assert temporaries(tmp_path) == ["one"]
    assert os.listdir(tmp_path) == ["one"]


# New folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["new", "empty", "deep/er/new"])
def test_a_folder_is_there_once_it_is_whole(tmp_path, path):
    (tmp_path / "empty").mkdir()
    target = tmp_path / path
    with new_folder(str(target), "--export") as folder:
        (tmp_path / folder / "a").write_text("x")
        assert not target.exists() or not os.listdir(target)
    assert (target / "a").read_text() == "x"
    assert os.listdir(target.parent) == [target.name] or path == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_no_trace(tmp_path, error):
    with pytest.raises(error):
        with new_folder(str(tmp_path / "new"), "--export") as folder:
            (tmp_path / folder / "a").write_text("x")
            raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["full", "file", "file/below", "link"])
def test_nothing_that_is_there_is_replaced_by_a_folder(tmp_path, path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    (tmp_path / "file").write_text("x")
    os.symlink("nowhere", tmp_path / "link")
    for make in (check_new, lambda *named: new_folder(*named).__enter__()):
        with pytest.raises(InputError, match="--export") as caught:
            make(str(tmp_path / path), "--export")
        assert path in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "link"]


def test_a_file_s_hash_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()
