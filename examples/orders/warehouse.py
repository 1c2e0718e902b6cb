"""What the order service talks to."""


class CardRefused(Exception):
    """The bank says no: asking again is of no use."""


class Down(Exception):
    """Nobody answers."""


class Bank:
    """Charges by their key: a charge with a known key is made once."""

    def __init__(self) -> None:
        self.charges: dict[str, int] = {}
        self.refunded: list[str] = []
        self.outages = 0

    async def charge(self, key: str, cents: int) -> str:
        if self.outages:
            self.outages -= 1
            raise Down
        if cents > 100_000:
            raise CardRefused
        self.charges[key] = cents
        return f"receipt-{key}"

    async def refund(self, receipt: str) -> None:
        self.refunded.append(receipt)


class Store:
    """How many there are of each article."""

    def __init__(self) -> None:
        self.stock: dict[str, int] = {}

    async def ship(self, article: str) -> str:
        if not self.stock.get(article):
            raise LookupError(article)
        self.stock[article] -= 1
        return f"parcel of {article}"
