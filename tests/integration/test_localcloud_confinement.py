"""A startup script that is not this checkout's own: what it reaches of the machine."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

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


def _console(cloud: Localcloud, boots: int) -> str:
    def text() -> str:
        contents: str = cloud.request("GET", f"{INSTANCES}/vm/serialPort").json()["contents"]
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
