import re
import textwrap
from pathlib import Path

import msgspec
import pytest

from cortex.core.catalogue import load_catalogue
from cortex.core.command import CommandModel
from cortex.core.config import load_neuron_config
from cortex.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
VALUES = {
    "model": "org/m",
    "host": "127.0.0.1",
    "port": "4000",
    "devices": "0,1",
    "num_devices": "2",
    "max_model_len": "8192",
}


def model(command, **fields):
    table = {"command": command, "vram_mb": 1000, **fields}
    return msgspec.convert(table, CommandModel)


def test_a_string_is_split_as_a_shell_would_and_then_filled_in():
    it = model("vllm serve '{model}' --port={port} -tp {num_devices}")
    assert it.arguments(VALUES) == ["vllm", "serve", "org/m", "--port=4000", "-tp", "2"]


def test_a_list_is_taken_word_by_word():
    it = model(["llama-server", "-m", "/my models/{model}.gguf", "--port", "{port}"])
    assert it.arguments(VALUES) == [
        "llama-server",
        "-m",
        "/my models/org/m.gguf",
        "--port",
        "4000",
    ]


def test_a_value_never_becomes_two_arguments_nor_a_shell_word():
    values = {**VALUES, "model": "a b; rm -rf $HOME {port}"}
    assert model("serve {model} {port}").arguments(values) == [
        "serve",
        "a b; rm -rf $HOME {port}",
        "4000",
    ]


def test_braces_around_anything_but_a_name_are_the_commands_own():
    it = model(["serve", "--kwargs", '{"a": {"b": 1}, "c": {}}', "{port}"])
    assert it.arguments(VALUES)[2] == '{"a": {"b": 1}, "c": {}}'


def test_variables_have_their_placeholders_filled_in_too():
    it = model(["serve"], env={"ADDRESS": "{host}:{port}", "PLAIN": "x"})
    assert it.environment(VALUES) == {"ADDRESS": "127.0.0.1:4000", "PLAIN": "x"}


def test_a_command_has_one_digest_and_any_other_has_another():
    it = model("serve {port}", env={"A": "1", "B": "2"})
    assert it.digest == model(["serve", "{port}"], env={"B": "2", "A": "1"}, context=9).digest
    others = [model("serve {port} -x"), model("serve {port}", env={"A": "1"})]
    assert it.digest not in {each.digest for each in others}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('command = ""', "command is empty"),
        ("command = []", "command is empty"),
        ('command = "serve {port} {modle}"', "{modle} is no placeholder; there are {model}"),
        ('command = "serve {model}"', "{port} is missing"),
        ('command = "serve \'{port}"', "No closing quotation"),
        ('command = "serve {port} {max_model_len}"', "{max_model_len} needs `context`"),
        ('command = ["serve", "{port}\\u0000"]', "NUL"),
        ('command = "{port}"\nenv = { "A=B" = "x" }', "env: a name is empty or holds '='"),
        ('command = "{port}"\ndevices = [1, 1]', "a device is named twice"),
        ('command = "{port}"\nhealth_path = "health"', "health_path"),
        ('command = "{port}"\nvram = 1', "unknown field `vram`"),
        ('command = "{port}"\ncwd = "not/here"', "is not a directory"),
    ],
)
def test_a_bad_template_stops_the_start_and_names_the_model(tmp_path, lines, message):
    path = tmp_path / "neuron.toml"
    path.write_text(f'[harness.command.models."org/m"]\nvram_mb = 1\n{lines}\n')
    with pytest.raises(ConfigError) as caught:
        load_neuron_config(path)
    assert "harness.command.models.org/m" in caught.value.message
    assert message in caught.value.message


def test_a_model_without_vram_mb_is_refused_since_the_ledger_needs_it(tmp_path):
    path = tmp_path / "neuron.toml"
    path.write_text('[harness.command.models.m]\ncommand = "serve {port}"\n')
    with pytest.raises(ConfigError, match="missing required field `vram_mb`"):
        load_neuron_config(path)


def test_a_relative_working_directory_is_taken_from_the_files_own(tmp_path):
    (tmp_path / "work").mkdir()
    path = tmp_path / "neuron.toml"
    path.write_text(
        '[harness.command.models.m]\ncommand = "serve {port}"\nvram_mb = 1\ncwd = "work"\n'
    )
    found = load_neuron_config(path).harness.command.models["m"]
    assert found.cwd == str(tmp_path / "work")


def test_commands_from_the_network_are_off_unless_the_operator_allows_them(tmp_path):
    assert load_neuron_config(None).harness.command.allow_remote_commands is False
    path = tmp_path / "neuron.toml"
    path.write_text(
        'fleet_secret = "0123456789abcdef"\n[harness.command]\nallow_remote_commands = true\n'
    )
    assert load_neuron_config(path).harness.command.allow_remote_commands is True


def test_commands_from_an_open_network_stop_the_start(tmp_path):
    path = tmp_path / "neuron.toml"
    path.write_text("[harness.command]\nallow_remote_commands = true\n")
    with pytest.raises(ConfigError, match="run any program as its user; set fleet_secret"):
        load_neuron_config(path)


def test_the_sample_of_external_engines_loads():
    models = load_neuron_config(ROOT / "rpm" / "neuron-external.toml").harness.command.models
    assert list(models) == ["Qwen/Qwen3-32B", "gpt-oss-20b"]
    assert models["gpt-oss-20b"].arguments(VALUES)[:3] == ["llama-server", "-m", "org/m"]


def recipes():
    """Return the TOML blocks of the page on external engines."""
    text = (ROOT / "docs" / "harnesses.md").read_text()
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, flags=re.MULTILINE)
    return [textwrap.dedent(each).strip() + "\n" for each in blocks if "    [" in each]


def test_every_recipe_loads(tmp_path):
    found = recipes()
    assert len(found) == 7
    for text in found:
        if text.startswith("[[models]]"):
            (tmp_path / "models.toml").write_text(text)
            entry = load_catalogue(tmp_path / "models.toml").models[0]
            assert entry.is_external
        else:
            (tmp_path / "neuron.toml").write_text(text)
            models = load_neuron_config(tmp_path / "neuron.toml").harness.command.models
            (model,) = models.values()
            assert "4000" in model.arguments(VALUES)


def test_a_catalogue_entry_spans_what_its_command_spans(tmp_path):
    path = tmp_path / "models.toml"
    lines = '[[models]]\nid = "m"\n{}[models.command]\ncommand = "{{port}}"\nvram_mb = 5\n'
    path.write_text(lines.format("") + "devices = [2, 3, 4]\n")
    assert (load_catalogue(path).models[0].min_devices, load_catalogue(path).models[0].vram_mb) == (
        3,
        15,
    )
    path.write_text(lines.format("min_devices = 2\n") + "num_devices = 4\n")
    with pytest.raises(ConfigError, match="min_devices is 2, and its command spans 4"):
        load_catalogue(path)


def test_a_catalogue_entry_of_another_harness_takes_no_command(tmp_path):
    path = tmp_path / "models.toml"
    path.write_text(
        '[[models]]\nid = "m"\nharness = "torch"\n'
        '[models.command]\ncommand = "{port}"\nvram_mb = 1\n'
    )
    with pytest.raises(ConfigError, match="a command is for harness `command`, not `torch`"):
        load_catalogue(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[harnesses]]\nname = "torch"\n[harness.command.models.m]\n'
            'command = "{port}"\nvram_mb = 1\n',
            "harnesses does not name it",
        ),
        ('[[harnesses]]\nname = "command"\n', "harness.command has no models"),
    ],
)
def test_engine_kinds_that_contradict_the_tables_stop_the_start(tmp_path, text, message):
    path = tmp_path / "neuron.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_neuron_config(path)
