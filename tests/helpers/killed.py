"""Runs that are killed (kill -9) at random moments, again and again, and then left alone."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time


def kill_at_random(run, output, kills, seed=0):
    """Kill (kill -9) a forked process that calls run(), `kills` times, then let one come to its end.

    The moments are spread over the time that an undisturbed call takes. output: the folder that
    run() makes, and that is not there when the kills begin.
    """
    context, rng = multiprocessing.get_context("fork"), random.Random(seed)
    started, killed = time.monotonic(), 0
    finished(context.Process(target=run))
    seconds = time.monotonic() - started
    shutil.rmtree(output)
    while killed < kills:
        process = context.Process(target=run)
        process.start()
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL  # it may have been done
    finished(context.Process(target=run))


def finished(process):
    """Let a process come to its end, which must be a good one."""
    process.start()
    process.join()
    assert process.exitcode == 0


def kill_commands(start, output, kills=10, seed=5):
    """As `kill_at_random`, of the processes that start() gives; those import for seconds first.

    Returns, in words, between which seconds of a run they were killed.
    """
    started, process, works, rng = time.monotonic(), start(), None, random.Random(seed)
    while process.poll() is None:
        works = works or (os.path.exists(output) and time.monotonic() - started)
        time.sleep(0.005)
    seconds, killed = time.monotonic() - started, 0
    assert process.returncode == 0
    shutil.rmtree(output)
    while killed < kills:
        process = start()
        try:
            process.wait(rng.uniform(works, seconds))
            assert process.returncode == 0
            shutil.rmtree(output)  # it was done: begin again
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    assert start().wait() == 0
    return f"{killed} kills between {works:.1f} and {seconds:.1f} s"
