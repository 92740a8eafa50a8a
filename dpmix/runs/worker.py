"""A worker of `workers`: the program `python -m dpmix.runs.worker`."""

import json
import os
import sys
import traceback

from dpmix.runs import experiments
from dpmix.runs.spec import ComputeFlags, RunSpec, code_digest


def main() -> None:
    """Take tasks, a line each, until there are none; answer each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    try:
        for line in sys.stdin:
            task = json.loads(line)
            said = ""
            if task["code"] != code_digest():
                said = "dpmix: its source changed while it ran; restart Python and run again"
            else:
                try:
                    specs = [RunSpec.from_json(s) for s in task["specs"]]
                    store = experiments.Store(task["store"])
                    experiments.run_all(specs, compute=ComputeFlags(**task["compute"]), store=store)
                except Exception as error:
                    traceback.print_exc()
                    said = f"{type(error).__name__}: {error}"
            print(json.dumps(said), file=answers, flush=True)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
