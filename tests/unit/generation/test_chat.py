"""Chat templates against transformers, and what is wrong with templates and messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.generation.chat import ChatTemplate, open_template, require_messages
from hybrid_train.schema.problems import UserError

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA_3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + strftime_now("%d %b %Y") + "\n\n" }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception("roles are user, assistant and tool, not " + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message.content is string %}{{- message['content'] | trim + '<|eot_id|>' }}
    {%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# As the Nemotron 3 models have it: macro, namespace, thinking of earlier turns cut, an open think.
NEMOTRON = """{% macro block(role, text) %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{%- set enable_thinking = enable_thinking if enable_thinking is defined else true %}
{%- set ns = namespace(last_user=-1, system='') %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}
{{- block('system', ns.system) }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- if m.role == 'assistant' %}
        {%- set said = m.reasoning_content %}
        {%- if said is string and said | trim and loop.index0 > ns.last_user %}
            {%- set text = '<think>\n' + said + '\n</think>\n' + (m.content or '') %}
        {%- else %}{% set text = '<think></think>' + (m.content or '') %}{% endif %}
        {%- for call in m.tool_calls or [] %}
            {%- set arguments = call.function.arguments | tojson %}
            {%- set text = text ~ '<tool_call>' ~ call.function.name ~ arguments %}
        {%- endfor %}
        {%- generation %}{{ block('assistant', text) }}{% endgeneration %}
    {%- elif m.role == 'tool' %}{{ block('user', '<tool_response>' ~ m.content) }}
    {%- else %}
        {%- set low = low_effort is defined and low_effort and loop.last %}
        {{- block(m.role, m.content ~ ('\n\n{reasoning effort: low}' if low else '')) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}{{ '<think>\n' if enable_thinking else '<think></think>' }}
{%- endif %}
"""
USER = {"role": "user", "content": " What is 'x' <b>&</b> \u20ac?\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant", "content": None, "reasoning": "a tool will know",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "\u00e9<"}}}],
}  # fmt: skip
RESULT = {"role": "tool", "content": "7"}
SAID = {"role": "assistant", "content": "Nothing.", "reasoning_content": "hm"}
CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "several": [SYSTEM, USER, SAID, USER],
    "tool": [USER, CALL, RESULT],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "string"}}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer without a template, whose special tokens a template may read."""
    place = tmp_path_factory.mktemp("tokenizer")
    names = ("</s>", "<|im_start|>", "<|im_end|>")
    train_byte_level_bpe(["a"], vocab_size=260, special_tokens=names).save(place)
    return place


def with_settings(folder: Path, copy: Path, **settings: Any) -> Path:
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = copy / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return copy


def template(source: str) -> ChatTemplate:
    return ChatTemplate("chat_template.jinja", source, {"bos_token": "</s>", "eos_token": "</s>"})


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    ("source", "variables"),
    [
        (CHATML, {}),
        (LLAMA_3, {}),
        (NEMOTRON, {}),
        (NEMOTRON, {"enable_thinking": False}),
        (NEMOTRON, {"enable_thinking": True, "low_effort": True}),
    ],
    ids=["ChatML", "Llama 3", "Nemotron", "thinking off", "effort"],
)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_the_text_is_that_of_transformers(
    folder: Path, tmp_path: Path, chat: str, source: str, variables: dict[str, Any], tools: Any
) -> None:
    if chat == "tool" and source != NEMOTRON:
        return  # the others have no words for it
    place = with_settings(folder, tmp_path / "t", chat_template=source)
    theirs = PreTrainedTokenizerFast.from_pretrained(place).apply_chat_template(
        CHATS[chat], tools=tools, tokenize=False, add_generation_prompt=True, **variables
    )
    own = open_template([place], None, has_tools=tools is not None)
    assert own.render(require_messages(CHATS[chat]), variables, tools) == theirs


def test_a_file_counts_before_settings_and_names_choose(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    place = with_settings(folder, tmp_path / "t", chat_template=named)
    theirs = PreTrainedTokenizerFast.from_pretrained(place)
    for tools in (None, TOOLS):
        own = open_template([place], None, has_tools=tools is not None)
        assert own.source == theirs.get_chat_template(tools=tools)
    (place / "chat_template.jinja").write_text("file")
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "rag.jinja").write_text("more")
    assert open_template([place], None, has_tools=False).source == "file"
    assert open_template([place], "rag", has_tools=False).source == "more"
    with pytest.raises(UserError, match=r"has default, rag, tool_use; nearest: template=rag"):
        open_template([place], "rga", has_tools=False)


def test_a_folder_without_a_template_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has none \(chat_template.jinja"):
        open_template([folder], None, has_tools=False)


@pytest.mark.parametrize("is_on", [True, False])
def test_reasoning_is_switched_by_the_variable_that_the_template_reads(is_on: bool) -> None:
    own = template(NEMOTRON)
    text = own.render([USER], own.with_reasoning(is_on=is_on))
    assert text.endswith("<think>\n" if is_on else "<think></think>")
    assert template("{{ thinking }}").with_reasoning(is_on=is_on) == {"thinking": is_on}


def test_switches_and_variables_that_do_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="has no variable for it"):
        template(CHATML).with_reasoning(is_on=True)
    with pytest.raises(UserError, match="reads no low_efort; nearest: low_effort"):
        template(NEMOTRON).require_variables(["low_efort"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", r"is no template: .*\(line 1\)"),
        ("{{ raise_exception('Only users, please') }}", "refuses the messages: Only users, please"),
        (r"{{ raise_exception('a\x1b[2Jb\nc') }}", "refuses the messages: a \\[2Jb c"),
        ("{{ messages[0].content + 1 }}", "refuses the messages"),
        ("{{ 1 / 0 }}", "refuses the messages: division by zero"),
        ("{% for i in range(10000000) %}{% endfor %}", "refuses the messages"),
        ("{% include '/etc/passwd' %}", "refuses the messages"),
        ("", "makes an empty text of the messages"),
        ("{% if false %}a{% endif %}", "makes an empty text of the messages"),
        (r"{{ '\ud800' }}", "which is no character"),
    ],
)
def test_what_goes_wrong_in_a_template_is_a_sentence(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        template(source).render([USER], {})


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ("hello", "must be a list"),
        ([{"content": "a"}], "message 1 must be like"),
        ([{"role": "usr", "content": "a"}], "message 1 is of 'usr'.*nearest: user"),
        ([USER, {"role": "user"}], "message 2 needs content"),
        ([{"role": "user", "content": 3}], "message 1 needs content"),
        ([USER, SAID], "nothing to answer"),
    ],
)
def test_messages_that_are_none_are_refused(messages: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        require_messages(messages)
