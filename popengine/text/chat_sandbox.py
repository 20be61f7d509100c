"""Renders a chat template as Hugging Face does, in a process of its own that may use little and reach nothing.

A chat template is a program that came with somebody's checkpoint. `popengine.text.chat` runs this file as a script,
isolated (`python -I -S`), with one JSON object on stdin and one on stdout. It imports the standard library and jinja2.
"""

import json
import sys
import time
from datetime import datetime
from typing import Any, NoReturn

MEMORY_BYTES = 400_000_000


def limit_resources(seconds: int) -> None:
    """Sets limits on processor time and memory, where the system has them; nothing may be dumped or written."""
    try:
        import resource
    except ImportError:  # not POSIX: the time limit of the parent remains
        return
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (MEMORY_BYTES, MEMORY_BYTES),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, soft_and_hard in limits.items():
        try:
            resource.setrlimit(kind, soft_and_hard)
        except (ValueError, OSError):  # macOS refuses some
            continue


def close_the_door() -> None:
    """From here on no file, socket or pipe can be opened, whatever a template manages to call."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    except (ImportError, ValueError, OSError):
        return


def render_all(template: str, conversations: list[dict[str, Any]], longest: int) -> list[str | dict[str, str]]:
    """The text of each conversation, or why there is none; each is the dict of variables the template sees."""
    import jinja2.debug
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's words for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """jinja2's namespace without names that begin with an underscore, which Hugging Face refuses too."""

        def __init__(*arguments: Any, **names: Any) -> None:  # "self" may be among the names
            for name in dict(*arguments[1:], **names):
                refuse_underscore(name)
            jinja2.utils.Namespace.__init__(*arguments, **names)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_underscore(name)
            super().__setitem__(name, value)

    def refuse_underscore(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["namespace"] = Namespace
    # What Python and jinja2 read only when they need it, while files can be opened: the time zone, the codec of string
    # constants (and above jinja2.debug, which rewrites the traceback when a template fails).
    time.localtime()
    environment.from_string("{{ 'warm up' }}").render()
    close_the_door()

    compiled = environment.from_string(template)
    texts: list[str | dict[str, str]] = []
    for variables in conversations:
        try:
            text = compiled.render(variables)
            words = f"it writes {len(text)} letters, more than the {longest} that its messages and the context call for"
            texts.append(text if len(text) <= longest else {"error": words})
        except Exception as error:
            texts.append({"error": words_of(error)})
    return texts


def words_of(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    where = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
    return f"{where}{getattr(error, 'message', None) or str(error) or type(error).__name__}"


def main() -> None:
    try:
        request = json.load(sys.stdin)
        limit_resources(request["seconds"])
        sys.path.extend(request["python_path"])
        texts = render_all(request["template"], request["conversations"], request["longest"])
        answer: dict[str, Any] = {"texts": texts}
    except Exception as error:
        answer = {"error": words_of(error)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
