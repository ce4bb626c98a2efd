"""Encoders: the numbers are those of the model's own recipe, and no description is cut, mixed up or let through."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DESCRIPTIONS, make_base, make_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from t2l import bert, hub
from t2l.config import EncoderConfig
from t2l.encoder import MAX_BYTES, SentenceEncoder, TokenEncoder, check_description, load_encoder
from t2l.errors import CheckpointError, ConfigError, DescriptionError


@pytest.fixture(scope="module")
def sentence(sentence_folder: Path) -> SentenceEncoder:
    return SentenceEncoder.from_folder(sentence_folder, max_tokens=96)


@pytest.fixture(scope="module")
def tokens(tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> TokenEncoder:
    return TokenEncoder(tiny_base, tiny_tokenizer, layers=(1, 3), max_tokens=96)


def bert_states(folder: Path, text: str) -> Tensor:
    """Last hidden states (S, E) of a text by itself, through Transformers alone."""
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).last_hidden_state[0]


# -------------------------------------------------------------------------------------------------- sentence


def test_loading_prints_nothing(sentence_folder: Path, base_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Transformers draws a bar even into a log; and leaves it as it was for programs that want it."""
    for config in (
        EncoderConfig(kind="sentence", model=str(sentence_folder), max_tokens=96),
        EncoderConfig(kind="tokens", model=str(base_folder), layers=(1,), max_tokens=96),
    ):
        load_encoder(config, "unused")
    assert capfd.readouterr() == ("", "")
    AutoModel.from_pretrained(sentence_folder)
    assert "Loading weights" in capfd.readouterr().err


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("mean_tokens", lambda states: states.sum(0) / len(states)),
        ("cls_token", lambda states: states[0]),
        ("lasttoken", lambda states: states[-1]),
    ],
)
def test_pooling_is_what_the_folder_says(
    pooling: str,
    pool: Callable[[Tensor], Tensor],
    normalize: bool,
    make_sentence_folder: Callable[..., Path],
) -> None:
    """In a padded batch, each description equals its states pooled by hand."""
    folder = make_sentence_folder(pooling, normalize=normalize)
    encoded = SentenceEncoder.from_folder(folder, max_tokens=96).encode(DESCRIPTIONS)
    assert encoded.mask is None
    assert encoded.states.shape == (len(DESCRIPTIONS), 32)
    for text, state in zip(DESCRIPTIONS, encoded.states, strict=True):
        expected = pool(bert_states(folder, text))
        if normalize:
            expected = expected / expected.square().sum().sqrt()
        assert (state - expected).abs().max() <= 1e-5


def test_plain_encoder_folder_is_pooled_by_the_mean(make_sentence_folder: Callable[..., Path]) -> None:
    folder = make_sentence_folder("cls_token")
    (folder / "modules.json").unlink()
    (state,) = SentenceEncoder.from_folder(folder, max_tokens=96).encode(["Add."]).states
    assert (state - bert_states(folder, "Add.").mean(0)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        ({"pooling": "max_tokens"}, r"pools by \['max_tokens'\]; known are mean_tokens"),
        ({"extra": ("Dense",)}, "has a module 'Dense'"),
    ],
    ids=["max pooling", "dense layer"],
)
def test_what_is_not_computed_is_refused(
    make: dict[str, Any], match: str, make_sentence_folder: Callable[..., Path]
) -> None:
    """Ignoring a module would give other embeddings than the checkpoint was trained with."""
    with pytest.raises(ConfigError, match=match):
        SentenceEncoder.from_folder(make_sentence_folder(**make), max_tokens=96)


def test_two_poolings_at_once_are_refused(make_sentence_folder: Callable[..., Path]) -> None:
    folder = make_sentence_folder()
    path = folder / "1_Pooling" / "config.json"
    path.write_text(path.read_text().replace('"pooling_mode_cls_token": false', '"pooling_mode_cls_token": true'))
    with pytest.raises(ConfigError, match=r"cls_token.*mean_tokens"):
        SentenceEncoder.from_folder(folder, max_tokens=96)


def test_window_beyond_the_models_own_is_refused(sentence_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens is 121, .* at most 120"):
        SentenceEncoder.from_folder(sentence_folder, max_tokens=121)


def test_sentence_batch_equals_single_calls(sentence: SentenceEncoder) -> None:
    together = sentence.encode(DESCRIPTIONS).states
    for n, text in enumerate(DESCRIPTIONS):
        assert (together[n] - sentence.encode([text]).states[0]).abs().max() <= 1e-5
    assert (together[0] - together[1]).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------- tokens


def test_states_are_the_models_own(tokens: TokenEncoder, tiny_base: LlamaForCausalLM) -> None:
    """Normalised outputs of blocks 1 and 3, begun with the beginning-of-sequence token."""
    text = "Add the two numbers."
    encoded = tokens.encode([text])
    ids = [0, *tokens.tokenizer(text, add_special_tokens=False).input_ids]
    states = tiny_base(torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = torch.cat([F.layer_norm(states[layer], (32,)) for layer in (1, 3)], dim=-1)
    assert tokens.embedding_size == 64
    assert encoded.states.shape == (1, len(text) + 1, 64)
    assert encoded.mask is not None and encoded.mask.all()
    assert (encoded.states - expected).abs().max() <= 1e-5


def test_token_batch_equals_single_calls_in_any_order(tokens: TokenEncoder) -> None:
    """Padding and company leave a description's states as they are."""
    order = [2, 0, 3, 1]
    together = tokens.encode(DESCRIPTIONS)
    shuffled = tokens.encode([DESCRIPTIONS[n] for n in order])
    assert together.mask is not None and shuffled.mask is not None
    for n, text in enumerate(DESCRIPTIONS):
        alone = tokens.encode([text]).states[0]
        assert together.mask[n].sum() == len(alone) == len(text.encode()) + 1
        assert (together.states[n, : len(alone)] - alone).abs().max() <= 2e-5
        assert not together.states[n, len(alone) :].any()
        assert (shuffled.states[order.index(n), : len(alone)] - alone).abs().max() <= 2e-5


@pytest.mark.parametrize("layers", [(), (4,), (1, -1)])
def test_layers_out_of_range_are_refused(
    layers: tuple[int, ...], tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ConfigError, match=r"must lie in 0\.\.3"):
        TokenEncoder(tiny_base, tiny_tokenizer, layers=layers, max_tokens=96)


def test_layer_0_is_the_input_embeddings(tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Of the token itself, whatever stands around it, before what the blocks make of it."""
    encoder = TokenEncoder(tiny_base, tiny_tokenizer, layers=(0, 2), max_tokens=96)
    states = encoder.encode(["Add. Add."]).states[0]
    ids = [*encoder.prefix, *tiny_tokenizer("Add. Add.", add_special_tokens=False).input_ids]
    embedded = tiny_base.get_input_embeddings()(torch.tensor(ids)).detach()
    width = embedded.shape[-1]
    assert (states[:, :width] - F.layer_norm(embedded, (width,))).abs().max() <= 1e-5
    deeper = TokenEncoder(tiny_base, tiny_tokenizer, layers=(2,), max_tokens=96).encode(["Add. Add."]).states[0]
    assert torch.equal(states[:, width:], deeper)


def test_encoding_leaves_no_gradient_and_runs_no_head(tokens: TokenEncoder, tiny_base: LlamaForCausalLM) -> None:
    calls: list[int] = []
    handle = tiny_base.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        states = tokens.encode(["Add."]).states
    finally:
        handle.remove()
    assert not states.requires_grad and not calls


def test_encoding_leaves_no_hook(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Also not the one that Transformers leaves where hidden states are asked for: it breaks compiled layers."""
    base = make_base(make_config())
    TokenEncoder(base, tiny_tokenizer, layers=(1, 3), max_tokens=32).encode(["Add."])
    assert not any(module._forward_hooks for module in base.modules())


# --------------------------------------------------------------------------------------------------- loading


def test_load_encoder_takes_the_base_in_memory_or_the_one_named(
    base_folder: Path, sentence_folder: Path, tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = EncoderConfig(kind="tokens", model="base", layers=(2,), max_tokens=50)
    given = load_encoder(config, "no/such-model", base=(tiny_base, tiny_tokenizer))
    loaded = load_encoder(config, str(base_folder))
    other = load_encoder(
        EncoderConfig(kind="tokens", model=str(base_folder), layers=(2,)), "no/such-model", base=(None, None)
    )
    for encoder in (loaded, other):
        assert (given.encode(["Add."]).states - encoder.encode(["Add."]).states).abs().max() <= 1e-6
    assert (given.max_tokens, given.kind, given.embedding_size) == (50, "tokens", 32)
    sentence = load_encoder(EncoderConfig(kind="sentence", model=str(sentence_folder), max_tokens=60), "no/such-model")
    assert (sentence.kind, sentence.embedding_size, sentence.max_tokens) == ("sentence", 32, 60)


def test_a_bidirectional_model_encodes_tokens_too(sentence_folder: Path) -> None:
    """It has no language-model head, and needs none."""
    config = EncoderConfig(kind="tokens", model=str(sentence_folder), layers=(1, 2), max_tokens=60)
    encoder = load_encoder(config, "no/such-model")
    encoded = encoder.encode(["Add.", "Add two numbers."])
    model = AutoModel.from_pretrained(sentence_folder).eval()
    ids = AutoTokenizer.from_pretrained(sentence_folder)("Add.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[1:]
    expected = torch.cat([F.layer_norm(x[0], x.shape[-1:]) for x in expected], dim=-1)
    assert encoder.embedding_size == 64
    assert (encoded.states[0, : ids.shape[1]] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "config",
    [EncoderConfig(kind="tokens", model="folder", layers=(1,)), EncoderConfig(kind="sentence", model="folder")],
    ids=["tokens", "sentence"],
)
def test_an_encoder_without_some_weights_is_refused(
    config: EncoderConfig, make_sentence_folder: Callable[..., Path]
) -> None:
    """Transformers would draw them at random; the pooler is none of ours."""
    folder = make_sentence_folder()
    config = replace(config, model=str(folder), max_tokens=60)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"})
    load_encoder(config, "no/such-model")
    save_file({k: v for k, v in weights.items() if "layer.1." not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"16 weights are missing from its safetensors files: encoder\.layer\.1"):
        load_encoder(config, "no/such-model")


# ----------------------------------------------------------------------------------------------- descriptions

BAD_DESCRIPTIONS = {
    "empty": ("", "is empty"),
    "white space": (" \n\t ", "only white space"),
    "100 kB": ("word " * 20_000, r"100,000 bytes; at most 32,768"),
    "lone surrogate": ("Add \ud800 numbers", r"not valid UTF-8 \(position 4\)"),
    "bytes": (b"Add the numbers", "must be text, got bytes"),
    "nothing": (None, "must be text, got NoneType"),
}


@pytest.mark.parametrize(("text", "match"), BAD_DESCRIPTIONS.values(), ids=BAD_DESCRIPTIONS.keys())
@pytest.mark.parametrize("kind", ["sentence", "tokens"])
def test_bad_descriptions_are_refused(kind: str, text: Any, match: str, request: pytest.FixtureRequest) -> None:
    """Also as one among good ones."""
    encoder = request.getfixturevalue(kind)
    with pytest.raises(DescriptionError, match=match):
        encoder.encode(["Add the two numbers.", text])


@pytest.mark.parametrize("kind", ["sentence", "tokens"])
def test_window_is_exact_and_names_both_lengths(kind: str, request: pytest.FixtureRequest) -> None:
    """Never cut: one token too many is an error, not a description without its end."""
    encoder = request.getfixturevalue(kind)
    special = 2 if kind == "sentence" else 1
    assert encoder.encode(["x" * (96 - special)]).states.isfinite().all()
    with pytest.raises(DescriptionError, match=r"has 97 tokens; .* at most 96.*Shorten it: “xxx"):
        encoder.encode(["x" * (97 - special)])


@pytest.mark.parametrize("kind", ["sentence", "tokens"])
def test_no_description_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(DescriptionError, match="No description"):
        request.getfixturevalue(kind).encode([])


@pytest.mark.parametrize("kind", ["sentence", "tokens"])
def test_space_around_a_description_does_not_matter(kind: str, request: pytest.FixtureRequest) -> None:
    encoder = request.getfixturevalue(kind)
    assert torch.equal(encoder.encode([" Add.\n"]).states, encoder.encode(["Add."]).states)


def test_bound_of_bytes_is_exact() -> None:
    assert check_description("é" * (MAX_BYTES // 2)) == "é" * (MAX_BYTES // 2)
    with pytest.raises(DescriptionError, match="32,769 bytes"):
        check_description("é" * (MAX_BYTES // 2) + "x")


def test_a_bert_is_read_as_transformers_reads_it(make_sentence_folder: Callable[..., Path]) -> None:
    """The same token ids and the same numbers, padded or not; what is not the plain kind is left to Transformers."""
    folder = make_sentence_folder()
    loaded = bert.load(folder)
    assert loaded is not None
    model, tokenizer = loaded
    theirs, their_tokenizer = hub.load_backbone(str(folder)), hub.load_tokenizer(str(folder))
    texts = ["Add.", "Say whether the review is positive — or not: é", "x" * 50]
    ids = tokenizer(texts).input_ids
    assert ids == their_tokenizer(texts).input_ids
    for rows in (ids[:1], ids):
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        ours, expected = (
            x(input_ids=tokens, attention_mask=mask).last_hidden_state * mask[..., None] for x in (model, theirs)
        )
        assert torch.allclose(ours, expected, atol=1e-6)
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    for change in ({"hidden_act": "relu"}, {"model_type": "roberta"}, {"position_embedding_type": "relative_key"}):
        path.write_text(json.dumps(plain | change))
        assert bert.load(folder) is None
