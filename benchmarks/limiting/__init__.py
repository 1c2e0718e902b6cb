"""Limits by key on the real engine, judged by the log of a stand-in provider. `benchmarks.provider` starts it."""
