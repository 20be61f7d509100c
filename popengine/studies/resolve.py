"""Settings of studies made concrete for one model: Pruning with every rule, and with fewer tokens of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.cache import View
from models.passes import Stretch
from models.pruning.left_out import ATTENTION, Half
from models.pruning.resolve import LayerWeights, Pruning, resolve
from models.pruning.settings import PruningSettings, exact_share
from models.walks import Walk
from popengine.studies.rules import RULES
from popengine.studies.visual_tokens import DropVisualTokens
from weights.errors import InputError


@dataclass(frozen=True)
class StudyPruning(Pruning):
    """Pruning whose prompts may leave out tokens of pictures.

    no_skipped_kv  a control: no row attends to what a prompt has left in the layers it skips
    why_dense      why the recommended pruning gave way to the dense model; "" where it did not
    """

    no_skipped_kv: bool = False
    why_dense: str = ""

    @property
    def walk(self) -> Walk:
        walk, first = super().walk, self.thin_from
        return walk if first is None else DropVisualTokens(walk, first, self)

    def view(self, layer: int, window: int | None) -> View:
        return View(window, self.no_skipped_kv and layer in self.skipped, self.is_thin(layer))

    def dropped_rows(self, spans: Sequence[Stretch], lengths: Sequence[int]) -> int:
        left = list(lengths)
        for span in spans:
            left[span.sequence] -= span.length - self.visual_tokens(span.length)
        return max(lengths) - max(left)

    @property
    def thin_from(self) -> int | None:
        """The first layer whose prompts are without the rows of pictures that are left out; None: none are."""
        settings = self.settings
        by_layer = settings.visual_tokens_layer if settings.visual_tokens_by == "attention" else 0
        return None if settings.visual_tokens == "all" else by_layer

    def is_thin(self, layer: int) -> bool:
        """Whether its prompts are without them."""
        return self.thin_from is not None and layer >= self.thin_from

    def visual_tokens(self, of_picture: int) -> int:
        """How many of a picture's tokens stay. Raises InputError where none would."""
        wanted = self.settings.visual_tokens
        if wanted == "all":
            return of_picture
        kept = int(exact_share(wanted) * (of_picture if exact_share(wanted) < 1 else 1))
        if kept == 0:
            raise InputError(f"visual tokens {wanted} leaves none of the {of_picture} tokens of a picture; raise it")
        return min(kept, of_picture)

    def uncounted(self, stretches: Sequence[Stretch]) -> int:
        """Rows of these pictures that are left out and would count as evidence."""
        lengths = [one.length for one in stretches] if self.settings.scored_tokens == "all" else []
        return sum(length - self.visual_tokens(length) for length in lengths)


def resolve_study(settings: PruningSettings, layer: LayerWeights) -> StudyPruning:
    """As `resolve`, with every rule and the visual tokens. Raises InputError as that does."""
    found = resolve(settings, layer, RULES)
    check_visual_tokens(settings, found.left_out, layer.layers)
    return StudyPruning(**vars(found))


def check_visual_tokens(settings: PruningSettings, left_out: Sequence[Half], layers: int) -> None:
    """Raises InputError for a layer after which there is none, or that attends to nothing."""
    after = settings.visual_tokens_layer
    if settings.visual_tokens == "all" or settings.visual_tokens_by != "attention":
        return
    if after >= layers:
        raise InputError(
            f"visual tokens layer {after} leaves no layer after it: the model has {layers}, give {layers - 1} at most"
        )
    if (after - 1, ATTENTION) in left_out:
        raise InputError(f"visual tokens layer {after} chooses by an attention that is left out; give another layer")
