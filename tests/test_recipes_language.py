"""The language recipes' own parts: prompts, the rule that chooses latents to steer, the dashboard's contexts."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import saehooks as sh

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import causal_ablation
import concept_dashboard
import steer_generation as steer


@pytest.mark.parametrize("name", ["capitals", "agreement", "induction", "indirect object"])
def test_prompts_are_fixed_and_fair(name):
    """The same prompts each time, the right word never the wrong one, none twice; the answer is not given away."""
    behaviours = causal_ablation.BEHAVIOURS
    prompts = behaviours[name]()
    assert prompts == behaviours[name]()
    assert len({one[0] for one in prompts}) > 0.9 * len(prompts)
    assert all(right != wrong for _, right, wrong in prompts)
    assert not any(prompt.endswith(right) for prompt, right, _ in prompts)


def test_induction_asks_for_the_word_that_came_next():
    """In a repeated list the right word followed the last one before, and the wrong one did not."""
    for prompt, right, wrong in causal_ablation.induction():
        words = prompt.split()
        place = words.index(words[-1])
        assert words[place + 1] == right.strip()
        assert wrong.strip() in words


def test_words_of_a_latent():
    """A latent's words stand beside its strongest activations more often than elsewhere; coherence counts contexts."""

    class Words:
        names = ("bos", "the", "river", "water", "table", "flows")

        def decode(self, ids):
            return " ".join(self.names[i] for i in ids)

    tokens = torch.tensor([[0, 1, 2, 3, 5]] * 20 + [[0, 1, 4, 4, 4]] * 400)
    dense = torch.zeros(420, 5, 3)
    dense[:20, 2, 1] = torch.arange(1.0, 21.0)  # latent 1 is on "river", in 20 sequences
    dense[:, 1, 0] = 1.0
    codes = sh.Codes.from_dense(dense)
    usual = Counter(word for row in tokens[:, 1:].tolist() for word in Words().decode(row).split())
    entries = (codes.indices == 1).nonzero()[:, 0]
    found = steer.describe(codes, entries, tokens, Words(), usual)
    assert set(found.words) == {"river", "water", "flows"}
    assert found.coherence == 1.0
    assert found.largest == 20.0
    assert steer.describe(codes, entries[:5], tokens, Words(), usual) is None
    assert steer.share(["the river flows", "table table"], ["river"]) == pytest.approx(0.25)


def test_dashboard_reads_codes_by_latent(tiny_hf_bridge):
    """Counts leave position 0 out, and the strongest contexts come from different sequences."""
    torch.manual_seed(0)
    sae = sh.SAE(d_in=32, d_sae=24, hook_name="blocks.1.hook_resid_post").eval()

    class Batches:
        tokens = torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(0))

        def __iter__(self):
            return iter(self.tokens.split(2))

    index = concept_dashboard.surveyed(tiny_hf_bridge, sae, Batches())
    with torch.no_grad(), sh.read(tiny_hf_bridge, sae) as trace:
        tiny_hf_bridge(Batches.tokens)
    assert index.counts.tolist() == trace.codes[:, 1:].counts().tolist()
    latent = int(index.counts.argmax())
    contexts = index[latent].contexts[:3]
    assert len({context.sequence for context in contexts}) == 3
    column = trace.codes.of(latent)[:, 1:]
    assert float(column[contexts[0].sequence, contexts[0].column - 1]) == pytest.approx(float(column.max()))
    latents = concept_dashboard.spread(index.counts, 4, at_least=1)
    assert len(latents) == 4
    page = concept_dashboard.page(index, sae, latents, "", "")
    assert all(f"<b>latent {one}</b>" in page for one in latents)
