"""The node check's arithmetic and judgment, from made-up findings, and its table for many nodes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from megatron_tokedit.cli.node_check import clock, gpus, links, network
from megatron_tokedit.cli.node_check.deadlines import Background, TookTooLong, Watchdog, within
from megatron_tokedit.cli.node_check.disks import Disk, SharedFolder, existing_folder
from megatron_tokedit.cli.node_check.facts import Facts, look
from megatron_tokedit.cli.node_check.findings import NO_ANSWER, Limits, Link, Node
from megatron_tokedit.cli.node_check.follower import follow
from megatron_tokedit.cli.node_check.gpus import Gpu, GpuFacts, look_at_gpus, visible
from megatron_tokedit.cli.node_check.judge import judge
from megatron_tokedit.cli.node_check.leader import Leader
from megatron_tokedit.cli.node_check.links import rounds_of, why_failed
from megatron_tokedit.cli.node_check.meeting import Meeting, Place
from megatron_tokedit.cli.node_check.table import last_line, lines
from megatron_tokedit.cli.node_check.versions import COMMIT, SOURCE, git_commit, source_digest
from megatron_tokedit.cli.node_check.work import Work

H100 = "NVIDIA H100 80GB HBM3"


def made_up(num_nodes: int, *, num_gpus: int = 8, width: int = 1) -> list[Node]:
    """Nodes that are well."""
    nodes = []
    for rank in range(num_nodes):
        node = Node(rank, f"n{rank + 1:0{width}}", seconds_ahead=0.0003 * rank if rank else None)
        node.facts = Facts(
            host=node.name,
            versions={"torch": "2.13.0", "numpy": "2.3.1", "transformer-engine": None},
            gpus=GpuFacts(
                [Gpu(index, f"GPU-{index}", H100, 81559, 4) for index in range(num_gpus)],
                driver="570.86",
                num_seen_by_torch=num_gpus,
            ),
            disks={
                "run": Disk("/shared/run", 3_100_000_000_000),
                "/tmp": Disk("/tmp", 800_000_000_000),
                "/dev/shm": Disk("/dev/shm", 500_000_000_000),
            },
            interface="ib0 10.0.0.2",
            num_cores=96,
            num_machine_cores=96,
            memory_bytes=1_900_000_000_000,
            available_memory_bytes=1_800_000_000_000,
            open_files_limit=65536,
        )
        node.links = [Link((rank + 1) % num_nodes, "nccl", 46.0), Link((rank + 1) % num_nodes, "gloo", 2.5)]
        node.copy_gb_per_second = 410.0
        nodes.append(node)
    return nodes


def facts_of(node: Node) -> Facts:
    assert node.facts is not None
    return node.facts


def judged(nodes: list[Node], **limits: Any) -> list[list[str]]:
    judge(nodes, Limits(**limits))
    return [node.faults for node in nodes]


def only(nodes: list[Node], rank: int, **limits: Any) -> str:
    """The one fault of the one node that has one."""
    faults = judged(nodes, **limits)
    assert [bool(own) for own in faults] == [other == rank for other in range(len(nodes))], faults
    (fault,) = faults[rank]
    return fault


# ------------------------------------------------------------------------------------------- the verdict


def test_nodes_that_are_well_have_no_faults() -> None:
    nodes = made_up(4)
    assert judged(nodes, gpu_type="h100") == [[]] * 4
    assert [node.warnings for node in nodes] == [[]] * 4


def test_the_odd_one_out_is_named_though_it_leads() -> None:
    nodes = made_up(3)
    facts_of(nodes[0]).versions["torch"] = "2.12.0"
    assert only(nodes, 0) == "torch 2.12.0 where the others have 2.13.0"


def test_a_core_for_each_gpu() -> None:
    nodes = made_up(2)
    facts_of(nodes[1]).num_cores = 1
    assert only(nodes, 1) == "1 core(s) for 8 GPUs: submit with --cpus-per-task"


def test_of_two_the_second_is_compared_with_the_first() -> None:
    nodes = made_up(2)
    facts_of(nodes[1]).versions |= {"numpy": None, "transformer-engine": "2.11.0"}
    assert judged(nodes)[1] == [
        "no numpy where n1 has 2.3.1",
        "transformer-engine 2.11.0 where n1 has none",
    ]


def test_a_commit_counts_where_the_source_differs() -> None:
    nodes = made_up(2)
    facts_of(nodes[0]).versions |= {COMMIT: "1a2b", SOURCE: "same"}
    facts_of(nodes[1]).versions |= {COMMIT: None, SOURCE: "same"}
    assert judged(nodes) == [[], []]
    facts_of(nodes[1]).versions |= {COMMIT: "3c4d", SOURCE: "edited"}
    assert judged(nodes)[1] == [
        "megatron_tokedit's git commit 3c4d where n1 has 1a2b",
        "megatron_tokedit's source edited where n1 has same",
    ]


def test_several_odd_ones() -> None:
    nodes = made_up(5)
    for rank in (1, 3):
        facts_of(nodes[rank]).versions["torch"] = f"2.{rank}.0"
    faults = judged(nodes)
    assert faults[1] == ["torch 2.1.0 where most have 2.13.0"]
    assert faults[3] == ["torch 2.3.0 where most have 2.13.0"]


def test_gpus_that_differ() -> None:
    nodes = made_up(3)
    facts_of(nodes[1]).gpus.gpus.pop()
    facts_of(nodes[1]).gpus.num_seen_by_torch = 7
    assert only(nodes, 1) == f"7 x {H100} of 80 GiB where the others have 8 x {H100} of 80 GiB"


@pytest.mark.parametrize(
    ("change", "limits", "fault"),
    [
        ({"num_seen_by_torch": 7}, {}, "torch can use 7 of 8 GPUs"),
        ({}, {"gpu_type": "b200"}, f"{H100} where b200 is wanted"),
        ({"gpus": []}, {"gpu_type": "h100"}, "no GPU where h100 is wanted"),
        ({"gpus": [], "num_promised": 8}, {}, "Slurm gives 8 GPU(s) and none is to be seen: in a container?"),
        ({"gpus": [], "num_promised": 8, "complaint": "smi: no driver"}, {}, "none is to be seen (smi: no"),
        ({"complaint": "nvidia-smi: GPU 3 is lost"}, {}, "nvidia-smi: GPU 3 is lost"),
        ({"num_seen_by_torch": None}, {"gpu_type": "h100"}, "this torch is built without CUDA"),
    ],
)
def test_gpu_faults(change: dict[str, Any], limits: dict[str, Any], fault: str) -> None:
    nodes = made_up(1)
    facts = facts_of(nodes[0])
    facts.gpus = GpuFacts(**{**{name: getattr(facts.gpus, name) for name in facts.gpus.__slots__}, **change})
    assert fault in only(nodes, 0, **limits)


def test_one_gpu_that_is_broken_or_in_use() -> None:
    nodes = made_up(1)
    gpu = facts_of(nodes[0]).gpus.gpus[5]
    gpu.trouble, gpu.used_mib, gpu.num_uncorrected_errors = "[GPU requires reset]", 2048, 1
    assert judged(nodes)[0] == [
        "GPU 5: [GPU requires reset]",
        "GPU 5: 1 uncorrected memory errors",
        "GPU 5: 2.0 GiB in use by others",
    ]


def test_gpus_without_a_torch_for_them_only_warn_where_nobody_wants_them() -> None:
    nodes = made_up(1)
    facts_of(nodes[0]).gpus.num_seen_by_torch = None
    assert judged(nodes) == [[]]
    assert nodes[0].warnings == ["this torch is built without CUDA and cannot use the 8 GPU(s)"]


def test_disks() -> None:
    nodes = made_up(3)
    facts_of(nodes[0]).disks["run"] = Disk("/scratch", 400_000_000)
    facts_of(nodes[1]).disks["run"] = Disk("/scratch", 10**12, free_files=3)
    facts_of(nodes[2]).disks |= {"/dev/shm": Disk("/dev/shm", 10**6), "/tmp": Disk("/tmp", 10**6)}
    assert judged(nodes) == [
        ["run folder /scratch: 0.4 GB free, less than --min-free-gb 1 (TOKEDIT_MIN_FREE_GB of a job)"],
        ["run folder /scratch: room for 3 more files only (inodes)"],
        [],
    ]
    assert [warning.partition(" MB free")[0] for warning in nodes[2].warnings] == ["/tmp: 1", "/dev/shm: 1"]


def test_limits_and_leftovers_warn() -> None:
    (node,) = made_up(1)
    facts = facts_of(node)
    facts.open_files_limit, facts.locked_memory_limit_bytes = 1024, 8 << 20
    facts.load, facts.available_memory_bytes = 200.0, 10**9
    judge([node], Limits())
    assert [warning.split(" ")[0] for warning in node.warnings] == ["open", "the", "0.9"]
    facts.num_infiniband_ports = 8
    judge([node], Limits())
    assert "locked memory is limited to 8192 KiB (ulimit -l), which InfiniBand needs" in node.warnings


def test_clocks_of_two_and_of_many() -> None:
    nodes = made_up(2)
    nodes[1].seconds_ahead = 41.2
    assert only(nodes, 1) == "clock 41.2 s ahead of n1's"
    nodes = made_up(4)
    for node, ahead in zip(nodes, [0.0, -30.1, -30.0, -30.0], strict=True):
        node.seconds_ahead = ahead  # node 0's is the wrong one
    assert only(nodes, 0) == "clock 30.0 s ahead of the others'"
    assert judged(nodes, max_clock_skew_seconds=60) == [[]] * 4


def test_a_folder_that_is_not_shared() -> None:
    nodes = made_up(3)
    nodes[1].is_folder_shared, nodes[2].is_folder_shared = True, False
    assert "is not the one of n1" in only(nodes, 2)
    assert "--exclude=n3" in last_line(nodes)
    nodes = made_up(2)
    nodes[1].is_folder_shared = False
    judge(nodes, Limits())
    assert "--exclude" not in last_line(nodes)  # another node would be no better


def slow(rates: Sequence[float], **changes: Any) -> list[Node]:
    nodes = made_up(len(rates))
    for node, rate in zip(nodes, rates, strict=True):
        node.links = [Link(0, "nccl", rate / 2), Link(1, "nccl", rate)]
    return nodes


def test_a_slow_node_needs_three_others() -> None:
    assert judged(slow([40, 41, 9])) == [[]] * 3
    fault = only(slow([40, 41, 42, 9]), 3)
    assert fault == "9 GB/s to other nodes over NCCL, the median of all nodes is 40.5"
    assert only(slow([40, 9]), 1, min_bandwidth_gb=20) == (
        "9 GB/s to other nodes over NCCL, less than --min-bandwidth-gb 20"
    )


def test_a_slow_gloo_beside_nccl_and_slow_copies() -> None:
    nodes = made_up(4)
    nodes[1].links[1] = Link(2, "gloo", 0.1)
    nodes[2].copy_gb_per_second = 12.0
    assert only(nodes, 2) == "12 GB/s between its GPUs, the median of all nodes is 410"
    assert nodes[1].warnings == ["0.1 GB/s to other nodes over gloo, the median of all nodes is 2.5"]


def test_who_is_to_blame_for_pairs_that_failed() -> None:
    nodes = made_up(4)
    for node, partners in zip(nodes, [(1, 2), (0, 3), (3, 0), (2, 1)], strict=True):
        node.links = [
            Link(p, "gloo", None, NO_ANSWER) if 1 in (p, node.rank) else Link(p, "gloo", 2.0)
            for p in partners
        ]
    faults = judged(nodes)
    assert faults[0] == faults[2] == faults[3] == []
    assert faults[1] == ["cannot reach n1 over gloo: no answer", "cannot reach n4 over gloo: no answer"]
    pair = made_up(2)
    pair[0].links = [Link(1, "gloo", None, NO_ANSWER)]
    pair[1].links = [Link(0, "gloo", None, "Unable to find address for: ib7")]
    assert only(pair, 1) == "cannot reach n1 over gloo: Unable to find address for: ib7"
    pair[1].links = [Link(0, "gloo", None, NO_ANSWER)]
    assert [len(faults) for faults in judged(pair)] == [1, 1]
    facts_of(pair[1]).interface = "lo 127.0.1.1"
    assert judged(pair)[0] == [
        "cannot reach n2 over gloo: no answer (gloo listens on lo 127.0.1.1 there; set GLOO_SOCKET_IFNAME)"
    ]
    pair[1].missing = "stopped answering"
    assert only(pair, 1) == "stopped answering"


# ------------------------------------------------------------------------------------------- the table


def test_sixty_four_nodes_are_readable() -> None:
    nodes = made_up(64, width=3)
    nodes[41].missing, nodes[41].facts = "did not come within 120 s", None
    nodes[41].links, nodes[41].seconds_ahead = [], None
    nodes[63].told = ["two\nlines"]
    for node in nodes:
        if node.facts is not None:
            node.facts.open_files_limit = 1024
    judge(nodes, Limits())
    text = list(lines(nodes, 6.13))
    rows = [line for line in text if line.startswith("node ")]
    assert len(rows) == 64
    assert rows[0] == (
        f"node  n001  8 x {H100} (driver 570.86)  ok      to n002 46 GB/s (NCCL), to n002 2.5 GB/s (gloo), "
        "between GPUs 410 GB/s, via ib0 10.0.0.2; free: run 3.1 TB, /tmp 800 GB, shm 500 GB; "
        "96 cores, 1.9 TB"
    )
    status = rows[0].index("ok")
    assert all(row[status:].startswith(("ok  ", "FAILED  ")) for row in rows)
    assert "clock +0.6 ms" in rows[2]
    assert rows[41].split(None, 2)[2] == "-" + rows[41].split("-", 1)[1]
    assert rows[63].endswith("FAILED  two lines")
    (warning,) = [line for line in text if line.startswith("warning: ")]
    assert warning.startswith("warning: open files are limited to 1024 (ulimit -n) (n001, n002, ")
    assert warning.endswith(", n005 and 58 more)")
    assert text[-1] == "64 nodes checked in 6.1 s, 2 failed: n042, n064"
    assert last_line(nodes) == (
        "node n042: did not come within 120 s; node n064: two lines; leave them out: "
        "sbatch --exclude=n042,n064 ..."
    )


def test_many_different_faults_are_cut_in_the_last_line() -> None:
    nodes = made_up(64)
    for node in nodes[:20]:
        node.told = [f"fault {node.rank}"]
    judge(nodes, Limits())
    told = last_line(nodes)
    assert "node n5: fault 4; and 15 more nodes; leave them out: sbatch --exclude=n1,n2," in told


# ------------------------------------------------------------------------------------------- measuring


@given(st.lists(st.integers(0, 999), unique=True, max_size=40))
def test_every_node_has_two_partners(ranks: list[int]) -> None:
    rounds = rounds_of(ranks)
    partners: dict[int, set[int]] = {rank: set() for rank in ranks}
    for pairs in rounds:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy))
        for first, second in pairs:
            assert second not in partners[first]
            partners[first].add(second)
            partners[second].add(first)
    assert len(rounds) <= 3
    assert all(len(own) == min(2, len(ranks) - 1) for own in partners.values())


def test_clock_arithmetic_takes_the_shortest_round_trip() -> None:
    ahead, round_trip = clock.offset_of([(100.0, 90.9, 101.0), (200.0, 190.05, 200.1), (300.0, 250.0, 310.0)])
    assert ahead == pytest.approx(10.0)
    assert round_trip == pytest.approx(0.1)


def test_clocks_of_three_nodes_over_a_store() -> None:
    store = HashStore()
    skews = {1: 41.2, 2: -3.5}
    found: dict[int, float] = {}

    def ask(rank: int, skew: float) -> None:
        found[rank], _ = clock.ask(store, rank, lambda: time.time() + skew)

    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in skews.items()]
    for thread in threads:
        thread.start()
    clock.answer(store, skews, seconds=20.0)
    for thread in threads:
        thread.join(20.0)
    assert found == pytest.approx(skews, abs=0.3)


def test_nobody_waits_for_a_clock_that_does_not_ask() -> None:
    begin = time.monotonic()
    clock.answer(HashStore(), [1], seconds=0.2)
    assert time.monotonic() - begin < 5


def test_why_a_pair_failed() -> None:
    assert why_failed(RuntimeError("wait timeout after 4000ms, keys: /p/0/1")) == NO_ANSWER
    assert why_failed(RuntimeError("[x.cc:84] Connection refused [10.0.0.2]")) == "connection refused"
    assert why_failed(RuntimeError("[enforce fail at d.cc:84] no interface ib7\nmore")) == "no interface ib7"
    assert why_failed(ValueError()) == "ValueError"


def test_nodes_with_gpus_measure_nccl_and_copies_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversation of three nodes, threads here; only what needs a GPU or a network is made up."""
    monkeypatch.setattr(links, "measure_gloo", lambda store, rank, partner, seconds: 2.0 + rank)
    monkeypatch.setattr(links, "measure_nccl", lambda store, rank, partner: 40.0 + partner)
    monkeypatch.setattr(links, "measure_copies", lambda: 410.0)
    store, names = HashStore(), ("n1", "n2", "n3")
    codes: dict[int, int] = {}
    dogs = [Watchdog(lambda: None) for _ in names]

    def work_of(rank: int) -> tuple[Meeting, Work]:
        facts = facts_of(made_up(3)[rank])
        facts.versions["NCCL"] = "2.29.7"
        meeting = Meeting(Place(rank, names, "n1", 1), store, lambda: store)
        return meeting, Work(meeting, tmp_path / "run", Background(lambda: facts))

    def follow_as(rank: int) -> None:
        meeting, work = work_of(rank)
        codes[rank] = follow(meeting, work, dogs[rank], 60.0, 60.0)

    threads = [threading.Thread(target=follow_as, args=(rank,), daemon=True) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    meeting, work = work_of(0)
    leader = Leader(meeting, work, dogs[0], 60.0)
    try:
        judge(leader.find_out(60.0), Limits(gpu_type="h100"))
        leader.announce()
        for thread in threads:
            thread.join(60.0)
    finally:
        for dog in dogs:
            dog.stop()
    work.clear(everyone=True)
    assert codes == {1: 0, 2: 0}
    assert [node.faults for node in leader.nodes] == [[], [], []]
    assert [node.copy_gb_per_second for node in leader.nodes] == [410.0] * 3
    assert [node.is_folder_shared for node in leader.nodes] == [None, True, True]
    best = [node.best_link("nccl") for node in leader.nodes]
    assert [link.partner for link in best if link] == [2, 2, 1]
    assert [link.gb_per_second for link in leader.nodes[2].links if link.transport == "gloo"] == [4.0, 4.0]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- looking


def test_what_a_node_says_of_itself_survives_json(tmp_path: Path) -> None:
    facts = look(tmp_path / "run")
    assert Facts.from_json(facts.to_json()) == facts
    assert facts.num_cores >= 1
    assert facts.memory_bytes > facts.available_memory_bytes > 0
    assert facts.disks["run"].folder == str(tmp_path)
    assert facts.versions["torch"]
    assert facts.interface


def test_gpus_as_nvidia_smi_tells_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        """#!/bin/sh
case "$1" in
*=index*)
    echo "0, GPU-aa, NVIDIA A100, 570.86, 40960, 4"
    echo "1, GPU-bb, NVIDIA A100, 570.86, [GPU requires reset], [N/A]"
    echo "Unable to determine the device handle for GPU2: 0000:65:00.0: Unknown Error"
    exit 255 ;;
*=uuid,ecc*) echo "GPU-aa, [N/A]" ;;
*remapped-rows*) echo "GPU-aa, 1" ;;
*) echo "No devices were found"; exit 6 ;;
esac
"""
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    facts = look_at_gpus({"PATH": str(tmp_path), "SLURM_GPUS_ON_NODE": "3"})
    assert facts.driver == "570.86"
    assert facts.num_promised == 3
    assert facts.describe() == "2 x NVIDIA A100"
    assert facts.complaint is not None
    assert facts.complaint.startswith("nvidia-smi: Unable to determine the device handle")
    assert [gpu.trouble for gpu in facts.gpus] == [
        "broken memory that cannot be remapped any more",
        "[GPU requires reset]",
    ]
    assert facts.gpus[0].num_uncorrected_errors is None
    assert GpuFacts.from_json(asdict(facts)) == facts


def test_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpus, "_QUERY_SECONDS", 0.2)
    assert look_at_gpus({"PATH": str(tmp_path)}).complaint == "nvidia-smi does not answer within 0 s"


def test_which_gpus_the_job_may_use() -> None:
    all_of_them = [Gpu(index, f"GPU-{index}f", H100) for index in range(4)]

    def indices(setting: str | None) -> list[int]:
        return [gpu.index for gpu in visible(all_of_them, setting)]

    assert indices(None) == indices("MIG-abc") == [0, 1, 2, 3]
    assert indices("2,0") == [2, 0]
    assert indices("GPU-1f") == [1]
    assert indices("0,9,1") == [0]
    assert indices("") == []


def test_interfaces_that_are_not_there() -> None:
    known = {"eth0": [], "ib0": [], "lo": []}

    def faults(*, has_gpus: bool = True, **environment: str) -> list[str]:
        return network.interface_faults(environment, has_gpus=has_gpus, known=known)

    assert faults() == faults(GLOO_SOCKET_IFNAME="ib0", NCCL_SOCKET_IFNAME="ib") == []
    assert faults(GLOO_SOCKET_IFNAME="ib") == [
        "GLOO_SOCKET_IFNAME names ib: the interfaces here are eth0, ib0, lo"
    ]
    assert len(faults(NCCL_SOCKET_IFNAME="=ib")) == len(faults(NCCL_SOCKET_IFNAME="enp")) == 1
    assert faults(NCCL_SOCKET_IFNAME="^docker,lo") == faults(NCCL_SOCKET_IFNAME="=ib0") == []
    assert len(faults(NCCL_SOCKET_IFNAME="^eth,ib,lo")) == 1
    assert faults(NCCL_SOCKET_IFNAME="enp", has_gpus=False) == []


def test_the_interface_that_gloo_takes() -> None:
    assert network.interface_of_gloo({"GLOO_SOCKET_IFNAME": "lo"}) == "lo 127.0.0.1"
    assert network.interface_of_gloo({"GLOO_SOCKET_IFNAME": "ib7"}) is None


def test_a_shared_folder(tmp_path: Path) -> None:
    run = tmp_path / "run" / "is" / "not" / "there"
    assert existing_folder(run) == tmp_path
    first, second = SharedFolder(run, "abc"), SharedFolder(run, "abc")
    assert first.write(0) is None
    assert second.sees(0, time.monotonic())
    assert not second.sees(1, time.monotonic())
    (tmp_path / ".node_check-abc-1").write_text("")  # a name without its content yet
    assert not first.sees(1, time.monotonic())
    assert second.write(1) is None
    second.clear(1)
    assert [path.name for path in tmp_path.iterdir()] == [".node_check-abc-0"]
    first.clear()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    shared = SharedFolder(tmp_path, "abc")
    (tmp_path / ".node_check-abc-0").mkdir()
    assert shared.write(0) == f"cannot write to {tmp_path}: Is a directory"


def test_versions_of_the_code(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    (tmp_path / "a.py").write_text("x = 1\n")
    before = source_digest(tmp_path)
    assert source_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert source_digest(tmp_path) != before


# ------------------------------------------------------------------------------------------- deadlines


def test_a_call_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    with pytest.raises(TookTooLong):
        within(0.05, release.wait)
    assert Background.is_any_running()
    release.set()
    assert within(10.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(10.0, lambda: 1 // 0)


def test_the_watchdog_ends_a_process_that_hangs() -> None:
    code = """
import sys, threading
from megatron_tokedit.cli.node_check.deadlines import Watchdog
watchdog = Watchdog(lambda: sys.stderr.write("enough\\n"))
watchdog.allow(0.3)
threading.Event().wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "enough\n"
