"""Chaos Toolkit extension and experiments. The main job's own faults are in ledgerproof/faults.py."""
