"""`ledgerproof sim …`: the capacity model on the command line."""
