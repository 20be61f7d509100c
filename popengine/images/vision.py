"""Pictures of a checkpoint: images to features, and the places of their tokens in a prompt.

An image token is put, in this order of preference: at `<image>` in the prompt (or the checkpoint's own mark); where the
chat template puts the image parts of a message; at the front of the first user's text, one line per image, if the
template has no image parts or there is no template.

B batch, T prompt tokens, H hidden size of the language model.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.clock import Clock
from models.families.picture_model import Grid, PictureModel
from models.llama import LlamaForCausalLM
from models.passes import ImageSpan, PictureRows
from popengine.images.images import ImageProcessing, ImageSource, read_image_processing
from popengine.text.chat import unless_failed
from popengine.text.prompts import Messages, Render
from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError


class ImageInputs(NamedTuple):
    """The pictures of a run.

    grids         of all pictures; new_grids: of those whose tokens are not in the cache yet
    pixel_values  of the latter; None: there are none
    stretches     their places among the tokens of the padded batch
    """

    grids: Sequence[Grid] = ()
    new_grids: Sequence[Grid] = ()
    pixel_values: Tensor | None = None
    stretches: Sequence[ImageSpan] = ()


class Embedded(NamedTuple):
    """Embedded prompts, as the language model's `prefill` takes them.

    x         [B, T, H]; counted bool [B, T], tokens that count in the scores, None: all real tokens
    pictures  extra inputs of the tokens because of pictures
    seconds   time that the pictures took
    """

    x: Tensor
    counted: Tensor | None = None
    pictures: PictureRows | None = None
    seconds: float = 0.0


class TextOnly:
    """The interface of `Vision` for a checkpoint that reads no pictures."""

    reads = False
    unknown_fields: tuple[str, ...] = ()
    meant: tuple[str, ...] = ()

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    def plain_text(self, prompt: str, images: int) -> str:
        return prompt

    def render(self, conversations: Sequence[Messages], images: Sequence[int], render: Render) -> list[str]:
        return [unless_failed(text) for text in render(conversations)]

    def mark_images(self, text: str) -> str:
        return text

    def expand(self, ids: list[int], images: Sequence[ImageSource]) -> list[int]:
        if images:
            raise InputError(
                "an image was given, and this checkpoint is a text model; LLaVA, Qwen-VL and Gemma-3 read images"
            )
        return ids

    def pixel_values(self, images: Sequence[ImageSource]) -> Tensor | None:
        self.expand([], images)             # raises InputError for any image
        return None

    def given(self, images: Sequence[ImageSource], prompts: Sequence[Sequence[int]] = (), kept: int = 0) -> ImageInputs:
        return ImageInputs()

    def image_tokens(self, prompts: Sequence[Sequence[int]]) -> int:
        return 0

    def text_ids(self, ids: Sequence[int]) -> Sequence[int]:
        return ids

    def embed(
        self, tokens: Tensor, real: Tensor | None, given: ImageInputs, scored: str = "all", kept: int = 0
    ) -> Embedded:
        return Embedded(self.model.embed(tokens[:, kept:]))


class Vision:
    """Pictures of a checkpoint that reads square pictures of one size, as LLaVA. Nothing is loaded before the first."""

    reads = True

    def __init__(self, model: PictureModel, tokenizer: TextTokenizer, directory: Path) -> None:
        self.model, self.tokenizer, self.directory = model, tokenizer, directory
        self.image_token_id = model.config.image_token_index

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        return self.model.config.unknown_fields + self.model.config.vision.unknown_fields

    @cached_property
    def mark(self) -> str:
        """The text that stands for a picture in prompts and chat templates."""
        return self.token(self.model.mark)

    def token(self, index: int) -> str:
        """Return the text of a token. Raises InputError if the tokenizer does not have the token."""
        token = self.tokenizer.decode([index], skip_special_tokens=False)
        if not token or self.tokenizer.token_id(token) != index:
            raise InputError(
                f"{self.directory}: config.json says that images stand at token {index}, "
                "and the tokenizer has no such token"
            )
        return token

    def mark_images(self, text: str) -> str:
        """Replace every mark in a text by the full sequence of a picture."""
        pieces = (piece if isinstance(piece, str) else self.token(piece) for piece in self.model.written_as)
        return text.replace(self.mark, "".join(pieces))

    @property
    def meant(self) -> tuple[str, ...]:
        """Control tokens that a user may write to place a picture; a model's own text places pictures only by parts."""
        before, after = self.model.around_image
        around = (self.tokenizer.decode([token], skip_special_tokens=False) for token in (*before, *after))
        return self.mark, *around

    @cached_property
    def written(self) -> str:
        """The text of a picture in prompts without a template for pictures."""
        before, after = (self.tokenizer.decode([*ids], skip_special_tokens=False) for ids in self.model.around_image)
        return before + self.mark + after

    @cached_property
    def processing(self) -> ImageProcessing:
        """The processing of images. Raises InputError if the configuration is missing, broken or does not fit."""
        processing, side = read_image_processing(self.directory), self.model.config.vision.image_size
        size = processing.crop_to or processing.resize_to
        if size is not None and size != (side, side):
            raise InputError(
                f"{self.directory}: the image processor makes pictures of {size[1]} x {size[0]} pixels, "
                f"and the vision tower reads {side} x {side}"
            )
        return processing

    def pixel_values(self, images: Sequence[ImageSource]) -> Tensor | None:
        """Prepare images, paths or Pillow's, for the tower: float32 [images, 3, Y, X]. InputError for a bad image."""
        if not images:
            return None
        pictures = [self.processing.pixel_values(image) for image in images]
        side = self.model.config.vision.image_size
        for picture in pictures:
            if picture.shape != (3, side, side):
                raise InputError(
                    f"an image is {picture.shape[2]} x {picture.shape[1]} pixels after the image processor, and the "
                    f"vision tower reads {side} x {side}: give square images of that size, or mend the configuration"
                )
        return torch.stack(pictures)

    def grid(self, image: ImageSource) -> Grid:
        """Return rows and columns of an image's tokens. Raises InputError for an image that cannot be read."""
        return 1, self.model.config.tokens_per_image

    def given(self, images: Sequence[ImageSource], prompts: Sequence[Sequence[int]] = (), kept: int = 0) -> ImageInputs:
        """Prepare the images of a run, in the order of their tokens. kept: tokens of the only prompt in the cache"""
        grids = [self.grid(image) for image in images]
        ends = [*accumulate(rows * columns for rows, columns in grids)]
        seen = sum(end <= self.image_tokens([prompts[0][:kept]]) for end in ends) if kept else 0
        stretches = self.stretches(prompts, [rows * columns for rows, columns in grids[seen:]], kept)
        return ImageInputs(grids, grids[seen:], self.pixel_values(images[seen:]), stretches)

    def stretches(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], kept: int) -> list[ImageSpan]:
        """Locate pictures of these lengths among the tokens of the padded batch, without the first `kept` tokens."""
        waiting, found, longest = iter(lengths), [], max(map(len, prompts), default=0)
        for sequence, ids in enumerate(prompts):
            row = kept
            while row < len(ids):
                is_picture = ids[row] == self.image_token_id
                length = next(waiting) if is_picture else 1
                if is_picture:
                    found.append(ImageSpan(sequence, longest - len(ids) + row - kept, length))
                row += length
        return found

    def embed(
        self, tokens: Tensor, real: Tensor | None, given: ImageInputs, scored: str = "all", kept: int = 0
    ) -> Embedded:
        """Embed prompts with their pictures in place.

        tokens int64 [B, T]; real bool [B, T] or None; scored "all" or "text"; kept: tokens that are in the cache
        """
        clock, features = Clock(tokens.device), None
        if given.pixel_values is not None:
            with clock.phase("images"):
                features = self.model.encode_images(given.pixel_values.to(tokens.device), given.new_grids)
        x, pictures = self.model.place(tokens, real, features, given.grids, kept)   # [B, T - kept, H]
        if given.stretches:
            pictures = replace(pictures or PictureRows(), stretches=given.stretches)
        counted = None
        if scored == "text":
            counted = ~self.model.is_image(tokens[:, kept:])                        # [B, T - kept]
            counted = counted if real is None else counted & real
        return Embedded(x, counted, pictures, clock.milliseconds("images") / 1000)

    def plain_text(self, prompt: str, images: int) -> str:
        """Put the images into a prompt without a template."""
        return self.plain(self.messages([{"role": "user", "content": prompt}], images)[0]["content"])

    def messages(self, messages: Messages, images: int) -> Messages:
        """Convert every content to a list of parts, and place the images if the conversation does not."""
        parted = [message | {"content": self.parts(message.get("content"))} for message in messages]
        parts = [part for message in parted for part in message["content"]]
        placed = any(part.get("type") == "image" or self.mark in str(part.get("text")) for part in parts)
        for message in [] if placed else parted:
            if message.get("role") == "user":
                message["content"] = [{"type": "image"}] * images + message["content"]
                break
        return parted

    def parts(self, content: Any) -> list[dict[str, Any]]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        if isinstance(content, list) and all(map(is_part, content)):
            return content
        raise InputError('a message\'s content must be a text, or a list of parts like {"type": "text", "text": "..."}')

    def render(self, conversations: Sequence[Messages], images: Sequence[int], render: Render) -> list[str]:
        """Render conversations by the chat template `render`; retry with plain texts if it drops image parts."""
        parted = [self.messages(messages, count) for messages, count in zip(conversations, images, strict=True)]
        texts = render(parted)
        again = [index for index, text in enumerate(texts) if not self.is_complete(text, parted[index])]
        plain = [[message | {"content": self.plain(message["content"])} for message in parted[index]]
                 for index in again]
        for index, text in zip(again, render(plain), strict=True):
            texts[index] = text
        return [unless_failed(text) for text in texts]

    def is_complete(self, text: str | InputError, messages: Messages) -> bool:
        """Return True if a rendered text has every text and every picture of its messages."""
        parts = [part for message in messages for part in message["content"]]
        written = [str(part["text"]) for part in parts if part.get("type") == "text"]
        pictures = sum(part.get("type") == "image" for part in parts)
        pictures += sum(piece.count(self.mark) for piece in written)
        return (
            isinstance(text, str) and text.count(self.mark) == pictures
            and all(piece.strip() in text for piece in written)
        )

    def plain(self, parts: list[dict[str, Any]]) -> str:
        """Join parts into one text: images first, one line each."""
        pictures = sum(part.get("type") == "image" for part in parts)
        return f"{self.written}\n" * pictures + "".join(str(part.get("text", "")) for part in parts)

    def image_tokens(self, prompts: Sequence[Sequence[int]]) -> int:
        """Count the image tokens of these prompts."""
        return sum(token == self.image_token_id for ids in prompts for token in ids)

    def text_ids(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the ids without image tokens, which are never looked up in the embedding."""
        return [token for token in ids if token != self.image_token_id]

    def expand(self, ids: list[int], images: Sequence[ImageSource]) -> list[int]:
        """Repeat each image token by the number of its image's tokens. InputError if there is not one per image."""
        found, count = ids.count(self.image_token_id), len(images)
        if found != count:
            raise InputError(
                f"the prompt has {found} image {'token' if found == 1 else 'tokens'} ({self.mark}) and "
                f"{count} {'image was' if count == 1 else 'images were'} given: there must be as many"
            )
        for token, what in self.model.refused_tokens:
            if token in ids:
                raise InputError(f"the prompt has the token of {what}, which is not read here: give images")
        sizes = [rows * columns for rows, columns in map(self.grid, images)][::-1]
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (sizes.pop() if token == self.image_token_id else 1)
        return expanded


def is_part(part: Any) -> bool:
    """Return True if this is a part of a message: a text, or a part of another type."""
    return isinstance(part, dict) and ("text" in part or part.get("type") not in (None, "text"))
