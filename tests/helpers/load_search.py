"""Load on the search page: many clients at once, and what becomes of time and memory.

    python3 tests/load_search.py --seconds 60 --clients 32

starts `search.py --serve` in the current folder, on the gallery that search.py finds there or is told of after `--`,
asks until the time is up, and prints requests, errors, the median and the 99th percentile of the time to an answer in
milliseconds, and the server's resident memory, in MiB, after a first round and at the end.
"""

import argparse
import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parent.parent / "search.py"
QUESTIONS = ("a red star in the snow", "two boats on the water", "something green", "three houses near a tree",
             "a black heart on the wall", "fish", "a small blue box at the top", "some yellow flags on the grass")
PHOTOS = 10  # of which one a question is fetched
WARM_UP = 8  # requests of each client before memory is first read


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Load on the search page.")
    parser.add_argument("--clients", default=32, type=int, help="connections that ask at once")
    parser.add_argument("--seconds", default=60, type=float, help="how long")
    parser.add_argument("flags", nargs="*", help="search.py's own, after --")
    return parser.parse_args(argv)


def ask(connection, turn, questions):
    """One request, by turns a page, JSON, or a photo: (seconds, None or what was wrong)."""
    question = questions[turn % len(questions)]
    start = time.perf_counter()
    if turn % 3 == 0:
        connection.request("GET", "/?q=" + question.replace(" ", "+"))
    elif turn % 3 == 1:
        connection.request("POST", "/api/search", json.dumps({"query": question}), {"Content-Type": "application/json"})
    else:
        connection.request("GET", f"/photos/{turn % PHOTOS}")
    answer = connection.getresponse()
    body = answer.read()
    seconds = time.perf_counter() - start
    if answer.status != 200 or turn % 3 == 1 and not json.loads(body)["results"]:
        return seconds, f"{answer.status} {body[:200]!r}"
    return seconds, None


def client(port, number, questions, end, times, errors):
    """Ask until the end, by the monotonic clock; after an error on a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    turn = number  # so that not all ask the same
    while time.monotonic() < end:
        try:
            seconds, error = ask(connection, turn, questions)
            times.append(seconds)
        except (OSError, http.client.HTTPException, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
            connection.close()
        if error:
            errors.append(error)
        turn += 1
    connection.close()


def resident(pid):
    """A process's resident memory in MiB, as Linux tells it."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024


def load(port, pid, clients, seconds, questions=QUESTIONS):
    """What so many clients find in so many seconds: a dictionary of figures, and the errors' texts."""
    times, errors = [], []
    start = time.monotonic()
    threads = [threading.Thread(target=client, args=(port, number, questions, start + seconds, times, errors))
               for number in range(clients)]
    for thread in threads:
        thread.start()
    while len(times) + len(errors) < WARM_UP * clients and time.monotonic() < start + seconds:
        time.sleep(0.01)
    before = resident(pid)
    for thread in threads:
        thread.join()
    p50, p99 = (1000 * np.percentile(times, (50, 99))).tolist() if times else (float("nan"),) * 2
    figures = {"clients": clients, "seconds": seconds, "requests": len(times), "errors": len(errors),
               "p50_ms": round(p50, 1), "p99_ms": round(p99, 1),
               "resident_MiB": [round(before, 1), round(resident(pid), 1)]}
    return figures, errors


def main(argv=None):
    options = parse_args(argv)
    command = [sys.executable, str(SCRIPT), "--serve", "--port", "0", *options.flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            port = None
            for line in server.stderr:
                print(line, end="", file=sys.stderr)
                if found := re.search(r"http://[^/ ]*:(\d+)/", line):
                    port = int(found[1])
                    break
            if port is None:
                sys.exit("search.py ended before it served")
            threading.Thread(target=shutil.copyfileobj, args=(server.stderr, sys.stderr), daemon=True).start()
            figures, errors = load(port, server.pid, options.clients, options.seconds)
        finally:
            server.terminate()
    figures["exit_code"] = server.wait()
    print(json.dumps(figures))
    for error in sorted(set(errors))[:5]:
        print(error)
    sys.exit(1 if errors or figures["exit_code"] else 0)


if __name__ == "__main__":
    main()
