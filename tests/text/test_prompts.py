"""Prompt files in every layout, the token ids that the LM is given, and what is refused."""

import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.files import InputError
from utils.text.prompts import (
    Prompt,
    added_tokens,
    encode_prompts,
    read_prompts,
    require_room,
    require_template,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(gpt2_folder)


@pytest.fixture
def llama(llama_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(llama_folder)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "prompts.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(text, index, Path("p.json")) for index, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('["One.", " two 東京 🙂\\n"]', ["One.", " two 東京 🙂\n"]),
        ('\n [\n{"prompt": "a", "id": 3}, {"text": "b"},\n"c"]\n', ["a", "b", "c"]),
        (
            '{"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite."]}\n'
            '{"question_id": 82, "category": "writing", "turns": ["Draft."], "reference": ["x"]}\n\n',
            ["Compose.", "Draft."],
        ),
        ('{"prompt": "of both, the prompt", "text": "and its answer"}', ["of both, the prompt"]),
        ('"a\u2028b"\r\n"c"', ["a\u2028b", "c"]),
        (b'\xef\xbb\xbf["after a byte order mark"]', ["after a byte order mark"]),
    ],
    ids=["strings", "objects", "mt_bench", "prompt_before_text", "line_separator_in_text", "byte_order_mark"],
)
def test_every_layout_gives_its_texts_in_order(
    prompt_file: Callable[[str | bytes], Path], content: str | bytes, texts: list[str]
) -> None:
    prompts = read_prompts(prompt_file(content))
    assert [prompt.text for prompt in prompts] == texts
    assert [prompt.index for prompt in prompts] == list(range(len(texts)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "without prompts"),
        ('["a", ""]', r"prompt 1 \(counted from 0\) is empty"),
        ('["a", " \\n"]', r"prompt 1 \(counted from 0\) is empty"),
        ('{"turns": ["", "b"]}', r"prompt 0 \(counted from 0\) is empty"),
        ('["a"', "not valid JSON .* line 1"),
        ('"a"\n"b"\n{"text": ', "not valid JSON .* line 3"),
        ("plain text", "not valid JSON .* line 1"),
        ('["a", 3]', r"prompt 1 .* is 3"),
        ('[["a"]]', r'prompt 0 .* is \["a"\]'),
        ('[{"question": "a"}]', 'prompt 0 .* is {"question": "a"}'),
        ('[{"prompt": null}]', r"prompt 0 .* is {"),
        ('{"turns": []}', r"prompt 0 .* is {"),
        ('{"turns": [{"text": "a"}]}', r"prompt 0 .* is {"),
        ("3", r"prompt 0 .* is 3"),
        (b'["\xff"]', r"not UTF-8 \(byte 2\)"),
        ('["a"]'.encode("utf-16"), "not UTF-8"),
        ('["a \\ud83d b"]', r"prompt 0 .* holds '\\ud83d', half of a surrogate pair"),
        ("[" * 100_000, "cannot be read"),
        ("[" + "9" * 5000 + "]", "cannot be read"),
    ],
)
def test_unusable_prompt_file_is_refused_with_its_place(
    prompt_file: Callable[[str | bytes], Path], content: str | bytes, message: str
) -> None:
    path = prompt_file(content)
    with pytest.raises(InputError, match=message) as refusal:
        read_prompts(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))

    return give


def test_prompts_come_from_the_standard_input(standard_input: Callable[[bytes], None]) -> None:
    standard_input('\ufeff["東京", "b"]'.encode())
    assert [prompt.text for prompt in read_prompts(Path("-"))] == ["東京", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": is empty; expected a JSON list"),
        (b'["a"', ": is not valid JSON "),
        (b'["\xff"]', r": is not UTF-8 \(byte 2\)"),
        (b'["a", ""]', r": prompt 1 \(counted from 0\) is empty"),
    ],
)
def test_standard_input_without_prompts_is_refused_by_its_name(
    standard_input: Callable[[bytes], None], content: bytes, message: str
) -> None:
    standard_input(content)
    with pytest.raises(InputError, match=f"^the standard input{message}"):
        read_prompts(Path("-"))


@pytest.mark.parametrize("content", [b'["a", "b"]', b'["\xff"]'])
def test_a_pipe_is_read_once_from_its_start(content: bytes, tmp_path: Path) -> None:
    """As `<(command)` names one to a script."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(path.write_bytes, content)
        if b"\xff" in content:
            with pytest.raises(InputError, match=f"^{path}: is not UTF-8; save it as UTF-8"):
                read_prompts(path)
        else:
            assert [prompt.text for prompt in read_prompts(path)] == ["a", "b"]
        assert written.result() == len(content)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "none.json")
    with pytest.raises(InputError, match="is not a file"):
        read_prompts(tmp_path)


def test_default_is_the_tokenizers_own_and_wraps_nothing(
    gpt2: PreTrainedTokenizerBase, llama: PreTrainedTokenizerBase
) -> None:
    text = "The quick brown fox"
    (plain,) = encode_prompts(prompts_of(text), gpt2)
    assert plain == gpt2(text)["input_ids"]
    assert gpt2.decode(plain) == text
    (with_bos,) = encode_prompts(prompts_of(text), llama)
    assert with_bos == [llama.bos_token_id, *llama.encode(text, add_special_tokens=False)]


def test_template_puts_the_prompt_in_its_place_and_leaves_other_braces(gpt2: PreTrainedTokenizerBase) -> None:
    (token_ids,) = encode_prompts(prompts_of("a {b}"), gpt2, template='{"q": "{prompt}", "again": "{prompt}"}')
    assert gpt2.decode(token_ids) == '{"q": "a {b}", "again": "a {b}"}'


def test_chat_gives_the_chat_template_with_one_bos(llama: PreTrainedTokenizerBase) -> None:
    llama.chat_template = CHAT_TEMPLATE
    (token_ids,) = encode_prompts(prompts_of("the dog"), llama, chat=True)
    assert token_ids.count(llama.bos_token_id) == 1
    assert token_ids == llama("[user] the dog[assistant]")["input_ids"]


def test_chat_needs_a_chat_template_that_takes_a_user_turn(llama: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"--chat: .* has no chat template"):
        encode_prompts(prompts_of("a"), llama, chat=True)
    llama.chat_template = "{{ raise_exception('a system turn comes first') }}"
    with pytest.raises(InputError, match=r"prompt 0 .* chat template .*a system turn comes first"):
        encode_prompts(prompts_of("a"), llama, chat=True)


def adding(tokenizer: PreTrainedTokenizerBase, template: str) -> Any:
    """The same tokenizer with another template of what it adds to a text."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("$A", [], []),
        ("<s> $A", [1], []),
        ("<s> $A </s>", [1], [2]),
        ("$A </s>", [], [2]),
        ("<s> <s> $A </s> </s>", [1, 1], [2, 2]),
    ],
)
def test_what_a_tokenizer_adds_after_a_text_is_no_part_of_a_prompt_which_is_said_once(
    template: str, before: list[int], after: list[int], llama: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = adding(llama, template)
    assert added_tokens(tokenizer) == (before, after)
    texts = ["The quick brown fox", "a", "the dog </s>"]
    found = encode_prompts(prompts_of(*texts), tokenizer)
    assert found == [before + tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert found[2][-1] == 2  # of the text itself, not added
    of_template = encode_prompts(prompts_of("the dog"), tokenizer, template="Q: {prompt}\nA:")
    assert of_template == [before + tokenizer.encode("Q: the dog\nA:", add_special_tokens=False)]
    said = (
        f"the tokenizer adds {tokenizer.decode(after)!r} after a text, which is left out: prompts are to be continued"
    )
    assert caplog.messages == [said] * (2 if after else 0)  # for each file of prompts


def test_a_chat_template_says_itself_what_follows_a_prompt(
    llama: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = adding(llama, "<s> $A </s>")
    tokenizer.chat_template = CHAT_TEMPLATE + "</s>"
    (token_ids,) = encode_prompts(prompts_of("the dog"), tokenizer, chat=True)
    assert token_ids == tokenizer.encode("<s>[user] the dog[assistant]</s>", add_special_tokens=False)
    assert caplog.messages == []


def test_a_tokenizer_that_knows_nothing_of_the_probe_keeps_its_prompts_whole(llama: PreTrainedTokenizerBase) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bases = Tokenizer(models.BPE({"<s>": 1, "</s>": 2, "C": 3, "G": 4}, []))  # which leaves out other letters
    tokenizer = adding(PreTrainedTokenizerFast(tokenizer_object=bases, bos_token="<s>", eos_token="</s>"), "<s> $A")
    assert encode_prompts(prompts_of("CGG"), tokenizer) == [[1, 3, 4, 4]]


def test_template_flags_are_checked_without_a_model() -> None:
    require_template(None, chat=True)
    require_template("Q: {prompt}\nA:", chat=False)
    with pytest.raises(InputError, match=r"has no {prompt}"):
        require_template("Q: {}", chat=False)
    with pytest.raises(InputError, match="give one of them"):
        require_template("{prompt}", chat=True)


def test_prompt_without_tokens_is_refused(gpt2: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from tokenizers import normalizers

    gpt2 = AutoTokenizer.from_pretrained(gpt2.name_or_path)
    gpt2.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(InputError, match=r"prompt 1 .* has no tokens"):
        encode_prompts(prompts_of("a", "\u200b"), gpt2)


def test_prompt_must_leave_room_for_the_new_tokens(gpt2: PreTrainedTokenizerBase) -> None:
    prompts = prompts_of("a", "b")
    require_room(prompts, [[1] * 7, [1] * 8], gpt2, n_positions=10, max_new_tokens=2)
    require_room(prompts, [[1] * 700, [1] * 800], gpt2, n_positions=None, max_new_tokens=2)
    with pytest.raises(
        InputError, match=r"prompt 1 .* has 9 tokens, the model's 10 positions less 2 new tokens leave 8"
    ):
        require_room(prompts, [[1] * 8, [1] * 9], gpt2, n_positions=10, max_new_tokens=2)
    with pytest.raises(InputError, match=r"prompt 0 .* leave 0"):
        require_room(prompts, [[1], [1]], gpt2, n_positions=10, max_new_tokens=12)


def test_prompts_survive_a_round_trip_through_json(tmp_path: Path) -> None:
    texts = ["naïve\u0000\t", "{prompt}", "<|USER|>"]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(texts))
    assert [prompt.text for prompt in read_prompts(path)] == texts
