"""Base of every model that reads pictures: a language model, and pictures that replace image tokens.

B batch, T prompt tokens, H hidden size, n image tokens of all pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.config import LlamaConfig
from models.key_names import Spellings, keys_by_our_names
from models.llama import LlamaForCausalLM
from models.passes import PictureRows
from weights.errors import InputError

# Rows and columns of one picture's image tokens.
Grid = tuple[int, int]


@dataclass(frozen=True)
class PictureConfig:
    """Configuration of a language model and a vision tower; its properties cover both, as in LlamaConfig."""

    text: LlamaConfig
    vision: Any

    @property
    def sides(self) -> tuple[int, ...]:
        return self.text.sides + self.vision.sides

    @property
    def blocks(self) -> int:
        return self.text.blocks + self.vision.blocks


class PictureModel(nn.Module):
    """A model that reads pictures.

    To generate, call `encode_images` once per picture, `place` once per prompt, then `language_model.prefill` and
    `language_model.decode` as for any text model.

    spellings      patterns of names that releases of transformers have given to the same weights, and our names
    around_image   token ids to put before and after a picture if no template does
    refused_tokens tokens that no prompt may have, with their meaning
    """

    config: Any
    language_model: LlamaForCausalLM
    ignored_keys: tuple[str, ...] = ()
    spellings: Spellings = ()
    around_image: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    refused_tokens: tuple[tuple[int, str], ...] = ()

    @property
    def mark(self) -> int:
        """The token that stands for a picture in prompts and chat templates."""
        return self.config.image_token_index

    @property
    def written_as(self) -> tuple[int | str, ...]:
        """The sequence that replaces `mark` when tokenised: texts, and tokens by their ids."""
        return (self.mark,)

    def locate(
        self, parameter_names: list[str], checkpoint_names: list[str]
    ) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Locate each parameter in a checkpoint of any release of transformers (see LlamaForCausalLM.locate)."""
        stored_as = keys_by_our_names(checkpoint_names, self.spellings)
        prefix = "language_model."
        of_text = self.language_model.locate(
            [name.removeprefix(prefix) for name in parameter_names if name.startswith(prefix)],
            [name.removeprefix(prefix) for name in stored_as if name.startswith(prefix)],
        )
        places: dict[str, tuple[str, tuple[Any, ...]]] = {name: (name, ()) for name in parameter_names}
        places |= {prefix + name: (prefix + key, index) for name, (key, index) in of_text.items()}
        return {name: (stored_as.get(key, key), index) for name, (key, index) in places.items()}

    def sizes(self) -> dict[str, int | None]:
        """Return tokens per picture and its side in pixels. Tokens None: any size, one token per such square."""
        return {"tokens_per_image": self.config.tokens_per_image, "pixels": self.config.vision.image_size}

    def is_image(self, tokens: Tensor) -> Tensor:
        """Return True at image tokens: int64 [B, T] -> bool [B, T]"""
        return tokens == self.config.image_token_index

    def embed(self, tokens: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Embed prompts with their pictures in place, for `language_model.prefill`: int64 [B, T] -> [B, T, H]

        image_features  [..., H] from encode_images, in the order of their image tokens in the batch, prompt by
                        prompt; None: no pictures
        Raises InputError if the numbers of image tokens and feature vectors differ.
        """
        is_image = self.is_image(tokens)                                            # [B, T]
        places = int(is_image.sum())
        features = 0 if image_features is None else image_features.shape[:-1].numel()
        if places != features:
            raise InputError(f"the prompts have {places} image tokens, and the images have {features} feature vectors")
        # The image token's id may lie beyond the vocabulary: it is never looked up.
        x = self.language_model.embed(tokens.masked_fill(is_image, 0))              # [B, T, H]
        if image_features is None:
            return x
        return x.masked_scatter(is_image.unsqueeze(-1), image_features.to(x.dtype))

    def encode_images(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Encode pictures as embeddings of the language model.

        pixel_values from the image processor; grids of the same pictures -> [..., H], or whatever the family's `place`
        takes
        """
        raise NotImplementedError

    def place(
        self, tokens: Tensor, real: Tensor | None, features: Tensor | None, grids: Sequence[Grid], kept: int = 0
    ) -> tuple[Tensor, PictureRows | None]:
        """Embed prompts with their pictures in place, and compute the extra inputs of their tokens.

        tokens    int64 [B, T]; real bool [B, T], False for padding, None: no padding
        features  from encode_images, of the pictures after the first `kept` tokens; None: no pictures there
        grids     of all pictures, in the order of their image tokens
        kept      tokens that the cache holds already, and that are not embedded
        returns   [B, T - kept, H]
        """
        return self.embed(tokens[:, kept:], features), None

    def forward(
        self, tokens: Tensor, pixel_values: Tensor | None = None, real: Tensor | None = None,
        grids: Sequence[Grid] = (),
    ) -> Tensor:
        """Run the dense network without a cache.

        tokens int64 [B, T]; pixel_values and grids of all pictures; real bool [B, T], False for padding
        -> logits [B, T, V]
        """
        features = None if pixel_values is None else self.encode_images(pixel_values, grids)
        x, pictures = self.place(tokens, real, features, grids)
        return self.language_model.forward_embedded(x, real, pictures)
