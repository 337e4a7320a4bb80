import numpy as np
import pytest
from PIL import Image

from training import curves

LOSSES = "update,stage,trajectory,proxy\n1,trajectory,0.5,\n2,trajectory,0.25,\n1,matching,,2.0\n"


def test_losses_are_read_by_name_without_the_updates_that_have_none(tmp_path):
    (tmp_path / "losses.csv").write_text(LOSSES)
    found = curves.read_losses(tmp_path / "losses.csv")
    np.testing.assert_array_equal(found["trajectory"], [[1, 0.5], [2, 0.25]])
    np.testing.assert_array_equal(found["proxy"], [[1, 2.0]])


def test_a_picture_has_a_panel_for_each_loss(tmp_path):
    (tmp_path / "losses.csv").write_text(LOSSES)
    run = f"one={tmp_path / 'losses.csv'}"
    for count, losses in enumerate((["trajectory"], ["trajectory", "proxy"]), 1):
        assert curves.main([run, "--losses", *losses, "--output", str(tmp_path / "curves.png")]) == 0
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.width == pytest.approx(495 * count, abs=2)
            assert len(picture.convert("RGB").getcolors(10_000)) > 2


@pytest.mark.parametrize(
    ("text", "losses", "message"),
    [
        (LOSSES, ["held_out"], "no run has the loss 'held_out'; there are proxy, trajectory"),
        ("update,stage,proxy\n1,matching,many\n", ["proxy"], "is not the losses.csv of a run"),
        ("", ["proxy"], "is not the losses.csv of a run"),
        (None, ["proxy"], "cannot be read"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(text, losses, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "losses.csv").write_text(text)
    assert curves.main([f"one={tmp_path / 'losses.csv'}", "--losses", *losses]) == 1
    assert message in capsys.readouterr().err
