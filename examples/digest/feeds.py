"""What the service talks to."""


class Busy(Exception):
    """The feed asks for patience."""


class Feeds:
    """Titles by feed, and who reads which feeds."""

    def __init__(self) -> None:
        self.readers: dict[str, list[str]] = {}
        self.pages: dict[str, list[str] | str] = {}

    async def titles(self, url: str) -> list[str]:
        page = self.pages[url]
        if isinstance(page, str):
            raise Busy(page)
        return page


class Mailbox:
    """Whom it has sent what."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []

    async def send(self, reader: str, text: str) -> None:
        self.sent.append((reader, text))
