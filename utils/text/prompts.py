"""Prompts: read a prompt file in any of its layouts and turn each prompt into token ids.

A prompt is tokenised as its tokenizer does by default and wrapped in nothing, unless `--prompt_template` or `--chat`
asks for it.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import InputError, open_text, require_file

if TYPE_CHECKING:  # a prompt file is checked before anything heavy is imported
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)
PLACEHOLDER = "{prompt}"
STANDARD_INPUT = Path("the standard input")
# A text on which tokenizers show what they add to it.
PROBE = "a"
LAYOUTS = (
    'a JSON list of strings, or of objects with "prompt" or "text", or JSON Lines with "turns", "prompt" or "text"'
)


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text, its number counted from 0 (as in prompt_{index}.json), and the file.

    turn: its place in a conversation, counted from 0; earlier turns have the numbers just before it.
    """

    text: str
    index: int
    path: Path
    turn: int = 0

    def __str__(self) -> str:
        return f"{self.path}: prompt {self.index} (counted from 0)"


def read_prompts(path: Path, all_turns: bool = False, n_copies: int = 1) -> list[Prompt]:
    """The prompts of a file: a JSON list of strings or objects, or JSON Lines such as MT-Bench's questions.

    path: - is the standard input. Of an object, `prompt` or `text` is the prompt, or its `turns` are several: with
    all_turns each is a prompt, else the first one is, with a warning. n_copies: each conversation so many times in a row.
    Raises InputError where the file is missing, not UTF-8, not whole, has no prompts, or one of them is empty or not a
    text.
    """
    text = _read_text(path)
    path = STANDARD_INPUT if str(path) == "-" else path  # in messages
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
    prompts: list[Prompt] = []
    n_left_out = 0
    for entry in entries:
        turns = _turns(path, len(prompts), entry)
        n_left_out += 0 if all_turns else len(turns) - 1
        for _ in range(n_copies):
            for turn, text in enumerate(turns if all_turns else turns[:1]):
                prompts.append(Prompt(text, len(prompts), path, turn))
    if n_left_out:
        LOGGER.warning(
            "%s: only the first turn of each prompt is used, %s are left out; --chat uses all", path, n_left_out
        )
    return prompts


def _read_text(path: Path) -> str:
    if str(path) == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{STANDARD_INPUT}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    # A pipe is no regular file, but can be read like one, once.
    if not path.is_fifo():
        require_file(path, "holds the prompts")
    with open_text(path) as file:
        return file.read()


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{path}: is not valid JSON ({place}); expected {LAYOUTS}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: JSON that cannot be read ({error}); expected {LAYOUTS}") from error


def _turns(path: Path, index: int, entry: Any) -> list[str]:
    """The texts of an entry, of which a conversation has several."""
    where = Prompt("", index, path)
    turns = [entry]
    if isinstance(entry, dict):
        found = next((entry[key] for key in ("prompt", "text") if key in entry), entry.get("turns"))
        turns = found if isinstance(found, list) and found else [found]
    for text in turns:
        if not isinstance(text, str):
            raise InputError(f"{where} is {json.dumps(entry)[:60]}; expected {LAYOUTS}")
        if not text.strip():
            raise InputError(f"{where} is empty; give it a text or take it out")
        _require_unicode(text, str(where))
    return turns


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])
        raise InputError(
            f"{where} holds {character}, half of a surrogate pair, which is no character; remove it"
        ) from error


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
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase", template: str | None = None, chat: bool = False
) -> list[list[int]]:
    """The token ids of each prompt, with the special tokens that the tokenizer adds before a text by default.

    What it adds after a text, such as EOS, is left out with a warning: generation would go on after the end.
    template: every `{prompt}` in it becomes the prompt. chat: the prompt is the user's turn in the tokenizer's chat
    template, up to where the assistant's begins; the template's special tokens are the only ones. Later turns of a
    conversation have ids once the answers before them are known (`encode_turn`), and none here. Raises InputError
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
    encoded: list[list[int]] = []
    for prompt in prompts:
        if prompt.turn:
            encoded.append([])
        elif chat:
            encoded.append(encode_turn([prompt], [], tokenizer))
        else:
            text = (template or PLACEHOLDER).replace(PLACEHOLDER, prompt.text)
            token_ids = tokenizer(text, verbose=False)["input_ids"]
            encoded.append(_require_tokens(prompt, token_ids[: len(token_ids) - len(suffix)]))
    return encoded


def encode_turn(
    conversation: Sequence[Prompt], answers: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """The token ids of the last turn of a conversation, in the tokenizer's chat template.

    conversation: all its turns so far; answers: the assistant's to those before the last. Raises InputError where they
    do not fit the template.
    """
    from jinja2 import TemplateError

    messages = []
    for n, turn in enumerate(conversation):
        messages.append({"role": "user", "content": turn.text})
        messages += [{"role": "assistant", "content": answer} for answer in answers[n : n + 1]]
    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except (TemplateError, ValueError) as error:
        message = f"{conversation[-1]} does not fit the tokenizer's chat template ({error})"
        raise InputError(f"{message}; leave --chat out") from error
    # verbose: a prompt that is too long is refused by require_room, in our words.
    return _require_tokens(conversation[-1], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _require_tokens(prompt: Prompt, token_ids: Any) -> list[int]:
    if not token_ids:
        raise InputError(f"{prompt} has no tokens in this model's tokenizer; give it another text")
    return list(token_ids)


def conversation_of(prompts: Sequence[Prompt], index: int) -> Sequence[Prompt]:
    """The turns of a prompt's conversation up to that prompt."""
    return prompts[index - prompts[index].turn : index + 1]


def require_room(
    prompts: Sequence[Prompt],
    encoded: Sequence[Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    n_positions: int | None,
    max_new_tokens: int,
) -> None:
    """Raise InputError where a prompt and the new tokens do not fit the model's positions; None: they have no bound.

    A later turn has to fit with the longest answers to those before it.
    """
    if n_positions is None:
        return
    for prompt, token_ids in zip(prompts, encoded, strict=True):
        n_answers, n_tokens = prompt.turn, len(token_ids)
        if n_answers:
            turns = conversation_of(prompts, prompt.index)
            n_tokens = len(encode_turn(turns, [""] * n_answers, tokenizer)) + n_answers * max_new_tokens
        bound = n_positions - max_new_tokens
        if n_tokens > bound:
            room = f"the model's {n_positions} positions less {max_new_tokens} new tokens leave {max(bound, 0)}"
            of_answers = ", the answers before it included" if n_answers else ""
            raise InputError(
                f"{prompt} has {n_tokens} tokens{of_answers}, {room}; shorten it or lower --max_new_tokens"
            )
