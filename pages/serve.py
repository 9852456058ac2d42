"""The search page of a gallery: words or a photo in, photos out, in a browser or as JSON.

    python3 search.py --index runs/x/gallery --serve

`search.py` hands over its Searcher. Whoever can reach the page may be a stranger, and so may those who wrote the
captions and the file names: no address holds a path, no text becomes markup or script, and only the page's own host
names are answered. docs/search.md says what a proxy in front has to add.
"""

import functools
import ipaddress
import json
import logging
import os
import queue
import re
import signal
import socket
import sys
import threading
from concurrent import futures
from typing import Any, NamedTuple

from flask import Flask, Response, request
from waitress import create_server
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask
from werkzeug.exceptions import HTTPException, ServiceUnavailable, abort

from errors import InputError
from images import open_photo, thumbnail
from report import TEMPLATES, template

TOP, TOP_LIMIT = 10, 100  # results of a question: unless it says how many, and at most
HUBS = 30  # shown on their page
EXAMPLES = 3  # captions offered as questions on the first page
UPLOAD_LIMIT = 20 * 2**20  # bytes of a photo
JSON_LIMIT = 2**20  # bytes of a question in JSON
SWALLOWED = 2**30  # bytes of an upload that is too large, read and dropped so that its sender hears why
THUMBNAIL = 400  # pixels
THUMBNAILS = 512  # kept in memory: some 10 MB
DECODERS = 2  # photos decoded at a time: the largest take 1 GB each
BATCH = 64  # questions answered together, at most
WAITING = 64  # questions that wait; who comes then is told to come again
ANSWER_SECONDS = 30  # until a question is given up
SERVER = {"threads": 32, "connection_limit": 256, "backlog": 128, "channel_timeout": 30, "cleanup_interval": 10,
          "asyncore_use_poll": True, "ident": None, "max_request_body_size": UPLOAD_LIMIT + 1,
          "max_request_header_size": 2**18}  # a question of 10,000 words in an address still gets its sentence
HEADERS = {
    "Content-Security-Policy":
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # `no-referrer` would make browsers send our own forms' origin as null
    "Cross-Origin-Resource-Policy": "same-origin",  # nor do other sites' pages show our photos
    "Cache-Control": "no-cache",  # after a rebuild, a number means another photo
}
SENTENCES = {
    403: "this request comes from another site's page: open this page itself",
    404: "there is nothing at this address: begin at the search page",
    405: "this address does not take this kind of request: /api tells what is taken",
    413: f"this is more than {UPLOAD_LIMIT // 2**20} MB, or than {JSON_LIMIT // 2**20} MB of JSON: send less, such as "
         "a smaller copy of the photo",
    415: "send JSON, with the header Content-Type: application/json",
    421: "this page does not answer to that host name: use the address that the server said when it started, or start "
         "it with --allow_host",
    500: "something broke in here: the server's own output says what",
    503: "too many questions at once, or one that takes too long: ask again in a moment",
}


def serve(searcher, host="127.0.0.1", port=8000, allow_hosts=()):
    """Serve the page until SIGINT or SIGTERM; port 0 takes a free one. The address goes to stderr.

    allow_hosts: further host names the page answers to, such as a proxy's.
    Raises InputError where the address cannot be had, or a name is none.
    """
    app = make_app(searcher, host, allow_hosts)
    server = make_server(app, host, port)
    signal.signal(signal.SIGTERM, _end)  # waitress ends its loop at a SystemExit, as it does at Ctrl-C
    print(f"{searcher.gallery.count:,} photos can be searched at http://{_in_address(host)}:{server.effective_port}/ "
          "(Ctrl-C ends)", file=sys.stderr)
    if not _is_loopback(host):
        print(f"note: --host {host} lets other machines in; there are no accounts and no encryption here: "
              "see docs/search.md", file=sys.stderr)
    sys.stderr.flush()
    server.run()
    app.extensions["asker"].close()


def _end(number, frame):
    sys.exit(0)


def make_app(searcher, host="127.0.0.1", allow_hosts=()):
    """The page as a Flask app. host: the address it will be bound to; allow_hosts: as in `serve`."""
    app = Flask(__name__, static_folder=None, template_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=UPLOAD_LIMIT, MAX_FORM_PARTS=10)
    app.url_map.merge_slashes = False
    app.extensions["asker"] = asker = Asker(searcher)
    pages = Pages(searcher, asker)
    for rule, view in {"/": pages.words, "/like/<int:number>": pages.like, "/hubs": pages.hubs, "/api": pages.api,
                       "/photos/<int:number>": pages.thumbnail, "/search.css": pages.style, "/search.js": pages.script,
                       "/favicon.ico": pages.icon}.items():
        app.add_url_rule(rule, view.__name__, view)
    for rule, view in {"/photo": pages.photo, "/api/search": pages.search}.items():
        app.add_url_rule(rule, view.__name__, view, methods=["POST"])
    app.before_request(functools.partial(check_sender, OwnHosts(host, allow_hosts)))
    app.register_error_handler(InputError, pages.bad_input)
    app.register_error_handler(HTTPException, pages.error)
    app.after_request(_with_headers)
    return app


def _with_headers(response):
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


# Who may ask ------------------------------------------------------------------------------------

class OwnHosts:
    """The host names that a page answers to: any other leads here by somebody else's doing (DNS rebinding)."""

    def __init__(self, host, allow_hosts=()):
        """host: the address the page is bound to. Raises InputError for an allowed name that is none."""
        for name in allow_hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name) and not _address(name):
                raise InputError(f"--allow_host {name} is not a host name: give it without a scheme, port or path")
        self.names = {_in_address(name.lower()) for name in (host, *allow_hosts)}
        if _is_loopback(host) or _is_any(host):
            self.names |= {"localhost", "127.0.0.1", "[::1]"}
        self.by_address = _is_any(host)  # a page elsewhere can't have this machine's address as its host

    def __contains__(self, host):
        """host: a Host header, with a port or without; the port may be a forwarded one."""
        match = re.fullmatch(r"([a-z0-9._-]+?|\[[0-9a-f:.]+\])\.?(:\d{1,5})?", (host or "").lower())
        return bool(match) and (match[1] in self.names or self.by_address and bool(_address(match[1].strip("[]"))))


def _address(host):
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _in_address(host):
    """A host as a URL has it."""
    return f"[{host}]" if ":" in host else host


def _is_loopback(host):
    return host == "localhost" or bool(_address(host)) and _address(host).is_loopback


def _is_any(host):
    return bool(_address(host)) and _address(host).is_unspecified


def check_sender(own):
    """Refuse a request to a host name that is not ours, and one that changes or costs something from another's page."""
    if request.headers.get("Host") not in own:
        abort(421)
    origin = request.headers.get("Origin")
    if request.method == "POST" and origin is not None and origin.partition("://")[2] != request.headers["Host"]:
        abort(403)


# Asking the searcher ----------------------------------------------------------------------------

class Job(NamedTuple):
    """What the asker's thread is to do, and where its outcome goes."""

    future: futures.Future
    act: Any = None  # a function without parameters, or
    question: str = ""  # in words
    alike: tuple = ()  # (top, corrected): questions that have these in common are asked together


class Asker:
    """The one thread that uses the searcher; questions in words that wait are answered together."""

    def __init__(self, searcher):
        self.searcher, self.jobs = searcher, queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._work, name="asker", daemon=True)
        self.thread.start()

    def words(self, question, top, corrected=True):
        """A future of the hits of a question; or of the InputError that `check` raises."""
        return self._put(Job(futures.Future(), question=question, alike=(top, corrected)))

    def call(self, function, *arguments):
        """What one of the searcher's methods returns; waits for it."""
        return wait(self._put(Job(futures.Future(), functools.partial(function, *arguments))))

    def close(self, seconds=10):
        """End the thread once it has done what waits; a thread inside PyTorch while Python exits could crash it."""
        self.jobs.put(None)
        self.thread.join(seconds)

    def _put(self, job):
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            raise ServiceUnavailable(retry_after=1) from None
        return job.future

    def _work(self):
        while True:
            jobs = [self.jobs.get()]
            while len(jobs) < BATCH and not self.jobs.empty():
                jobs.append(self.jobs.get())
            together = {}
            for job in jobs:
                if job and job.future.set_running_or_notify_cancel():
                    together.setdefault(job.alike or job, []).append(job)
            for alike, group in together.items():
                if isinstance(alike, Job):
                    _settle(group, lambda job: [job.act()], alike)
                else:
                    self._answer(group, *alike)
            if None in jobs:
                return

    def _answer(self, jobs, top, corrected):
        good = [job for job in jobs if self._is_good(job)]
        if good:
            _settle(good, self.searcher.by_words, [job.question for job in good], top, corrected)

    def _is_good(self, job):
        """Whether a question can be asked; else its own sentence, and nobody else's, is its answer."""
        try:
            self.searcher.check(job.question)
            return True
        except Exception as error:
            job.future.set_exception(error)
            return False


def _settle(jobs, act, *arguments):
    """Give each job's future its part of what `act` returns, or what it raises: the thread lives on."""
    try:
        for job, outcome in zip(jobs, act(*arguments), strict=True):
            job.future.set_result(outcome)
    except Exception as error:
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(error)


def wait(future):
    """A future's result; 503 where it takes too long."""
    try:
        return future.result(ANSWER_SECONDS)
    except futures.TimeoutError:
        future.cancel()
        raise ServiceUnavailable(retry_after=ANSWER_SECONDS) from None


# Pages ------------------------------------------------------------------------------------------

class Card(NamedTuple):
    """What a page shows of a photo."""

    number: int
    item: str  # its path in the gallery's folder, or its id
    captions: list
    photo: str  # "there", "missing", or "none" in a gallery without photos
    score: float | None = None
    moved: str = ""  # where the other ranking has it


class Pages:
    """The views: each takes a request and gives an answer."""

    def __init__(self, searcher, asker):
        self.searcher, self.asker, self.gallery = searcher, asker, searcher.gallery
        self.files = {name: _read(name) for name in ("style.css", "search.css", "search.js")}

    # Answers in HTML

    def words(self):
        """GET /: the first page; with ?q=, what a question in words finds; with &compare=1, both rankings."""
        question, top, compare = request.args.get("q"), _top(request.args.get("top", TOP)), self._compares()
        if question is None:
            return self._page("search_home.html", examples=self._examples())
        asked = [self.asker.words(question, top, corrected) for corrected in ([True, False] if compare else [True])]
        hits, *plain = [wait(future) for future in asked]
        return self._page("search_words.html", top=top, cards=self._cards(hits, *plain),
                          in_vain="compare" in request.args and not compare,
                          plain=self._cards(*plain, hits) if compare else None, more=_more(hits, top))

    def photo(self):
        """POST /photo: what an uploaded photo finds: photos alike and captions that fit."""
        file = request.files.get("photo")
        if file is None or not file.filename:
            raise InputError("there was no photo: choose one, or drop it on the page")
        check_upload(file.stream)
        hits, captions = self.asker.call(self.searcher.by_photo, file.stream, TOP)
        return self._page("search_photo.html", name=file.filename, cards=self._cards(hits), captions=captions)

    def like(self, number):
        """GET /like/<number>: photos like one of the gallery's."""
        card, top = self._card(number), _top(request.args.get("top", TOP))
        hits = self.asker.call(self.searcher.like, number, top)
        return self._page("search_like.html", card=card, cards=self._cards(hits), more=_more(hits, top))

    def hubs(self):
        """GET /hubs: the photos that are among the first ten of the most questions."""
        hubs = self._hubs
        cards = None if hubs is None else [(self._card(number), count) for number, count in hubs]
        return self._page("search_hubs.html", hubs=cards, questions=self.gallery.description["hubs"])

    def api(self):
        """GET /api: how to ask in JSON."""
        return self._page("search_api.html", address=request.host_url, top_limit=TOP_LIMIT, default=TOP,
                          json_megabytes=JSON_LIMIT // 2**20)

    def bad_input(self, error):
        """400 with the sentence of an InputError."""
        return self._refusal(400, "That could not be searched", str(error))

    def error(self, error):
        """Any other status with a sentence of ours, and the headers that belong to it."""
        answer = self._refusal(error.code, error.name, SENTENCES.get(error.code, error.description))
        answer.headers.extend((name, value) for name, value in error.get_headers() if name != "Content-Type")
        return answer

    # Answers of other kinds

    def search(self):
        """POST /api/search: {"query", "top"} -> {"query", "results": [{"item", "score"}, ...]}."""
        question, top = _read_question()
        hits = wait(self.asker.words(question, top))
        return _json({"query": question, "results": [{"item": hit.item, "score": hit.score} for hit in hits]})

    def thumbnail(self, number):
        """GET /photos/<number>: a photo, encoded again as a small JPEG; 404 where it is gone or broken."""
        path = self.gallery.photo(number) if number < self.gallery.count else None
        try:
            content = _thumbnail(path, os.stat(path).st_mtime_ns) if path else None
        except (InputError, OSError):
            content = None
        return _kept(content, "image/jpeg") if content else abort(404)

    def style(self):
        """GET /search.css: the report's style and what the page adds to it."""
        return _kept(self.files["style.css"] + self.files["search.css"], "text/css")

    def script(self):
        """GET /search.js: dropping photos; searching by words does without."""
        return _kept(self.files["search.js"], "text/javascript")

    def icon(self):
        """GET /favicon.ico: there is none, which is no error."""
        return Response(status=204)

    # What they are made of

    def _page(self, file, status=200, /, **values):
        page = template(file).render(query=request.args.get("q") or "", compare=self._compares(),
                                     correction=self.gallery.correction, count=self.gallery.count,
                                     megabytes=UPLOAD_LIMIT // 2**20, **values)
        # What UTF-8 can't write, such as an odd byte of a file name, is shown as an escape.
        return Response(page.encode("utf-8", "backslashreplace"), status, mimetype="text/html")

    def _refusal(self, status, name, sentence):
        if request.path.startswith("/api/"):
            return _json({"error": sentence}, status)
        if status in (403, 421):  # it is not our page that is asking: nothing of the gallery is told
            return Response(sentence + "\n", status, mimetype="text/plain")
        return self._page("search_error.html", status, name=name, sentence=sentence)

    def _compares(self):
        return request.args.get("compare") == "1" and self.gallery.correction != "none"

    def _card(self, number, **values):
        if number >= self.gallery.count:
            abort(404)
        if self.gallery.photo_folder is None:
            photo = "none"
        else:
            photo = "missing" if self.gallery.photo(number) is None else "there"
        return Card(number, self.gallery.items[number], self.gallery.captions(number), photo, **values)

    def _cards(self, hits, others=None):
        """Cards of hits in their order; others: the other ranking, which has them elsewhere."""
        ranks = {hit.number: rank for rank, hit in enumerate(others or [])}
        return [self._card(hit.number, score=hit.score, moved="" if others is None else _moved(rank, ranks, hit.number))
                for rank, hit in enumerate(hits)]

    def _examples(self):
        count = self.gallery.count
        captions = [self.gallery.captions(count * part // EXAMPLES)[:1] for part in range(EXAMPLES) if part < count]
        return list(dict.fromkeys(caption for own in captions for caption in own))

    @functools.cached_property
    def _hubs(self):
        return self.asker.call(self.searcher.hubs, HUBS)


def _read(name):
    with open(os.path.join(TEMPLATES, name), "rb") as file:
        return file.read()


def _json(content, status=200):
    """The JSON of other people's texts, in ASCII: half a surrogate pair is escaped like all else."""
    return Response(json.dumps(content) + "\n", status, mimetype="application/json")


def _kept(content, kind):
    """An answer that a browser may keep, but asks each time whether it still holds."""
    answer = Response(content, mimetype=kind)
    answer.add_etag()
    return answer.make_conditional(request)


def _moved(rank, ranks, number):
    if number not in ranks:
        return "not in the other"
    return "same place" if ranks[number] == rank else f"{ranks[number] + 1} in the other"


def _more(hits, top):
    """How many results a link to more of them asks for; None where there are no more."""
    return min(TOP_LIMIT, 5 * top) if len(hits) == top < TOP_LIMIT else None


def _top(text):
    if not re.fullmatch(r"[0-9]{1,4}", str(text)) or not 1 <= int(text) <= TOP_LIMIT:
        raise InputError(f"top is {str(text)[:20]!r}: give a whole number from 1 to {TOP_LIMIT}")
    return int(text)


def _read_question():
    """(query, top) of a request in JSON. Raises InputError, 413 or 415 for anything else."""
    if request.mimetype != "application/json":
        abort(415)
    request.max_content_length = JSON_LIMIT
    try:
        content = json.loads(request.get_data())
    except (ValueError, RecursionError):
        raise InputError('this is not JSON: send such as {"query": "two dogs in the snow", "top": 10}') from None
    if not isinstance(content, dict) or not isinstance(content.get("query"), str) or set(content) - {"query", "top"}:
        raise InputError('send an object with "query", a text, and if you like "top", a number, and nothing else')
    top = content.get("top", TOP)
    if type(top) is not int:
        raise InputError(f"top is not a whole number: give one from 1 to {TOP_LIMIT}")
    return content["query"], _top(top)


def check_upload(file):
    """Raise InputError unless a file begins like a photo of a known format and no absurd size."""
    try:
        open_photo(file)
    except InputError as error:
        raise InputError(f"this photo cannot be taken, since {error}: send a smaller copy") from None
    except Exception:  # decoders raise many kinds on broken files
        raise InputError("this is not a photo that can be read: send a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG "
                         "2000 file") from None
    file.seek(0)


_decoders = threading.BoundedSemaphore(DECODERS)


@functools.lru_cache(THUMBNAILS)
def _thumbnail(path, modified):
    """A photo's thumbnail; modified: when, so that a changed photo is looked at again."""
    with _decoders:
        return thumbnail(path, THUMBNAIL)


# The server -------------------------------------------------------------------------------------

def make_server(app, host, port):
    """A waitress server of the app that listens already; InputError where the address can't be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((host, port), family=family, backlog=SERVER["backlog"])
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise InputError(f"--host {host} --port {port} cannot be listened at ({reason}): give another port, or an "
                         "address of this machine") from error
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that a request waits a moment is no news
    server = create_server(app, sockets=[bound], **SERVER)
    server.channel_class = Channel
    return server


class Parser(HTTPRequestParser):
    """Reads and drops a body that is too large, then lets the app refuse it by its length, which it sees.

    Were it refused at once, the sender, still sending, would find the connection broken and read no sentence.
    """

    left = 0  # bytes to drop

    def received(self, data):
        """As waitress's: take in some bytes and say how many were used."""
        if self.left:
            taken = min(len(data), self.left)
            self.left -= taken
            self.completed = not self.left
            return taken
        taken = super().received(data)
        if self.error and self.error.code == 413 and not self.chunked and self.content_length <= SWALLOWED:
            self.error = None
            self.headers["CONNECTION"] = "close"  # a body that comes all the same must not be read as a request
            if not self.expect_continue:  # who asks before sending hears at once
                self.left, self.completed = self.content_length, False
            self.expect_continue = False
        return taken


class Refusal(ErrorTask):
    """waitress's own answer to what is no HTTP, with the headers that every answer has."""

    def execute(self):
        self.response_headers.extend(HEADERS.items())
        super().execute()


class Channel(HTTPChannel):
    """A connection."""

    error_task_class = Refusal
    parser_class = Parser
