"""What an instance reaches of the machine and of the other instances."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from tests.integration.conftest import REPOSITORY, Localcloud, make_localcloud
from tests.integration.test_localcloud_snapshots import INSTANCE, INSTANCES
from tests.waiting import until

HOSTILE = r"""#!/bin/bash
boot=$(( $(cat /var/boots 2>/dev/null || echo 0) + 1 ))
echo $boot > /var/boots
echo "boot $boot of $(hostname) as $(id -u) in $(pwd)"
for path in @HOME@ @CHECKOUT@ @LOCALCLOUD@ @SECRET@ /etc/shadow /var/lib/dpkg /oldroot /newroot; do
    test -e "$path" && echo "SEES $path"
done
for place in /usr /usr/bin /bin /lib /usr/lib /proc/sys/kernel /sys @HOME@ @CHECKOUT@ @LOCALCLOUD@; do
    (echo x > "$place/escaped") 2>/dev/null && echo "WROTE $place"
done
(cat /proc/sys/kernel/core_pattern > /proc/sys/kernel/core_pattern) 2>/dev/null && echo "WROTE core_pattern"
(: >> /proc/sysrq-trigger) 2>/dev/null && echo "WROTE sysrq-trigger"
mount -t tmpfs none /mnt 2>/dev/null && echo "MOUNTED"
mknod /var/disk b 8 0 2>/dev/null && echo "MADE a device"
kill -0 @OUTSIDER@ 2>/dev/null && echo "REACHES a process outside"
grep -qs OUTSIDER /proc/*/environ && echo "READS an environment"
# Links and directories that the next boot must not follow out.
for link in /opt/link /usr/local/link /var/lib /etc/ssl /root/.ssh; do
    rm -rf $link 2>/dev/null
    ln -s @HOME@ $link
done
for place in /opt /usr/local /var; do rm -rf $place 2>/dev/null; done
echo $boot > /var/boots
url="http://$GCE_METADATA_HOST/computeMetadata/v1/instance/name"
curl -s -H "Metadata-Flavor: Google" "$url"; echo " answers"
touch /etc/own /root/own /srv/own /tmp/own && echo "has a root of its own"
sleep 99999 &
exit 7
"""


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Localcloud]:
    """A localcloud of the test's own, with a HOME that has something to lose."""
    made = make_localcloud(tmp_path)
    home = tmp_path / "user"
    home.mkdir()
    (home / "id_rsa").write_text("secret")
    try:
        yield replace(made, outer=made.outer | {"HOME": str(home)})
    finally:
        made.command("reset", check=False)


def _run(cloud: Localcloud, script: str) -> str:
    """The console after the first boot of a VM with this script."""
    items = [{"key": "startup-script", "value": script}]
    cloud.done(cloud.request("POST", INSTANCES, INSTANCE | {"metadata": {"items": items}}).json())
    return _console(cloud, 1)


def _console(cloud: Localcloud, boots: int, name: str = "vm") -> str:
    def text() -> str:
        contents: str = cloud.request("GET", f"{INSTANCES}/{name}/serialPort").json()["contents"]
        return contents if contents.count("Finished running startup scripts") == boots else ""

    return until(text, f"boot {boots} of the VM to end")


def test_a_foreign_script_sees_and_changes_nothing_of_the_host(cloud: Localcloud, tmp_path: Path) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("there is no bwrap on PATH: apt install bubblewrap")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    home = Path(cloud.outer["HOME"])
    outsider = subprocess.Popen(["sleep", "600"], env=os.environ | {"WHO": "OUTSIDER"})
    known = {
        "HOME": home,
        "CHECKOUT": REPOSITORY,
        "LOCALCLOUD": cloud.home,
        "SECRET": secret,
        "OUTSIDER": outsider.pid,
    }
    script = HOSTILE
    for name, value in known.items():
        script = script.replace(f"@{name}@", str(value))
    try:
        cloud.command("start")
        console = _run(cloud, script)
        # What the first boot left behind leads the second one nowhere.
        cloud.done(cloud.request("POST", f"{INSTANCES}/vm/reset").json())
        console = _console(cloud, 2)
    finally:
        outsider.kill()
        outsider.wait()
    for boot in (1, 2):
        assert f"boot {boot} of vm as 0 in /\n" in console
    for word in ("SEES", "WROTE", "MOUNTED", "MADE", "REACHES", "READS"):
        assert word not in console, console
    assert console.count("vm answers\n") == console.count("has a root of its own\n") == 2
    assert console.count("startup-script exit status 7\n") == 2
    assert "startup-script is confined" in console
    assert sorted(path.name for path in home.iterdir()) == ["id_rsa"]
    left = subprocess.run(["pgrep", "-f", "sleep 99999"], capture_output=True, check=False).stdout
    assert left == b"", "what it left running ends with it"


# Asks its own metadata server and another instance's, in the ways in which a caller could hide who it is.
ASK = r"""#!/bin/sh
get='curl -s -m 20 -H Metadata-Flavor:Google'
own="http://$GCE_METADATA_HOST/computeMetadata/v1/instance"
other="http://@OTHER@/computeMetadata/v1/instance"
for what in name attributes/secret service-accounts/default/token; do
    echo "OWN $($get "$own/$what")"
    echo "OTHER $($get "$other/$what")"
done
echo "OWN $(env -i $get "$own/name")"
echo "OTHER $(env -i $get "$other/name")"
(setsid sh -c "sleep 0.5; $get $other/name" >"$HOME/detached" &)
until [ -s "$HOME/detached" ]; do sleep 0.1; done
echo "OTHER $(cat "$HOME/detached")"
"""
# What is confined starts no service.
SERVE = r"""
cat >"$SYSTEMD_UNIT_PATH/ask.service" <<EOF
[Service]
ExecStart=/bin/sh -c "$get $own/name >$HOME/service"
EOF
systemctl daemon-reload
systemctl start ask
until [ -s "$HOME/service" ]; do sleep 0.1; done
echo "OWN $(cat "$HOME/service")"
"""
# A process with the user's rights is what it says; this is for one that is confined.
FORGE = r"""
mark='LOCALCLOUD_SUPERVISED=@HOME@#instances/target#web'
echo "OTHER $(env "$mark" $get "$other/name")"
(env "$mark" setsid sh -c "sleep 0.5; $get $other/name" >"$HOME/forged" &)
until [ -s "$HOME/forged" ]; do sleep 0.1; done
echo "OTHER $(cat "$HOME/forged")"
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="callers are found in /proc")
def test_a_metadata_server_answers_the_processes_of_its_own_instance_only(cloud: Localcloud) -> None:
    account = {"email": "default", "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}

    def boot(name: str, script: str) -> str:
        items = [{"key": "startup-script", "value": script}, {"key": "secret", "value": f"of {name}"}]
        body = INSTANCE | {"name": name, "metadata": {"items": items}, "serviceAccounts": [account]}
        cloud.done(cloud.request("POST", INSTANCES, body).json())
        return _console(cloud, 1, name)

    cloud.command("start")
    cloud.trust("#!/bin/sh\n")
    boot("target", "#!/bin/sh\n")
    root = cloud.home / "instances" / "target"
    address = json.loads((root / "instance.json").read_text())["spec"]["ip"]
    host = f"{address}:{json.loads((root / 'ports.json').read_text())['metadata']}"
    scripts = {"trusted": (ASK + SERVE, 3, 5)}
    if shutil.which("bwrap"):
        scripts["confined"] = (ASK + FORGE, 2, 7)
    for name, (text, own, others) in scripts.items():
        script = text.replace("@OTHER@", host).replace("@HOME@", str(cloud.home))
        if name == "trusted":
            cloud.trust(script)
        console = boot(name, script)
        assert console.count(f"OWN {name}\n") == own, console
        assert f"OWN of {name}\n" in console
        assert console.count('OWN {"access_token"') == 1
        assert console.count("OTHER <!DOCTYPE") == console.count("OTHER ") == others
        assert console.count("it is not a process of this instance") == others
    url = f"http://{host}/computeMetadata/v1/instance/attributes/secret"
    assert requests.get(url, headers={"Metadata-Flavor": "Google"}, timeout=20).status_code == 403


def test_a_foreign_script_that_cannot_be_confined_is_refused_unless_it_is_trusted(
    cloud: Localcloud, tmp_path: Path
) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "bwrap").write_text("#!/bin/sh\necho no user namespaces here >&2\nexit 1\n")
    (bin_ / "bwrap").chmod(0o755)
    cloud = replace(cloud, outer=cloud.outer | {"PATH": f"{bin_}:{os.environ['PATH']}"})
    cloud.command("start")
    escaped = tmp_path / "escaped"
    script = f"#!/bin/sh\ntouch '{escaped}'\n"
    console = _run(cloud, script)
    assert "startup-script is refused" in console
    assert "no user namespaces here" in console
    assert "python -m localcloud trust FILE" in console
    assert not escaped.exists()
    cloud.trust(script)
    cloud.done(cloud.request("POST", f"{INSTANCES}/vm/reset").json())
    _console(cloud, 2)
    assert escaped.exists()


def test_only_a_file_that_can_be_read_is_trusted(cloud: Localcloud, tmp_path: Path) -> None:
    for path, content in ((tmp_path / "none", None), (tmp_path / "binary", b"\xff\xfe")):
        if content is not None:
            path.write_bytes(content)
        answer = cloud.command("trust", str(path), check=False)
        assert answer.returncode == 1
        assert str(path) in answer.stderr
        assert "Traceback" not in answer.stderr
