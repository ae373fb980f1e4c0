"""Lists of launches, what tuning makes of them, and the file that remembers it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, needs_triton

import sla_video
from sla_video.kernels import launch_cache, launch_choice, launch_lists, launch_tuning
from sla_video.kernels.launch_choice import LaunchCase, launch_config, trying
from sla_video.kernels.launch_lists import LaunchConfig, generation, launch_list
from sla_video.kernels.launch_tuning import Problem, tune_operator
from sla_video.kernels.triton_support import _OLDEST_CAPABILITY

CPU = torch.device("cpu")
SAFE, FAST = LaunchConfig(4, 3), LaunchConfig(8, 2)
SMALL = {"block_q": 32, "block_k": 32, "sparsity": 0.5}
PROBLEM = Problem(
    length=70, heads=1, head_dim=32, dtype=torch.float32, sparse_dtype="bf16", **SMALL
)
KERNELS = {
    "block_statistics",
    "prepare_keys",
    "attend",
    "sparse_query_backward",
    "linear_query_backward",
    "key_backward",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a process that has not chosen anything."""
    monkeypatch.setenv("SLA_VIDEO_CACHE", str(tmp_path))
    monkeypatch.setattr(launch_choice, "_chosen", {})
    launch_cache.read_launches.cache_clear()
    yield tmp_path
    launch_cache.read_launches.cache_clear()


@pytest.fixture
def another_process(monkeypatch):
    """Forget what this process knows."""

    def forget() -> None:
        monkeypatch.setattr(launch_choice, "_chosen", {})
        launch_cache.read_launches.cache_clear()

    return forget


@pytest.fixture
def short_list(monkeypatch):
    """SAFE and FAST for the kernel of both branches; one launch for the others."""

    def launches(kernel, *_):
        return (SAFE, FAST) if kernel == "attend" else (LaunchConfig(4, 1, None, 32, 32),)

    monkeypatch.setattr(launch_choice, "launch_list", launches)


def attend_config() -> LaunchConfig:
    return launch_config("attend", torch.empty(1, 8, 1, 32), block_q=32, block_k=32, variant="bf16")


def clock(**seconds):
    """In the place of the GPU's: `safe` and `fast` milliseconds, and who was timed."""

    def timer(runs, device):
        assert device.type == torch.device(DEVICE).type
        timer.timed.append(set(runs))
        return {config: seconds["fast" if config == FAST else "safe"] for config in runs}

    timer.timed = []
    return timer


def tune(timer, **changes):
    problem = Problem(**{**vars(PROBLEM), **changes})
    tuned = tune_operator(problem, torch.device(DEVICE), timer=timer)
    return {launch.case.split()[0]: launch for launch in tuned}


class TestLists:
    @pytest.mark.parametrize("of", list(launch_lists._LISTS))
    def test_each_generation_has_short_lists_for_all_kernels(self, of):
        assert {kernel for kernel, *_ in launch_lists._LISTS[of]} == KERNELS
        for kernel, variant, width in launch_lists._LISTS[of]:
            found = launch_list(kernel, variant, width, of)
            assert 1 <= len(found) <= 6 and len(set(found)) == len(found)
            # Nobody waits for float32; long blocks are unusual.
            assert len(found) > 1 or width == "float32" or variant == "long blocks"
            for config in found:
                assert config.num_warps in (1, 2, 4, 8) and 1 <= config.num_stages <= 6
                assert config.tile_q in (16, 32, 64, 128) and config.tile_k in (16, 32, 64, 128)
                # Registers come in eights, 65,536 for all threads.
                registers = config.max_registers or 8
                assert registers % 8 == 0 and registers * 32 * config.num_warps <= 65536

    @pytest.mark.parametrize(
        ("capability", "wanted"),
        [
            (_OLDEST_CAPABILITY, "8.0"),
            ((8, 6), "8.6"),
            ((8, 9), "8.6"),
            ((9, 0), "9.0"),
            ((10, 0), "10.0"),
            ((10, 3), "10.0"),
            ((12, 0), "12.0"),
            # Unknown: least shared memory.
            ((13, 0), "8.6"),
        ],
    )
    def test_every_gpu_has_a_generation(self, capability, wanted):
        assert generation(capability) == wanted

    def test_all_formats_and_widths_have_a_list(self):
        for of in launch_lists._LISTS:
            for width in ("float32", "narrow", "broad"):
                for kernel in KERNELS - {"sparse_query_backward"}:
                    for variant in ("", "int8", "long blocks"):
                        assert launch_list(kernel, variant, width, of)
                for variant in ("exact", "near"):
                    assert launch_list("sparse_query_backward", variant, width, of)

    def test_the_launches_of_hopper_that_were_measured_come_first(self):
        assert launch_list("attend", "int8", "broad", "9.0")[0] == LaunchConfig(4, 5)
        assert launch_list("prepare_keys", "", "broad", "9.0")[0] == LaunchConfig(8, 4, 128)


class TestChoice:
    def test_without_a_cache_it_is_the_first(self, folder, short_list, monkeypatch):
        assert attend_config() == SAFE
        # Looked up once: nothing is read again.
        monkeypatch.setattr(launch_choice, "read_launches", None)
        monkeypatch.setattr(LaunchCase, "candidates", None)
        assert attend_config() == SAFE
        assert list(folder.iterdir()) == []

    def test_the_shape_is_no_part_of_the_case(self, folder):
        for shape in ((1, 8, 1, 32), (2, 999, 3, 32), (1, 8, 1, 20)):
            launch_config("attend", torch.empty(shape), variant="bf16")
        assert len(launch_choice._chosen) == 1

    def test_trying_counts_inside_only(self, folder, short_list):
        choices = {}
        with trying(choices):
            attend_config()
        ((case, config),) = choices.items()
        assert config == SAFE and case.name == "attend bf16 float32 32 32x32"
        with trying({case: FAST}):
            assert attend_config() == FAST
        assert attend_config() == SAFE


@needs_triton
class TestTuning:
    def test_the_fastest_is_used_here_and_in_later_processes(
        self, folder, short_list, another_process
    ):
        timer = clock(safe=2.0, fast=1.0)
        tuned = tune(timer)
        assert tuned["attend"].chosen == FAST and tuned["attend"].first == SAFE
        assert tuned["attend"].milliseconds == {SAFE: 2.0, FAST: 1.0}
        # What has a single launch is not timed.
        assert timer.timed == [{SAFE, FAST}]
        device = torch.device(DEVICE)
        x = torch.empty(1, 8, 1, 32, device=device)
        sizes = {"block_q": 32, "block_k": 32, "variant": "bf16"}
        assert launch_config("attend", x, **sizes) == FAST
        another_process()
        assert launch_config("attend", x, **sizes) == FAST
        # Elsewhere nothing is known.
        assert launch_config("attend", x.half(), **sizes) == SAFE

    def test_a_device_may_be_named_with_and_without_its_number(self, folder, short_list):
        for device in (torch.device(DEVICE), torch.device(DEVICE, 0)):
            tuned = tune_operator(PROBLEM, device, timer=clock(safe=2.0, fast=1.0))
            assert "attend" in {launch.case.split()[0] for launch in tuned}

    @pytest.mark.parametrize("fast", [1.995, 2.0, 3.0])
    def test_the_first_stays_unless_another_is_clearly_faster(self, fast, folder, short_list):
        assert tune(clock(safe=2.0, fast=fast))["attend"].chosen == SAFE

    def test_a_launch_that_fails_is_left_out(self, folder, short_list, monkeypatch):
        from sla_video.kernels import triton_attend

        real = triton_attend.launch_config

        def launch(*args, **keywords):
            config = real(*args, **keywords)
            if config == FAST:
                raise RuntimeError("out of resource: shared memory\nRequired: 300000")
            return config

        monkeypatch.setattr(triton_attend, "launch_config", launch)
        timer = clock(safe=2.0, fast=1.0)
        tuned = tune(timer)["attend"]
        assert tuned.chosen == SAFE and timer.timed == []
        assert tuned.notes == {FAST: "RuntimeError: out of resource: shared memory"}

    @pytest.mark.parametrize("wrong", [1.02, float("nan")])
    def test_a_wrong_result_never_wins(self, wrong, folder, short_list, monkeypatch, caplog):
        real = launch_tuning.sla2_attention

        def attention(*args, **keywords):
            out = real(*args, **keywords)
            return out * wrong if FAST in launch_choice._tried.values() else out

        monkeypatch.setattr(launch_tuning, "sla2_attention", attention)
        timer = clock(safe=2.0, fast=1.0)
        with caplog.at_level(logging.INFO, "sla_video"):
            tuned = tune(timer)["attend"]
        assert tuned.chosen == SAFE and timer.timed == []
        assert "results differ by" in tuned.notes[FAST]
        assert f"left out: {tuned.notes[FAST]}" in caplog.text

    def test_the_backward_has_launches_of_its_own(self, folder, short_list, monkeypatch):
        def launches(kernel, *_):
            return (SAFE._replace(tile_q=32), FAST) if kernel == "key_backward" else (SAFE,)

        monkeypatch.setattr(launch_choice, "launch_list", launches)
        assert "key_backward" not in tune(clock(safe=2.0, fast=1.0))
        tuned = tune(clock(safe=2.0, fast=1.0), backward=True)
        assert set(tuned) == KERNELS
        assert tuned["key_backward"].chosen == FAST

    def test_warmup_tunes_only_if_told_to(self, folder, short_list, monkeypatch):
        monkeypatch.setattr(launch_tuning, "_gpu_times", clock(safe=2.0, fast=1.0))
        sizes = {"heads": 1, "length": 100, "block_q": 32, "block_k": 32, "device": DEVICE}
        sla_video.warmup(32, dtype=torch.float32, **sizes)
        assert list(folder.iterdir()) == []
        sla_video.warmup(32, dtype=torch.float32, tune=True, **sizes)
        (file,) = folder.iterdir()
        launches = json.loads(file.read_text())["launches"]
        assert launches["attend bf16 float32 32 32x32"] == FAST._asdict()

    def test_the_clock_of_the_device_times_every_launch(self, folder, short_list, monkeypatch):
        once = partial(launch_tuning.time_runs, repeats=1)
        monkeypatch.setattr(launch_tuning, "time_runs", once)
        tuned = tune(None)["attend"]
        assert set(tuned.milliseconds) == {SAFE, FAST}
        assert all(ms > 0 for ms in tuned.milliseconds.values())


class TestFile:
    NAME = "attend bf16 float32 32 32x32"

    def write(self, launches=None):
        found = {self.NAME: FAST._asdict()} if launches is None else launches
        return launch_cache.write_launches(CPU, found)

    def test_it_says_what_it_is_for(self, folder, short_list):
        file = self.write()
        content = json.loads(file.read_text())
        assert set(content["environment"]) == {"gpu", "capability", "torch", "triton", "kernels"}
        assert content["environment"]["torch"] == torch.__version__
        assert attend_config() == FAST
        assert [path.name for path in folder.iterdir()] == [file.name]

    def test_another_environment_has_another_file(self, folder, monkeypatch):
        names = set()
        fields = ("", "gpu", "capability", "torch", "triton", "kernels")
        for name, value in dict.fromkeys(fields, "another").items():
            changed = launch_cache.environment(CPU) | {name: value}
            with monkeypatch.context() as patch:
                patch.setattr(launch_cache, "environment", lambda _, changed=changed: changed)
                names.add(launch_cache.cache_file(CPU).name)
        assert len(names) == 6

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", "Expecting property name"),
            ("[]", "not of format 1"),
            ("[" * 100_000, "maximum recursion"),
            ('{"format": 2}', "not of format 1"),
            (
                '{"format": 1, "environment": {"gpu": "another"}}',
                "another GPU, or by other versions",
            ),
            (b"\xff\xfe\x00", "codec can't decode"),
        ],
    )
    def test_a_file_that_is_damaged_or_foreign_is_ignored(
        self, content, words, folder, short_list, caplog
    ):
        path = launch_cache.cache_file(CPU)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with caplog.at_level(logging.INFO, "sla_video"):
            assert attend_config() == SAFE
            launch_config("attend", torch.empty(1, 8, 1, 128))
        (record,) = caplog.records
        assert words in record.message and str(path) in record.message
        # And replaced by the next that tunes.
        assert self.write() == path and json.loads(path.read_text())["format"] == 1

    @pytest.mark.parametrize("launch", [None, 3, {}, {"num_warps": 64}, SAFE._asdict() | {"x": 1}])
    def test_what_is_not_on_the_list_is_not_launched(self, launch, folder, short_list):
        self.write({self.NAME: launch} if isinstance(launch, dict) else {})
        assert attend_config() == SAFE

    def test_launches_are_added(self, folder):
        self.write({"a": {"num_warps": 1}, "b": {"num_warps": 2}})
        file = self.write({"b": {"num_warps": 4}})
        launches = json.loads(file.read_text())["launches"]
        assert launches == {"a": {"num_warps": 1}, "b": {"num_warps": 4}}

    def test_two_processes_that_write_leave_a_whole_file(self, folder):
        program = (
            "import sys, torch\n"
            "from sla_video.kernels.launch_cache import read_launches, write_launches\n"
            "cpu = torch.device('cpu')\n"
            "for i in range(30):\n"
            "    write_launches(cpu, {f'{sys.argv[1]} {j}': {'num_warps': i} for j in range(50)})\n"
            "    read_launches.cache_clear()\n"
            "    assert len(read_launches(cpu)) >= 50\n"
        )
        commands = [[sys.executable, "-c", program, name] for name in "ab"]
        both = [subprocess.Popen(command, env={**os.environ}) for command in commands]
        assert [process.wait(timeout=300) for process in both] == [0, 0]
        (file,) = folder.iterdir()
        assert json.loads(file.read_text())["format"] == 1

    def test_a_folder_that_cannot_be_written_is_no_error(self, folder, monkeypatch, caplog):
        (folder / "file").write_text("")
        monkeypatch.setenv("SLA_VIDEO_CACHE", str(folder / "file"))
        with caplog.at_level(logging.INFO, "sla_video"):
            assert self.write() is None
        assert "not kept for the next process" in caplog.text

    def test_where_it_lies(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SLA_VIDEO_CACHE", str(tmp_path / "own"))
        assert launch_cache.cache_folder() == tmp_path / "own"
        monkeypatch.delenv("SLA_VIDEO_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert launch_cache.cache_folder() == tmp_path / "xdg" / "sla_video"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert launch_cache.cache_folder() == tmp_path / ".cache" / "sla_video"
