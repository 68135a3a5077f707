"""The live auditor: the folds of `invariants.live` against a running service, read-only and beside the load."""
