"""What the tests of the hypernetwork share."""

from torch import Tensor

from t2l.lora import LoraTensors


def tensors(lora: LoraTensors) -> tuple[Tensor, ...]:
    return (*lora.a, *lora.b)


def close(one: LoraTensors, other: LoraTensors, tolerance: float = 1e-5) -> bool:
    return all(
        x.shape == y.shape and (x - y).abs().max() <= tolerance
        for x, y in zip(tensors(one), tensors(other), strict=True)
    )
