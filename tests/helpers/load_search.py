"""Load on the search page: many clients at once, and what becomes of time and memory.

    python3 tests/helpers/load_search.py --seconds 60 --clients 32

starts `search.py --serve` in the current folder, on the gallery that search.py finds there or that
the flags after `--` name, and asks until the time is up. It prints the requests, the errors, the
median and the 99th percentile of the time to an answer in milliseconds, and the server's resident
memory in MiB, after a first round and at the end.

    python3 tests/helpers/load_search.py --seconds 30 --uploads 12

asks one question in words after another while 12 clients send a black PNG of 9,400 x 9,400
pixels again and again, and prints how long the words took.
"""

import argparse
import http.client
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "search.py"

QUESTIONS = (
    "a red star in the snow",
    "two boats on the water",
    "something green",
    "three houses near a tree",
    "a black heart on the wall",
    "fish",
    "a small blue box at the top",
    "some yellow flags on the grass",
)

PHOTOS = 10  # of which one a question is fetched

WARM_UP = 8  # requests of each client before memory is first read


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Load on the search page.")
    parser.add_argument("--clients", default=32, type=int, help="connections that ask at once")
    parser.add_argument("--seconds", default=60, type=float, help="how long")
    parser.add_argument(
        "--uploads", default=0, type=int, help="connections that send photos, beside one that asks"
    )
    parser.add_argument("flags", nargs="*", help="search.py's own, after --")
    return parser.parse_args(argv)


def ask(connection, turn, questions):
    """One request, by turns a page, JSON, or a photo: (seconds, None or what was wrong)."""
    question = questions[turn % len(questions)]
    start = time.perf_counter()
    if turn % 3 == 0:
        connection.request("GET", "/?q=" + question.replace(" ", "+"))
    elif turn % 3 == 1:
        connection.request(
            "POST",
            "/api/search",
            json.dumps({"query": question}),
            {"Content-Type": "application/json"},
        )
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
    """A process's resident memory in MiB, from /proc."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024


def load(port, pid, clients, seconds, questions=QUESTIONS):
    """Figures of `clients` clients asking for `seconds` seconds, and the errors' texts."""
    times, errors = [], []
    start = time.monotonic()
    threads = [
        threading.Thread(
            target=client, args=(port, number, questions, start + seconds, times, errors)
        )
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    while len(times) + len(errors) < WARM_UP * clients and time.monotonic() < start + seconds:
        time.sleep(0.01)
    before = resident(pid)
    for thread in threads:
        thread.join()
    p50, p99 = (1000 * np.percentile(times, (50, 99))).tolist() if times else (float("nan"),) * 2
    figures = {
        "clients": clients,
        "seconds": seconds,
        "requests": len(times),
        "errors": len(errors),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "resident_MiB": [round(before, 1), round(resident(pid), 1)],
    }
    return figures, errors


def black_png(side=9400):
    """A small file that takes long to decode."""
    content = io.BytesIO()
    Image.new("RGB", (side, side)).save(content, "PNG", optimize=True)
    return content.getvalue()


def uploader(port, photo, end, statuses):
    """Send the photo until the end, by the monotonic clock; after 503 a second later."""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a.png"\r\n\r\n'
        + photo
        + b"\r\n--x--\r\n"
    )
    while time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            connection.request(
                "POST", "/photo", body, {"Content-Type": "multipart/form-data; boundary=x"}
            )
            statuses.append(connection.getresponse().status)
        except OSError as failure:
            statuses.append(type(failure).__name__)
        connection.close()
        if statuses[-1] != 200:
            time.sleep(min(1, max(0, end - time.monotonic())))


def beside_uploads(port, clients, seconds, questions, photo):
    """Figures of questions in words while `clients` clients send a photo."""
    times, errors, statuses = [], [], []
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(target=uploader, args=(port, photo, end, statuses)) for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    connection, turn = http.client.HTTPConnection("127.0.0.1", port, timeout=120), 0
    while time.monotonic() < end:
        turn += 1
        seconds_taken, error = ask(connection, 3 * turn + turn % 2, questions)  # no photos out
        times.append(1000 * seconds_taken)
        errors += [error] if error else []
        time.sleep(0.05)
    connection.close()
    for thread in threads:
        thread.join()
    return {
        "words": len(times),
        "median_ms": round(float(np.median(times)), 1),
        "max_ms": round(max(times), 1),
        "errors": errors,
        "uploads": {status: statuses.count(status) for status in set(statuses)},
    }


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
            threading.Thread(
                target=shutil.copyfileobj, args=(server.stderr, sys.stderr), daemon=True
            ).start()
            if options.uploads:
                figures = beside_uploads(
                    port, options.uploads, options.seconds, QUESTIONS, black_png()
                )
                errors = figures.pop("errors")
            else:
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
