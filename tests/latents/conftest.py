"""A surveyed model, shared by the tests of indices and pages."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh

SITE = "model.layers.1"


class Nasty:
    """A tokenizer with pieces that a page must not take for markup, script or templates."""

    bos_token_id = 0
    PIECES = ("</script>", "<b>", "&amp;", "{{data}}", "\n", " 'quoted\"", "��", " ﬁn ")

    def decode(self, ids):
        return "".join(self.PIECES[i] if i < len(self.PIECES) else f" w{i}" for i in ids)

    def __call__(self, text, **options):
        ids = [int(word.strip("w")) for word in text.split()]
        return type("Encoded", (), {"input_ids": ids})


@pytest.fixture(scope="session")
def model():
    """A plain Hugging Face Llama of 4 layers, width 32, vocabulary 64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.3, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def sae():
    torch.manual_seed(0)
    return sh.SAE(d_in=32, d_sae=96, activation="topk", dictionary="linear", k=6, hook_name=SITE).eval()


@pytest.fixture(scope="session")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (3, 20), generator=generator) for _ in range(4)]


@pytest.fixture(scope="session")
def nasty_index(model, sae, batches):
    """An index whose tokens hold markup, with one latent that a person named."""
    index = sh.survey(model, sae, batches, where=slice(1, None), tokenizer=Nasty())
    index.name(7, "music <i>")
    return index
