"""Tiny published networks with fixed weights, and what they write: what `t2l.sakana` is compared with.

The network is written here from its description (the paper's appendix, and the facts about the authors' checkpoints in
the docstring of `t2l.sakana`), one layer and one module at a time, in plain functions that share no code with the
library. Names and shapes of the weights are those of a published `hypermod.pt`.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, silu

LAYERS, RANK, LATENT, HEAD, EMBEDDING = 3, 2, 16, 12, 32
SIZES = {"v_proj": (32, 16), "q_proj": (32, 32), "down_proj": (48, 32)}
"""In and out features, in the order of the heads, which is nobody's alphabet."""
CASES: dict[str, dict[str, object]] = {
    "L": {},
    "M": {"shared_AB_head": True},
    "S": {"shared_AB_head": True, "autoreg_gen": True},
    "L-scores": {"training_task": "recon", "factorized": True, "pred_z_score": True},
    "M-delta": {"shared_AB_head": True, "training_task": "recon", "pred_z_score": False, "delta_w_scaling": 100},
}
"""Settings of each network, as `args.yaml` has them."""

State = dict[str, Tensor]


def make_state(case: dict[str, object], generator: torch.Generator) -> State:
    """Random weights under the published names."""
    state: State = {}

    def draw(name: str, *shape: int, size: float = 0.5) -> None:
        state[name] = size * torch.randn(*shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        draw(f"{name}.weight", outputs, inputs, size=inputs**-0.5)
        if bias:
            draw(f"{name}.bias", outputs, size=0.1)

    def norm(name: str, size: int) -> None:
        draw(f"{name}.weight", size, size=0.3)
        state[f"{name}.weight"] += 1
        draw(f"{name}.bias", size, size=0.1)

    for kind in ("AB_offset", "mean_recon_target", "std_recon_target"):
        for module, (i, o) in SIZES.items():
            draw(f"{kind}.A.{module}", LAYERS, RANK, i, size=0.2)
            draw(f"{kind}.B.{module}", LAYERS, o, RANK, size=0.2)
    recon = case.get("training_task") == "recon"
    for name, value in state.items():
        if name.startswith("std"):
            value.abs_()
        elif name.startswith("AB_offset") and recon:
            value.zero_()  # reconstruction has no offset
    linear("task_encoder.mlp.0", EMBEDDING, LATENT // 2)
    norm("task_encoder.mlp.1", LATENT // 2)
    for name, number in (("layer_depth_encoder", LAYERS), ("layer_type_encoder", len(SIZES))):
        draw(f"{name}.0.weight", number, LATENT // 4, size=1.0)
        norm(f"{name}.1", LATENT // 4)
    linear("mixer.1", LATENT, 4 * LATENT)
    linear("mixer.4", 4 * LATENT, LATENT)
    for block in ("mlp1", "mlp2"):
        norm(f"{block}.mlp.0", LATENT)
        linear(f"{block}.mlp.1", LATENT, 4 * LATENT)
        linear(f"{block}.mlp.4", 4 * LATENT, LATENT)
    norm("mlp3.0", LATENT)
    linear("mlp3.1", LATENT, 4 * LATENT)
    linear("mlp3.4", 4 * LATENT, HEAD)
    if case.get("shared_AB_head"):
        for module in SIZES:
            for part in "AB":
                draw(f"out_emb.{module}.{part}", LATENT, size=1.0)
        norm("out_emb_norm", LATENT)
    for module, (i, o) in SIZES.items():
        outputs = max(i, o) if case.get("shared_AB_head") else i + o
        outputs *= 1 if case.get("autoreg_gen") else RANK
        linear(f"heads.{module}", HEAD, outputs, bias=not case.get("pred_z_score", False))
    return state


def network(state: State, case: dict[str, object], embedding: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A (R, I) and B (O, R) of each module and layer, for one description's embedding as the encoder gives it."""

    def linear(name: str, x: Tensor) -> Tensor:
        out = state[f"{name}.weight"] @ x
        return out + state[f"{name}.bias"] if f"{name}.bias" in state else out

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape, state[f"{name}.weight"], state[f"{name}.bias"])

    def two(first: str, second: str, x: Tensor) -> Tensor:
        return silu(linear(second, silu(linear(first, x))))

    def residual(block: str, x: Tensor) -> Tensor:
        return x + two(f"{block}.mlp.1", f"{block}.mlp.4", norm(f"{block}.mlp.0", x))

    def last(x: Tensor) -> Tensor:
        return two("mlp3.1", "mlp3.4", norm("mlp3.0", x))

    text = normalize(embedding, dim=0) * EMBEDDING**0.5
    task = norm("task_encoder.mlp.1", linear("task_encoder.mlp.0", text))
    written = {}
    for number, (module, sizes) in enumerate(SIZES.items()):
        for layer in range(LAYERS):
            depth = norm("layer_depth_encoder.1", state["layer_depth_encoder.0.weight"][layer])
            kind = norm("layer_type_encoder.1", state["layer_type_encoder.0.weight"][number])
            mixed = two("mixer.1", "mixer.4", torch.cat([task, depth, kind]))
            x = residual("mlp1", mixed)
            if case.get("shared_AB_head"):
                a, b = (
                    shared_part(state, case, module, part, size, x, linear, norm, residual, last)
                    for part, size in zip("AB", sizes, strict=True)
                )
            else:
                flat = linear(f"heads.{module}", last(residual("mlp2", x)))
                a = flat[: RANK * sizes[0]].reshape(RANK, sizes[0])
                b = flat[RANK * sizes[0] :].reshape(RANK, sizes[1])
            written[f"{module}.{layer}"] = raw(state, case, module, layer, a, b.T)
    return written


def shared_part(state, case, module, part, size, x, linear, norm, residual, last) -> Tensor:  # type: ignore[no-untyped-def]
    """A (R, I), or B as (R, O), of the networks whose one matrix writes both."""
    x = residual("mlp2", x + norm("out_emb_norm", state[f"out_emb.{module}.{part}"]))
    if not case.get("autoreg_gen"):
        return linear(f"heads.{module}", last(x)).reshape(RANK, -1)[:, :size]
    rows = []
    for rank in range(RANK):
        turned = x.clone()
        half = LATENT // 2
        for i in range(half):
            angle = torch.tensor(rank * 10000.0 ** (-2 * i / LATENT))
            turned[i] = x[i] * angle.cos() - x[half + i] * angle.sin()
            turned[half + i] = x[half + i] * angle.cos() + x[i] * angle.sin()
        rows.append(linear(f"heads.{module}", last(residual("mlp2", turned)))[:size])
    return torch.stack(rows)


def raw(state: State, case: dict[str, object], module: str, layer: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What an adapter has, from what the network wrote."""

    def constant(kind: str, part: str) -> Tensor:
        return state[f"{kind}.{part}.{module}"][layer]

    if case.get("training_task") != "recon":
        return a + constant("AB_offset", "A"), b + constant("AB_offset", "B")
    if not case.get("factorized"):
        scale = float(str(case["delta_w_scaling"])) ** 0.5
        return a / scale, b / scale
    a = a * (constant("std_recon_target", "A") + 1e-10) + constant("mean_recon_target", "A")
    return a, b * (constant("std_recon_target", "B") + 1e-10) + constant("mean_recon_target", "B")


_generator = torch.Generator().manual_seed(11)
EMBEDDINGS = torch.randn(2, EMBEDDING, generator=_generator)
WEIGHTS = {name: make_state(case, _generator) for name, case in CASES.items()}
"""Of each network, in the order of its file, which is the order of its heads."""
