"""Names of dtypes as people write them. Nothing here imports PyTorch: a wrong flag should not wait for it."""

SHORT_NAMES = {
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16", "fp32": "float32", "f32": "float32",
    "float": "float32",
}


def dtype_name(dtype: object) -> str:
    """The full name of a dtype of PyTorch, or of a name that may be short. Other words stay as they are."""
    name = str(dtype).removeprefix("torch.")
    return SHORT_NAMES.get(name, name)
