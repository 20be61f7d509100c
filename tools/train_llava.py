"""Train the small LLaVA of weights/llava-tiny/ on the picture questions, and report its accuracy.

    python tools/train_llava.py                 # about 45 minutes of one busy CPU core
    python tools/train_llava.py --evaluate      # only the held-out accuracy of the existing checkpoint

As in LLaVA's recipe, the vision tower is trained first: each patch predicts the shape and colour in its cell of the
picture, and its row and column (CLIP's role in the original). Then tower, projector and language model are trained
together to answer a question of each kind about one picture, with loss on the answers only. The layers are the engine's
own, in bfloat16 under PyTorch's autocast; weights are float32.
Equal seed, steps and threads on the same machine give the same checkpoint. Another machine rounds differently and
reaches the same accuracy, not the same bits.

B batch, T tokens, P patches, Q classes.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from models.families.llava import LlavaForConditionalGeneration, read_llava_config
from models.passes import PictureRows, prefill_pass
from models.slots import AttentionPattern
from popengine.engine import prior
from popengine.engine.loading import load
from popengine.evaluation.picture_tasks import (
    COLOURS,
    KINDS,
    SHAPES,
    SIDE,
    Scene,
    ask,
    draw,
    picture_questions,
    random_scene,
)
from popengine.evaluation.tasks import is_answered, questions_for
from popengine.images.images import ImageProcessing, parse_image_processing
from popengine.studies.settings import DENSE
from weights.json_files import JsonObject

REPOSITORY = Path(__file__).resolve().parents[1]
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]
PICTURE_SIZE = 144  # drawn larger than the tower reads, so that the image processor has something to do
NO_PICTURE = "There is no picture."

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE,
    "image_seq_length": 36,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    # Stored in float16 to be small, meant to be computed in float32: a model of this size gains nothing from less.
    "torch_dtype": "float32",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 72,
        "patch_size": 12,
        "projection_dim": 128,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    },
}
IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 72},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 72, "width": 72},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {{- message['role'] | upper + ':\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] if part['type'] == 'image' %}
            {{- '<image>\\n' }}
        {%- endfor %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- eos_token if message['role'] == 'assistant' }}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:\\n' }}
{%- endif %}
"""


def build_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE, so that any text can be typed, with the words of the questions as whole tokens."""
    texts = [f"USER:\n{q.question}\nASSISTANT:\n{q.answer}" for q in picture_questions(6000, seed, "train")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, NO_PICTURE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


class Drawer:
    """Draws training batches: scenes, pictures as the tower reads them, conversations about them."""

    def __init__(self, tokenizer: Tokenizer, processing: ImageProcessing, seed: int) -> None:
        self.tokenizer, self.processing = tokenizer, processing
        self.random = Random(f"train_llava {seed}")

    def scenes(self, count: int) -> tuple[list[Scene], Tensor]:
        scenes = [random_scene(self.random, "train") for _ in range(count)]
        pictures = [self.processing.pixel_values(draw(scene, PICTURE_SIZE)) for scene in scenes]
        return scenes, torch.stack(pictures)  # [B, 3, Y, X]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def sequence(self, scene: Scene | None, tokens_per_image: int) -> list[tuple[int, int, int, int]]:
        """Questions about one picture, token by token: its id, what it must predict (-100: nothing), turn, position.

        The picture is turn 0. In most sequences each question stands as if it were the first, and sees the picture and
        itself alone: the picture is computed once for all. In one of eight they are a conversation, all of turn 0.
        None: a question without a picture.
        """
        if scene is None:
            question = ask(random_scene(self.random, "train"), self.random.choice(KINDS), self.random)
            asked = [(question.question, NO_PICTURE)] if question else []
        else:
            kinds = self.random.sample(KINDS, len(KINDS))
            questions = [question for kind in kinds if (question := ask(scene, kind, self.random))]
            asked = [(question.question, question.answer) for question in questions]
        apart = self.random.random() >= 1 / 8
        picture = [IMAGE] * tokens_per_image + self.encode("\n") if scene is not None else []
        tokens = [BOS, *self.encode("USER:\n"), *picture]
        row = [(token, -100, 0, position) for position, token in enumerate(tokens)]
        shared = len(row)
        for turn, (question, answer) in enumerate(asked, start=1):
            if self.random.random() < 0.1:
                question = question.lower().rstrip("?.")  # as people type
            before = self.encode("\nUSER:\n") if turn > 1 and not apart else []
            prompt = [*before, *self.encode(f"{question}\nASSISTANT:\n")]
            reply = [*self.encode(answer), EOS]
            told = [*[-100] * (len(prompt) - 1), *reply, -100]
            start = shared if apart else len(row)
            row += [
                (token, label, turn if apart else 0, start + index)
                for index, (token, label) in enumerate(zip([*prompt, *reply], told, strict=True))
            ]
        return row

    def batch(self, size: int, tokens_per_image: int) -> tuple[Tensor, Tensor]:
        """pixel_values [B', 3, Y, X], and int64 [4, B, T] as in `sequence`. One sequence in 32 has no picture.

        Padding is on the right, a turn of its own that nothing looks at.
        """
        scenes, pictures = self.scenes(size)
        seen = [self.random.random() >= 1 / 32 for _ in scenes]
        rows = [
            self.sequence(scene if shown else None, tokens_per_image)
            for scene, shown in zip(scenes, seen, strict=True)
        ]
        longest = max(map(len, rows))
        padded = [row + [(PAD, -100, -1, 0)] * (longest - len(row)) for row in rows]
        return pictures[torch.tensor(seen)], torch.tensor(padded).permute(2, 0, 1)


def new_model(vocabulary: int, seed: int) -> LlavaForConditionalGeneration:
    config = CONFIG | {"text_config": CONFIG["text_config"] | {"vocab_size": vocabulary}}
    model = LlavaForConditionalGeneration(read_llava_config(config))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "embedding" in name or "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return model


class Learner:
    """Muon for the matrices and AdamW for the rest, with warm-up, a constant rate, and a linear descent at the end."""

    def __init__(
        self, parameters: list[nn.Parameter], matrices: list[nn.Parameter], rate: float, steps: int, descent: float
    ) -> None:
        self.parameters, self.rate, self.steps, self.descent = parameters, rate, steps, descent
        chosen = set(matrices)
        rest = [parameter for parameter in parameters if parameter not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            # With its steps as long as AdamW's, one rate serves both.
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step_number, self.mean_loss, self.began = 0, float("nan"), time.time()

    def step(self, loss: Tensor, stage: str) -> None:
        self.step_number += 1
        left = (self.steps - self.step_number) / (self.steps * self.descent)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.rate * min(1.0, self.step_number / 100, max(left, 0.01))
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        value = loss.item()
        self.mean_loss = value if self.step_number == 1 else 0.95 * self.mean_loss + 0.05 * value
        if self.step_number % 50 == 0 or self.step_number == self.steps:
            took = time.time() - self.began
            print(f"{stage} {self.step_number}/{self.steps}: loss {self.mean_loss:.4f}, {took:.0f} s", flush=True)


def matrices_of(*modules: nn.Module) -> list[nn.Parameter]:
    """Of their linear layers: neither embeddings nor the patches' convolution."""
    return [
        parameter for module in modules for name, parameter in module.named_parameters()
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
    ]  # fmt: skip


def train_tower(model: LlavaForConditionalGeneration, drawer: Drawer, steps: int) -> None:
    """Each patch tells what stands in its cell, and where that is, through a linear layer that is thrown away."""
    classes = [len(SHAPES) + 1, len(COLOURS) + 1, SIDE, SIDE]
    head = nn.Linear(model.config.vision.hidden_size, sum(classes))
    tower = model.vision_tower
    learner = Learner([*tower.parameters(), *head.parameters()], matrices_of(tower), 1.5e-3, steps, descent=0.5)
    colours = list(COLOURS)
    cells = torch.arange(SIDE * SIDE)                                               # [P]
    for _ in range(steps):
        scenes, pixel_values = drawer.scenes(32)
        wanted = torch.zeros(4, len(scenes), SIDE * SIDE, dtype=torch.int64)        # [4, B, P]; 0: the cell is empty
        wanted[2], wanted[3] = cells // SIDE, cells % SIDE
        for index, scene in enumerate(scenes):
            for shape in scene.shapes:
                cell = SIDE * shape.row + shape.column
                wanted[0, index, cell] = 1 + SHAPES.index(shape.kind)
                wanted[1, index, cell] = 1 + colours.index(shape.colour)
        with torch.autocast("cpu", torch.bfloat16):
            told = head(tower(pixel_values)[:, 1:]).float().split(classes, dim=-1)              # [B, P, Q] each
        losses = [F.cross_entropy(one.flatten(0, 1), right.flatten()) for one, right in zip(told, wanted, strict=True)]
        learner.step(sum(losses[1:], losses[0]), "tower")


def train_answers(model: LlavaForConditionalGeneration, drawer: Drawer, steps: int, rate: float, batch: int) -> None:
    learner = Learner(list(model.parameters()), matrices_of(model), rate, steps, descent=0.4)
    text = model.language_model
    patterns = [AttentionPattern(None)] * len(text.model.layers)
    for _ in range(steps):
        pixel_values, (tokens, labels, turns, positions) = drawer.batch(batch, model.config.tokens_per_image)
        mine, other = turns[:, :, None], turns[:, None, :]                          # [B, T, 1], [B, 1, T]
        with torch.autocast("cpu", torch.bfloat16):
            x = model.embed(tokens, model.encode_images(pixel_values))              # [B, T, H]
            step = prefill_pass(text.model.rotary, patterns, x, None, PictureRows(positions))
            step.masks[patterns[0]] = ((mine == other) | (other == 0)).tril()[:, None]             # [B, 1, T, T]
            for layer in text.model.layers:
                x = layer(x, step)
            answers = labels != -100
            logits = text.head(x[answers]).float()                                  # [answers, V]
        learner.step(F.cross_entropy(logits, labels[answers]), "answers")


def save(model: LlavaForConditionalGeneration, tokenizer: Tokenizer, directory: Path) -> None:
    """The checkpoint as Hugging Face lays it out, loadable by transformers."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {hub_name(name): tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    hidden = model.config.vision.hidden_size
    # transformers builds this LayerNorm too, though LLaVA never reads what it makes.
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(hidden, dtype=torch.float16)
    tensors["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(hidden, dtype=torch.float16)
    del tensors["language_model.lm_head.weight"]  # tied to the embedding
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    text_config = CONFIG["text_config"] | {"vocab_size": tokenizer.get_vocab_size()}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "processor_class": "LlavaProcessor",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["text_config"]["max_position_embeddings"],
    }
    processor_config = {
        "processor_class": "LlavaProcessor",
        "image_processor": IMAGE_PROCESSOR,
        "image_token": "<image>",
        "patch_size": CONFIG["vision_config"]["patch_size"],
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": CONFIG["vision_feature_select_strategy"],
    }
    generation_config = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    for name, content in [
        ("config.json", CONFIG | {"text_config": text_config}),
        ("generation_config.json", generation_config),
        ("processor_config.json", processor_config),
        ("tokenizer_config.json", tokenizer_config),
    ]:
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
    example_picture().save(directory / "example.png")


def example_picture() -> Image.Image:
    """A held-out scene of four different shapes, to show what the checkpoint does."""
    random = Random("example")
    while True:
        scene = random_scene(random, "held-out")
        if len({shape.kind for shape in scene.shapes}) == len({shape.colour for shape in scene.shapes}) == 4:
            return draw(scene, 192)


def hub_name(name: str) -> str:
    """The names of the LLaVA checkpoints on the Hub."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def report(directory: Path, count: int, seed: int) -> None:
    """Held-out questions answered to the letter by greedy generation, of every kind, by the dense model."""
    engine = load(directory)
    right = Counter(
        question.task for question in questions_for("pictures", count, seed) if is_answered(engine, question, DENSE)
    )
    print(f"exact match on {count} held-out questions of each kind (pictures never drawn in training), greedy")
    for kind in KINDS:
        print(f"{kind:<10} {right[kind] / count:6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small LLaVA on the synthetic picture questions.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "weights" / "llava-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="only measure the checkpoint that is there")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions of each kind")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    if not flags.evaluate:
        processing = parse_image_processing(JsonObject(IMAGE_PROCESSOR, "IMAGE_PROCESSOR"))
        tokenizer = build_tokenizer(flags.seed)
        drawer = Drawer(tokenizer, processing, flags.seed)
        model = new_model(tokenizer.get_vocab_size(), flags.seed)
        print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
        train_tower(model, drawer, flags.tower_steps)
        train_answers(model, drawer, flags.steps, flags.rate, flags.batch)
        save(model, tokenizer, flags.out)
        engine = load(flags.out)
        prior.write(flags.out / prior.FILE, engine.fingerprint, prior.make(engine, progress=True), engine.model)
        (flags.out / prior.FILE).chmod(0o644)
    report(flags.out, flags.questions, flags.seed)


if __name__ == "__main__":
    main()
