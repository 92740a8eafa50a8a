"""Mutation testing of `dpmix.core`: change one operator, number or branch at a time; do the tests of the room notice?

    python tests/mutation.py [MODULE ...] [--sample N] [--slowest SECONDS] [--list]

The mutants are cosmic-ray's, by the operators below (one replacement for each kind: ten ways to break a plus tell no more than
one). Each is written into a copy of the tree and tested by a forked child, in which the libraries are imported already and the
tests run from the quickest to the slowest, until the first fails. A child that takes three times as long as all its tests took
unchanged counts as caught. `MUTANTS.md` beside the tests of core says what survived and why.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {
    "rng": "test_rng",
    "accounting": "test_accounting test_microbatch",
    "microbatch": "test_microbatch test_clipping_network test_network",
    "views": "test_views",
    "clipping": "test_clipping_heads test_precision",
    "clipping_network": "test_clipping_network test_precision",
    "sources": "test_heads test_rng",
    "heads": "test_heads test_rng",
    "network": "test_network test_microbatch test_rng",
}
OPERATORS = [
    *("AddNot", "NumberReplacer", "ExceptionReplacer", "ZeroIterationForLoop", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub", "Invert")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Mod_Mul", "Pow_Mul", "BitAnd_BitOr")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Is_IsNot", "IsNot_Is")),
]
CALLS = (
    ("round(", "int("),
    ("max(", "min("),
    ("min(", "max("),
    (".clamp(max=", ".clamp(min="),
)  # cosmic-ray leaves calls alone


class Quickest:
    """A pytest plugin: tests in the order of how long they took unchanged, none of the slowest; and how long that was."""

    def __init__(self, seconds: dict[str, float], slowest: float) -> None:
        self.seconds, self.slowest, self.failed = seconds, slowest, ""

    def pytest_collection_modifyitems(self, items: list) -> None:
        took = {item.nodeid: self.seconds.get(item.nodeid, 0.0) for item in items}
        items[:] = sorted(
            (item for item in items if took[item.nodeid] <= self.slowest), key=lambda item: took[item.nodeid]
        )

    def pytest_runtest_logreport(self, report: object) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = report.nodeid


def mutants(source: str) -> dict[str, str]:
    """Each mutant's source under a name that says what was done where; those that do not compile are left out."""
    from cosmic_ray import mutating, plugins

    found: dict[str, str] = {}

    def add(name: str, text: str) -> None:
        old, new = source.splitlines(), text.splitlines()
        place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
        if place is None or re.search(r"(^|[(,])\s*/,", new[place]):  # the star of a signature is no product
            return
        with contextlib.suppress(SyntaxError):
            compile(text, "mutant", "exec")
            found[f"{place + 1}: {name}: {old[place].strip()} -> {new[place].strip()}"] = text

    for name in OPERATORS:
        operator = plugins.get_operator(f"core/{name}")()
        occurrence = 0
        while (text := mutating.mutate_code(source, operator, occurrence)) is not None:
            add(name, text)
            occurrence += 1
    for before, after in CALLS:
        place = source.find(before)
        while place >= 0:
            if before.startswith(".") or not (source[place - 1].isalnum() or source[place - 1] in "_."):
                add("call", source[:place] + after + source[place + len(before) :])
            place = source.find(before, place + 1)
    return found


Outcome = tuple[str, dict[str, float], list[str]]  # the first test that failed or "", seconds of each, libraries in use


def in_a_child(
    tree: Path, tests: list[str], seconds: dict[str, float], limit: float, slowest: float = math.inf
) -> Outcome:
    """What the tests say of the tree as it is, in a process of its own."""
    told = tree / "told"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        import pytest

        os.setsid()
        sink = os.open(tree / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1), os.dup2(sink, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        plugin = Quickest(seconds, slowest)
        code = 99
        try:
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[plugin])
        finally:
            of = {name: str(getattr(module, "__file__", None)) for name, module in list(sys.modules.items())}
            libraries = [name for name, file in of.items() if not file.startswith(str(tree)) and "_pytest" not in name]
            told.write_text(
                json.dumps([plugin.failed or ("" if code == 0 else "not collected"), plugin.seconds, libraries])
            )
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.05)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "too long", seconds, []
    return tuple(json.loads(told.read_text())) if told.exists() else ("died", seconds, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--sample", type=int, default=0, help="so many of each module, chosen with seed 0; 0: all")
    parser.add_argument(
        "--slowest", type=float, default=math.inf, help="leave out tests that take more seconds unchanged"
    )
    parser.add_argument("--list", action="store_true", help="only print what would be done")
    asked = parser.parse_args()
    import hypothesis, kornia, opacus, pytest, scipy.stats, torch  # noqa: E401, F401, I001 (what the children share)
    import dp_accounting.pld.pld_privacy_accountant  # noqa: F401

    tree = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        for part in ("dpmix", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("data", "notebooks", "benchmarks", "book", "pyproject.toml"):
            (tree / part).symlink_to(ROOT / part)
        for module in asked.modules:
            path = tree / "dpmix" / "core" / f"{module}.py"
            source, tests = path.read_text(), [f"tests/core/{name}.py" for name in TESTS[module].split()]
            chosen = sorted(mutants(source).items())
            total = len(chosen)
            if asked.sample:
                chosen = random.Random(0).sample(chosen, min(asked.sample, total))
            if asked.list:
                print(*(name for name, _ in chosen), f"{module}: {total}", sep="\n")
                continue
            began = time.monotonic()
            failed, seconds, libraries = in_a_child(tree, tests, {}, 3600)
            if failed:
                sys.exit(f"{module}: {failed} fails without any change; see\n{(tree / 'log').read_text()[-2000:]}")
            limit = 3 * (time.monotonic() - began) + 10
            for library in libraries:  # once, not in every child
                with contextlib.suppress(Exception):
                    importlib.import_module(library)
            assert "dpmix" not in sys.modules, "the children must read the mutant, not what the parent holds"
            survived = []
            for name, text in chosen:
                path.write_text(text)
                for stale in path.parent.glob(f"__pycache__/{module}.*"):
                    stale.unlink()
                by, *_ = in_a_child(tree, tests, seconds, limit, asked.slowest)
                print(f"{module}:{name}  {by or '*** SURVIVED'}", flush=True)
                survived += [name] if not by else []
            path.write_text(source)
            caught = len(chosen) - len(survived)
            print(
                f"== {module}: {caught} of {len(chosen)} caught ({100 * caught / len(chosen):.0f} %), of {total} mutants",
                flush=True,
            )
    finally:
        shutil.rmtree(tree, ignore_errors=True)


if __name__ == "__main__":
    main()
