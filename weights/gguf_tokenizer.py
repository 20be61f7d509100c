"""The tokenizer of a .gguf file, rebuilt from its metadata with `tokenizers`.

Two kinds: "gpt2", byte-level BPE with merges, whose way of splitting text into words is named by
tokenizer.ggml.pre; and "llama", the BPE of sentencepiece with scores and byte fallback.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from weights.errors import InputError
from weights.gguf_header import Metadata

# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

# Every way to cut a piece of this length in two is tried; sentencepiece itself makes none longer than 16 by default.
LONGEST_PIECE = 128

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words_of_gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def digits_then_words() -> PreTokenizer:
    """Every digit by itself first, so that the spaces before a number are one run: what SmolLM was trained with."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words_of_gpt2()])


def words_by(pattern: str) -> PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# tokenizer.ggml.pre. Each of these was held to llama.cpp and to transformers; "default" is what the latter takes it for
# (a file says it when its converter did not know the tokenizer).
PRE_TOKENIZERS = {
    "default": words_of_gpt2,
    "gpt-2": words_of_gpt2,
    "smollm": digits_then_words,
    "llama-bpe": lambda: words_by(LLAMA3),
    "qwen2": lambda: words_by(QWEN2),
    "tekken": lambda: words_by(TEKKEN),
}
# A word that is a token is taken whole, whatever the merges say.
WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")
# These begin every text with the bos token unless the file says otherwise.
BEGIN_WITH_BOS = ("llama-bpe", "tekken")


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The `tokenizers.Tokenizer` that a .gguf file describes; InputError for a kind that is not supported."""
    kind = metadata.text("tokenizer.ggml.model")
    tokens = metadata.strings("tokenizer.ggml.tokens")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(f"{metadata.path} is corrupt: a token is twice in its vocabulary")
    types = metadata.numbers("tokenizer.ggml.token_type") if "tokenizer.ggml.token_type" in metadata else []
    if len(types) not in (0, len(tokens)):
        raise InputError(f"{metadata.path} is corrupt: {len(tokens)} tokens, but {len(types)} token types")

    try:
        if kind == "gpt2":
            tokenizer, begins = byte_level_tokenizer(metadata, vocabulary)
        elif kind == "llama":
            tokenizer, begins = sentencepiece_tokenizer(metadata, tokens, vocabulary, types), True
        else:
            raise InputError(f"{metadata.path} has a tokenizer of the kind {kind!r}; supported are 'gpt2' and 'llama'")
    except InputError:
        raise
    except Exception as error:  # tokenizers reports a contradiction in its input as a plain Exception
        raise InputError(f"{metadata.path}: its tokenizer cannot be built: {error}") from error

    of_type = [(token, number) for token, number in zip(tokens, types, strict=False) if token]
    tokenizer.add_special_tokens([special_token(token) for token, number in of_type if number == CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, number in of_type if number == USER_DEFINED])
    ends = metadata.flag("tokenizer.ggml.add_eos_token", default=False)
    begins = metadata.flag("tokenizer.ggml.add_bos_token", default=begins)
    tokenizer.post_processor = between(
        special_id(metadata, "bos") if begins else None, special_id(metadata, "eos") if ends else None, tokens
    )
    return tokenizer


def byte_level_tokenizer(metadata: Metadata, vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether such a one begins a text with bos when the file does not say."""
    pre = metadata.text("tokenizer.ggml.pre", default="default")
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{metadata.path}: its tokenizer splits text as {pre!r} (tokenizer.ggml.pre); supported are "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    merges = []
    for merge in metadata.strings("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise InputError(f"{metadata.path} is corrupt: the merge {merge!r} is not two tokens with a space between")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in WHOLE_WORDS_FIRST))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre in BEGIN_WITH_BOS


def sentencepiece_tokenizer(
    metadata: Metadata, tokens: list[str], vocabulary: dict[str, int], types: Any
) -> Tokenizer:
    """BPE over characters in which ▁ stands for a space, bytes as <0x..> where a character has no token."""
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise InputError(f"{metadata.path} is corrupt: {len(tokens)} tokens, but {len(scores)} scores")
    ordinary = [number not in (UNKNOWN, CONTROL) for number in types] or [True] * len(tokens)
    merges: list[tuple[float, str, str]] = []
    for token, score, may_be_merged in zip(tokens, scores, ordinary, strict=True):
        if not may_be_merged:
            continue
        if len(token) > LONGEST_PIECE:
            raise InputError(f"{metadata.path}: its tokenizer has a piece of {len(token)} characters")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((score, left, right))
    # sentencepiece joins the pair whose whole scores best; the sort keeps the order of equals.
    merges.sort(key=lambda merge: -merge[0])
    unknown = special_id(metadata, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for _, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Normalizer] = [normalizers.Replace(" ", "▁")]
    after: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.flag("tokenizer.ggml.add_space_prefix", default=True):
        steps.insert(0, normalizers.Prepend("▁"))
        after.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(after)
    return tokenizer


def between(bos: int | None, eos: int | None, tokens: list[str]) -> processors.TemplateProcessing | None:
    """What puts the bos token before a text and the eos token after it, each where it is not None."""
    marks = [(tokens[token_id], token_id) for token_id in (bos, eos) if token_id is not None]
    if not marks:
        return None
    pieces = [*([tokens[bos]] if bos is not None else []), "$A", *([tokens[eos]] if eos is not None else [])]
    return processors.TemplateProcessing(single=pieces, special_tokens=marks)


def special_token(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)


def special_id(metadata: Metadata, which: str) -> int | None:
    """The id of the "bos", "eos", "eot", "eom" or "unknown" token, None when the file names none."""
    key = f"tokenizer.ggml.{which}_token_id"
    if key not in metadata:
        return None
    token_id = metadata.whole(key)
    if not 0 <= token_id < len(metadata.strings("tokenizer.ggml.tokens")):
        raise InputError(f"{metadata.path}: {key} is {token_id}, which is not in its vocabulary")
    return token_id
