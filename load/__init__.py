"""Load: Locust users and arrival schedules. The main job's own generator is ledgerproof/workload.py."""
