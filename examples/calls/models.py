"""What the transcriber calls."""


class TooLong(Exception):
    """The model does not take it: asking again is of no use."""


class Models:
    """A model for speech and one for texts; `busy` says how often they are."""

    def __init__(self) -> None:
        self.busy = 0
        self.told: list[str] = []

    async def hear(self, piece: str) -> str:
        if self.busy:
            self.busy -= 1
            raise ConnectionError("busy")
        return piece.upper()

    async def shorten(self, text: str) -> str:
        if len(text) > 100:
            raise TooLong
        return text[:5]
