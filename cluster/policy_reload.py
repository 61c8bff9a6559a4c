"""A policy file that is looked at once a second, and workers that are brought to what it says.

PolicyFileWatch and workers_behind decide, from file stats, reports and the time; PolicyKeeper is the shell around them,
run by `kvstream serve` on the machine where the file lies. Each policy that takes effect has a number, 0 for the one
that the workers were started with. Workers report the number of theirs; whoever reports another one, because it was
restarted or has not been told yet, is told. So no push has to be remembered and none can be lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.membership import WorkerInfo
from cluster.policy import load_policy
from cluster.yaml_file import ConfigError
from decode.slo import SLOPolicy

SETTLE_S = 0.5  # a file is read when it has not changed for so long: nobody is in the midst of writing it
POLICY_NUMBER = "policy_number"  # among a worker's stats

Verdict = Literal["nothing", "read", "gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What changes when a file is written."""

    mtime_ns: int
    size_bytes: int


def stamp_of(path: Path) -> FileStamp | None:
    """None: there is no such file, or not for us."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return FileStamp(mtime_ns=stat.st_mtime_ns, size_bytes=stat.st_size)


class PolicyFileWatch:
    """When to read. The first look that finds the file settled says so too: it may have changed since it was loaded."""

    def __init__(self) -> None:
        self._seen: FileStamp | None = None
        self._since: float | None = None  # when it was first seen like this
        self._judged: FileStamp | Literal["nothing yet"] | None = "nothing yet"

    def look(self, stamp: FileStamp | None, now: float) -> Verdict:
        """`gone` and `read` are said once for each state that lasts."""
        if self._since is None or stamp != self._seen:
            self._seen, self._since = stamp, now
        if stamp == self._judged or now - self._since < SETTLE_S:
            return "nothing"
        self._judged = stamp
        return "gone" if stamp is None else "read"


def workers_behind(table: Iterable[WorkerInfo], number: int) -> list[str]:
    """The workers that have another policy than this one."""
    return [info.id for info in table if info.stats.get(POLICY_NUMBER, number) != number]


class PolicyKeeper:
    """`tick` it once a second. `why_not`: what keeps a good policy from being served here; `say`: a line to the
    operator; `table`: the workers as last reported; `tell`: a worker its policy."""

    def __init__(
        self,
        path: Path,
        policy: SLOPolicy,
        *,
        why_not: Callable[[SLOPolicy], list[str]],
        say: Callable[[str], None],
        table: Callable[[], Iterable[WorkerInfo]],
        tell: Callable[[str, int, SLOPolicy], None],
        stamp: Callable[[Path], FileStamp | None] = stamp_of,
    ) -> None:
        self.policy, self.number = policy, 0
        self._path, self._why_not, self._say = path, why_not, say
        self._table, self._tell, self._stamp = table, tell, stamp
        self._watch = PolicyFileWatch()

    def tick(self, now: float) -> None:
        """Look, read if need be, and tell whoever is behind."""
        match self._watch.look(self._stamp(self._path), now):
            case "read":
                self._read()
            case "gone":
                self._say(f"{self._path} is gone; policy {self.number} stays")
        if self.number:  # before the first change all have what they were started with
            for worker_id in workers_behind(self._table(), self.number):
                self._tell(worker_id, self.number, self.policy)

    def _read(self) -> None:
        try:
            policy = load_policy(self._path)
            reasons = [f"{self._path}: {reason}" for reason in self._why_not(policy)]
        except ConfigError as error:
            reasons = list(error.problems)
        if reasons:
            mistakes = "\n  ".join(reasons)
            self._say(f"{self._path} was changed and is not used; policy {self.number} stays:\n  {mistakes}")
        elif policy != self.policy:
            self.policy, self.number = policy, self.number + 1
            self._say(f"policy {self.number} is active, from {self._path}")
