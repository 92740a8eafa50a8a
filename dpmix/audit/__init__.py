"""Sensitivity and privacy audits of a step."""

from dpmix.audit.attacks import (
    ROUNDING,
    CanaryAudit,
    auditor,
    lower_bounds,
    noise_level,
    one_run,
    sensitivity,
    shuffled_epsilon,
    step_canary,
    worlds,
)
from dpmix.audit.steps import Records, Release, Step, bank_release, bank_run, duel, head_oracle, head_step, network_step
