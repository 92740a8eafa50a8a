"""The part of the browser test that reads files: what is dead or absent in a made-up site is found, and nothing else is."""

from pathlib import Path

import browser
import lab
import pytest

HEAD = '<html><head><link rel="stylesheet" href="style.css"></head><body>'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Two pages without a fault, one of them in a folder."""
    (tmp_path / "part").mkdir()
    (tmp_path / "style.css").write_text("p { color: black }")
    (tmp_path / "dot.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "index.html").write_text(
        f'{HEAD}<h1 id="top">A</h1><a href="part/b.html#two%20words">B</a> <a href="#top">up</a> <a href="part/">folder</a>'
        '<a href="https://example.org/nowhere">out</a> <a href="mailto:a@example.org">mail</a>'
        '<img src="dot.svg?v=1" alt="a dot"></body></html>'
    )
    page = '<h2 id="two words">B</h2><a name="old"></a><a href="../index.html">A</a><a href="#old">old</a>'
    (tmp_path / "part" / "b.html").write_text(f"{HEAD.replace('style', '../style')}{page}</body></html>")
    (tmp_path / "part" / "index.html").write_text("<p>here</p>")
    return tmp_path


def test_a_site_without_faults_has_none(site):
    assert browser.site_problems(site) == {"index.html": [], "part/b.html": [], "part/index.html": []}


@pytest.mark.parametrize(
    ("html", "said"),
    [
        ('<a href="part/c.html">gone</a>', "dead link: part/c.html"),
        ('<a href="part/b.html#three">gone</a>', "dead anchor: part/b.html#three"),
        ('<a href="#nowhere">gone</a>', "dead anchor: #nowhere"),
        ('<img src="gone.png" alt="a picture">', "dead link: gone.png"),
        ('<img src="dot.svg">', "image without alt text: dot.svg"),
        ('<img src="dot.svg" alt=" ">', "image without alt text: dot.svg"),
        ('<script src="gone.js"></script>', "dead link: gone.js"),
        ('<a href="/part/b.html">root</a>', "link from the root of the host: /part/b.html"),
        ('<a href="../outside.html">outside</a>', "dead link: ../outside.html"),
        ("<p>as {cite:p}<code>Abadi-2016</code> has it</p>", "raw role: {cite:p}"),
        ("<p>see {doc}`/views`</p>", "raw role: {doc}"),
        ("<p>is {glue:text}<code>accuracy</code> percent</p>", "raw role: {glue:text}"),
        ("<p>| method | accuracy |<br>|---|---|</p>", "raw pipes of a table: | method | accuracy |"),
        ("<div>text\n| a | b |\nmore</div>", "raw pipes of a table: | a | b |"),
        ("<p>a | b |:---|---:|</p>", "raw pipes of a table: |:---"),
        ("<p>:::{note}<br>words</p>", "raw directive: :::"),
        ("<p>(my-target)=</p>", "raw directive: (my-target)="),
        ("<p>## Heading</p>", "raw heading: ## H"),
        ("<p>they **agree** here</p>", "raw emphasis: **agree**"),
        ("<p>in [Table 3](table3.ipynb)</p>", "raw link: [Table 3](table3.ipynb)"),
    ],
)
def test_each_fault_is_found_and_named(site, html, said):
    (site.parent / "outside.html").write_text("exists, but is not part of the site")
    (site / "index.html").write_text(HEAD + html)
    found = browser.site_problems(site)["index.html"]
    assert found[0] == said and all(other.startswith("raw ") for other in found[1:])


@pytest.mark.parametrize(
    "html",
    [
        "<p>write <code>{cite:p}`key`</code></p>",
        "<pre>| a | b |\n|---|---|\n**b** [a](b)</pre>",
        "<p>|x| of {a, b} and {i} or C** 2, ε [0, 1] (b)</p>",
        '<p><span class="math notranslate">\\(\\text{a}b |x| \\)</span> is</p>',
        '<div class="math">$$ | a | b | $$</div>',
        "<script>if (a || b) { {x}`y` }</script>",
        "<p>a<span>|</span>b</p>",
    ],
)
def test_code_formulas_and_plain_text_are_no_raw_markup(html):
    assert browser.raw_markup(browser.Page(HEAD + html)) == []


HOME = "http://127.0.0.1:8000/"


def event(method: str, **params) -> dict:
    return {"method": method, "params": params}


def asked(name: str, url: str) -> dict:
    return event("Network.requestWillBeSent", requestId=name, request={"url": url})


def test_what_the_browser_reports_is_judged():
    fine = [
        asked("1", HOME + "a.css"),
        event("Network.responseReceived", response={"status": 200, "url": HOME + "a.css"}),
        event("Network.loadingFailed", requestId="1", canceled=True, errorText="net::ERR_ABORTED"),
        event("Runtime.consoleAPICalled", type="log", args=[{"value": "hello"}]),
        event("Log.entryAdded", entry={"level": "warning", "source": "javascript", "text": "old"}),
        asked("2", "data:image/png;base64,AAAA"),
    ]
    assert browser.reported(fine, HOME) == ([], set())
    outside = [
        asked("3", "https://cdn.example/x.js"),
        event("Network.loadingFailed", requestId="3", errorText="no such host"),
    ]
    assert browser.reported(outside, HOME) == ([], {"https://cdn.example/x.js"})


FAULTS = {
    "404: a.css": [event("Network.responseReceived", response={"status": 404, "url": HOME + "a.css"})],
    "not loaded (reset): a.css": [
        asked("1", HOME + "a.css"),
        event("Network.loadingFailed", requestId="1", errorText="reset"),
    ],
    "exception: TypeError: x": [
        event(
            "Runtime.exceptionThrown",
            exceptionDetails={"text": "Uncaught", "exception": {"description": "TypeError: x\nat y"}},
        )
    ],
    "console: bad Error": [
        event("Runtime.consoleAPICalled", type="error", args=[{"value": "bad"}, {"description": "Error"}])
    ],
    "console: refused": [event("Log.entryAdded", entry={"level": "error", "source": "security", "text": "refused"})],
}


@pytest.mark.parametrize("said", FAULTS)
def test_each_report_of_the_browser_is_named(said):
    assert browser.reported(FAULTS[said], HOME) == ([said], set())


def test_the_pages_are_those_of_the_contents():
    pages = browser.contents()
    assert pages[0] == "intro.html" and "notebooks/table3.html" in pages and "search.html" in pages


def test_without_a_book_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["browser.py", str(tmp_path)])
    assert browser.main() == 1
    assert "run make book first" in capsys.readouterr().out


def test_without_a_browser_it_says_which_to_install(site, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["browser.py", str(site)])
    monkeypatch.setattr(browser, "BROWSERS", ("no-such-browser",))
    assert browser.main() == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no-such-browser" in out


def test_without_a_browser_no_notebook_is_opened_and_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lab.py"])
    monkeypatch.setattr(browser, "BROWSERS", ("no-such-browser",))
    assert lab.main() == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no-such-browser" in out and "apt-get install chromium" in out
