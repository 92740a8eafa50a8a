"""Open notebooks in a running JupyterLab with a headless Chromium, and turn the knobs of notebooks/explore: `make browse`.

A notebook fails by raw Markdown or MyST in what is read, by an error in the console, and where it is run by an error in a
cell; the explorer also by a control without a name, by a slider that the keyboard does not move, by a picture that does not
follow, and by a refusal that is more than a line. The browser reaches this machine only.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import browser
import nbformat
from playwright.sync_api import Locator, Page, sync_playwright

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
OPENED = (
    ("planted", 1280),
    ("table3", 1280),
    ("what_reproduced", 1280),
    ("figure1", 1280),
    ("explore", 1280),
    ("explore", 800),
)
AS_IT_IS = "table3"  # opened and not run
PATIENCE = 90.0  # seconds for a notebook to run
HARMLESS = ("Comm not found for comm id",)  # JupyterLab asks a new kernel for the widgets of the one before
# All cells are drawn, whether they are on the screen or not; and nobody asks for news.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"},
}
HOMES = {
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "state",
}
SHOWN = """
[...document.querySelectorAll(".jp-Notebook .jp-MarkdownCell.jp-mod-rendered, .jp-Notebook .jp-OutputArea")]
  .map(e => e.outerHTML).join("")
"""
# A notebook with every fault: what is said of it must contain these words.
PLANTED = """import ipywidgets
from IPython.display import HTML, Javascript, display
display(HTML("<p>| a | b |</p><p>as {cite:p}`key` has it</p>"), ipywidgets.IntSlider())
display(Javascript("console.error('planted')"))
raise ValueError("planted")"""
FAULTS = (
    "raw pipes",
    "raw role",
    "widget-slider",
    'handle "',
    "console: planted",
    "cell: ValueError: planted",
)
NAMELESS = """
[...document.querySelectorAll(".jp-OutputArea .widget-inline-hbox:not(.widget-html)")]
  .filter(e => !e.querySelector(".widget-label")?.innerText.trim()).map(e => e.className)
  .concat([...document.querySelectorAll(".jp-OutputArea .noUi-handle")].filter(e => {
    const read = e.closest(".widget-inline-hbox").querySelector(".widget-readout").innerText;
    return !e.ariaLabel?.trim() || e.ariaValueText != read;
  }).map(e => `handle "${e.ariaLabel}" at "${e.ariaValueText}"`))
"""


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[tuple[str, str]]:
    """Address and token of a JupyterLab over copies of the notebooks, with all that it keeps below `folder`."""
    shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns("*.py", ".*"))
    for name, setting in SETTINGS.items():
        place = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(setting))
    homes = {name: str(folder / place) for name, place in HOMES.items()}
    token, log, end = secrets.token_hex(16), folder / "log", time.monotonic() + PATIENCE
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={folder / 'notebooks'}"]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=out, stderr=out,
                                   env=os.environ | homes)  # fmt: skip
    try:
        while not (found := list((folder / "runtime").glob("jpserver-*.json"))):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"JupyterLab did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        time.sleep(0.5)  # the file is whole
        home = json.loads(found[0].read_text())["url"]
        urllib.request.urlopen(f"{home}api?token={token}", timeout=30).close()
        yield home, token
    finally:
        process.terminate()
        process.wait()


class Notebook:
    """A notebook that is open in a tab of its own: `wrong` collects what the console reports."""

    def __init__(self, page: Page, home: str, token: str, name: str) -> None:
        self.page, self.wrong = page, list[str]()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda m: self.report(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.report(f"exception: {error}"))
        page.goto(f"{home}lab/workspaces/{secrets.token_hex(4)}/tree/{name}.ipynb?token={token}")
        page.locator(".jp-Notebook h1").first.wait_for()
        page.wait_for_timeout(1500)

    def report(self, text: str) -> None:
        if not text.startswith(HARMLESS):
            self.wrong.append(f"console: {text.splitlines()[0][:200]}")

    def run(self) -> None:
        """Run all cells and wait for the last."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()
        done = "() => ![...document.querySelectorAll('.jp-InputPrompt')].some(e => e.innerText.includes('*'))"
        self.page.wait_for_function("() => document.querySelector('.jp-OutputArea-output')")
        self.page.wait_for_function(done)
        self.page.wait_for_timeout(1000)
        failed = self.page.locator(
            '[data-mime-type="application/vnd.jupyter.stderr"], .jp-RenderedText[data-mime-type*="error"]'
        )
        self.wrong += [f"cell: {text.strip().splitlines()[-1][:200]}" for text in failed.all_inner_texts()]

    def raw(self) -> list[str]:
        return browser.raw_markup(browser.Page(self.page.evaluate(SHOWN)))

    def nameless(self) -> list[str]:
        return [f"control without a name: {classes}" for classes in self.page.evaluate(NAMELESS)]

    def control(self, name: str, place: int = 0) -> Locator:
        """The control with this label; the `place`-th, where several have it."""
        label = self.page.locator(".widget-label", has_text=name).filter(visible=True)
        exact = [row for row in label.all() if row.inner_text().strip() == name]
        return exact[place].locator("xpath=..")

    def turn(self, name: str, key: str, *, place: int = 0) -> float | None:
        """Seconds from a key on a slider to another picture in its box; None where none comes within some seconds."""
        handle = self.control(name, place).locator(".noUi-handle")
        picture = handle.locator("xpath=ancestor::*[contains(@class, 'widget-vbox')][1]").locator(
            ".widget-html-content"
        )
        before, start = picture.inner_html(), time.monotonic()
        handle.focus()
        self.page.keyboard.press(key)
        while time.monotonic() < start + 20:
            if picture.inner_html() != before:
                return time.monotonic() - start
            self.page.wait_for_timeout(10)
        return None


def explorer_problems(notebook: Notebook) -> Iterator[str]:
    """What is wrong with the explorer, once it has run. Its controls are left where they were turned to."""
    for name, place in (("K base", 0), ("α", 0), ("ε", 0), ("B", 0), ("C", 1), ("σ", 0)):
        took = notebook.turn(name, "ArrowRight", place=place)
        if took is None:
            yield f"{name}: no other picture after a key"
        else:
            print(f"       {name}: {1000 * took:.0f} ms from the key to the picture", flush=True)
    for name in ("K base", "K diff"):  # a pool of none
        notebook.control(name).locator(".noUi-handle").press("Home")
    notebook.page.wait_for_timeout(3000)
    refusals = notebook.page.locator("[role=alert]").all_inner_texts()
    if ["k_base + k_diff" in text and "\n" not in text.strip() for text in refusals] != [True]:
        yield f"an empty pool is not refused in a line: {refusals}"
    sideways = notebook.page.evaluate(
        "[...document.querySelectorAll('.widget-html')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    if sideways:
        yield f"{sideways} pictures are wider than the page"


def opened(page: Page, home: str, token: str, name: str) -> list[str]:
    """What is wrong with a notebook: as it is opened, once it has run, and of the explorer when its knobs are turned."""
    notebook = Notebook(page, home, token, name)
    wrong = notebook.raw()
    if name != AS_IT_IS:
        notebook.run()
        wrong += notebook.raw() + notebook.nameless()
    wrong += [*explorer_problems(notebook), *notebook.nameless()] if name == "explore" else []
    return list(dict.fromkeys(wrong + notebook.wrong))


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--pictures", type=Path, help="a folder for screenshots")
    asked = ask.parse_args()
    program = next(filter(None, map(shutil.which, browser.BROWSERS)), None)
    if program is None:
        print(f"no browser: none of {', '.join(browser.BROWSERS)} is on the PATH; apt-get install chromium")
        return 1
    failed = 0
    with tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True) as folder, sync_playwright() as driver:
        flags = [flag for flag in browser.FLAGS if not flag.startswith(("--headless", "--remote"))]
        chromium = driver.chromium.launch(executable_path=program, args=flags)
        with jupyterlab(Path(folder)) as (home, token):
            cells = [nbformat.v4.new_markdown_cell("# Planted"), nbformat.v4.new_code_cell(PLANTED)]
            kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
            nbformat.write(
                nbformat.v4.new_notebook(cells=cells, metadata=kernel), Path(folder) / "notebooks" / "planted.ipynb"
            )
            for name, width in OPENED:
                page = chromium.new_page(viewport={"width": width, "height": 900})
                wrong = opened(page, home, token, name)
                if asked.pictures:
                    for place, cell in enumerate(page.locator(".jp-Notebook .jp-Cell").all()):
                        cell.scroll_into_view_if_needed()
                        page.screenshot(path=asked.pictures / f"{name}-{width}-{place}.png")
                if name == "planted":  # the check itself is checked
                    wrong = [f"not found: {fault}" for fault in FAULTS if not any(fault in w for w in wrong)]
                print(
                    f"{'FAILED' if wrong else 'ok':6} {name} in JupyterLab at {width} px: {'; '.join(wrong)}",
                    flush=True,
                )
                failed += bool(wrong)
                page.close()
        chromium.close()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
