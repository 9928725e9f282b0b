r"""Questions in the form a model reads: an image, a video or a sound in a prompt, then the answer.

The prompt comes from the processor's chat template where it has one, and else is
``<bos><image>\nQ: {question} A:``, with ``<video>`` or ``<audio>`` for ``<image>``, or whatever the
processor calls them. Behind it come a blank (unless the prompt ends in white space
already), the answer, and an end of sequence. Prompts are the same in calibration, in perplexity
and when answers are generated.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_adaptive_sparse.architecture import UNLIMITED_CONTEXT
from hf_adaptive_sparse.calibration.chat_templates import rendered, text_part
from hf_adaptive_sparse.calibration.media import (
    MEDIA,
    PLACE,
    Media,
    Medium,
    medium_of,
    needed_placeholder,
    placeholder,
    processed,
    shown,
    takes_suffix,
)
from hf_adaptive_sparse.calibration.records import QUESTION, DataError, Row
from hf_adaptive_sparse.calibration.rows import SYSTEM

IGNORED = -100
"""Label of a token that is not scored."""

MOST_ADDED = 3
"""Tokens that may follow an answer: our end of sequence, and what a tokenizer adds by itself."""

PLAIN_PROMPT = "\nQ: {question} A:"
"""What follows the image where a processor has no chat template."""


def format_question(
    processor: Any,
    question: str,
    prompt: str | None = None,
    *,
    medium: Medium | None = "image",
    count: int = 1,
    system: str = "",
) -> str:
    """Return the prompt that asks a question, about an image, a video, a sound, or nothing.

    Args:
        processor: The model's processor.
        question: The question.
        prompt: Text around the question, with ``{question}`` where it goes: the user's message
            under a chat template (default ``"{question}"``), else all that follows the
            placeholder of the image (default `PLAIN_PROMPT`).
        medium: What comes with the question; ``None``: nothing.
        count: How many of these do.
        system: What the system says before the question, if anything.

    Raises:
        ValueError: If ``prompt`` lacks ``{question}``, or the chat template takes no question.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    chat = getattr(processor, "chat_template", None)
    template = prompt if prompt is not None else "{question}" if chat else PLAIN_PROMPT
    if "{question}" not in template:
        raise ValueError(f"prompt must contain {{question}}, got {prompt!r}.")
    text = template.replace("{question}", without_placeholders(processor, question))
    if chat:
        said = [{"role": "system", "content": [text_part(system)]}] if system else []
        shows = [] if medium is None else [{"type": str(medium)}] * count
        asked = {"role": "user", "content": [*shows, text_part(text)]}
        return rendered(processor, [*said, asked], prompt=True)
    bos = tokenizer.bos_token
    added = _adds_bos(tokenizer) or takes_suffix(processor)
    start = "" if bos is None or added else bos
    before = f"\n{system}" if system else ""
    return f"{start}{needed_placeholder(processor, medium) * count}{before}{text}"


def row_prompt(processor: Any, row: Row, prompt: str | None = None) -> str:
    """Return the prompt that asks the question of a row about what it shows.

    Args:
        processor: The model's processor.
        row: A row with ``question``, and with images, a video or a sound, or none of them.
        prompt: See `format_question`.
    """
    medium = medium_of(row)
    return format_question(
        processor,
        row[QUESTION],
        prompt,
        medium=medium,
        count=shown(row),
        system=without_placeholders(processor, row.get(SYSTEM, "")),
    )


def without_placeholders(processor: Any, text: str) -> str:
    """Return a text that asks for no image, video or sound: each placeholder would ask for one."""
    for medium in MEDIA:
        text = text.replace(placeholder(processor, medium), "")
    return text.strip()


def format_answer(processor: Any, prompt: str, answer: str) -> str:
    """Return the answer as it follows ``prompt``: after a blank, if the prompt ends in none."""
    ends_in_space = prompt[-1:].isspace() or takes_suffix(processor)
    return f"{'' if ends_in_space else ' '}{answer.strip()}"


def encode_questions(
    processor: Any,
    prompts: Sequence[str],
    media: Media | None,
    padding_side: str,
    answers: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Run the processor over prompts, each with images, a video or a sound, or all with none.

    Args:
        processor: The model's processor.
        prompts: See `format_question`.
        media: What comes with the prompts, one for each; ``None``: nothing.
        padding_side: ``"left"`` to generate, ``"right"`` to score.
        answers: What follows each prompt (see `format_answer`), before an end of sequence;
            ``None``: nothing does.

    Returns:
        All tensors of the processor's output: ``input_ids`` and ``attention_mask`` (batch, seq)
        int64, ``pixel_values`` and so on.

    Raises:
        DataError: If something cannot be opened.
        ValueError: If the processor needs a package that is not installed.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    # A prompt that begins with bos is complete; the tokenizer would put a second one before it.
    complete = bool(tokenizer.bos_token) and prompts[0].startswith(tokenizer.bos_token)
    of_text = {
        "add_special_tokens": not complete,
        "padding": True,
        "padding_side": padding_side,  # some processors have a side of their own by default
        "truncation": False,
    }
    arguments = {} if media is None else media.arguments(processor)
    texts = prompts
    if answers is not None and takes_suffix(processor):
        arguments["suffix"] = list(answers)  # the processor ends them itself
    elif answers is not None:
        eos = tokenizer.eos_token or ""
        texts = [text + answer + eos for text, answer in zip(prompts, answers, strict=True)]
    # Sounds are padded and cut as their own extractor does by default.
    heard = media is not None and media.medium == "audio"
    arguments.update({"text_kwargs": of_text} if heard else of_text)
    with padding(tokenizer, padding_side):
        output = processed(processor, texts, arguments)
    return {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}


def question_batch(
    processor: Any,
    rows: Sequence[Row],
    prompt: str | None = None,
    *,
    context: int = UNLIMITED_CONTEXT,
) -> dict[str, torch.Tensor]:
    """Make a batch of answered questions, padded on the right.

    Args:
        processor: The model's processor.
        rows: Questions about images, videos or sounds. Of several answers the most frequent is
            used, of equally frequent ones the first.
        prompt: See `format_question`.
        context: Most tokens that the model takes.

    Returns:
        The processor's output and ``labels`` (batch, seq) int64: -100 but on the tokens of the
        answer. The end of sequence is read but not scored: models that were never taught to end
        an answer exist, and its loss would drown theirs.

    Raises:
        DataError: If an answer leaves no token to score, a question with its answer is longer than
            the context, or something cannot be opened.
    """
    prompts = [row_prompt(processor, row, prompt) for row in rows]
    said = [without_placeholders(processor, most_frequent(row["answers"])) for row in rows]
    answers = [
        format_answer(processor, prompt, text) for prompt, text in zip(prompts, said, strict=True)
    ]
    batch = encode_questions(processor, prompts, Media.of(rows), "right", answers)
    tokenizer = getattr(processor, "tokenizer", processor)
    eos = tokenizer.eos_token
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for index, text in enumerate(prompts):
        # The blank before an empty answer is a token, too.
        answer = answer_ids(processor, text, answers[index]) if said[index] else []
        if not answer:
            raise DataError(
                f"An answer must have a token to score; that to {_named(rows[index])} has none."
            )
        read = batch["input_ids"][index, : int(batch["attention_mask"][index].sum())]
        check_fits(rows[index], len(read), context)
        end = _answer_end(read.tolist(), answer, len(read) - bool(eos))
        labels[index, end - len(answer) : end] = read[end - len(answer) : end]
    return {**batch, "labels": labels}


def check_fits(row: Row, tokens: int, context: int, max_new_tokens: int = 0) -> None:
    """Refuse a question that, with its answer, is longer than the model's context.

    Args:
        row: The question.
        tokens: Tokens that are read: of both, unless the answer is generated.
        context: Most tokens that the model takes.
        max_new_tokens: Tokens of a generated answer at most.

    Raises:
        DataError: If it is longer; it is named.
    """
    if tokens + max_new_tokens > context:
        new = f" and max_new_tokens={max_new_tokens}" if max_new_tokens else ""
        raise DataError(
            f"A question with its answer must fit into the model's context of {context} tokens; "
            f"{_named(row)} takes {tokens}{new}. Shorten it, or leave it out."
        )


def _named(row: Row) -> str:
    """Return the beginning of a row's question and where it was read, for messages."""
    place = f" ({row[PLACE]})" if PLACE in row else ""
    return f"{textwrap.shorten(row[QUESTION], 60)!r}{place}"


def _answer_end(ids: Sequence[int], answer: Sequence[int], expected: int) -> int:
    """Return where an answer ends: some tokenizers add an end of sequence of their own.

    Args:
        ids: Tokens that are read, without padding.
        answer: Tokens of the answer.
        expected: Where it ends if a processor has made other tokens of it.
    """
    for end in range(len(ids), len(ids) - MOST_ADDED - 1, -1):
        if list(ids[end - len(answer) : end]) == list(answer):
            return end
    return expected


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent answer; of equally frequent ones the first."""
    return max(dict.fromkeys(answers), key=list(answers).count)


def answer_ids(processor: Any, prompt: str, answer: str) -> list[int]:
    """Return the tokens of an answer.

    Those of prompt and answer behind those of the prompt: tokenising the answer alone can give
    others (SentencePiece marks the start of every text), which is right only where the processor
    does it, too. Image tokens, which only the processor expands, are all in the shared part.

    Args:
        processor: Processor or tokenizer.
        prompt: The prompt.
        answer: The answer, as `format_answer` returns it.
    """
    if takes_suffix(processor):
        prompt = ""
    whole = token_ids(processor, prompt + answer)
    return whole[shared_tokens(token_ids(processor, prompt), whole) :]


def token_ids(processor: Any, text: str) -> list[int]:
    """Return the tokens of a text without those that a tokenizer adds."""
    tokenizer = getattr(processor, "tokenizer", processor)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def shared_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Return with how many tokens both begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


@contextmanager
def padding(tokenizer: Any, side: str) -> Iterator[None]:
    """Pad on ``side`` inside the block, with end of sequence where there is no padding token."""
    before: Mapping[str, Any] = {"padding_side": tokenizer.padding_side}
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer must have a padding token or an end of sequence to pad with; "
                f"{type(tokenizer).__name__} has neither. Set tokenizer.pad_token."
            )
        before = {**before, "pad_token": None}
    try:
        tokenizer.padding_side = side
        if "pad_token" in before:
            tokenizer.pad_token = tokenizer.eos_token
        yield
    finally:
        for name, value in before.items():
            setattr(tokenizer, name, value)
