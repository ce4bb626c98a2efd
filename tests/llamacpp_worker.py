"""Answers with llama.cpp, through the functions of its C interface; run by an interpreter that has `llama_cpp`.

Reads a request as JSON on standard input: `base` and `adapters` are GGUF files, and each of `runs` has `tokens`, one
of `scales` for each adapter (null leaves it out) and `new`, how many tokens to add greedily. Prints one answer for each
run as JSON: `logits`, a file with the logits (T, V) after every token, and `tokens`, those that were added.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    request = json.load(sys.stdin)
    llama_cpp.llama_backend_init()
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(request["base"].encode(), parameters)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {request['base']}")
    adapters = []
    for path in request["adapters"]:
        adapters.append(llama_cpp.llama_adapter_lora_init(model, path.encode()))
        if not adapters[-1]:
            raise SystemExit(f"llama.cpp cannot load the adapter {path}")
    answers = []
    for number, run in enumerate(request["runs"]):
        logits, added = answer(model, adapters, run)
        path = Path(request["output"]) / f"logits-{number}.npy"
        np.save(path, logits)
        answers.append({"logits": str(path), "tokens": added})
    json.dump(answers, sys.stdout)


def answer(model, adapters, run):
    """One run in a context of its own, so that nothing cached crosses from one adapter to another."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # float32, as Transformers keeps keys and values here
    settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    use(
        context, [(adapter, scale) for adapter, scale in zip(adapters, run["scales"], strict=True) if scale is not None]
    )
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens, added = list(run["tokens"]), []
    rows = decode(context, tokens, 0, vocabulary)
    last = rows[-1]
    for step in range(run["new"]):
        added.append(int(last.argmax()))
        if step + 1 < run["new"]:
            last = decode(context, [added[-1]], len(tokens) + step, vocabulary)[-1]
    llama_cpp.llama_free(context)
    return rows, added


def use(context, chosen):
    """Puts adapters on a context; newer versions take them all at once."""
    if hasattr(llama_cpp, "llama_set_adapters_lora"):
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(chosen))(*[adapter for adapter, _ in chosen])
        scales = (ctypes.c_float * len(chosen))(*[scale for _, scale in chosen])
        code = llama_cpp.llama_set_adapters_lora(context, pointers, len(chosen), scales)
        if code:
            raise SystemExit(f"llama.cpp refuses the adapters: {code}")
        return
    for adapter, scale in chosen:
        if llama_cpp.llama_set_adapter_lora(context, adapter, scale):
            raise SystemExit("llama.cpp refuses an adapter")


def decode(context, tokens, start, vocabulary):
    """Logits (T, V) after each of the tokens, the first of which stands at `start`."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = token
        batch.pos[position] = start + position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama.cpp cannot decode the tokens")
    size = len(tokens) * vocabulary
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(size,)).copy()
    llama_cpp.llama_batch_free(batch)
    return found.reshape(len(tokens), vocabulary)


if __name__ == "__main__":
    main()
