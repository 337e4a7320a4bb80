import pytest

from sd35flash_jax.cli import main
from sd35flash_jax.distill.config import read_distill_config

LEAST = """
[teacher]
checkpoint = "teacher"
[training]
prompts = "prompts.txt"
output = "run"
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "distill.toml").write_text(LEAST)
    return tmp_path / "distill.toml"


def test_what_a_file_leaves_out_is_the_papers_recipe(path):
    config = read_distill_config(path)
    assert (config.trajectory.updates, config.matching.updates, config.split.updates) == (2000, 800, 400)
    assert (config.teacher.steps, config.teacher.guidance, config.matching.reinitialise) == (32, 4.0, 0.005)
    assert (config.split.ema, config.split.low_weight, config.matching.points) == (0.99, 0.3, "shared")


def test_overrides_set_single_values_of_any_type(path):
    overrides = [
        "matching.points=renoised",
        "student.sigmas=[1.0, 0.5]",
        "training.batch=4",
        "trajectory.learning_rate=1e-5",
    ]
    config = read_distill_config(path, overrides)
    assert config.matching.points == "renoised" and config.student.sigmas == (1.0, 0.5)
    assert config.training.batch == 4 and config.trajectory.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("matching.points=nowhere", "matching.points: Input should be 'shared' or 'renoised'"),
        ("matching.speed=1", "matching.speed: Unexpected keyword argument"),
        ("split.low_weight=2", "split.low_weight: Input should be less than or equal to 1"),
        ("updates=3", "write it as section.key=value"),
        ("student.sigmas=[0.9, 0.5]", "must fall strictly from 1"),
        ("student.sigmas=[1.0]", "leave split-timestep fine-tuning out"),
        ("student.lora_rank=8", "cannot be interpolated as LoRAs; set split.updates=0"),
        ("trajectory.points=own", "trajectory.points: Input should be 'teacher' or 'student'"),
        ("training.micro_batches=3", "does not divide into 3 micro_batches"),
        ("trajectory.held_out=8", "trajectory.held_out 8 leaves none of teacher.cached 0 to train on"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(override, message, path):
    with pytest.raises(ValueError, match=message):
        read_distill_config(path, [override])


def test_a_lora_cannot_begin_as_another_student(path):
    with pytest.raises(ValueError, match=r"leave out student\.checkpoint, or set student\.lora_rank=0"):
        read_distill_config(path, ["student.checkpoint=earlier", "student.lora_rank=8", "split.updates=0"])


def test_held_out_trajectories_fill_whole_micro_batches(path):
    with pytest.raises(ValueError, match=r"trajectory\.held_out 6 is not a multiple of 4, the rows of a micro-batch"):
        read_distill_config(path, ["teacher.cached=20", "trajectory.held_out=6", "training.micro_batches=2"])


def test_the_command_says_what_a_file_lacks(path, capsys):
    path.write_text("[teacher]")
    assert main(["distill", str(path)]) == 1
    error = capsys.readouterr().err
    assert "teacher.checkpoint" in error and "training: " in error
    assert main(["distill", str(path.with_name("absent.toml"))]) == 1
    assert "does not exist" in capsys.readouterr().err
