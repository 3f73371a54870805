"""The documentation as a site: it builds without a warning, every link leads somewhere, and a browser shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from browsing import in_browser, screenshot

pytest.importorskip("sphinx", reason="builds the documentation")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html", "docs", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_on_the_site_and_links_to_no_file_that_is_not(site):
    sources = [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in sources}
    built = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert pages <= built
    for path in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', path.read_text()):
            if not target.startswith(("http:", "https:", "mailto:", "data:")):
                assert (path.parent / target).exists(), f"{path.relative_to(site)}: {target}"


@in_browser
@pytest.mark.parametrize("name", ["index", "tutorial", "recipe-reference", "methods/ties", "errors", "report"])
def test_a_browser_shows_it_without_a_network(site, browser, name):
    asked, said = [], []
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"file://{site}/{name}.html")
    assert page.locator("h1").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert all(url.startswith("file://") for url in asked), asked
    assert said == []
    if name in ("index", "tutorial"):
        screenshot(page, f"site-{name}")
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()


@in_browser
def test_search_finds_without_a_server(site, browser):
    page = browser.new_page()
    page.goto(f"file://{site}/search.html?q=density")
    page.wait_for_selector("ul.search li", timeout=15_000)
    assert page.locator("ul.search li").count() > 2
