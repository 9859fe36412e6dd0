"""Memory logs in three formats, complete, cut off and foreign, with numbers worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tutorial_lib.measure.memory_log import (
    MIB,
    MemoryLogError,
    MemorySeries,
    MemorySummary,
    read_memory_log,
    read_nvidia_smi,
    read_psrecord,
    read_sampler,
)
from tutorial_lib.measure.memory_sampler import FORMAT, sample_memory

LOGS = Path(__file__).parent / "logs"


def process(pid: int, rss: int, pss: int | None, name: str = "python") -> dict[str, Any]:
    return {"pid": pid, "name": name, "rss": rss, "pss": pss}


def write_memory_log(path: Path, *readings: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> Path:
    rows: list[dict[str, Any]] = [{"format": FORMAT, "interval": 0.5, "gpus": []}]
    rows += [{"seconds": i / 2, "processes": host, "gpus": gpus} for i, (host, gpus) in enumerate(readings)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- peak, mean and modes ----------------------------------------------------------------------------------


def summary_of(*mebibytes: int) -> MemorySummary:
    seconds = tuple(map(float, range(len(mebibytes))))
    return MemorySeries("x", "RSS", seconds, tuple(each * MIB for each in mebibytes)).summary()


def test_peak_and_mean() -> None:
    summary = summary_of(10, 40, 40)
    assert (summary.peak, summary.mean, summary.num_samples) == (40 * MIB, 30 * MIB, 3)


@pytest.mark.parametrize(
    ("values", "modes"),
    [
        ((30, 10, 20, 10, 30), (10, 30)),
        ((30, 10, 20), ()),
        ((70,), ()),
        ((9, 11, 14, 26, 25), (10,)),
        ((9, 11, 16, 24, 26), (10, 20)),
    ],
)
def test_all_modes_of_values_rounded_to_ten_mebibytes(values: tuple[int, ...], modes: tuple[int, ...]) -> None:
    assert summary_of(*values).modes == tuple(mode * MIB for mode in modes)


# --- the sampler's own log -------------------------------------------------------------------------------------------


def test_the_samplers_log_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    with sample_memory(tmp_path / "log", interval=60) as path:
        assert read_memory_log(path)["process tree"].summary().num_samples == 1
    log = read_memory_log(path)
    tree = log["process tree"].summary()
    assert log.source == "sampler" and tree.num_samples == 2 and tree.peak > 10 * MIB
    assert [series.label.split(" (")[0] for series in log.series][:2] == ["process tree", "process 1"]


def test_the_tree_is_the_sum_of_its_processes(tmp_path: Path) -> None:
    path = write_memory_log(
        tmp_path / "log",
        ([process(5, 100, 70)], []),
        ([process(5, 100, 60), process(9, 50, 30, "worker")], []),
        ([process(9, 50, 45, "worker")], []),
    )
    log = read_sampler(path)
    tree, first, second = log.series
    assert (tree.label, tree.counted, tree.num_bytes) == ("process tree", "PSS", (70, 90, 45))
    assert (first.label, first.pid, first.seconds, first.num_bytes) == ("process 1 (python)", 5, (0.0, 0.5), (70, 60))
    assert (second.label, second.pid, second.seconds) == ("process 2 (worker)", 9, (0.5, 1.0))
    assert log.timeline("process 2 (worker)") == {"process 2 (worker)": ((0.5, 1.0), (30, 45))}
    assert list(log.timeline()) == [series.label for series in log.series]
    assert [series.summary().peak for series in log.series] == [90, 70, 45]
    with pytest.raises(KeyError, match=r"process tree, process 1 \(python\)"):
        log["tree"]


def test_without_pss_everywhere_all_is_rss(tmp_path: Path) -> None:
    path = write_memory_log(tmp_path / "log", ([process(5, 100, 70), process(9, 50, None)], []))
    assert [(series.counted, series.num_bytes) for series in read_sampler(path).series] == [
        ("RSS", (150,)), ("RSS", (100,)), ("RSS", (50,)),
    ]  # fmt: skip


def test_gpus_and_the_share_of_the_tree(tmp_path: Path) -> None:
    host = [process(5, 1, 1), process(9, 1, 1)]
    idle = {"index": 1, "used": 4, "processes": {}}
    path = write_memory_log(
        tmp_path / "log",
        (host, [{"index": 0, "used": 100, "processes": {}}, idle]),
        (host, [{"index": 0, "used": 180, "processes": {"5": 50, "9": 20}}, idle]),
    )
    found = {series.label: series.num_bytes for series in read_sampler(path).series if series.gpu is not None}
    assert found == {"GPU 0": (100, 180), "GPU 0, process tree": (0, 70), "GPU 1": (4, 4)}


# --- psrecord --------------------------------------------------------------------------------------------------------


def test_a_recorded_psrecord_log() -> None:
    log = read_memory_log(LOGS / "psrecord.txt")
    tree = log["process tree"].summary()
    assert (log.source, tree.counted, tree.num_samples) == ("psrecord", "RSS", 7)
    assert log["process tree"].seconds[-1] == 3.038
    assert tree.peak == round(107.656 * MIB)
    mean = (38.262 + 54.270 + 70.277 + 86.285 + 91.648 + 2 * 107.656) / 7
    assert tree.mean == pytest.approx(mean * MIB, abs=1)
    assert tree.modes == (90 * MIB, 110 * MIB)


def test_psrecord_with_io_columns(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        "# Elapsed time   CPU (%)     Real (MB)   Virtual (MB)  Read count   Write count   Read bytes   Write bytes \n"
        "       0.000        0.000        2.500       43.926          123            1         4096            0\n"
    )
    assert read_memory_log(path)["process tree"].num_bytes == (5 * MIB // 2,)


# --- nvidia-smi ------------------------------------------------------------------------------------------------------


def test_the_workshops_nvidia_smi_log() -> None:
    log = read_memory_log(LOGS / "nvidia-smi.csv")
    first, second = (series.summary() for series in log.series)
    labels = [series.label for series in log.series]
    assert (log.source, labels, first.counted) == ("nvidia-smi", ["GPU 0", "GPU 1"], "GPU")
    assert (first.peak, first.modes) == (21658 * MIB, (0, 21660 * MIB))
    assert first.mean == (4 + 21658 + 21658 + 19998 + 4) / 5 * MIB
    assert (second.peak, second.modes) == (18204 * MIB, (18200 * MIB,))
    assert (first.num_samples, log["GPU 0"].seconds[-1]) == (5, pytest.approx(20.013))
    assert log["GPU 1"].seconds[0] == pytest.approx(0.002), "seconds count from the log's first sample"


@pytest.mark.parametrize("name", ["nvidia-smi-units.csv", "nvidia-smi-noheader.csv"])
def test_units_repeated_headers_and_no_header(name: str) -> None:
    log = read_memory_log(LOGS / name)
    first, second = (series.summary() for series in log.series)
    assert (first.num_samples, first.peak, log["GPU 0"].seconds[-1]) == (3, 3001 * MIB, 10.0)
    assert (second.num_samples, second.peak, second.modes) == (3, 3002 * MIB, (3000 * MIB,))


def test_the_query_of_a_log_without_header_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("2025/09/14 15:12:08.123, 3, Tesla V100, 21658, 32768\n")
    columns = ["timestamp", "index", "name", "memory.used", "memory.total"]
    assert read_nvidia_smi(path, columns=columns)["GPU 3"].num_bytes == (21658 * MIB,)
    with pytest.raises(MemoryLogError, match=r"log:1 .*'Tesla V100' is not memory.*columns="):
        read_nvidia_smi(path)
    path.write_text("2025/09/14 15:12:08.123, 3, 95\n")  # may be a share in percent
    with pytest.raises(MemoryLogError, match=r"'95' is not memory.*columns="):
        read_nvidia_smi(path)
    with pytest.raises(MemoryLogError, match=r"csv:1 is a header. Leave out columns="):
        read_nvidia_smi(LOGS / "nvidia-smi.csv", columns=columns)


@pytest.mark.parametrize("missing", ["timestamp", "index", "memory.used [MiB]"])
def test_a_query_without_a_needed_column_is_refused(tmp_path: Path, missing: str) -> None:
    cells = {"timestamp": "2025/09/14 15:12:08.123", "index": "0", "memory.used [MiB]": "4 MiB"}
    del cells[missing]
    path = tmp_path / "log"
    path.write_text(", ".join(cells) + "\n" + ", ".join(cells.values()) + "\n")
    with pytest.raises(MemoryLogError, match=f"without {missing.split()[0]}.*--query-gpu="):
        read_nvidia_smi(path)


# --- incomplete logs -------------------------------------------------------------------------------------------------

SAMPLES = {
    "psrecord.txt": ("process tree", 7),
    "nvidia-smi.csv": ("GPU 1", 5),
    "nvidia-smi-units.csv": ("GPU 1", 3),
    "nvidia-smi-noheader.csv": ("GPU 1", 3),
    "sampler.jsonl": ("process tree", 2),
}


def copy_log(name: str, directory: Path) -> Path:
    if name == "sampler.jsonl":
        return write_memory_log(directory / name, *[([process(5, MIB, MIB)], [])] * 2)
    return Path(shutil.copy(LOGS / name, directory / name))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("cut", [1, 2, 5, 9, 14])
def test_a_last_line_that_is_being_written_is_left_out(tmp_path: Path, name: str, cut: int) -> None:
    path = copy_log(name, tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    label, samples = SAMPLES[name]
    assert read_memory_log(path)[label].summary().num_samples == samples - 1


@pytest.mark.parametrize("name", SAMPLES)
def test_a_line_torn_in_the_middle_is_named(tmp_path: Path, name: str) -> None:
    path = copy_log(name, tmp_path)
    lines = path.read_text().splitlines()
    lines[1] = lines[1][: len(lines[1]) * 3 // 5]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(MemoryLogError, match=rf"{name}:2 cannot be read .*Remove that line"):
        read_memory_log(path)


@pytest.mark.parametrize("name", SAMPLES)
def test_two_logs_in_one_file_are_refused(tmp_path: Path, name: str) -> None:
    path = copy_log(name, tmp_path)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(MemoryLogError, match=r"cannot be read|earlier than the sample before"):
        read_memory_log(path)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_log_with_windows_line_breaks(tmp_path: Path, name: str) -> None:
    path = copy_log(name, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    label, samples = SAMPLES[name]
    assert read_memory_log(path)[label].summary().num_samples == samples


@pytest.mark.parametrize("name", [name for name in SAMPLES if "noheader" not in name])
def test_a_header_alone_has_no_samples_yet(tmp_path: Path, name: str) -> None:
    path = copy_log(name, tmp_path)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(MemoryLogError, match=r"(no sample|no reading) yet"):
        read_memory_log(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: .*in the writer's output"),
        (b"# Elapsed", "no complete line yet"),
        (b"\n\n", "no complete line yet"),
        (b"\xff\xfet\x00i\x00", "not UTF-8 text"),
        (b"No devices were found\n", "first line is 'No devices were found'.*sample_memory.*nvidia-smi.*psrecord"),
        (b"elapsed_time,nproc,cpu,mem_real,mem_virtual\n", "not a memory log"),
        (b'{"step": 1, "loss": 2.0}\n', "log:1 is not the header of a sampler's log"),
        (b"timestamp, index, memory.used [MiB]\n2025/09/14 15:12:08.123, 0, [N/A]\n", r"log:2 .*'\[N/A\]' is not mem"),
    ],
)
def test_a_foreign_or_empty_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(MemoryLogError, match=f"(?s){said}") as raised:
        read_memory_log(tmp_path / "log")
    assert "log" in str(raised.value)


def test_a_missing_file_and_a_directory_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(MemoryLogError, match=r"none does not exist\. Check the path"):
        read_memory_log(tmp_path / "none")
    with pytest.raises(MemoryLogError, match="cannot be read: Is a directory"):
        read_memory_log(tmp_path)


@pytest.mark.parametrize("read", [read_sampler, read_psrecord])
def test_a_reader_refuses_another_tools_log(read: Any) -> None:
    with pytest.raises(MemoryLogError, match=r"nvidia-smi\.csv:1 is not the header"):
        read(LOGS / "nvidia-smi.csv")
