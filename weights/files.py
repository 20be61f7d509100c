"""Names of the files of a Hugging Face checkpoint that are read. A download from the Hub fetches exactly these.

Code that reads another file adds its name here; a test finds names that are written elsewhere.
"""

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"      # LoRA adapter, refused with a message of its own

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ANY_WEIGHTS = "*.safetensors"               # shards, named by the index

TOKENIZER = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
OLDER_CHAT_TEMPLATE = "chat_template.json"  # written by processors of transformers 4.45 to 4.50

IMAGE_PROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"

READ = (
    CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG, ANY_WEIGHTS, WEIGHTS_INDEX, TOKENIZER, SENTENCEPIECE, TOKENIZER_CONFIG,
    SPECIAL_TOKENS, ADDED_TOKENS, CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE, IMAGE_PROCESSOR, PROCESSOR,
)  # fmt: skip

# Unsupported tokenizers, named in the error message when there is no other.
OTHER_TOKENIZERS = ("vocab.json", "tekken.json", "vocab.txt")
