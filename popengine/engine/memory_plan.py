"""Cache and weight copies within the free memory: refuse what does not fit, and copy as many experts as possible."""

from models.cost_model import all_copy_bytes, cache_bytes, copy_bytes
from models.experts import MixtureOfExperts
from models.llama import LlamaForCausalLM
from models.pruning.experts import PartitionedExperts
from models.pruning.pruning import Pruning
from models.pruning.settings import MLP
from models.state import DecodeState
from weights.errors import InputError
from weights.memory import gigabytes


def state_within(
    free: int | None, model: LlamaForCausalLM, batch: int, capacity: int, pruning: Pruning, dropped: int = 0
) -> DecodeState:
    """Allocate the state of a run in at most `free` bytes (None: no limit); other arguments as for `new_state`.

    If memory is too small for copies of all experts, each layer copies as many as fit. Raises InputError if even the
    cache and the copies of other networks do not fit.
    """
    cached, (of_one, of_all) = cache_bytes(model, batch, capacity, pruning), expert_copies(model, pruning)
    copies = all_copy_bytes(model, pruning) - of_all + pruning.rule.form_bytes(model)
    if free is not None and cached + copies > free:
        raise InputError(
            f"the cache of {batch} x {capacity} tokens takes {gigabytes(cached)} and copies of weights another "
            f"{gigabytes(copies)} beside the model, and {gigabytes(free)} is free: ask for fewer tokens, "
            "prune more, use a smaller dtype, or run dense (prune ratio 0)"
        )
    state = model.new_state(batch, capacity, pruning, dropped)
    if free is not None and of_one:
        for layer in state.layers:
            if isinstance(layer.ffn, PartitionedExperts):
                layer.ffn.copy_limit = (free - cached - copies) // of_one
    return state


def resized(
    free: int | None, model: LlamaForCausalLM, state: DecodeState, capacity: int, dropped: int
) -> bool:
    """Give the state of an ended run another capacity and keep its copies; arguments as for `state_within`.

    Returns False, and changes nothing, if memory is too small, or if the experts' copies were limited by what the cache
    left over.
    """
    cached = cache_bytes(model, len(state.live), capacity, state.pruning)
    if any(isinstance(layer.ffn, PartitionedExperts) for layer in state.layers) or (free is not None and cached > free):
        return False
    state.resize(capacity, dropped)
    return True


def expert_copies(model: LlamaForCausalLM, pruning: Pruning) -> tuple[int, int]:
    """Return the bytes of a copy of one expert in every layer, and of all experts, where these copies are optional."""
    if not pruning.rule.follows_prompt:
        return 0, 0
    running = (layer.mlp for index, layer in enumerate(model.model.layers) if MLP in pruning.sublayers(index))
    mixtures = [mlp for mlp in running if isinstance(mlp, MixtureOfExperts)]
    of_one = [copy_bytes(mixture.experts[0], pruning) for mixture in mixtures]
    return sum(of_one), sum(len(mixture.experts) * one for mixture, one in zip(mixtures, of_one, strict=True))
