"""Training: a stopped run goes on as if it had not stopped, stages write folders that load, arguments are
checked.
"""

import numpy as np
import pytest
import torch
from torch import nn

from minidiff import CLIPTokenizer
from minidiff.cli import main
from minidiff.scenes import vocabulary_corpus
from minidiff.train import autoencoder, data, pixels, scorer, text, text_to_image
from minidiff.train.loop import Recipe, Trainer


def regression(folder, steps):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return Trainer(
        "toy", model, folder, Recipe(minutes=1, steps=steps, learning_rate=1e-2, dtype=torch.float32)
    )


def regression_loss(model, generator, step):
    x = torch.randn(16, 3, generator=generator)
    return (model(x) - x[:, :2] * torch.tensor([2.0, -1.0])).square().mean()


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    whole = regression(tmp_path / "whole", 40).run(regression_loss)

    def interrupted(model, generator, step):
        if step == 17:
            raise KeyboardInterrupt
        return regression_loss(model, generator, step)

    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path / "halves", 40).run(interrupted)
    resumed = regression(tmp_path / "halves", 40)
    assert resumed.step == 17
    again = resumed.run(regression_loss)
    assert torch.equal(again.weight, whole.weight)
    assert not list((tmp_path / "halves").glob("*.tmp"))


def test_training_lowers_the_loss(tmp_path):
    trainer = regression(tmp_path, 400)
    first = regression_loss(trainer.module, torch.Generator().manual_seed(5), 0).item()
    trained = trainer.run(regression_loss)
    assert regression_loss(trained, torch.Generator().manual_seed(5), 0).item() < 0.1 * first


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path):
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        regression(tmp_path, 10).run(lambda model, generator, step: model.weight.sum() * float("nan"))


def test_a_bfloat16_copy_learns_what_the_original_learns(tmp_path):
    torch.manual_seed(0)
    recipe = Recipe(minutes=1, steps=700, learning_rate=1e-2, dtype=torch.bfloat16)
    trained = Trainer("toy", nn.Linear(3, 2), tmp_path, recipe).run(
        lambda m, g, s: (
            (m(x := torch.randn(16, 3, generator=g).bfloat16()) - x[:, :2]).float().square().mean()
        )
    )
    assert trained.weight.dtype == torch.float32
    assert torch.allclose(trained.weight, torch.eye(2, 3), atol=0.05)


def test_pictures_do_not_depend_on_how_they_were_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 2)
    monkeypatch.setattr(data, "PICTURE_SIZE", 16)
    for chunk in (1, 0):
        data._render_chunk(tmp_path, 0, chunk)
    pictures = data.rendered_pictures(tmp_path, 3)  # both chunks are there already
    assert pictures.shape == (4, 16, 16, 3)
    assert np.array_equal(pictures[3], data.render(data.training_scene(3), 16))


@pytest.mark.slow
def test_training_ids_are_the_tokenizer_s(tmp_path):
    vocabulary = text.write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    captions = vocabulary_corpus(seed=3, count=50)
    ids = tokenizer(
        [*captions, ""], padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    assert torch.equal(text.caption_ids([*captions, ""], vocabulary), ids)
    assert len(vocabulary) < 700


@pytest.mark.parametrize("make", [autoencoder.new_autoencoder, text_to_image.new_unet, pixels.new_pixel_unet])
def test_models_start_with_signals_of_unit_size(make):
    model = make()
    with torch.no_grad():
        x = torch.randn(1, model.config.in_channels, 32, 32)
        if make is autoencoder.new_autoencoder:
            assert 0.2 < model.encode(x).latent_dist.mean.std() < 5
            return
        extra = (torch.randn(1, 77, text.WIDTH),) if make is text_to_image.new_unet else ()
        assert model(x, torch.tensor([3]), *extra).sample.abs().max() == 0  # predicts no noise at first


def test_the_scorer_sees_through_blemishes_of_the_right_size():
    x = torch.zeros(4, 3, 32, 32)
    y = scorer.blemished(x, torch.Generator().manual_seed(0))
    assert 0 < (y - x).abs().mean() < 0.1


def test_an_unknown_stage_is_refused(capsys):
    assert main(["train", "vea"]) == 2
    assert "unknown stage 'vea'" in capsys.readouterr().err


def test_negative_minutes_are_refused(capsys):
    assert main(["train", "vae", "--minutes", "-3"]) == 2
    assert "greater than 0" in capsys.readouterr().err


def test_scores_are_refused_before_anything_is_drawn(capsys, tmp_path):
    (tmp_path / "file").touch()
    for words, message in (
        (["--out", str(tmp_path / "file")], "there is a file of that name"),
        (["--seed", "-1"], "'-1' is not a whole number from 0"),
        (["--guidance", "nan"], "'nan' is not a number from 0 on"),
    ):
        assert main(["score", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err


@pytest.mark.slow
def test_all_stages_run_and_the_result_draws(tmp_path):
    def run(*words):
        assert main([str(word) for word in words]) == 0

    for stage in ("text", "scorer", "vae", "unet", "ddpm"):
        run("train", stage, "--folder", tmp_path, "--minutes", 0.03, "--pictures", 500, "--workers", 2)
    scenes, pixel_ddpm, judge = (tmp_path / name for name in ("scenes", "scenes-ddpm", "scenes-scorer"))
    run("generate", "a red cube", "--checkpoint", scenes, "--steps", 2, "--out", tmp_path / "a.png")
    run("sample", "--checkpoint", pixel_ddpm, "--steps", 2, "--out", tmp_path / "b.png")
    few = ("--prompts", 3, "--steps", 2)
    run("score", "--checkpoint", scenes, "--scorer", judge, *few, "--out", tmp_path / "scores")
    assert (tmp_path / "scores" / "scores.json").exists()
