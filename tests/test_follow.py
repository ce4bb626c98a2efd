"""Why `hypernet.follow` needs no learnt map: in the shipped base a token's state in a description finds the same token
where an answer is written."""

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


def found_share(layer: int, tap: int) -> float:
    """Share of the answers' tokens, of those that stand in any description, that a layer's MLP input points to best."""
    t2l = TextToLora.from_pretrained()
    reference = t2l.spec.base_model
    model, tokenizer = models.load_causal_lm(reference).float().eval(), models.load_tokenizer(reference)
    encoded = t2l.encoder.encode(list(LABELS))
    assert t2l.hypernet.standard is not None and encoded.mask is not None
    states = t2l.hypernet.standard(encoded.states)[encoded.mask].unflatten(-1, (4, -1))[:, tap]
    keys = torch.nn.functional.normalize(states, dim=-1)
    prefix = t2l.encoder.prefix
    tokens = torch.tensor([x for text in LABELS for x in (*prefix, *tokenizer.encode(text, add_special_tokens=False))])
    assert len(tokens) == len(keys)
    seen: list[torch.Tensor] = []
    model.model.layers[layer].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    hits = []
    for answer in LABELS.values():
        ids = tokenizer.encode(answer, add_special_tokens=False)
        with torch.no_grad():
            model(torch.tensor([ids]))
        for place, token in enumerate(ids):
            if place and token in tokens:
                hits.append(bool(tokens[(keys @ seen[-1][place]).argmax()] == token))
    assert len(hits) > 20
    return sum(hits) / len(hits)


@pytest.mark.slow
@pytest.mark.parametrize(("tap", "layer"), [(1, 10), (1, 14), (1, 18), (2, 20), (2, 24), (2, 26)])
def test_a_state_finds_its_token_in_later_layers(tap: int, layer: int) -> None:
    """`tap` 1 and 2 are the states after layers 10 and 20."""
    assert found_share(layer, tap) >= 0.85


@pytest.mark.slow
def test_input_embeddings_do_not() -> None:
    assert found_share(20, 0) < 0.5
