"""README says what the ledger says."""

import readme


def test_the_first_words_are_those_of_the_ledger():
    text = (readme.ROOT / "README.md").read_text()
    assert readme.PART.search(text)[0] == readme.words(), "run `make readme`"
    assert readme.PICTURE.is_file()


def test_words_of_another_ledger_are_seen():
    text = (readme.ROOT / "README.md").read_text()
    stale = text.replace("claims of the paper", "claims of the papers")
    assert stale != text and readme.PART.search(stale)[0] != readme.words()


def test_the_sentence_counts_every_claim(monkeypatch):
    found = readme.ledger.decide(readme.ledger.committed())
    monkeypatch.setattr(readme.ledger, "decide", lambda runs: found.assign(verdict="holds"))
    assert f"holds {len(found)}" in readme.words()
