"""What the tests of the command line share: a tiny base, a tiny checkpoint, and calls."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from t2l import cli, hub
from t2l.checkpoint import CheckpointConfig, save_checkpoint
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.hypernet import Hypernet
from t2l.spec import AdapterSpec

TASKS = ("Say whether the text is about rain.", "Write the opposite of the word.", "Name the city.")


def failed(result: Result, *parts: str) -> str:
    """The one line that a failure prints."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line
    return line


def write_base(folder: Path, hidden_size: int, seed: int) -> Path:
    """A tiny Llama with one token a byte."""
    specials = ("<s>", "</s>", "<pad>")
    vocab = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_only = Tokenizer(BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, base: Path, *, trained: bool = True) -> Path:
    """A checkpoint that reads the base's own states; `trained` fills what starts at zero."""
    spec = AdapterSpec.from_config(hub.load_config(str(base)), str(base), LoraConfig(r=4, lora_alpha=8))
    encoder = EncoderConfig(kind="tokens", model="base", layers=(1, 2), max_tokens=128)
    config = HypernetConfig(width=16, head_size=16, token_blocks=1, attention_heads=2)
    size = 2 * int(hub.load_config(str(base)).hidden_size)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        hypernet = Hypernet(spec, embedding_size=size, kind="tokens", config=config)
        if trained:
            for parameter in hypernet.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    saved = CheckpointConfig.current(
        {"seed": 7, "steps": 3},
        embedding_size=size,
        encoder=encoder,
        encoder_revision=hub.fingerprint(str(base)),
        hypernet=config,
        prompt=PromptConfig(description_in_prompt=True),
    )
    save_checkpoint(folder, hypernet, spec, saved, dtype=torch.float32)
    return folder


def t2l(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
