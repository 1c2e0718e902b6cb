"""``inbox``: list agents and their mail, send mail, and register agents on a tenant's roster."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DecodeError
from ..units import short_size
from . import output
from .audit import run_audited, run_counted
from .options import Json, ServerOptions, add_command, duration_option, split_names
from .output import Column

if TYPE_CHECKING:
    from ..client import AuditedAct, Client
    from ..errors import AIQueueError
    from ..mailbox import InboxStats, Sent, Unread

app = typer.Typer(no_args_is_help=True, help="List inboxes, read and send agents' mail, register agents.")

Name = Annotated[str, typer.Argument(metavar="AGENT", help="Agent name.")]
Tenant = Annotated[str, typer.Option(metavar="TENANT", help="Tenant of the agent.")]


def ls(
    options: ServerOptions,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only agents of this tenant.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Maximum number to list.", min=1)] = 1_000,
    json: Json = False,
) -> None:
    """List agents, their state and their unread mail.

    States: online (for how long), offline, or "-" (not registered, gets no broadcasts).
    """

    async def fetch(client: Client) -> list[InboxStats]:
        return await client.inboxes.stats(tenant)

    found = options.run_with_client(fetch, reads=True)
    if json:
        output.print_json([_stats_as_dict(each) for each in found[:limit]])
    elif not found:
        output.print_line("no agents" if tenant is None else f"no agents of {tenant}")
    else:
        now = time.time()
        rows = [
            [each.tenant, each.agent, _format_state(each, now), f"{each.unread:,}",
             output.format_age(None if each.oldest_at is None else now - each.oldest_at),
             ", ".join(each.card.kinds) if each.card else ""]
            for each in found[:limit]
        ]  # fmt: skip
        columns = [
            Column("tenant"), Column("agent", style="bold", shrink=True), Column("state"),
            Column("unread", right=True), Column("oldest", right=True), Column("kinds", shrink=True, prose=True),
        ]  # fmt: skip
        output.print_table(columns, rows)
    if len(found) > limit:
        output.print_line(f"{limit:,} of {len(found):,} agents shown: add --tenant or raise --limit", err=True)


def _format_state(each: InboxStats, now: float) -> str:
    if each.online_since is not None:
        return f"online {output.format_age(now - each.online_since)}"
    return "offline" if each.card else "-"


def _stats_as_dict(each: InboxStats) -> dict[str, Any]:
    return {**each._asdict(), "card": each.card.plain() if each.card else None, "online": each.online_since is not None}


def read(
    options: ServerOptions,
    agent: Name,
    *,
    tenant: Tenant,
    limit: Annotated[int, typer.Option(metavar="N", help="Maximum number to show.", min=1)] = 20,
    json: Json = False,
) -> None:
    """Show an agent's unread mail, oldest first.

    The mail stays in the inbox. Mail that the agent is handling now is also shown.
    """
    found, more = options.list_with_client(lambda client: client.inboxes.read(agent, tenant=tenant), limit)
    if json:
        output.print_json([_mail_as_dict(each) for each in found])
    elif not found:
        output.print_line(f"agent {agent} of {tenant} has no unread mail")
    from ..headers import unique_key  # noqa: PLC0415

    width = output.terminal_width()
    edge = width - 18 if width else None
    for each in () if json else found:
        envelope = each.envelope
        head = f"{envelope.kind} from {envelope.sender or '(no sender)'}"
        output.print_line(
            f"{output.apply_style(output.escape_controls(head), 'bold')}  {output.format_ago(envelope.sent_at)}"
        )
        output.print_fields([
            ("id", envelope.mail_id),
            ("unique", unique_key(each.headers)),
            ("conversation", "" if envelope.conversation == envelope.mail_id else envelope.conversation),
            ("in reply to", envelope.correlation or ""),
            ("expires", _format_deadline(envelope.deadline)),
            ("message", output.truncate(output.format_json(_decode_message(each), short=True), edge)),
        ])  # fmt: skip
    if more:
        output.print_line(f"more than {limit:,} unread mails: raise --limit", err=True)


def _format_deadline(deadline: float | None) -> str:
    if deadline is None:
        return ""
    left_s = deadline - time.time()
    return f"in {output.format_age(left_s)}" if left_s > 0 else f"{output.format_ago(deadline)}; returns to its sender"


def _decode_message(each: Unread) -> Any:
    from .. import codec, headers  # noqa: PLC0415
    from ..codec import secret_paths  # noqa: PLC0415

    try:
        data = codec.decode(each.body, each.headers.get(headers.CONTENT_TYPE, ""))
        return secret_paths.mask(data, each.headers.get(headers.SECRET, ""))
    except DecodeError as error:
        return f"({short_size(len(each.body))}, cannot be decoded: {error.reason})"


def _mail_as_dict(each: Unread) -> dict[str, Any]:
    return {
        "seq": each.seq, "stored_at": each.stored_at, **each.envelope._asdict(), "headers": dict(each.headers),
        "message": _decode_message(each),
    }  # fmt: skip


def send(
    options: ServerOptions,
    agent: Annotated[
        str, typer.Argument(metavar="AGENT|-", help="Recipient, or - for all registered agents of the tenant.")
    ],
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Message kind, such as agent.note.")],
    message: Annotated[str, typer.Argument(metavar="JSON", help="Message fields as a JSON object.")] = "{}",
    *,
    tenant: Tenant,
    sender: Annotated[
        str | None, typer.Option(metavar="AGENT", help="Agent that receives replies and bounces.")
    ] = None,
    conversation: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Conversation id; its mails are handled in order. Default: a new one."),
    ] = None,
    expires: Annotated[
        float | None,
        duration_option("Bounce the mail if it is not handled in this time."),
    ] = None,
    unique: Annotated[
        str | None, typer.Option(metavar="ID", help="Mail id; a second mail with this id within 2 minutes is dropped.")
    ] = None,
    json: Json = False,
) -> None:
    """Send a mail to an agent's inbox. The agent need not be running.

    Exit codes: 0 sent, 1 not sent to some or all recipients.
    """
    from ..errors import AIQueueError, BadInput  # noqa: PLC0415
    from ..job import untyped  # noqa: PLC0415

    data = _parse_object(message)
    try:
        model = untyped(kind, "agent.message")
    except ValueError as error:
        raise BadInput(str(error)) from None
    if agent == "-" and unique is not None:
        raise BadInput("--unique cannot be used with a broadcast (AGENT `-`): an id names one mail")

    async def send_mail(client: Client, audited: AuditedAct) -> dict[str, Sent | AIQueueError]:
        mail = model.model_validate(data)
        if agent == "-":
            sent = await client.inboxes.broadcast(
                mail, tenant=tenant, sender=sender, conversation=conversation, expires=expires
            )
        else:
            only = await client.inboxes.send(
                mail, tenant=tenant, to=agent, sender=sender, conversation=conversation, expires=expires, unique=unique
            )
            sent = {agent: only}
        failed = sum(isinstance(each, AIQueueError) for each in sent.values())
        audited.count, audited.details = len(sent) - failed, {"failed": failed}
        return sent

    target = {"agent": agent, "kind": kind, "tenant": tenant, "sender": sender, "conversation": conversation}
    _print_sent(run_audited(options, "inbox.send", {**target, "mail": unique}, send_mail, creates=True), tenant, json)


def _print_sent(outcomes: dict[str, Sent | AIQueueError], tenant: str, json: bool) -> None:
    from ..errors import AIQueueError, details  # noqa: PLC0415

    if json:
        output.print_json(
            [details(each) if isinstance(each, AIQueueError) else each._asdict() for each in outcomes.values()]
        )
    elif not outcomes:
        output.print_line(f"no agents are registered for {tenant}: `aiqueue inbox create AGENT --tenant {tenant}`")
    else:
        for to, each in outcomes.items():
            if isinstance(each, AIQueueError):
                output.print_line(f"{to}: {each}", err=True)
            else:
                duplicate = "  (duplicate, not stored again)" if each.duplicate else ""
                output.print_line(f"{each.mail_id}  to {to}{duplicate}")
    if any(isinstance(each, AIQueueError) for each in outcomes.values()):
        raise typer.Exit(1)


def _parse_object(text: str) -> dict[str, Any]:
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
    options: ServerOptions,
    agent: Name,
    *,
    tenant: Tenant,
    capability: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Capabilities of the agent; repeatable.")
    ] = None,
    description: Annotated[str, typer.Option(metavar="TEXT", help="One-line description of the agent.")] = "",
) -> None:
    """Register an agent on its tenant's roster before its first run.

    From then on it receives broadcasts.
    """

    async def register_agent(client: Client) -> None:
        await client.inboxes.create(
            agent, tenant=tenant, capabilities=split_names(capability) or (), description=description
        )

    run_counted(options, "inbox.create", {"agent": agent, "tenant": tenant}, register_agent, creates=True)
    output.print_line(f"agent {agent} of {tenant} is registered")


def rm(options: ServerOptions, agent: Name, *, tenant: Tenant) -> None:
    """Unregister an agent and delete its unread mail."""

    async def remove_agent(client: Client) -> int:
        return await client.inboxes.remove(agent, tenant=tenant)

    deleted = run_counted(options, "inbox.rm", {"agent": agent, "tenant": tenant}, remove_agent, int)
    mail = output.format_count(deleted, "unread mail")
    output.print_line(f"agent {agent} of {tenant} is unregistered; {mail} deleted")


add_command(app, "ls")(ls)
add_command(app, "read")(read)
add_command(app, "send", examples=('  aiqueue inbox send planner agent.note \'{"text": "hello"}\' --tenant acme',))(
    send
)
add_command(app, "create")(create)
add_command(app, "rm")(rm)
