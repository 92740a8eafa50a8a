"""A pytest plugin for Opacus' own tests, which its package brings: whatever `make_private` returns averages K views.

    PYTHONPATH=.:tests python -m pytest -o addopts= -W ignore -p peers.opacus_suite --pyargs opacus.tests.poisson_test

In training every input becomes K equal views, and the K answers of an example are averaged before the test sees them: a test
that holds for Opacus must then hold to rounding. In this process alone `make_private` is wrapped; nothing else is.
"""

import os

from hypothesis import settings
from opacus import PrivacyEngine
from opacus.tests import randomness_test
from torch import nn

from dpmix.peers.opacus import ViewAveraging, average_views

VIEWS = int(os.environ.get("DPMIX_VIEWS", "3"))
make_private = PrivacyEngine.make_private
averaged = []  # names of the optimizers that were made


def with_views(self, *, module: nn.Module, **options):
    hooked, optimizer, loader = make_private(self, module=module, **options)
    model = hooked if isinstance(hooked, nn.Module) else module
    optimizer = average_views(model, optimizer, VIEWS)
    kind = type(model)

    def called(self, x):
        if not self.training:
            return kind.__call__(self, x)
        return kind.__call__(self, x[:, None].expand(-1, VIEWS, *x.shape[1:])).unflatten(0, (-1, VIEWS)).mean(1)

    # No hook: Opacus may have hooked the network itself, and has to see all rows of its answer.
    model.__class__ = type(kind.__name__, (kind,), {"__call__": called})
    averaged.append(type(optimizer).__name__)
    return hooked, optimizer, loader


def pytest_configure(config):
    settings.register_profile("few", max_examples=int(os.environ.get("DPMIX_EXAMPLES", "100")))
    settings.load_profile("few")
    PrivacyEngine.make_private = with_views
    randomness_test.DPOptimizer = ViewAveraging


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"view averaging: {len(averaged)} of {sorted(set(averaged))}")
