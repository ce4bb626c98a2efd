"""The loss of the base model's answers under adapters, on packed rows.

The base runs its own forward pass, whatever it does before, in and after its layers; only what its head sees is cut
down to the answers' positions. Knows models and packed rows. Knows no tasks and no hypernetwork.
Shape letters: B rows, T tokens of a row, A answer tokens of a row, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2l.apply import AdapterHooks
from t2l.errors import ConfigError
from t2l.lora import LoraTensors
from t2l.train.packing import PADDING, SHARED, Documents, PackedRows, pack


class AnswerLosses(NamedTuple):
    """What the base makes of the labels of packed rows."""

    losses: Tensor
    """(B, A) in nats."""
    correct: Tensor
    """(B, A) whether the label is the base's first choice."""


LossFunction = Callable[..., AnswerLosses]
"""(rows, adapters or None, noise on the input embeddings or None, label smoothing or None) to the answers' losses."""


def answer_losses(base: Any, slots: AdapterHooks, *, keep: bool = False, fuse: bool = False) -> LossFunction:
    """The function from packed rows under adapters, one a row, to the losses of their answers.

    Args:
        base: The base model.
        slots: Where its adapters go.
        keep: Leave them there, for gradient checkpointing, which runs the layers once more in the backward pass.
        fuse: Compile what comes after the head; the layers are compiled apart, see `t2l.apply.compiled`.
    """
    measure = torch.compile(_measure, dynamic=False) if fuse else _measure
    head = base.get_output_embeddings()

    def function(
        rows: PackedRows, lora: LoraTensors | None, noise: Tensor | None = None, smoothing: Tensor | None = None
    ) -> AnswerLosses:
        slots.lora = lora
        embedded = base.get_input_embeddings()(rows.tokens)
        if noise is not None:
            embedded = embedded + noise.to(embedded.dtype)
        masks = attention_masks(base.config, rows, embedded.dtype)
        with _at_answers(head, rows.label_positions):
            logits = base(
                inputs_embeds=embedded, position_ids=rows.positions, attention_mask=masks, use_cache=False
            ).logits
        if not keep:
            slots.lora = None
        return AnswerLosses(*measure(logits, rows.labels, smoothing))

    return function


@contextmanager
def _at_answers(head: nn.Module, label_positions: Tensor) -> Iterator[None]:
    """Shows the head the answers' positions alone: (B, A, hidden) in place of (B, T, hidden).

    What the model does with its logits afterwards (scaling them, capping them) stays the model's own.
    """

    def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = inputs
        return (hidden.gather(1, label_positions[..., None].expand(-1, -1, hidden.shape[-1])),)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _measure(logits: Tensor, labels: Tensor, smoothing: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    if smoothing is not None:
        losses = torch.lerp(losses, logits.logsumexp(-1) - logits.mean(-1), smoothing)
    return losses, logits.argmax(-1) == labels


def attention_masks(config: Any, rows: PackedRows, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Which tokens each token sees, (B, 1, T, T), in the form that the model's attention takes.

    A token sees what came before it in its own document, and what all documents of the row begin with. Where some
    layers see only a window, or mix tokens by convolutions, the masks of both kinds of layers, by the names that
    Transformers gives them; a convolution's says which tokens are padding, (B, T).

    Args:
        config: The model's.
        rows: Packed rows.
        dtype: Of the model's states.
    """
    text = config.get_text_config()
    place = torch.arange(rows.tokens.shape[1], device=rows.tokens.device)
    documents = rows.documents
    same = (documents[:, :, None] == documents[:, None, :]) | (documents == SHARED)[:, None, :]
    visible = same & (place[:, None] >= place)
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if document_gap(config):
        return {"full_attention": _as_mask(visible, text, dtype), "conv": documents != PADDING}
    if window is None or window >= rows.tokens.shape[1] or (kinds and "sliding_attention" not in kinds):
        return _as_mask(visible, text, dtype)
    near = visible & (rows.positions[:, :, None] - rows.positions[:, None, :] < window)
    if not kinds:
        return _as_mask(near, text, dtype)
    masks = {"full_attention": visible, "sliding_attention": near}
    return {kind: _as_mask(mask, text, dtype) for kind, mask in masks.items()}


def document_gap(config: Any) -> int:
    """How many tokens of padding keep documents of a row apart where layers mix tokens by short convolutions (LFM2).

    A convolution begins with zeros in front of a document that stands alone, and padding shows it zeros.
    """
    text = config.get_text_config()
    return int(text.conv_L_cache) - 1 if "conv" in (getattr(text, "layer_types", None) or ()) else 0


def _as_mask(visible: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """(B, T, T) of truth values as the attention's mask, (B, 1, T, T).

    Only torch's own attention reads truth values; every other one adds the mask to its scores, where True would count
    as 1 and hide nothing. Transformers has no public name for the attention that a loaded model uses.
    """
    if config._attn_implementation == "sdpa":
        return visible[:, None]
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)[:, None]


def require_packable(base: Any, name: str) -> None:
    """Checks that the base answers in packed rows as it does on each document alone; draws no random numbers.

    Args:
        base: The base model, without adapters.
        name: The base's name, for messages.

    Raises:
        ConfigError: if it does not: it has no attention, takes no mask of its own, or knows no positions; or if its
            losses are not finite.
    """
    device = base.get_input_embeddings().weight.device
    vocabulary, gap = base.config.get_text_config().vocab_size, document_gap(base.config)
    tokens = torch.randint(vocabulary, (17,), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [(tokens[:6], tokens[6:9]), (tokens[:3] + tokens[9:13], tokens[13:])]
    documents = Documents.join(pairs, gap=gap)
    rows = pack([(documents, [0, 1])], tokens=20 + gap, answer_tokens=7, shared=None if gap else [3]).to(device)
    try:
        with torch.no_grad():
            packed = answer_losses(base, AdapterHooks((), "unused"))(rows, None).losses[0]
            alone = torch.cat([_alone(base, torch.tensor([*p, *a], device=device), len(a)) for p, a in pairs])
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"{name} ({type(base).__name__}) cannot be trained on: its forward pass does not take packed rows, with an "
            f"attention mask and positions of their own ({type(error).__name__}: {error})"
        ) from error
    if not alone.isfinite().all():
        raise ConfigError(
            f"{name} ({type(base).__name__}) cannot be trained on: its own losses are not finite, without any adapter; "
            "its weights are damaged, or too large for the type that they are computed in"
        )
    difference = float((packed - alone).abs().mean() / alone.mean())
    # Far above what rounding does (TF32 too), far below what a mask that hides nothing does.
    limit = 0.01 if base.dtype == torch.float32 else 0.02
    if not difference <= limit:
        raise ConfigError(
            f"{name} ({type(base).__name__}) cannot be trained on: in a packed row, where an attention mask keeps "
            f"documents apart, its losses differ by {difference:.1%} from those of each document alone. It may have no "
            "attention, or one that takes no mask"
        )


def _alone(base: Any, tokens: Tensor, labels: int) -> Tensor:
    """Losses of a document's last tokens, by the base itself."""
    logits = base(input_ids=tokens[None]).logits[0, -labels - 1 : -1].float()
    return F.cross_entropy(logits, tokens[-labels:], reduction="none")


def neftune_noise(documents: Tensor, width: int, alpha: float) -> Tensor:
    """Noise for input embeddings (arXiv 2310.05914), (B, T, E): uniform in ± alpha / sqrt(T·E).

    T is the number of tokens of the document that a token stands in, so packing changes nothing. Padding gets noise
    too; nothing sees it.

    Args:
        documents: (B, T) number of the document in its row.
        width: E.
        alpha: Strength.
    """
    lengths = (documents[:, :, None] == documents[:, None, :]).sum(-1, keepdim=True)
    noise = torch.rand(*documents.shape, width, device=documents.device) * 2 - 1
    return noise * (alpha / (lengths * width) ** 0.5)


def checkpoint_layers(base: Any) -> None:
    """Switches gradient checkpointing on in the decoder layers alone.

    Not by the model's own switch: that makes the embeddings ask for a gradient, so that the backward pass would run
    through layers below the first adapter. It sets the same private attribute; there is no public one for a layer.

    Raises:
        ConfigError: if the base has no layers that can be computed again.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"train.gradient_checkpointing: {type(base).__name__} has no layers that know how to")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.training = True  # checkpointing is tied to it; what is inside stays as it is, dropout off
