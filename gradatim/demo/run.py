"""The demo as one call: pages, story, screen, results and report, against a server that already runs."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import httpx
import openai
from rich.console import Console

from gradatim.demo import agent
from gradatim.demo.browser_free import PlayedPages
from gradatim.demo.miniwob import Browser, find_binaries, pages_dir
from gradatim.demo.pool import EnvPool
from gradatim.demo.report import write_report
from gradatim.demo.results import Results, StoryConfig
from gradatim.demo.screen import TerminalScreen
from gradatim.demo.story import Screen, Story
from gradatim.demo.wire import Traffic, Wire


def demo(
    config: StoryConfig,
    *,
    base_url: str,
    model: str,
    out: Path,
    api_key: str = "",
    browser_free: bool = False,
    console: Console | None = None,
) -> Results:
    """Tells the story and writes results.json, report.html and curve.png under ``out``.

    Raises ChromiumMissing at once, before anything is asked of the server, where Chromium or the pages are missing.
    """
    if not browser_free:
        find_binaries()
        pages_dir()
    out.mkdir(parents=True, exist_ok=True)
    pages = "browser-free pages" if browser_free else "MiniWoB++ in headless Chromium"
    with (
        TerminalScreen(console) as screen,
        EnvPool(PlayedPages if browser_free else Browser, config.concurrency) as pool,
    ):
        results = tell(config, base_url=base_url, model=model, pool=pool, pages=pages, screen=screen, api_key=api_key)
        results.write(out / "results.json")
        write_report(out / "results.json", out)
        screen.note(f"report: {out / 'report.html'}")
    return results


def published_prompt() -> dict[str, object]:
    """The prompt and decoding limits of every call, for the results."""
    return {
        "system": agent.SYSTEM,
        "examples": [list(example) for example in agent.EXAMPLES],
        "max_tokens": agent.MAX_TOKENS,
        "stop": agent.STOP,
    }


def tell(
    config: StoryConfig,
    *,
    base_url: str,
    model: str,
    pool: EnvPool,
    pages: str,
    screen: Screen,
    api_key: str = "",
) -> Results:
    """Tells the story and returns its results, complete or as far as they came before an error or an interrupt."""
    traffic = Traffic()
    results = Results(config, model, pages, dict(published_prompt()), started_at=time.time())
    with openai.OpenAI(base_url=base_url, api_key=api_key or "none", max_retries=0, timeout=120.0) as client:
        wire = Wire(base_url, api_key=api_key, traffic=traffic)
        story = Story(config, client, wire, pool, results, screen)
        try:
            story.run()
        except (httpx.HTTPError, openai.APIError) as error:
            screen.note(f"the story broke off: {type(error).__name__}: {error}")
        except KeyboardInterrupt:
            screen.note("interrupted; what was measured so far is kept")
        finally:
            with suppress(httpx.HTTPError):
                story.collect()
            story.count_traffic()
            wire.close()
    return results
