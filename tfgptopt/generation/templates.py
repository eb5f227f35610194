"""Chat templates: Jinja that writes messages out as text, as Hugging Face's tokenizers have it."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tfgptopt.file.metadata import Chat
from tfgptopt.generation.tokenizing import TextTokenizer

Message = Mapping[str, str]
ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"<[^<>\s]{1,40}>")
# A code point that no text has: it stands in names of special tokens that are text.
_SHIELD = "\ufdd0"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks answers in templates of newer models."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """How messages are written out as text.

    Args:
        source: Jinja over `messages` (dictionaries of `role` and `content`), `bos_token`,
            `eos_token` and `add_generation_prompt`, with `raise_exception(text)` and
            `strftime_now(format)`. It runs in a sandbox.
        stop_tokens: Names of the tokens that end an answer. Defaults to none.
        bos_token: What the template calls so. Defaults to `""`.
        eos_token: What the template calls so. Defaults to `""`.

    Raises:
        ValueError: If the template does not compile.

    Example:

    ```python
    from tfgptopt.data import ChatTemplate

    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}")
    print(template.render([{"role": "user", "content": "Hello"}]))
    ```

    Reference: https://huggingface.co/docs/transformers/chat_templating
    """

    source: str
    stop_tokens: tuple[str, ...] = ()
    bos_token: str = ""
    eos_token: str = ""

    def __post_init__(self) -> None:
        try:
            _compiled(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"The chat template does not compile: {error.message} (line {error.lineno})."
            ) from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns messages as text.

        Args:
            messages: The messages.
            add_generation_prompt: Whether the text ends with what begins an answer. Defaults to
                `False`.

        Raises:
            ValueError: If the template refuses the messages, or fails.
        """
        try:
            return _compiled(self.source).render(
                messages=[dict(message) for message in messages],
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template refuses the messages: {error}") from None
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"The chat template fails on the messages: {error!r}") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the template that may be special tokens."""
        found = {*_NAME.findall(self.source), *self.stop_tokens, self.bos_token, self.eos_token}
        return tuple(sorted(found - {""}))

    def to_metadata(self) -> Chat:
        """Returns the template as a file holds it."""
        return Chat(self.source, self.bos_token, self.eos_token, self.stop_tokens)

    @classmethod
    def from_metadata(cls, chat: Chat) -> ChatTemplate:
        """Returns the template that a file holds."""
        return cls(chat.template, chat.stop_tokens, chat.bos_token, chat.eos_token)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )

    def raise_exception(text: str) -> None:
        raise jinja2.TemplateError(text)

    def tojson(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def check_messages(messages: object, where: str = "The messages") -> list[dict[str, str]]:
    """Returns messages as dictionaries of `role` and `content`.

    Args:
        messages: A list of those.
        where: What an error message calls them. Defaults to `"The messages"`.

    Raises:
        ValueError: If they are no such list, empty, or have an unknown role.
    """
    if isinstance(messages, str | bytes | Mapping) or not hasattr(messages, "__iter__"):
        raise ValueError(f"{where}: expected a list of role and content. Received: {messages!r}")
    found: list[dict[str, str]] = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}: a message has 'role' and 'content'. Received: {message!r}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(
                f"{where}: the role {role!r} is unknown. Known ones: {', '.join(ROLES)}."
            )
        if not isinstance(content, str):
            raise ValueError(f"{where}: the content of a message is text. Received: {content!r}")
        found.append({"role": role, "content": content})
    if not found:
        raise ValueError(f"{where}: there are none.")
    return found


def shielded(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Returns messages in which names of special tokens are text; `encode_written` reads them."""
    return [
        {
            "role": message["role"],
            "content": _NAME.sub(
                lambda found: "<" + _SHIELD + found[0][1:], message["content"].replace(_SHIELD, "")
            ),
        }
        for message in messages
    ]


def encode_written(tokenizer: TextTokenizer, text: str, begins: bool = True) -> list[int]:
    """Returns the ids of what a template wrote: its special tokens, and text between them.

    Args:
        tokenizer: The tokenizer, which knows the special tokens.
        text: What was written of `shielded` messages, or a part of it.
        begins: Whether it is the beginning, where a tokenizer may put a space. Defaults to `True`.
    """
    specials = tokenizer.specials
    names = sorted(specials, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids: list[int] = []
    for part in parts:
        if part in specials:
            ids.append(specials[part])
            continue
        part = part.replace(_SHIELD, "")
        if tokenizer.prefixed and (ids or not begins) and part.startswith(" "):
            part = part[1:]  # The tokenizer puts one there.
        if part:
            ids += tokenizer.encode(part, special_tokens=False)
    return ids


_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _chatml_with(system: str) -> str:
    """Returns ChatML that begins with a message of the system where a chat has none."""
    return (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\n" + system + "<|im_end|>\\n' }}"
        "{% endif %}" + _CHATML
    )


_GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] | trim + '\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns of user and assistant must alternate, the user first.') }}"
    "{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) "
    "+ '\\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_GEMMA4 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' "
    "+ message['content'] | trim + '<turn|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_PHI3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Those of published models, shortened to what turns of text need.
KNOWN: dict[str, ChatTemplate] = {
    "gemma": ChatTemplate(_GEMMA, ("<end_of_turn>",), "<bos>", "<eos>"),
    "gemma4": ChatTemplate(_GEMMA4, ("<turn|>",), "<bos>", "<eos>"),
    "llama3": ChatTemplate(
        _LLAMA3, ("<|eot_id|>", "<|end_of_text|>"), "<|begin_of_text|>", "<|eot_id|>"
    ),
    "chatml": ChatTemplate(_CHATML, ("<|im_end|>",), "", "<|im_end|>"),
    "qwen": ChatTemplate(
        _chatml_with("You are a helpful assistant."),
        ("<|im_end|>", "<|endoftext|>"),
        "",
        "<|im_end|>",
    ),
    "smollm": ChatTemplate(
        _chatml_with("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("<|im_end|>",),
        "<|im_start|>",
        "<|im_end|>",
    ),
    "phi3": ChatTemplate(_PHI3, ("<|end|>", "<|endoftext|>"), "<s>", "<|endoftext|>"),
}

# Tokens of turns, which are no text whether or not a model has a template.
TURN_TOKENS = tuple(
    sorted(
        {name for template in KNOWN.values() for name in template.names}
        | {"<|user|>", "<|assistant|>", "<|system|>", "<start_of_image>", "<end_of_image>"}
    )
)


def get_template(template: ChatTemplate | str) -> ChatTemplate:
    """Returns a template from itself, the name of a known one, or Jinja.

    Raises:
        ValueError: If it is none of these, or does not compile.
    """
    if isinstance(template, ChatTemplate):
        return template
    if isinstance(template, str) and template in KNOWN:
        return KNOWN[template]
    if isinstance(template, str) and "{" in template:
        return ChatTemplate(template)
    raise ValueError(
        f"A chat template is one of {', '.join(KNOWN)}, Jinja, or a `ChatTemplate`. "
        f"Received: {template!r}"
    )
