"""Messages in a model's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from hf_adaptive_sparse.calibration.media import placeholder
from hf_adaptive_sparse.calibration.processors import first_line

Part = dict[str, Any]
"""``{"type": "text", "text": str}`` or ``{"type": medium}``."""

Message = dict[str, Any]
"""``{"role": str, "content": list[Part]}``, as the chat templates of processors take it."""


def rendered(processor: Any, messages: Sequence[Message], *, prompt: bool) -> str:
    """Return messages in the chat template of a processor or tokenizer.

    Some templates, most of them of language models, know text only: they leave a list of parts out,
    print its description, or fail on it. They get text, with placeholders for what is shown. Some
    know no system: its words go before the first question.

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
    for told in _with_and_without_system(messages):
        try:
            text = render(told)
            bare = [{**m, "content": [p for p in m["content"] if is_text(p)]} for m in told]
            described = any(repr(message["content"]) in text for message in told)
            shown = bare == told or text != render(bare)
            if shown and not described and holds_questions(text, told):
                return text
        except (TypeError, TemplateError) as error:
            failure = error
        try:
            return render([{**m, "content": _as_text(processor, m)} for m in told])
        except (TypeError, TemplateError) as error:
            failure = error
    raise ValueError(
        f"The chat template of {type(processor).__name__} must take messages of user and "
        f"assistant in turns, and one of the user alone; it does not ({first_line(failure)}). Set "
        "processor.chat_template to one that does, or to None to ask without a template."
    ) from failure


def text_part(text: str) -> Part:
    """Return the part of a message that is text."""
    return {"type": "text", "text": text}


def _with_and_without_system(messages: Sequence[Message]) -> Iterator[list[Message]]:
    yield list(messages)
    if len(messages) > 1 and messages[0]["role"] == "system":
        system, asked, *others = messages
        shows = [part for part in asked["content"] if not is_text(part)]
        said = [part for part in asked["content"] if is_text(part)]
        content = [*shows, *system["content"], text_part("\n\n"), *said]
        yield [{**asked, "content": content}, *others]


def holds_questions(text: str, messages: Sequence[Message]) -> bool:
    """Return whether a text holds all that users say."""
    asked = [part for m in messages if m["role"] == "user" for part in m["content"]]
    return all(part["text"].strip() in text for part in asked if is_text(part))


def _as_text(processor: Any, message: Message) -> str:
    return "".join(
        part["text"] if is_text(part) else placeholder(processor, part["type"])
        for part in message["content"]
    )


def is_text(part: Part) -> bool:
    """Return whether a part of a message is text; else it shows something."""
    return bool(part["type"] == "text")
