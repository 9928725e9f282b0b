"""Conversations in the layouts that datasets have, read as messages of one form.

Read are ``messages`` of ``{"role", "content"}``, whose content is text or a list of parts (trl,
LLaVA-Instruct-Mix, UltraChat), ``conversations`` of ``{"from", "value"}`` (ShareGPT, LLaVA), and
``texts`` of ``{"user", "assistant"}`` (The Cauldron). What they show lies in a column beside them,
or in the parts themselves.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hf_adaptive_sparse.calibration.chat_templates import Message, Part, is_text, text_part
from hf_adaptive_sparse.calibration.media import COLUMN, MEDIA, PLACE, PLURAL, Medium
from hf_adaptive_sparse.calibration.rows import (
    QUESTION,
    SYSTEM,
    Unusable,
    check_unicode,
    resolved,
    usable_rows,
)
from hf_adaptive_sparse.calibration.tables import IMAGE, Row, Table

MESSAGES = "messages"
"""Key of a row: its conversation."""

_ROLES = {
    **{"user": "user", "human": "user", "system": "system"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant"},
}


def conversation_rows(
    table: Table, column: str, medium: Medium | None, columns: Sequence[str]
) -> Iterator[Row]:
    """Start a pass over the rows that have a whole conversation; others are left out.

    A conversation may begin with words of the system; then user and assistant take turns. What the
    assistant says before the first question, and a question without an answer at the end, are left
    out of it. Where nothing in it says when the images are shown, they are with the first question.

    Args:
        table: The table.
        column: Column of the conversation.
        medium: What is talked about; ``None``: text alone is used.
        columns: Columns beside it of what is shown, of which the first that holds something counts.

    Yields:
        Rows as `Records` has them.

    Raises:
        DataError: If none of the first rows has one, or one is no valid Unicode.
    """

    def read(row: Row, place: str) -> Row:
        messages = [_message(*turn, medium) for turn in _turns(row.get(column))]
        values = [part.pop("value") for part in _shown(messages) if "value" in part]
        beside = next((name for name in columns if _holds_something(row.get(name))), None)
        source = column if values or beside is None else beside
        if medium is None and (beside or _shown(messages)):
            raise Unusable(f"shows something in {source!r}")
        if medium is not None:
            if beside is not None and not values:
                listed = medium == IMAGE and isinstance(row[beside], list)
                values = row[beside] if listed else [row[beside]]
            if not values:
                raise Unusable(f"has nothing usable in {[*columns, column][0]!r}")
            _place(messages, medium, len(values))
        messages = _answered(messages)
        check_unicode("".join(map(text_of, messages)), place)
        used = {MESSAGES: messages, COLUMN: source, PLACE: place, QUESTION: _question(messages)}
        if medium is None:
            return used
        return {**used, medium: _of_messages(messages, medium, resolved(values, table.folder))}

    about = "of text alone" if medium is None else f"about {PLURAL[medium]}"
    return usable_rows(table, [column, *columns], read, "conversation", f"a conversation {about}")


def medium_inside(table: Table, column: str, media: Collection[Medium]) -> Medium | None:
    """Return what the parts of a table's first conversation hold, of the media that are taken."""
    for row in itertools.islice(table.scan([column]), 1):
        try:
            messages = [_message(*turn, None) for turn in _turns(row.get(column))]
        except Unusable:
            return None
        kinds = [part["type"] for part in _shown(messages) if "value" in part]
        return next((medium for medium in MEDIA if medium in kinds and medium in media), None)
    return None


def first_exchange(row: Row) -> Row:
    """Return the first question of a conversation and its answer as a question's row.

    A row that is no conversation is returned as it is.
    """
    if MESSAGES not in row:
        return row
    others = dict(kept(row, 1))
    messages = others.pop(MESSAGES)
    system = [text_of(message) for message in messages if message["role"] == "system"]
    return {**others, SYSTEM: "".join(system), "answers": (text_of(messages[-1]),)}


def exchanges(row: Row) -> int:
    """Return how many answered questions a conversation has."""
    return sum(message["role"] == "assistant" for message in row[MESSAGES])


def kept(row: Row, count: int) -> Row:
    """Return a conversation without all behind its first so many answers."""
    ends = [i for i, message in enumerate(row[MESSAGES], 1) if message["role"] == "assistant"]
    messages = row[MESSAGES][: ends[count - 1]]
    images = row.get(IMAGE)
    if images is None:
        return {**row, MESSAGES: messages}
    return {**row, MESSAGES: messages, IMAGE: images[: places_of(messages)]}


def text_of(message: Message) -> str:
    """Return the words of a message."""
    return "".join(part["text"] for part in message["content"] if is_text(part))


def places_of(messages: Sequence[Message]) -> int:
    """Return how many images, videos or sounds messages show."""
    return len(_shown(messages))


def _question(messages: Sequence[Message]) -> str:
    return next(text_of(message) for message in messages if message["role"] == "user")


def _holds_something(value: Any) -> bool:
    return value is not None and not (isinstance(value, list) and not value)


def _shown(messages: Sequence[Message]) -> list[Part]:
    """Return the parts of messages that show something."""
    return [part for m in messages for part in m["content"] if not is_text(part)]


def _of_messages(messages: Sequence[Message], medium: Medium, values: list[Any]) -> Any:
    """Return what messages show: all their images, or their one video or sound."""
    return values[: places_of(messages)] if medium == IMAGE else values[0]


# Layouts


def _turns(cell: Any) -> Iterator[tuple[Any, Any]]:
    """Yield who says what.

    Raises:
        Unusable: If it is no conversation.
    """
    for turn in _dicts(cell):
        if "user" in turn and "assistant" in turn:
            yield "user", turn["user"]
            yield "assistant", turn["assistant"]
        else:
            said = turn.get("content")
            role = turn.get("role")
            yield (
                turn.get("from") if role is None else role,
                turn.get("value") if said is None else said,
            )


def _dicts(cell: Any) -> list[Mapping[str, Any]]:
    """Return a cell's list of dicts, of which `datasets` may have made a dict of lists."""
    if isinstance(cell, Mapping) and all(isinstance(column, list) for column in cell.values()):
        cell = [dict(zip(cell, row, strict=True)) for row in zip(*cell.values(), strict=False)]
    if not isinstance(cell, Sequence) or not all(isinstance(item, Mapping) for item in cell):
        raise Unusable("has no list of turns")
    return list(cell)


def _message(role: Any, content: Any, medium: Medium | None) -> Message:
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise Unusable(f"has a turn of the role {role!r}")
    if isinstance(content, str):
        parts = _parts_of_text(content, medium)
    else:
        parts = [] if content is None else [_part(item) for item in _dicts(content)]
    for part in parts:
        kind = part["type"]
        if kind not in ("text", *((medium,) if medium else MEDIA)):
            raise Unusable(f"has a part of the type {kind!r}")
        if kind != "text" and known != "user":
            raise Unusable(f"shows something where the {known} speaks")
    return {"role": known, "content": [p for p in parts if p.get("text") != ""]}


def _parts_of_text(text: str, medium: Medium | None) -> list[Part]:
    """Return text and what is shown amid it, by ``<image>`` and its like."""
    pieces = [text] if medium is None else re.split(f"(<{medium}>)", text)
    return [
        {"type": medium} if piece == f"<{medium}>" else text_part(piece.strip()) for piece in pieces
    ]


def _part(item: Mapping[str, Any]) -> Part:
    kind = str(item.get("type"))
    if kind == "text":
        return text_part(str(item.get("text") or "").strip())
    values = [item[name] for name in (kind, "url", "path") if item.get(name) is not None]
    return {"type": kind, "value": values[0]} if values else {"type": kind}


# Rules


def _place(messages: list[Message], medium: Medium, count: int) -> None:
    """Let messages show so many images, videos or sounds: with the first question, if none does.

    Raises:
        Unusable: If they show another number, or nothing with the first question.
    """
    places = places_of(messages)
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        raise Unusable("has no answered question")
    if not places:
        first["content"] = [{"type": medium} for _ in range(count)] + first["content"]
    elif places != count or (medium != IMAGE and count > 1):
        raise Unusable(f"has {places} places for {count} {PLURAL[medium]}")
    if not _shown([first]):
        raise Unusable("shows nothing with its first question")


def _answered(messages: list[Message]) -> list[Message]:
    """Return the words of the system, if any, and answered questions.

    Raises:
        Unusable: If there is none, or something else.
    """
    system = [m for m in messages[:1] if m["role"] == "system" and m["content"]]
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    turns = list(itertools.dropwhile(lambda turn: turn["role"] == "assistant", turns))
    turns = turns[: len(turns) - len(turns) % 2]
    if not turns:
        raise Unusable("has no answered question")
    for turn, role in zip(turns, itertools.cycle(("user", "assistant")), strict=False):
        if turn["role"] != role:
            raise Unusable("has turns of user and assistant that do not alternate")
        if not turn["content"]:
            raise Unusable(f"has an empty turn of the {role}")
    return system + turns
