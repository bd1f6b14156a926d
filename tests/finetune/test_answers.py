"""Answer spans of chat templates, and their token ids and masks compared with transformers and with generation."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_slm.finetune.answers import ExampleEncoder, conversation_text
from megatron_slm.finetune.records import Completion, Conversation, RecordReader
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.chat import (
    CHATML,
    CHATML_TOOLS,
    END_OF_TEXT,
    GENERATION,
    HISTORY,
    LLAMA_2,
    LLAMA_3,
    SPECIALS,
    THINKING,
    save_tokenizer,
)
from megatron_slm.tokenizers.chat_template import ChatTemplate, TemplateError, find_template
from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer

Messages = list[dict[str, Any]]
TURNS: Messages = [
    {"role": "user", "content": "héllo abc"},
    {"role": "assistant", "content": "abba 日本 🙂"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "cde\n\ne"},
]
SYSTEM: Messages = [{"role": "system", "content": "be  kind\n"}, *TURNS]
ENDS = {"chatml": "<|im_end|>", "llama-2": " </s>", "llama-3": "<|eot_id|>"}
TEMPLATES = {"chatml": CHATML, "llama-2": LLAMA_2, "llama-3": LLAMA_3}


def encoder(directory: str, **options: Any) -> ExampleEncoder:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(model=directory, special_tokens="tokens"))
    try:
        return ExampleEncoder(tokenizer, find_template(None, directory), **options)
    except ConfigError as error:
        return ExampleEncoder(tokenizer, error, **options)


def answers(encode: ExampleEncoder, record: Completion | Conversation) -> list[str]:
    """Return the text of each run of answer tokens."""
    example, runs = encode(record), [[]]
    for token, trained in zip(example.ids, example.mask, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [encode.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("style", TEMPLATES)
def test_templates(tmp_path: Path, style: str, kind: str) -> None:
    directory = save_tokenizer(tmp_path, TEMPLATES[style], kind=kind)
    encode = encoder(directory)
    messages = TURNS if style == "llama-2" else SYSTEM
    theirs = PreTrainedTokenizerFast(tokenizer_file=f"{directory}/tokenizer.json", bos_token="<s>", eos_token="</s>")
    theirs.chat_template = TEMPLATES[style]
    example = encode(Conversation(messages))
    assert example.ids == theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [text.strip(" ") for text in answers(encode, Conversation(messages))] == [
        f"abba 日本 🙂{ENDS[style]}",
        f"cde\n\ne{ENDS[style]}",
    ]
    first = example.mask.index(True)
    prompt = theirs.apply_chat_template(messages[:-3], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert example.ids[:first] == prompt, "the prompt has the ids that it has in generation"


def test_bos_is_not_added_twice(tmp_path: Path) -> None:
    encode = encoder(save_tokenizer(tmp_path, LLAMA_3))
    bos = encode.tokenizer.encode("")[0]
    assert encode(Conversation(TURNS)).ids.count(bos) == 1
    assert encode(Completion("a", "b")).ids[:2].count(bos) == 1


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("ab", "cde"),
        ("ab ", "cde"),
        ("ab", " cde"),
        ("ab\n", "\ncd"),
        ("a\n\n", "b"),
        ("日", "本"),
        ("ab ", " b"),
        ("", "ab"),
    ],
)
def test_prompts_have_the_ids_of_generation(tmp_path: Path, kind: str, prompt: str, completion: str) -> None:
    encode = encoder(save_tokenizer(tmp_path, kind=kind))
    example = encode(Completion(prompt, completion))
    before = encode.tokenizer.encode(prompt) if prompt else encode.tokenizer.encode("")
    assert example.ids[: len(before)] == before
    assert example.mask == [False] * len(before) + [True] * (len(example.ids) - len(before))
    assert example.ids[-1] == encode.tokenizer.eod
    assert encode.tokenizer.decode(example.ids).removeprefix("<s>").strip() == f"{prompt}{completion}</s>".strip()


def test_an_answer_that_merges_with_its_prompt_is_cut_off(tmp_path: Path) -> None:
    """The template ends prompts with a space, which both kinds of tokenizer merge with the answer."""
    for kind in ("byte-level", "metaspace"):
        encode = encoder(save_tokenizer(tmp_path / kind, GENERATION, kind=kind))
        assert answers(encode, Conversation(TURNS)) == ["abba 日本 🙂</s>", "cde\n\ne</s>"]
        example = encode(Conversation(TURNS[:2]))
        prompt = encode.tokenizer.encode_plain("user: héllo abc\nassistant: ")
        assert example.ids[: example.mask.index(True)] == prompt


def test_tools_and_tool_results(tmp_path: Path) -> None:
    encode = encoder(save_tokenizer(tmp_path, CHATML_TOOLS))
    call = {"function": {"name": "f", "arguments": {"x": "é"}}}
    messages: Messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "42!"},
    ]
    found = answers(encode, Conversation(messages, tools=[{"name": "f"}]))
    assert found == [
        '<call>{"name": "f", "arguments": {"x": "é"}}</call><|im_end|>',
        "42!<|im_end|>",
    ]


def test_answers_without_content_are_not_trained(tmp_path: Path) -> None:
    encode = encoder(save_tokenizer(tmp_path, CHATML))
    messages = [*TURNS, {"role": "user", "content": "x"}, {"role": "assistant", "content": " \n"}]
    assert len(answers(encode, Conversation(messages))) == 2
    assert len(answers(encode, Conversation([TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]))) == 1
    assert answers(encode, Conversation(TURNS, first_answer=2)) == ["cde\n\ne<|im_end|>"]
    assert answers(encode, Completion("prompt", "")) == []


def test_templates_that_are_not_accepted(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="System messages are not supported"):
        encoder(save_tokenizer(tmp_path, LLAMA_2))(Conversation(SYSTEM))
    with pytest.raises(TemplateError, match=r"messages\[1\] cannot be located: .*the generation prompt. Mark"):
        encoder(save_tokenizer(tmp_path, HISTORY))(Conversation(TURNS))
    with pytest.raises(TemplateError, match="declares no pad_token"):
        ChatTemplate("{{ pad_token }}", "here", {}).render(TURNS)
    with pytest.raises(TemplateError, match="does not accept"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", "here", {}).render(TURNS)
    with pytest.raises(ConfigError, match="here is not a valid template"):
        ChatTemplate("{% for %}", "here", {})
    with pytest.raises(ConfigError, match="here is not a valid template"):
        ChatTemplate("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "here", {})
    with pytest.raises(ConfigError, match=r"has no chat template.*--chat-template FILE"):
        encoder(save_tokenizer(tmp_path / "plain"))(Conversation(TURNS))


def test_templates_that_end_conversations_with_another_token(tmp_path: Path) -> None:
    """Phi-3's style: text after the last turn is part of the last answer only."""
    encode = encoder(save_tokenizer(tmp_path, END_OF_TEXT))
    assert answers(encode, Conversation(TURNS)) == ["abba 日本 🙂<|im_end|>", "cde\n\ne<|im_end|>\n</s>"]


def test_templates_that_format_the_last_message_differently(tmp_path: Path) -> None:
    """Qwen3's style: earlier answers lose their thinking, so that each answer must be an example."""
    encode = encoder(save_tokenizer(tmp_path, THINKING))
    with pytest.raises(TemplateError, match=r"messages\[1\] cannot be located: .*--split-at-answers"):
        encode(Conversation(TURNS))
    separate = RecordReader(splits_at_answers=True)(json.dumps({"messages": SYSTEM}).encode())
    thought = "<think>\n\n</think>\n\n"
    assert [answers(encode, record) for record in separate] == [
        [f"{thought}abba 日本 🙂<|im_end|>"],
        [f"{thought}cde\n\ne<|im_end|>"],
    ]
    assert "<think>" not in encode.tokenizer.decode(encode(separate[1]).ids).split("cde")[0].split("abba")[0]


def test_generation_marks_equal_those_of_transformers(tmp_path: Path) -> None:
    body = "{{ m.content + '<|im_end|>' }}"
    marked = f"{{% generation %}}{body}{{% endgeneration %}}"
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    template += marked + "{% else %}" + body + "{% endif %}{{ '\\n' }}{% endfor %}"
    directory = save_tokenizer(tmp_path, template)
    theirs = PreTrainedTokenizerFast(tokenizer_file=f"{directory}/tokenizer.json", bos_token="<s>", eos_token="</s>")
    theirs.chat_template = template
    expected = theirs.apply_chat_template(SYSTEM, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    example = encoder(directory)(Conversation(SYSTEM))
    assert example.ids == expected["input_ids"] and example.mask == list(map(bool, expected["assistant_masks"]))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
        "{{ lipsum.__globals__['os'].popen('touch pwned').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='assistant') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_templates_cannot_execute_code(template: str) -> None:
    with contextlib.suppress(TemplateError):
        assert ChatTemplate(template, "here", {}).render(TURNS)[0] == "", "unsafe attributes are undefined"


def test_special_tokens_in_texts(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path, CHATML)
    call = {"function": {"name": "f", "arguments": {"x": ["<s>"]}}}
    with pytest.raises(ValueError, match="contains the special token '<s>'"):
        encoder(directory)(Conversation([{"role": "assistant", "content": "a", "tool_calls": [call]}]))
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match=r"contains the special token '<\|im_end\|>'"):
        encoder(directory)(Conversation(messages))
    encode = encoder(directory, allows_special=True)
    assert encode(Conversation(messages)).ids.count(encode.tokenizer.model.token_to_id("<|im_end|>")) == 3


def test_marks_and_prefixes_locate_the_same_answers() -> None:
    start = "{% for m in messages %}{{ m.role + '|' }}{% if m.role == 'assistant' %}"
    body = "{{ m.content + '<|im_end|>' }}"
    marked = start + "{% generation %}" + body + "{% endgeneration %}{% else %}" + body + "{% endif %}{% endfor %}"
    plain = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain += "{% if add_generation_prompt %}assistant|{% endif %}"
    texts = [
        conversation_text(ChatTemplate(text, "here", {}), Conversation(SYSTEM), SPECIALS) for text in (marked, plain)
    ]
    assert texts[0] == texts[1]


def test_sources_of_templates(tmp_path: Path) -> None:
    directory = Path(save_tokenizer(tmp_path, "config"))
    assert find_template(None, str(directory / "tokenizer.json")).render([])[0] == "config"
    several = '{"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}'
    (directory / "tokenizer_config.json").write_text(several)
    template = find_template(None, str(directory))
    assert [template.choose(tools).render([])[0] for tools in (None, [{}])] == ["a", "b"]
    (directory / "chat_template.jinja").write_text("file")
    assert find_template(None, str(directory)).render([])[0] == "file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert find_template(str(tmp_path / "mine.jinja"), str(directory)).render([])[0] == "mine"
    assert find_template("{{ 1 + 1 }}", None).render([])[0] == "2"
    with pytest.raises(ConfigError, match=r"nowhere.*cannot be read"):
        find_template("nowhere", None)
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja cannot be read: not UTF-8"):
        find_template(None, str(directory))


def test_turns_end_at_any_added_token(tmp_path: Path) -> None:
    """Some tokenizers do not declare their end-of-turn token as special; the newline after it is no answer."""
    directory = Path(save_tokenizer(tmp_path, CHATML))
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    declared = json.loads(text)
    for token in declared["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|im_end|>"
    (directory / "tokenizer.json").write_text(json.dumps(declared), encoding="utf-8")
    encode = encoder(str(directory))
    assert "<|im_end|>" not in encode.tokenizer.special_texts
    assert answers(encode, Conversation(TURNS)) == ["abba 日本 🙂<|im_end|>", "cde\n\ne<|im_end|>"]
    example = encode(Conversation(TURNS))
    last = max(place for place, trained in enumerate(example.mask) if trained)
    assert encode.ends_turn(example.ids[last]) and not encode.ends_turn(example.ids[last - 1])
