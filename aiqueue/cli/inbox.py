"""``inbox``: the mail of agents, looked at without taking any, sent, and who is on the roster."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DecodeError
from ..units import short_size
from . import output
from .options import Json, Where, duration, names, verb
from .output import Column

if TYPE_CHECKING:
    from ..client import Client
    from ..mailbox import InboxStats, Sent, Unread

app = typer.Typer(no_args_is_help=True, help="Agents' mail: list, read, send; put agents on the roster.")

Name = Annotated[str, typer.Argument(metavar="AGENT", help="The agent's id.")]
Tenant = Annotated[str, typer.Option(help="Whose agent it is.")]


def ls(
    where: Where,
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    limit: Annotated[int, typer.Option(help="How many to show.", min=1)] = 1_000,
    json: Json = False,
) -> None:
    """List agents: whether they are online, and their unread mail. `-` is not registered: it gets no broadcasts."""

    async def look(client: Client) -> list[InboxStats]:
        return await client.inboxes.stats(tenant)

    found = where.drive(look)
    if json:
        output.say_json([_plain_stats(each) for each in found[:limit]])
    elif not found:
        output.say("no agents" if tenant is None else f"no agents of {tenant}")
    else:
        now = time.time()
        rows = [
            [each.tenant, each.agent, _state(each, now), f"{each.unread:,}",
             output.age(None if each.oldest_at is None else now - each.oldest_at),
             ", ".join(each.card.kinds) if each.card else ""]
            for each in found[:limit]
        ]  # fmt: skip
        columns = [
            Column("tenant"), Column("agent", style="bold", shrink=True), Column("state"),
            Column("unread", right=True), Column("oldest", right=True), Column("kinds", shrink=True, prose=True),
        ]  # fmt: skip
        output.table(columns, rows)
    if len(found) > limit:
        output.say(f"there are {len(found):,}: name a tenant, or raise --limit", err=True)


def _state(each: InboxStats, now: float) -> str:
    if each.online_since is not None:
        return f"online {output.age(now - each.online_since)}"
    return "offline" if each.card else "-"


def _plain_stats(each: InboxStats) -> dict[str, Any]:
    return {**each._asdict(), "card": each.card.plain() if each.card else None, "online": each.online_since is not None}


def read(
    where: Where,
    agent: Name,
    *,
    tenant: Tenant,
    limit: Annotated[int, typer.Option(help="How many to show.", min=1)] = 20,
    json: Json = False,
) -> None:
    """Show an agent's unread mail, the oldest first. Nothing is taken; what it is handling now is among it."""

    async def look(client: Client) -> list[Unread]:
        found = []
        async for each in client.inboxes.read(agent, tenant=tenant):
            found.append(each)
            if len(found) > limit:
                break
        return found

    found = where.drive(look)
    more, found = len(found) > limit, found[:limit]
    if json:
        output.say_json([_plain(each) for each in found])
    elif not found:
        output.say(f"agent {agent} of {tenant} has no unread mail")
    width = output.width()
    edge = width - 18 if width else None
    for each in () if json else found:
        told = each.envelope
        head = f"{told.kind} from {told.sender or 'nobody named'}"
        output.say(f"{output.styled(output.clean(head), 'bold')}  {output.ago(told.sent_at)}")
        output.fields([
            ("id", told.mail_id),
            ("conversation", "" if told.conversation == told.mail_id else told.conversation),
            ("answers", told.correlation or ""),
            ("expires", _when(told.deadline)),
            ("message", output.cut(output.pretty(_message(each), short=True), edge)),
        ])  # fmt: skip
    if more:
        output.say(f"there are more than {limit:,}: raise --limit", err=True)


def _when(deadline: float | None) -> str:
    if deadline is None:
        return ""
    left = deadline - time.time()
    return f"in {output.age(left)}" if left > 0 else f"{output.ago(deadline)}: it goes back to its sender"


def _message(each: Unread) -> Any:
    from .. import codec, headers  # noqa: PLC0415

    try:
        return codec.decode(each.body, each.headers.get(headers.CONTENT_TYPE, ""))
    except DecodeError as error:
        return f"({short_size(len(each.body))} that cannot be read: {error.reason})"


def _plain(each: Unread) -> dict[str, Any]:
    return {
        "seq": each.seq, "stored_at": each.stored_at, **each.envelope._asdict(), "headers": dict(each.headers),
        "message": _message(each),
    }  # fmt: skip


def send(
    where: Where,
    agent: Annotated[str, typer.Argument(metavar="AGENT|-", help="To whom; - is all of the tenant's roster.")],
    kind: Annotated[str, typer.Argument(metavar="KIND", help="The message's kind.")],
    message: Annotated[str, typer.Argument(metavar="JSON", help="The message: a JSON object.")] = "{}",
    *,
    tenant: Tenant,
    sender: Annotated[str | None, typer.Option(help="The agent that gets the reply, or the bounce.")] = None,
    conversation: Annotated[
        str | None, typer.Option(help="Which mails are handled in order. Default: a new one.")
    ] = None,
    expires: Annotated[
        float | None, typer.Option(parser=duration, metavar="DURATION", help="Then it goes back to its sender.")
    ] = None,
    unique: Annotated[str | None, typer.Option(help="The mail's id: one is stored within two minutes.")] = None,
    json: Json = False,
) -> None:
    """Put a mail in an agent's inbox, whether that runs or not."""
    from ..errors import AIQueueError, BadInput, details  # noqa: PLC0415
    from ..job import untyped  # noqa: PLC0415

    data = _object(message)
    try:
        model = untyped(kind, "agent.message")
    except ValueError as error:
        raise BadInput(str(error)) from None
    if agent == "-" and unique is not None:
        raise BadInput("--unique is for a mail to one agent")

    async def work(client: Client) -> dict[str, Sent | AIQueueError]:
        mail = model.model_validate(data)
        if agent == "-":
            return await client.inboxes.broadcast(
                mail, tenant=tenant, sender=sender, conversation=conversation, expires=expires
            )
        return {
            agent: await client.inboxes.send(
                mail, tenant=tenant, to=agent, sender=sender, conversation=conversation, expires=expires, unique=unique
            )
        }

    outcomes = where.drive(work)
    if json:
        output.say_json(
            [details(each) if isinstance(each, AIQueueError) else each._asdict() for each in outcomes.values()]
        )
    elif not outcomes:
        output.say(f"nobody is on the roster of {tenant}: `aiqueue inbox create AGENT --tenant {tenant}`")
    else:
        for to, each in outcomes.items():
            if isinstance(each, AIQueueError):
                output.say(f"{to}: {each}", err=True)
            else:
                again = "  (sent before)" if each.duplicate else ""
                output.say(f"{each.mail_id}  to {to}{again}")
    if any(isinstance(each, AIQueueError) for each in outcomes.values()):
        raise typer.Exit(1)


def _object(text: str) -> dict[str, Any]:
    import json  # noqa: PLC0415

    from ..errors import BadInput  # noqa: PLC0415

    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the message is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadInput('the message must be a JSON object, such as \'{"text": "hello"}\'')
    return data


def create(
    where: Where,
    agent: Name,
    *,
    tenant: Tenant,
    capability: Annotated[list[str] | None, typer.Option(help="What it can do; commas or repeated.")] = None,
    description: Annotated[str, typer.Option(help="A line for people.")] = "",
) -> None:
    """Put an agent on its tenant's roster, before it first runs: it gets broadcasts from now on."""

    async def work(client: Client) -> None:
        await client.inboxes.create(agent, tenant=tenant, capabilities=names(capability) or (), description=description)

    where.drive(work)
    output.say(f"agent {agent} of {tenant} is on the roster")


def rm(where: Where, agent: Name, *, tenant: Tenant) -> None:
    """Take an agent off the roster and delete its unread mail."""

    async def work(client: Client) -> int:
        return await client.inboxes.remove(agent, tenant=tenant)

    gone = where.drive(work)
    output.say(f"agent {agent} of {tenant} is off the roster; {output.count(gone, 'unread mail')} deleted")


for each in (ls, read, send, create, rm):
    verb(app, each.__name__)(each)
