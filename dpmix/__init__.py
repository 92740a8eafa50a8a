"""dpmix: differentially private image classification with views, a companion to DP-Mix (NeurIPS 2023).

The names that a user needs, each loaded when it is first asked for: `import dpmix` itself imports nothing heavy."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpmix.core.accounting import epsilon_spent, noise_multiplier
    from dpmix.core.clipping import clipped_gradient_sum, clipped_head_sums
    from dpmix.core.views import METHODS, Recipe, make_views
    from dpmix.images.data import load
    from dpmix.models.encoders import encoder
    from dpmix.own.check import check
    from dpmix.own.train import train
    from dpmix.runs.predict import predict
    from dpmix.runs.release import release
    from dpmix.runs.run import run, run_all
    from dpmix.runs.spec import ComputeFlags, RunSpec

__version__ = "0.1.0"

_NAMES = {
    "core.accounting": ("epsilon_spent", "noise_multiplier"),
    "core.clipping": ("clipped_gradient_sum", "clipped_head_sums"),
    "core.views": ("METHODS", "Recipe", "make_views"),
    "images.data": ("load",),
    "models.encoders": ("encoder",),
    "own.check": ("check",),
    "own.train": ("train",),
    "runs.predict": ("predict",),
    "runs.release": ("release",),
    "runs.run": ("run", "run_all"),
    "runs.spec": ("ComputeFlags", "RunSpec"),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpmix' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"dpmix.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
