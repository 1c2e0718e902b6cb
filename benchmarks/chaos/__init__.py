"""The chaos harness: real servers and workers, a nemesis that harms them, and a checker of what came of it."""
