"""Exit codes of every command, for schedulers and scripts. Above 2 they are those of sysexits.h; 128 + n is signal n."""

from __future__ import annotations

DONE = 0
FAILED = 1
WRONG_INPUT = 2
NOT_FINITE = 65  # EX_DATAERR: a loss, gradient or tangent is not finite: the same settings would fail again
PEER_LOST = 69  # EX_UNAVAILABLE: another rank died or answers no more: start all of them again
OUT_OF_MEMORY = 71  # EX_OSERR: the device's or the host's memory does not hold it
DISK_FULL = 75  # EX_TEMPFAIL: what is on disk is sound, and the same command goes on once there is room
SIGNAL = 128  # + the number of the signal that asked for it
