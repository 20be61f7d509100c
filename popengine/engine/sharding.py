"""Which part of each tensor of a checkpoint a rank holds (models/ranks.py)."""

from torch import nn

from models.attention import Attention
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.matrices.plain import Matrix
from weights.load import Share

# Matrices whose outputs a rank has some of, and those of whose inputs it has some.
BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_COLUMNS = ("o_proj", "down_proj")


def shares(model: nn.Module, language_model: LlamaForCausalLM) -> dict[str, Share]:
    """By the names of a model's parameters; those that are not there are whole on every rank."""
    ranks = language_model.config.ranks
    if ranks.count == 1:
        return {}
    found: dict[str, Share] = {}
    for name, module in model.named_modules():
        if module is language_model:
            rows = Share(0, ranks.stretch(language_model.config.vocab_size), language_model.config.vocab_size)
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{own}.weight": rows for own in ("lm_head", "model.embed_tokens")}
        if not isinstance(module, (Attention, FeedForward)):
            continue
        for own in (*BY_ROWS, *BY_COLUMNS):
            matrix = getattr(module, own, None)
            if isinstance(matrix, Matrix):
                dim = int(own in BY_COLUMNS)
                whole = ranks.count * matrix.weight.shape[dim]
                found[f"{name}.{own}.weight"] = Share(dim, ranks.stretch(whole), whole)
                if own in BY_ROWS:
                    found[f"{name}.{own}.bias"] = found[f"{name}.{own}.weight"]
    return found


def add_biases_once(language_model: LlamaForCausalLM) -> None:
    """A bias on a sum over ranks is the first rank's to add."""
    if language_model.config.ranks.index == 0:
        return
    for module in language_model.modules():
        for own in BY_COLUMNS:
            matrix = getattr(module, own, None)
            if isinstance(matrix, Matrix) and matrix.bias is not None:
                matrix.bias.data.zero_()
