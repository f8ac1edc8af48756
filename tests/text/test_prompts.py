"""Prompt files in every layout, the token ids that the LM is given, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.files import InputError
from utils.text.prompts import Prompt, encode_prompts, read_prompts, require_room, require_template

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
