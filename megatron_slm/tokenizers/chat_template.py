"""Chat templates: Jinja templates of a tokenizer that format the messages of a conversation as text.

Templates are found, compiled and given the same variables as by Hugging Face transformers, in a sandbox without access
to files or Python attributes. ``{% generation %}`` marks the text that the model generates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.eod import json_settings

Message = Mapping[str, Any]  # role, content, and any keys that the template reads
Span = tuple[int, int]  # characters [start, stop)
FLAG = "--chat-template"
OPEN, CLOSE = "\ue000\U000f0a01\ue000", "\ue000\U000f0a02\ue000"  # private-use characters around generated text
DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of the templates of a tokenizer with several


class TemplateError(ValueError):
    """Raised if a template cannot format a conversation."""


class _Generation(Extension):
    """Enclose the text of ``{% generation %}`` blocks in marks."""

    tags = {"generation"}  # noqa: RUF012 as in jinja2's class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class _Undefined(jinja2.Undefined):
    """Undefined variable that is false and prints nothing, unless it is a special token."""

    def __str__(self) -> str:
        if self._undefined_name is not None and self._undefined_name.endswith("_token"):
            raise TemplateError(f"the tokenizer declares no {self._undefined_name}, which the chat template prints")
        return super().__str__()


class ChatTemplate:
    """Represent a compiled template, with the variables that the tokenizer defines.

    Args:
        text: the template.
        source: its file, for error messages.
        variables: special tokens such as ``bos_token``.
        with_tools: the template for conversations with tools, if it is another one.

    Raises:
        ConfigError: the template is not valid Jinja.
    """

    def __init__(
        self, text: str, source: str, variables: Mapping[str, str], with_tools: ChatTemplate | None = None
    ) -> None:
        self.text, self.source, self.variables, self.with_tools = text, source, variables, with_tools
        self.marks_answers = "endgeneration" in text
        self.fingerprint = hashlib.sha256(f"{text} {json.dumps(dict(variables), sort_keys=True)}".encode()).hexdigest()
        try:
            self._template = _environment().from_string(text)
        except Exception as error:  # also of Python's compiler, for deeply nested blocks
            raise ConfigError(f"{FLAG}: {source} is not a valid template: {error}. Fix it.") from error

    def choose(self, tools: list[Any] | None) -> ChatTemplate:
        """Return the template for conversations with or without tools."""
        return self.with_tools if tools and self.with_tools is not None else self

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the spans of its ``{% generation %}`` blocks.

        Args:
            messages: the conversation.
            tools: JSON schemas of the available functions.
            add_generation_prompt: append the text after which the model generates its answer.

        Raises:
            TemplateError: the template does not accept the conversation.
        """
        variables = {**self.variables, "messages": list(messages), "tools": tools, "documents": None}
        try:
            marked = self._template.render(**variables, add_generation_prompt=add_generation_prompt)
        except TemplateError:
            raise
        except Exception as error:  # a template is a program and can raise anything
            raise TemplateError(f"the chat template does not accept the conversation: {error}") from error
        return _without_marks(marked)


def find_template(given: str | None, tokenizer_path: str | None) -> ChatTemplate:
    """Return the template of --chat-template, or else that of the tokenizer.

    Args:
        given: file or text of a template.
        tokenizer_path: file or directory of the tokenizer.

    Raises:
        ConfigError: there is no template, or it is invalid.
    """
    directory = _directory(tokenizer_path)
    variables = _declared_tokens(directory) if directory is not None else {}
    if given is not None:
        return _given_template(given, variables)
    templates = _tokenizer_templates(directory) if directory is not None else {}
    if not templates:
        place = "this tokenizer"
        if directory is not None:
            place = f"{tokenizer_path} (chat_template.jinja or tokenizer_config.json in {directory})"
        raise ConfigError(f"{FLAG}: {place} has no chat template, which 'messages' need. Give one with {FLAG} FILE.")
    name = DEFAULT if DEFAULT in templates else next(iter(templates))
    with_tools = None
    if WITH_TOOLS in templates:
        with_tools = ChatTemplate(templates[WITH_TOOLS], f"{directory} ({WITH_TOOLS})", variables)
    return ChatTemplate(templates[name], str(directory), variables, with_tools)


def _directory(path: str | None) -> Path | None:
    if path is None:
        return None
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _given_template(given: str, variables: Mapping[str, str]) -> ChatTemplate:
    if "{%" in given or "{{" in given:  # Megatron-LM's flag takes the text
        return ChatTemplate(given, "the given text", variables)
    return ChatTemplate(_read_template(Path(given)), given, variables)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a null character
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{FLAG} {path} cannot be read: {reason}. Give a file with a Jinja template.") from error


def _tokenizer_templates(directory: Path) -> dict[str, str]:
    """Return the templates of a tokenizer by name, in the order of precedence of transformers."""
    declared = json_settings(directory / "tokenizer_config.json").get("chat_template")
    if declared is None:
        declared = json_settings(directory / "chat_template.json").get("chat_template")
    if isinstance(declared, str):
        declared = [{"name": DEFAULT, "template": declared}]
    try:
        found = {str(each["name"]): str(each["template"]) for each in declared or []}
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"{FLAG}: chat_template in {directory / 'tokenizer_config.json'} is neither a text nor a list of names and "
            f"templates. Give a template with {FLAG} FILE."
        ) from error
    files = {DEFAULT: directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    return found | {name: _read_template(path) for name, path in files.items() if path.is_file()}


def _declared_tokens(directory: Path) -> dict[str, str]:
    """Return the special tokens that the files of a tokenizer declare, by name."""
    settings = json_settings(directory / "special_tokens_map.json") | json_settings(directory / "tokenizer_config.json")
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=_Undefined, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Return JSON without the HTML escapes of jinja2's filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _without_marks(marked: str) -> tuple[str, list[Span]]:
    """Return the text without marks and the spans that they enclose."""
    text, spans = "", []
    for number, part in enumerate(marked.replace(CLOSE, OPEN).split(OPEN)):
        if number % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans
