"""What decisions 20 and 21 rest on: the memory that gRPC adds to an API process, and the CPU of a token.

Run it alone: `python tests/benchmarks/doors.py`. Prints megabytes and microseconds; the best of seven rounds.
"""

import subprocess
import sys
import time

import jwt

ROUNDS, REPEATS = 7, 500
KEY = "0123456789abcdef0123456789abcdef"
MEASURE = "import psutil, {module}; print(psutil.Process().memory_info().rss)"


def resident_mb(module: str) -> float:
    """Return the memory of a new Python after it imported a module."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(module=module)], check=True, capture_output=True, text=True
    )
    return int(done.stdout) / 1e6


def verification_us() -> float:
    """Return the CPU time of one verification of an HS256 token by PyJWT."""
    claims = {"iss": "ledgerproof", "aud": "ledgerproof", "exp": time.time() + 1000, "nbf": 0, "scope": "wallet"}
    token = jwt.encode(claims, KEY, algorithm="HS256")
    best_s = float("inf")
    for _ in range(ROUNDS):
        began_s = time.process_time()
        for _ in range(REPEATS):
            jwt.decode(token, KEY, algorithms=["HS256"], audience="ledgerproof", issuer="ledgerproof")
        best_s = min(best_s, (time.process_time() - began_s) / REPEATS)
    return best_s * 1e6


if __name__ == "__main__":
    without, both = resident_mb("reference.api"), resident_mb("reference.api, reference.grpc_api")
    print(f"API process, imports only: {without:.0f} MB; with gRPC {both:.0f} MB ({both - without:+.0f})")
    print(f"verifying a token: {verification_us():.0f} µs")
