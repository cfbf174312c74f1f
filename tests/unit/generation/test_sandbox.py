"""What a chat template may not do, and that what is bounded does what Jinja does."""

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hybrid_train.generation.chat import ChatTemplate
from hybrid_train.schema.problems import UserError

USER = {"role": "user", "content": "Hi"}
DOUBLED = """{%% set n = namespace(x=%s) %%}
{%%- for i in range(40) %%}{%% set n.x = n.x %s n.x %%}{%% endfor %%}"""


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__class__.__mro__ }}",
        "{{ self.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ (9 ** 99999) ** 999 }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ '1'.zfill(10000000000) }}",
        r"{{ '\t'.expandtabs(10000000000) }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999).translate({97: 'b' * 9999}) }}",
        "{{ ('a' * 9999).join('b' * 9999) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10000000000) }}",
        "{{ '{0[0]}{0[0]}'.format(['a' * 9999999]) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%(a)s%(a)s' % {'a': 'b' * 9999999} }}",
        "{{ 'a'|center(10000000000) }}",
        r"{{ 'a\nb'|indent(10000000000) }}",
        "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999)|join('b' * 9999) }}",
        "{{ '%10000000000d'|format(1) }}",
        "{{ [1]|batch(10000000000, 0)|list }}",
        "{{ ('{:{w}}'|safe).format(1, w=10000000000) }}",
        "{{ messages|tojson(indent=10000000000) }}",
        DOUBLED % ("'ab'", "~"),
        DOUBLED % ("'ab'", "+"),
        DOUBLED % ("[1]", "+"),
        DOUBLED % (3, "*"),
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    ],
)
def test_what_no_template_may_do_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="tries what no template may do"):
        ChatTemplate("chat_template.jinja", source, {}).render([USER], {})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ '%5d|%-4s|%.1f|%%' % (3, 'a', 0.25) }}", "    3|a   |0.2|%"),
        ("{{ '%(a)s' % {'a': 'b'} }}{{ '%s, %s'|format(1, 'b') }}", "b1, b"),
        ("{{ '{0:>4}{b[c]}{{'.format(1, b={'c': 2}) }}", "   12{"),
        ("{{ 'a'.center(3) ~ '-'.join(['b', 'c']) ~ 1 }}", " a b-c1"),
        ("{{ [{'a': 1}, {'a': 2}]|join('+', attribute='a') }}", "1+2"),
        ("{{ 'a b'|replace(' ', '') }}{{ 'aa'.replace('a', 'b', 1) }}", "abba"),
        (r"{{ 'a\nb'|indent }}{{ 'c'|center(3) }}", "a\n    b c "),
        ("{{ 2 ** 10 + 1 }}{{ 7 % 4 }}{{ 2 ** -1 }}{{ [1] + [2] }}", "102530.5[1, 2]"),
        ("{{ [1, 2, 3]|batch(2, 0)|list }}", "[[1, 2], [3, 0]]"),
        ("{{ ('{}|'|safe).format('<') }}{{ '{a}'.format_map({'a': 1}) }}", "&lt;|1"),
        ("{{ '-'.join(messages|map(attribute='role')) }}", "user"),
        (
            "{% autoescape true %}{{ ['<', 'b'|safe]|join('<') ~ '<' }}{% endautoescape %}",
            "&amp;lt;&amp;lt;b&lt;",
        ),
        ("{{ messages|map(attribute='role')|join(', ') }}", "user"),
    ],
)
def test_what_is_bounded_does_what_jinja_does(source: str, text: str) -> None:
    assert ChatTemplate("chat_template.jinja", source, {}).render([USER], {}) == text
    assert ImmutableSandboxedEnvironment().from_string(source).render(messages=[USER]) == text
