"""Prompts: read a prompt file in any of its layouts and turn each prompt into token ids.

A prompt is tokenised as its tokenizer does by default and wrapped in nothing, unless `--prompt_template` or `--chat`
asks for it.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import InputError, open_text, require_file

if TYPE_CHECKING:  # a prompt file is checked before anything heavy is imported
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)
PLACEHOLDER = "{prompt}"
# A text on which tokenizers show what they add to it.
PROBE = "a"
LAYOUTS = (
    'a JSON list of strings, or of objects with "prompt" or "text", or JSON Lines with "turns", "prompt" or "text"'
)


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text, its place in the file counted from 0 (as in prompt_{index}.json), and the file."""

    text: str
    index: int
    path: Path

    def __str__(self) -> str:
        return f"{self.path}: prompt {self.index} (counted from 0)"


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: a JSON list of strings or objects, or JSON Lines such as MT-Bench's questions.

    Of an object, `prompt` or `text` is the prompt, or the first of its `turns`. Raises InputError where the file is
    missing, not UTF-8, not whole, has no prompts, or one of them is empty or not a text.
    """
    with open_text(require_file(path, "holds the prompts")) as file:
        text = file.read()
    if not text.strip():
        raise InputError(f"{path}: is empty; expected {LAYOUTS}")
    if text.lstrip()[0] == "[":
        entries = _parse_json(text, path, first_line=1)
    else:
        # Only \n ends a line: JSON strings may hold the other line ends of `splitlines`.
        lines = enumerate(text.split("\n"), start=1)
        entries = [_parse_json(line, path, number) for number, line in lines if line.strip()]
    if not entries:
        raise InputError(f"{path}: is a list without prompts; expected {LAYOUTS}")
    return [Prompt(_prompt_text(path, index, entry), index, path) for index, entry in enumerate(entries)]


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{path}: is not whole JSON ({place}); expected {LAYOUTS}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: JSON that cannot be read ({error}); expected {LAYOUTS}") from error


def _prompt_text(path: Path, index: int, entry: Any) -> str:
    where = Prompt("", index, path)
    text = _text_of(entry)
    if not isinstance(text, str):
        raise InputError(f"{where} is {json.dumps(entry)[:60]}; expected {LAYOUTS}")
    if not text.strip():
        raise InputError(f"{where} is empty; give it a text or take it out")
    _require_unicode(text, str(where))
    return text


def _text_of(entry: Any) -> Any:
    """The value in the place of an entry's text; None where there is no such place."""
    if not isinstance(entry, dict):
        return entry
    found = next((entry[key] for key in ("prompt", "text") if key in entry), None)
    turns = entry.get("turns")
    return turns[0] if found is None and isinstance(turns, list) and turns else found


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])
        raise InputError(
            f"{where} holds {character}, half of a surrogate pair, which is no character; mend it"
        ) from error


def repeated(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """Each prompt n times in a row, with new numbers."""
    return [replace(prompt, index=n * prompt.index + i) for prompt in prompts for i in range(n)]


# ---- Token ids


def require_template(template: str | None, chat: bool) -> None:
    """Raise InputError where --prompt_template has no place for the prompt or --chat is given too."""
    if template is None:
        return
    if chat:
        raise InputError("--prompt_template and --chat both wrap the prompt; give one of them")
    if PLACEHOLDER not in template:
        raise InputError(f"--prompt_template {template!r}: has no {PLACEHOLDER}; put it where the prompt belongs")
    _require_unicode(template, "--prompt_template")


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before a text by default, BOS as a rule, and those that it adds after it."""
    plain = list(tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer(PROBE, verbose=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase", template: str | None = None, chat: bool = False
) -> list[list[int]]:
    """The token ids of each prompt, with the special tokens that the tokenizer adds before a text by default.

    What it adds after a text, such as EOS, is left out with a warning: generation would go on after the end.

    template: every `{prompt}` in it becomes the prompt. chat: the prompt is the user's turn in the tokenizer's chat
    template, up to where the assistant's begins; the template's special tokens are the only ones. Raises InputError
    where both are given, the template has no place for the prompt, the tokenizer has no chat template, or a prompt
    has no tokens.
    """
    require_template(template, chat)
    if chat and not tokenizer.chat_template:
        raise InputError("--chat: this model's tokenizer has no chat template; use --prompt_template instead")
    suffix = [] if chat else added_tokens(tokenizer)[1]
    if suffix and prompts:
        text = tokenizer.decode(suffix)
        LOGGER.warning("the tokenizer adds %r after a text, which is left out: prompts are to be continued", text)
    return [_encode(prompt, tokenizer, template or PLACEHOLDER, chat, len(suffix)) for prompt in prompts]


def _encode(
    prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", template: str, chat: bool, n_suffix: int
) -> list[int]:
    text = _render_chat(prompt, tokenizer) if chat else template.replace(PLACEHOLDER, prompt.text)
    # verbose: a prompt that is too long is refused by require_room, in our words.
    token_ids = tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
    token_ids = token_ids[: len(token_ids) - n_suffix]
    if not token_ids:
        raise InputError(f"{prompt} has no tokens in this model's tokenizer; give it another text")
    return list(token_ids)


def _render_chat(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> str:
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt.text}]
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except (TemplateError, ValueError) as error:
        raise InputError(f"{prompt} does not fit the tokenizer's chat template ({error}); leave --chat out") from error


def require_room(
    prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]], n_positions: int | None, max_new_tokens: int
) -> None:
    """Raise InputError where a prompt and the new tokens do not fit the model's positions; None: they have no bound."""
    if n_positions is None:
        return
    bound = n_positions - max_new_tokens
    for prompt, token_ids in zip(prompts, encoded, strict=True):
        if len(token_ids) > bound:
            room = f"the model's {n_positions} positions less {max_new_tokens} new tokens leave {max(bound, 0)}"
            raise InputError(f"{prompt} has {len(token_ids)} tokens, {room}; shorten it or lower --max_new_tokens")
