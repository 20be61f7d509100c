"""Chat templates: the same text as transformers, and no harm from a template that means harm."""

import functools
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from popengine.text.chat import end_of_turn_token, read_chat_template, render_chat, render_chats
from popengine.text.sandbox import process
from popengine.text.sandbox.process import Sandbox
from popengine.text.tokenizer import FastTokenizer, open_tokenizer
from weights.errors import InputError

pytestmark = pytest.mark.usefixtures("started_sandboxes")

# Written here in the manner of the well-known formats.
CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are terse.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {% set turns = messages[1:] %}
{% else %}
    {% set system = '' %}
    {% set turns = messages %}
{% endif %}
{% for message in turns %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must take turns: user, assistant, user, ...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + message['content'].strip() + ' [/INST]' }}
    {%- else %}
{{ ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{% endfor %}
"""
LLAMA_3 = """\
{{- bos_token }}
{%- set ns = namespace(date=date_string if date_string is defined else 'today', count=0) %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim }}{{ '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}{# {{ ns.count }} turns, {{ ns.date }} #}
"""
MISTRAL = """\
{%- macro instruction(text) -%}[INST] {{ text }} [/INST]{%- endmacro -%}
{{ bos_token }}
{%- for message in messages if message.role != 'system' -%}
    {%- if loop.length > 20 %}{% break %}{% endif -%}
    {%- if message.role == 'user' %}{{ instruction(message.content) }}
    {%- else %}{% generation %}{{ ' ' ~ message.content ~ eos_token }}{% endgeneration %}
    {%- endif -%}
{%- endfor -%}
"""
FILTERS = """\
{{ messages | map(attribute='role') | join(',') }} {{ pad_token }} {{ messages | tojson }}
{{ messages | tojson(indent=2, sort_keys=true) }}
"""
LLAVA = """\
{% for message in messages %}
{{ message['role'] | upper }}: {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}
{{ '<image>\\n' }}{% endfor %}
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
{% endif %}
 {% endfor %}
{% if add_generation_prompt %}ASSISTANT:{% endif %}
"""

TEXT_CONVERSATIONS = [
    [{"role": "user", "content": " <b>Hi</b> & 'you' \"there\" "}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi 😀 é"},
        {"role": "assistant", "content": "Hello\n\nyou"},
        {"role": "user", "content": "{{ 1 + 1 }} {% raw %}"},
    ],
]
PICTURE_CONVERSATIONS = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
    [{"role": "user", "content": "No picture"}],
]
CASES = {
    "ChatML": (CHATML, TEXT_CONVERSATIONS),
    "Llama-2": (LLAMA_2, TEXT_CONVERSATIONS),
    "Llama-3": (LLAMA_3, TEXT_CONVERSATIONS),
    "Mistral": (MISTRAL, TEXT_CONVERSATIONS),
    "filters": (FILTERS, TEXT_CONVERSATIONS),
    "LLaVA": (LLAVA, PICTURE_CONVERSATIONS),
}
HELLO = [{"role": "user", "content": "Hello"}]
NO_TOKENS = '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'


def new_tokenizer(**tokens: str) -> FastTokenizer:
    tokens = tokens or {"bos_token": "<s>", "eos_token": "</s>"}
    return FastTokenizer(Sandbox("tokenizers", NO_TOKENS, "here"), template_tokens=tokens)


shared = functools.cache(new_tokenizer)


def render(template: str, tokenizer: FastTokenizer | None = None) -> str:
    return render_chat(template, HELLO, tokenizer or shared())


def words_of_failure(template: str) -> str:
    with pytest.raises(InputError) as error:
        render(template)
    message = str(error.value)
    assert message.startswith("the chat template failed: ")
    assert "--raw" in message
    assert message.isprintable()
    assert len(message) < 400
    return message


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_text_equals_transformers(name: str, add_generation_prompt: bool) -> None:
    template, conversations = CASES[name]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    reference = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **tokens)
    expected = [
        reference.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        for messages in conversations
    ]
    assert expected == render_chats(template, conversations, shared(), add_generation_prompt=add_generation_prompt)


def test_a_token_that_is_absent_renders_as_nothing() -> None:
    assert render_chat("[{{ bos_token }}|{{ eos_token }}]", HELLO, new_tokenizer(eos_token="</s>")) == "[|</s>]"


NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "image_token",
         "prefix_token")


@pytest.mark.parametrize("case", range(12))
def test_a_template_may_use_whatever_token_has_a_name(tmp_path: Path, case: int) -> None:
    """Any of them, as text or with flags, in either file, beside transformers' reading of the same files."""
    source = random.Random(case)
    named = {name: f"<{name}>" for name in NAMES if source.random() < 0.5}
    given = {
        name: {"__type": "AddedToken", "content": token, "special": True} if source.random() < 0.5 else token
        for name, token in named.items()
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {n: v for n, v in given.items() if source.random() < 0.7}
    if case % 3 == 0:
        config["extra_special_tokens"] = {"video_token": "<video>", "end_of_video": "<end>"}
    files = {"tokenizer_config.json": config, "special_tokens_map.json": given}
    if case % 2:
        config["added_tokens_decoder"] = {"0": {"content": "a", "special": False}}      # then the map is not read
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    template = "".join(
        f"{{{{ {name} }}}}{{{{ {name} is defined }}}}|" for name in (*NAMES, "video_token", "end_of_video")
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(HELLO, chat_template=template, tokenize=False)
    assert render_chat(template, HELLO, open_tokenizer(tmp_path)) == expected
    assert "True" in expected


def test_the_additional_tokens_are_a_list(tmp_path: Path) -> None:
    """As in transformers 4; a name of an extra token does not hide what a template is given."""
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    config = {"additional_special_tokens": ["<a>", {"content": "<b>"}], "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = "{{ additional_special_tokens | join(',') }} {{ pad_token is defined }}"
    assert render_chat(template, HELLO, open_tokenizer(tmp_path)) == "<a>,<b> False"
    config = {"extra_special_tokens": {"messages": "<a>", "tools": "<b>", "longest": "<c>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = "{{ messages[0].content }} {{ tools is none }} {{ longest }}"
    assert render_chat(template, HELLO, open_tokenizer(tmp_path)) == "Hello True <c>"


def test_the_current_time_can_be_written() -> None:
    assert render("{{ strftime_now('%Y-%m-%d') }}") in {
        time.strftime("%Y-%m-%d", time.localtime(time.time() - seconds)) for seconds in (0, 5)
    }


# --- finding the template


def test_template_files_in_their_order(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from the configuration"}))
    assert read_chat_template(tmp_path) == "from the configuration"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from the processor"}))
    assert read_chat_template(tmp_path) == "from the processor"
    (tmp_path / "chat_template.jinja").write_text("from jinja é", encoding="utf-8")
    assert read_chat_template(tmp_path) == "from jinja é"


def test_default_of_several_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert read_chat_template(tmp_path) == "plain"


@pytest.mark.parametrize(
    "config", ["{", '{"chat_template": 3}', '{"chat_template": [{"name": "rag", "template": "x"}]}']
)
def test_broken_template_declaration_is_one_line(tmp_path: Path, config: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError) as error:
        read_chat_template(tmp_path)
    assert "tokenizer_config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_template_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"chat_template\.jinja is not UTF-8 text"):
        read_chat_template(tmp_path)


# --- templates that fail, or mean harm


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only\nuser \x1b[2J turns') }}", "only user \\x1b[2J turns"),
        ("ok\n{% for x in messages %}", "line 2: Unexpected end of template"),
        ("{{ messages.first.content }}", "no attribute 'first'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'other' %}", "no loader"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "nests too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nests too deeply"),
        ("{{ 'x' * 10 ** 10 }}", "memory"),
        ("{{ 'x' * 10000000 }}", "10000000 letters, more than the"),
        ("{{ messages[0].content * 10 ** 10 }}", "memory"),
        ("{{ '%10000000000d' % 1 }}", "memory"),
        ("{{ '{:>10000000000}'.format(1) }}", "memory"),
        ("{{ 'x' | center(10000000000) }}", "memory"),
        ("{{ range(10000000) }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ raise_exception.__globals__.sys }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set names = namespace(__class__=1) %}", "__class__"),
        ("{% set names = namespace() %}{% set names.__class__ = 1 %}", "__class__"),
    ],
)
def test_failing_template_is_one_line_that_says_why(template: str, words: str) -> None:
    assert words in words_of_failure(template)


def test_endless_template_is_stopped() -> None:
    start = time.monotonic()
    rounds = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    assert "too long" in words_of_failure(rounds)
    assert time.monotonic() - start < process.WALL_SECONDS


def test_wall_clock_stops_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WALL_SECONDS", 0.5)
    assert "longer than" in words_of_failure("{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3)


def test_sandbox_process_can_neither_read_nor_write(tmp_path: Path) -> None:
    """What a template that got out of jinja2's sandbox would find: no file, socket or program can be opened."""
    target = tmp_path / "written"
    program = f"""
import sys
sys.path.insert(0, {str(process.CHILD.parent)!r})
sys.argv = ["child", "[]"]
import child, socket, subprocess
child.limit(5, 400_000_000)
assert child.render("ok", [{{}}], 10) == ["ok"]
for attempt in (lambda: open({str(target)!r}, "w"), lambda: open("/etc/hostname"), socket.socket,
                lambda: subprocess.run(["true"], capture_output=True)):
    try:
        attempt()
    except OSError:
        continue
    print("opened")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not target.exists()


def test_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    start = subprocess.Popen
    monkeypatch.setenv("SOME_TOKEN", "secret")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: seen.update(kwargs) or start(*args, **kwargs))
    assert render("ok", new_tokenizer()) == "ok"
    assert "SOME_TOKEN" not in seen["env"]


def test_current_directory_cannot_interfere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jinja2", "json", "markupsafe", "datetime", "resource", "popengine"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong module was imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` does
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert render(CHATML, new_tokenizer()).endswith("<|im_start|>assistant\n")


def test_deleted_current_directory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    os.rmdir(gone)
    assert render("ok", new_tokenizer()) == "ok"


def test_missing_interpreter_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    shared().sandbox.stop()
    assert "could not be started" in words_of_failure("ok")
    with pytest.raises(InputError, match=r"^here: .*Python could not be started"):
        new_tokenizer()


def test_the_process_of_a_checkpoint_can_open_nothing() -> None:
    tokenizer = new_tokenizer()
    assert tokenizer.sandbox.process is not None
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        assert resource.prlimit(tokenizer.sandbox.process.pid, kind) == (0, 0)


def test_one_text_leaves_nothing_for_the_next() -> None:
    keeps = "{% if ns is not defined %}{% set ns = namespace(n=0) %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    assert [render(keeps), render(keeps)] == ["1", "1"]
    macro = "{% macro said() %}x{% endmacro %}{{ said() }}"
    assert render(macro) == "x" and "undefined" in words_of_failure("{{ said() }}")


# --- the end of a turn


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    return FastTokenizer(Sandbox("tokenizers", backend.to_str(), "here"), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA_3, "<|eot_id|>"),
        (LLAMA_2, "</s>"),
        (MISTRAL, "</s>"),
        (LLAVA, None),
        ("{% for m in messages %}{{ m.content }}### {% endfor %}", None),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}</s>{% endif %}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{% nonsense", None),
    ],
)
def test_end_of_turn_token(tokenizer: FastTokenizer, template: str, token: str | None) -> None:
    expected = None if token is None else tokenizer.token_id(token)
    assert end_of_turn_token(template, tokenizer) == expected


def test_a_template_that_runs_away_takes_no_tokens_with_it(tokenizer: FastTokenizer) -> None:
    text = "<s>Hello<|im_end|> <|eot_id|>"
    ids, ran = tokenizer.encode(text, add_special_tokens=False), tokenizer.sandbox.process
    with pytest.raises(InputError, match="too long"):
        render("{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3, tokenizer)
    assert ran is not None and ran.poll() is not None
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert len(tokenizer.special_ids & set(ids)) == 3
