"""What came of a run (`Result`), many of them as a table, and the choice of a learning rate."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import pandas as pd

from dpmix.core import checks
from dpmix.runs.spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class NonPrivateDiagnostics:
    """What was computed from private data without noise. For choosing and debugging; never part of a release. `owners_note`:
    one line for the owner where gradients were dropped, else empty."""

    validation_accuracy: float | None
    dropped_gradients: int
    train_examples: int
    owners_note: str = ""

    def __post_init__(self) -> None:
        why = "look for images or an encoder with numbers that are not finite, or for a learning rate that is too high"
        note = f"gradients not finite and counted as zero: {self.dropped_gradients}; {why}"
        object.__setattr__(self, "owners_note", note if self.dropped_gradients else "")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run. `test_accuracy` (0..1) is that of the last step. `epsilon` holds each accountant's bound at spec.delta. `key`
    is its name in the store, `seed_drawn` whether the software drew the seed itself."""

    spec: RunSpec
    key: str
    seed_drawn: bool = False
    test_accuracy: float
    epsilon: dict[str, float | None]
    noise_multiplier: float
    sample_rate: float
    steps: int
    divisor: float
    population: int
    diagnostics: NonPrivateDiagnostics
    timing: dict[str, Any]
    provenance: dict[str, Any]

    def to_json(self) -> dict:
        """The private record: it holds the seed."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict) -> "Result":
        rest = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        spec, seen = RunSpec.from_json(content["spec"]), NonPrivateDiagnostics(**content["diagnostics"])
        return cls(**{**rest, "spec": spec, "diagnostics": seen})


def told(about: dict[str, Any], *libraries: str) -> dict[str, str]:
    """`date`, `device` and `versions` (of dpmix, torch and `libraries`) of a provenance."""
    commit = f" at {about['commit'][:9]}{' with changes' if about['dirty'] else ''}" if about["commit"] else ""
    others = "".join(f", {name} {about['versions'][name]}" for name in ("torch", *libraries))
    made_with = f"dpmix {about['versions']['dpmix']}{commit}{others}"
    return {"date": about["date"], "device": about["device"], "versions": made_with}


def frame(results: Iterable[Result]) -> pd.DataFrame:
    """One row a run: every field of the spec and of the recipe, accuracies in percent, q, T, sigma, epsilons, timing. A seed
    that the software drew is not shown."""

    def row(r: Result) -> dict[str, Any]:
        spec, held_out = asdict(r.spec), r.diagnostics.validation_accuracy
        recipe = spec.pop("recipe")
        found = spec | ({"seed": "drawn"} if r.seed_drawn else {}) | {"recipe": r.spec.recipe} | recipe
        found |= {"key": r.key, "accuracy": 100 * r.test_accuracy}
        found |= {"validation_accuracy": float("nan") if held_out is None else 100 * held_out}
        found |= {"sigma": r.noise_multiplier, "q": r.sample_rate, "T": r.steps, "N": r.population}
        found |= {f"epsilon_{name}": value for name, value in r.epsilon.items()}
        found |= {name: r.timing[name] for name in ("seconds", "views_per_second")}
        return found | told(r.provenance, "opacus")

    return pd.DataFrame(map(row, results))


def choose_learning_rate(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The rows of the learning rate with the best mean validation accuracy over the seeds, for each condition `by`. Never
    looks at the test accuracy. Ties go to the smaller rate. The choice itself is not private and not accounted for."""
    by = list(by)
    scored = runs["validation_accuracy"].notna().all()
    remedy = "is missing for some runs, so there is nothing to choose by; give RunSpec a validation share above 0"
    checks.require(bool(scored), "validation_accuracy", None, remedy)
    # Not by merging: an epsilon that is None in every row has another dtype before than after.
    means = runs.groupby([*by, "learning_rate"], dropna=False)["validation_accuracy"].transform("mean")
    keys = [runs[name] for name in by]
    best = runs[means == means.groupby(keys, dropna=False).transform("max")]
    least = best.groupby(by, dropna=False)["learning_rate"].transform("min")
    return best[best["learning_rate"] == least].reset_index(drop=True)
