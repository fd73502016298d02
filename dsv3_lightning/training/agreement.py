"""How far the decoder that sampled answers and the training pass over them agree: log-probabilities and experts.

Both compute the same function by other products, in another precision and order. A small difference may choose other
experts, and then is no longer small.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dsv3_lightning.model.router import Router, Routing, biased_scores
from dsv3_lightning.model.transformer import Transformer

ABSENT = -1  # in place of an expert where a rollout recorded none


def gap_of(trained_BT: Tensor, drawn_BT: Tensor, valid_BT: Tensor) -> dict[str, Tensor]:
    """Facts of |log π(training) - log π(rollout)|: the sum, how many tokens were compared, and the largest."""
    gap_BT = (trained_BT.detach() - drawn_BT).abs() * valid_BT
    return {"gap": gap_BT.sum(), "compared": valid_BT.sum(), "largest_gap": gap_BT.max()}


def routers_of(model: Transformer) -> list[Router]:
    """The routers of the main model, in the order of the layers."""
    return [module for block in model.layers for module in block.modules() if isinstance(module, Router)]


def spread_routes(routes: list[np.ndarray | None], T: int) -> Tensor:
    """Experts of each answer's tokens as int64 [B, T, L, K], ABSENT at padding and where nothing was recorded."""
    L, K = next(route.shape[1:] for route in routes if route is not None)
    found = np.full((len(routes), T, L, K), ABSENT, dtype=np.int64)
    for row, route in enumerate(routes):
        if route is not None:
            found[row, : len(route)] = route
    return torch.from_numpy(found)


def replayed(chosen_BTK: Tensor) -> Tensor:
    """Experts for a router to replay, [B · T, K]: padding goes to the first ones, which need to be different."""
    first_K = torch.arange(chosen_BTK.shape[2], device=chosen_BTK.device)
    return torch.where(chosen_BTK == ABSENT, first_K, chosen_BTK).flatten(0, 1)


def same_experts(own_NK: Tensor, drawn_NK: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the rollout's experts are among the training pass's own, in any order, and of how many."""
    there_N = (drawn_NK != ABSENT).all(1)
    same_NK = (own_NK[:, None, :] == drawn_NK[:, :, None]).any(2)
    return (same_NK & there_N[:, None]).sum(), there_N.sum() * drawn_NK.shape[1]


@contextmanager
def compared(model: Transformer, routes_BTLK: Tensor | None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within it, a forward pass adds to the list what `same_experts` says of each layer; nothing without routes.

    A router that replays the rollout's experts is asked for its own choice.
    """
    found: list[tuple[Tensor, Tensor]] = []
    handles = []
    for layer, router in enumerate(routers_of(model) if routes_BTLK is not None else []):

        def note(module: Router, inputs: object, routing: Routing, layer: int = layer) -> None:
            assert routes_BTLK is not None
            own_NK = routing.experts_NK
            if module.replay is not None:
                choice_NE = biased_scores(routing.scores_NE.detach(), module.expert_bias, module.config)
                own_NK = choice_NE.topk(own_NK.shape[1], -1).indices
            found.append(same_experts(own_NK, routes_BTLK[:, :, layer].flatten(0, 1)))

        handles.append(router.register_forward_hook(note))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
