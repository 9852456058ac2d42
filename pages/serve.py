"""The search page of a gallery: words or a photo in, photos out, in a browser or as JSON.

    python3 search.py --index runs/x/gallery --serve

Visitors may be strangers, and so may the authors of captions and file names. Therefore no address
contains a path, no text becomes markup or script, and only requests to the page's own host names
are answered. docs/search.md says what a proxy in front has to add.
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
import time
from concurrent import futures
from contextlib import suppress
from typing import Any, NamedTuple

from flask import Flask, Response, request
from waitress import create_server
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask
from werkzeug.exceptions import HTTPException, ServiceUnavailable, abort

from inputs.decoding import Decoder, open_photo, thumbnail
from pages.template import TEMPLATES, template
from runtime.errors import InputError

TOP, TOP_LIMIT = 10, 100  # results per question: by default, and at most
HUBS = 30  # shown on the page of hubs
EXAMPLES = 3  # captions offered as questions on the first page
UPLOAD_LIMIT = 20 * 2**20  # bytes of a photo
JSON_LIMIT = 2**20  # bytes of a question in JSON
SWALLOWED = 2**30  # most bytes of a too large upload that are read, so that its sender hears why
THUMBNAIL = 400  # pixels
THUMBNAILS = 512  # kept in memory: some 10 MB
# Gallery photos decoded at a time, besides one uploaded photo. The largest take 1 GB each.
DECODERS = 2
THUMBNAILS_WAITING = 12  # requests that may wait for a decoder, so that threads remain for others
PHOTOS_WAITING = 8  # uploaded photos that may wait; further ones get 503
BATCH = 64  # most questions answered together
WAITING = 64  # questions that may wait; further ones get 503
ANSWER_SECONDS = 30  # until a question is given up
PHOTO_RETRY = 5  # seconds after which a refused photo may be sent again
HEAD_SECONDS = 20  # for the whole head of a request

SERVER = {
    "threads": 32,
    "connection_limit": 256,
    "backlog": 128,
    "channel_timeout": 30,
    "cleanup_interval": 10,
    "asyncore_use_poll": True,
    "ident": None,
    "max_request_body_size": UPLOAD_LIMIT + 1,
    # Large enough that a question of 10,000 words in an address gets a sentence as its answer.
    "max_request_header_size": 2**18,
}

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    # With `no-referrer`, browsers would send our own forms' origin as null.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",  # other sites' pages cannot show our photos
    "Cache-Control": "no-cache",  # a rebuild gives the numbers to other photos
}

SENTENCES = {
    403: "this request comes from another site's page: open this page itself",
    404: "there is nothing at this address: start at the search page",
    405: "this address does not take this kind of request: /api says what is taken",
    413: f"this is more than {UPLOAD_LIMIT // 2**20} MB, or than {JSON_LIMIT // 2**20} MB of JSON: "
    "send less, such as a smaller copy of the photo",
    415: "send JSON, with the header Content-Type: application/json",
    421: "this page does not answer to that host name: use the address that the server said when "
    "it started, or start it with --allow_host",
    500: "something broke in the server: its output says what",
    503: "too many questions at once, or one that takes too long: ask again in a moment",
}


def serve(searcher, host="127.0.0.1", port=8000, allow_hosts=()):
    """Serve the page until SIGINT or SIGTERM; the address is printed on stderr.

    Raises InputError if the address cannot be used, or an allowed name is not a host name.

    port: 0 takes a free one
    allow_hosts: further host names that the page answers to, such as a proxy's
    """
    app = make_app(searcher, host, allow_hosts)
    server = make_server(app, host, port)
    # waitress ends its loop at a SystemExit, as at Ctrl-C.
    signal.signal(signal.SIGTERM, _end)
    print(
        f"{searcher.gallery.count:,} photos can be searched at "
        f"http://{_in_address(host)}:{server.effective_port}/ (Ctrl-C ends)",
        file=sys.stderr,
    )
    if not _is_loopback(host):
        print(
            f"note: --host {host} lets other machines in; there are no accounts and no encryption "
            "here: see docs/search.md",
            file=sys.stderr,
        )
    sys.stderr.flush()
    server.run()
    app.extensions["pages"].close()


def _end(number, frame):
    sys.exit(0)


def make_app(searcher, host="127.0.0.1", allow_hosts=()):
    """The page as a Flask app; host: the address it will be bound to; allow_hosts: see `serve`."""
    app = Flask(__name__, static_folder=None, template_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=UPLOAD_LIMIT, MAX_FORM_PARTS=10)
    app.url_map.merge_slashes = False
    app.extensions["pages"] = pages = Pages(searcher)
    for rule, view in {
        "/": pages.words,
        "/like/<int:number>": pages.like,
        "/hubs": pages.hubs,
        "/api": pages.api,
        "/photos/<int:number>": pages.thumbnail,
        "/search.css": pages.style,
        "/search.js": pages.script,
        "/favicon.ico": pages.icon,
    }.items():
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
    """The host names that the page answers to. Any other name may be an attack by DNS rebinding."""

    def __init__(self, host, allow_hosts=()):
        """host: the address that the page is bound to.

        Raises InputError for an allowed name that is not a host name.
        """
        for name in allow_hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name) and not _address(name):
                raise InputError(
                    f"--allow_host {name} is not a host name: give it without a scheme, port or "
                    "path"
                )
        self.names = {_in_address(name.lower()) for name in (host, *allow_hosts)}
        if _is_loopback(host) or _is_any(host):
            self.names |= {"localhost", "127.0.0.1", "[::1]"}
        # Any address is safe: a page elsewhere cannot have this machine's address as its host.
        self.by_address = _is_any(host)

    def __contains__(self, host):
        """host: a Host header, with or without a port, which may be a forwarded one."""
        match = re.fullmatch(r"([a-z0-9._-]+?|\[[0-9a-f:.]+\])\.?(:\d{1,5})?", (host or "").lower())
        return bool(match) and (
            match[1] in self.names or self.by_address and bool(_address(match[1].strip("[]")))
        )


def _address(host):
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _in_address(host):
    """A host as it is written in a URL."""
    return f"[{host}]" if ":" in host else host


def _is_loopback(host):
    return host == "localhost" or bool(_address(host)) and _address(host).is_loopback


def _is_any(host):
    return bool(_address(host)) and _address(host).is_unspecified


def check_sender(own):
    """Refuse a request to a foreign host name, and a POST request from another site's page."""
    if request.headers.get("Host") not in own:
        abort(421)
    origin = request.headers.get("Origin")
    if (
        request.method == "POST"
        and origin is not None
        and origin.partition("://")[2] != request.headers["Host"]
    ):
        abort(403)


# Asking the searcher ----------------------------------------------------------------------------


class Job(NamedTuple):
    """A task of the asker's thread: a function to call, or a question in words."""

    future: futures.Future  # receives the outcome
    act: Any = None  # a function without parameters, or None
    question: str = ""
    alike: tuple = ()  # (top, corrected): questions that share these are asked together


class Asker:
    """A thread that uses the searcher; waiting questions in words are answered together."""

    def __init__(self, searcher, waiting=None, together=BATCH, retry_after=1):
        """waiting: most jobs that wait (None: WAITING); further ones get 503
        together: most jobs taken up at once; jobs that are taken up cannot be cancelled
        retry_after: seconds that a 503 tells the browser to wait
        """
        self.searcher, self.jobs = searcher, queue.Queue(WAITING if waiting is None else waiting)
        self.together, self.retry_after = together, retry_after
        self.thread = threading.Thread(target=self._work, name="asker", daemon=True)
        self.thread.start()

    def words(self, question, top, corrected=True):
        """A future of a question's hits, or of the InputError of the searcher's `check`."""
        return self._put(Job(futures.Future(), question=question, alike=(top, corrected)))

    def call(self, function, *arguments):
        """Wait for a function, such as one of the searcher's methods, and return its result."""
        return wait(self._put(Job(futures.Future(), functools.partial(function, *arguments))))

    def close(self, seconds=10):
        """End the thread after the waiting jobs. Exiting while it is inside PyTorch may crash."""
        self.jobs.put(None)
        self.thread.join(seconds)

    def drop(self):
        """Cancel the waiting jobs."""
        with suppress(queue.Empty):
            while True:
                self.jobs.get_nowait().future.cancel()

    def _put(self, job):
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            raise ServiceUnavailable(retry_after=self.retry_after) from None
        return job.future

    def _work(self):
        while True:
            jobs = [self.jobs.get()]
            while len(jobs) < self.together and not self.jobs.empty():
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
        """Whether a question can be asked; if not, it fails alone, not those asked with it."""
        try:
            self.searcher.check(job.question)
            return True
        except Exception as error:
            job.future.set_exception(error)
            return False


def _settle(jobs, act, *arguments):
    """Give each job's future its part of what `act` returns, or the exception that it raises."""
    try:
        for job, outcome in zip(jobs, act(*arguments), strict=True):
            job.future.set_result(outcome)
    except Exception as error:
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(error)


def wait(future):
    """A future's result; 503 if it takes too long."""
    try:
        return future.result(ANSWER_SECONDS)
    except futures.TimeoutError:
        future.cancel()
        raise ServiceUnavailable(retry_after=ANSWER_SECONDS) from None


# Pages ------------------------------------------------------------------------------------------


class Card(NamedTuple):
    """What a page shows for a photo."""

    number: int
    item: str  # its path in the gallery's folder, or its id
    captions: list
    photo: str  # "there", "missing", or "none" in a gallery without photos
    score: float | None = None
    moved: str = ""  # its place in the other ranking


class Pages:
    """The views: each turns a request into an answer."""

    def __init__(self, searcher):
        self.searcher, self.gallery = searcher, searcher.gallery
        self.asker = Asker(searcher)
        # Questions in words never wait for photos, which have a separate process and thread.
        self.photo_asker = Asker(searcher, PHOTOS_WAITING, together=1, retry_after=PHOTO_RETRY)
        self.decoder = Decoder(ANSWER_SECONDS)
        self.files = {name: _read(name) for name in ("style.css", "search.css", "search.js")}

    def close(self):
        """End the threads and the process that decodes."""
        self.asker.close()
        self.photo_asker.drop()
        self.decoder.close()  # a photo that is being decoded is given up
        self.photo_asker.close()

    # Answers in HTML

    def words(self):
        """GET /: the first page; with ?q=, a question's hits; with &compare=1, both rankings."""
        question, top, compare = (
            request.args.get("q"),
            _top(request.args.get("top", TOP)),
            self._compares(),
        )
        if question is None:
            return self._page("search_home.html", examples=self._examples())
        asked = [
            self.asker.words(question, top, corrected)
            for corrected in ([True, False] if compare else [True])
        ]
        hits, *plain = [wait(future) for future in asked]
        return self._page(
            "search_words.html",
            top=top,
            cards=self._cards(hits, *plain),
            unknown=self.searcher.unknown(question),
            in_vain="compare" in request.args and not compare,
            plain=self._cards(*plain, hits) if compare else None,
            more=_more(hits, top),
        )

    def photo(self):
        """POST /photo: similar photos and fitting captions for an uploaded photo."""
        file = request.files.get("photo")
        if file is None or not file.filename:
            raise InputError("there was no photo: choose one, or drop it on the page")
        check_upload(file.stream)
        embedding = self.photo_asker.call(self.searcher.embed_photo, file.stream, self.decoder)
        hits, captions = self.asker.call(self.searcher.by_embedding, embedding, TOP)
        return self._page(
            "search_photo.html", name=file.filename, cards=self._cards(hits), captions=captions
        )

    def like(self, number):
        """GET /like/<number>: photos similar to one of the gallery's."""
        card, top = self._card(number), _top(request.args.get("top", TOP))
        hits = self.asker.call(self.searcher.like, number, top)
        return self._page(
            "search_like.html", card=card, cards=self._cards(hits), more=_more(hits, top)
        )

    def hubs(self):
        """GET /hubs: the photos that are most often among a question's first ten."""
        hubs = self._hubs
        cards = hubs and [(self._card(number), count, alarm) for number, count, alarm in hubs]
        return self._page(
            "search_hubs.html", hubs=cards, questions=self.gallery.description["hubs"]
        )

    def api(self):
        """GET /api: how to ask in JSON."""
        return self._page(
            "search_api.html",
            width=self.gallery.width,
            address=request.host_url,
            top_limit=TOP_LIMIT,
            default=TOP,
            json_megabytes=JSON_LIMIT // 2**20,
        )

    def bad_input(self, error):
        """400 with the sentence of an InputError."""
        return self._refusal(400, "That could not be searched", str(error))

    def error(self, error):
        """Any other status, with our own sentence and its usual headers."""
        answer = self._refusal(error.code, error.name, SENTENCES.get(error.code, error.description))
        answer.headers.extend(
            (name, value) for name, value in error.get_headers() if name != "Content-Type"
        )
        return answer

    # Answers of other kinds

    def search(self):
        """POST /api/search: the best photos in JSON; search_api.html describes both formats."""
        question, top = _read_question()
        if not isinstance(question, str):
            hits = self.asker.call(self.searcher.by_numbers, question, top)
            return _json({"results": _results(hits)})
        hits = wait(self.asker.words(question, top))
        return _json(
            {
                "query": question,
                "results": _results(hits),
                "unknown_words": self.searcher.unknown(question),
            }
        )

    def thumbnail(self, number):
        """GET /photos/<number>: a photo as a small JPEG; 404 if it is missing or broken."""
        path = self.gallery.photo(number) if number < self.gallery.count else None
        try:
            content = _thumbnail(path, os.stat(path).st_mtime_ns) if path else None
        except (InputError, OSError):
            content = None
        return _kept(content, "image/jpeg") if content else abort(404)

    def style(self):
        """GET /search.css: the report's style and the search page's additions."""
        return _kept(self.files["style.css"] + self.files["search.css"], "text/css")

    def script(self):
        """GET /search.js: for dropping photos on a page; searching by words needs no script."""
        return _kept(self.files["search.js"], "text/javascript")

    def icon(self):
        """GET /favicon.ico: none, without an error in the browser's console."""
        return Response(status=204)

    # What they are made of

    def _page(self, file, status=200, /, **values):
        page = template(file).render(
            query=request.args.get("q") or "",
            compare=self._compares(),
            correction=self.gallery.correction,
            count=self.gallery.count,
            reads_words=self.searcher.reads_words,
            reads_photos=self.searcher.reads_photos,
            megabytes=UPLOAD_LIMIT // 2**20,
            **values,
        )
        # What UTF-8 cannot encode, such as an odd byte in a file name, becomes an escape.
        return Response(page.encode("utf-8", "backslashreplace"), status, mimetype="text/html")

    def _refusal(self, status, name, sentence):
        if request.path.startswith("/api/"):
            return _json({"error": sentence}, status)
        if status in (403, 421):  # another site is asking, so the answer shows nothing of ours
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
        return Card(
            number, self.gallery.items[number], self.gallery.captions(number), photo, **values
        )

    def _cards(self, hits, others=None):
        """Cards of hits, in their order; others: the other ranking, to compare with, or None."""
        ranks = {hit.number: rank for rank, hit in enumerate(others or [])}
        return [
            self._card(
                hit.number,
                score=hit.score,
                moved="" if others is None else _moved(rank, ranks, hit.number),
            )
            for rank, hit in enumerate(hits)
        ]

    def _examples(self):
        count = self.gallery.count
        captions = [
            self.gallery.captions(count * part // EXAMPLES)[:1]
            for part in range(EXAMPLES)
            if part < count
        ]
        return list(dict.fromkeys(caption for own in captions for caption in own))

    @functools.cached_property
    def _hubs(self):
        return self.asker.call(self.searcher.hubs, HUBS)


def _results(hits):
    return [{"item": hit.item, "score": hit.score} for hit in hits]


def _read(name):
    with open(os.path.join(TEMPLATES, name), "rb") as file:
        return file.read()


def _json(content, status=200):
    """An answer in JSON, in ASCII, so that even half of a surrogate pair can be sent."""
    return Response(
        json.dumps(content, allow_nan=False) + "\n", status, mimetype="application/json"
    )


def _kept(content, kind):
    """An answer that a browser may cache, but must revalidate each time."""
    answer = Response(content, mimetype=kind)
    answer.add_etag()
    return answer.make_conditional(request)


def _moved(rank, ranks, number):
    if number not in ranks:
        return "not in the other"
    return "same place" if ranks[number] == rank else f"{ranks[number] + 1} in the other"


def _more(hits, top):
    """How many results a link to more of them asks for; None if there are no more."""
    return min(TOP_LIMIT, 5 * top) if len(hits) == top < TOP_LIMIT else None


def _top(text):
    if not re.fullmatch(r"[0-9]{1,4}", str(text)) or not 1 <= int(text) <= TOP_LIMIT:
        raise InputError(f"top is {str(text)[:20]!r}: give a whole number from 1 to {TOP_LIMIT}")
    return int(text)


def _read_question():
    """(query, top) of a request in JSON; the query is a text, or an embedding as a list of numbers.

    Raises InputError, 413 or 415 for anything else.
    """
    if request.mimetype != "application/json":
        abort(415)
    request.max_content_length = JSON_LIMIT
    try:
        content = json.loads(request.get_data())
    except (ValueError, RecursionError):
        raise InputError(
            'this is not JSON: send something like {"query": "two dogs in the snow", "top": 10}'
        ) from None
    kinds = {"query": str, "embedding": list}
    asked = [name for name in kinds if isinstance(content, dict) and name in content]
    if (
        len(asked) != 1
        or not isinstance(content[asked[0]], kinds[asked[0]])
        or set(content) - {*asked, "top"}
    ):
        raise InputError(
            'send an object with "query", a text, or "embedding", a list of numbers, and if you '
            'like "top", a number, and nothing else'
        )
    top = content.get("top", TOP)
    if type(top) is not int:
        raise InputError(f"top is not a whole number: give one from 1 to {TOP_LIMIT}")
    return content[asked[0]], _top(top)


def check_upload(file):
    """Raise InputError unless a file starts like a photo of a known format and sane size."""
    try:
        open_photo(file)
    except InputError as error:
        raise InputError(
            f"this photo cannot be taken, since {error}: send a smaller copy"
        ) from None
    except Exception:  # decoders raise many kinds on broken files
        raise InputError(
            "this is not a photo that can be read: send a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF "
            "or JPEG 2000 file"
        ) from None
    file.seek(0)


_decoders = threading.BoundedSemaphore(DECODERS)
_thumbnails_waiting = threading.BoundedSemaphore(DECODERS + THUMBNAILS_WAITING)


@functools.lru_cache(THUMBNAILS)
def _thumbnail(path, modified):
    """A photo's thumbnail; modified: time of the last change, so that a changed photo is reread."""
    if not _thumbnails_waiting.acquire(blocking=False):
        raise ServiceUnavailable(retry_after=1)
    try:
        with _decoders:
            return thumbnail(path, THUMBNAIL)
    finally:
        _thumbnails_waiting.release()


# The server -------------------------------------------------------------------------------------


def make_server(app, host, port):
    """A waitress server of the app, already listening; InputError if the address is taken."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((host, port), family=family, backlog=SERVER["backlog"])
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise InputError(
            f"--host {host} --port {port} cannot be listened at ({reason}): give another port, or "
            "an address of this machine"
        ) from error
    # Its warnings that a request waits a moment are no news.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    server = create_server(app, sockets=[bound], **SERVER)
    server.channel_class = Channel
    return server


class Parser(HTTPRequestParser):
    """Reads and drops a body that is too large, then lets the app refuse it by its length.

    A sender that is refused while it is sending finds the connection broken and reads no answer.
    """

    left = 0  # bytes to drop

    def __init__(self, adj):
        super().__init__(adj)
        self.begun = time.monotonic()

    def received(self, data):
        """As waitress's: take in some bytes, return how many were used."""
        if self.left:
            taken = min(len(data), self.left)
            self.left -= taken
            self.completed = not self.left
            return taken
        taken = super().received(data)
        if (
            self.error
            and self.error.code == 413
            and not self.chunked
            and self.content_length <= SWALLOWED
        ):
            self.error = None
            # A body that comes all the same must not be read as the next request.
            self.headers["CONNECTION"] = "close"
            if not self.expect_continue:  # a sender that asks first is answered at once
                self.left, self.completed = self.content_length, False
            self.expect_continue = False
        return taken


class Refusal(ErrorTask):
    """waitress's own answer to anything that is not HTTP, with the headers of every answer."""

    def execute(self):
        self.response_headers.extend(HEADERS.items())
        super().execute()


class Channel(HTTPChannel):
    """A connection that is closed if a request's head takes too long."""

    error_task_class = Refusal
    parser_class = Parser

    def readable(self):
        """As waitress's, which calls this at least once a second, with a limit on the head's time.

        waitress's own limit starts again with each byte.
        """
        request = self.request
        if (
            request
            and not request.headers_finished
            and time.monotonic() > request.begun + HEAD_SECONDS
        ):
            self.will_close = True
        return super().readable()
