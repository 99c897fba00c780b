"""Which latents matter for what a model does: ranking by effect, sets ablated or kept, edges between two SAEs.

>>> sorted(__all__)[:3]
['Batch', 'Curve', 'Graph']
"""

from saehooks.causal.curves import Curve, SetEffects, ablate_sets, curve
from saehooks.causal.graph import Graph, latent_graph
from saehooks.causal.metric import (
    Batch,
    Metric,
    ce,
    class_logit,
    embedding_cosine,
    kl,
    log_prob,
    logit_difference,
    token_ids,
)
from saehooks.causal.rank import rank_latents
from saehooks.causal.ranking import Ranking

__all__ = [
    "Batch",
    "Curve",
    "Graph",
    "Metric",
    "Ranking",
    "SetEffects",
    "ablate_sets",
    "ce",
    "class_logit",
    "curve",
    "embedding_cosine",
    "kl",
    "latent_graph",
    "log_prob",
    "logit_difference",
    "rank_latents",
    "token_ids",
]
