"""How much a server takes on. Knows nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is taken on at once, and how much one request may ask for."""

    rows: int = 16
    """Answers that are written at the same time."""
    tokens: int = 32_768
    """Rows times the longest row, prompt and answer together: what bounds the cache's memory."""
    prompt_piece: int = 512
    """Tokens of prompts that are read between two tokens of the answers under way; longer prompts take several."""
    waiting: int = 128
    """Requests that wait for a row; more are refused."""
    description_bytes: int = 8_192
    choices: int = 16
    """Answers of one request: `n` times the prompts."""
    max_tokens: int = 1_024
    """Of an answer."""
    timeout: float = 300.0
    """Seconds after which an answer is given up, and the most that a request may ask for."""
