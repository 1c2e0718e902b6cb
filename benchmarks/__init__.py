"""Speed as ratios: aiqueue beside raw nats-py, interleaved in one run. Start with ``make bench``."""
