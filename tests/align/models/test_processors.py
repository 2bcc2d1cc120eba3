"""What of a machine this process may use, as the system says it."""

from __future__ import annotations

from align.models import processors


def test_control_groups_and_cores(tmp_path, monkeypatch):
    """An outer group grants the time of two processors; the six that are allowed are threads of three cores."""
    system, own = tmp_path / "sys", tmp_path / "cgroup"
    outer = system / "fs/cgroup/outer"
    (outer / "inner").mkdir(parents=True)
    (outer / "cpu.max").write_text("200000 100000\n")
    (outer / "inner/cpu.max").write_text("max 100000\n")
    own.write_text("0::/outer/inner\n")
    for cpu in range(8):
        folder = system / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(processors, "SYSTEM", system)
    monkeypatch.setattr(processors, "GROUPS_OF_SELF", own)
    monkeypatch.setattr(processors, "allowed", lambda: [0, 1, 2, 4, 5, 6])
    assert (processors.quota(), processors.usable(), processors.cores()) == (2.0, 2, 3)
    own.write_text("4:cpu,cpuacct:/gone\n9:memory:/\n")
    older = system / "fs/cgroup/cpu"
    older.mkdir()
    (older / "cpu.cfs_quota_us").write_text("-1\n")
    (older / "cpu.cfs_period_us").write_text("100000\n")
    assert (processors.quota(), processors.usable()) == (float("inf"), 6)
    (older / "cpu.cfs_quota_us").write_text("150000\n")
    assert (processors.quota(), processors.usable()) == (1.5, 2)
