"""MiniWoB++ (arXiv:1802.08802) in headless Chromium: the real pages and their own graders, driven by Selenium.

One `Browser` is one Chromium process; one thread at a time may use it. Pages load over file:// from the `miniwob`
package, so nothing reaches a network. Text is typed as keystrokes; a click is the element's own, which is what
MiniWoB++ defines as its element click and costs a tenth of a mouse journey. Three departures from the pages as
published: the clock is taken out (the raw reward counts, not the time-decayed one); texts that cannot be acted on are
not shown; and enter-text draws from the pages' own long list of names (PEOPLE_NAMES) instead of their list of fifty,
because fifty prompts cannot be split into disjoint sets of useful size.
It does not know what the right answer is; `tasks` does.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import (
    ElementNotInteractableException,
    StaleElementReferenceException,
    WebDriverException,
)
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement

from gradatim.demo.tasks import TASKS, Action, Effect, Element, Page, PageEnv

INSTALL_HINT = (
    "On Debian or Ubuntu: sudo scripts/install_system.sh (that is: apt-get install chromium chromium-driver), and "
    "pip install 'gradatim[demo]' for the pages. For binaries elsewhere set MINIWOB_CHROME_BINARY and "
    "MINIWOB_CHROMEDRIVER. Or run the demo on the browser-free pages: gradatim demo --browser-free."
)

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-breakpad",
    "--disable-features=Translate,OptimizationHints,MediaRouter",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--metrics-recording-only",
    "--mute-audio",
    "--password-store=basic",
    "--window-size=400,400",
)

_START = """
core.EPISODE_MAX_TIME = 1e8;
if (arguments[1]) {
  ui_utils.FIFTY_NAMES = ui_utils.PEOPLE_NAMES.filter(function (n) { return /^[A-Za-z]{2,9}$/.test(n); });
}
Math.seedrandom(arguments[0]);
core.startEpisodeReal();
if (document.activeElement) document.activeElement.blur();
"""

# Elements are those that show, are enabled and can be acted on, in document order. A label is an element's own text,
# or the text that stands before it in its line.
_SNAPSHOT = r"""
if (arguments[0]) { arguments[0].click(); arguments[0].focus(); }
var clean = function (s) { return s.replace(/\s+/g, ' ').trim(); };
var area = document.getElementById('area'), nodes = [], seen = [], dialog = [];
var before = function (e) {
  for (var p = e.previousSibling; p; p = p.previousSibling) {
    if (p.nodeType === 1 && ['BR', 'INPUT', 'BUTTON', 'DIV', 'P'].indexOf(p.tagName) >= 0) return '';
    var text = clean(p.textContent);
    if (text) return text;
  }
  return '';
};
area.querySelectorAll('*').forEach(function (e) {
  var box = e.getBoundingClientRect();
  if (!box.width || !box.height) return;
  var position = getComputedStyle(e).position;
  if (position === 'absolute' || position === 'fixed') {
    e.querySelectorAll('p').forEach(function (p) {
      if (!p.querySelector('button')) dialog.push(clean(p.textContent));
    });
  }
  if (e.disabled) return;
  if (e.tagName === 'BUTTON') { nodes.push(e); seen.push(['button', clean(e.textContent), '']); }
  if (e.tagName === 'INPUT') { nodes.push(e); seen.push(['field', before(e), e.value]); }
});
return [clean(document.getElementById('query').textContent), seen, dialog.join(' '), nodes,
        WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL];
"""

_FOCUS = "arguments[0].focus(); if (!arguments[0].disabled) arguments[0].value = ''; return !arguments[0].disabled;"


class ChromiumMissing(RuntimeError):
    """Chromium, its driver or the pages are not installed; the message says how to get them."""


def find_binaries() -> tuple[str, str]:
    """Paths of Chromium and chromedriver, from the environment or the search path; raises ChromiumMissing."""
    chrome = _first_executable("MINIWOB_CHROME_BINARY", ("chromium", "chromium-browser", "google-chrome"))
    driver = _first_executable("MINIWOB_CHROMEDRIVER", ("chromedriver",))
    missing = [name for name, path in (("Chromium", chrome), ("chromedriver", driver)) if path is None]
    if chrome is None or driver is None:
        raise ChromiumMissing(f"{' and '.join(missing)} not found. {INSTALL_HINT}")
    return chrome, driver


def _first_executable(variable: str, names: tuple[str, ...]) -> str | None:
    chosen = os.environ.get(variable)
    candidates = (chosen,) if chosen else names
    return next((path for name in candidates if (path := shutil.which(name))), None)


def pages_dir() -> Path:
    """The folder of MiniWoB++ pages inside the `miniwob` package; raises ChromiumMissing."""
    spec = importlib.util.find_spec("miniwob")
    if spec is None or spec.origin is None:
        raise ChromiumMissing(f"the Python package miniwob is not installed. {INSTALL_HINT}")
    return Path(spec.origin).parent / "html" / "miniwob"


@dataclass(slots=True)
class Browser:
    """One headless Chromium. It ends with `close`, and also when this process ends in any other way."""

    profile: str = field(init=False)
    _service: Service = field(init=False)
    _driver: webdriver.Remote = field(init=False)
    _reaper: subprocess.Popen[bytes] = field(init=False)
    _pages: Path = field(init=False)
    _open_task: str = field(init=False, default="")
    _page: Page = field(init=False, default=Page("", ()))
    _nodes: list[WebElement] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        chrome, driver = find_binaries()
        self._pages = pages_dir()
        self.profile = tempfile.mkdtemp(prefix="gradatim-demo-")
        options = Options()
        options.binary_location = chrome
        for flag in (*_FLAGS, f"--user-data-dir={self.profile}"):
            options.add_argument(flag)
        self._service = Service(
            driver,
            log_output=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": self.profile},  # so that what a killed Chromium leaves goes with the profile
            popen_kw={"start_new_session": True},
        )
        self._service.start()
        self._reaper = _start_reaper(self._service.process.pid, self.profile)
        try:
            self._driver = webdriver.Remote(self._service.service_url, options=options)
        except WebDriverException as error:
            self._end()
            raise ChromiumMissing(f"Chromium did not start: {error.msg}. {INSTALL_HINT}") from error

    def load(self, task: str, seed: int) -> Page:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
        if self._open_task != task:
            self._driver.get((self._pages / f"{task}.html").as_uri())
            self._open_task = task
        self._driver.execute_script(_START, seed, task == "enter-text")
        return self._look().page

    def perform(self, action: Action) -> Effect:
        node = self._nodes[action.number - 1]
        if action.verb == "click":
            acted = self._page.elements[action.number - 1].kind == "button"
            seen = self._look(click=node)
        else:
            acted = self._type(node, action.text)
            seen = self._look()
        return Effect(seen.page, acted, seen.success)

    def close(self) -> None:
        """Ends Chromium and its driver. Safe to call twice."""
        if self._reaper.poll() is None:
            self._end()
            self._driver.command_executor.close()

    def _end(self) -> None:
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(timeout=30)
        self._service.stop()

    def _look(self, click: WebElement | None = None) -> Effect:
        """The page as it is, after a click if one is given. A click on a field moves the focus there."""
        sentence, elements, dialog, self._nodes, done, reward = self._driver.execute_script(_SNAPSHOT, click)
        self._page = Page(sentence, tuple(Element(kind, label, value) for kind, label, value in elements), dialog)
        return Effect(self._page, acted=True, success=reward > 0 if done else None)

    def _type(self, node: WebElement, text: str) -> bool:
        if not self._driver.execute_script(_FOCUS, node):
            return False
        try:
            node.send_keys(text)
        except (ElementNotInteractableException, StaleElementReferenceException):
            return False
        return True


def _start_reaper(session_id: int, profile: str) -> subprocess.Popen[bytes]:
    reaper = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("reaper.py"))],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert reaper.stdin is not None
    reaper.stdin.write(f"{session_id} {profile}\n".encode())
    reaper.stdin.flush()
    return reaper


def miniwob_env(task: str, browser: Browser | None = None) -> PageEnv:
    """The MiniWoB++ environment of a task, on a browser of its own or on one that is lent."""
    return PageEnv(task, browser or Browser())
