"""The names of this room under one roof, for callers that want many of them."""

from dpmix.runs.passes import Task as Task
from dpmix.runs.release import release as release
from dpmix.runs.result import NonPrivateDiagnostics as NonPrivateDiagnostics
from dpmix.runs.result import Result as Result
from dpmix.runs.result import choose_learning_rate as choose_learning_rate
from dpmix.runs.result import frame as frame
from dpmix.runs.run import look_up as look_up
from dpmix.runs.run import run as run
from dpmix.runs.run import run_all as run_all
from dpmix.runs.spec import ComputeFlags as ComputeFlags
from dpmix.runs.spec import Mechanism as Mechanism
from dpmix.runs.spec import RunSpec as RunSpec
from dpmix.runs.spec import mechanism as mechanism
from dpmix.runs.store import STORE as STORE
from dpmix.runs.store import Store as Store
