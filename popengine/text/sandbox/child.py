"""The child process, which holds a checkpoint's tokenizer and renders its chat template as Hugging Face does.

Both are untrusted and may cause endless expressions, texts that explode in size, or panics of native code. process.py
starts this file as an isolated script (`python -I -S`) with the package folders. A request is a line of JSON on stdin,
its answer a line on stdout.
"""

import base64
import contextlib
import json
import signal
import sys
import time
from datetime import datetime
from typing import Any

sys.path += json.loads(sys.argv[1])
import jinja2.debug
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Processor time of a request, plus that of each of its letters; for `load`, of each byte of the file instead. Real
# tokenizers take a twentieth, a twentieth and a quarter of these; templates take milliseconds.
SECONDS, SECONDS_PER_LETTER, SECONDS_PER_BYTE = 1.0, 20e-6, 0.2e-6
# Address space likewise, with the bytes of the file at every request. Real use: a tenth, a third and three quarters.
MEMORY, MEMORY_PER_LETTER, MEMORY_PER_BYTE = 300_000_000, 500, 40
LONGEST_ANSWER = 50_000_000
MOST_ADDED = 32_000     # tokens beside the vocabulary: Gemma has 6,000, speech models about 29,000


def limit(seconds: float, memory: float) -> None:
    """Limit the process from now on: it ends beyond these limits, and can open no file. No effect outside POSIX."""
    with contextlib.suppress(ImportError):
        import resource

        signal.setitimer(signal.ITIMER_PROF, seconds)
        limits = {resource.RLIMIT_AS: (int(memory), resource.getrlimit(resource.RLIMIT_AS)[1])}
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_AS):
            with contextlib.suppress(ValueError, OSError):  # macOS refuses some
                resource.setrlimit(kind, limits.get(kind, (0, 0)))


class JsonTokenizer:
    """The tokenizer of a tokenizer.json. about: size of its vocabulary without added tokens"""

    BEFORE = "\ufdd0before\ufdd1"   # stands for the control token before a text

    def __init__(self, content: str) -> None:
        import tokenizers

        added = content.count('"single_word"')          # each has one
        if added > MOST_ADDED:
            raise ValueError(f"it has {added} added tokens, and at most {MOST_ADDED} are read")
        self.added_token = tokenizers.AddedToken
        self.backend = tokenizers.Tokenizer.from_str(content)
        self.backend.no_truncation()                    # the file may contain settings of a training run
        self.backend.no_padding()
        self.about = self.backend.get_vocab_size(with_added_tokens=False)

    def add(self, tokens: list[dict[str, Any]], special: bool) -> list[tuple[int, dict[str, Any]]]:
        made = [self.added_token(**token) for token in tokens]
        (self.backend.add_special_tokens if special else self.backend.add_tokens)(made)
        return [(number, token.__getstate__()) for number, token in self.backend.get_added_tokens_decoder().items()]

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool, begins: bool) -> list[int]:
        self.backend.encode_special_tokens = not parse_special
        if begins:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        self.backend.add_tokens([self.added_token(self.BEFORE, normalized=False)])
        before = self.backend.token_to_id(self.BEFORE)
        ids = self.backend.encode(self.BEFORE + text, add_special_tokens=add_special_tokens).ids
        return [number for number in ids if number != before]


class SentencePiece:
    """A sentencepiece model. about: pieces by id, ids of control and byte pieces, and of bos and eos (-1: none)"""

    def __init__(self, content: str) -> None:
        import sentencepiece

        # Protobuf merges appended fields: normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}.
        # Spaces are then handled here; the model's own normalization of characters stays.
        model = base64.b64decode(content) + b"\x1a\x04\x18\x00\x20\x00"
        self.backend = one = sentencepiece.SentencePieceProcessor(model_proto=model)
        numbers = range(one.get_piece_size())
        if not numbers:
            raise ValueError("no pieces")
        self.about = {
            "texts": [one.id_to_piece(number) for number in numbers], "bos": one.bos_id(), "eos": one.eos_id(),
            "controls": [number for number in numbers if one.is_control(number) or one.is_unknown(number)],
            "bytes": [number for number in numbers if one.is_byte(number)],
        }


class GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, which marks an assistant's turn for training; it yields its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Namespace(jinja2.utils.Namespace):
    """jinja2's namespace, without names that begin with an underscore (Hugging Face refuses them too)."""

    def __init__(*arguments: Any, **names: Any) -> None:  # "self" may be among the names
        jinja2.utils.Namespace.__init__(arguments[0])
        for name, value in dict(*arguments[1:], **names).items():
            arguments[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: str) -> None:
    """Raise a template error; templates call this."""
    raise jinja2.exceptions.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
           sort_keys: bool = False) -> str:     # jinja2's own filter escapes HTML
    """Write a value as JSON without escaping HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: str, conversations: list[dict[str, Any]], longest: int) -> list[str | dict[str, str]]:
    """Render each conversation, a dict of template variables. A text that fails is replaced by {"error": reason}."""
    environment = ImmutableSandboxedEnvironment(        # a new one, without state of other texts
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "namespace": Namespace,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    compiled, texts = environment.from_string(template), []
    for variables in conversations:
        try:
            text = compiled.render(variables)
            words = f"it writes {len(text)} letters, more than the {longest} that its messages and the context call for"
            texts.append(text if len(text) <= longest else {"error": words})
        except Exception as error:
            texts.append({"error": words_of(error)})
    return texts


def words_of(error: BaseException) -> str:
    """Return the reason of a failure in one text."""
    if isinstance(error, MemoryError | RecursionError):
        return "it needs too much memory" if isinstance(error, MemoryError) else "it nests too deeply"
    where = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
    return f"{where}{getattr(error, 'message', None) or str(error) or type(error).__name__}"


def main() -> None:
    """Answer requests: `load` with package and content first, then `render` and methods of the tokenizer.

    A method that the class above lacks is called on the library's tokenizer.
    """
    held: Any = None
    time.localtime(), render("{{ 'a constant' }}", [{}], 10)    # these read files on first use
    for line in sys.stdin:
        name, *words = json.loads(line)
        try:
            if name == "load":
                package, content = words
                __import__(package)
                memory = MEMORY + MEMORY_PER_BYTE * len(content)
                limit(SECONDS + SECONDS_PER_BYTE * len(content), memory)
                held = {"tokenizers": JsonTokenizer, "sentencepiece": SentencePiece}[package](content)
                answer = held.about
            else:
                limit(SECONDS + SECONDS_PER_LETTER * len(line), memory + MEMORY_PER_LETTER * len(line))
                method = render if name == "render" else getattr(held, name, None) or getattr(held.backend, name)
                answer = method(*words)
            written = json.dumps({"answer": answer})
            if len(written) > LONGEST_ANSWER:
                raise ValueError("its result for a text is too long")
        except BaseException as error:  # a panic in Rust is no Exception
            written = json.dumps({"error": words_of(error)})
        print(written, flush=True)


if __name__ == "__main__":
    main()
