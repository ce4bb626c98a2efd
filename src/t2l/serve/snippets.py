"""How an adapter is used elsewhere: programs to copy that run as they stand. Knows other programs' words, no HTTP."""

import json
import re
import shlex
from dataclasses import dataclass

from t2l.prompt import with_description
from t2l.ranks import VLLM_RANKS, next_rank
from t2l.serve.store import Entry


@dataclass(frozen=True)
class Snippet:
    """A program to copy."""

    title: str
    code: str


def snippets(entry: Entry, *, url: str, text: str, in_prompt: bool, base_model: str, token: bool) -> list[Snippet]:
    """Programs that answer one input with an adapter.

    Args:
        entry: The adapter.
        url: Where this server is, without a slash at the end.
        text: The input.
        in_prompt: Whether prompts for the adapter show its description.
        base_model: The base model's reference.
        token: Whether the server asks for one; the programs take it from the environment.
    """
    turns = [{"role": "user", "content": text}]
    shown = with_description(turns, entry.description) if in_prompt else turns
    header = ' -H "Authorization: Bearer $T2L_TOKEN"' if token else ""
    return [
        Snippet("curl", _curl(entry, url, turns, header)),
        Snippet("OpenAI client", _openai(entry, url, turns, token)),
        Snippet("Transformers", _transformers(entry, url, shown, base_model, token)),
        Snippet("vLLM", _vllm(entry, url, shown, base_model, header)),
        Snippet("llama.cpp", _llama_cpp(entry, url, shown, base_model, header)),
    ]


def _curl(entry: Entry, url: str, turns: list[dict[str, str]], header: str) -> str:
    body = json.dumps({"model": entry.id, "messages": turns, "temperature": 0, "max_tokens": 64}, ensure_ascii=False)
    return (
        f"curl -s {url}/v1/chat/completions{header} \\\n  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}\n"
    )


def _openai(entry: Entry, url: str, turns: list[dict[str, str]], token: bool) -> str:
    key = 'os.environ["T2L_TOKEN"]' if token else '"none"'
    return (
        ("import os\n\n" if token else "") + "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{url}/v1", api_key={key})\n'
        "reply = client.chat.completions.create(\n"
        f'    model="{entry.id}",\n    messages={turns!r},\n    temperature=0,\n    max_tokens=64,\n)\n'
        "print(reply.choices[0].message.content)\n"
    )


def _transformers(entry: Entry, url: str, shown: list[dict[str, str]], base_model: str, token: bool) -> str:
    headers = '{"Authorization": "Bearer " + os.environ["T2L_TOKEN"]}' if token else "{}"
    return (
        "import io\n" + ("import os\n" if token else "") + "import urllib.request\nimport zipfile\n\n"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "from t2l.hub import resolve\n\n"
        f'request = urllib.request.Request("{url}/v1/adapters/{entry.id}/download", headers={headers})\n'
        "zipfile.ZipFile(io.BytesIO(urllib.request.urlopen(request).read())).extractall()\n\n"
        f"folder = resolve({base_model!r})\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")\n'
        f'model = PeftModel.from_pretrained(base, "{entry.id}")\n\n'
        f"messages = {shown!r}\n"
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        "output = model.generate(**inputs, max_new_tokens=64, do_sample=False)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())\n'
    )


def _vllm(entry: Entry, url: str, shown: list[dict[str, str]], base_model: str, header: str) -> str:
    rank = next_rank(min(entry.spec.rank, VLLM_RANKS[-1]))
    body = json.dumps({"model": entry.id, "messages": shown, "temperature": 0, "max_tokens": 64}, ensure_ascii=False)
    return (
        f"curl -sfo {entry.id}.zip{header} {url}/v1/adapters/{entry.id}/download\n"
        f"python -m zipfile -e {entry.id}.zip .\n"
        f"vllm serve {_folder(base_model)} --port 8001 \\\n"
        f"  --enable-lora --max-lora-rank {rank} --lora-modules {entry.id}=./{entry.id} &\n" + _asked(8001, body)
    )


def _llama_cpp(entry: Entry, url: str, shown: list[dict[str, str]], base_model: str, header: str) -> str:
    body = json.dumps({"messages": shown, "temperature": 0, "max_tokens": 64}, ensure_ascii=False)
    base = re.sub(r"\W+", "-", base_model).strip("-") + ".gguf"
    return (
        "# Needs llama-server on the PATH, llama.cpp's source in ./llama.cpp,\n# and sentencepiece for its converter.\n"
        f"test -f {base} || python llama.cpp/convert_hf_to_gguf.py {_folder(base_model)} --outfile {base}\n"
        f"curl -sfo {entry.id}.gguf{header} '{url}/v1/adapters/{entry.id}/download?format=gguf'\n"
        f"llama-server -m {base} --lora {entry.id}.gguf --port 8002 &\n" + _asked(8002, body)
    )


def _asked(port: int, body: str) -> str:
    """A request to the server that was started last, as soon as it answers; none if it has ended."""
    return (
        f"until curl -sf http://127.0.0.1:{port}/health; do sleep 1; kill -0 $! || break; done\n"
        f"curl -s http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}\n"
    )


def _folder(base_model: str) -> str:
    """What a shell turns into the folder of the base model."""
    return f'"$(python -c {shlex.quote(f"from t2l.hub import resolve; print(resolve({base_model!r}))")})"'
