"""`ledgerproof load`: a profile played by Locust against a stack of its own, recorded and judged as `prove` is."""
