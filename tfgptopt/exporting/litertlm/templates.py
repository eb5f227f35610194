"""Chat templates as LiteRT-LM renders them: with minijinja, in place of Jinja.

The engine puts the start token before a text itself, knows neither `bos_token` nor `eos_token`, and
gives the content of a message in parts, where templates expect a text.

Reference: https://github.com/google-ai-edge/LiteRT-LM, `runtime/components/prompt_template.cc`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

import jinja2
from jinja2 import nodes

from tfgptopt.generation.templates import ChatTemplate

# What the engine rewrites to filters; minijinja has no other methods.
_METHODS = (
    *("startswith", "endswith", "replace", "split", "join"),
    *("strip", "lstrip", "rstrip", "items"),
)
_UNKNOWN_FILTERS = (
    *("center", "filesizeformat", "forceescape", "random", "striptags", "truncate"),
    *("urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"),
)
# What marks answers for training, and writes nothing.
_GENERATION = re.compile(r"{%(-?)\s*(?:end)?generation\s*(-?)%}")
_AS_TEXT = (
    "{% set as_text = namespace(messages=[], content='') %}"
    "{% for message in messages %}{% set as_text.content = message.content %}"
    "{% if message.content is not string %}{% set as_text.content = '' %}"
    "{% for part in message.content or [] %}{% if part.type == 'text' %}"
    "{% set as_text.content = as_text.content + part.text %}"
    "{% endif %}{% endfor %}{% endif %}"
    "{% set as_text.messages = as_text.messages + [dict(message, content=as_text.content)] %}"
    "{% endfor %}{% set messages = as_text.messages %}"
)
# Of a new turn the engine reads what is written behind that of the turns before it, which must
# not end with more than the token at which the model stopped.
_WRITTEN = (
    "{% if messages and messages[-1].role == 'assistant' and not add_generation_prompt %}"
    "{{ written.rstrip() }}{% else %}{{ written }}{% endif %}"
)
# The engine holds conversations by a template only. This one continues their text.
_PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SAMPLE = (
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "How are you?"},
)


@dataclass(frozen=True)
class EngineTemplate:
    """A chat template for LiteRT-LM.

    Attributes:
        source: Jinja.
        starts: Whether the engine has to put the start token before what is written.
    """

    source: str
    starts: bool

    def render(self) -> str:
        """Returns a sample chat as the engine writes it, without the start token."""
        return ChatTemplate(self.source).render(SAMPLE, add_generation_prompt=True)


def engine_template(template: ChatTemplate | None) -> EngineTemplate:
    """Returns a template as LiteRT-LM needs it.

    Args:
        template: The template, or `None` for one that writes messages one behind the other.

    Raises:
        ValueError: If it has what the engine does not know, or writes `bos_token` elsewhere than
            at the beginning.
    """
    if template is None:
        return EngineTemplate(f"{_AS_TEXT}\n{_PLAIN}", False)
    # A comment in its place takes the same white space away; the engine's own way does not.
    source = _GENERATION.sub(r"{#\1 \2#}", template.source)
    unknown = _unknown_to_engine(source)
    if unknown:
        raise ValueError(
            f"The chat template has what LiteRT-LM does not know: {', '.join(unknown)}. It has "
            f"Jinja without break and continue, and of methods {', '.join(_METHODS)}."
        )
    written, rest = (
        one.render(SAMPLE, add_generation_prompt=True)
        for one in (template, replace(template, bos_token=""))
    )
    if written not in (rest, template.bos_token + rest):
        raise ValueError(
            "The chat template writes `bos_token` elsewhere than at its beginning. LiteRT-LM puts "
            "the start token there, and knows no `bos_token`: write its name out in the template."
        )
    # Jinja leaves the last line end of a template out, minijinja does not.
    source = source.removesuffix("\n")
    eos = json.dumps(template.eos_token, ensure_ascii=False)
    # The line end behind a block is not written.
    names = f"{{% set bos_token = '' %}}{{% set eos_token = {eos} %}}"
    answered = template.render(SAMPLE[:2])
    if not answered.endswith(template.stop_tokens) and answered.rstrip().endswith(
        template.stop_tokens
    ):
        source = f"{{% set written %}}\n{source}{{% endset %}}{_WRITTEN}"
    return EngineTemplate(f"{names}{_AS_TEXT}\n{source}", written != rest)


def _unknown_to_engine(source: str) -> list[str]:
    """Returns what a template has that LiteRT-LM does not know."""
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    found: dict[str, None] = {}
    kinds = (nodes.Call, nodes.Filter, nodes.Break, nodes.Continue)
    for node in tree.find_all(kinds):
        if isinstance(node, nodes.Call):
            method = node.node.attr if isinstance(node.node, nodes.Getattr) else _METHODS[0]
            name = "" if method in _METHODS else f".{method}()"
        elif isinstance(node, nodes.Filter):
            tuned = node.name == "tojson" and (node.args or node.kwargs)
            name = "tojson with arguments" if tuned else f"the filter {node.name}"
            name = name if tuned or node.name in _UNKNOWN_FILTERS else ""
        else:
            name = type(node).__name__.lower()
        if name:
            found[f"{name} (line {node.lineno})"] = None
    return list(found)
