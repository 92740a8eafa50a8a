"""Open every page of the built book in a headless Chromium, at a desktop and a phone width: `make browse`.

A page fails by: an error in the console, an uncaught exception, a local file that does not load, an image that is absent or has
no alt text, a formula that is not typeset, a body wider than the phone, a link or anchor inside the book that leads nowhere, raw
Markdown or MyST in what is read.
The browser reaches this machine only, so what passes here works offline; requests to other hosts are listed at the end.
"""

import argparse
import base64
import contextlib
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import websocket
import yaml

BOOK = Path(__file__).resolve().parents[1] / "book"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic", "--no-first-run",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--no-proxy-server", "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip
WIDTHS = {"desktop": 1280, "phone": 390}
PATIENCE = 60.0  # seconds for a page to load

# The site as files.


VOID = frozenset(["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"])
INLINE = frozenset(["a", "abbr", "b", "cite", "em", "i", "s", "small", "span", "strong", "sub", "sup", "u"])
UNREAD = frozenset(
    ["code", "head", "pre", "script", "style", "svg", "textarea", "title", "mjx-container"]
)  # code and formulas may hold anything
UNREAD_CLASSES = frozenset(["math", "katex", "MathJax", "cm-editor", "jp-Toolbar"])
MARKUP = {
    "role": re.compile(r"\{[a-z]+(?::[a-z]+)?\}(?=[`\ufffc])"),
    "pipes of a table": re.compile(r"^\s*\|.*\|\s*$|\|\s*:?-{3,}", re.M),
    "directive": re.compile(r"^\s*(?::{3,}|`{3,})|^\s*\([\w-]+\)=\s*$", re.M),
    "heading": re.compile(r"^\s*#{1,5} \w", re.M),
    "emphasis": re.compile(r"\*\*\w[^*\n]*\*\*"),
    "link": re.compile(r"\[[^\]\n]+\]\([^)\s]+\)"),
}


class Page(HTMLParser):
    """What a page of HTML links to, shows, says (without code and formulas) and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.images: list[tuple[str, str]] = []  # source, alt text
        self.said, self.unread = "", []  # the open tags from the first one that nobody reads
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        have = {name: value or "" for name, value in attrs}
        self.anchors |= {have[name] for name in ("id", "name") if name in have and (name == "id" or tag == "a")}
        if tag in ("a", "link") and "href" in have:
            self.links.append(have["href"])
        if tag in ("img", "script", "source", "iframe") and "src" in have:
            self.links.append(have["src"])
        if tag == "img":
            self.images.append((have.get("src", ""), have.get("alt", "")))
        self.said += "" if tag in INLINE or tag in UNREAD else "\n"
        if tag not in VOID and (self.unread or tag in UNREAD or UNREAD_CLASSES & set(have.get("class", "").split())):
            self.said += "" if self.unread else "\ufffc"  # something stands here
            self.unread.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.unread:
            del self.unread[len(self.unread) - 1 - self.unread[::-1].index(tag) :]
        elif tag not in INLINE and not self.unread:
            self.said += "\n"

    def handle_data(self, data: str) -> None:
        if not self.unread:
            self.said += data


def raw_markup(page: Page) -> list[str]:
    """Markdown and MyST that a page shows as text, which is markup that nothing rendered: each once."""
    found = ((kind, match) for kind, pattern in MARKUP.items() for match in pattern.finditer(page.said))
    return list(dict.fromkeys(f"raw {kind}: {match[0].strip()[:60]}" for kind, match in found))


def site_problems(site: Path) -> dict[str, list[str]]:
    """The faults of each page below `site` that can be read off the files: dead links, dead anchors, images without alt text."""
    site = site.resolve()
    # What lies in _static are the theme's own templates.
    paths = sorted(p for p in site.rglob("*.html") if p.relative_to(site).parts[0] != "_static")
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in paths}
    found: dict[str, list[str]] = {}
    for path, page in pages.items():
        wrong = [f"image without alt text: {source[:80]}" for source, alt in page.images if not alt.strip()]
        wrong += raw_markup(page)
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if parts.path.startswith("/"):
                wrong.append(f"link from the root of the host: {link}")
                continue
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or not target.is_relative_to(site):
                wrong.append(f"dead link: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                wrong.append(f"dead anchor: {link}")
        found[path.relative_to(site).as_posix()] = wrong
    return found


def contents() -> list[str]:
    """The pages of the contents, in order, then those that the theme adds."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    listed = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    return [f"{name}.html" for name in (*listed, "genindex", "search")]


# The site in a browser.


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of a server for `site`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *about: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class Browser:
    """One tab, spoken to through the DevTools protocol. `events` holds what it reported since the last `visit`."""

    def __init__(self, address: str) -> None:
        new = urllib.request.Request(f"http://{address}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(new, timeout=PATIENCE) as answer:
            self.socket = websocket.create_connection(
                json.load(answer)["webSocketDebuggerUrl"], timeout=PATIENCE, suppress_origin=True
            )
        self.sent = 0
        self.events: list[dict] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.sent:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def visit(self, address: str, width: int) -> None:
        """Open a page at a width and wait until it has loaded. TimeoutError if it does not."""
        self.call("Page.navigate", url="about:blank")
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844 if phone else 900,
            deviceScaleFactor=1,
            mobile=phone,
        )
        self.events = []
        self.call("Page.navigate", url=address)
        end = time.monotonic() + PATIENCE
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            if time.monotonic() > end:
                raise TimeoutError(f"{address}: not loaded after {PATIENCE:.0f} s")
            self.events.append(json.loads(self.socket.recv()))

    def evaluate(self, script: str) -> dict:
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"]["value"]

    def picture(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(program: str) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(prefix="browse-", ignore_cleanup_errors=True) as home:
        process = subprocess.Popen([program, *FLAGS, f"--user-data-dir={home}", "about:blank"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            port, end = Path(home) / "DevToolsActivePort", time.monotonic() + PATIENCE
            while not (port.is_file() and port.read_text().count("\n")):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{program}: did not start (exit status {process.poll()})")
                time.sleep(0.1)
            yield Browser(f"127.0.0.1:{port.read_text().splitlines()[0]}")
        finally:
            process.terminate()
            process.wait()


# Waits for images and formulas, then says what a reader would see. "wide" are the elements that stick out of the page, or that
# something cuts off; what scrolls in a box of its own is fine.
LOOK = """
(async (width) => {
  const pause = ms => new Promise(done => setTimeout(done, ms));
  const late = pause(30000);
  document.querySelectorAll("img[loading=lazy]").forEach(i => { i.loading = "eager"; });
  const images = [...document.images];
  await Promise.race([late, Promise.all(images.map(i => i.complete || new Promise(done => { i.onload = i.onerror = done; })))]);
  const formulas = [...document.querySelectorAll(".math")];
  if (window.MathJax?.startup?.promise) await Promise.race([late, window.MathJax.startup.promise]);
  await document.fonts.ready;
  await pause(100);
  const name = e => e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") + [...e.classList].map(c => "." + c).join("");
  const boxed = e => {
    for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) {
      const style = getComputedStyle(p);
      if (style.position === "fixed" || ["auto", "scroll"].includes(style.overflowX)) return true;
    }
    return false;
  };
  const wide = [...document.querySelectorAll("main *, footer *, header *")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width > 1 && box.height > 1 && box.right > width + 1 && e.checkVisibility({visibilityProperty: true}) && !boxed(e)
      && !e.closest("mjx-assistive-mml");
  });
  return {
    images: images.length,
    broken: images.filter(i => !i.naturalWidth).map(i => i.getAttribute("src").slice(0, 80)),
    silent: images.filter(i => !i.alt.trim()).map(i => i.getAttribute("src").slice(0, 80)),
    formulas: formulas.length,
    untypeset: formulas.filter(f => !f.querySelector("mjx-container")).map(f => f.textContent.slice(0, 60)),
    mistyped: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(f => f.textContent.slice(0, 60)),
    scroll: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth),
    wide: wide.slice(0, 3).map(name),
  };
})(%d)
"""


def reported(events: list[dict], home: str) -> tuple[list[str], set[str]]:
    """What went wrong by the browser's own account, and the addresses on other hosts that were asked for."""
    wrong, outside, asked = [], set(), {}
    for event in events:
        params = event.get("params", {})
        match event["method"]:
            case "Network.requestWillBeSent":
                asked[params["requestId"]] = url = params["request"]["url"]
                if not url.startswith((home, "data:", "blob:", "about:")):
                    outside.add(url)
            case "Network.responseReceived" if params["response"]["status"] >= 400:
                wrong.append(f"{params['response']['status']}: {params['response']['url'].removeprefix(home)}")
            case "Network.loadingFailed" if not params.get("canceled"):
                url = asked.get(params["requestId"], "")
                if url not in outside:
                    wrong.append(f"not loaded ({params['errorText']}): {url.removeprefix(home)}")
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                wrong.append(
                    "exception: " + details.get("exception", {}).get("description", details["text"]).split("\n")[0]
                )
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                wrong.append("console: " + " ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
            # Failed requests are above already, by their own events.
            case "Log.entryAdded" if params["entry"]["level"] == "error" and params["entry"]["source"] != "network":
                wrong.append("console: " + params["entry"]["text"])
    return wrong, outside


def look(tab: Browser, home: str, page: str, width: int) -> tuple[list[str], set[str], dict]:
    """Open a page: what is wrong with it, whom else it asked, what it shows."""
    tab.visit(home + page, width)
    seen = tab.evaluate(LOOK % width)
    wrong, outside = reported(tab.events, home)
    wrong += [f"image not shown: {source}" for source in seen["broken"]]
    wrong += [f"image without alt text: {source}" for source in seen["silent"]]
    wrong += [f"formula not typeset: {text}" for text in (*seen["untypeset"], *seen["mistyped"])]
    if width < 600 and (seen["scroll"] > width or seen["wide"]):
        wrong.append(f"{seen['scroll']} px wide on a phone of {width} px: {', '.join(seen['wide']) or 'the body'}")
    return wrong, outside, seen


def search_problems(tab: Browser, home: str, word: str) -> list[str]:
    """Whether the book's search finds a word that it has."""
    tab.visit(urljoin(home, f"search.html?q={word}"), WIDTHS["desktop"])
    count = """new Promise(done => { const end = Date.now() + 20000; (function again() {
        const n = document.querySelectorAll("#search-results li a").length;
        n || Date.now() > end ? done(n) : setTimeout(again, 100); })(); })"""
    return [] if tab.evaluate(count) else [f"the search finds nothing for {word!r}"]


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("site", nargs="?", type=Path, default=BOOK / "_build" / "html", help="the built book")
    ask.add_argument("--pictures", type=Path, help="a folder for a screenshot of each page at each width")
    asked = ask.parse_args()
    if not (asked.site / "index.html").is_file():
        print(f"{asked.site / 'index.html'}: absent; run make book first")
        return 1
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        print(
            f"no browser: none of {', '.join(BROWSERS)} is on the PATH; install one, for example apt-get install chromium"
        )
        return 1
    files, outside, failed = site_problems(asked.site), defaultdict(list), 0
    pages = contents()
    with served(asked.site) as home, browser(program) as tab:
        for page in pages:
            wrong, shown = dict.fromkeys(files.pop(page, ["absent from the built book"])), {}
            if (asked.site / page).is_file():
                for device, width in WIDTHS.items():
                    more, others, shown = look(tab, home, page, width)
                    wrong |= dict.fromkeys(more)
                    for other in others:
                        outside[other].append(page)
                    if asked.pictures:
                        tab.picture(asked.pictures / device / f"{page.replace('/', '-')}.png")
            if page == "search.html":
                wrong |= dict.fromkeys(search_problems(tab, home, "clipping"))
            failed += bool(wrong)
            about = f"{shown.get('images', 0)} images, {shown.get('formulas', 0)} formulas"
            print(f"{'FAILED' if wrong else 'ok':6} {page}: {'; '.join(wrong) or about}", flush=True)
    for page, wrong in files.items():  # not in the contents, and not opened: their links count all the same
        if wrong:
            failed += 1
            print(f"FAILED {page}: {'; '.join(wrong)}")
    for other, askers in sorted(outside.items()):
        print(f"asked for from another host, by {len(set(askers))} pages: {other}")
    print(f"{len(pages)} pages at {' and '.join(f'{w} px' for w in WIDTHS.values())}: {failed or 'none'} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
