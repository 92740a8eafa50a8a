"""Sensitivity and privacy audits of a step."""

from dpmix.audit.attacks import (
    RELATIONS as RELATIONS,
)
from dpmix.audit.attacks import (
    ROUNDING as ROUNDING,
)
from dpmix.audit.attacks import (
    CanaryAudit as CanaryAudit,
)
from dpmix.audit.attacks import (
    OneRun as OneRun,
)
from dpmix.audit.attacks import (
    Sensitivity as Sensitivity,
)
from dpmix.audit.attacks import (
    auditor as auditor,
)
from dpmix.audit.attacks import (
    lower_bounds as lower_bounds,
)
from dpmix.audit.attacks import (
    noise_level as noise_level,
)
from dpmix.audit.attacks import (
    one_run as one_run,
)
from dpmix.audit.attacks import (
    sensitivity as sensitivity,
)
from dpmix.audit.attacks import (
    shuffled_epsilon as shuffled_epsilon,
)
from dpmix.audit.attacks import (
    step_canary as step_canary,
)
from dpmix.audit.attacks import (
    worlds as worlds,
)
from dpmix.audit.steps import (
    Records as Records,
)
from dpmix.audit.steps import (
    Release as Release,
)
from dpmix.audit.steps import (
    Step as Step,
)
from dpmix.audit.steps import (
    bank_release as bank_release,
)
from dpmix.audit.steps import (
    bank_run as bank_run,
)
from dpmix.audit.steps import (
    duel as duel,
)
from dpmix.audit.steps import (
    head_oracle as head_oracle,
)
from dpmix.audit.steps import (
    head_step as head_step,
)
from dpmix.audit.steps import (
    marked as marked,
)
from dpmix.audit.steps import (
    network_step as network_step,
)
from dpmix.audit.steps import (
    noisy as noisy,
)
