"""The tokenizer of a .gguf file, written from its metadata as a tokenizer.json.

Two kinds are supported. "gpt2" is byte-level BPE with merges; tokenizer.ggml.pre names how it splits text into words.
"llama" is the BPE of sentencepiece, with scores and byte fallback.
"""

import json
from typing import Any

from weights.errors import InputError
from weights.gguf_header import Metadata

# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

# Bound on a piece, since every way to cut it in two is tried; sentencepiece makes none above 16 by default.
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


WORDS_OF_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def in_order(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    """Return a sequence of tokenizer.json steps."""
    return {"type": "Sequence", kind: list(steps)}


def words_by(pattern: str) -> dict[str, Any]:
    """Return the byte-level pre-tokenizer that splits text by a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return in_order("pretokenizers", split, WORDS_OF_GPT2 | {"use_regex": False})


# Pre-tokenizers, each by the best known value of tokenizer.ggml.pre. Each was compared with llama.cpp and transformers.
# "default" (the converter did not know the tokenizer) is read as transformers reads it.
PRE_TOKENIZERS = {
    "default": WORDS_OF_GPT2,
    "gpt-2": WORDS_OF_GPT2,
    # Digits are split first, so that the spaces before a number are one run, as in the training of SmolLM.
    "smollm": in_order("pretokenizers", {"type": "Digits", "individual_digits": True}, WORDS_OF_GPT2),
    "llama-bpe": words_by(LLAMA3),
    "qwen2": words_by(QWEN2),
    "tekken": words_by(TEKKEN),
}
# llama.cpp's other names for the same pre-tokenizers (src/llama-vocab.cpp: names to kinds in llama_vocab::impl::load,
# kinds to expressions in llm_tokenizer_bpe).
SAME_SPLIT = {
    "gpt-2": (
        "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "modern-bert",
        "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4",
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "llama-bpe": (
        "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "dbrx",
        "smaug-bpe", "glm4", "chatglm-bpe",
    ),
    "qwen2": (
        "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2",
    ),
}
SPLITS = {other: pre for pre, others in SAME_SPLIT.items() for other in others} | {pre: pre for pre in PRE_TOKENIZERS}
# For these names a word that is a token ignores the merges, and a text begins with the bos token unless the file says
# otherwise. llama.cpp does neither for the other names of Llama's split.
WHOLE_WORDS_FIRST = tuple(
    name for name, pre in SPLITS.items()
    if pre in ("llama-bpe", "tekken") and name not in ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe")
)

# Special tokens that always end a turn (llama-vocab.cpp, special_eog_ids), because older files of chat models name
# only the token that ends a text.
ENDS_OF_TURNS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
)
# Default ids of a "llama" vocabulary.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def tokenizer_json(metadata: Metadata) -> str:
    """Write the tokenizer.json that a .gguf file describes. Raises InputError for an unsupported kind."""
    kind = metadata.text("tokenizer.ggml.model")
    # As in llama.cpp, because several tokens of a padded vocabulary may have no text.
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(metadata.strings("tokenizer.ggml.tokens"))]
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocabulary) != len(tokens):
        raise InputError(f"{metadata.path} is corrupt: a token is twice in its vocabulary")
    types = token_types(metadata)
    if len(types) not in (0, len(tokens)):
        raise InputError(f"{metadata.path} is corrupt: {len(tokens)} tokens, but {len(types)} token types")

    if kind == "gpt2":
        parts, begins = byte_level_parts(metadata)
    elif kind == "llama":
        parts, begins = sentencepiece_parts(metadata, tokens, vocabulary, types), True
    else:
        raise InputError(f"{metadata.path} has a tokenizer of the kind {kind!r}; supported are 'gpt2' and 'llama'")

    ends = metadata.flag("tokenizer.ggml.add_eos_token", default=False)
    begins = metadata.flag("tokenizer.ggml.add_bos_token", default=begins)
    bos, eos = special_id(metadata, "bos") if begins else None, special_id(metadata, "eos") if ends else None
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    text = json.dumps({
        "version": "1.0",
        "added_tokens": [
            {"id": token_id, "content": token, "special": number == CONTROL, **plain}
            for (token, token_id), number in zip(vocabulary.items(), types, strict=False)
            if number in (CONTROL, USER_DEFINED)
        ],
        "post_processor": between(bos, eos, tokens),
        **parts,
    })
    # Written separately: json.dumps first turns a dict into a list of tuples, which the garbage collector traverses.
    quoted = json.dumps(tokens, separators=("\n", ":"))[1:-1].split("\n")            # a quoted text has no line break
    written = ", ".join([f"{token}: {token_id}" for token_id, token in enumerate(quoted)])
    return text.replace('"vocab": null', f'"vocab": {{{written}}}', 1)     # a text's own quotes have a backslash before


def byte_level_parts(metadata: Metadata) -> tuple[dict[str, Any], bool]:
    """Return byte-level BPE, and its default for whether a text begins with bos."""
    pre = metadata.text("tokenizer.ggml.pre", default="default")
    if pre not in SPLITS:
        raise InputError(
            f"{metadata.path}: its tokenizer splits text as {pre!r} (tokenizer.ggml.pre); supported are "
            f"{', '.join(PRE_TOKENIZERS)}, and llama.cpp's other names for the same"
        )
    split = SPLITS[pre]
    parts = {
        "normalizer": {"type": "NFC"} if split == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[split],
        "model": {
            "type": "BPE", "vocab": None, "merges": metadata.strings("tokenizer.ggml.merges"),
            "ignore_merges": pre in WHOLE_WORDS_FIRST,
        },
        "decoder": WORDS_OF_GPT2,
    }
    return parts, pre in WHOLE_WORDS_FIRST


def sentencepiece_parts(
    metadata: Metadata, tokens: list[str], vocabulary: dict[str, int], types: list[int]
) -> dict[str, Any]:
    """Return BPE over characters, with ▁ for a space and bytes <0x..> for characters without a token."""
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise InputError(f"{metadata.path} is corrupt: {len(tokens)} tokens, but {len(scores)} scores")
    ordinary = [number not in (UNKNOWN, CONTROL) for number in types] or [True] * len(tokens)
    pieces = [number for number, may_be_merged in enumerate(ordinary) if may_be_merged]
    if (longest := max((len(tokens[number]) for number in pieces), default=0)) > LONGEST_PIECE:
        raise InputError(f"{metadata.path}: its tokenizer has a piece of {longest} characters")
    # sentencepiece merges the pair whose result has the highest score; the sort is stable.
    pieces.sort(key=lambda number: -scores[number])
    merges = [
        (left, right) for token in map(tokens.__getitem__, pieces) for cut in range(1, len(token))
        if (left := token[:cut]) in vocabulary and (right := token[cut:]) in vocabulary
    ]
    unknown = special_id(metadata, "unknown")
    before: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    after: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
    ]
    if metadata.flag("tokenizer.ggml.add_space_prefix", default=True):
        before.insert(0, {"type": "Prepend", "prepend": "▁"})
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": in_order("normalizers", *before),
        "model": {
            "type": "BPE",
            "vocab": None,
            "merges": merges,
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
        "decoder": in_order("decoders", *after),
    }


def between(bos: int | None, eos: int | None, tokens: list[str]) -> dict[str, Any] | None:
    """Return the post-processor that adds bos before a text and eos after it, unless they are None."""
    marks = {token_id: {"SpecialToken": {"id": tokens[token_id], "type_id": 0}}
             for token_id in (bos, eos) if token_id is not None}
    if not marks:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*([marks[bos]] if bos is not None else []), text, *([marks[eos]] if eos is not None else [])],
        "pair": [],
        "special_tokens": {
            tokens[token_id]: {"id": tokens[token_id], "ids": [token_id], "tokens": [tokens[token_id]]}
            for token_id in marks
        },
    }


def token_types(metadata: Metadata) -> list[int]:
    """Return the type of each token, or [] if the file has none."""
    return metadata.numbers("tokenizer.ggml.token_type").tolist() if "tokenizer.ggml.token_type" in metadata else []


def special_id(metadata: Metadata, which: str) -> int | None:
    """Return the id of the "bos", "eos", "eot", "eom" or "unknown" token, or None.

    If the key is absent, a sentencepiece vocabulary has llama.cpp's default, and any other has none.
    """
    key = f"tokenizer.ggml.{which}_token_id"
    count = len(metadata.strings("tokenizer.ggml.tokens"))
    if key not in metadata:
        usual = SENTENCEPIECE_IDS.get(which) if metadata.text("tokenizer.ggml.model", "") == "llama" else None
        return usual if usual is not None and usual < count else None
    token_id = metadata.whole(key)
    if not 0 <= token_id < count:
        raise InputError(f"{metadata.path}: {key} is {token_id}, which is not in its vocabulary")
    return token_id


def ends_of_turns(metadata: Metadata) -> list[int]:
    """Return every id that ends a text or a turn: those named in the file, and special tokens that always do."""
    named = [special_id(metadata, which) for which in ("eos", "eot", "eom")]
    tokens = metadata.strings("tokenizer.ggml.tokens")
    types = token_types(metadata)
    special = [
        token_id for token_id, (token, number) in enumerate(zip(tokens, types, strict=False))
        if number == CONTROL and token in ENDS_OF_TURNS
    ]
    return list(dict.fromkeys([token_id for token_id in named if token_id is not None] + special))
