"""From a description to a result: `RunSpec`, one identity of a run, passes, store, workers, releases."""
