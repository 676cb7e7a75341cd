"""Limits, use and kills of a container, read from files as both versions of control groups lay them out.

Run: pytest tests/test_cgroup.py
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from autopainter.cgroup import Groups

Tree = Mapping[str, str]


def groups_of(place: Path, own: str, files: Tree) -> Groups:
    for name, text in files.items():
        path = place / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (place / "own").write_text(own + "\n")
    return Groups(place / "root", place / "own")


@pytest.mark.parametrize(
    ("own", "files", "memory_bytes", "cores"),
    [
        ("0::/", {"memory.max": "4294967296\n", "cpu.max": "150000 100000\n"}, 4 << 30, 1.5),
        ("0::/", {"memory.max": "max\n", "cpu.max": "max 100000\n"}, None, None),
        ("0::/", {}, None, None),
        (
            "0::/pod/container",
            {"pod/memory.max": "1024\n", "pod/container/memory.max": "2048\n", "pod/container/cpu.max": "max 100000\n"},
            1024,
            None,
        ),
        (
            "5:memory:/host/path\n4:cpu,cpuacct:/host/path\n0::/",
            {
                "memory/memory.limit_in_bytes": "2147483648\n",
                "cpu/cpu.cfs_quota_us": "50000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            2 << 30,
            0.5,
        ),
        (
            "5:memory:/\n4:cpu,cpuacct:/",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
            None,
        ),
    ],
)
def test_limits_of_a_container(
    tmp_path: Path, own: str, files: Tree, memory_bytes: int | None, cores: float | None
) -> None:
    groups = groups_of(tmp_path, own, files)
    assert (groups.memory_bytes(), groups.cores()) == (memory_bytes, cores)


@pytest.mark.parametrize(
    ("quota", "bound", "cores"),
    [("max", 4, 4), ("250000", 4, 2), ("50000", 4, 1), ("800000", 4, 4), ("max", 1, 1), ("300000", 2, 2)],
)
def test_usable_cores_are_bounded_by_time_and_binding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, bound: int, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(bound)))
    assert groups_of(tmp_path, "0::/", {"cpu.max": f"{quota} 100000\n"}).usable_cores() == cores


@pytest.mark.parametrize(
    ("own", "files", "used_bytes"),
    [
        ("0::/", {"memory.max": "2000", "memory.current": "900", "memory.stat": "anon 1\ninactive_file 100"}, 800),
        ("0::/", {"memory.max": "max", "memory.current": "900", "memory.stat": "inactive_file 100"}, None),
        ("0::/", {"memory.max": "2000"}, None),
        (  # the limit that is met first is that of the pod
            "0::/pod/container",
            {
                "pod/memory.max": "1000", "pod/memory.current": "700", "pod/memory.stat": "inactive_file 0",
                "pod/container/memory.max": "2000", "pod/container/memory.current": "300",
                "pod/container/memory.stat": "inactive_file 0",
            },
            700,
        ),
        (
            "5:memory:/host/path",
            {
                "memory/memory.limit_in_bytes": "2000", "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100",
            },
            800,
        ),
    ],
)  # fmt: skip
def test_use_of_what_is_limited(tmp_path: Path, own: str, files: Tree, used_bytes: int | None) -> None:
    assert groups_of(tmp_path, own, files).used_bytes() == used_bytes


@pytest.mark.parametrize(
    ("own", "files", "kills"),
    [
        ("0::/", {"memory.events": "oom 7\noom_kill 3"}, 3),
        ("0::/", {}, 0),
        ("0::/docker/one", {"docker/memory.events": "oom_kill 9", "docker/one/memory.events": "oom_kill 2"}, 2),
        ("5:memory:/host/path\n0::/", {"memory/memory.oom_control": "under_oom 0\noom_kill 4"}, 4),
    ],
)
def test_kills_are_those_of_the_own_group(tmp_path: Path, own: str, files: Tree, kills: int) -> None:
    assert groups_of(tmp_path, own, files).memory_kills() == kills
