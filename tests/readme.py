"""Write README's first picture, and the words below it, from the ledger. `make readme` runs this."""

import re
from pathlib import Path

from dpmix.companion import evidence, ledger, plots, report

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "book" / "_static" / "reproduced.png"
PART = re.compile(r"(?<=<!-- from the ledger: make readme -->\n).*?(?=<!-- end -->)", re.DOTALL)


def words() -> str:
    """What the committed runs decide, and what they are."""
    runs = ledger.committed()
    found = ledger.decide(runs)
    about = [a for name in runs for a in evidence.read(name).attrs["about"]]
    sets = ", ".join(dict.fromkeys(report.label(a["dataset"]) for a in about))
    networks = " and ".join(dict.fromkeys(re.split(" at | from |, ", a["encoder"])[0] for a in about))
    return (
        "![Each claim's published effect as a ring, the measured one as a dot with its interval](book/_static/reproduced.png)\n\n"
        f"*What reproduced. Of {len(found)} claims of the paper, on real data ({sets}, "
        f"some in part; {networks}): {ledger.counts(found)}. "
        "Rings are published effects, dots measured ones with 95 % intervals; the rows are explained on the page of that name.*\n"
    )


if __name__ == "__main__":
    found = ledger.decide(ledger.committed())
    plots.effects_plot(found[found["verdict"] != ledger.NOT_RUN]).savefig(PICTURE, dpi=110, bbox_inches="tight")
    path = ROOT / "README.md"
    path.write_text(PART.sub(lambda _: words(), path.read_text()))
