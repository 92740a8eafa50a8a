"""A pytest plugin for Opacus' own tests, which its package brings: whatever `make_private` returns averages K views.

    DPMIX_VIEWS=3 python -m pytest -p peers.opacus_suite --pyargs opacus.tests.gradient_accumulation_test

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
    model.register_forward_pre_hook(
        lambda m, x: (x[0][:, None].expand(-1, VIEWS, *x[0].shape[1:]),) if m.training else None
    )
    optimizer = average_views(model, optimizer, VIEWS)
    model.register_forward_hook(lambda m, x, y: y.unflatten(0, (-1, VIEWS)).mean(1) if m.training else None)
    averaged.append(type(optimizer).__name__)
    return hooked, optimizer, loader


def pytest_configure(config):
    settings.register_profile("few", max_examples=int(os.environ.get("DPMIX_EXAMPLES", "100")))
    settings.load_profile("few")
    PrivacyEngine.make_private = with_views
    randomness_test.DPOptimizer = ViewAveraging


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"view averaging: {len(averaged)} of {sorted(set(averaged))}")
