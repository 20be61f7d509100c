"""ShortGPT (arXiv 2403.03853): prompts and steps leave out the layers that change the residual stream least.

Block influence of a layer: 1 - E[cosine of its input and output], over the tokens of a calibration text. The only
difference from the paper is the number of layers: here it is the number nearest to the ratio, and with a layer share
below 1 the rule prunes channels for the rest.
"""

from models.pruning.settings import SUBLAYERS
from popengine.studies.left_out import Half
from popengine.studies.request import Request
from popengine.studies.resolve import StudyPruning
from weights.errors import InputError


def shortgpt(request: Request) -> StudyPruning:
    """Leave out the layers of lowest block influence (arXiv 2403.03853)."""
    influence = request.calibrated("shortgpt").influence                            # [L]
    budget, layers = request.layer_budget("shortgpt"), len(influence)
    count = round(budget * layers)
    if budget > 0 and count == 0:
        raise InputError(f"a share of {budget:.3g} is less than half of one of {layers} layers: raise the prune ratio")
    lowest = influence.argsort(stable=True)[:count].tolist()
    return request.without([Half(layer, part) for layer in sorted(lowest) for part in SUBLAYERS])
