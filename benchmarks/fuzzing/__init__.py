"""A fuzzer: frames that no sound program sends, made from valid ones, and what readers and a worker do with them."""
