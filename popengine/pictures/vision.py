"""The picture side of a checkpoint: images to features, and the places of their tokens in a prompt.

Where an image token is put, in this order: where the prompt says `<image>` (or whatever the checkpoint calls it);
where the chat template puts the image parts of a message; and, for a template that knows no image parts and for a
checkpoint without a template, at the front of the first user's text, one line per image.

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
from models.llama import LlamaForCausalLM
from models.passes import PictureRows, Stretch
from models.picture_model import Grid, PictureModel
from popengine.pictures.images import ImageProcessing, ImageSource, read_image_processing
from popengine.text.chat import unless_failed
from popengine.text.prompts import Messages, Render
from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError


class Given(NamedTuple):
    """The pictures of a run.

    grids         of all of them; new_grids: of those whose tokens the cache does not hold yet
    pixel_values  of those; None: there are none
    stretches     where those are among the rows of the padded batch
    """

    grids: Sequence[Grid] = ()
    new_grids: Sequence[Grid] = ()
    pixel_values: Tensor | None = None
    stretches: Sequence[Stretch] = ()


class Embedded(NamedTuple):
    """Prompts on their way into the language model, as its `prefill` takes them.

    x         [B, T, H], the rows; counted bool [B, T], those that count in the scores, None: all real ones
    pictures  what the rows have because of pictures
    seconds   that the pictures took
    """

    x: Tensor
    counted: Tensor | None = None
    pictures: PictureRows | None = None
    seconds: float = 0.0


class TextOnly:
    """What the engine asks about pictures where a checkpoint reads none."""

    reads = False
    unknown_fields: tuple[str, ...] = ()
    meant: tuple[str, ...] = ()

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    def plain_text(self, prompt: str, images: int) -> str:
        return prompt

    def render(self, conversations: Sequence[Messages], images: Sequence[int], render: Render) -> list[str]:
        return [unless_failed(text) for text in render(conversations)]

    def written_out(self, text: str) -> str:
        return text

    def expand(self, ids: list[int], images: Sequence[ImageSource]) -> list[int]:
        if images:
            raise InputError(
                "an image was given, and this checkpoint is a text model; LLaVA, Qwen-VL and Gemma-3 read images"
            )
        return ids

    def pixel_values(self, images: Sequence[ImageSource]) -> Tensor | None:
        self.expand([], images)             # refuses them
        return None

    def given(self, images: Sequence[ImageSource], prompts: Sequence[Sequence[int]] = (), kept: int = 0) -> Given:
        return Given()

    def image_tokens(self, prompts: Sequence[Sequence[int]]) -> int:
        return 0

    def text_ids(self, ids: Sequence[int]) -> Sequence[int]:
        return ids

    def embed(
        self, tokens: Tensor, real: Tensor | None, given: Given, scored: str = "all", kept: int = 0
    ) -> Embedded:
        return Embedded(self.model.embed(tokens[:, kept:]))


class Vision:
    """The same where it does, as LLaVA does: square pictures of one size. Nothing is read before the first image."""

    reads = True

    def __init__(self, model: PictureModel, tokenizer: TextTokenizer, directory: Path) -> None:
        self.model, self.tokenizer, self.directory = model, tokenizer, directory
        self.image_token_id = model.config.image_token_index

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        return self.model.config.unknown_fields + self.model.config.vision.unknown_fields

    @cached_property
    def mark(self) -> str:
        """What prompts and chat templates have for a picture."""
        return self.token(self.model.mark)

    def token(self, index: int) -> str:
        """A token of pictures as it is written."""
        token = self.tokenizer.decode([index], skip_special_tokens=False)
        if not token or self.tokenizer.token_id(token) != index:
            raise InputError(
                f"{self.directory}: config.json says that images stand at token {index}, "
                "and the tokenizer has no such token"
            )
        return token

    def written_out(self, text: str) -> str:
        """A text with everything that its marks stand for."""
        pieces = (piece if isinstance(piece, str) else self.token(piece) for piece in self.model.written_as)
        return text.replace(self.mark, "".join(pieces))

    @property
    def meant(self) -> tuple[str, ...]:
        """Whoever writes <image> into a message says where a picture stands; a model only with image parts."""
        before, after = self.model.around_image
        around = (self.tokenizer.decode([token], skip_special_tokens=False) for token in (*before, *after))
        return self.mark, *around

    @cached_property
    def written(self) -> str:
        """A picture as it is written in prompts where no template does it."""
        before, after = (self.tokenizer.decode([*ids], skip_special_tokens=False) for ids in self.model.around_image)
        return before + self.mark + after

    @cached_property
    def processing(self) -> ImageProcessing:
        """How images are prepared. Raises InputError where the configuration is missing, broken or does not fit."""
        processing, side = read_image_processing(self.directory), self.model.config.vision.image_size
        size = processing.crop_to or processing.resize_to
        if size is not None and size != (side, side):
            raise InputError(
                f"{self.directory}: the image processor makes pictures of {size[1]} x {size[0]} pixels, "
                f"and the vision tower reads {side} x {side}"
            )
        return processing

    def pixel_values(self, images: Sequence[ImageSource]) -> Tensor | None:
        """Images, paths or Pillow's, as the tower reads them: float32 [images, 3, Y, X]. InputError for a bad one."""
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
        """Rows and columns of an image's tokens. InputError for one that cannot be read."""
        return 1, self.model.config.tokens_per_image

    def given(self, images: Sequence[ImageSource], prompts: Sequence[Sequence[int]] = (), kept: int = 0) -> Given:
        """The images of a run, in the order of their tokens; kept: tokens of the one prompt in the cache already."""
        grids = [self.grid(image) for image in images]
        ends = [*accumulate(rows * columns for rows, columns in grids)]
        seen = sum(end <= self.image_tokens([prompts[0][:kept]]) for end in ends) if kept else 0
        stretches = self.stretches(prompts, [rows * columns for rows, columns in grids[seen:]], kept)
        return Given(grids, grids[seen:], self.pixel_values(images[seen:]), stretches)

    def stretches(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], kept: int) -> list[Stretch]:
        """Where pictures of these lengths are among the rows of the padded batch, without the first `kept` of them."""
        waiting, found, longest = iter(lengths), [], max(map(len, prompts), default=0)
        for sequence, ids in enumerate(prompts):
            row = kept
            while row < len(ids):
                is_picture = ids[row] == self.image_token_id
                length = next(waiting) if is_picture else 1
                if is_picture:
                    found.append(Stretch(sequence, longest - len(ids) + row - kept, length))
                row += length
        return found

    def embed(
        self, tokens: Tensor, real: Tensor | None, given: Given, scored: str = "all", kept: int = 0
    ) -> Embedded:
        """The prompts with their pictures in place.

        tokens int64 [B, T]; real bool [B, T] or None; scored "all" or "text"; kept: tokens that get no row any more
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
        """A prompt that no template goes over."""
        return self.plain(self.messages([{"role": "user", "content": prompt}], images)[0]["content"])

    def messages(self, messages: Messages, images: int) -> Messages:
        """A conversation with every content as a list of parts, images placed if none of it says where they stand."""
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
        """The prompts' texts; `render` is the chat template. Plain texts again for one that knows no image parts."""
        parted = [self.messages(messages, count) for messages, count in zip(conversations, images, strict=True)]
        texts = render(parted)
        again = [index for index, text in enumerate(texts) if not self.is_complete(text, parted[index])]
        plain = [[message | {"content": self.plain(message["content"])} for message in parted[index]]
                 for index in again]
        for index, text in zip(again, render(plain), strict=True):
            texts[index] = text
        return [unless_failed(text) for text in texts]

    def is_complete(self, text: str | InputError, messages: Messages) -> bool:
        """Whether a rendered text has every text and every picture of its messages."""
        parts = [part for message in messages for part in message["content"]]
        written = [str(part["text"]) for part in parts if part.get("type") == "text"]
        pictures = sum(part.get("type") == "image" for part in parts)
        pictures += sum(piece.count(self.mark) for piece in written)
        return (
            isinstance(text, str) and text.count(self.mark) == pictures
            and all(piece.strip() in text for piece in written)
        )

    def plain(self, parts: list[dict[str, Any]]) -> str:
        """Parts as one text: images first, one line each."""
        pictures = sum(part.get("type") == "image" for part in parts)
        return f"{self.written}\n" * pictures + "".join(str(part.get("text", "")) for part in parts)

    def image_tokens(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens of these prompts stand for pictures."""
        return sum(token == self.image_token_id for ids in prompts for token in ids)

    def text_ids(self, ids: Sequence[int]) -> Sequence[int]:
        """Those that the embedding is asked for: image tokens are not."""
        return [token for token in ids if token != self.image_token_id]

    def expand(self, ids: list[int], images: Sequence[ImageSource]) -> list[int]:
        """Token ids with as many image tokens as each image has. InputError where the text has not one for each."""
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
    """Whether this is a part of a message: a text or what has another type."""
    return isinstance(part, dict) and ("text" in part or part.get("type") not in (None, "text"))
