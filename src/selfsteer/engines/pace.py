"""How many requests a server gets at once: few at first, more while it answers faster with more."""

import math
from statistics import fmean
from typing import NamedTuple

#: Requests under way at once in the first round.
FIRST = 16

#: Of the growth in requests, the share that must come back as a growth in answers per second.
#: Doubling them on a server that batches gains nearly all of it, on one that queues nothing.
GAIN = 0.25

#: Rounds after which a server that had enough, or refused, gets more again.
HOLD = 16

#: How servers say that they have too much to do.
BUSY = frozenset({"http_429", "http_503", "http_529", "timeout"})


class Sent(NamedTuple):
    """A request: the round that it was sent in, and whether the server was then full."""

    round: int
    full: bool


class Pace:
    """A limit of requests under way: grows while that helps, shrinks when the server refuses.

    A round is as many answers as the limit, all to requests that were sent when the server was
    full to this limit. Then answers per second are the limit over the mean seconds of an answer
    (Little's law). They are compared with those of the last lower limit.

    Args:
        most: never more than that; a server may want fewer from the start.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit = most, min(FIRST, most)
        #: Why the limit is what it is, for people; empty while that is being found out.
        self.why = ""
        self._round, self._seconds = 0, list[float]()
        self._lower: tuple[int, float] | None = None  # a lower limit and its answers per second
        self._refused_at = math.inf
        self._held = 0  # rounds left in which nothing else is tried

    def sent(self, under_way: int) -> Sent:
        """What is to be remembered of a request until it is answered or refused.

        Args:
            under_way: requests, this one included.
        """
        return Sent(self._round, under_way >= self.limit)

    def answered(self, sent: Sent, seconds: float) -> None:
        """Counts an answer that took so many seconds."""
        if sent != (self._round, True):
            return
        self._seconds.append(seconds)
        if len(self._seconds) < self.limit:
            return
        rate = self.limit / max(fmean(self._seconds), 1e-9)
        self._seconds.clear()
        if self._lower and not self._helped(*self._lower, rate):
            self.why, self._held = "more at once were not answered faster", HOLD
            self._set(self._lower[0], None)
        elif self._held:
            self._held -= 1
        elif self.limit == self.most:
            self.why = "as many as `concurrency` allows"
        else:
            double = 2 * self.limit
            more = double if double < self._refused_at else self.limit + max(1, self.limit // 4)
            if more >= self._refused_at:  # as near as it gets; it may take more later
                self._refused_at, self._held = math.inf, HOLD
            else:
                self._set(min(more, self.most), (self.limit, rate))

    def _helped(self, lower: int, before: float, rate: float) -> bool:
        return rate / before - 1 >= GAIN * (self.limit / lower - 1)

    def refused(self, sent: Sent) -> None:
        """Halves the limit; once for all requests that were sent under it."""
        if sent.round == self._round:
            self.why, self._refused_at, self._held = "the server refused more", self.limit, 0
            self._set(max(1, self.limit // 2), None)

    def _set(self, limit: int, lower: tuple[int, float] | None) -> None:
        self.limit, self._lower, self._round = limit, lower, self._round + 1
        self._seconds.clear()
