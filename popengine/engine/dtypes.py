"""Names of dtypes and weight formats as users write them. Without PyTorch, so that a wrong flag fails at once."""

# Values of `--weights`. auto: packed weights of the checkpoint stay packed, the others plain.
FORMS = ("auto", "plain", "int8", "int4")

SHORT_NAMES = {
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16", "fp32": "float32", "f32": "float32",
    "float": "float32",
}


def dtype_name(dtype: object) -> str:
    """Return the full name of a PyTorch dtype or of a short name. Other words are returned unchanged."""
    name = str(dtype).removeprefix("torch.")
    return SHORT_NAMES.get(name, name)
