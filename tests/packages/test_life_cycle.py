"""Installed, used, swapped, upgraded and erased; each test goes on where the one before ended.

The service manager does not run in the root: what is asked of it is noted, and the services are
started as their units do it.
"""

import re
import shutil
import urllib.request

import msgspec
import pytest

from tests.packages.conftest import Built
from tests.support.rpm_root import Root

GATEWAY, NEURON = "http://127.0.0.1:31313", "http://127.0.0.1:13131"
SERVE = ("/usr/bin/cortex", "serve", "-c", "/etc/cortex/cortex.toml")
RUN_NEURON = ("/usr/bin/cortex", "neuron", "-c", "/etc/cortex/neuron.toml")
ARCHS = {
    "ampere": "sm_80, sm_86",
    "ada": "sm_89",
    "hopper": "sm_90a",
    "blackwell": "sm_100, sm_120",
}
# As neuron.service sets them.
VARIABLES = {
    "HF_HOME": "/var/lib/neuron/huggingface",
    "XDG_CACHE_HOME": "/var/cache/neuron",
    "STATE_DIRECTORY": "/var/lib/neuron",
}
OUR_CONFIG = """
[gateway]
drain_s = 5

[[neurons]]
name = "here"
endpoint = "http://127.0.0.1:13131"
"""

pytestmark = pytest.mark.timeout(400)


def answer(root: Root) -> str:
    """Start gateway and neuron and return what the bundled model answers through both."""
    question = {
        "model": "cortex-tiny",
        "max_tokens": 32,
        "temperature": 0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    request = urllib.request.Request(
        f"{GATEWAY}/v1/chat/completions",
        data=msgspec.json.encode(question),
        headers={"content-type": "application/json"},
    )
    with root.service(f"{NEURON}/health", *RUN_NEURON, user="neuron", **VARIABLES):
        with root.service(f"{GATEWAY}/health", *SERVE, user="cortex"):
            with urllib.request.urlopen(request, timeout=120) as reply:
                return msgspec.json.decode(reply.read())["choices"][0]["message"]["content"]


def test_the_gateway_is_installed_alone_and_serves(built: Built, root: Root):
    done = root.dnf(built.first, "install", "cortex")
    assert done.returncode == 0, done.stdout + done.stderr
    assert root.installed() == ["cortex"]
    assert root.asked_of_systemd() == ["--no-reload preset cortex.service"]
    shown = root.run("cortex", "--version")
    assert re.match(r"cortex \d+\.\d+\.\d+ \([0-9a-f]{8}(\+local)?\)", shown.stdout), shown.stderr
    checked = root.run("cortex", "config", "check")
    assert (checked.returncode, len(checked.stdout.splitlines())) == (0, 2), checked.stdout
    with root.service(f"{GATEWAY}/health", *SERVE, user="cortex"):
        # The hosts of the sample are not there.
        assert root.run("cortex", "status").returncode == 1
    lacking = root.run("cortex", "neuron")
    assert lacking.returncode == 1
    assert "install one of the helexa-neuron packages" in lacking.stderr


def test_only_the_service_reads_its_configuration(root: Root):
    shown = root.run("stat", "-c", "%a %U:%G", "/etc/cortex/cortex.toml", "/etc/sysconfig/cortex")
    assert shown.stdout.splitlines() == ["640 root:cortex", "600 root:root"]
    assert root.run("cat", "/etc/cortex/cortex.toml", user="daemon").returncode == 1
    shown = root.run("getent", "passwd", "cortex")
    assert shown.stdout.strip().endswith(":Cortex gateway:/var/lib/cortex:/sbin/nologin")


def test_the_installed_files_are_what_the_package_has(root: Root):
    assert root.run("rpm", "-V", "cortex").stdout == ""
    completion = root.file("/usr/share/bash-completion/completions/cortex").read_text()
    assert "_CORTEX_COMPLETE=bash_complete" in completion


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
def test_the_installed_unit_and_user_are_sound(root: Root):
    done = root.run("systemd-analyze", "verify", "--man=no", "cortex.service")
    assert (done.returncode, done.stderr) == (0, "")
    done = root.run("systemd-sysusers", "--dry-run", "/usr/lib/sysusers.d/cortex.conf")
    assert done.returncode == 0


def test_a_flavour_of_the_neuron_brings_the_rest_and_torch_is_set_up_by_a_command(
    built: Built, root: Root
):
    done = root.dnf(built.first, "install", f"helexa-neuron-{built.flavours[0]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert root.installed() == [
        "cortex",
        f"helexa-neuron-{built.flavours[0]}",
        "helexa-neuron-common",
    ]
    done = root.run("helexa-neuron-setup", "--check")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nothing is installed in /var/lib/helexa-neuron" in done.stderr
    root.bind(built.wheelhouse, "/wheelhouse")
    root.asked_of_systemd()
    done = root.run("helexa-neuron-setup", "--wheelhouse", "/wheelhouse", "--no-compile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert root.asked_of_systemd() == ["try-restart neuron.service"]
    assert root.run("helexa-neuron-setup", "--check").returncode == 0


def test_gateway_and_neuron_answer_a_chat(built: Built, root: Root):
    root.file("/etc/cortex/cortex.toml").write_text(OUR_CONFIG)
    assert root.run("cortex", "config", "check").returncode == 0
    assert "Paris" in answer(root)
    shown = root.run("cortex", "--version").stdout
    assert "torch 2." in shown
    assert re.search(rf", native-gdn, cuda-1[0-9.]+, {ARCHS[built.flavours[0]]}$", shown)


def test_a_second_flavour_is_refused_and_swapping_changes_it(built: Built, root: Root):
    first, second = (f"helexa-neuron-{flavour}" for flavour in built.flavours[:2])
    done = root.dnf(built.first, "install", second)
    assert done.returncode != 0
    assert "conflicts with helexa-neuron provided by" in done.stdout + done.stderr
    root.asked_of_systemd()
    done = root.dnf(built.first, "swap", first, second)
    assert done.returncode == 0, done.stdout + done.stderr
    assert root.installed() == ["cortex", "helexa-neuron-common", second]
    shown = root.run("cortex", "--version").stdout
    assert re.search(rf", native-gdn, cuda-1[0-9.]+, {ARCHS[built.flavours[1]]}$", shown)
    # The neuron comes back with the new operators; nothing else is touched.
    assert root.asked_of_systemd() == ["daemon-reload", "try-restart neuron.service"]


def test_an_upgrade_keeps_what_was_edited_and_restarts_what_runs(built: Built, root: Root):
    before = root.run("cortex", "--version").stdout
    done = root.dnf(built.newer, "upgrade")
    assert done.returncode == 0, done.stdout + done.stderr
    asked = root.asked_of_systemd()
    assert "try-restart cortex.service" in asked
    assert "try-restart neuron.service" in asked
    assert not [call for call in asked if "disable" in call]
    assert root.file("/etc/cortex/cortex.toml").read_text() == OUR_CONFIG
    sample = root.file("/etc/cortex/cortex.toml.rpmnew").read_text()
    assert sample.endswith("# The end of the sample of a newer version.\n")
    # What nobody edited is simply replaced.
    assert not root.file("/etc/cortex/neuron.toml.rpmnew").exists()
    after = root.run("cortex", "--version").stdout
    assert after.split()[1] == before.split()[1] + ".1"
    assert root.run("helexa-neuron-setup", "--check").returncode == 0
    assert "Paris" in answer(root)


def test_erasing_leaves_the_data_and_what_was_edited(built: Built, root: Root):
    root.write("/var/lib/neuron/model", "some GB")
    names = ["cortex", "helexa-neuron-common", f"helexa-neuron-{built.flavours[1]}"]
    done = root.dnf(built.newer, "remove", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert root.installed() == []
    asked = root.asked_of_systemd()
    assert "--no-reload disable --now cortex.service" in asked
    assert "--no-reload disable --now neuron.service" in asked
    assert not root.file("/usr/bin/cortex").exists()
    assert list(root.file("/usr/lib64").glob("cortex/**/*")) == []
    assert root.file("/var/lib/neuron/model").read_text() == "some GB"
    assert root.file("/var/lib/helexa-neuron/env/site-packages/torch").is_dir()
    assert root.file("/etc/cortex/cortex.toml.rpmsave").read_text() == OUR_CONFIG
