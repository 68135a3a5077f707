"""Wakes a greenlet at a moment, to a few hundredths of a millisecond where Linux offers a timer as a file.

gevent's own timers go through epoll, which counts in whole milliseconds and rounds up: arrivals would leave half a
millisecond late on average, which is as long as a fast answer takes.
"""

import ctypes
import os
import sys
import time
from typing import Any, Final

import gevent
import gevent.hub

_CLOCK_MONOTONIC: Final = 1
_TFD_TIMER_ABSTIME: Final = 1
_READ: Final = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class TimerFile:
    """A Linux timer that is a file: readable from a moment on. Raises OSError where there is none."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise OSError("timers as files are Linux's")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._spec = _Itimerspec()
        self.fd: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def set(self, moment_s: float) -> None:
        """Become readable at a reading of time.monotonic(), at once if that is over."""
        self._spec.value.sec = int(moment_s)
        # Zero would disarm it.
        self._spec.value.nsec = int(moment_s % 1 * 1e9) | 1
        if self._libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def take(self) -> None:
        """Read what made it readable."""
        os.read(self.fd, 8)

    def close(self) -> None:
        """Give it back."""
        os.close(self.fd)


class Alarm:
    """One timer for one greenlet. Close it after use."""

    def __init__(self) -> None:
        self._hub: Any = gevent.hub.get_hub()
        self._timer: TimerFile | None = None
        self._watcher: Any = None
        try:
            self._timer = TimerFile()
        except OSError:
            return  # gevent's own timers do, a millisecond less exact.
        self._watcher = self._hub.loop.io(self._timer.fd, _READ)

    def wait_until(self, moment_s: float) -> None:
        """Return at a reading of time.monotonic() or shortly after; other greenlets run meanwhile."""
        left_s = moment_s - time.monotonic()
        if left_s <= 0 or self._timer is None:
            gevent.sleep(max(left_s, 0))
            return
        self._timer.set(moment_s)
        self._hub.wait(self._watcher)
        self._timer.take()

    def close(self) -> None:
        """Give the timer back."""
        if self._timer is not None:
            self._watcher.stop()
            self._watcher.close()
            self._timer.close()
            self._timer = None
