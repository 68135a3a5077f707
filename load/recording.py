"""Writes the history of a load in a process of its own: `python -m load.recording FOLDER SOCKET RUN WORKERS`.

Each worker connects to the Unix socket and sends its records; this process numbers the attempts without a gap and
hands them to `invariants.history.Recorder`. The history is closed only if every worker's last record came and none
of its attempts is missing: whatever else happens, the checker says that the recording is cut. It ends when its
standard input does, so it outlives nobody.
"""

import socket
import sys
import threading
import time
from io import BufferedReader
from pathlib import Path
from typing import Final

import msgspec

from invariants.history import HistoryRecord, Recorder, RecordingError
from load.records import LENGTH_BYTES, Complete, End, Hello, Invoke, Record

DONE: Final = "closed"
CUT: Final = "cut"
LAST_RECORDS_S: Final = 5.0

_decode = msgspec.msgpack.Decoder(Record).decode


class Numbers:
    """Gives the attempts of all workers their numbers in one history, from 1 without a gap. Thread-safe."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.last = 0
        """The newest number given."""
        self._lock = threading.Lock()

    def take(self, record: HistoryRecord) -> int:
        """Append an invoke record under the next number and return that. Raises RecordingError."""
        with self._lock:
            self.last += 1
            record["attempt"] = self.last
            self._recorder.append(record)
            return self.last


class Stream:
    """The records of one worker, in the order in which it sent them."""

    def __init__(self, recorder: Recorder, numbers: Numbers) -> None:
        self._recorder = recorder
        self._numbers = numbers
        self._open: dict[int, int] = {}
        self._invoked = 0
        self.whole = False
        """The last record came and nothing before it is missing."""

    def take(self, record: Record) -> None:
        """Take one record. Raises RecordingError if one before it is missing, or the history cannot be written."""
        if isinstance(record, Invoke):
            self._invoked += 1
            if record.attempt != self._invoked:
                raise RecordingError(f"attempt {record.attempt} of a worker came where {self._invoked} was due")
            row = {name: getattr(record, name) for name in Invoke.__struct_fields__}
            row["record"] = "invoke"
            self._open[record.attempt] = self._numbers.take(row)  # type: ignore[arg-type]
        elif isinstance(record, Complete):
            number = self._open.pop(record.attempt, None)
            if number is None:
                raise RecordingError(f"attempt {record.attempt} of a worker ended without having begun, or twice")
            row = {name: getattr(record, name) for name in Complete.__struct_fields__}
            row["attempt"] = number
            self._recorder.append(row)  # type: ignore[arg-type]
        elif isinstance(record, End):
            self.whole = record.attempts == self._invoked


def serve(folder: Path, address: Path, run: str, workers: int) -> bool:
    """Write the history of a run until standard input ends; return whether it is whole.

    Raises OSError if the socket cannot be made, RecordingError if the history cannot be written.
    """
    recorder = Recorder(folder, run)
    numbers = Numbers(recorder)
    streams: dict[int, Stream] = {}
    problems: list[str] = []
    ended = threading.Semaphore(0)

    def receive(connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as stream:
                taken = streams[_worker_of(_decode(read_frame(stream)))] = Stream(recorder, numbers)
                while not taken.whole:
                    taken.take(_decode(read_frame(stream)))
        except (OSError, EOFError, RecordingError, msgspec.MsgspecError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        finally:
            ended.release()

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed: the run is over
            threading.Thread(target=receive, args=(connection,), daemon=True).start()

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(address))
        listener.listen()
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        print("ready", flush=True)
        sys.stdin.buffer.read()
        # What workers sent before may still be on its way here; nobody waits longer for one that never came.
        deadline_s = time.monotonic() + LAST_RECORDS_S
        for _ in range(workers):
            ended.acquire(timeout=max(0.0, deadline_s - time.monotonic()))
        listener.shutdown(socket.SHUT_RDWR)
    address.unlink(missing_ok=True)
    if problems or sorted(streams) != list(range(workers)) or not all(stream.whole for stream in streams.values()):
        # What came is written; the closing line is not.
        recorder.flush()
        for problem in problems:
            print(problem, file=sys.stderr)
        return False
    recorder.close()
    return True


def _worker_of(first: Record) -> int:
    if not isinstance(first, Hello):
        raise RecordingError("a worker did not say which one it is")
    return first.worker


def read_frame(stream: BufferedReader) -> bytes:
    """Read one record's bytes. Raises EOFError if the stream ends before."""
    head = stream.read(LENGTH_BYTES)
    length = int.from_bytes(head, "big")
    data = stream.read(length)
    if len(head) < LENGTH_BYTES or len(data) < length:
        raise EOFError("a worker's records ended without its last one")
    return data


def main() -> int:
    """Write a history; print `ready`, then whether it was closed."""
    folder, address, run, workers = sys.argv[1:5]
    whole = serve(Path(folder), Path(address), run, int(workers))
    print(DONE if whole else CUT, flush=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
