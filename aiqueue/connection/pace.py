"""Which of two ways of storing is the faster one on a stream, found out by trying both under load."""

from __future__ import annotations

SPAN_S = 0.025  # over which a rate is taken
PLAIN_S, PLAIN = 0.008, 3.0  # after which a trial ends where the former way was so many times as fast
GAP_S = 0.03  # with nothing under way for so long, it is not the stream that sets the pace
LOOK_EVERY = 16  # answers from one look at the clock to the next
LOADED = 8.0  # publishes under way, on average, below which a rate says nothing of the stream
BETTER = 1.3  # how many times as fast the other way has to be
TRY_FIRST_S, TRY_MAX_S = 0.5, 30.0  # from one trial to the next: doubled where it changed nothing
NEWS = 0.3  # what a span's rate counts for beside those before it
OTHER_LOAD = 3.0  # so many times the load, or as small a part of it, is news: the next trial need not wait so long


class Pace:
    """Whether publishes are to go in `batches` now. `trying` says that this is a trial, which ends by itself when it
    was measured; that takes load. Nothing here waits or has a timer: it goes by what is told.
    """

    def __init__(self) -> None:
        self.batches = False
        self.trying = False
        self._settling = False  # what was sent the former way is not all answered
        self._count = 0
        self._load = 0  # the sum of what was under way at each answer
        self._look_at = 0  # the count
        self._rates = [0.0, 0.0]  # of singles, of batches
        self._tried = (0.0, 0.0)  # the lowest and the highest load under which the way in use was found the better one
        self._tried_at = 0.0
        self._since = self._last = 0.0
        self._every_s = TRY_FIRST_S
        self._try_at = 0.0

    def begin(self, now: float) -> None:
        """Something is under way, and nothing was. A trial begins with it, and not with the answer before it, whose
        callers had to run first.
        """
        if now - self._last > GAP_S or (self.trying and not self._settling and not self._count):
            self._start(now)

    def count(self, answers: int, under_way: int) -> bool:
        """So many answers came at once, to some of what was `under_way` until then. True: it is time to `look`."""
        self._count += answers
        self._load += answers * under_way
        return self._count >= self._look_at or under_way <= answers

    def look(self, now: float, under_way: int) -> None:
        """Take the rate, where the span is over, and choose. `under_way` is what is so still."""
        self._last = now
        if self._settling:
            if self._count >= 0:
                self._start(now)
            return
        elapsed = now - self._since
        if not self._count or (elapsed < SPAN_S and not self._plain(elapsed)):
            self._look_at = self._count + LOOK_EVERY
            return
        rate, load = self._count / elapsed, self._load / self._count
        self._start(now)
        if load >= LOADED:
            self._took(rate, load, now, under_way)

    def rest(self, now: float, for_s: float) -> None:
        """No batches for so long."""
        self._try_at = now + for_s
        self._every_s = TRY_FIRST_S
        self._tried_at = max(self._tried_at, self._try_at - TRY_FIRST_S)
        self._rates[1] = 0.0
        self.batches = self.trying = False
        self._start(now)

    # -- within

    def _start(self, now: float) -> None:
        self._since = self._last = now
        self._settling = False
        self._count = self._load = 0
        self._look_at = LOOK_EVERY

    def _plain(self, elapsed_s: float) -> bool:
        """Whether the trial has shown already that the other way is far better."""
        former = self._rates[not self.batches]
        return self.trying and elapsed_s >= PLAIN_S and self._count / elapsed_s * PLAIN < former

    def _took(self, rate: float, load: float, now: float, under_way: int) -> None:
        way = int(self.batches)
        if self.trying:
            self.trying = False
            self._rates[way] = rate
            low, high = self._tried
            if rate > self._rates[1 - way] * BETTER:
                self._every_s = TRY_FIRST_S
                self._tried = (load, load)
            else:
                plain = rate * PLAIN < self._rates[1 - way]  # it is not soon the better one
                self._every_s = TRY_MAX_S if plain else min(self._every_s * 2, TRY_MAX_S)
                self._tried = (min(low or load, load), max(high, load))
                self._turn(under_way)
            self._try_at = now + self._every_s
            return
        known = self._rates[way]
        self._rates[way] = rate = known + (rate - known) * NEWS if known else rate
        other = self._rates[1 - way]
        low, high = self._tried
        news = rate * BETTER < other or not low / OTHER_LOAD < load < high * OTHER_LOAD
        if now >= (self._tried_at + TRY_FIRST_S if news else self._try_at):
            self.trying = True
            self._tried_at = now
            self._turn(under_way)

    def _turn(self, under_way: int) -> None:
        """Go the other way. What is under way is not counted for it."""
        self.batches = not self.batches
        self._settling, self._count, self._load, self._look_at = True, -under_way, 0, 0
