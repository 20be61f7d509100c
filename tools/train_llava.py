"""Train the small LLaVA of weights/llava-tiny/ on the picture questions, and report what it has learnt.

    python tools/train_llava.py                         # about twenty minutes of one free CPU core
    python tools/train_llava.py --evaluate              # only the held-out accuracy of the checkpoint that is there

As in LLaVA's own recipe the vision tower learns to see first: each patch has to tell which shape of which colour
stands in its cell of the picture (CLIP's part in the original). Then tower, projector and language model together
learn to answer: conversations about one picture, loss on the answers only. The forward passes are the engine's own.
The same seed, steps and threads on the same machine give the same checkpoint; another machine rounds differently and
ends at the same accuracy, not at the same bits.

B batch, T tokens, P patches, Q classes.
"""

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from models.llava import LlavaForConditionalGeneration
from models.pruning.settings import DENSE, PruningSettings
from popengine.engine import Engine
from popengine.loading import load
from popengine.measure.picture_tasks import COLOURS, KINDS, SHAPES, Scene, ask, draw, picture_questions, random_scene
from popengine.pictures.images import ImageProcessing, parse_image_processing

REPOSITORY = Path(__file__).resolve().parents[1]
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]
PICTURE_SIZE = 96  # drawn larger than the tower reads, so that the image processor has something to do
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
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
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
    "size": {"shortest_edge": 48},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 48, "width": 48},
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
        vocab_size=512,
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

    def conversation(self, scene: Scene | None, tokens_per_image: int) -> tuple[list[int], list[int]]:
        """Tokens, and what each must predict next (-100: nothing). None: a question without a picture."""
        kinds = self.random.sample(KINDS[:-1], len(KINDS) - 1)
        if self.random.random() < 0.8:
            kinds.append("list")  # last: its answer would give the others away
        else:
            kinds.insert(0, "list")
        if scene is None:
            asked = [(ask(random_scene(self.random, "train"), "presence", self.random), NO_PICTURE)]
        else:
            questions = [ask(scene, kind, self.random) for kind in kinds]
            asked = [(question, question.answer) for question in questions if question is not None]
        tokens, labels = [BOS], [-100]
        for turn, (question, answer) in enumerate(asked):
            assert question is not None
            words = question.question
            if self.random.random() < 0.1:
                words = words.lower().rstrip("?.")  # as people type
            picture = [IMAGE] * tokens_per_image + self.encode("\n") if scene is not None and turn == 0 else []
            prompt = self.encode("USER:\n") + picture + self.encode(f"{words}\nASSISTANT:\n")
            reply = [*self.encode(answer), EOS]
            after = self.encode("\n")
            tokens += prompt + reply + after
            labels += [-100] * len(prompt) + reply + [-100] * len(after)
        return tokens, labels

    def batch(self, size: int, tokens_per_image: int) -> tuple[Tensor, Tensor, Tensor]:
        """pixel_values [B', 3, Y, X], tokens and labels int64 [B, T]. One conversation in 32 has no picture.

        Padding is on the right: a causal network never looks at it, so that no mask is needed.
        """
        scenes, pictures = self.scenes(size)
        seen = [self.random.random() >= 1 / 32 for _ in scenes]
        drawn = [
            self.conversation(scene if shown else None, tokens_per_image)
            for scene, shown in zip(scenes, seen, strict=True)
        ]
        longest = max(len(tokens) for tokens, _ in drawn)
        tokens = torch.tensor([tokens + [PAD] * (longest - len(tokens)) for tokens, _ in drawn])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in drawn])
        return pictures[torch.tensor(seen)], tokens, labels


def new_model(vocabulary: int, seed: int) -> LlavaForConditionalGeneration:
    config = CONFIG | {"text_config": CONFIG["text_config"] | {"vocab_size": vocabulary}}
    model = LlavaForConditionalGeneration.from_config(config)
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
    """AdamW with warm-up, a constant rate, and a linear descent over the last part of the steps."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, steps: int, descent: float) -> None:
        self.parameters, self.rate, self.steps, self.descent = parameters, rate, steps, descent
        matrices = [parameter for parameter in parameters if parameter.dim() > 1]
        vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
        self.step_number, self.mean_loss, self.began = 0, float("nan"), time.time()

    def step(self, loss: Tensor, stage: str) -> None:
        self.step_number += 1
        left = (self.steps - self.step_number) / (self.steps * self.descent)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, self.step_number / 100, max(left, 0.01))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        value = loss.item()
        self.mean_loss = value if self.step_number == 1 else 0.95 * self.mean_loss + 0.05 * value
        if self.step_number % 100 == 0 or self.step_number == self.steps:
            took = time.time() - self.began
            print(f"{stage} {self.step_number}/{self.steps}: loss {self.mean_loss:.4f}, {took:.0f} s", flush=True)


def train_tower(model: LlavaForConditionalGeneration, drawer: Drawer, steps: int) -> None:
    """Each patch tells the shape and the colour in its cell through a linear layer that is thrown away afterwards."""
    side = int(model.config.vision.patches**0.5)
    row_or_column = [int((index + 0.5) * 3 / side) for index in range(side)]
    cell_of_patch = torch.tensor([3 * row + column for row in row_or_column for column in row_or_column])  # [P]
    head = nn.Linear(model.config.vision.hidden_size, len(SHAPES) + 1 + len(COLOURS) + 1)
    colours = list(COLOURS)
    learner = Learner([*model.vision_tower.parameters(), *head.parameters()], rate=1.5e-3, steps=steps, descent=0.5)
    for _ in range(steps):
        scenes, pixel_values = drawer.scenes(32)
        kinds, shades = torch.zeros(2, len(scenes), 9, dtype=torch.int64)  # [B, 9] each; 0: the cell is empty
        for index, scene in enumerate(scenes):
            for shape in scene.shapes:
                kinds[index, 3 * shape.row + shape.column] = 1 + SHAPES.index(shape.kind)
                shades[index, 3 * shape.row + shape.column] = 1 + colours.index(shape.colour)
        told = head(model.vision_tower(pixel_values)[:, 1:])  # [B, P, Q]
        told_kinds, told_shades = told.split([len(SHAPES) + 1, len(COLOURS) + 1], dim=-1)
        loss = F.cross_entropy(told_kinds.flatten(0, 1), kinds[:, cell_of_patch].flatten())
        loss = loss + F.cross_entropy(told_shades.flatten(0, 1), shades[:, cell_of_patch].flatten())
        learner.step(loss, "tower")


def train_answers(model: LlavaForConditionalGeneration, drawer: Drawer, steps: int, rate: float) -> None:
    learner = Learner(list(model.parameters()), rate, steps, descent=0.4)
    for _ in range(steps):
        pixel_values, tokens, labels = drawer.batch(16, model.config.tokens_per_image)
        logits = model(tokens, pixel_values)  # [B, T, V]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        learner.step(loss, "answers")


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


def held_out_accuracy(engine: Engine, pruning: PruningSettings, count: int, seed: int) -> dict[str, float]:
    """Share of held-out questions answered to the letter by greedy generation, per kind; each prompt on its own."""
    right = dict.fromkeys(KINDS, 0)
    questions = picture_questions(count, seed)
    # The template runs in a process of its own: one run serves all questions.
    frame = engine.prompts.texts(["QUESTION"], [1])[0][0].removeprefix("<s>")
    for question in questions:
        prompt = frame.replace("QUESTION", question.question)
        picture = question.picture(PICTURE_SIZE)
        (answer,) = engine.generate(prompt, raw=True, images=[picture], max_new_tokens=64, pruning=pruning)
        right[question.kind] += question.is_right(answer.text)
    return {kind: right[kind] / sum(question.kind == kind for question in questions) for kind in KINDS}


def report(directory: Path, count: int, seed: int) -> None:
    engine = load(directory)
    print(f"exact match on {count} held-out questions (pictures never drawn in training), greedy")
    print(f"{'':<34}" + "".join(f"{kind:>10}" for kind in KINDS))
    for name, pruning in [
        ("dense", DENSE),
        ("prune ratio 0.2", PruningSettings(prune_ratio=0.2)),
        ("prune ratio 0.2, dense prefill", PruningSettings(prune_ratio=0.2, prefill="dense")),
        ("prune ratio 0.4", PruningSettings(prune_ratio=0.4)),
        ("prune ratio 0.4, dense prefill", PruningSettings(prune_ratio=0.4, prefill="dense")),
        ("prune ratio 0.2, text scores", PruningSettings(prune_ratio=0.2, scored_tokens="text")),
        ("prune ratio 0.4, text scores", PruningSettings(prune_ratio=0.4, scored_tokens="text")),
    ]:
        accuracy = held_out_accuracy(engine, pruning, count, seed)
        print(f"{name:<34}" + "".join(f"{accuracy[kind]:>10.1%}" for kind in KINDS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small LLaVA on the synthetic picture questions.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "weights" / "llava-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="only measure the checkpoint that is there")
    parser.add_argument("--questions", type=int, default=600)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    if not flags.evaluate:
        tokenizer = build_tokenizer(flags.seed)
        drawer = Drawer(tokenizer, parse_image_processing(IMAGE_PROCESSOR, "IMAGE_PROCESSOR"), flags.seed)
        model = new_model(tokenizer.get_vocab_size(), flags.seed)
        print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
        train_tower(model, drawer, flags.tower_steps)
        train_answers(model, drawer, flags.steps, flags.rate)
        save(model, tokenizer, flags.out)
    report(flags.out, flags.questions, flags.seed)


if __name__ == "__main__":
    main()
