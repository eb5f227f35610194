"""Chat templates as LiteRT-LM renders them: with minijinja, in place of Jinja.

The engine puts the start token before a text itself, and knows neither `bos_token` nor `eos_token`.

Reference: https://github.com/google-ai-edge/LiteRT-LM, `runtime/components/prompt_template.cc`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import jinja2
import jinja2.nodes

from tfgptopt.generation.templates import ChatTemplate

# What is rewritten to filters there; minijinja has no other methods.
_METHODS = (
    "startswith",
    "endswith",
    "replace",
    "split",
    "join",
    "strip",
    "lstrip",
    "rstrip",
    "items",
)
# The engine holds conversations by a template only. This one continues their text.
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
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


def engine_template(template: ChatTemplate) -> EngineTemplate:
    """Returns a template as LiteRT-LM needs it.

    Args:
        template: The template.

    Raises:
        ValueError: If it calls what the engine does not know, or writes `bos_token` elsewhere than
            at the beginning.
    """
    _check_methods(template.source)
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
    source = template.source.removesuffix("\n")
    eos = json.dumps(template.eos_token, ensure_ascii=False)
    # The line end behind a block is not written.
    source = f"{{% set bos_token = '' %}}{{% set eos_token = {eos} %}}\n{source}"
    return EngineTemplate(source, written != rest)


def _check_methods(source: str) -> None:
    """Raises where a template calls a method that LiteRT-LM does not know.

    Raises:
        ValueError: If it does.
    """
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
        source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    for call in tree.find_all(jinja2.nodes.Call):
        if isinstance(call.node, jinja2.nodes.Getattr) and call.node.attr not in _METHODS:
            raise ValueError(
                f"The chat template calls `.{call.node.attr}()` in line {call.lineno}, which "
                f"LiteRT-LM does not know. It knows {', '.join(_METHODS)}, and Jinja's filters."
            )
