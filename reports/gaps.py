"""Parts of a run folder that could not be used: how they are read, and how the page names them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gap:
    """A part of the run folder that could not be used, and what the page lacks because of it."""

    part: str
    consequence: str


def read_json(path: Path, consequence: str, gaps: list[Gap]) -> dict[str, Any]:
    """Read a JSON object; an empty one, and a gap with the consequence, if the file holds none."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        gaps.append(Gap(path.name, f"{why_unread(error)}: {consequence}"))
        return {}
    except ValueError as error:
        gaps.append(Gap(path.name, f"not valid JSON ({error}): {consequence}"))
        return {}
    if not isinstance(raw, dict):
        gaps.append(Gap(path.name, f"not a JSON object: {consequence}"))
        return {}
    return raw


def why_unread(error: Exception) -> str:
    """Return in a few words why a file could not be read."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    text = str(error).strip().splitlines()
    return f"unreadable ({text[0][:160] if text else type(error).__name__})"
