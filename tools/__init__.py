"""Programs for the work on aiqueue itself. They are no part of the wheel."""
