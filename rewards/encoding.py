"""Prompts and answers as the token ids that a reward model reads.

The rules are those of training data, for one prompt with one or more answers:

- Text is tokenised as it stands, prompt and prompt + answer each as one string, with what the tokenizer adds; a
  beginning-of-sequence token stands once.
- Messages go through the chat template: the prompt with the generation prompt, prompt + answer as one conversation.
  Plain text as an answer to messages is one assistant message.
- An answer begins where prompt and prompt + answer stop to agree, token by token. All answers to a prompt get the same
  prompt ids.
- An answer ends in the tokenizer's end token, once: appended where it is missing, doubles removed, and blanks that a
  template writes after it cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Content = str | Sequence[Message]


def plain(content: Content, role: str) -> str:
    """What a rule reads of a prompt (role ``user``) or of an answer (``assistant``).

    Text as it is; of messages the last turn of this role, else the last one. A turn without content is "".
    """
    if isinstance(content, str):
        return content
    turns = [turn for turn in content if turn["role"] == role] or content[-1:]
    return (turns[-1].get("content") or "") if turns else ""


def as_answer(prompt: Content, text: str) -> Content:
    """An answer in its prompt's form: text, or a message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def encode_answers(tokenizer: Any, prompt: Content, answers: Sequence[Content]) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt, and of each answer to it.

    Raises:
        ValueError: an empty answer, messages as an answer to text, or messages without a chat template.
    """
    is_text = isinstance(prompt, str)
    text = prompt if isinstance(prompt, str) else _render(tokenizer, prompt, True)
    prompt_ids = _ids(tokenizer, text, is_text)
    if is_text and prompt_ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(str(tokenizer.eos_token)):
        prompt_ids = prompt_ids[:-1]  # the tokenizer ended it, and the answer is to follow
    joints = [_ids(tokenizer, _joint(tokenizer, prompt, answer), is_text) for answer in answers]
    shared = min(_shared_length(prompt_ids, joint) for joint in joints)
    ended = []
    for number, joint in enumerate(joints):
        ids = _without_end(tokenizer, joint[shared:])
        if not ids:
            raise ValueError(f"answer {number} is empty: there is nothing to score")
        ended.append([*ids, tokenizer.eos_token_id])
    return prompt_ids[:shared], ended


def encode_row(
    tokenizer: Any, row: int, prompt: Content, answers: Sequence[Content]
) -> tuple[list[int], list[list[int]]]:
    """``encode_answers``, with errors that name the row."""
    try:
        return encode_answers(tokenizer, prompt, answers)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error


def encode_rows(
    tokenizer: Any, prompts: Sequence[Content], completions: Sequence[Content]
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of N prompts, and of the completion of each.

    Raises:
        ValueError: the two differ in number, or a row that ``encode_answers`` refuses; the message names it.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: one completion a prompt")
    rows = zip(prompts, completions, strict=True)
    encoded = [encode_row(tokenizer, row, prompt, [answer]) for row, (prompt, answer) in enumerate(rows)]
    return [prompt for prompt, _ in encoded], [answers[0] for _, answers in encoded]


def ended_once(ids: Sequence[int], eos_token_id: int) -> list[int]:
    """The ids with one end token at their end."""
    end = len(ids)
    while end and ids[end - 1] == eos_token_id:
        end -= 1
    return [*ids[:end], eos_token_id]


def _ids(tokenizer: Any, text: str, is_text: bool) -> list[int]:
    """``is_text`` is False for what a template wrote, which holds its special tokens already."""
    ids = list(tokenizer(text, add_special_tokens=is_text, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return ids[1:] if is_text and bos is not None and ids[:2] == [bos, bos] and _adds_bos(tokenizer) else ids


def _adds_bos(tokenizer: Any) -> bool:
    return list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _joint(tokenizer: Any, prompt: Content, answer: Content) -> str:
    if isinstance(prompt, str):
        if not isinstance(answer, str):
            raise ValueError("the prompt is text and the answer is messages: give both as messages")
        return prompt + answer
    turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    if not any(str(turn.get("content") or "").strip() or turn.get("tool_calls") for turn in turns):
        raise ValueError("the answer is empty: there is nothing to score")
    return _render(tokenizer, [*prompt, *turns], False)


def _render(tokenizer: Any, messages: Content, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "prompts are chat messages, but the tokenizer has no chat template: set tokenizer.chat_template, or give "
            "prompts and answers as text"
        )
    rendered = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return str(rendered)


def _without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Without end tokens at the end, and without blanks that stand after one."""
    while tokenizer.eos_token_id in ids:
        last = len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)
        if tokenizer.decode(ids[last + 1 :]).strip():
            break
        ids = ids[:last]
    return ids


def _shared_length(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
