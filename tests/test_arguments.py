"""Settings: order, files of overrides, and the cfg_args text."""

import argparse

import pytest

import arguments
from utils.errors import UserError


def parse(*argv):
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    return arguments.merge(parser.parse_args(list(argv)))


def test_the_command_line_beats_the_config_file_which_beats_the_defaults(tmp_path):
    (tmp_path / "c.py").write_text('"""mine"""\nbatch_size = 3\niterations = 7_000\ntokens = ("audio", "null")\n')
    config = parse("-s", "data/x", "--configs", str(tmp_path / "c.py"), "--batch_size", "5")
    assert (config.source_path, config.batch_size, config.iterations, config.sh_degree) == ("data/x", 5, 7000, 1)
    assert config.tokens == ("audio", "null")


@pytest.mark.parametrize("name", ["custom.py", "fast.py", "faithful.py"])
def test_every_shipped_config_names_real_settings(name):
    parse("--configs", f"arguments/{name}")


@pytest.mark.parametrize(
    "text, said",
    [("bacth_size = 3", "bacth_size"), ("x = __import__('os')", "line 1"), ("import os", "line 1"), ("a = = 3", "line 1")],
)
def test_a_config_file_is_never_executed_and_its_bad_line_is_named(tmp_path, text, said):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=said):
        parse("--configs", str(tmp_path / "c.py"))


def test_cfg_args_survives_the_round_trip(tmp_path):
    config = parse("-s", "data/a folder/é")
    arguments.write_cfg_args(tmp_path, config)
    assert vars(arguments.read_cfg_args(tmp_path)) == vars(config)


def test_cfg_args_with_code_in_it_is_refused(tmp_path):
    (tmp_path / "cfg_args").write_text("Namespace(source_path=__import__('os').getcwd())")
    with pytest.raises(UserError, match="cfg_args"):
        arguments.read_cfg_args(tmp_path)


def test_a_value_that_is_no_choice_is_refused_from_a_config_file_too(tmp_path):
    (tmp_path / "c.py").write_text('deform = ("xyz", "colour")\n')
    with pytest.raises(UserError, match="colour.*choose from xyz"):
        parse("--configs", str(tmp_path / "c.py"))
    assert parse("--deform", "xyz", "opacity").deform in (("xyz", "opacity"), ["xyz", "opacity"])


@pytest.mark.parametrize(
    "flag, value, allowed",
    [("batch_size", "0", "a whole number of at least 1"), ("log_interval", "0", "at least 1"), ("max_points", "2", "at least 100"),
     ("sh_degree", "5", "a whole number of at least 0 and at most 3"), ("perceptual_side", "16", "at least 48"),
     ("network_lr", "-1e-3", "a number of at least 0"), ("xyz_lr", "nan", "a number"), ("plane_lr", "inf", "a number"),
     ("seed", "-1", "at most 4294967295"), ("dropout", "1", "at most 0.9"), ("plane_multires", "1.5", "a whole number"),
     ("heads", "3", "a divisor")],
)  # fmt: skip
def test_a_number_out_of_its_bounds_is_refused_in_one_sentence(flag, value, allowed):
    with pytest.raises(UserError, match=f"{flag} = .*{allowed}") as refused:
        parse(f"--{flag}={value}")
    assert "\n" not in str(refused.value)


def test_a_number_that_is_text_in_a_config_file_is_refused(tmp_path):
    (tmp_path / "c.py").write_text('batch_size = "3"\n')
    with pytest.raises(UserError, match="batch_size = '3'.*a whole number"):
        parse("--configs", str(tmp_path / "c.py"))


def test_the_same_values_are_no_change_whether_argparse_a_file_or_cfg_args_wrote_them(tmp_path):
    (tmp_path / "c.py").write_text('perceptual_on = ("window",)\n')
    arguments.write_cfg_args(tmp_path, parse("--configs", str(tmp_path / "c.py"), "--plane_multires", "1", "2"))
    saved = arguments.read_cfg_args(tmp_path)
    same = ["--configs", str(tmp_path / "c.py"), "--perceptual_on", "window"]
    assert arguments.changes(saved, parse(*same)) == ([], [])
    refused, allowed = arguments.changes(saved, parse(*same, "--plane_multires", "1", "--network_lr", "1e-5", "--pose_lr", "1e-4"))
    assert refused == ["pose_lr 0.0 -> 0.0001", "plane_multires [1, 2] -> [1]"] and allowed == ["network_lr 0.0005 -> 1e-05"]


def test_every_setting_has_its_line_of_help():
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    said = " ".join(parser.format_help().split())
    assert "--exposure_lr" in said and "gain and offset of single frames" in said
