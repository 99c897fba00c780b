"""What a training reads: resumed, too short, from activations of one's own, or shared by several SAEs."""

import warnings

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError, StorageError, WidthError
from saehooks.streams import Fingerprint

SITE = "blocks.1.hook_resid_post"
FAST = {"batch_size": 32, "buffer_rows": 128, "warmup_steps": 2, "progress": False}


class PowerCutError(Exception):
    pass


def texts(n=12, rows=4):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (rows, 13), generator=draw) for _ in range(n)]


def fresh(seed=0, d_sae=96, **settings):
    torch.manual_seed(seed)
    return sh.SAE(32, d_sae, **settings)


def cut(batches, stop):
    """The same batches, with an end by force before one of them."""

    class Cut(list):
        def __iter__(self):
            yield from self[:stop]
            raise PowerCutError

    return Cut(batches)


def interrupted(model, folder, batches, stop, **more):
    with pytest.raises(PowerCutError):
        sh.fit(model, fresh(), cut(batches, stop), SITE, out=folder, checkpoint_every=1, **{**FAST, **more})


def same_weights(one, two):
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    "order", [[1, 0, *range(2, 12)], [0, 1, 2, 4, 3, *range(5, 12)], [11, 10, 9, 8, 7, 5, 6, 4, 3, 2, 1, 0]]
)
def test_a_resumed_training_refuses_batches_in_another_order(tiny_bridge, tmp_path, order):
    """Two batches that changed places among those seen are noticed, wherever they are; the checkpoint stays."""
    interrupted(tiny_bridge, tmp_path, texts(), 6)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    shuffled = [texts()[i] for i in order]
    with pytest.raises(ConfigError, match="another order"):
        sh.fit(tiny_bridge, fresh(), shuffled, SITE, out=tmp_path, resume=True, **FAST)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_resumed_training_refuses_other_batches_and_too_few(tiny_bridge, tmp_path):
    """One changed token, a mask instead of none, or fewer batches than were seen, are not the same data."""
    interrupted(tiny_bridge, tmp_path, texts(), 6)
    changed = texts()
    changed[2][1, 3] = (changed[2][1, 3] + 1) % 64
    for other, said in ((changed, "not the same"), (texts()[:3], "there are 3 batches, but 6 were seen")):
        with pytest.raises(ConfigError, match=said):
            sh.fit(tiny_bridge, fresh(), other, SITE, out=tmp_path, resume=True, **FAST)


def test_what_comes_after_the_batches_seen_may_change(tiny_bridge, tmp_path):
    """Data may be added to; a generator that gives the same batches again does as well as a list."""
    interrupted(tiny_bridge, tmp_path, texts(), 6)
    more = (batch for batch in [*texts(), *texts(5, rows=8)])
    trainer = sh.fit(tiny_bridge, fresh(), more, SITE, out=tmp_path, resume=True, checkpoint_every=1, **FAST)
    assert trainer.batches_seen == 17
    assert trainer.rows_seen == (12 * 4 + 5 * 8) * 12


@pytest.mark.parametrize("raised", [9, 13, 20])
def test_raising_steps_goes_on_as_if_it_had_been_asked_for_at_once(tiny_bridge, tmp_path, raised):
    """Five steps, resumed with more, see the same rows in the same order as a training of that many steps."""
    settings = {**FAST, "decay": 0.0, "passes": 2}
    whole, parts = fresh(), fresh()
    at_once = sh.fit(tiny_bridge, whole, texts(), SITE, steps=raised, **settings)
    sh.fit(tiny_bridge, parts, texts(), SITE, steps=5, out=tmp_path, **settings)
    later = fresh(3)
    resumed = sh.fit(tiny_bridge, later, texts(), SITE, steps=raised, out=tmp_path, resume=True, **settings)
    assert resumed.steps == raised
    assert (resumed.rows_seen, resumed.batches_seen) == (at_once.rows_seen, at_once.batches_seen)
    assert same_weights(later, whole)
    assert {1, 5} <= {record["step"] for record in resumed.history}


def test_resuming_a_finished_training_changes_nothing(tiny_bridge, tmp_path):
    """No step is made twice where all were made."""
    sae = fresh()
    first = sh.fit(tiny_bridge, sae, texts(), SITE, steps=5, out=tmp_path, **FAST)
    again = fresh(3)
    second = sh.fit(tiny_bridge, again, texts(), SITE, steps=5, out=tmp_path, resume=True, **FAST)
    assert (second.steps, second.rows_seen) == (first.steps, first.rows_seen)
    assert same_weights(again, sae)


def rates(trainer):
    return [record["lr"] for record in trainer.history if "lr" in record]


def test_a_short_first_batch_does_not_end_the_learning_rate(tiny_bridge):
    """The rate's fall is planned by all batches so far: it is at its peak for most of the training, and never 0."""
    batches = [texts(1)[0][:1, :3], *texts(40, rows=8)]
    trainer = sh.fit(tiny_bridge, fresh(), batches, SITE, log_every=1, **FAST)
    seen = rates(trainer)
    assert trainer.steps == 120
    assert sum(rate == trainer.config.lr for rate in seen) > 0.6 * len(seen)
    assert min(seen) > 0
    assert seen[-1] < 0.1 * trainer.config.lr


@pytest.mark.parametrize("known", [True, False])
def test_data_that_end_before_the_steps_are_said(tiny_bridge, known):
    """A warning names both numbers; where the length is known beforehand the rate falls by it."""
    batches = texts() if known else iter(texts())
    with pytest.warns(UserWarning, match=r"ended after step 18, before steps=500") as caught:
        trainer = sh.fit(tiny_bridge, fresh(), batches, SITE, steps=500, log_every=1, **FAST)
    assert (rates(trainer)[-1] < 0.4 * trainer.config.lr) == known
    assert ("had not fallen" in str(caught[0].message)) != known


def test_batches_without_a_length_or_steps_are_said(tiny_bridge):
    """Nobody knows when the rate should fall: a warning says what to give."""
    with pytest.warns(UserWarning, match="give steps="):
        trainer = sh.fit(tiny_bridge, fresh(), iter(texts()), SITE, **FAST)
    assert rates(trainer)[-1] == trainer.config.lr


def test_enough_data_is_no_warning(tiny_bridge):
    """Nothing is said where all steps were made."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sh.fit(tiny_bridge, fresh(), texts(), SITE, steps=18, **FAST).steps == 18


def test_a_dataloader_over_a_stream_has_no_length(tiny_bridge):
    """Its ``len`` only raises: that is no error here."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(texts())

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert sh.fit(tiny_bridge, fresh(), loader, SITE, **FAST).steps == 18


def test_activations_of_ones_own_train_as_those_of_the_model(tiny_bridge):
    """Harvested by the user and given as tensors, rows make the very SAE that ``fit`` on the model makes."""
    one, two, three = fresh(), fresh(), fresh()
    sh.fit(tiny_bridge, one, texts(), SITE, **FAST)
    rows = list(sh.harvest(tiny_bridge, texts(), SITE))
    trainer = sh.fit(rows, two, at=SITE, **FAST)
    assert same_weights(one, two)
    assert trainer.rows_seen == 12 * 4 * 12
    assert two.hook_name == SITE
    sh.fit(torch.cat(rows), three, **FAST)
    assert three.finished


def test_activations_in_the_place_of_batches_are_told_where_they_belong(tiny_bridge, tiny_hf):
    """A float tensor of rows, or a list of them, is no input of a language model: the error says what takes it."""
    acts = torch.randn(64, 32)
    for given in (acts, [acts, acts]):
        with pytest.raises(ConfigError, match=r"sh\.fit\(activations, sae\)"):
            sh.fit(tiny_hf, fresh(), given, "model.layers.1", **FAST)
    with pytest.raises(WidthError, match="width 32, got rows of width 8"):
        sh.fit(torch.randn(64, 8), fresh(), **FAST)
    for wrong in (torch.zeros(64, 32, dtype=torch.long), torch.randn(4, 16, 32)):
        with pytest.raises(ConfigError, match="activations are float tensors"):
            sh.fit(wrong, fresh(), **FAST)
    with pytest.raises(ConfigError, match="leave out batches"):
        sh.fit(acts, fresh(), texts(), **FAST)
    with pytest.raises(ConfigError, match="needs batches"):
        sh.fit(tiny_bridge, fresh(), at=SITE, **FAST)


OTHER = "blocks.0.hook_resid_post"


def several():
    made = {
        "default": fresh(),
        "wide": fresh(1, d_sae=160),
        "topk": fresh(2, dictionary="linear", activation="topk", k=4),
        "below": fresh(3),
    }
    made["below"].cfg.metadata["hook_name"] = OTHER
    for sae in made.values():
        sae.cfg.metadata.setdefault("hook_name", SITE)
    return made


def test_several_saes_train_from_one_forward_as_each_would_alone(tiny_bridge, tmp_path):
    """Bit for bit, at two sites, of three architectures, with a config each; every batch runs once."""
    configs = {name: sh.TrainConfig(seed=i, **{k: v for k, v in FAST.items() if k != "progress"})
               for i, name in enumerate(several())}  # fmt: skip
    forwards = []
    handle = tiny_bridge.hook_dict["blocks.0.hook_out"].register_forward_hook(lambda *_: forwards.append(1))
    together = several()
    trainers = sh.fit(tiny_bridge, together, texts(), config=configs, out=tmp_path, progress=False)
    handle.remove()
    assert len(forwards) == 12 + 1  # and one in the beginning, to see which site comes last
    for name, alone in several().items():
        sh.fit(tiny_bridge, alone, texts(), config=configs[name], progress=False)
        assert same_weights(alone, together[name]), name
        assert same_weights(sh.load(tmp_path / name), alone)
        assert trainers[name].steps == 18


def test_several_saes_resume_each_from_its_own_checkpoint(tiny_bridge, tmp_path):
    """Checkpoints of different age are brought to the same end."""
    whole = several()
    sh.fit(tiny_bridge, whole, texts(), **FAST)
    configs = {
        name: sh.TrainConfig(checkpoint_every=2 + 3 * i, **{k: v for k, v in FAST.items() if k != "progress"})
        for i, name in enumerate(several())
    }
    with pytest.raises(PowerCutError):
        sh.fit(tiny_bridge, several(), cut(texts(), 9), config=configs, out=tmp_path, progress=False)
    again = several()
    trainers = sh.fit(tiny_bridge, again, texts(), config=configs, out=tmp_path, resume=True, progress=False)
    for name in again:
        assert same_weights(again[name], whole[name]), name
        assert trainers[name].batches_seen == 12


def test_requests_for_several_saes_are_checked(tiny_bridge):
    """No SAE, or a config for another name, is an error before anything runs."""
    with pytest.raises(ConfigError, match="no SAE"):
        sh.fit(tiny_bridge, {}, texts(), SITE, **FAST)
    with pytest.raises(ConfigError, match="no entry for the SAE 'a'"):
        sh.fit(tiny_bridge, {"a": fresh()}, texts(), SITE, config={"b": sh.TrainConfig()}, **FAST)


def test_a_place_that_cannot_be_written_is_an_error_before_anything_runs(tiny_bridge, tmp_path):
    """A file where a folder is wanted, or below one; and no file is left behind by the look."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="cannot write to"):
            sh.fit(tiny_bridge, fresh(), texts(), SITE, out=out, **FAST)
    sh.fit(tiny_bridge, fresh(), texts(), SITE, out=tmp_path / "new" / "folder", steps=2, **FAST)
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [
        "cfg.json",
        "checkpoint.safetensors",
        "sae_weights.safetensors",
    ]


def test_a_full_disk_keeps_the_last_checkpoint(tiny_bridge, tmp_path):
    """A write that the system refuses ends the training with a clear error; what was there resumes bit for bit."""
    resource = pytest.importorskip("resource")
    whole = fresh()
    sh.fit(tiny_bridge, whole, texts(), SITE, **FAST)
    interrupted(tiny_bridge, tmp_path, texts(), 6)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"could not be saved in .* is as it was"):
            sh.fit(tiny_bridge, fresh(), texts(), SITE, out=tmp_path, resume=True, checkpoint_every=1, **FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    again = fresh(4)
    sh.fit(tiny_bridge, again, texts(), SITE, out=tmp_path, resume=True, checkpoint_every=1, **FAST)
    assert same_weights(again, whole)


def printed(*batches):
    made = Fingerprint()
    for batch in batches:
        made.add(batch)
    return made.value


def test_fingerprints_tell_batches_apart():
    """Order, shape, names, values, nesting and dtype count; the same batch gives the same number, wherever it is."""
    tokens, mask = torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.bool)
    different = [
        (tokens,),
        (tokens.reshape(4, 3),),
        (tokens.flip(0),),
        (tokens.float(),),
        (tokens, mask),
        (mask, tokens),
        ((tokens, mask),),
        ({"input_ids": tokens},),
        ({"input_ids": tokens, "attention_mask": mask},),
        ({"tokens": tokens},),
        ("text",),
        (["text"],),
        ("text", "text"),
        (tokens.numpy().astype("int32"),),
        (torch.randn(3, 8, 8, 3, dtype=torch.bfloat16),),
    ]
    numbers = [printed(*batches) for batches in different]
    assert len(set(numbers)) == len(numbers)
    assert printed(tokens, mask) == printed(tokens.clone(), mask.numpy())
    assert printed(object()) == printed(object())
    large = torch.rand(10, 3, 100, 100)
    assert printed(large) != printed(large.flip(0))
