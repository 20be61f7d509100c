"""The model `popengine` of LM-Evaluation-Harness: a checkpoint under a pruning method (popengine/harness.py).

S scored tokens, V vocabulary.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from popengine.engine.distributed import agree, contents
from popengine.engine.loading import load
from popengine.engine.sampling_settings import Sampling
from popengine.evaluation.answering import encode, fitting, generate_until, log_likelihoods
from popengine.evaluation.scoring import Window, dense_log_probabilities, log_probabilities
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.calibration import load_calibration
from popengine.studies.settings import PruningSettings
from popengine.text.chat import render_chat
from popengine.text.sandbox.special_tokens import Spelled
from weights.errors import InputError
from weights.json_files import shown

try:
    import lm_eval.models  # noqa: F401  # lm_eval registers its own models only if there are no others
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    raise InputError("the evaluation harness needs lm_eval: pip install 'popengine[lm-eval]'") from None

DEFAULT_NEW_TOKENS = 256
GENERATION_ARGUMENTS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


@register_model("popengine")
class PopengineLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A checkpoint under a pruning method, in the harness's interface."""

    def __init__(
        self,
        ckpt: str | None = None,
        method: str = "pop",
        calibration: str | None = None,
        seed: int = 0,
        dtype: str = "auto",
        weights: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        paper: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        known = {one.name for one in fields(PruningSettings)}
        for name in settings:
            if name not in known:
                raise InputError(f"there is no model argument {name!r}; settings are {', '.join(sorted(known))}")
        if type(paper) is not bool:
            raise InputError(f"paper must be True or False, not {shown(paper)}")
        chosen = PruningSettings.paper(**settings) if paper else PruningSettings(**settings)
        self.batch_size = whole_number("batch_size", batch_size)
        max_length = None if max_length is None else whole_number("max_length", max_length)
        if type(seed) is not int:
            raise InputError(f"seed must be a whole number, not {shown(seed)}")
        asked = {"method": method, "seed": seed, "settings": settings, "paper": paper}
        agree(asked | {"calibration": contents(calibration)})
        self.engine = load(
            ckpt, dtype=dtype, device=device or "auto", weights=weights, max_seq_len=max_length, compile=False
        )
        model = self.engine.model
        loaded = None if calibration is None else load_calibration(Path(calibration), model)
        self.pruning = pruning_for(method, Request(model, chosen, loaded, seed, self.engine.resolve))
        special = self.engine.tokenizer.special_tokens
        self.spelled = Spelled(special, list(special), self.engine.chat_template or "")

    @property
    def eot_token_id(self) -> int:
        """Id that stands before a text without context if the tokenizer adds no token of its own."""
        ids = self.engine.end_of_sequence_ids or self.engine.stop_ids
        if not ids:
            raise InputError("this checkpoint names no end-of-sequence token, and the harness needs one")
        named = self.engine.tokenizer.token_id(self.engine.tokenizer.eos_token or "")
        return named if named is not None else min(ids)

    @property
    def prefix_token_id(self) -> int:
        begin = self.engine.tokenizer.token_id(self.engine.tokenizer.bos_token or "")
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text. None: add special tokens, unless the text begins with one or comes from a template."""
        if self.spelled.is_in(string):
            return self.spelled.encode(string, self.engine.tokenizer)
        if add_special_tokens is None:
            return encode(self.engine, string)
        return self.engine.tokenizer.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score each request separately, because requests in one batch would share a partition."""
        results = []
        for texts, context, continuation in tqdm(requests, desc="loglikelihood", disable=disable_tqdm):
            results += log_likelihoods(self.engine, [fitting(self.engine, context, continuation)], self.pruning)
            self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.engine.max_seq_len,
                context_len=1,
            )
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                total += self.rolling_window(fitting(self.engine, context, continuation))
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return results

    def rolling_window(self, window: Window) -> float:
        """Return the log-likelihood of a window's continuation: dense up to the window's middle, then decode steps."""
        middle = max(len(window.prompt), len(window.ids) // 2)
        first, rest = window.ids[len(window.prompt) : middle], window.ids[middle:]
        pieces = [dense_log_probabilities(self.engine.model, window)[: len(first)]]
        if rest:
            pieces.append(log_probabilities(self.engine, Window(window.ids[:middle], rest), self.pruning))
        log_p = torch.cat(pieces)                                                   # [S, V]
        said = torch.tensor(window.continuation, device=log_p.device)               # [S]
        return float(log_p.gather(1, said[:, None]).sum())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate in batches of requests with the same arguments, the longest prompts first."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for group in groups.values():
                encoded = {index: self.tok_encode(requests[index].args[0]) for index in group}
                group.sort(key=lambda index: -len(encoded[index]))
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    arguments = requests[batch[0]].args[1]
                    texts = self.generate_batch([encoded[index] for index in batch], arguments)
                    for index, text in zip(batch, texts, strict=True):
                        results[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return results

    def generate_batch(self, prompts: list[list[int]], arguments: dict[str, Any]) -> list[str]:
        """Return texts up to the first stop string of each, or the end of sequence."""
        unknown = sorted(set(arguments) - set(GENERATION_ARGUMENTS))
        if unknown:
            raise InputError(
                f"generation argument {unknown[0]!r} is not implemented; there are {', '.join(GENERATION_ARGUMENTS)}"
            )
        until = arguments.get("until") or []
        stops = [until] if isinstance(until, str) else until
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise InputError(f"until must be a text or a list of texts, not {shown(until)}")
        new_tokens = whole_number("max_gen_toks", arguments.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        samples = arguments.get("do_sample", bool(arguments.get("temperature")))
        try:
            temperature = float(arguments.get("temperature", 1.0)) if samples else 0.0
            sampling = Sampling(temperature, int(arguments.get("top_k", 0)), float(arguments.get("top_p", 1.0)))
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"a generation argument is not the number it should be: {error}") from None
        return generate_until(self.engine, prompts, new_tokens, self.pruning, sampling, stops)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.engine.chat_template is None:
            raise self.engine.prompts.template_problem or InputError(
                "this checkpoint has no chat template: leave --apply_chat_template out"
            )
        return render_chat(
            self.engine.chat_template, self.spelled.hide(chat_history), self.engine.tokenizer,
            add_generation_prompt=add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.engine.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return "popengine"


def whole_number(name: str, value: Any) -> int:
    """Convert an argument to an integer. Raises InputError below 1 and for anything else."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1:
        raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
    return number
