"""What the service talks to."""

from pydantic import BaseModel


class Invoice(BaseModel):
    order: str
    amount: float


class Down(Exception):
    """The books do not answer."""


class Books:
    """Amounts by order, and how often they do not answer yet."""

    def __init__(self) -> None:
        self.orders: dict[str, float] = {}
        self.outages = 0

    async def amount(self, order: str) -> float:
        if self.outages:
            self.outages -= 1
            raise Down
        return self.orders[order]
