"""One script a peer, run by that peer's own Python; see verbs."""
