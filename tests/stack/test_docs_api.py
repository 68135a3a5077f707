"""Every session of docs/api.md, typed into a shell against the real stack, prints what the page shows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from compose.service import PROJECT

PAGE = PROJECT / "docs/api.md"
SESSION = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UUID_OR_TIME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b1[67]\d{11}\b")


def test_the_sessions_of_the_page_print_what_it_shows(stack, tmp_path) -> None:
    if shutil.which("grpcurl") is None:
        program = tmp_path / "grpcurl"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("grpcurl.py")}" "$@"\n')
        program.chmod(0o755)
    env = os.environ | {
        "API": f"http://127.0.0.1:{stack.port('api0')}",
        "GRPC": f"127.0.0.1:{stack.grpc_port('api0')}",
        "TOKEN": stack.token(),
        "PATH": f"{os.environ['PATH']}{os.pathsep}{tmp_path}",
    }
    page = PAGE.read_text()
    commands = 0

    def played(session: re.Match[str]) -> str:
        nonlocal commands
        said = []
        for line in session[1].splitlines():
            if line.startswith("$ "):
                commands += 1
                done = subprocess.run(
                    ["bash", "-c", line[2:]], env=env, capture_output=True, text=True, timeout=60, check=False
                )
                said += [line, (done.stdout + done.stderr).rstrip("\n")]
        return "```console\n" + "\n".join(said) + "\n```"

    now = SESSION.sub(played, page)
    assert commands >= 12
    fresh = PROJECT / ".ledgerproof/api.md"
    fresh.write_text(now)
    shown, printed = (UUID_OR_TIME.sub("…", text) for text in (page, now))
    assert printed == shown, f"if the new output is right, copy {fresh} to {PAGE}"
