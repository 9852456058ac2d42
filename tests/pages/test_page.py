"""The search page in headless Chromium: what a person does, and what the page then shows."""

import shutil
import threading

import pytest
from selenium.common.exceptions import NoSuchElementException, WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from waitress import wasyncore

from pages import serve
from tests.helpers.fake_searcher import FakeSearcher

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="the page's tests in a browser need selenium"
)

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (BROWSER and DRIVER),
        reason="no Chromium with its chromedriver is installed (Debian: apt-get install chromium "
        "chromium-driver)",
    ),
]

NARROW, WIDE = 420, 1400  # pixels

DROP = """
const [address, done] = arguments;
fetch(address).then((answer) => answer.blob()).then((blob) => {
  const data = new DataTransfer();
  data.items.add(new File([blob], "dropped.jpg", {type: "image/jpeg"}));
  const where = document.querySelector("main");
  for (const kind of ["dragover", "drop"]) {
    const event = new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
    if (where.dispatchEvent(event)) throw new Error("the browser would open the photo itself");
    if (kind === "dragover" && !document.body.classList.contains("dropping")) throw new Error("nothing is to be seen");
  }
  done("");
}).catch((error) => done(String(error)));
"""

LOADED = """
for (const photo of arguments[0]) photo.loading = "eager";
return arguments[0].every((photo) => photo.complete && photo.naturalWidth);
"""


def start_browser(**preferences):
    """A separate browser; skips the test, with the browser's message, if it does not start."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", preferences)
    try:
        return webdriver.Chrome(options=options, service=Service(DRIVER))
    except WebDriverException as error:
        pytest.skip(f"{BROWSER} does not start: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def browser():
    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a running server."""
    searcher = FakeSearcher(tmp_path_factory.mktemp("photos"))
    searcher.gallery.texts[11].append("<img src=x onerror=document.title='taken'>")
    server = serve.make_server(serve.make_app(searcher), "127.0.0.1", 0)
    threading.Thread(target=server.run, daemon=True).start()
    yield f"http://127.0.0.1:{server.effective_port}"
    server.task_dispatcher.shutdown()
    wasyncore.close_all(server._map)


@pytest.fixture
def page(browser, address):
    """The browser at the first page.

    At the end nothing was refused or broken, and nothing came from elsewhere.
    """
    browser.get(address)
    browser.get_log("browser")
    size(browser, WIDE)
    yield browser
    assert browser.get_log("browser") == []
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in fetched if not name.startswith(address + "/")] == []


def size(browser, width, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == NARROW},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )


def results(browser, label="Results"):
    """The names and scores in a list, by its label, once the page has it and its photos."""

    def shown(driver):
        try:
            grid = driver.find_element(By.CSS_SELECTOR, f'ol[aria-label="{label}"]')
        except NoSuchElementException:
            return None
        photos = driver.find_elements(By.CSS_SELECTOR, "ol img")
        return grid if driver.execute_script(LOADED, photos) else None

    grid = WebDriverWait(browser, 20).until(shown)
    cards = grid.find_elements(By.CSS_SELECTOR, "li.card")
    return [
        (
            card.find_element(By.CSS_SELECTOR, ".name").text,
            card.find_element(By.CSS_SELECTOR, ".score").text,
        )
        for card in cards
    ]


def click(browser, text):
    browser.find_element(By.PARTIAL_LINK_TEXT, text).click()


CORRECTED = [
    ("star/green.png", "0.667"),
    ("star/blue.png", "0.667"),
    ("star/white.png", "0.667"),
    ("star/red.png", "0.600"),
]  # 2 of 3 words, and 3 of 3 less the correction's 0.4


def test_words_are_typed_and_the_correction_switched(page):
    page.find_element(By.ID, "q").send_keys("a red star", Keys.ENTER)
    assert results(page)[:4] == CORRECTED and page.title == "a red star"
    click(page, "With and without")
    assert results(page, "With correction")[:4] == CORRECTED
    assert results(page, "Without correction")[:2] == [
        ("star/red.png", "1.000"),
        ("star/green.png", "0.667"),
    ]
    left, right = (
        page.find_element(By.CSS_SELECTOR, f'ol[aria-label="{label}"]').rect
        for label in ("With correction", "Without correction")
    )
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]  # side by side
    click(page, "Corrected only")
    assert results(page)[:4] == CORRECTED


def test_a_photo_is_dropped_and_more_like_it_are_found(page, address):
    assert page.execute_async_script(DROP, address + "/photos/6") == ""
    found = results(page, "Photos like it")
    assert found[0][0] == "boat/blue.png" and float(found[0][1]) > 0.95
    captions = page.find_elements(By.CSS_SELECTOR, 'ol[aria-label="Captions that fit"] a')
    assert captions[0].text == "a blue boat" and "dropped.jpg" in page.title
    page.find_element(By.CSS_SELECTOR, 'a[aria-label="More like boat/blue.png"]').click()
    WebDriverWait(page, 20).until(lambda driver: driver.current_url == address + "/like/6")
    found = results(page, "Photos like it")
    assert {name for name, _ in found[:2]} == {"star/blue.png", "tree/blue.png"}


def test_a_photo_is_chosen(page, tmp_path, address):
    path = FakeSearcher(tmp_path).gallery.photo(9)
    page.find_element(By.ID, "photo").send_keys(path)  # with a script, that is enough
    assert results(page, "Photos like it")[0] == ("tree/green.png", "1.000")


def test_a_photo_that_is_too_large_is_said_to_be(page, tmp_path):
    (tmp_path / "large.jpg").write_bytes(bytes(24 * 2**20))
    page.find_element(By.ID, "photo").send_keys(str(tmp_path / "large.jpg"))
    note = WebDriverWait(page, 20).until(
        lambda driver: driver.find_element(By.CSS_SELECTOR, '[role="alert"]')
    )
    assert "more than 20 MB" in note.text
    assert ["413" in line["message"] for line in page.get_log("browser")] == [
        True
    ]  # the browser's own remark on it


def test_the_keyboard_is_enough(page):
    page.find_element(By.TAG_NAME, "body").send_keys("/")
    page.switch_to.active_element.send_keys("a white boat", Keys.ENTER)
    assert results(page)[0] == ("boat/white.png", "1.000")
    for _ in range(20):
        webdriver.ActionChains(page).send_keys(Keys.TAB).perform()
        if page.switch_to.active_element.get_attribute("aria-label") == "More like boat/white.png":
            break
    focused = page.switch_to.active_element
    assert focused.value_of_css_property("outline-style") == "solid"
    focused.send_keys(Keys.ENTER)
    assert {name for name, _ in results(page, "Photos like it")[:2]} == {
        "star/white.png",
        "tree/white.png",
    }


@pytest.mark.parametrize(
    "path", ["/", "/?q=a+star", "/?q=a+star&compare=1", "/like/3", "/hubs", "/api"]
)
def test_it_fits_a_phone_and_the_dark(page, address, path):
    papers = []
    for width, scheme in ((NARROW, "light"), (NARROW, "dark"), (WIDE, "dark")):
        size(page, width, scheme)
        page.get(address + path)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        papers.append(
            page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        )
    assert papers[0] == "rgba(252, 252, 250, 1)" and papers[1] == papers[2] == "rgba(23, 23, 26, 1)"


def test_texts_of_others_do_nothing(page, address):
    page.get(address + "/?q=white+tree")
    assert results(page)[0][0] == "tree/white.png" and page.title == "white tree"
    page.find_element(By.TAG_NAME, "summary").click()
    assert (
        "<img src=x onerror=document.title='taken'>"
        in page.find_element(By.TAG_NAME, "details").text
    )


def test_words_need_no_script(address):
    driver = start_browser(**{"profile.managed_default_content_settings.javascript": 2})
    try:
        driver.get(address)
        driver.find_element(By.ID, "q").send_keys("a blue tree")
        driver.find_element(By.CSS_SELECTOR, "form.words button").click()
        first = WebDriverWait(driver, 20).until(
            lambda page: page.find_element(By.CSS_SELECTOR, "li.card .name")
        )
        assert first.text == "tree/blue.png"
        driver.find_element(By.PARTIAL_LINK_TEXT, "With and without").click()
        assert len(driver.find_elements(By.CSS_SELECTOR, ".sides ol")) == 2
    finally:
        driver.quit()
