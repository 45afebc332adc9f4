"""Compare an exported GGUF in the real llama.cpp with its original model. Run by hand:

    pip install --no-deps --target LIBRARY llama-cpp-py-sync cffi pycparser
    PYTHONPATH=LIBRARY .venv/bin/python tests/support/llama_cpp_check.py MODEL GGUF 2>log

llama-cpp-py-sync contains llama.cpp's own libraries. The program prints whether both tokenize the
texts to the same ids, and whether they choose the same next token at every step of fastlm's greedy
text. Where they differ, the gap between fastlm's two best logits tells a near tie from an error. If
MODEL is a GGUF too, the two files are compared inside llama.cpp.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from llama_cpp_py_sync import Llama

from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.load import load_tokenizer
from fastlm.tokenizer.tokenizer import Tokenizer

TEXTS = [
    "The capital of France is", "def add(a, b):\n    return a + b\n\n\nx = 1234567.89",
    "It's  12 o'clock;\tWE'RE late!  \n\n Größe, 漢字, 🙂 and   spaces ",
]  # fmt: skip


def logits_of(model: Llama, ids: list[int]) -> np.ndarray:
    """Return llama.cpp's logits after each id, (len(ids), V)."""
    model._clear_context_state()
    rows = []
    for position, token in enumerate(ids):
        model._eval_tokens([token], position)
        pointer = model._lib.llama_get_logits_ith(model._ctx, -1)
        data = model._ffi.buffer(pointer, 4 * model.n_vocab)
        rows.append(np.frombuffer(data, np.float32).copy())
    return np.stack(rows)


def opened(path: str) -> Llama:
    return Llama(path, n_ctx=512, n_threads=2, type_k="f32", type_v="f32", flash_attn_type=0)


def compare(mine: np.ndarray, theirs: np.ndarray, start: int) -> bool:
    """Print how the choices of the next token differ from position ``start`` on."""
    mine, theirs = mine[start:], theirs[start:]
    differ = np.flatnonzero(mine.argmax(1) != theirs.argmax(1))
    off = np.abs(mine - theirs).max() / mine.std()
    print(
        f"  {len(mine) - len(differ)} of {len(mine)} greedy tokens equal; logits differ by at most"
        f" {off:.2g} of their deviation"
    )
    for at in differ:
        best = np.sort(mine[at])[::-1]
        print(f"  step {at}: gap of the two best logits {best[0] - best[1]:.4f}, largest change"
              f" {np.abs(mine[at] - theirs[at]).max():.4f}")  # fmt: skip
    return not len(differ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("gguf")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    theirs = opened(options.gguf)
    tokenizer = Tokenizer.load(options.gguf)
    same = True
    if options.model.endswith(".gguf"):
        other = opened(options.model)
        ids = theirs.tokenize(TEXTS[0], False, False)
        for _ in range(options.tokens):
            ids.append(int(logits_of(other, ids)[-1].argmax()))
        same = compare(logits_of(other, ids), logits_of(theirs, ids), 0)
        sys.exit(not same)
    model = CausalLM.from_pretrained(options.model, dtype=torch.float32, act_bits=16)
    model_tokenizer = load_tokenizer(Path(options.model), model.config.to_dict())
    texts = list(TEXTS)
    if model_tokenizer.chat_template:
        texts.append(
            model_tokenizer.render_chat([{"role": "user", "content": "Name three rivers."}])
        )
    for text in texts:
        chat = text not in TEXTS
        mine = model_tokenizer.encode(text, special=True) if chat else model_tokenizer.encode(text)
        llama_cpp_ids = theirs.tokenize(text, False, chat)
        gguf_ids = tokenizer.encode(text, special=True) if chat else tokenizer.encode(text)
        equal = mine == llama_cpp_ids == gguf_ids
        same &= equal
        print(f"ids of {text[:30]!r}: {'equal' if equal else (mine, llama_cpp_ids, gguf_ids)}")
    for text in (texts[0], texts[-1]):
        ids = model_tokenizer.encode(text, special=text not in TEXTS)
        tokens = model.generate(
            torch.tensor([ids]), max_new_tokens=options.tokens, temperature=0, ignore_eos=True
        )
        with torch.no_grad():
            mine = model(tokens[:, :-1]).logits[0].float().numpy()
        print(f"after {text[:30]!r}: {tokens[0, len(ids) :].tolist()[:12]} ...")
        same &= compare(mine, logits_of(theirs, tokens[0, :-1].tolist()), len(ids) - 1)
    sys.exit(not same)


if __name__ == "__main__":
    main()
