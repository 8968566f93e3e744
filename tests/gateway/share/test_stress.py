"""Other people's programs that check what they write."""

import subprocess

from tests.gateway.share.conftest import Mounted

STRESSORS = ("hdd", "rename", "dentry", "link", "symlink", "dir", "utime", "xattr", "open", "filename")
SECONDS = 4


def test_stress_ng_finds_nothing_wrong(mounted: Mounted) -> None:
    each = [word for name in STRESSORS for word in (f"--{name}", "1")]
    words = ["stress-ng", "--temp-path", str(mounted.point), *each, "--verify", "-t", str(SECONDS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=mounted.point.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "successful run completed" in done.stdout + done.stderr
    assert list(mounted.point.glob("tmp-stress*")) == []


def test_random_writes_are_read_back_as_they_were(mounted: Mounted) -> None:
    words = ["fio", "--name=v", f"--directory={mounted.point}", "--size=4m", "--rw=randwrite", "--bs=4k"]
    words += ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--ioengine=psync", "--fsync=16", "--numjobs=2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=mounted.point.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_mapped_file_is_as_it_was_written(mounted: Mounted) -> None:
    words = ["fio", "--name=m", f"--directory={mounted.point}", "--size=4m", "--rw=randwrite", "--bs=4k"]
    words += ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--ioengine=mmap"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=mounted.point.parent)
    assert done.returncode == 0, done.stdout + done.stderr
