"""The lab's disks as file systems of their own, on loop devices, so that they can fail, fill up and lose what wasn't
synced as real ones do. Without a size the lab's volumes are plain folders.
"""

import fcntl
import os
import shutil
import struct
import subprocess
import threading
from pathlib import Path
from typing import Final

from storage.objects.local_volume import create_marker
from storage.objects.volume import MARKER

FS_IOC_SHUTDOWN: Final = 0x8004587D
GOING_DOWN_WITHOUT_FLUSH: Final = 2
FILLER: Final = "filler"
STATE: Final = "state"


class DiskError(Exception):
    """One line for the person at the terminal."""


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise DiskError(f"{' '.join(words)}: {done.stderr.strip()}")


def mounted(point: Path) -> bool:
    """Also for a bind mount on the same file system, which os.path.ismount doesn't see."""
    with open("/proc/self/mounts", encoding="utf-8") as table:
        return any(line.split()[1] == str(point) for line in table)


class Disks:
    """The file systems of one lab node: one for each volume, and one for catalogue and log."""

    def __init__(self, folder: Path, size_mb: int) -> None:
        self.folder, self.size_mb = folder, size_mb

    @property
    def real(self) -> bool:
        return self.size_mb > 0

    def _points(self) -> dict[Path, Path]:
        """mount point -> image."""
        images = self.folder / "images"
        volumes = sorted((self.folder / "volumes").iterdir())
        return {
            **{point: images / f"{point.name}.img" for point in volumes},
            self.folder / STATE: images / f"{STATE}.img",
        }

    def create(self, volumes: int) -> None:
        """Make what isn't there yet, and mount it."""
        for name in (*(f"volumes/disk{number}" for number in range(1, volumes + 1)), STATE):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if self.real:
            (self.folder / "images").mkdir(exist_ok=True)
            for image in self._points().values():
                if not image.exists():
                    self._format(image)
            self.mount()
        for number in range(1, volumes + 1):
            volume = self.folder / "volumes" / f"disk{number}"
            if not (volume / MARKER).exists():
                create_marker(volume)

    def _format(self, image: Path) -> None:
        with image.open("wb") as file:
            file.truncate(self.size_mb << 20)
        run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))

    def mount(self) -> None:
        if self.real:
            for point, image in self._points().items():
                if not mounted(point):
                    run("mount", "-o", "loop", str(image), str(point))

    def unmount(self) -> None:
        if self.real and (self.folder / "volumes").is_dir():
            for point in self._points():
                while mounted(point):
                    run("umount", "-l", str(point))

    def cut_power(self) -> None:
        """Nothing that wasn't synced is there afterwards. Then `unmount`."""
        if self.real:
            for point in self._points():
                self._shut_down(point)

    def _shut_down(self, point: Path) -> None:
        descriptor = os.open(point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", GOING_DOWN_WITHOUT_FLUSH))
        finally:
            os.close(descriptor)

    def _volume(self, number: int) -> Path:
        if not self.real:
            raise DiskError("this lab's volumes are plain folders; `tandem lab up --disk-size MB` gives it disks")
        point = self.folder / "volumes" / f"disk{number}"
        if not point.is_dir():
            raise DiskError(f"there is no volume {number}")
        return point

    def fail(self, number: int) -> None:
        """From now on every operation on the disk is an I/O error, and what wasn't synced is lost."""
        self._shut_down(self._volume(number))

    def replace(self, number: int) -> Path:
        """An empty disk in the place of the old one; returns its mount point."""
        point = self._volume(number)
        while mounted(point):
            run("umount", "-l", str(point))
        image = self._points()[point]
        image.unlink()
        self._format(image)
        run("mount", "-o", "loop", str(image), str(point))
        return point

    def fill(self, number: int) -> None:
        """Leave no room on the disk."""
        filler = self._volume(number) / FILLER
        with filler.open("wb") as file:
            free = shutil.disk_usage(filler.parent).free
            while free > 0:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)
                    break
                except OSError:
                    free //= 2

    def empty(self, number: int) -> None:
        """Undo `fill`."""
        (self._volume(number) / FILLER).unlink(missing_ok=True)

    def stall(self, number: int, seconds: float) -> None:
        """Let every write to the disk hang for so long."""
        point = self._volume(number)
        run("fsfreeze", "-f", str(point))
        threading.Event().wait(seconds)
        run("fsfreeze", "-u", str(point))

    def flip_bit(self, sop_instance: str) -> Path:
        """Change one byte of an object's pixel data on this node; returns the file."""
        found = [
            path
            for path in (self.folder / "volumes").glob("*/archive/*/*/*/*.dcm")
            if path.stem.split("~")[0] == sop_instance
        ]
        if not found:
            raise DiskError(f"{sop_instance} has no file on this node")
        status = found[0].stat()
        with found[0].open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        os.utime(found[0], ns=(status.st_atime_ns, status.st_mtime_ns))
        return found[0]
