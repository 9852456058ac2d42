"""The search server: its pages and JSON, batched questions, and nothing else for strangers."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from waitress import wasyncore
from werkzeug.exceptions import ServiceUnavailable

import search
from gallery.open import open_searcher
from inputs.decoding import Decoder
from pages import serve
from runtime.errors import InputError
from tests.helpers import load_search
from tests.helpers.fake_searcher import FakeSearcher
from tests.helpers.made import ROOT

POLICY = "default-src 'self'"


@pytest.fixture(scope="module")
def decoder():
    """A process that decodes for all tests here."""
    found = Decoder()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def one_decoder(decoder, monkeypatch):
    monkeypatch.setattr(serve, "Decoder", lambda seconds: decoder)


@pytest.fixture
def searcher(tmp_path):
    return FakeSearcher(tmp_path / "photos")


@pytest.fixture
def client(searcher):
    """A client of the searcher's page that checks the headers of every answer."""
    return checked_client(serve.make_app(searcher))


def checked_client(app):
    client = app.test_client()
    answer = client.open

    def checked(*arguments, **options):
        response = answer(*arguments, **options)
        assert response.headers["Content-Security-Policy"].split(";")[0] == POLICY
        assert "unsafe" not in response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        return response

    client.open = checked
    return client


class Page(HTMLParser):
    """The numbers and texts of a page's lists by their label, all its tags and attributes, and its text."""

    def __init__(self, response):
        super().__init__()
        self.tags, self.attributes, self.texts, self.lists, self.label = [], [], [], {}, None
        self.feed(response.get_data(as_text=True))
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "ol":
            self.label = values["aria-label"]
            self.lists[self.label] = []
        if tag == "li" and "data-number" in values:
            self.lists[self.label].append(int(values["data-number"]))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def links(self):
        return [value for name, value in self.attributes if name == "href"]


def picture(width=80, height=60, kind="PNG", colour=(40, 60, 210), **options):
    """An image file's bytes."""
    content = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(content, kind, **options)
    return content.getvalue()


def upload(client, content, name="mine.png", **options):
    return client.post("/photo", data={"photo": (io.BytesIO(content), name)}, **options)


# Pages ------------------------------------------------------------------------------------------


def test_the_first_page_offers_questions(client):
    page = Page(client.get("/"))
    assert (
        "12 photos" in page.text and "up to 20 MB" in page.text and "corrected by nnn" in page.text
    )
    assert [link for link in page.links if link.startswith("/?q=")] == [
        "/?q=a%20red%20star",
        "/?q=a%20red%20boat",
        "/?q=a%20red%20tree",
    ]


def test_words_find_photos_with_scores_and_captions(client):
    page = Page(client.get("/?q=a+red+star&top=4"))
    assert page.lists == {"Results": [1, 2, 3, 0]}  # 2/3, 2/3, 2/3 and 3/3 - 0.4
    assert re.findall(r"\d\. (\d\.\d+)", page.text) == ["0.667", "0.667", "0.667", "0.600"]
    assert "one star that is red" in page.text and "star/red.png" in page.text
    assert {"/photos/0", "/photos/1"} <= {value for name, value in page.attributes if name == "src"}
    assert {"/like/0", "/like/1"} <= set(page.links)


def test_the_switch_shows_both_rankings(client):
    page = Page(client.get("/?q=a+red+star&top=4&compare=1"))
    assert page.lists == {"With correction": [1, 2, 3, 0], "Without correction": [0, 1, 2, 3]}
    assert page.text.count("4 in the other") == 2 and page.text.count("1 in the other") == 2
    assert ("name", "compare") in page.attributes  # the next question is asked with the switch on
    page = Page(client.get("/?q=a+red&top=1&compare=1"))
    assert (
        page.lists == {"With correction": [0], "Without correction": [0]}
        and "same place" in page.text
    )


def test_without_a_correction_there_is_one_ranking(tmp_path):
    client = checked_client(serve.make_app(FakeSearcher(tmp_path, correction="none")))
    page = Page(client.get("/?q=a+red+star&top=4&compare=1"))
    assert page.lists == {"Results": [0, 1, 2, 3]} and "no hub correction" in page.text
    assert "without a hub correction" in Page(client.get("/")).text


def test_more_results_are_a_link(client):
    assert "/?q=a%20star&top=10" in Page(client.get("/?q=a+star&top=2")).links
    assert "/?q=a%20star&top=10&compare=1" in Page(client.get("/?q=a+star&top=2&compare=1")).links
    assert not any(
        "top=100" in link for link in Page(client.get("/?q=a+star&top=50")).links
    )  # there are only twelve


@pytest.mark.parametrize("top", ["0", "101", "-1", "1.5", "", "x", "9" * 50, "٣"])
def test_a_strange_number_of_results_is_refused(client, top):
    response = client.get("/", query_string={"q": "a star", "top": top})
    assert response.status_code == 400 and "whole number from 1 to 100" in Page(response).text


@pytest.mark.parametrize(
    "question, sentence",
    [
        ("", "The question is empty"),
        ("   ", "The question is empty"),
        ("qqq zzz", "No word of 'qqq zzz' is known"),
        ("star " * 10_000, "The question has 10000 words"),
    ],
)
def test_a_question_that_cannot_be_searched_gets_its_sentence(client, question, sentence):
    response = client.get("/", query_string={"q": question})
    page = Page(response)
    assert response.status_code == 400 and sentence in page.text and page.lists == {}


def test_more_like_this(client):
    page = Page(client.get("/like/5?top=3"))
    found = page.lists["Photos like it"]
    assert (
        set(found[:2]) == {1, 9} and len(found) == 3 and 5 not in found
    )  # the other green ones come first
    assert "More like boat/green.png" in page.text


def test_the_hubs_have_a_page(client):
    page = Page(client.get("/hubs"))
    assert (
        page.lists == {"Hubs": [0, 5]}
        and "N 10 7" in page.text
        and "Counted over: twelve captions." in page.text
    )
    assert page.text.count("was this photo made to come first?") == 1  # of the two


def test_unknown_hubs_are_said_to_be(client, searcher):
    searcher.hubs = lambda top: None
    assert "its hubs are not known" in Page(client.get("/hubs")).text


def test_a_gallery_without_photos_shows_names(searcher):
    searcher.gallery.photo_folder = None
    page = Page(checked_client(serve.make_app(searcher)).get("/?q=a+star"))
    assert "img" not in page.tags and "missing" not in page.text and "star/red.png" in page.text


# Photos in --------------------------------------------------------------------------------------


def test_a_photo_finds_photos_and_captions(client, searcher):
    with open(searcher.gallery.photo(6), "rb") as file:
        page = Page(upload(client, file.read()))
    assert page.lists["Photos like it"][0] == 6 and "Found for mine.png" in page.text
    assert page.text.index("a blue boat") < page.text.index("Photos like it")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_kinds_of_photos(client, kind):
    assert upload(client, picture(kind=kind)).status_code == 200


def bomb():
    """A PNG of a few bytes that says it has 400 million pixels."""
    content = bytearray(picture())
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "not a photo"),
        (b"no photo", "not a photo"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a photo"),
        (bomb(), "more than 89 million pixels"),
        (picture(11_000, 9_000), "more than 89 million pixels"),
    ],
    ids=["empty", "text", "a program", "a bomb", "a larger one"],
)
def test_what_is_no_photo_is_refused(client, searcher, content, sentence):
    response = upload(client, content)
    assert response.status_code == 400 and sentence in Page(response).text


@pytest.mark.parametrize("data", [{}, {"photo": "text"}, {"photo": (io.BytesIO(b""), "")}])
def test_no_photo_is_said_to_be_none(client, data):
    response = client.post("/photo", data=data, content_type="multipart/form-data")
    assert response.status_code == 400 and "There was no photo" in Page(response).text


def test_a_large_upload_is_refused_at_the_stated_limit(client):
    response = upload(client, b"\0" * (20 * 2**20 + 1))
    assert response.status_code == 413 and "more than 20 MB" in Page(response).text


# Photos out -------------------------------------------------------------------------------------


def test_photos_are_small_jpegs_without_what_the_file_told(client, searcher):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a secret camera"  # turned by a quarter
    Image.new("RGB", (1000, 500)).save(searcher.gallery.photo(3), "JPEG", exif=exif)
    response = client.get("/photos/3")
    with Image.open(io.BytesIO(response.data)) as shown:
        assert (shown.format, shown.size) == ("JPEG", (200, 400))
    assert response.mimetype == "image/jpeg" and b"secret" not in response.data
    again = client.get("/photos/3", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_a_photo_that_changed_is_shown_anew(client, searcher):
    before = client.get("/photos/3").data
    os.utime(searcher.gallery.photo(3), (1, 1))
    assert client.get("/photos/3").data == before
    Image.new("RGB", (90, 90)).save(searcher.gallery.photo(3))
    assert client.get("/photos/3").data != before


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
    ],
)
def test_photos_that_vanished_are_shown_as_missing(client, searcher, tmp_path, change):
    change(tmp_path / "photos/star/green.png")
    page = Page(client.get("/?q=a+green+star&top=2"))
    assert page.lists["Results"][0] == 1 and page.text.count("photo missing") == 1
    assert client.get("/photos/1").status_code == 404 and client.get("/photos/2").status_code == 200


def test_a_photo_that_broke_is_not_there(client, tmp_path):
    (tmp_path / "photos/star/red.png").write_bytes(b"\x89PNG and then nothing")
    assert client.get("/photos/0").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/photos/12",
        "/photos/-1",
        "/photos/" + "9" * 30,
        "/photos/1.5",
        "/photos/",
        "/photos/star/red.png",
        "/like/12",
        "/photos/../serve.py",
        "/photos/..%2f..%2fetc%2fpasswd",
        "/photos/%2e%2e/serve.py",
        "/photos//etc/passwd",
        "/templates/base.html",
        "/static/search.css",
        "/serve.py",
        "/hubs/",
        "/photos/1%00",
    ],
)
def test_nothing_else_is_served(client, path):
    response = client.get(path)
    assert response.status_code == 404 and "nothing at this address" in Page(response).text


@pytest.mark.parametrize(
    "method, path", [("post", "/"), ("delete", "/hubs"), ("get", "/photo"), ("put", "/photos/1")]
)
def test_other_methods_are_refused_in_style(client, method, path):
    response = getattr(client, method)(path)
    assert response.status_code == 405 and response.headers["Allow"] and "h1" in Page(response).tags


# JSON -------------------------------------------------------------------------------------------


def test_json_answers(client):
    response = client.post("/api/search", json={"query": "a red star", "top": 2})
    assert response.mimetype == "application/json"
    assert response.json == {
        "query": "a red star",
        "results": [
            {"item": "star/green.png", "score": 2 / 3},
            {"item": "star/blue.png", "score": 2 / 3},
        ],
        "unknown_words": [],
    }
    assert len(client.post("/api/search", json={"query": "a star"}).json["results"]) == 10


def test_json_asks_with_an_embedding(client):
    response = client.post("/api/search", json={"embedding": [0.5, 1], "top": 1})
    assert response.json == {"results": [{"item": "tree/white.png", "score": 6.5}]}
    assert "a list of 2 numbers" in Page(client.get("/api")).text


def test_forms_that_a_gallery_cannot_answer_are_left_out(searcher):
    client = checked_client(serve.make_app(searcher))
    for words, photos, said in (
        (False, True, "no text model, so it can't read words"),
        (True, False, "Type what a photo shows, in a sentence or a few words."),
        (False, False, "it is asked with embeddings in JSON"),
    ):
        searcher.reads_words, searcher.reads_photos = words, photos
        page = Page(client.get("/"))
        ids = [value for name, value in page.attributes if name == "id"]
        assert ("q" in ids, "photo" in ids) == (words, photos) and said in page.text
        assert ("For example" in page.text) == words


def test_words_that_the_model_does_not_know_are_named(client):
    page = client.get("/?q=a+qqq+red+<i>zz</i>").text
    assert "Not known to the model: qqq, &lt;i&gt;zz&lt;/i&gt;." in page
    assert "Not known" not in client.get("/?q=a+red+star").text
    answer = client.post("/api/search", json={"query": "a qqq star zz"}).json
    assert answer["unknown_words"] == ["qqq", "zz"] and len(answer["results"]) == 10


@pytest.mark.parametrize(
    "body, status, sentence",
    [
        ("", 400, "not JSON"),
        ("{", 400, "not JSON"),
        ("[" * 100_000, 400, "not JSON"),
        (b"\xff\xfe\xfd", 400, "not JSON"),
        ("[]", 400, "object"),
        ("{}", 400, "object"),
        ('"a star"', 400, "object"),
        ('{"query": 3}', 400, "object"),
        ('{"embedding": "a star"}', 400, "object"),
        ('{"embedding": [1, 2], "query": "a star"}', 400, "object"),
        ('{"embedding": [1, 2, 3]}', 400, "3 numbers"),
        ('{"embedding": [1, 2], "top": 0}', 400, "from 1 to 100"),
        ('{"query": "a star", "path": "/etc"}', 400, "object"),
        ('{"query": ""}', 400, "empty"),
        ('{"query": "qqq"}', 400, "No word|no word"),
        ('{"query": "a star", "top": "3"}', 400, "whole number"),
        ('{"query": "a star", "top": 0}', 400, "from 1 to 100"),
        ('{"query": "a star", "top": true}', 400, "whole number"),
        ('{"query": "a star", "top": 1e9}', 400, "whole number"),
        ('{"query": "star", "top": 101}', 400, "from 1 to 100"),
        ('{"query": "' + "a " * 2**19 + '"}', 413, "1 MB"),
    ],
)
def test_bad_json_gets_a_sentence_in_json(client, body, status, sentence):
    response = client.post("/api/search", data=body, content_type="application/json")
    assert response.status_code == status and list(response.json) == ["error"]
    assert re.search(sentence, response.json["error"])


@pytest.mark.parametrize(
    "method, path, status",
    [("get", "/api/search", 405), ("post", "/api/other", 404), ("post", "/api/search", 415)],
)
def test_other_requests_to_the_interface_get_json(client, method, path, status):
    response = getattr(client, method)(path, data="query=a+star")
    assert response.status_code == status and list(response.json) == ["error"]


def test_the_interface_is_documented_as_it_is(client):
    page = Page(client.get("/api"))
    example = json.loads(re.search(r"-d '(.*?)'", page.text)[1])
    assert set(example) == {"query", "top"} and type(example["top"]) is int
    assert "curl http://localhost/api/search" in page.text and "from 1 to 100" in page.text


# Other people's text ----------------------------------------------------------------------------

EVIL = "<script>alert(1)</script>\"' onload='x' {{ 7 * 7 }}\n&amp; star"


def test_texts_are_texts(client, searcher):
    searcher.gallery.items[0] = searcher.gallery.texts[0][0] = searcher.gallery.texts[0][1] = EVIL
    shown = " ".join(EVIL.split())
    answers = [
        client.get("/"),
        client.get("/", query_string={"q": EVIL}),
        client.get("/like/4"),
        client.get("/hubs"),
        client.get("/", query_string={"q": EVIL, "compare": "1"}),
        upload(client, picture(), EVIL.replace("\n", " ")),
    ]
    searcher.gallery.texts[0][0] = "no word of it"
    answers.append(client.get("/", query_string={"q": "<script>alert(1)</script>"}))
    for response in answers:
        page = Page(response)
        assert page.tags.count("script") == 1 and ("src", "/search.js") in page.attributes
        assert not [name for name, _ in page.attributes if name.startswith("on") or name == "style"]
    assert all(shown in Page(response).text for response in answers[:2])
    assert "alert(1)" in Page(answers[-1]).text


def test_odd_names_are_shown(client, searcher):
    searcher.gallery.items[0] = "caf\udce9 ../../x\n.png"  # a byte that is no UTF-8
    assert "caf\\udce9 ../../x .png" in Page(client.get("/?q=a+red+star")).text
    response = client.post("/api/search", json={"query": "a red star"})
    assert json.loads(response.data)["results"][0]["item"] == "caf\udce9 ../../x\n.png"


def test_half_a_surrogate_pair_is_no_harm(client):
    response = client.post(
        "/api/search", data=r'{"query": "a star \ud83d"}', content_type="application/json"
    )
    assert response.status_code == 200 and response.json["query"] == "a star \ud83d"


def test_long_texts_are_cut(client, searcher):
    searcher.gallery.texts[0][0] = "star " * 5000
    assert len(client.get("/?q=star").data) < 20_000


# Hosts and origins ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bound, allowed, host, is_own",
    [
        ("127.0.0.1", (), "127.0.0.1:8000", True),
        ("127.0.0.1", (), "localhost", True),
        ("127.0.0.1", (), "LOCALHOST.:9000", True),
        ("127.0.0.1", (), "[::1]:8000", True),
        ("::1", (), "[::1]", True),
        ("127.0.0.1", (), "example.org", False),
        ("127.0.0.1", (), "127.0.0.1.example.org", False),
        ("127.0.0.1", (), "127.0.0.1@example.org", False),
        ("127.0.0.1", (), "example.org#localhost", False),
        ("127.0.0.1", (), "localhost, example.org", False),
        ("127.0.0.1", (), "192.168.1.5", False),
        ("127.0.0.1", (), "localhost:8000/x", False),
        ("127.0.0.1", (), "", False),
        ("127.0.0.1", (), "[::1", False),
        ("127.0.0.1", ("photos.example",), "photos.example", True),
        ("127.0.0.1", ("photos.example",), "localhost", True),
        ("127.0.0.1", ("photos.example",), "x.photos.example", False),
        ("0.0.0.0", (), "192.168.1.5:8000", True),
        ("0.0.0.0", (), "localhost:8000", True),
        ("::", (), "[fe80::1]", True),
        ("0.0.0.0", (), "example.org", False),
        ("0.0.0.0", ("Example.org",), "example.org", True),
        ("192.168.1.5", (), "192.168.1.5:8000", True),
        ("192.168.1.5", (), "192.168.1.6:8000", False),
        ("192.168.1.5", (), "localhost", False),
    ],
)
def test_only_own_host_names_are_answered(searcher, bound, allowed, host, is_own):
    client = checked_client(serve.make_app(searcher, bound, allowed))
    for path in ("/hubs", "/photos/1", "/no/such/page"):
        response = client.get(path, headers={"Host": host})
        assert (response.status_code == 421) is not is_own
    if not is_own:
        assert "12" not in response.get_data(as_text=True)  # not even how many photos there are


@pytest.mark.parametrize(
    "name", ["https://photos.example", "photos.example:443", "a/b", "", "a b", "*"]
)
def test_an_allowed_host_must_be_a_name(searcher, name):
    with pytest.raises(InputError, match="is not a host name"):
        serve.make_app(searcher, allow_hosts=[name])


@pytest.mark.parametrize(
    "origin, status",
    [
        (None, 200),
        ("http://localhost:8000", 200),
        ("https://localhost:8000", 200),
        ("http://example.org", 403),
        ("null", 403),
        ("http://localhost:9000", 403),
        ("", 403),
        ("http://localhost:8000.example.org", 403),
    ],
)
@pytest.mark.parametrize("path", ["/photo", "/api/search"])
def test_only_own_pages_may_post(client, path, origin, status):
    options = (
        {"data": {"photo": (io.BytesIO(picture()), "a.png")}}
        if path == "/photo"
        else {"json": {"query": "star"}}
    )
    headers = {"Host": "localhost:8000"} | ({} if origin is None else {"Origin": origin})
    assert client.post(path, headers=headers, **options).status_code == status


# Several at once --------------------------------------------------------------------------------


def in_threads(actions):
    """What the functions return, each called in a thread of its own."""
    outcomes = [None] * len(actions)

    def act(place):
        outcomes[place] = actions[place]()

    threads = [threading.Thread(target=act, args=(place,)) for place in range(len(actions))]
    for thread in threads:
        thread.start()
    return threads, outcomes


def until(condition):
    """Wait, 20 seconds at most."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_questions_that_wait_are_asked_together(searcher):
    app = serve.make_app(searcher)
    asker, words = (
        app.extensions["pages"].asker,
        ["red star", "blue boat", "qqq", "green tree", "white boat"],
    )
    searcher.gate.clear()
    first = asker.words("star", 1)
    until(lambda: searcher.batches == [["star"]])
    threads, answers = in_threads(
        [lambda word=word: app.test_client().get(f"/?q={word}&top=1") for word in words]
    )
    until(lambda: asker.jobs.qsize() == len(words))
    searcher.gate.set()
    for thread in threads:
        thread.join(20)
    assert (
        sorted(searcher.batches[1]) == sorted(set(words) - {"qqq"}) and len(searcher.batches) == 2
    )
    assert first.result(20)[0].number == 1
    assert [answer.status_code for answer in answers] == [
        200,
        200,
        400,
        200,
        200,
    ]  # one sentence, and for one only
    found = [Page(answer).lists.get("Results") for answer in answers]
    assert found == [[0], [6], None, [9], [7]]


def test_a_broken_searcher_is_told_to_those_who_asked_and_no_more(searcher, monkeypatch, capsys):
    app = serve.make_app(searcher)
    client, by_words = checked_client(app), searcher.by_words

    def broken(questions, top, corrected):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(searcher, "by_words", broken)
    response = client.get("/?q=a+star")
    assert response.status_code == 500 and "secret" not in response.get_data(as_text=True)
    assert client.post("/api/search", json={"query": "a star"}).json == {
        "error": serve.SENTENCES[500]
    }
    monkeypatch.setattr(searcher, "by_words", lambda *_: [])  # too few
    assert client.get("/?q=a+star").status_code == 500
    monkeypatch.setattr(searcher, "by_words", by_words)
    assert client.get("/?q=a+star").status_code == 200


def test_too_many_questions_are_sent_away(searcher, monkeypatch):
    monkeypatch.setattr(serve, "WAITING", 2)
    app = serve.make_app(searcher)
    searcher.gate.clear()
    app.extensions["pages"].asker.words("star", 1)
    until(lambda: searcher.batches)
    for _ in range(2):
        app.extensions["pages"].asker.words("star", 1)
    response = checked_client(app).get("/?q=a+star")
    assert (
        response.status_code == 503
        and response.headers["Retry-After"] == "1"
        and "Too many" in Page(response).text
    )
    searcher.gate.set()


def test_a_question_is_given_up_in_time(searcher, monkeypatch):
    monkeypatch.setattr(serve, "ANSWER_SECONDS", 0.05)
    app = serve.make_app(searcher)
    searcher.gate.clear()
    asker = app.extensions["pages"].asker
    first = asker.words("star", 1)
    until(lambda: searcher.batches)
    with pytest.raises(ServiceUnavailable):
        serve.wait(asker.words("boat", 1))
    searcher.gate.set()
    first.result(20)
    assert asker.words("tree", 1).result(20) and searcher.batches == [
        ["star"],
        ["tree"],
    ]  # nobody waits for the boat


def test_words_do_not_wait_for_photos_of_which_few_wait(searcher):
    app = serve.make_app(searcher)
    pages = app.extensions["pages"]
    searcher.photo_gate.clear()
    first, first_answers = in_threads([lambda: upload(app.test_client(), picture())])
    until(lambda: pages.photo_asker.jobs.empty() and first[0].is_alive())
    time.sleep(0.05)  # it is taken up
    waiting, answers = in_threads(
        [lambda: upload(app.test_client(), picture())] * serve.PHOTOS_WAITING
    )
    until(lambda: pages.photo_asker.jobs.full())
    response = upload(checked_client(app), picture())
    assert response.status_code == 503 and response.headers["Retry-After"] == str(serve.PHOTO_RETRY)
    client = checked_client(app)
    for path in ("/?q=a+star", "/like/5", "/hubs", "/photos/1"):
        assert client.get(path).status_code == 200
    assert client.post("/api/search", json={"query": "a star"}).status_code == 200
    searcher.photo_gate.set()
    for thread in first + waiting:
        thread.join(20)
    assert [answer.status_code for answer in first_answers + answers] == [200] * (
        1 + serve.PHOTOS_WAITING
    )


def test_a_photo_that_was_given_up_is_not_looked_at(searcher, monkeypatch):
    monkeypatch.setattr(serve, "ANSWER_SECONDS", 0.3)
    pages = serve.make_app(searcher).extensions["pages"]
    searcher.photo_gate.clear()
    decoded = []
    for name in "abc":
        with pytest.raises(ServiceUnavailable):
            pages.photo_asker.call(
                searcher.embed_photo,
                io.BytesIO(picture()),
                lambda file, name=name: decoded.append(name) or Image.new("RGB", (9, 9)),
            )
    searcher.photo_gate.set()
    pages.photo_asker.close()
    assert decoded == ["a"]


def test_thumbnails_that_take_long_do_not_take_all_threads(searcher, monkeypatch):
    app, gate = serve.make_app(searcher), threading.Event()
    monkeypatch.setattr(serve, "thumbnail", lambda path, side: gate.wait(20) and b"a picture")
    most = serve.DECODERS + serve.THUMBNAILS_WAITING
    for number in range(12):
        os.utime(searcher.gallery.photo(number), (number, number))  # none is known already
    paths = [f"/photos/{number % 12}" for number in range(most)]
    threads, answers = in_threads([lambda path=path: app.test_client().get(path) for path in paths])
    until(lambda: not serve._thumbnails_waiting._value)
    response = app.test_client().get("/photos/3")
    assert response.status_code == 503 and response.headers["Retry-After"] == "1"
    gate.set()
    for thread in threads:
        thread.join(20)
    assert {answer.status_code for answer in answers} == {200} and most < serve.SERVER[
        "threads"
    ] - 9


def test_the_asker_ends_after_what_waits(searcher):
    asker = serve.Asker(searcher)
    asked = [asker.words("star", 1) for _ in range(3)]
    asker.close()
    assert not asker.thread.is_alive() and all(future.result(0) for future in asked)


# The server -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of a running server."""
    server = serve.make_server(
        serve.make_app(FakeSearcher(tmp_path_factory.mktemp("photos"))), "127.0.0.1", 0
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield int(server.effective_port)
    server.task_dispatcher.shutdown()
    wasyncore.close_all(server._map)


def talk(port, *parts):
    """(status, headers, body) of the server's answer to raw bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while part := connection.recv(2**16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


@pytest.mark.parametrize(
    "request_lines, status",
    [
        ("GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close", 200),
        ("GET / HTTP/1.0", 421),
        ("nonsense", 400),
        ("GET //example.org/hubs HTTP/1.1\r\nHost: localhost\r\nConnection: close", 404),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: example.org\r\nConnection: close", 421),
        ("GET / HTTP/1.1\r\nContent-Length: -1", 400),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip", 501),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nX: ".ljust(2**18 - 4, "x"), 431),
    ],
)
def test_every_answer_has_the_headers(port, request_lines, status):
    found, headers, _ = talk(port, f"{request_lines}\r\n\r\n".encode())
    assert found == status
    assert (
        headers["Content-Security-Policy"].startswith(POLICY)
        and headers["X-Content-Type-Options"] == "nosniff"
    )


def test_who_sends_too_much_hears_why(port):
    head = (
        "POST /photo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n"
    )
    status, _, body = talk(port, head.format(30 * 2**20).encode(), *[bytes(2**20)] * 30)
    assert status == 413 and b"more than 20 MB" in body and b"<h1>" in body


def test_who_sends_far_too_much_hears_at_once(port):
    status, headers, _ = talk(
        port, b"POST /photo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
    )
    assert status == 413 and headers["Content-Security-Policy"].startswith(POLICY)


def test_who_asks_before_sending_hears_at_once(port):
    status, headers, body = talk(
        port,
        b"POST /photo HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        b"Content-Length: 200000000\r\n\r\n"
        b"GET /hubs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    )  # a body, not a request
    assert status == 413 and b"more than 20 MB" in body and headers["Connection"] == "close"
    assert b"HTTP/1.1" not in body


def test_a_body_without_a_length_ends_at_the_limit_too(port):
    chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
    try:
        status, _, _ = talk(
            port,
            b"POST /photo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
            *[chunk] * 30,
        )
    except ConnectionError:
        return  # it stopped listening before all was sent
    assert status == 413


def test_a_head_that_dribbles_in_is_not_waited_for(port, monkeypatch):
    """Whether it is the first on its connection, or a later one."""
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.5)
    for before in (b"", b"GET /hubs HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(before)
            if before:
                assert connection.recv(2**20).startswith(b"HTTP/1.1 200")
            start = time.monotonic()
            with pytest.raises(OSError):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
                while time.monotonic() < start + 15:
                    connection.sendall(b"x")
                    time.sleep(0.05)
            assert 0.5 <= time.monotonic() - start < 15


def test_a_body_may_take_longer(port, monkeypatch):
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.2)
    body = b'{"query": "a star"}'
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(
            b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        time.sleep(1.5)
        connection.sendall(body)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


def test_a_port_in_use_is_an_error(searcher, port):
    with pytest.raises(
        InputError, match=rf"--port {port} cannot be listened at \(Address already in use\): give"
    ):
        serve.make_server(serve.make_app(searcher), "127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such name", "a" * 70 + ".example"])
def test_a_host_that_is_not_here_is_an_error(searcher, host):
    with pytest.raises(InputError, match="cannot be listened at"):
        serve.make_server(serve.make_app(searcher), host, 0)


def test_words_beside_uploads_are_answered(port):
    figures = load_search.beside_uploads(port, 4, 1.5, ["a star", "blue boat"], picture(1500, 1500))
    assert (
        figures["errors"] == []
        and figures["words"] > 3
        and 0 < figures["median_ms"] <= figures["max_ms"]
    )
    assert figures["uploads"] and set(figures["uploads"]) <= {200, 503}


def test_clients_by_the_dozen_find_no_error(port):
    figures, errors = load_search.load(port, os.getpid(), 12, 1.5, ["a star", "blue boat", "green"])
    assert (
        errors == []
        and figures["requests"] > 12
        and figures["p50_ms"] <= figures["p99_ms"] < 60_000
    )


# A gallery as search.py builds it ---------------------------------------------------------------


def test_a_model_s_gallery(evaluated, capsys):
    question = "a red dog in the snow"
    search.main(["--precomp", "data/tiny_precomp", "--json", question])
    printed = json.loads(capsys.readouterr().out)
    client = checked_client(serve.make_app(open_searcher(search.parse_args([]))))
    assert (
        client.post("/api/search", json={"query": question}).json == printed
        and len(printed["results"]) == 6
    )
    page = Page(client.get("/", query_string={"q": question}))
    assert [str(number) for number in page.lists["Results"]] == [
        result["item"] for result in printed["results"]
    ]
    assert "img" not in page.tags and "missing" not in page.text
    assert sorted(Page(client.get("/like/2")).lists["Photos like it"]) == [0, 1, 3, 4, 5]
    assert client.get("/hubs").status_code == 200 and client.get("/photos/1").status_code == 404
    assert (
        client.get("/?q=xyzzy").status_code == 400 and upload(client, picture()).status_code == 400
    )


PROGRAM = """
import sys
sys.path[:0] = [{root!r}]
from pages import serve
from tests.helpers.fake_searcher import FakeSearcher
serve.serve(FakeSearcher({folder!r}), {host!r}, 0)
"""


@pytest.mark.parametrize(
    "host, number", [("127.0.0.1", signal.SIGTERM), ("0.0.0.0", signal.SIGINT)]
)
def test_it_says_where_it_is_and_ends_when_told(tmp_path, host, number):
    program = PROGRAM.format(root=str(ROOT), folder=str(tmp_path), host=host)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # in background
        line = process.stderr.readline()
        port = int(
            re.fullmatch(
                rf"12 photos can be searched at http://{host}:(\d+)/ \(Ctrl-C ends\)\n", line
            )[1]
        )
        assert (
            talk(port, b"GET /?q=star HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0]
            == 200
        )
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(20) == 0
    assert ("lets other machines in" in rest) == (host == "0.0.0.0") and "Traceback" not in rest


def test_fake_pixels_differ(searcher):
    """The tests above assume it: no two photos of the fake gallery look the same."""
    pixels = [
        np.asarray(Image.open(searcher.gallery.photo(number))).tobytes() for number in range(12)
    ]
    assert len(set(pixels)) == 12
