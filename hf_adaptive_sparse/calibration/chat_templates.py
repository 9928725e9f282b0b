"""Messages in a model's chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from hf_adaptive_sparse.calibration.media import placeholder
from hf_adaptive_sparse.calibration.processors import first_line

Part = dict[str, Any]
"""``{"type": "text", "text": str}`` or ``{"type": medium}``."""

Message = dict[str, Any]
"""``{"role": str, "content": list[Part]}``, as the chat templates of processors take it."""

MARK = "\ue000"
"""Put behind a text to see where it ends: a character for private use, in no text."""


def rendered(processor: Any, messages: Sequence[Message], *, prompt: bool) -> str:
    """Return messages in the chat template of a processor or tokenizer.

    Some templates, most of them of language models, know text only, and others know lists of parts
    of the user alone: they leave a list out, print its description, or fail on it. They get text,
    with placeholders for what is shown. Some know no system: its words go before the first
    question.

    Args:
        processor: Processor or tokenizer, with a chat template.
        messages: What is said: perhaps by the system, then by user and assistant in turns.
        prompt: Whether the assistant speaks next.

    Raises:
        ValueError: If the template takes none of these forms.
    """

    def render(form: list[Message]) -> str:
        return str(
            processor.apply_chat_template(form, add_generation_prompt=prompt, tokenize=False)
        )

    failure: Exception = ValueError()
    for form in _forms(processor, messages):
        try:
            text = render(form)
            if _takes_lists(render, form, text):
                return text
        except (TypeError, TemplateError) as error:
            failure = error
    raise ValueError(
        f"The chat template of {type(processor).__name__} must take messages of user and "
        f"assistant in turns, and one of the user alone; it does not ({first_line(failure)}). Set "
        "processor.chat_template to one that does, or to None to ask without a template."
    ) from failure


def _takes_lists(render: Callable[[list[Message]], str], form: list[Message], text: str) -> bool:
    """Return whether a template that renders messages as a text does so with all of their lists."""
    lists = [message["content"] for message in form if isinstance(message["content"], list)]
    if not lists:
        return True
    if any(repr(parts) in text for parts in lists):
        return False
    marked = _marked(form)
    without = [{**m, "content": _without_media(m["content"])} for m in form]
    return _shows_marks(render(marked), marked) and (without == form or render(without) != text)


def text_part(text: str) -> Part:
    """Return the part of a message that is text."""
    return {"type": "text", "text": text}


def _forms(processor: Any, messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield messages with lists of parts, with such of the user alone, and with none."""
    for told in _with_and_without_system(messages):
        text = [{**message, "content": _as_text(processor, message)} for message in told]
        yield told
        yield [m if m["role"] == "user" else t for m, t in zip(told, text, strict=True)]
        yield text


def _with_and_without_system(messages: Sequence[Message]) -> Iterator[list[Message]]:
    yield list(messages)
    if len(messages) > 1 and messages[0]["role"] == "system":
        system, asked, *others = messages
        shows = [part for part in asked["content"] if not is_text(part)]
        said = _without_media(asked["content"])
        content = [*shows, *system["content"], text_part("\n\n"), *said]
        yield [{**asked, "content": content}, *others]


def _without_media(content: Any) -> Any:
    return [part for part in content if is_text(part)] if isinstance(content, list) else content


def holds_all(processor: Any, messages: Sequence[Message]) -> bool:
    """Return whether every turn of user and assistant is in the text that `rendered` returns."""
    marked = _marked(messages)
    return _shows_marks(rendered(processor, marked, prompt=False), marked)


def _marked(messages: Sequence[Message]) -> list[Message]:
    """Return messages with `MARK` behind each text of user and assistant."""

    def marked(content: Any) -> Any:
        if isinstance(content, str):
            return content + MARK
        return [text_part(part["text"] + MARK) if is_text(part) else part for part in content]

    return [
        {**m, "content": marked(m["content"])} if m["role"] != "system" else m for m in messages
    ]


def _shows_marks(text: str, marked: Sequence[Message]) -> bool:
    """Return whether a text has all marks of messages."""
    contents = [message["content"] for message in marked]
    said = [
        content if isinstance(content, str) else "".join(p["text"] for p in content if is_text(p))
        for content in contents
    ]
    return text.count(MARK) >= "".join(said).count(MARK)


def _as_text(processor: Any, message: Message) -> str:
    return "".join(
        part["text"] if is_text(part) else placeholder(processor, part["type"])
        for part in message["content"]
    )


def is_text(part: Part) -> bool:
    """Return whether a part of a message is text; else it shows something."""
    return bool(part["type"] == "text")
