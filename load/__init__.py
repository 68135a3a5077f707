"""Load: a truthful open load on Locust (docs/load.md). The main job's own generator is ledgerproof/workload.py.

`schedule` and `profiles` say what is sent when; `conductor` (master) and `users` (worker) play it in Locust, `player`
one worker's share; `tally`, `histograms` and `result` say what came of it; `truth` says whether that is true.
"""
