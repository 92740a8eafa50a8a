"""Sensitivity and privacy audits of a step."""

from dpmix.audit.attacks import (
    RELATIONS,
    ROUNDING,
    CanaryAudit,
    OneRun,
    Sensitivity,
    auditor,
    lower_bounds,
    noise_level,
    one_run,
    sensitivity,
    shuffled_epsilon,
    step_canary,
    worlds,
)
from dpmix.audit.steps import (
    Records,
    Release,
    Step,
    bank_release,
    bank_run,
    duel,
    head_oracle,
    head_step,
    marked,
    network_step,
    noisy,
)
