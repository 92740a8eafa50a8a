"""What may leave the house: the weights of one run and its privacy card."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpmix.core import checks, files, microbatch
from dpmix.models import encoders
from dpmix.runs.result import Result
from dpmix.runs.spec import no_meaningful_guarantee
from dpmix.runs.store import Store


def release(result: Result, path: Path | str, *, store: Store | None = None) -> Path:
    """Write the weights of one run and its privacy card into the folder `path`: no seed, nothing of `NonPrivateDiagnostics`.

    Raises ValueError for a run that carries no guarantee: without noise, with a seed that was given (whoever gave it, or
    guesses it, can subtract the noise), or with private images in the place of public ones. A budget that protects nobody
    is released, and the card says so in plain words."""
    path, store, spec = Path(path), store or Store(), result.spec
    allowed = "a run without noise carries no guarantee and is not released"
    checks.require(result.noise_multiplier > 0, "result.noise_multiplier", 0, allowed)
    allowed = "mixes in the other half of the private images unprotected: an experiment (Table 10), not to be released"
    checks.require(spec.public != "half-2" or spec.recipe.k_diff == 0, "public", spec.public, allowed)
    allowed = "who is in a half depends on who else is there: an experiment (Table 10), not to be released"
    checks.require("half" not in spec.train_on, "train_on", spec.train_on, allowed)
    checks.require("half" not in spec.public or spec.recipe.k_diff == 0, "public", spec.public, allowed)
    drawn = spec.recipe.k_diff + spec.recipe.k_self > 0 or spec.recipe.transform != "none"
    fixed = spec.redraw or not drawn or result.provenance.get("views_keyed_by") == "image"
    allowed = (
        "its stored views were keyed by places under a known seed, so that its guarantee does not hold; train again"
    )
    checks.require(fixed, "redraw", spec.redraw, allowed)
    tensors, stored = store.tensors(result), store.get(result.key)
    if not (stored or result).seed_drawn:
        why = "was given, and whoever knows or guesses it can subtract the noise"
        raise ValueError(f"seed: {why}; train what is to be published with seed=None")
    same = stored is not None and len({json.dumps(r.to_json(), sort_keys=True) for r in (stored, result)}) == 1
    allowed = "the store has another result under this key now; give the store that it came from, or run again"
    checks.require(same, "result", result.key, allowed)
    whole = all(bool(t.isfinite().all()) for t in tensors.values())
    said = "the weights are not finite; nothing is released. A lower rate is another training, with a budget of its own"
    checks.require(whole, "learning_rate", spec.learning_rate, said)
    card = privacy_card(result, store)
    # Not result.key: it is a digest over the images too.
    files.save_tensors(path / "model.safetensors", tensors, {"card": card_digest(card)})
    files.write_json(path / "privacy_card.json", card)
    return path


def card_digest(card: dict[str, Any]) -> str:
    """What ties weights to their card."""
    return files.digest(json.dumps(card, sort_keys=True))


def privacy_card(result: Result, store: Store) -> dict[str, Any]:
    """What a stranger needs to judge and to use the weights, and nothing that tells of the images or of their owner."""
    spec, made_of = result.spec, result.provenance
    unit, adjacency = "example", "add or remove one example (replacing one example: twice the sensitivity)"
    if spec.microbatch > 1:
        unit = f"microbatch of {spec.microbatch} in a fixed partition of public size"
        adjacency = "one place of the partition is vacated or filled"
    sigma, sensitivity = result.noise_multiplier, microbatch.sensitivity(spec.microbatch) * spec.clip_norm
    noise = {"noise_multiplier": sigma, "clip_norm": spec.clip_norm, "sensitivity": sensitivity}
    noise |= {"noise_standard_deviation": sigma * sensitivity, "public_population": result.population}
    epsilon = {name: value for name, value in result.epsilon.items() if value is not None}
    # Without the seed, and without any path: of a model that names a file, the file's name alone.
    about = {name: value for name, value in asdict(spec).items() if name not in ("seed", "weights")}
    return {
        "guarantee": {"epsilon": epsilon, "delta": spec.delta, "calibrated_by": spec.accountant},
        "in_plain_words": _plain_words(result),
        "adjacency": adjacency,
        "sampling": f"Poisson, every {unit} joins a step with probability {result.sample_rate:.6g}",
        "mechanism": noise | {name: getattr(result, name) for name in ("sample_rate", "steps", "divisor")},
        "not_accounted_for": _not_accounted_for(result, store),
        "withheld": ["seed", "validation accuracy and every other diagnostic computed without noise", "test accuracy"],
        "spec": about | {"dataset": spec.dataset.partition(":")[0], "model": encoders.public_name(spec.model)},
        "class_names": made_of.get("classes"),
        **{name: made_of[name] for name in ("encoder", "images", "versions")},
        "views_keyed_by": made_of.get("views_keyed_by"),  # older results do not say it
    }


def _plain_words(result: Result) -> list[str]:
    """What the guarantee says; where it says nothing that matters, that first."""
    spent, delta = result.epsilon[result.spec.accountant], result.spec.delta
    assert spent is not None
    hollow = no_meaningful_guarantee(spent, delta, result.population)
    times = f" ({math.exp(spent):,.1f})" if spent < 10 else ""
    meant = (
        f"Whatever is concluded from this model about one training example is at most e^{spent:.3g}{times} times as likely as "
        f"it would be from a model trained without that example, but for a chance of {delta:g} (1 in {1 / delta:,.0f})."
    )
    return [*(f"NO MEANINGFUL GUARANTEE. {why}" for why in hollow), meant]


def _not_accounted_for(result: Result, store: Store) -> list[str]:
    # Of any images: to say which runs have the same ones would tell whether one image has changed since.
    others = [r for r in store.all() if r.key != result.key and r.spec.train_on != "synthetic"]
    compared = [r for r in others if r.diagnostics.validation_accuracy is not None]
    split = "the choice of the learning rate and of other settings on the validation split"
    known = "the number of training examples, from which the sampling rate and the number of steps follow"
    facts = "the names of the classes, whether any is in colour, a common size, an encoder recommended for most of them"
    together = f"what is taken as public of all images together: {facts}"
    return [
        f"the choice of this run: its store has {checks.counted(len(others), 'other run')} on private images, "
        f"{len(compared)} of them with an accuracy on private images held out, from which it may have been chosen",
        *([split] if result.spec.validation else []),
        "other models released from the same data: their budgets add up",
        "floating-point noise",
        *([known] if result.spec.population is None else []),
        *([together] if result.spec.dataset.startswith("folder:") else []),
    ]
