"""Which of two ways to publish is faster on a stream, singles or atomic batches: measured by trying both under load."""

from __future__ import annotations

SPAN_S = 0.025  # a rate is measured over this long
CLEARLY_WORSE_S, CLEARLY_WORSE = 0.008, 3.0  # a trial ends after this long if the former way was this factor faster
IDLE_GAP_S = 0.03  # after this long with nothing in flight, the callers set the rate and not the stream
MEASURE_EVERY = 16  # replies between two reads of the clock
LOAD_MIN = 8.0  # publishes in flight, on average, below which a rate says nothing about the stream
BETTER = 1.3  # the other way is taken if its rate is this factor higher
TRIAL_FIRST_S, TRIAL_MAX_S = 0.5, 30.0  # between two trials; doubled after each trial that changed nothing
RATE_WEIGHT = 0.3  # of the newest span in the running average of the rate
LOAD_CHANGE = 3.0  # a load this factor higher or lower than those tried is a reason for an early trial


class Pace:
    """Decides whether a stream's publishes go in `batches` now.

    `trying` says that a trial of the other way is under way. A trial ends once it was measured, which takes load. The
    class neither waits nor has a timer: it decides from the counts that its owner reports.
    """

    def __init__(self) -> None:
        self.batches = False
        self.trying = False
        self._settling = False  # some publishes that were sent the former way are still in flight
        self._count = 0
        self._load = 0  # the sum, over all counted replies, of the publishes then in flight
        self._measure_at = 0  # the count at which the clock is read next
        self._rates = [0.0, 0.0]  # replies per second: of singles, of batches
        self._tried_loads = (0.0, 0.0)  # lowest and highest load at which a trial confirmed the way in use
        self._tried_at = 0.0
        self._since = self._last = 0.0
        self._trial_every_s = TRIAL_FIRST_S
        self._trial_at = 0.0

    def start_load(self, now: float) -> None:
        """Report that something is in flight again after nothing was.

        A trial is measured from here, and not from the reply before it: in between, the callers had to run first.
        """
        if now - self._last > IDLE_GAP_S or (self.trying and not self._settling and not self._count):
            self._start_span(now)

    def count_replies(self, replies: int, in_flight: int) -> bool:
        """Report that `replies` came at once, out of `in_flight`. Returns True when it is time to call `measure`."""
        self._count += replies
        self._load += replies * in_flight
        return self._count >= self._measure_at or in_flight <= replies

    def measure(self, now: float, in_flight: int) -> None:
        """Take the rate if the span is over, and choose the way. `in_flight` counts what is still in flight."""
        self._last = now
        if self._settling:
            if self._count >= 0:
                self._start_span(now)
            return
        elapsed = now - self._since
        if not self._count or (elapsed < SPAN_S and not self._is_clearly_worse(elapsed)):
            self._measure_at = self._count + MEASURE_EVERY
            return
        rate, load = self._count / elapsed, self._load / self._count
        self._start_span(now)
        if load >= LOAD_MIN:
            self._use_rate(rate, load, now, in_flight)

    def pause_batches(self, now: float, pause_s: float) -> None:
        """Use singles, and try no batches for `pause_s` seconds."""
        self._trial_at = now + pause_s
        self._trial_every_s = TRIAL_FIRST_S
        self._tried_at = max(self._tried_at, self._trial_at - TRIAL_FIRST_S)
        self._rates[1] = 0.0
        self.batches = self.trying = False
        self._start_span(now)

    # -- private

    def _start_span(self, now: float) -> None:
        self._since = self._last = now
        self._settling = False
        self._count = self._load = 0
        self._measure_at = MEASURE_EVERY

    def _is_clearly_worse(self, elapsed_s: float) -> bool:
        """Whether the trial has already shown that the former way is far better."""
        former = self._rates[not self.batches]
        return self.trying and elapsed_s >= CLEARLY_WORSE_S and self._count / elapsed_s * CLEARLY_WORSE < former

    def _use_rate(self, rate: float, load: float, now: float, in_flight: int) -> None:
        """Take in one span's rate: end the trial, or start one if it is time."""
        way = int(self.batches)
        if self.trying:
            self.trying = False
            self._rates[way] = rate
            low, high = self._tried_loads
            if rate > self._rates[1 - way] * BETTER:
                self._trial_every_s = TRIAL_FIRST_S
                self._tried_loads = (load, load)
            else:
                clearly_worse = rate * CLEARLY_WORSE < self._rates[1 - way]  # so it will not be better soon
                self._trial_every_s = TRIAL_MAX_S if clearly_worse else min(self._trial_every_s * 2, TRIAL_MAX_S)
                self._tried_loads = (min(low or load, load), max(high, load))
                self._switch_way(in_flight)
            self._trial_at = now + self._trial_every_s
            return
        known = self._rates[way]
        self._rates[way] = rate = known + (rate - known) * RATE_WEIGHT if known else rate
        other = self._rates[1 - way]
        low, high = self._tried_loads
        changed = rate * BETTER < other or not low / LOAD_CHANGE < load < high * LOAD_CHANGE
        if now >= (self._tried_at + TRIAL_FIRST_S if changed else self._trial_at):
            self.trying = True
            self._tried_at = now
            self._switch_way(in_flight)

    def _switch_way(self, in_flight: int) -> None:
        """Use the other way from now on. Publishes in flight went the former way, so their replies are not counted."""
        self.batches = not self.batches
        self._settling, self._count, self._load, self._measure_at = True, -in_flight, 0, 0
