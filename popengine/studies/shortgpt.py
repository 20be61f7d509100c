"""ShortGPT (arXiv 2403.03853): whole layers are left out of prompts and steps, those that change the stream least.

Block influence of a layer: 1 - E[cosine of what goes in and what comes out], over the tokens of a calibration text.
As in the paper, but for the accounting: it removes a number of layers; here they are as many as come nearest to the
ratio, and with a layer share below 1 channels that the rule cuts give the rest.
"""

from models.pruning.settings import SUBLAYERS
from popengine.studies.left_out import Half
from popengine.studies.request import Request
from popengine.studies.resolve import StudyPruning
from weights.errors import InputError


def shortgpt(request: Request) -> StudyPruning:
    """The layers of lowest block influence are left out (arXiv 2403.03853)."""
    influence = request.calibrated("shortgpt").influence                            # [L]
    budget, layers = request.layer_budget("shortgpt"), len(influence)
    count = round(budget * layers)
    if budget > 0 and count == 0:
        raise InputError(f"a share of {budget:.3g} is less than half of one of {layers} layers: raise the prune ratio")
    lowest = influence.argsort(stable=True)[:count].tolist()
    return request.without([Half(layer, part) for layer in sorted(lowest) for part in SUBLAYERS])
