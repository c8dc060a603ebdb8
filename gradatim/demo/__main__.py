"""``python -m gradatim.demo --base-url http://127.0.0.1:8080/v1``: tells the story to a server that already runs.

`gradatim demo` starts a server and then does the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from gradatim.demo.miniwob import ChromiumMissing
from gradatim.demo.results import StoryConfig
from gradatim.demo.run import demo


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the story reached its end, 1 when it did not, 2 when Chromium is missing."""
    parser = argparse.ArgumentParser(prog="python -m gradatim.demo", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8080/v1", help="the server, with /v1")
    parser.add_argument("--model", default="agent", help="the name under which the server serves the model")
    parser.add_argument("--api-key", default="")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-results"), help="folder for results.json and report.html"
    )
    parser.add_argument("--quick", action="store_true", help="about 15 minutes instead of half an hour")
    parser.add_argument("--browser-free", action="store_true", help="pure Python pages instead of Chromium")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        results = demo(
            StoryConfig.quick() if options.quick else StoryConfig.full(),
            base_url=options.base_url,
            model=options.model,
            api_key=options.api_key,
            out=options.out,
            browser_free=options.browser_free,
            console=console,
        )
    except ChromiumMissing as error:
        console.print(str(error), style="red")
        return 2
    return 0 if results.complete else 1


if __name__ == "__main__":
    sys.exit(main())
