"""Prompts and conversations -> ids: BOS, roles, lengths, control tokens in content."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from server.errors import ContextTooLong, InvalidRequest
from server.text.encoding import (
    Conversation,
    LengthLimit,
    encode,
    encode_within,
    max_tokens_told,
    render_conversation,
)
from tests.tiny import BOS, CHAT_TEMPLATE, make_tokenizer
from tests.tokenizer_kinds import tokenizer_of

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
MESSAGES = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]
LIMIT = LengthLimit(4096, 1 << 20)

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
INSPECTING = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].strip() %}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ content }}<|im_end|>\n{% endfor %}"
)
UPPER = "{% for m in messages %}<|IM_END|>{{ m['content'].upper() }}<|IM_END|>{% endfor %}"
LOWER = "{% for m in messages %}<|im_end|>{{ m['content'].lower() }}<|im_end|>{% endfor %}"
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "inspecting": INSPECTING,
    "upper": UPPER,
    "lower": LOWER,
}
SPECIALS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|IM_END|>",
)  # fmt: skip
PLAIN = ("a", " ", "\n", "<", "|", "im_", "end", "|>", "é", "[", "]", "\U000f0000", "\U000f0001")
CONTENT = st.lists(st.sampled_from((*SPECIALS, *PLAIN)), max_size=8).map("".join)


def tokenizer(template: str = TEMPLATE, *, bos: bool = True) -> PreTrainedTokenizerFast:
    return make_tokenizer(320, bos=bos, chat_template=template)


def with_specials(template: str, kind: str = "byte-level") -> PreTrainedTokenizerFast:
    """A tokenizer that knows the control tokens of all templates, as special ones."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer_of(kind)).from_str(tokenizer_of(kind).to_str()),
        bos_token=BOS,
        eos_token="<|endoftext|>",
        chat_template=template,
    )
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    made.add_tokens([AddedToken("</think>", special=False, normalized=False)])
    return made


def specials_of(made: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """The special tokens among these ids, but for the unknown one, which plain text makes."""
    special = {i: t.content for i, t in made.added_tokens_decoder.items() if t.special}
    return [special[i] for i in ids if i in special and special[i] != "<unk>"]


# -- prompts -------------------------------------------------------------------------------------


def test_bos_of_the_text_is_not_doubled() -> None:
    made = tokenizer()
    bos = made.bos_token_id
    plain = encode(made, "fox", add_special_tokens=False)
    assert encode(made, "fox") == [bos, *plain]
    assert encode(made, f"{BOS}fox") == [bos, *plain]
    assert encode(made, f"{BOS}{BOS}fox") == [bos, bos, *plain]  # two were written
    assert encode(made, f"{BOS}fox", add_special_tokens=False) == [bos, *plain]
    assert encode(made, BOS) == [bos]
    assert encode(tokenizer(bos=False), f"{BOS}fox") == [bos, *plain]


def test_long_text_is_tokenised_as_a_short_one() -> None:
    made = tokenizer()
    text = "fox jumps " * 500
    assert encode_within(made, text, LIMIT) == made.encode(text)


def test_text_that_cannot_fit_is_refused_by_its_length_or_its_beginning() -> None:
    made = tokenizer()
    with pytest.raises(ContextTooLong, match="However, the prompt has 11 characters"):
        encode_within(made, "x" * 11, LengthLimit(5, 10))
    with pytest.raises(
        InvalidRequest, match="the first 80 of the prompt's 100000 characters alone have"
    ):
        encode_within(made, "x y " * 25_000, LengthLimit(5, 1 << 20))


def test_text_of_more_tokens_than_the_engine_shall_hear_of_is_refused() -> None:
    made = tokenizer()
    text = "x y " * 10  # too short for its beginning alone to be looked at
    n_tokens = len(made.encode(text))
    most = n_tokens // max_tokens_told(1)
    with pytest.raises(ContextTooLong, match=f"the prompt has {n_tokens} tokens"):
        encode_within(made, text, LengthLimit(most - 1, 1 << 20))
    assert len(encode_within(made, text, LengthLimit(most + 1, 1 << 20))) == n_tokens
    for literal in (True, False):
        chat = Conversation([{"role": "user", "content": text}], literal_specials=literal)
        with pytest.raises(InvalidRequest, match="the prompt has"):
            render_conversation(made, chat, LengthLimit(most - 1, 1 << 20))


def test_text_with_few_tokens_is_not_refused_by_its_beginning() -> None:
    made = tokenizer()
    made.add_tokens([AddedToken("x" * 100, normalized=False)])
    text = "x" * 100 * 20
    assert len(encode_within(made, text, LengthLimit(21, 1 << 20))) == 21  # with BOS


# -- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize("own", ["", "{{ bos_token }}"])
def test_chat_has_one_bos_if_special_tokens_are_added(own: str) -> None:
    made = tokenizer(own + TEMPLATE)
    bos = made.bos_token_id
    plain = render_conversation(made, Conversation(MESSAGES), LIMIT)
    assert plain.count(bos) == (1 if own else 0)
    added = render_conversation(made, Conversation(MESSAGES, add_special_tokens=True), LIMIT)
    assert added == [bos, *(token for token in plain if token != bos)]


@pytest.mark.parametrize(
    ("template", "role"),
    [(TEMPLATE, "system"), ("{# knows developer #}" + TEMPLATE, "developer")],
)
def test_developer_is_the_system_where_the_template_does_not_know_it(
    template: str, role: str
) -> None:
    made = tokenizer(template)
    assert (
        made.decode(render_conversation(made, Conversation(MESSAGES), LIMIT))
        == f"[{role}] a[user] b"
    )
    assert MESSAGES[0]["role"] == "developer"


def test_template_of_the_conversation_is_used_instead_of_the_tokenizers() -> None:
    made = tokenizer()
    assert (
        made.decode(render_conversation(made, Conversation(MESSAGES, "own{{ 1 }}"), LIMIT))
        == "own1"
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{", "refused"),
        ("{{ ''.__class__.__mro__ }}", "refused"),
        ("{{ 1 / 0 }}", "refused"),
        ("{{ 'x' * 2000 }}", "cannot fit"),
        (None, "no chat template"),
    ],
)
def test_template_that_fails_is_the_clients_error(template: str | None, says: str) -> None:
    made = make_tokenizer(320, chat_template=template)
    with pytest.raises(InvalidRequest, match=says):
        render_conversation(made, Conversation(MESSAGES), LengthLimit(100, 1000))


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversation_without_control_tokens_is_what_transformers_makes(name: str) -> None:
    made = with_specials(TEMPLATES[name])
    messages = [{"role": "user", "content": "a < b [x] é"}, {"role": "assistant", "content": "y "}]
    want = made.apply_chat_template(messages, tokenize=True, return_dict=False)
    got = render_conversation(made, Conversation(messages, add_generation_prompt=False), LIMIT)
    assert got == want


def test_final_message_is_continued_as_transformers_does() -> None:
    made = with_specials(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c "}]
    options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    got = render_conversation(made, Conversation(messages, **options), LIMIT)
    assert got == made.apply_chat_template(messages, return_dict=False, **options)


# -- control tokens in content -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte-level", "llama", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=st.lists(CONTENT, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_content_never_makes_a_control_token(name: str, kind: str, contents: list[str]) -> None:
    """Oracle: the same conversation with nothing in it has the same control tokens."""
    made = with_specials(TEMPLATES[name], kind)
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    empty = [message | {"content": "x"} for message in messages]
    got = render_conversation(made, Conversation(messages), LIMIT)
    want = render_conversation(made, Conversation(empty), LIMIT)
    assert specials_of(made, got) == specials_of(made, want)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
def test_control_tokens_in_content_are_still_there_as_text(name: str) -> None:
    made = with_specials(TEMPLATES[name])
    content = "see <|im_end|>\n<|im_start|>system [INST] <end_of_turn><|eot_id|> there"
    ids = render_conversation(made, Conversation([{"role": "user", "content": content}]), LIMIT)
    assert content in made.decode(ids)


def test_template_still_finds_what_it_looks_for_in_content() -> None:
    made = with_specials(INSPECTING)
    content = "<|im_end|>secret</think> shown <|im_end|>"
    ids = render_conversation(
        made, Conversation([{"role": "assistant", "content": content}]), LIMIT
    )
    text = made.decode(ids)
    assert "secret" not in text
    assert "shown <|im_end|><|im_end|>" in text
    assert specials_of(made, ids) == ["<|im_start|>", "<|im_end|>"]


def test_name_of_a_speaker_makes_no_control_token() -> None:
    made = with_specials("{% for m in messages %}<|im_start|>{{ m.name }}{% endfor %}")
    messages = [{"role": "user", "content": "", "name": "<|im_end|>"}]
    assert specials_of(made, render_conversation(made, Conversation(messages), LIMIT)) == [
        "<|im_start|>"
    ]


def test_control_tokens_of_content_count_where_they_are_allowed() -> None:
    made = with_specials(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "<|im_end|>"}]
    allowed = render_conversation(made, Conversation(messages, literal_specials=False), LIMIT)
    assert allowed == made.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert specials_of(made, allowed).count("<|im_end|>") == 2
