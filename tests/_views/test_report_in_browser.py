"""A real browser shows the report as it is meant, sorts its table, and runs no script but its own."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from _lives import small_run
from matplotlib.image import imread

from lightning_sbckpt.report import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason=f"no browser is installed, looked for {', '.join(BROWSERS)}: apt-get install chromium",
)


class Browser:
    """A browser without a window, anew for each page."""

    def __init__(self, profile):
        self._profile = profile

    def _run(self, page, *arguments, fragment=""):
        done = subprocess.run(
            [
                BROWSER,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                f"--user-data-dir={self._profile}",
                "--enable-logging=stderr",
                "--v=0",
                "--virtual-time-budget=3000",
                "--window-size=1300,2600",
                *arguments,
                page.as_uri() + fragment,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, console

    def elements(self, page, *arguments, fragment=""):
        """Return the page as it is after its script ran, and what the console says."""
        return self._run(page, "--dump-dom", *arguments, fragment=fragment)

    def picture(self, page, *arguments):
        """Return what is seen, as an array of colours."""
        file = page.with_suffix(".png")
        self._run(page, f"--screenshot={file}", "--hide-scrollbars", *arguments)
        return imread(file)[..., :3]


@pytest.fixture
def browser(tmp_path):
    return Browser(tmp_path / "profile")


@pytest.fixture
def page(tmp_path):
    return report(small_run(tmp_path / "run").checkpoints_dir, tmp_path / "a.html")


def names_in(html):
    return re.findall(r'<td class="name">(\w+)</td>', html)


AS_SAVED = ["step100", "step200", "step300", "step400", "halt400"]
AS_SAVED += ["step500", "step600", "step700", "step800", "halt800"]

# NaN and what is missing come last, whichever way the others go.
BY_LOSS = ["step600", "step700", "step800", "step400", "step500", "step200", "step100"]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("fragment", "expected", "column", "way"),
    [
        ("", AS_SAVED[::-1], None, None),
        ("#sort=loss", BY_LOSS, "loss", "ascending"),
        ("#sort=-loss", BY_LOSS[::-1], "loss", "descending"),
        ("#sort=name", sorted(AS_SAVED), "name", "ascending"),
        ("#sort=-save", AS_SAVED[::-1], "save", "descending"),
        ("#sort=nonsense", AS_SAVED[::-1], None, None),
        ("#sort=%E0%A4%A", AS_SAVED[::-1], None, None),
        ("#plot", AS_SAVED[::-1], None, None),
    ],
)
def test_the_table_sorts_as_the_address_asks(browser, page, fragment, expected, column, way):
    """By numbers as numbers, by names as names; the heading says which way."""
    html, console = browser.elements(page, fragment=fragment)
    assert console == []
    assert names_in(html)[: len(expected)] == expected
    assert sorted(names_in(html)) == sorted(AS_SAVED)
    marked = re.findall(r'aria-sort="(\w+ing)"><button type="button">([^<]+)<', html)
    assert marked == ([(way, column)] if column else [])


def with_script(page, script):
    """Return the page without its policy, and with a script of ours at its end."""
    html = re.sub(r"<meta http-equiv=.*?>", "", page.read_text(), count=1)
    copy = page.with_name("scripted.html")
    copy.write_text(html.replace("</body>", f"<script>{script}</script></body>"))
    return copy


CLICK = """
const buttons = [...document.querySelectorAll("#checkpoints button")];
const loss = buttons.find((button) => button.textContent === "loss");
for (let count = 0; count < COUNT; ++count) loss.click();
document.title = location.hash;
"""


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("count", "expected", "fragment"),
    [(1, BY_LOSS, "#sort=loss"), (2, BY_LOSS[::-1], "#sort=-loss"), (3, BY_LOSS, "#sort=loss")],
)
def test_a_click_on_a_heading_sorts_and_the_next_turns_it_round(
    browser, page, count, expected, fragment
):
    """And the address says so, to be sent to somebody."""
    html, console = browser.elements(with_script(page, CLICK.replace("COUNT", str(count))))
    assert console == []
    assert names_in(html)[: len(expected)] == expected
    assert f"<title>{fragment}</title>" in html


LAYOUT = """
const rows = [...document.querySelectorAll("#checkpoints tbody tr")].map((row) => row.offsetHeight);
const page = document.documentElement;
document.title = [Math.max(...rows) - Math.min(...rows), page.scrollWidth - innerWidth].join();
"""


@pytest.mark.parametrize("width", [500, 1280])
def test_rows_are_one_line_high_and_the_page_is_no_wider_than_the_screen(browser, page, width):
    """On a phone, too, in the least width that the browser's window has."""
    html, _ = browser.elements(with_script(page, LAYOUT), f"--window-size={width},900")
    difference, overflow = re.search(r"<title>(.*?)</title>", html)[1].split(",")
    assert int(difference) <= 2
    assert int(overflow) <= 0


FILTER = """
document.getElementById("only-there").click();
const shown = [...document.querySelectorAll("#checkpoints tbody tr")];
document.title = shown.filter((row) => row.offsetParent !== null).length;
"""


def test_what_was_removed_can_be_hidden(browser, page):
    """By the box above the table."""
    html, _ = browser.elements(with_script(page, FILTER))
    assert "<title>5</title>" in html


def test_a_foreign_script_does_not_run(browser, page):
    """Even if it had come into the page: its policy knows the one script by checksum."""
    html = page.read_text().replace("</body>", "<script>document.title = 'taken'</script></body>")
    page.write_text(html)
    html, console = browser.elements(page)
    assert "<title>taken</title>" not in html
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.long
def test_it_is_light_or_dark_as_the_reader_prefers(browser, page):
    """And in both there is something to be seen: text, bars, the picture."""
    light = browser.picture(page, "--blink-settings=preferredColorScheme=1")
    dark = browser.picture(page, "--blink-settings=preferredColorScheme=0")
    for seen, background in ((light, 1.0), (dark, 0.07)):
        assert seen[2, 2].max() == pytest.approx(background, abs=0.05)
        inked = abs(seen - seen[2, 2]).max(axis=2) > 0.3
        assert 0.01 < inked.mean() < 0.5
        # In every part of the page from its heading to its last table.
        assert all(part.any() for part in inked[:1500].reshape(15, 100, -1))
    # The blue of what was kept, in the table, the picture and the bars.
    blue = (abs(light - [0, 0x72 / 255, 0xB2 / 255]) < 0.05).all(axis=2)
    assert blue.sum() > 2000
