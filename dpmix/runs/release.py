"""What may leave the house: the weights of one run and its privacy card."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpmix.core import checks, files, microbatch
from dpmix.models import encoders
from dpmix.runs.result import Result
from dpmix.runs.spec import RunSpec, no_meaningful_guarantee
from dpmix.runs.store import Store

WITHHELD = ("seed", "validation accuracy and every other diagnostic computed without noise", "test accuracy")


def release(result: Result, path: Path | str, *, store: Store | None = None) -> Path:
    """Write the weights of one run and its privacy card into the folder `path`. Nothing of `NonPrivateDiagnostics`.

    The seed is withheld. Raises ValueError for a run that carries no guarantee: without noise, with a seed that was given
    (whoever gave it, or guesses it, can subtract the noise), or with private images in the place of public ones. A budget
    that protects nobody is released, and the card says so in plain words.
    """
    path, store = Path(path), store or Store()
    spec = result.spec
    said = "a run without noise carries no guarantee and is not released"
    checks.require(result.noise_multiplier > 0, "result.noise_multiplier", 0, said)
    said = "mixes in the other half of the private images unprotected: an experiment (Table 10), not to be released"
    checks.require(spec.public != "half-2" or spec.recipe.k_diff == 0, "public", spec.public, said)
    tensors, kept = store.tensors(result), store.get(result.key)
    if not (kept or result).seed_drawn:
        why = "was given, and whoever knows or guesses it can subtract the noise"
        raise ValueError(f"seed: {why}; train what is to be published with seed=None")
    same = kept is not None and not files.differences(*(json.loads(json.dumps(r.to_json())) for r in (kept, result)))
    said = "the store has another result under this key now; give the store that it came from, or run again"
    checks.require(same, "result", result.key, said)
    card = privacy_card(result, store)
    # Not result.key: it is a digest over the images too.
    files.save_tensors(path / "model.safetensors", tensors, {"card": files.digest(json.dumps(card, sort_keys=True))})
    files.write_json(path / "privacy_card.json", card)
    return path


def privacy_card(result: Result, store: Store) -> dict[str, Any]:
    """What a stranger needs to judge and to use the weights, and nothing that tells of the images or of their owner."""
    spec = result.spec
    pairs = spec.microbatch > 1
    unit = f"microbatch of {spec.microbatch} in a fixed partition of public size" if pairs else "example"
    sensitivity = microbatch.sensitivity(spec.microbatch)
    return {
        "guarantee": {
            "epsilon": {name: value for name, value in result.epsilon.items() if value is not None},
            "delta": spec.delta,
            "calibrated_by": spec.accountant,
        },
        "in_plain_words": _plain_words(result),
        "adjacency": "one place of the partition is vacated or filled"
        if pairs
        else "add or remove one example (replacing one example: twice the sensitivity)",
        "sampling": f"Poisson, every {unit} joins a step with probability {result.sample_rate:.6g}",
        "mechanism": {
            "noise_multiplier": result.noise_multiplier,
            "clip_norm": spec.clip_norm,
            "sensitivity": sensitivity * spec.clip_norm,
            "noise_standard_deviation": result.noise_multiplier * sensitivity * spec.clip_norm,
            "sample_rate": result.sample_rate,
            "steps": result.steps,
            "divisor": result.divisor,
            "public_population": result.population,
        },
        "not_accounted_for": _not_accounted_for(result, store),
        "withheld": list(WITHHELD),
        "spec": _public_spec(spec),
        "encoder": result.provenance["encoder"],
        "images": result.provenance["images"],
        "class_names": result.provenance.get("classes"),
        "versions": result.provenance["versions"],
    }


def _plain_words(result: Result) -> list[str]:
    """What the guarantee says; where it says nothing that matters, that first."""
    spent = result.epsilon[result.spec.accountant]
    assert spent is not None
    hollow = [f"NO MEANINGFUL GUARANTEE. {said}" for said in no_meaningful_guarantee(
        spent, result.spec.delta, result.population)]  # fmt: skip
    meant = (
        f"Whatever is concluded from this model about one training example is at most e^{spent:.3g} times as likely as it "
        f"would be from a model trained without that example, but for a chance of {result.spec.delta:g}."
    )
    return [*hollow, meant]


def _not_accounted_for(result: Result, store: Store) -> list[str]:
    others = [r for r in store.all() if r.key != result.key and _same_images(r, result)]
    compared = [r for r in others if r.diagnostics.validation_accuracy is not None]
    found = [
        f"the choice of this run: the store has {len(others)} other runs on the same private data set, "
        f"{len(compared)} of them with an accuracy on private images held out, from which it may have been chosen",
        "the choice of the learning rate and of other settings on the validation split",
        "other models released from the same data: their budgets add up",
        "floating-point noise",
    ]
    counted = "the number of training examples, from which the sampling rate and the number of steps follow"
    return [*found, *([counted] if result.spec.population is None else [])]


def _same_images(one: Result, other: Result) -> bool:
    named = one.spec.dataset == other.spec.dataset
    return (named or _private(one) == _private(other) is not None) and one.spec.train_on != "synthetic"


def _private(result: Result) -> str | None:
    return result.provenance.get("contents", {}).get("private")


def _public_spec(spec: RunSpec) -> dict[str, Any]:
    """Without the seed, and without any path: of a model that names a file, the file's name alone."""
    about = {name: value for name, value in asdict(spec).items() if name not in ("seed", "weights")}
    return about | {"dataset": spec.dataset.partition(":")[0], "model": encoders.public_name(spec.model)}
