"""What many adapters cost beside one, counted in calls of PyTorch's operators: on a GPU each is a launch or a copy."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from conftest import make_base, make_config
from serve_helpers import make_adapter, make_prompt
from torch.utils._python_dispatch import TorchDispatchMode

from t2l.serve.answers import Answer, Generation
from t2l.serve.batch import Batch
from t2l.serve.rows import RowAdapters


class Operators(TorchDispatchMode):
    """Counts the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_eight_adapters_in_use_cost_what_one_costs(tiny_tokenizer: Any) -> None:
    """From joining over the first tokens to the last, adapters staying on the device as on a GPU."""
    model = make_base(make_config())
    model.generation_config.eos_token_id = 999  # no answer ends early
    batch = Batch(model, tiny_tokenizer, prompt_piece=64, on_end=lambda answer, end: None)
    batch._adapters = RowAdapters(model, keep=True)
    adapters = [make_adapter(model, seed) for seed in range(8)]

    def counted(part: Callable[[], object]) -> Counter[str]:
        with Operators() as operators:
            part()
        return operators.counts

    def serve(number: int) -> list[Counter[str]]:
        asked = [Generation(prompt=make_prompt(n), adapter=adapters[n % number], max_tokens=5) for n in range(8)]
        found = [counted(lambda: batch.join([Answer(generation) for generation in asked]))]
        while batch.rows:
            found.append(counted(batch.step))
        return found

    serve(8)  # the first rows with an adapter bring it to the device
    many, one = serve(8), serve(1)
    assert many == one and len(one) > 5
    assert one[0]["aten.copy_.default"] > 16, "each row has a copy of its adapter's A and B"
    batch.close()
