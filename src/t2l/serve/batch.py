"""The rows that a model works on: they join, read their prompts, get a token a step, and leave.

Rows know nothing of each other: own adapter, own positions, own random numbers, own limits and own end. If one fails,
it leaves alone. The rows that write answers come first, and after them those that still read their prompts, the
shortest prompt first, so that each forward pass is over neighbouring rows and nothing is copied for it.

Knows models, rows and tokens. Knows no threads and no queue.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2l.errors import ConfigError, T2LError
from t2l.eval.decode import cache_argument
from t2l.serve.answers import Answer, End, Generation, Piece, log
from t2l.serve.kv import RowCache
from t2l.serve.packed import PackedLinears
from t2l.serve.rows import RowAdapters
from t2l.serve.sampling import choose
from t2l.serve.text import TextStream


@dataclass(eq=False)
class Row:
    """One answer under way."""

    answer: Answer
    text: TextStream
    draws: random.Random
    read: int = 0
    """Tokens that the model has read: they are in the cache."""
    last: int = -1
    """The newest token, which the model has not read yet."""
    end: Piece | None = None
    """The last piece, when the answer has ended and the row is about to leave."""

    @property
    def unread(self) -> int:
        """Tokens of the prompt that the model has not read."""
        return self.answer.prompt_tokens - self.read


@dataclass(frozen=True)
class Seen:
    """What a row sees after a forward pass, at the tokens that were asked for."""

    logits_KV: Tensor
    most: list[float]
    """The largest logit at each; not finite if any is not (minus infinity apart)."""
    likeliest: list[int]
    """Its token."""


class Batch:
    """The rows of one model.

    Args:
        model: A causal language model whose layers all have attention or a short convolution.
        tokenizer: Its tokenizer.
        prompt_piece: Tokens of prompts that one step reads.
        on_end: Called with each answer that has ended, and the reason.

    Raises:
        ConfigError: if the model's layers keep something else, or a row is not answered as it would be alone.
    """

    def __init__(self, model: Any, tokenizer: Any, *, prompt_piece: int, on_end: Callable[[Answer, End], None]) -> None:
        config = model.config.get_text_config()
        self._kinds = set(getattr(config, "layer_types", None) or ())
        strange = self._kinds - {"full_attention", "sliding_attention", "conv"}
        if strange:
            raise ConfigError(
                f"{config.model_type} has layers of kind {', '.join(sorted(strange))}; only models whose layers all "
                "have attention or a short convolution can be served"
            )
        self.most_tokens: int = getattr(config, "max_position_embeddings", None) or 2**31
        self._window: int | None = getattr(config, "sliding_window", None)
        self.counts: Counter[str] = Counter()
        self.rows: list[Row] = []
        self._writing = 0  # so many of the rows have read their prompts
        self._model, self._tokenizer, self._prompt_piece, self._on_end = model, tokenizer, prompt_piece, on_end
        self._ends, self._parameter = _end_tokens(model, tokenizer), next(model.parameters())
        self._adapters, self._cache = RowAdapters(model), RowCache(config.num_hidden_layers)
        self._cache_name = cache_argument(model)
        # Masks of True and False are understood by PyTorch's own attention only; the others add theirs to the scores.
        self._bool_mask = config._attn_implementation == "sdpa"
        self._packed = PackedLinears(model)
        try:
            self._check()
        except ConfigError:
            self.close()
            raise

    @torch.no_grad()
    def _check(self) -> None:
        """Two rows of different length must see what each sees alone: some models place tokens by themselves.

        Raises:
            ConfigError: naming the largest difference.
        """
        prompts, device = ([1, 3, 5], [2, 3, 5, 7, 11]), self._parameter.device
        kind, worst, largest = self._model.config.model_type, 0.0, 1e-30
        try:
            for prompt in prompts:
                answer = Answer(Generation(prompt=prompt, max_tokens=1))
                self.rows.append(Row(answer, TextStream(self._tokenizer), random.Random(0)))
            read = self._pass(0, [prompts[0] + [0, 0], prompts[1]], [2, 4])
            for row in self.rows:
                row.read = row.answer.prompt_tokens
            written = self._pass(0, [[4], [6]], [0])
            for prompt, last, one, two in zip(prompts, (4, 6), read, written, strict=True):
                ids = torch.tensor([[*prompt, last]], device=device)
                alone = self._model(input_ids=ids, use_cache=False).logits[0].float()
                together = torch.stack([one.logits_KV[(3, 5).index(len(prompt))], two.logits_KV[0]])
                worst = max(worst, float((together - alone[-2:]).abs().max()))
                largest = max(largest, float(alone.abs().max()))
        except Exception as error:  # what a model does with a cache and a mask that it does not know is its own affair
            raise ConfigError(f"{kind} takes no cache and masks like the server's: {error}") from error
        finally:
            self.rows.clear()
            self.counts.clear()
            self._cache.release()
        if not worst <= (1e-3 if self._parameter.dtype == torch.float32 else 5e-2) * largest:
            raise ConfigError(
                f"The logits of {kind} differ by up to {worst:g} (of {largest:g}) when another row is in the batch: it "
                "places tokens by itself and cannot be served"
            )

    @property
    def reading(self) -> bool:
        """Whether some rows still read their prompts; new ones join when none does."""
        return self._writing < len(self.rows)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that the rows take, and on a GPU adapters that are ready for rows to come."""
        rows = {"cache_bytes": self._cache.nbytes, "row_adapter_bytes": self._adapters.nbytes}
        return rows | {"device_adapter_bytes": self._adapters.kept_nbytes}

    def join(self, answers: Sequence[Answer]) -> None:
        """Gives answers rows of their own; one whose adapter does not fit the model ends."""
        assert not self.reading, "rows join together, or after the last ones have read their prompts"
        for answer in sorted(answers, key=lambda answer: answer.prompt_tokens):
            generation = answer.generation
            try:
                self._adapters.set(len(self.rows), generation.adapter)
            except Exception as error:  # whatever it is, the other rows go on
                self._adapters.clear(len(self.rows))
                self._release_if_idle()
                self.end(answer, Piece(end="error", error=told(error)))
                continue
            text = TextStream(self._tokenizer, generation.stops)
            self.rows.append(Row(answer, text, random.Random(generation.sampling.seed)))

    def drop_overdue(self) -> None:
        """Ends the answers that nobody waits for, or whose time is up."""
        for row in self.rows:
            why = row.answer.overdue()
            if why is not None:
                row.end = Piece(row.text.finish(), end=why)
        self._leave()

    def step(self) -> None:
        """Reads a piece of the prompts of rows that joined, and writes one more token for each of the others."""
        if self.reading:
            self._read_prompts()
        if self._writing:
            self._write()

    def fail(self, error: Exception) -> None:
        """Ends all answers with an error."""
        for row in self.rows:
            row.end = Piece(end="error", error=told(error))
        self._leave()

    def close(self) -> None:
        """Leaves the model as it was."""
        self._packed.release()

    def plain(self) -> None:
        """The model is to run without the rows' adapters."""
        self._adapters.select(0, 0)

    def end(self, answer: Answer, piece: Piece) -> None:
        """Tells an answer's last piece."""
        assert piece.end is not None, "a last piece says why it is the last"
        answer.tell(piece)
        self._on_end(answer, piece.end)

    # ------------------------------------------------------------------------------------------------- one step

    def _read_prompts(self) -> None:
        """Reads prompts up to the number of tokens that one step may read."""
        left = self._prompt_piece
        while self.reading and left > 0:
            reading = self.rows[self._writing :]
            length = _piece_length([row.unread for row in reading], max(1, left // len(reading)))
            self._read_piece(reading, length)
            left -= length * len(reading)

    def _read_piece(self, reading: list[Row], length: int) -> None:
        tokens = []
        for row in reading:
            piece = list(row.answer.generation.prompt[row.read : row.read + length])
            # Where a shorter prompt has ended any token will do: nothing sees it before the row's own overwrite it.
            tokens.append(piece + piece[-1:] * (length - len(piece)))
        lasts = sorted({row.unread - 1 for row in reading if row.unread <= length}) or [length - 1]
        through = []
        for row, seen in zip(reading, self._forward(reading, tokens, lasts), strict=True):
            if seen is None:
                continue
            unread = row.unread
            row.read += min(length, unread)
            if unread <= length:
                through.append(row)
                self.counts["prompt_tokens"] += row.answer.prompt_tokens
                self._take(row, seen, lasts.index(unread - 1))
        self._leave()
        # The shortest prompts come first, so the rows that are through are next to the writing ones.
        self._writing += sum(row.end is None for row in through)

    def _write(self) -> None:
        writing = self.rows[: self._writing]
        for row, seen in zip(writing, self._forward(writing, [[row.last] for row in writing], [0]), strict=True):
            if seen is not None:
                row.read += 1
                self._take(row, seen, 0)
        self._leave()

    def _forward(self, rows: list[Row], tokens: list[list[int]], kept: list[int]) -> list[Seen | None]:
        """What each of some neighbouring rows sees after the tokens at `kept`; None for a row that failed."""
        start = self.rows.index(rows[0])
        try:
            return [*self._pass(start, tokens, kept)]
        except Exception as error:
            if len(rows) == 1:
                log.exception("a row failed")
                rows[0].end = Piece(rows[0].text.finish(), end="error", error=told(error))
                return [None]
        # One is at fault, or all are too much at once: each alone. What this pass has written is written again.
        self.counts["batches_retried"] += 1
        return [self._forward([row], [ids], kept)[0] for row, ids in zip(rows, tokens, strict=True)]

    def _pass(self, start: int, tokens: list[list[int]], kept: list[int]) -> list[Seen]:
        device, stop = self._parameter.device, start + len(tokens)
        tokens_BT = torch.tensor(tokens, device=device)
        read, length = [row.read for row in self.rows[start:stop]], len(tokens[0])
        positions_BT = torch.tensor(read, device=device)[:, None] + torch.arange(length, device=device)
        self._adapters.select(start, stop)
        seen_B1TK = self._cache.select(start, positions_BT, max(read) + length)
        output = self._model(
            input_ids=tokens_BT,
            attention_mask=self._masks(seen_B1TK, positions_BT),
            position_ids=positions_BT,
            use_cache=True,
            logits_to_keep=torch.tensor(kept, device=device),
            **{self._cache_name: self._cache},
        )
        self.counts["forward_passes"] += 1
        self.counts["forward_rows"] += len(tokens)
        return _seen(output.logits.float())

    def _masks(self, seen_B1TK: Tensor, positions_BT: Tensor) -> Tensor | dict[str, Tensor]:
        """The masks as the model takes them: by the kind of layer, where it has layers that see a window only."""

        def as_added(mask_B1TK: Tensor) -> Tensor:
            if self._bool_mask:
                return mask_B1TK
            hidden = torch.finfo(self._parameter.dtype).min
            return torch.zeros_like(mask_B1TK, dtype=self._parameter.dtype).masked_fill_(~mask_B1TK, hidden)

        full = as_added(seen_B1TK)
        # Causal convolutions need no mask: padding stands after a row's own tokens.
        masks: dict[str, Any] = {"full_attention": full, "conv": None}
        windowed = "sliding_attention" in self._kinds or not self._kinds
        if self._window is None or not windowed:
            return masks if "conv" in self._kinds else full
        columns_K = torch.arange(seen_B1TK.shape[-1], device=seen_B1TK.device)
        near_B1TK = columns_K > positions_BT[:, None, :, None] - self._window
        sliding = as_added(seen_B1TK & near_B1TK)
        # Models that do not tell kinds of layers apart give all of theirs the window.
        return masks | {"sliding_attention": sliding} if self._kinds else sliding

    def _take(self, row: Row, seen: Seen, place: int) -> None:
        """Chooses a row's next token and tells what is new."""
        try:
            if not math.isfinite(seen.most[place]):
                raise FloatingPointError("the model's logits are not finite; its adapter may be too strong for it")
            choice = choose(seen.logits_KV[place], seen.likeliest[place], row.answer.generation.sampling, row.draws)
            ended = choice.token in self._ends
            text = "" if ended else row.text.push(choice.token)
        except Exception as error:  # this row's alone
            row.end = Piece(end="error", error=told(error))
            return
        row.last = choice.token
        self.counts["answer_tokens"] += 1
        end: End | None = "stop" if ended or row.text.stopped else None
        if end is None and row.answer.tokens + 1 >= row.answer.generation.max_tokens:
            end = "length"
        if end is None:
            row.answer.tell(Piece(text, (choice,)))
            return
        text += row.text.finish()
        row.end = Piece(text, (choice,), "stop" if row.text.stopped else end)

    def _leave(self) -> None:
        """Takes out the rows that have ended, and then tells so: who hears of an end may count on its memory."""
        ended = [row for row in self.rows if row.end is not None]
        for row in ended:
            index = self.rows.index(row)
            if index < self._writing:
                # The last writing row takes its place, and the ones that read close up behind it.
                self._writing -= 1
                self._move(self._writing, index)
                index = self._writing
            for source in range(index + 1, len(self.rows)):
                self._move(source, source - 1)
            self.rows.pop()
            self._adapters.clear(len(self.rows))
            self._cache.clear(len(self.rows))
        self._release_if_idle()
        for row in ended:
            assert row.end is not None
            self.end(row.answer, row.end)

    def _release_if_idle(self) -> None:
        """Without rows the memory goes back, and no hook is left on the model."""
        if not self.rows:
            self._cache.release()
            self._adapters.release()

    def _move(self, source: int, to: int) -> None:
        if source != to:
            self.rows[to] = self.rows[source]
            self._adapters.move(source, to)
            self._cache.move(source, to)


def told(error: Exception) -> str:
    """An error as a client may read it: what this library says on purpose, and otherwise only its kind."""
    return str(error) if isinstance(error, T2LError | FloatingPointError) else type(error).__name__


def _seen(logits_BKV: Tensor) -> list[Seen]:
    """Splits logits by row; what every row needs is brought from the device for all of them at once."""
    most_BK, likeliest_BK = logits_BKV.max(-1)
    return [Seen(*row) for row in zip(logits_BKV, most_BK.tolist(), likeliest_BK.tolist(), strict=True)]


def _piece_length(unread: Sequence[int], most: int) -> int:
    """How many tokens of each prompt are read in one pass.

    Args:
        unread: Of each row, ascending. Rows that have fewer are padded.
        most: The longest piece.

    Returns:
        The longest piece in which at most a fifth of the tokens are padding.
    """
    found = min(unread[0], most)
    for length in sorted({min(length, most) for length in unread}):
        if 5 * sum(min(length, own) for own in unread) >= 4 * length * len(unread):
            found = length
    return found


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the model's, or the tokenizer's where the model names none."""
    named = model.generation_config.eos_token_id
    if named is None:
        named = tokenizer.eos_token_id
    return set() if named is None else set(named) if isinstance(named, Sequence) else {named}
