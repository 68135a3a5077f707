"""What a new judgement of a stored run says differently from the one that is stored with it."""

from pathlib import Path
from typing import Any, Final

import msgspec

from ledgerproof.assess import VERDICT_FILE

NOT_JUDGED: Final = "this run has no judgement of its own"


class Compared(msgspec.Struct):
    """Two judgements of one run: `before` is the stored one, `now` the new one."""

    before: dict[str, str | None] | None
    """verdict, version and checker of the stored judgement; None if there is none that can be read."""
    now: dict[str, str | None]
    problem: str | None = None
    """Why there is no stored judgement to compare with."""
    same_checker: bool | None = None
    codes_added: list[str] = []
    codes_removed: list[str] = []
    counts: dict[str, list[int]] = {}
    """Code → [before, now] where they differ."""
    sometimes: dict[str, list[int]] = {}
    undecided: dict[str, str] = {}
    """Code → what the run is too old for."""

    def lines(self) -> list[str]:
        """Return what a person wants to know of it, a sentence each."""
        if self.before is None:
            return [self.problem or NOT_JUDGED]
        before, now = self.before, self.now
        found = [
            f"judged before by {_judge(before)}: {before['verdict']}; now by {_judge(now)}"
            f"{' (the same checks)' if self.same_checker else ''}: {now['verdict']}"
        ]
        if self.codes_added:
            found.append(f"codes added since: {', '.join(self.codes_added)}")
        if self.codes_removed:
            found.append(f"codes not checked any more: {', '.join(self.codes_removed)}")
        found += [f"{code}: {old} before, {new} now" for code, (old, new) in self.counts.items()]
        found += [f"{name}: {old} times before, {new} now" for name, (old, new) in self.sometimes.items()]
        found += [f"{code} is not decided {text}" for code, text in self.undecided.items()]
        return found


def _judge(judged: dict[str, str | None]) -> str:
    checker = judged["checker"]
    return f"version {judged['version'] or 'unknown'}" + (f", checks {checker}" if checker else "")


def compare(folder: Path, verdict: dict[str, Any]) -> Compared:
    """Compare a new verdict of a run folder with the stored one. Never raises: what cannot be read is said."""
    now = _who(verdict)
    undecided = dict(verdict.get("undecided") or {})
    path = folder / VERDICT_FILE
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        before, old = _who(stored), msgspec.convert(stored.get("anomalies") or {}, dict[str, int])
        shown = msgspec.convert(stored.get("sometimes") or {}, dict[str, int])
    except OSError:
        return Compared(None, now, NOT_JUDGED, undecided=undecided)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        return Compared(None, now, f"{path} cannot be read: {error}", undecided=undecided)
    new, counts = verdict["anomalies"], verdict["sometimes"]
    return Compared(
        before,
        now,
        same_checker=before["checker"] is not None and before["checker"] == now["checker"],
        codes_added=[code for code in new if code not in old],
        codes_removed=[code for code in old if code not in new],
        counts={code: [old[code], new[code]] for code in new if code in old and old[code] != new[code]},
        sometimes={
            name: [shown[name], counts[name]] for name in counts if name in shown and shown[name] != counts[name]
        },
        undecided=undecided,
    )


def _who(verdict: dict[str, Any]) -> dict[str, str | None]:
    names = {"verdict": "verdict", "version": "judged_by", "checker": "checker"}
    return {name: None if verdict.get(key) is None else str(verdict[key]) for name, key in names.items()}
