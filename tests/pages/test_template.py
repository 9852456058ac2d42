"""Templates: what is put into a page is escaped, and nothing that it needs may be absent."""

import jinja2
import pytest

from pages.template import template


def test_what_is_put_into_a_page_is_escaped():
    page = template("search_error.html").environment.from_string("<b>{{ text }}</b>")
    assert page.render(text="<i>\"a\" & 'b'</i>") == (
        "<b>&lt;i&gt;&#34;a&#34; &amp; &#39;b&#39;&lt;/i&gt;</b>"
    )


def test_what_a_page_lacks_is_an_error():
    page = template("report.html")
    with pytest.raises(jinja2.UndefinedError):
        page.render()


def test_a_page_is_found_from_any_folder_and_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert template("search_home.html") is template("search_home.html")
    with pytest.raises(jinja2.TemplateNotFound):
        template("../template.py")
