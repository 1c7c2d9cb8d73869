"""The registry of stages and models."""

import dataclasses

import pytest

from diladiff_jax import stages
from diladiff_jax.config import blocks
from diladiff_jax.run_options import TrainingOptions
from diladiff_jax.sampling import SamplingOptions
from diladiff_jax.stages import MODELS, STAGES


def test_stages_are_in_an_order_in_which_they_can_be_trained():
    """Whatever a stage reads belongs to a predecessor of it."""
    names = list(STAGES)
    for stage in STAGES.values():
        before = stages.predecessors(stage.name)
        assert all(names.index(name) < names.index(stage.name) for name in before)
        sources = [*stage.frozen.values(), *([stage.start.source] if stage.start else [])]
        for source in sources:
            assert stages.resolve_source(source, {"features": {"source": "denoiser"}})[0] in before


def test_features_are_read_from_the_mdlm_or_the_published_encoder():
    """Any other source is what it says."""
    for source, stage in (("denoiser", "mdlm"), ("bert", "bert")):
        settings = {"features": {"source": source}}
        assert stages.resolve_source(stages.FEATURES, settings) == (stage,)
        assert stages.resolve_source(("mdlm", "x"), settings) == ("mdlm", "x")


def test_every_preview_is_of_a_registered_model_that_the_stage_completes():
    """Its other parameters come from predecessors, which are trained by then."""
    for stage in STAGES.values():
        if isinstance(stage.preview, str):
            needed = set(MODELS[stage.preview].stages)
            assert stage.name in needed <= {stage.name, *stages.predecessors(stage.name)}
        if preview := stages.preview_of(stage):
            settings = {"features": {"source": "denoiser"}}
            sources = [stages.resolve_source(s, settings) for s in preview.fixed.values()]
            assert {source[0] for source in sources} <= {*stages.predecessors(stage.name)}


def test_a_stage_is_registered_once_and_after_its_predecessor():
    """A rejected one leaves the registry as it was."""
    before = dict(STAGES)
    with pytest.raises(ValueError, match="stage mdlm is already registered"):
        stages.register_stage(STAGES["mdlm"])
    orphan = dataclasses.replace(STAGES["mdlm"], name="orphan", predecessor="nothing")
    with pytest.raises(ValueError, match="predecessor nothing is not registered"):
        stages.register_stage(orphan)
    assert before == STAGES


def test_a_stage_reads_trained_parameters_of_its_predecessors_alone():
    """Others might not be trained before it; an option named like one of training is ambiguous."""
    before = dict(STAGES)
    stray = dataclasses.replace(STAGES["ladiff"], name="stray", frozen={"x": ("scorer",)})
    with pytest.raises(ValueError, match="stage stray: scorer is not a predecessor of it"):
        stages.register_stage(stray)
    stray = dataclasses.replace(STAGES["mdlm_long"], name="stray", predecessor=None)
    with pytest.raises(ValueError, match="stage stray: mdlm is not a predecessor of it"):
        stages.register_stage(stray)
    twice = dataclasses.replace(STAGES["mdlm"], name="twice", options=TrainingOptions())
    with pytest.raises(ValueError, match="stage twice: option steps is one of its training"):
        stages.register_stage(twice)
    assert before == STAGES


def test_a_stage_may_not_be_called_like_another_block_of_the_config(monkeypatch):
    """Its block would replace that one."""
    for name in ("data", "sampling", "seed"):
        stage = dataclasses.replace(STAGES["mdlm"], name=name)
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"stage {name}: the"):
            patch.setitem(STAGES, name, stage)
            blocks()


def test_a_model_is_registered_once_and_after_its_stages():
    """A rejected one leaves the registry as it was."""
    before = dict(MODELS)
    with pytest.raises(ValueError, match="model mdlm is already registered"):
        stages.register_model(MODELS["mdlm"])
    orphan = dataclasses.replace(MODELS["mdlm"], name="orphan", parameters={"x": ("nothing",)})
    with pytest.raises(ValueError, match="stage nothing is not registered"):
        stages.register_model(orphan)
    assert before == MODELS


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    """Controls are models only where they are asked for."""
    with pytest.raises(ValueError, match="stage: got 'gpt', expected one of mdlm, autoencoder"):
        stages.stage_named("gpt")
    with pytest.raises(ValueError, match="model: got 'null_latent', expected one of mdlm"):
        stages.model_named("null_latent")
    assert stages.model_named("null_latent", controls=True).control


@pytest.mark.parametrize(("conditioned_on", "calls"), [("current", 8), ("none", 4)])
def test_undistilled_controls_make_as_many_calls_as_the_student(conditioned_on, calls):
    """A step of the student is a jump, after a second call if that is what conditions it."""
    options = SamplingOptions(student_steps=4, student_self_conditioning=conditioned_on)
    for name in ("prior_ddim", "prior_dpmpp_2m"):
        assert stages.model_named(name, controls=True).latent_steps(options) == calls
