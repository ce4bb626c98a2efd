"""Why `hypernet.follow` needs no learnt map: in the shipped base a token's state in a description finds the same token
where an answer is written."""

from collections.abc import Callable

import pytest
import torch

from t2l import TextToLora, models

LABELS = {
    "Label an online comment Identity-attack if it shows hatred, label it Non-identity-attack if not.": (
        "You people should leave my country.\nassistant\n Non-identity-attack"
    ),
    "object of the sentence: Singular or Plural?": "The boxes fell over as she moved.\nassistant\n Singular",
    "tag the tweet OFFENSIVE or NOT": "@USER you are a fool\nassistant\n OFFENSIVE",
    "Answer Answerable if the story gives the reason and Not Answerable if it is left unsaid.": (
        "The man went home. Why did he?\nassistant\n Not Answerable"
    ),
    "overruling when it rejects a previous decision, non-overruling for any other statement": (
        "the court holds that\nassistant\n non-overruling"
    ),
    "write step by step for tools and helpdesk for animals": "hammer\nassistant\n step by step",
}


TAPS = (0, 10, 20, 30)
"""Layers whose states the shipped checkpoint reads; 0 are the input embeddings."""


@pytest.fixture(scope="module")
def found_share() -> Callable[[int, int], float]:
    """For a tap and a layer: the share of the answers' tokens, of those that stand in any description, whose input of
    the layer's MLP points best to a state of the same token."""
    t2l = TextToLora.from_pretrained()
    reference = t2l.spec.base_model
    model, tokenizer = models.load_causal_lm(reference).float().eval(), models.load_tokenizer(reference)
    encoded = t2l.encoder.encode(list(LABELS))
    assert t2l.hypernet.standard is not None and encoded.mask is not None
    assert t2l.config.encoder.layers == TAPS
    states_KTI = t2l.hypernet.standard(encoded.states)[encoded.mask].unflatten(-1, (len(TAPS), -1))
    keys_KTI = torch.nn.functional.normalize(states_KTI, dim=-1)
    prefix = t2l.encoder.prefix
    tokens = torch.tensor([x for text in LABELS for x in (*prefix, *tokenizer.encode(text, add_special_tokens=False))])
    assert len(tokens) == len(keys_KTI)
    inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, seen in zip(model.model.layers, inputs, strict=True):
        layer.mlp.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0][0]))
    asked: list[tuple[int, int, int]] = []
    for number, answer in enumerate(LABELS.values()):
        ids = tokenizer.encode(answer, add_special_tokens=False)
        with torch.no_grad():
            model(torch.tensor([ids]))
        asked += [(number, place, token) for place, token in enumerate(ids) if place and token in tokens]
    assert len(asked) > 20

    def share(tap: int, layer: int) -> float:
        keys_KI = keys_KTI[:, TAPS.index(tap)]
        hits = [tokens[(keys_KI @ inputs[layer][n][place]).argmax()] == token for n, place, token in asked]
        return sum(map(bool, hits)) / len(hits)

    return share


@pytest.mark.slow
@pytest.mark.parametrize(("tap", "layer"), [(10, 10), (10, 14), (10, 18), (20, 20), (20, 24), (20, 26)])
def test_a_state_finds_its_token_in_later_layers(
    tap: int, layer: int, found_share: Callable[[int, int], float]
) -> None:
    assert found_share(tap, layer) >= 0.85


@pytest.mark.slow
def test_input_embeddings_do_not(found_share: Callable[[int, int], float]) -> None:
    assert found_share(0, 20) < 0.5
