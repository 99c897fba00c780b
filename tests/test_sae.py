"""The SAE: shapes, dtypes, errors, modes, saving; and input that is not what it should be."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError, FormatError, LatentError, WidthError
from saehooks.sae import SAEConfig


@pytest.fixture
def sae():
    """Sparsemax over 40 concepts of width 8."""
    torch.manual_seed(0)
    return sh.SAE(8, 40, hook_name="blocks.1.hook_resid_post")


def test_shapes_follow_the_batch(sae):
    """(*shape, d_in) in, codes of the same batch shape and (*shape, d_in) out; a single row too."""
    for shape in ((8,), (3, 8), (2, 5, 8)):
        recons, codes = sae(torch.randn(shape))
        assert recons.shape == shape
        assert codes.shape == shape[:-1]
        torch.testing.assert_close(sae.decode(codes), recons)


def test_another_width_is_refused(sae):
    """Activations, or codes, of another width: an error that names both."""
    with pytest.raises(WidthError, match="width 8"):
        sae(torch.randn(3, 9))
    with pytest.raises(WidthError, match="width 8"):
        sae.encode(torch.tensor(1.0))
    with pytest.raises(WidthError, match="40"):
        sae.decode(sh.SAE(8, 41).encode(torch.randn(2, 8)))


def test_inputs_are_cast_to_the_dtype_of_the_sae(sae):
    """A bfloat16 or integer-valued activation is computed in float32."""
    x = torch.randn(3, 8)
    assert sae(x.bfloat16()).recons.dtype == torch.float32
    torch.testing.assert_close(sae(x.double()).recons, sae(x).recons)


def test_directions(sae):
    """One row for each latent asked for; latents out of range are named."""
    assert sae.directions(3).shape == (1, 8)
    assert sae.directions([3, 5, 3]).shape == (3, 8)
    for latent in (-1, 40):
        with pytest.raises(LatentError, match=r"0 \.\. 39"):
            sae.directions([0, latent])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"d_in": 0}, "positive integer"),
        ({"d_sae": 2.5}, "positive integer"),
        ({"dictionary": "convolution"}, "choose one of concepts, kron, linear"),
        ({"activation": "softmax"}, "sparsemax"),
        ({"k": 3}, "unknown setting k.*; k is a setting of batchtopk, feature_choice, mutual_choice, topk"),
        ({"values": "mean"}, "'score', 'weight'"),
        ({"key_scale": 0.0}, "key_scale"),
    ],
)
def test_wrong_settings_are_refused(given, said):
    """What cannot work is an error at once, saying what is possible."""
    with pytest.raises(ConfigError, match=said):
        sh.SAE(**{"d_in": 8, "d_sae": 40, **given})


def test_frozen_shares_tensors_and_changes_no_flag(sae):
    """The frozen SAE computes what the SAE does in eval mode, from the same tensors; the SAE itself stays as it is."""
    sae.train()
    sae.dictionary.C.requires_grad_(False)
    before, x = [(p.requires_grad, p._version) for p in sae.parameters()], torch.randn(3, 8)
    frozen = sae.frozen()
    assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert [p.data_ptr() for p in frozen.parameters()] == [p.data_ptr() for p in sae.parameters()]
    assert [b.data_ptr() for b in frozen.buffers()] == [b.data_ptr() for b in sae.buffers()]
    assert all(module.training for module in sae.modules())
    assert [(p.requires_grad, p._version) for p in sae.parameters()] == before
    assert torch.equal(frozen(x).recons, sae.eval()(x).recons.detach())


def test_frozen_counts_nothing():
    """Activations that keep running statistics in train mode keep none of what the frozen SAE reads."""
    sae = sh.SAE(8, 32, "linear", "batchtopk", k=4, track_density=True).train()
    sae(torch.randn(64, 8))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.frozen()(torch.randn(64, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


# ------------------------------------------------------------- unusual input


def test_zero_norm_activations_reconstruct_the_offset():
    """A row of zeros has no direction: finite codes, the offset as reconstruction, finite gradients."""
    for center in (True, False):
        sae = sh.SAE(8, 40, center=center)
        x = torch.zeros(2, 8, requires_grad=True)
        out = sae(x)
        torch.testing.assert_close(out.recons, torch.zeros(2, 8))
        out.recons.sum().backward()
        assert bool(x.grad.isfinite().all())
        assert all(bool(p.grad.isfinite().all()) for p in sae.parameters() if p.grad is not None)


def test_all_equal_scores_select_everything():
    """A dictionary of one repeated concept: every latent, with equal weights; nothing overflows."""
    sae = sh.SAE(8, 40, values="weight")
    with torch.no_grad():
        sae.dictionary.C.copy_(sae.dictionary.C[:1].expand(40, 8))
    codes = sae.encode(torch.randn(3, 8))
    assert codes.support_size.tolist() == [40] * 3
    torch.testing.assert_close(codes.values, torch.full((120,), 1 / 40), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("dictionary", "activation"), [("concepts", "sparsemax"), ("linear", "topk"), ("linear", "relu")]
)
def test_broken_rows_stay_broken_and_alone(dictionary, activation, bad):
    """NaN or infinity in a row: that row's output is not finite, one latent at most; the others are untouched."""
    torch.manual_seed(0)
    sae = sh.SAE(8, 40, dictionary, activation)
    x = torch.randn(4, 8)
    clean = sae(x).recons
    x[2, 5] = bad
    out = sae(x)
    assert not bool(out.recons[2].isfinite().all())
    assert int(out.codes.support_size[2]) <= 1
    torch.testing.assert_close(out.recons[[0, 1, 3]], clean[[0, 1, 3]])


def test_empty_batches(sae):
    """No rows in, no rows out."""
    out = sae(torch.zeros(0, 7, 8))
    assert out.recons.shape == (0, 7, 8)
    assert out.codes.support_size.shape == (0, 7)


# --------------------------------------------------------------------- saving


def test_saved_sae_is_the_same(sae, tmp_path):
    """Weights, settings, metadata and dtype come back; the loaded SAE is in eval mode."""
    x = torch.randn(5, 8)
    sae.save(tmp_path)
    again = sh.load(tmp_path)
    assert torch.equal(again(x).recons, sae(x).recons)
    assert again.hook_name == "blocks.1.hook_resid_post"
    assert again.cfg == sae.cfg
    assert not again.training
    assert repr(again) == repr(sae)


def test_fewer_bits_on_disk(sae, tmp_path):
    """Weights may be stored in float16 and are computed in what the SAE was."""
    sae.save(tmp_path, dtype=torch.float16)
    again = sh.load(tmp_path)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again.dictionary.C, sae.dictionary.C, rtol=1e-3, atol=1e-3)
    assert sh.load(tmp_path, dtype=torch.float64).dtype == torch.float64


def test_config_of_another_width_is_refused(sae):
    """Tensors that do not fit the config: the error names tensor, shape and what was expected."""
    tensors = sae.state_dict()
    with pytest.raises(FormatError, match="C has shape"):
        sh.SAE.from_config(SAEConfig(8, 48), tensors)
    with pytest.raises(FormatError, match="missing or left over"):
        sh.SAE.from_config(SAEConfig(8, 40, "linear", "topk", {"k": 3}), tensors)
    with pytest.raises(FormatError, match="cannot be built"):
        sh.SAE.from_config(SAEConfig(8, 40, "linear", "topk", {"k": 300}), tensors)
    with pytest.raises(FormatError, match="not one of an SAE"):
        SAEConfig.from_dict({"d_in": 3, "colour": "red"})


def test_an_sae_computes_in_its_own_dtype_inside_autocast():
    """Codes and reconstructions are those outside of autocast, bit for bit."""
    for dictionary, activation in (("concepts", "sparsemax"), ("linear", "topk")):
        sae, x = sh.SAE(16, 64, dictionary, activation).eval(), torch.randn(20, 16)
        right = sae(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = sae(x)
            direction = sae.directions([3])
        assert torch.equal(got.recons, right.recons)
        assert torch.equal(got.codes.dense(), right.codes.dense())
        assert torch.equal(direction, sae.directions([3]))


def test_an_sae_made_under_inference_mode_can_be_trained():
    """Its parameters are ordinary tensors, whatever mode its user was in."""
    with torch.inference_mode():
        sae = sh.SAE(8, 16)
    sae(torch.randn(4, 8)).recons.sum().backward()
    assert sae.dictionary.C.grad is not None


def test_defaults_of_torch_do_not_reach_into_an_sae():
    """Under another default dtype or device the SAE is the one that was asked for."""
    for activation in ("gated", "jumprelu", "batchtopk", "entmax"):
        torch.manual_seed(0)
        right = sh.SAE(8, 64, "linear", activation).state_dict()
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            torch.set_default_device("meta")
            torch.manual_seed(0)
            got = sh.SAE(8, 64, "linear", activation, device="cpu").state_dict()
        finally:
            torch.set_default_dtype(before)
            torch.set_default_device(None)
        assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in right.items()}
        assert all(torch.equal(t, right[n]) for n, t in got.items())


def test_only_an_sae_whose_weights_say_nothing_yet_is_unfinished(tmp_path):
    """Loading, filling and setting from data finish an SAE; making one does not."""
    sae = sh.SAE(8, 16)
    assert not sae.finished
    sae.save(tmp_path)
    assert sh.load(tmp_path).finished
    other = sh.SAE(8, 16)
    other.load_state_dict(sae.state_dict())
    assert other.finished
    sae.initialise(torch.randn(32, 8))
    assert sae.finished


@pytest.mark.parametrize("settings", [{}, {"refine": 1}, {"values": "weight"}])
def test_the_reconstruction_is_differentiable_in_the_codes(settings):
    """What an attribution asks for: the gradient at a code is its direction times what the reconstruction is asked."""
    torch.manual_seed(0)
    sae, x = sh.SAE(8, 40, **settings), torch.randn(6, 8)
    recons, codes = sae(x)
    codes.values.retain_grad()
    asked = torch.linspace(-1, 1, 8)
    (recons * asked).sum().backward()
    scale = codes.scale if codes.scale is not None else torch.ones(6)
    wanted = (sae.directions(codes.indices.tolist()) @ asked) * scale[codes.rows]
    torch.testing.assert_close(codes.values.grad, wanted.detach())
