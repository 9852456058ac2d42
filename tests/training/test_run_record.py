"""A run's records: the folder's lock, log.jsonl and run.json."""

import json
import os
import signal
import subprocess
import sys

import pytest

from runtime.errors import InputError
from runtime.files import lock
from tests.helpers.made import ROOT
from training import run_record


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_folder_that_a_living_run_holds_is_refused(tmp_path):
    held = lock(str(tmp_path / "run"))
    with pytest.raises(InputError, match="another run is writing"):
        lock(str(tmp_path / "run"))
    held.close()
    lock(str(tmp_path / "run")).close()


def test_a_killed_run_gives_the_folder_free_and_its_temporary_files_go(tmp_path):
    names = [
        "checkpoint.pth.tar",
        "model_best.pth.tar",
        "Epoch-12-model.pth.tar",
        "log.jsonl",
        "run.json",
    ]
    code = (
        "import contextlib, os, signal, sys\nfrom runtime import files as kept\nheld = kept.lock('run')\n"
        "with contextlib.ExitStack() as files:\n"
        "    for name in sys.argv[1:]:\n"
        "        files.enter_context(kept.replacing(os.path.join('run', name)))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = str(ROOT)
    subprocess.run(
        [sys.executable, "-c", code, *names], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}
    )
    assert all(len(list((tmp_path / "run").glob(f"{name}.*.tmp"))) == 1 for name in names)
    lock(str(tmp_path / "run")).close()
    assert os.listdir(tmp_path / "run") == [".lock"]


def test_a_killed_run_s_workers_do_not_hold_its_folder(tmp_path):
    code = (
        "import os, signal, time\nfrom runtime.files import lock\nheld = lock('run')\nworker = os.fork()\n"
        "if not worker:\n    os.write(1, b'up\\n')\n    time.sleep(60)\n    os._exit(0)\n"
        "os.write(1, b'%d\\n' % worker)\ntime.sleep(60)"
    )  # each line in one piece, print's may be two
    root = str(ROOT)
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = {run.stdout.readline().strip() for _ in range(2)}
    (worker,) = map(int, lines - {"up"})
    try:
        with pytest.raises(InputError, match="another run is writing"):
            lock(str(tmp_path / "run"))  # its worker has not let the run's own hold go
        run.kill()
        run.wait()
        lock(str(tmp_path / "run")).close()
        os.kill(worker, 0)  # it lives on
    finally:
        os.kill(worker, signal.SIGKILL)
        run.stdout.close()


def test_what_is_not_the_run_s_own_stays(tmp_path):
    strangers = [
        "thesis.tmp",
        "thesis.tex.abcdefgh.tmp",
        "checkpoint.pth.tar.tmp",
        "checkpoint.pth.tar.old.tmp",
        "my-checkpoint.pth.tar.abcdefgh.tmp",
        "Epoch-x-model.pth.tar.abcdefgh.tmp",
        "run.json",
    ]
    for name in strangers:
        (tmp_path / name).write_text("hers")
    for name in ("x.tmp", "log.jsonl.abcdefgh.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.json.abcdefgh.tmp").symlink_to("thesis.tmp")
    lock(str(tmp_path)).close()
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*strangers, ".lock", "x.tmp", "log.jsonl.abcdefgh.tmp", "run.json.abcdefgh.tmp"]
    )
    assert all((tmp_path / name).read_text() == "hers" for name in strangers)


def test_log_lines_are_appended_whole(tmp_path):
    log = run_record.step_log(str(tmp_path), 0)
    log.write(step=1, loss=0.5)
    log.write(step=2, loss=None)
    assert lines_of(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_a_resumed_log_keeps_what_the_checkpoint_has_seen_and_drops_torn_lines(tmp_path):
    torn = [
        "not json",
        '{"step": 3}',
        '{"step": "1"}',
        '{"step": null}',
        "[" * 100_000,
        '{"step": 2, "lo',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(['{"step": 1}', '{"step": 2}', *torn]))
    run_record.step_log(str(tmp_path), 2).write(step=3, again=True)
    assert lines_of(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_fresh_log_starts_empty(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    run_record.step_log(str(tmp_path), 0)
    assert lines_of(tmp_path) == []
