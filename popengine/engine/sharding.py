"""Sharding: the part of each checkpoint tensor that a rank holds, and the matrices that join the parts."""

from torch import nn

from models.attention import Attention
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.matrices.plain import Matrix
from models.matrices.ranked import JoinedMatrix, RankEmbedding, SummedMatrix
from weights.load import Share

# Matrices of which a rank holds some rows (outputs), and those of which it holds some columns (inputs).
BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_COLUMNS = ("o_proj", "down_proj")


def shares(model: nn.Module, language_model: LlamaForCausalLM) -> dict[str, Share]:
    """Return the shares by parameter name; a parameter that is absent is whole on every rank."""
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


def join_ranks(language_model: LlamaForCausalLM) -> None:
    """Put the matrices that communicate into a loaded model: row-parallel sums, output projection and embedding."""
    ranks, rows = language_model.config.ranks, language_model.config.vocab_size
    if ranks.count == 1:
        return
    for module in list(language_model.modules()):
        for own in BY_COLUMNS if isinstance(module, (Attention, FeedForward)) else ():
            part = getattr(module, own, None)
            if isinstance(part, Matrix):
                if part.bias is not None and ranks.index > 0:       # a sum adds one bias only
                    part.bias.data.zero_()
                setattr(module, own, SummedMatrix(part, ranks))
    language_model.lm_head = JoinedMatrix(language_model.lm_head, ranks, rows)
    model = language_model.model
    model.embed_tokens = RankEmbedding(model.embed_tokens, ranks, rows)  # type: ignore[assignment]  # called alike
