"""Model ``fastlm`` for lm-evaluation-harness (PyPI's ``lm_eval``).

    python -m fastlm.evals.harness --model fastlm --model_args pretrained=PATH --tasks TASKS ...

is the harness' own command line, with the same flags. The harness (0.4.13) has no entry points for
models of other packages. Importing this module registers the model: in Python,
``import fastlm.evals.harness`` before ``lm_eval.simple_evaluate(model="fastlm", ...)``.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastlm.errors import InputError, unknown_key
from fastlm.evals.reference_metrics import register_rouge
from fastlm.evals.scorer import TOKENS, EvalPrompt, Scorer
from fastlm.inference.requests import request_seed
from fastlm.inference.sampling import Sampling
from fastlm.model.load import load_model
from fastlm.tokenizer.tokenizer import Tokenizer

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    message = "expected the package lm_eval, which is not installed (pip install 'fastlm[harness]')"
    if __name__ != "__main__":
        raise InputError(message) from None
    print(f"fastlm: {message}", file=sys.stderr)
    sys.exit(2)

DTYPES = {
    "auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16
}  # fmt: skip
NEW_TOKENS = 256  # the harness' default
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class ScorerLM(LM):
    """Run the harness' requests with a `Scorer`.

    Args:
        max_gen_toks: tokens of an answer, for tasks without a number of their own.
        seed: of sampled answers.
    """

    def __init__(self, scorer: Scorer, *, max_gen_toks: int = NEW_TOKENS, seed: int = 0) -> None:
        super().__init__()
        self.scorer, self.max_gen_toks, self.seed = scorer, max_gen_toks, seed

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs: list[Any] = [request.args for request in requests]
        with _bar(len(pairs), "loglikelihood", disable_tqdm) as bar:

            def on_result(i: int, likelihood: Any) -> None:
                result = (likelihood.logprob, bool(likelihood.greedy))
                self.cache_hook.add_partial("loglikelihood", pairs[i], result)
                bar.update()

            likelihoods = self.scorer.loglikelihoods(pairs, greedy=True, on_result=on_result)
        return [(result.logprob, bool(result.greedy)) for result in likelihoods]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts: list[Any] = [request.args[0] for request in requests]
        with _bar(None, "loglikelihood_rolling", disable_tqdm) as bar:
            likelihoods = self.scorer.rolling(texts, on_result=lambda i, likelihood: bar.update())
        return [likelihood.logprob for likelihood in likelihoods]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        arguments_list: list[Any] = [request.args for request in requests]
        prompts, repeats = [], Counter[str]()
        for context, options in arguments_list:
            prompts.append(self._prompt(context, options, repeats[context]))
            repeats[context] += 1
        with _bar(len(arguments_list), "generate_until", disable_tqdm) as bar:
            answers = self.scorer.generate(prompts, on_result=lambda completion: bar.update())
        texts = [answer.text for answer in answers]
        for arguments, text in zip(arguments_list, texts, strict=True):
            if not arguments[1].get("do_sample"):
                self.cache_hook.add_partial("generate_until", arguments, text)
        return texts

    def _prompt(self, context: str, options: Mapping[str, Any], repeat: int) -> EvalPrompt:
        """Convert a request. ``repeat``: its index among the requests with the same context; each
        has its own seed."""
        remaining: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        stop, max_new_tokens = remaining.pop("until", None) or [], remaining.pop("max_gen_toks")
        remaining.pop("use_cache", None)  # of transformers' generate
        # neither filters nor a temperature change a greedy answer
        remaining.setdefault("temperature", 1.0 if remaining.pop("do_sample") else 0.0)
        sampling = Sampling(**{name: remaining.pop(name) for name in SAMPLING if name in remaining})
        for name in remaining:
            names = ["until", "max_gen_toks", "do_sample", *SAMPLING]
            raise InputError(unknown_key(f"gen_kwargs: {name}", name, names))
        stop = [stop] if isinstance(stop, str) else stop
        if max_new_tokens >= self.scorer.context_limit:
            raise InputError(
                f"max_gen_toks: expected less than the context's {self.scorer.context_limit} "
                "tokens,"
                f" got {max_new_tokens}"
            )
        seed = request_seed(self.seed, context, repeat)
        return EvalPrompt(
            context, max_new_tokens, tuple(s for s in stop if s), seed=seed, sampling=sampling
        )


class FastLM(ScorerLM):
    """A model of fastlm. The arguments are those of ``--model_args``, named as for ``hf``.

    Args:
        pretrained: Hugging Face folder, .gguf, fastlm run or model:smollm2.
        dtype: auto (the file's own), float32, bfloat16 or float16.
        act_bits, keep_quantized: of `CausalLM.from_pretrained`.
        tokenizer: folder or tokenizer.json of another tokenizer.
        max_length: tokens of context; default: the model's.
        tokens: number of tokens per forward; replaces batch_size and max_batch_size.
        add_bos_token, prefix_token_id: ``add_bos`` and ``prefix`` of `Scorer`.
        max_gen_toks: tokens of an answer, for tasks without a number of their own.
        enable_thinking, chat_template_args: variables for the chat template.
        seed: of sampled answers.
        split_float32: of `Scorer`.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        act_bits: int | None = None,
        keep_quantized: bool = True,
        tokenizer: str | None = None,
        max_length: int | None = None,
        tokens: int = TOKENS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = NEW_TOKENS,
        enable_thinking: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        seed: int = 0,
        split_float32: bool = False,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            names = [*inspect.signature(FastLM).parameters][:-1]  # all but **unknown
            raise InputError(unknown_key(f"model_args: {name}", name, names))
        if dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        for name, value in (("tokens", tokens), ("max_gen_toks", max_gen_toks)):
            if value < 1:
                raise InputError(f"{name}: expected 1 or more, got {value}")
        del batch_size, max_batch_size  # the harness passes them to every model
        model, model_tokenizer = load_model(
            pretrained, act_bits, keep_quantized=keep_quantized, dtype=DTYPES[dtype]
        )
        # the harness' command passes cuda:0 by default, even on machines without CUDA
        if device and (torch.cuda.is_available() or not device.startswith("cuda")):
            model.to(device)
        scorer = Scorer(
            model,
            Tokenizer.load(tokenizer) if tokenizer else model_tokenizer,
            tokens=tokens,
            limit=max_length,
            add_bos=add_bos_token,
            prefix=prefix_token_id,
            parse_special=True,
            split_float32=split_float32,
        )
        super().__init__(scorer, max_gen_toks=max_gen_toks, seed=seed)
        self._device = model.device
        self.tokenizer_path = str(tokenizer or pretrained)
        self.variables = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.variables["enable_thinking"] = enable_thinking

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except InputError:
            others = [m for m in chat_history if m["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return self._rendered(others, add_generation_prompt)  # as the harness does for hf

    def _rendered(self, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        text = self.scorer.tokenizer.render_chat(
            messages, add_generation_prompt=prompt, **self.variables
        )
        if prompt:
            return text
        # the model continues the last message: the template must not close it
        for last in (messages[-1]["content"], messages[-1]["content"].strip()):
            if (begin := text.rfind(last)) >= 0:
                return text[: begin + len(last)]
        raise InputError("chat_template: expected a template that renders the last message")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the default template; named templates are not supported."""
        return self.scorer.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness stores with its results."""
        model = self.scorer.model
        return {
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": str(model.dtype),
        }


def _bar(total: int | None, name: str, disable: bool) -> Any:
    return tqdm(total=total, desc=f"Running {name} requests", disable=disable)


def main() -> None:
    """Run the harness' command line. Bad input ends it with one line and status 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        print(f"fastlm: {error}", file=sys.stderr)
        sys.exit(2)


register_rouge()
# by path, because this module is also run as __main__
model_registry.register("fastlm", target="fastlm.evals.harness:FastLM")

if __name__ == "__main__":
    main()
